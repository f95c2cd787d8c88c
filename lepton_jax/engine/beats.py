"""What the engine tells those who listen to it: `telemetry.BeatStats` of each beat.

The engine knows nobody above it: `Engine.listen` takes anything with the methods of `Listener`, and
what a listener learns it may answer with `Scheduler.knobs`. Read next: `loop.py` (who tells),
`lepton_jax/optimizer` (who listens).
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from lepton_jax.engine.request import StepOutput
from lepton_jax.engine.runner import InFlight
from lepton_jax.engine.scheduler import Scheduler
from lepton_jax.telemetry import BeatStats


class Listener(Protocol):
    """Hears of an engine's beats."""

    def take(self, beat: BeatStats) -> None:
        """After the beat's results are committed, before the next beat is scheduled."""

    def forget(self) -> None:
        """What comes next shall not depend on what was heard before (`Engine.forget`)."""


class Beats:
    """Tells `listeners` what the plans of a scheduler did."""

    def __init__(self, scheduler: Scheduler):
        self.listeners: list[Listener] = []
        self._scheduler = scheduler
        self._before = dataclasses.replace(scheduler.counters)

    def tell(self, done: InFlight, outputs: Sequence[StepOutput]) -> None:
        """Of a plan that was read, and committed with these outputs."""
        if not self.listeners:
            return
        plan, shape, scheduler = done.plan, done.decode_shape, self._scheduler
        before, now = self._before, dataclasses.replace(scheduler.counters)
        self._before = now
        reasons = {o.request_id: o.finish_reason for o in outputs if o.finish_reason}
        stopped = {name for name, reason in reasons.items() if reason == "stop"}
        beat = BeatStats(
            prefill_tokens=sum(len(chunk.tokens) for chunk in plan.chunks),
            prefill_places=done.prefill_places,
            prefill_seconds=done.prefill_seconds,
            long_prompt=plan.long_prompt,
            rows=len(plan.rows),
            row_places=shape.rows if shape else 0,
            view=shape.view if shape else 0,
            steps=done.steps,
            decode_seconds=done.decode_seconds,
            draft=shape.draft if shape else 0,
            rounds=done.rounds,
            decode_tokens=done.tokens,
            gap_seconds=done.gap_seconds,
            tokens=sum(len(output.token_ids) for output in outputs),
            ended=len(reasons),
            stopped=len(stopped),
            idled=len(stopped & {entry.row.request.id for entry in plan.rows}),
            preemptions=now.preemptions - before.preemptions,
            prefix_hit_tokens=now.prefix_hit_tokens - before.prefix_hit_tokens,
            slots=scheduler.most.live_rows,
            tokens_left=scheduler.tokens_left,
            **vars(scheduler.load),
        )
        for listener in self.listeners:
            listener.take(beat)

    def forget(self) -> None:
        """Passes it on."""
        for listener in self.listeners:
            listener.forget()
