"""Joins engines to controllers: hears their beats, sets their knobs, keeps what was decided.

Whether blocks speculate is decided in `engine/draft_length.py`; here it is only told.
"""

import dataclasses
import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from lepton_jax.config import OptimizerSection
from lepton_jax.engine.draft_length import DraftRule
from lepton_jax.engine.loop import Engine
from lepton_jax.optimizer.controller import Controller, Machine
from lepton_jax.optimizer.costs import UNIT, CostMeter, Costs
from lepton_jax.optimizer.decisions import PROGRAM, Decision
from lepton_jax.telemetry import BeatStats

_KEPT = 10_000  # decisions in memory; a log file has them all
_QUIET = 16  # blocks in which speculation is told to have been switched at most once
# Knobs that hold for like rows.
_LEARNED = ("decode_block", "admit_together", "beat_cost", "longest_first", "prefill_beats")


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
        replica: int = 0,
    ):
        """Begins to listen.

        Args:
          timed: measured seconds may count; otherwise the same rows give the same decisions.
          costs: of the engine's programs, as far as they are known.
          knobs: to begin with, as `learned` of an earlier run gave them.
          objective: "throughput", "latency" or "cost" (which is throughput on a given device).
          log: file that each decision is added to as a line of JSON. Raises OSError where it
            can't be written.
          replica: the engine's number, where there are several.
        """
        scheduler, runner = engine.scheduler, engine.runner
        self.decisions: list[Decision] = []
        self.count = 0
        self._scheduler, self._runner = scheduler, runner
        self._log = Path(log) if log else None
        if self._log:
            self._log.open("a", encoding="utf-8").close()
        self._replica, self._own, self._block = replica, scheduler.knobs, 0
        self._switches = _Switches(engine.drafts)
        self._controller = Controller(
            Machine(
                scheduler.knobs,
                scheduler.most,
                prefill_sizes=tuple(runner.rungs.prefill),
                decode_sizes=tuple(runner.rungs.decode),
                compile_seconds=lambda: runner.programs.mean_seconds,
            ),
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

    def knobs(self) -> dict[str, float]:
        """All as they are; `draft` is that of the next block."""
        return vars(self._scheduler.knobs) | {"draft": self._switches.rule.chosen}

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
            if decision.knob == PROGRAM:
                self._runner.grow(int(decision.after))
            else:
                self._scheduler.turn(**{decision.knob: decision.after})
            self._keep(decision)
        for decision in self._switches.after(beat, number=self._controller.beat):
            self._keep(decision)

    def forget(self) -> None:
        """Begins again with the knobs of the beginning, for another block of rows."""
        self._block += self._controller.beat > 0
        self._controller.reset()
        self._switches.forget()
        self._scheduler.turn(**vars(self._controller.knobs))

    def _keep(self, decision: Decision) -> None:
        decision = dataclasses.replace(decision, replica=self._replica, block=self._block)
        self.count += 1
        if self.count <= _KEPT:
            self.decisions.append(decision)
        if self._log:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(decision.to_json() + "\n")


class _Switches:
    """Tells when blocks begin and cease to speculate.

    One length after another is no news, and a row that copies a line here and there none either:
    between two switches that are told there are `_QUIET` blocks.
    """

    def __init__(self, rule: DraftRule):
        self.rule = rule
        self.forget()

    def forget(self) -> None:
        """As new."""
        self._told, self._quiet = 0, _QUIET

    def after(self, beat: BeatStats, *, number: int) -> Iterator[Decision]:
        """The switch to be told after a beat, if there is one."""
        self._quiet += bool(beat.steps)
        now, promise = self.rule.chosen, self.rule.promise
        if bool(now) == bool(self._told) or self._quiet < _QUIET:
            return
        if math.isinf(promise.step_cost):  # a plain block comes first, to measure it
            return
        gain = "more" if now else "fewer"
        why = f"steps with proposals promise {gain} tokens than plain ones of the same time"
        yield Decision(number, "draft", self._told, now, why, promise._asdict())
        self._told, self._quiet = now, 0


class Feedbacks:
    """Those of a model's replicas as one."""

    def __init__(self, each: Sequence[Feedback]):
        self._each = each

    @property
    def decisions(self) -> list[Decision]:
        """The first of each replica, which counts its own beats, merged by blocks and beats."""
        each = (one.decisions for one in self._each)
        return list(heapq.merge(*each, key=lambda d: (d.block, d.beat)))

    @property
    def count(self) -> int:
        """Of all decisions."""
        return sum(one.count for one in self._each)

    def knobs(self) -> dict[str, float]:
        """As they are now: means over the replicas."""
        each = [one.knobs() for one in self._each]
        return {name: sum(knobs[name] for knobs in each) / len(each) for name in each[0]}


def listen_to(
    engines: Sequence[Engine],
    section: OptimizerSection,
    *,
    costs: Costs,
    knobs: Mapping[str, float],
) -> Feedbacks | None:
    """Begins with a feedback for each of a model's replicas, where the config wants it.

    Raises ValueError where it decides by a clock that several hosts don't share.
    """
    if section.feedback == "off":
        return None
    timed = section.feedback == "on"
    if timed and jax.process_count() > 1:
        raise ValueError(
            "optimizer.feedback='on' decides by the clock of one host, but several run this "
            "model: set optimizer.feedback to deterministic or off"
        )
    options = dict(timed=timed, costs=costs, knobs=knobs)
    options |= dict(objective=section.objective, log=section.log)
    return Feedbacks([Feedback(e, **options, replica=n) for n, e in enumerate(engines)])
