"""What an engine's knobs should be, from what its beats did. Pure Python: no jax, no engine, no
clock.

While rows wait, a slot is busy for a row's life: its steps, those that idle after it ended (to the
end of the block, and the whole block that was dispatched meanwhile), and the wait for others to be
admitted together. From the rates at which rows end, which are counted, and from `Costs` follows the
throughput of any block length and any number to admit together; the best is taken where it promises
enough more than what is set. With `meter`, costs are measured as the job goes on; without it every
decision follows from counts alone, so that the same rows give the same decisions.
Read next: `costs.py`, `feedback.py` (who calls this), `simulated_engine.py` (what it is tested on).
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator

from lepton_jax.engine.knobs import Knobs
from lepton_jax.optimizer.costs import UNIT, CostMeter, Costs
from lepton_jax.optimizer.decisions import PROGRAM, Decision
from lepton_jax.telemetry import BeatStats

_EVERY = 4  # beats between decisions
_MEMORY = 24  # beats after which a count weighs 1/e
_LEAST_ENDED = 4  # rows whose ends must have been seen
_WORTH = 0.05  # share of throughput that a change must promise, and that may be lost unseen
_CALM = 64  # beats without a preemption after which fewer pages are kept in reserve
_SHARES = (0.6, 0.8, 1.0, 1.2, 1.4)  # of the mean tokens of a prefill
_PAYS = 2.0  # what a new program must save, beside what compiling it takes: that slows a CPU too
_LATENCY_SHARE = 0.85  # of the best throughput that is kept where latency is wanted


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a controller must know of its engine.

    Attributes:
      knobs: those that were asked for; their values are where it begins, `most` how far it may go.
      prefill_sizes: tokens of the prefill programs, ascending.
      decode_sizes: rows of the decode programs, ascending.
      compile_seconds: that a program took so far.
    """

    knobs: Knobs
    most: Knobs
    prefill_sizes: tuple[int, ...]
    decode_sizes: tuple[int, ...] = ()
    compile_seconds: Callable[[], float] = float


@dataclasses.dataclass
class Counts:
    """Decaying sums over beats; `row_steps` are those of all rows, `steps` those of the blocks, and
    `missed` the shares of these that had no row, because long prompts kept others waiting.
    """

    beats: float = 0.0
    steps: float = 0.0
    row_steps: float = 0.0
    ended: float = 0.0
    stopped: float = 0.0
    idled: float = 0.0
    prefilled: float = 0.0
    preemptions: float = 0.0
    missed: float = 0.0

    def add(self, beat: BeatStats) -> None:
        keep = math.exp(-1 / _MEMORY)
        for field in dataclasses.fields(self):
            setattr(self, field.name, keep * getattr(self, field.name))
        self.beats += 1
        self.steps += beat.steps
        self.row_steps += beat.rounds
        self.ended += beat.ended
        self.stopped += beat.stopped
        self.idled += beat.idled
        self.prefilled += beat.prefill_tokens
        self.preemptions += beat.preemptions
        if beat.long_prompt and beat.waiting and beat.running < beat.slots:
            rows = min(beat.slots, beat.running + beat.waiting)
            self.missed += beat.steps * max(0.0, 1 - beat.rows / rows)


