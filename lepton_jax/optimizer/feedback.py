"""Joins an engine to a controller: hears its beats, sets its knobs, keeps what was decided."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from lepton_jax.engine.loop import Engine
from lepton_jax.optimizer.controller import Controller, Machine
from lepton_jax.optimizer.costs import UNIT, CostMeter, Costs
from lepton_jax.optimizer.decisions import Decision
from lepton_jax.telemetry import BeatStats

_KEPT = 10_000  # decisions in memory; a log file has them all
_LEARNED = ("decode_block", "admit_together", "beat_cost", "longest_first")  # hold for like rows


class Feedback:
    """Listens to one engine.

    Attributes:
      decisions: the first of them, in order.
      count: of all.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        timed: bool,
        costs: Costs = UNIT,
        knobs: Mapping[str, float] | None = None,
        objective: str = "throughput",
        log: str | Path = "",
    ):
        """Begins to listen.

        Args:
          timed: measured seconds may count; otherwise the same rows give the same decisions.
          costs: of the engine's programs, as far as they are known.
          knobs: to begin with, as `learned` of an earlier run gave them.
          objective: "throughput", "latency" or "cost" (which is throughput on a given device).
          log: file that gets each decision as a line of JSON. Raises OSError where it can't be
            written.
        """
        scheduler = engine.scheduler
        self.decisions: list[Decision] = []
        self.count = 0
        self._scheduler, self._log = scheduler, Path(log) if log else None
        if self._log:
            self._log.write_text("", encoding="utf-8")
        self._own = scheduler.knobs
        self._controller = Controller(
            Machine(scheduler.knobs, scheduler.most, tuple(engine.runner.rungs.prefill)),
            costs=costs,
            meter=CostMeter() if timed else None,
            objective=objective,
        )
        self.begin(knobs or {})
        engine.listen(self)

    @property
    def learned(self) -> dict[str, float]:
        """The knobs as they are, where they aren't the engine's own."""
        now = {name: getattr(self._controller.knobs, name) for name in _LEARNED}
        return {name: value for name, value in now.items() if value != getattr(self._own, name)}

    def begin(self, knobs: Mapping[str, float]) -> None:
        """Begins again, from now on with these knobs besides the engine's own, as far as its
        programs allow them.
        """
        most = self._scheduler.most
        allowed = {name: min(value, getattr(most, name)) for name, value in knobs.items()}
        self._controller.begin(dataclasses.replace(self._own, **allowed))
        self._scheduler.turn(**vars(self._controller.knobs))

    def take(self, beat: BeatStats) -> None:
        """Decides after a beat."""
        for decision in self._controller.decide(beat):
            self._scheduler.turn(**{decision.knob: decision.after})
            self.count += 1
            if self.count <= _KEPT:
                self.decisions.append(decision)
            if self._log:
                with self._log.open("a", encoding="utf-8") as file:
                    file.write(decision.to_json() + "\n")

    def forget(self) -> None:
        """Begins again with the knobs of the beginning."""
        self._controller.reset()
        self._scheduler.turn(**vars(self._controller.knobs))
