"""What happened while a job ran, for its report and for TensorBoard; a bounded amount of it.

Rates over stretches of time are differences of `telemetry.StepStats`; lengths and latencies are
counted in buckets. A row's latency is the time from its hand-over to the engine, where it may
queue, to its answer. Read next: `report_page.py` (the page).
"""

import bisect
import dataclasses
import heapq
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lepton_jax.config import JobSection
from lepton_jax.telemetry import ScalarLog, StepStats

_MOST_STRETCHES = 400  # then two become one, and later ones are twice as long
_SLOWEST = 10
_STEP = 1.05  # width of a bucket of latencies: percentiles are within 5 %
_EDGES = sorted({round(2 ** (i / 2)) for i in range(2, 40)} | {1})  # of lengths, tokens


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Some seconds of a job.

    Attributes:
      begin: seconds from the start of the job; `seconds` how long.
      rows: answered in it.
      stats: what the engine did in it.
    """

    begin: float
    seconds: float
    rows: int
    stats: StepStats

    def joined(self, later: "Stretch") -> "Stretch":
        """Both as one."""
        mine, theirs = dataclasses.asdict(self.stats), dataclasses.asdict(later.stats)
        both = StepStats(**{name: mine[name] + theirs[name] for name in mine})
        return Stretch(self.begin, self.seconds + later.seconds, self.rows + later.rows, both)


class ScalarSink(Protocol):
    """Takes numbers by name as a job goes on."""

    def add(self, rows: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class Trace:
    """Listens to a job.

    Attributes:
      stretches: in order; together the whole job.
      prompt_lengths, output_lengths: rows by tokens, up to and with the key.
      slowest: (seconds, row id, prompt tokens, generated tokens) of the slowest rows.
    """

    def __init__(
        self,
        stats: Callable[[], Mapping[str, float]],
        *,
        knobs: Callable[[], Mapping[str, float]] = dict,
        sink: ScalarSink | None = None,
        seconds: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Reads `stats`, and for the sink `knobs`, about once in so many seconds."""
        self._stats, self._sink, self._seconds, self._clock = stats, sink, seconds, clock
        self._knobs = knobs
        self._started = self._last = clock()
        self._before = StepStats.of(stats())
        self._rows = self._rows_before = 0
        self._handed_over: dict[str, float] = {}
        self._latencies: Counter[int] = Counter()
        self._order = itertools.count()
        self._slowest: list[tuple] = []
        self.stretches: list[Stretch] = []
        self.prompt_lengths: Counter[int] = Counter()
        self.output_lengths: Counter[int] = Counter()

    def begin(self, key: str) -> None:
        """A row is handed over to the engine."""
        self._handed_over[key] = self._clock()

    def end(self, key: str, row: Mapping[str, Any]) -> None:
        """A row is answered."""
        took = self._clock() - self._handed_over.pop(key)
        self._rows += 1
        usage = row.get("body", row).get("usage", row)  # batch answers have it deeper
        prompt, new = (usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens"))
        self._latencies[math.floor(math.log(max(took, 1e-6), _STEP))] += 1
        self.prompt_lengths[_bucket(prompt)] += 1
        self.output_lengths[_bucket(new)] += 1
        item = (took, -next(self._order), key, prompt, new)
        if len(self._slowest) < _SLOWEST:
            heapq.heappush(self._slowest, item)
        else:
            heapq.heappushpop(self._slowest, item)

    def beat(self, *, last: bool = False) -> None:
        """A beat of the engine is over."""
        now = self._clock()
        if now - self._last < self._seconds and not last:
            return
        reading = self._stats()
        stats = StepStats.of(reading)
        rows = self._rows - self._rows_before
        begin = self._last - self._started
        stretch = Stretch(begin, now - self._last, rows, stats - self._before)
        self.stretches.append(stretch)
        self._last, self._before, self._rows_before = now, stats, self._rows
        if self._sink:
            knobs = {f"knobs/{name}": value for name, value in self._knobs().items()}
            self._sink.add(self._rows, scalars(stretch) | filled(reading) | knobs)
        if len(self.stretches) >= _MOST_STRETCHES:
            pairs = zip(self.stretches[::2], self.stretches[1::2], strict=True)
            self.stretches = [first.joined(second) for first, second in pairs]
            self._seconds *= 2

    def close(self) -> None:
        """The job is over, or has failed."""
        if self._sink:
            self._sink.close()

    @property
    def slowest(self) -> list[tuple[float, str, int, int]]:
        return [(item[0], *item[2:]) for item in sorted(self._slowest, reverse=True)]

    def latency(self, share: float) -> float | None:
        """Seconds within which this share of the rows, 0 to 1, was answered; None of no rows."""
        left = share * self._latencies.total()
        for bucket in sorted(self._latencies):
            left -= self._latencies[bucket]
            if left <= 0:
                return _STEP ** (bucket + 0.5)
        return None


def trace_for(
    job: JobSection,
    stats: Callable[[], Mapping[str, float]],
    *,
    knobs: Callable[[], Mapping[str, float]] = dict,
) -> Trace | None:
    """A trace where the job asks for what needs one. Raises ValueError as `ScalarLog` does.

    `stats` and `knobs` are read as the job goes on: `Engine.stats()`, and knobs by name.
    """
    if not (job.report or job.tensorboard):
        return None
    sink = ScalarLog(job.tensorboard) if job.tensorboard else None
    return Trace(stats, knobs=knobs, sink=sink)


def scalars(stretch: Stretch) -> dict[str, float]:
    """The numbers of a stretch that are worth a curve."""
    seconds, stats = max(stretch.seconds, 1e-9), stretch.stats
    speculated = {} if stats.acceptance is None else {"acceptance": stats.acceptance}
    return speculated | {
        "prompt_tokens_per_second": stats.prefill_tokens / seconds,
        "generated_tokens_per_second": stats.decode_tokens / seconds,
        "rows_per_second": stretch.rows / seconds,
        "padding_waste": stats.padding_waste,
        "preemptions": stats.preemptions,
        "prefix_hit_tokens": stats.prefix_hit_tokens,
    }


def filled(stats: Mapping[str, float]) -> dict[str, float]:
    """How full the engine is: rows with a slot, and free pages, as shares of what there is."""
    shares = {"running_rows": ("running", "slots"), "free_pages": ("free_pages", "pages")}
    return {
        name: stats[part] / stats[whole]
        for name, (part, whole) in shares.items()
        if stats.get(whole)
    }


def _bucket(tokens: int) -> int:
    """The upper edge of a length's bucket."""
    place = bisect.bisect_left(_EDGES, tokens)
    return 0 if tokens <= 0 else _EDGES[min(place, len(_EDGES) - 1)]