class Controller:
    """Decides from beats; `decide` gives the knobs and the reasons of what changed.

    Attributes:
      knobs: as they should be.
      beat: the number of the last one.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        costs: Costs = UNIT,
        meter: CostMeter | None = None,
        objective: str = "throughput",
    ):
        self._machine, self._prior, self._meter = machine, costs, meter
        self._objective = objective
        self._costs = costs
        self._grown: set[tuple[int, int]] = set()  # rows and view of programs that were asked for
        self.reset()

    def begin(self, knobs: Knobs) -> None:
        """As new, from now on with these knobs at first."""
        self._machine = dataclasses.replace(self._machine, knobs=knobs)
        self.reset()

    def reset(self) -> None:
        """As new; what was measured of costs stays, because it is used only with the clock."""
        self.knobs, self._counts = self._machine.knobs, Counts()
        self.beat = 0
        self._calm = 0  # beats since the last preemption
        self._last = BeatStats()  # that decoded

    def decide(self, beat: BeatStats) -> list[Decision]:
        """Takes a beat in; what shall change before the next, which `knobs` has then."""
        self.beat += 1
        self._counts.add(beat)
        if beat.steps:
            self._last = beat
        if self._meter:
            self._meter.take(beat)
        decisions = list(self._pages(beat))
        if self.beat % _EVERY == 0:
            if self._meter:
                self._costs = self._meter.costs(self._prior)
            decisions += self._order()
            decisions += self._long_prompts()
            if beat.waiting:
                decisions += self._blocks(beat)
            elif self._meter:
                decisions += self._program(beat)
        return decisions

    def _set(self, name: str, value: float, why: str, **numbers: float) -> Iterator[Decision]:
        before = getattr(self.knobs, name)
        if value != before:
            self.knobs = dataclasses.replace(self.knobs, **{name: value})
            yield Decision(self.beat, name, before, value, why, numbers)

    def _pages(self, beat: BeatStats) -> Iterator[Decision]:
        """Keeps pages in reserve while much time goes into what preempted rows compute again."""
        self._calm = 0 if beat.preemptions else self._calm + 1
        now = self.knobs.reserve_pages
        if beat.preemptions:
            share = self._lost_share()
            wanted = max(now, int(beat.pages * min(0.5, share) / 4)) if share > _WORTH else now
            why = "preempted rows are computed again: a quarter of that share of time, in pages"
            numbers = dict(lost_share=share, free=beat.free_pages)
            yield from self._set("reserve_pages", wanted, why, **numbers)
        elif now and self._calm >= _CALM:
            self._calm = 0
            why = "no row was preempted for long"
            yield from self._set("reserve_pages", now // 2, why, beats=_CALM)

    def _lost_share(self) -> float:
        """Of the time, what went into prompts and outputs of preempted rows."""
        c, costs = self._counts, self._costs
        length = (c.prefilled + c.row_steps / 2) / (c.ended + c.preemptions)
        lost = c.preemptions * (costs.prefill_seconds(0) + costs.program_token * length)
        return lost / self._spent()

    def _spent(self) -> float:
        """Seconds of the beats that are counted."""
        c, costs = self._counts, self._costs
        seconds = costs.program_token * c.prefilled + c.steps * self._step_seconds()
        return seconds + c.beats * (costs.block + costs.gap)

    def _step_seconds(self) -> float:
        """Of a step like the last one."""
        rows = self._last.row_places or self._machine.most.live_rows
        return self._costs.step_seconds(rows, self._last.view)

    def _long_prompts(self) -> Iterator[Decision]:
        """Fewer blocks in between while rows miss many of them because of their long prompts."""
        now, why = self.knobs.prefill_beats, "no row is kept waiting by the prompts of others"
        if self._objective == "latency":
            yield from self._set("prefill_beats", min(now, 1), why)
            return
        share = self._counts.missed * self._step_seconds() / (self._spent() or 1.0)
        if share > _WORTH:
            self._counts.missed = 0.0
            wanted = min(self._machine.most.prefill_beats, max(1, 4 * now))
            why = "blocks between long prompts ran for few rows"
            yield from self._set("prefill_beats", wanted, why, missed_share=share)

    def _order(self) -> Iterator[Decision]:
        """Longest first while limits say how long rows will be."""
        c = self._counts
        if c.ended < _LEAST_ENDED:
            return
        share = c.stopped / c.ended
        now = self.knobs.longest_first
        wanted = share < (0.6 if now else 0.4)
        why = "most rows run to their limits" if wanted else "most rows end before their limits"
        yield from self._set("longest_first", wanted, why, stopped_share=share)

    def _blocks(self, beat: BeatStats) -> Iterator[Decision]:
        """Block length and rows to admit together, by the throughput that they promise."""
        if self._counts.ended < _LEAST_ENDED or not self._counts.row_steps:
            return
        flow = self._flow()
        knobs, most = self.knobs, self._machine.most
        now = flow.rate(knobs.decode_block, knobs.admit_together)
        blocks = _grid(most.decode_block)
        groups = [n for n in _grid(most.live_rows) if n <= max(1, most.live_rows // 2)]
        rates = {(s, k): flow.rate(s, k) for s in blocks for k in groups}
        block, together = max(rates, key=rates.get)
        if self._objective == "latency":
            enough = _LATENCY_SHARE * rates[block, together]
            block, together = min(key for key, rate in rates.items() if rate >= enough)
        elif rates[block, together] < now * (1 + _WORTH):
            return
        numbers = dict(
            life=flow.life,
            stopped_share=flow.stopped,
            prompt=flow.prompt,
            step_seconds=flow.step,
            beat_seconds=flow.beat,
            rate_before=now,
            rate_after=rates[block, together],
        )
        why = "of block lengths and rows to admit together these promise the most tokens a second"
        if self._objective == "latency":
            why = "the shortest blocks and waits that keep most of the throughput"
        yield from self._set("decode_block", block, why, **numbers)
        yield from self._set("admit_together", together, why, **numbers)
        if self._meter and flow.step:  # of tiny models it is lost in the rest
            cost = round(flow.beat / flow.step, 1)
            if abs(cost - knobs.beat_cost) > 0.3 * knobs.beat_cost:
                yield from self._set("beat_cost", cost, "measured", **numbers)

    def _program(self, beat: BeatStats) -> Iterator[Decision]:
        """A decode program for the rows that are left, where it pays back its compilation."""
        c, costs, rows = self._counts, self._costs, beat.running
        asked = {size for size, view in self._grown if view == beat.view}
        sizes = sorted({*self._machine.decode_sizes, *asked})
        size = 1 << (rows - 1).bit_length() if rows else 0
        now = next((s for s in sizes if s >= rows), 0)
        if not size or 2 * size > now or beat.draft or not beat.steps or c.ended < _LEAST_ENDED:
            return
        below = max((s for s in sizes if s < size), default=0)  # until the next program fits
        ends = sum(1 / left for left in range(below + 1, rows + 1))  # in lives of a row
        steps = min(beat.tokens_left, ends * c.row_steps / c.ended)
        before, after = (costs.step_seconds(s, beat.view) for s in (now, size))
        compiling = self._machine.compile_seconds()
        saved = (before - after) * (steps - compiling / before) if before > after else 0.0
        if saved > _PAYS * compiling:
            self._grown.add((size, beat.view))
            why = "no row waits, and a decode program for those left pays its compilation back"
            numbers = dict(rows=rows, steps=steps, step_before=before, step_after=after)
            numbers |= dict(compile_seconds=compiling, saved_seconds=saved)
            yield Decision(self.beat, PROGRAM, now, size, why, numbers)

    def _flow(self) -> "Flow":
        c, costs, last = self._counts, self._costs, self._last
        rows, view = last.row_places or self._machine.most.live_rows, last.view
        return Flow(
            rows=self.knobs.live_rows,
            life=c.row_steps / c.ended,
            stopped=c.stopped / c.ended,
            idled=c.idled / c.ended,
            prompt=c.prefilled / c.ended,
            step=costs.step_seconds(rows, view),
            beat=costs.gap + costs.decode_seconds(0, rows, view),
            costs=costs,
            sizes=self._machine.prefill_sizes,
        )


@dataclasses.dataclass(frozen=True)
class Flow:
    """Rows on their way through the slots while others wait.

    Attributes:
      rows: slots.
      life: decode steps of a row.
      stopped: share of rows that end before their limit; `idled` the share that does in a block.
      prompt: tokens computed for a row before.
      step, beat: seconds of a step, and of a beat besides its steps.
      costs, sizes: of prefill programs.
    """

    rows: int
    life: float
    stopped: float
    idled: float
    prompt: float
    step: float
    beat: float
    costs: Costs
    sizes: tuple[int, ...]

    def rate(self, block: int, together: int) -> float:
        """Tokens a second with blocks of so many steps and so many rows admitted together."""
        # Of those whose only token came with a prefill about half sit in the block behind it.
        idle = (1.5 * self.idled + 0.5 * (self.stopped - self.idled)) * block
        idle += (1 - self.stopped) * 0.5 * (block - 1)
        busy = self.life + idle  # steps of a slot
        ended = block * self.rows / busy  # rows of a block
        held = busy / (1 - max(0.0, together - ended) / (2 * self.rows))
        group = min(self.rows, max(together, ended))
        seconds = self.step + self.beat / block  # of a step of all slots
        seconds += self._prefill(group) * self.rows / held / group
        return self.rows * self.life / held / seconds

    def _prefill(self, rows: float) -> float:
        """Seconds to compute the prompts of about so many rows: on average, since both the number
        and the lengths vary, and a program is as large as the next size.
        """
        return statistics.fmean(self._programs(rows * self.prompt * share) for share in _SHARES)

    def _programs(self, tokens: float) -> float:
        largest = self.sizes[-1]
        whole, rest = divmod(tokens, largest)
        size = next(size for size in self.sizes if size >= rest)
        last = self.costs.prefill_seconds(size) if rest else 0.0
        return whole * self.costs.prefill_seconds(largest) + last


def _grid(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and `most`."""
    powers = [2**n for n in range(most.bit_length())]
    return sorted({n for p in powers for n in (p, p * 3 // 2) if n <= most} | {most})
