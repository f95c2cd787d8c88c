"""An engine without a model: the real scheduler, a device that only takes time, a clock of its own.

It predicts what a workload costs with given sizes and `Costs`, to the beat: pages, sharing, padding
and preemptions are the scheduler's own. Controllers are tested on it, because its best knobs can be
found by trying all. What rows would say isn't known, so a `SimulatedRow` says how long it gets.
Read next: `costs.py`, `predict.py`.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

import numpy as np

from lepton_jax.config import SamplingParams
from lepton_jax.engine.beats import Beats, Listener
from lepton_jax.engine.draft_length import DraftRule
from lepton_jax.engine.packing import DecodeShape
from lepton_jax.engine.request import BlockResult, Plan, Request, StepOutput
from lepton_jax.engine.row_params import SampleSpec
from lepton_jax.engine.rungs import Rungs, Sizes, fit
from lepton_jax.engine.runner import InFlight
from lepton_jax.engine.scheduler import Scheduler
from lepton_jax.engine.scored import ScoreResult, Scoring
from lepton_jax.optimizer.costs import Costs

_SPEC = SampleSpec()
_RUNNING, _STOPPED, _LIMIT = 0, 1, 2
_Results = tuple[BlockResult | None, ScoreResult | None, BlockResult | None]  # of block and prefill


@dataclasses.dataclass(frozen=True)
class SimulatedRow:
    """A request: its prompt, the most outputs it may have, and how many it will have.

    `scoring`: is asked instead of outputs.
    """

    prompt_ids: tuple[int, ...]
    limit: int
    length: int
    scoring: Scoring | None = None


@dataclasses.dataclass(frozen=True)
class SimulatedSizes(Sizes):
    """Sizes of an engine, with the backend's tile and whether it has views.

    `queue`: most rows that are added before others end, as a job's look-ahead; 0: all at once.
    """

    prefix_cache: bool = True
    tile: int = 1
    has_views: bool = True
    queue: int = 0


class SimulatedEngine:
    """Serves simulated rows.

    Attributes:
      seconds: of its clock.
      tokens: generated so far.
      runner, scheduler, drafts: what a `Feedback` asks of an engine.
    """

    def __init__(
        self,
        sizes: SimulatedSizes,
        costs: Costs | Callable[[float], Costs],
        *,
        noise: Callable[[random.Random], float] = lambda _: 1.0,
        seed: int = 0,
        compile_seconds: float = 10.0,
    ):
        """`costs` may be a function of the clock; `noise` gives a factor for a program's time. A
        new program is there `compile_seconds` after it was asked for; none slows the others.
        """
        self.seconds, self.tokens, self.beats = 0.0, 0, 0
        self._sizes, self._noise, self._random = sizes, noise, random.Random(seed)
        self._costs = costs if callable(costs) else lambda _: costs
        self.scheduler = Scheduler(sizes, q_tile=sizes.tile, prefix_cache=sizes.prefix_cache)
        self.runner = self.programs = self  # what a Feedback asks of an engine's runner
        self.mean_seconds = compile_seconds  # of a program
        self._grown: dict[tuple[int, int], float] = {}  # by rows and view, when they are compiled
        self._view = 0  # of the last block
        self.rungs = Rungs.of(sizes, tile=sizes.tile, has_views=sizes.has_views)
        self.drafts = DraftRule((), self.rungs.decode)
        self._beats = Beats(self.scheduler)
        self._rows: dict[str, SimulatedRow] = {}
        self._produced: dict[str, int] = {}  # outputs that the device has made
        self._in_flight: tuple[InFlight, _Results] | None = None
        self._added = 0

    def listen(self, listener: Listener) -> None:
        self._beats.listeners.append(listener)

    def run(self, rows: Sequence[SimulatedRow]) -> float:
        """Serves all rows; the seconds that it took."""
        started, waiting, open_rows = self.seconds, list(reversed(rows)), 0
        most = self._sizes.queue or len(rows)
        while waiting or open_rows:
            while waiting and open_rows < most:
                self.add(waiting.pop())
                open_rows += 1
            open_rows -= sum(output.finish_reason is not None for output in self.step())
        return self.seconds - started

    def add(self, row: SimulatedRow) -> None:
        """Queues a row."""
        name, self._added = str(self._added), self._added + 1
        params = SamplingParams(max_tokens=max(1, row.limit))
        self.scheduler.add(Request(name, row.prompt_ids, params, scoring=row.scoring))
        self._rows[name], self._produced[name] = row, 0

    def grow(self, rows: int) -> None:
        """As `Runner.grow`."""
        self._grown.setdefault((rows, self._view), self.seconds + self.mean_seconds)

    def step(self) -> list[StepOutput]:
        """One beat, as `Engine.step`."""
        plan = self.scheduler.schedule()
        flight = self._run(plan) if plan else None
        done, self._in_flight = self._in_flight, flight
        if done is None:
            return []
        self.beats += 1
        flight, results = done
        outputs = self.scheduler.commit(flight.plan, *results)
        self._beats.tell(flight, outputs)
        self.tokens += sum(len(output.token_ids) for output in outputs)
        return outputs

    def _run(self, plan: Plan) -> tuple[InFlight, _Results]:
        """The device runs a plan at once; the clock goes on by what it costs."""
        costs, flight = self._costs(self.seconds), InFlight(plan, 0.0)
        result = scores = sampled = None
        flight.gap_seconds = costs.gap
        if plan.chunks:
            tile = self._sizes.tile
            tiles = sum(-(-len(chunk.tokens) // tile) for chunk in plan.chunks)
            flight.prefill_places = fit(self.rungs.prefill, tiles * tile)
            seconds = costs.prefill_seconds(flight.prefill_places)
            flight.prefill_seconds = seconds * self._noise(self._random)
            if plan.scoring:
                scores = _no_scores(plan)
            else:
                sampled = self._sample(plan)
        if plan.rows:
            result, flight.steps = self._decode(plan)
            views = self.rungs.views
            view = fit(views, max(entry.cached for entry in plan.rows)) if views else 0
            grown = [
                size for (size, v), at in self._grown.items() if v == view and at <= self.seconds
            ]
            rows = fit(sorted([*self.rungs.decode, *grown]), len(plan.rows))
            self._view = view
            flight.decode_shape = DecodeShape(rows, self._sizes.decode_block, 0, _SPEC, view)
            flight.tokens = flight.rounds = int(result.count.sum())
            seconds = costs.decode_seconds(flight.steps, rows, view)
            flight.decode_seconds = seconds * self._noise(self._random)
        self.seconds += flight.gap_seconds + flight.prefill_seconds + flight.decode_seconds
        return flight, (result, scores, sampled)

    def _sample(self, plan: Plan) -> BlockResult:
        """What a prefill samples, a line for each chunk; only that of a final one counts."""
        count, finish = np.zeros(len(plan.chunks), np.int32), []
        for chunk in plan.chunks:
            name, produced = chunk.row.request.id, len(chunk.row.outputs) + 1
            if chunk.final:
                self._produced[name] = produced
            finish.append(self._finish(name, chunk.row.limit, produced))
        tokens = np.full((len(count), 1), 7, np.int32)
        return BlockResult(tokens=tokens, count=count, finish=np.array(finish))

    def _finish(self, name: str, limit: int, produced: int) -> int:
        """How a row of so many outputs stands, as `BlockResult.finish`."""
        row = self._rows[name]
        if produced < min(row.length, limit):
            return _RUNNING
        return _STOPPED if row.length < limit else _LIMIT

    def _decode(self, plan: Plan) -> tuple[BlockResult, int]:
        """The block's result and the steps that it ran: it stops once all rows are done."""
        counts, finish = [], []
        for entry in plan.rows:
            name = entry.row.request.id
            row, before = self._rows[name], self._produced[name]
            end = min(row.length, entry.row.limit)
            self._produced[name] = after = max(before, min(end, before + plan.steps))
            counts.append(after - before)
            finish.append(self._finish(name, entry.row.limit, after))
        tokens = np.full((len(counts), 1 + plan.steps), 7, np.int32)
        done = BlockResult(tokens=tokens, count=np.array(counts), finish=np.array(finish))
        return done, max(counts, default=0)


def _no_scores(plan: Plan) -> ScoreResult:
    """Zeros for all that is asked of a plan's chunks."""
    places = sum(len(chunk.scored_places) for chunk in plan.chunks)
    zeros = np.zeros((places, max(chunk.row.request.scoring.width for chunk in plan.chunks)))
    return ScoreResult(zeros, zeros, np.zeros((len(plan.chunks), 1)))
