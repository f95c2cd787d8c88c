"""A cascade: the compressed model answers first, the dense one the rows where that is unsure.

`CascadeMode` wraps a mode that chooses (score with choices, classify, rank) and is a mode itself,
so files, order, resuming and reports are the driver's as ever. Each output row gets
{"cascade": {"model", "why", "margin", "same"}} (`promise.Verdict`); error rows stay as they are.
Which rows are sure, audited or calibrated with is `promise.py`'s to say; the two engines that look
like one are `engine/cascade.py`.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from lepton_jax.config import CascadeSection, CompressionSection, EngineSection, RunConfig
from lepton_jax.engine.cascade import CascadeEngine
from lepton_jax.engine.scored import ScoreSpec
from lepton_jax.jobs.modes import Progress
from lepton_jax.jobs.promise import Promise, Verdict
from lepton_jax.jobs.rows import RowError
from lepton_jax.jobs.scoring import ChoosingMode, ScoringSession, plain
from lepton_jax.text.tokenizer import Tokenizer

_DIGITS = 6  # of a margin: decisions are made with what the output row says
_MOST_MARGIN = 1e6  # JSON has no infinity


def check_cascade(config: RunConfig) -> None:
    """Raises ValueError where the models of a config are no cascade."""
    compression = config.compression
    if compression.preset == "none" and not compression.rules and not config.cascade.model:
        raise ValueError(
            "cascade.agreement: nothing says how the model that answers first is compressed: give "
            "compression.preset, such as w8a8, or cascade.model, the path of the uncompressed one"
        )
    if config.pool.ray or config.hosts.coordinator:
        raise ValueError(
            "cascade.agreement works in one process: leave out pool.ray and hosts.coordinator "
            "(mesh.data and mesh.model may be given)"
        )


def half_of_the_cache(section: EngineSection) -> EngineSection:
    """Of an engine whose device holds another."""
    return dataclasses.replace(section, cache_share=section.cache_share / 2)


def dense_config(config: RunConfig) -> RunConfig:
    """Of the model that a cascade falls back on: it is not compressed, it only scores, and chats
    are made by the other's template.
    """
    alone = dict(speculation="off", draft_model="", draft_preset="none")
    path = config.cascade.model or config.model.path
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=path, chat_variables={}),
        compression=CompressionSection(),
        cascade=CascadeSection(),
        engine=dataclasses.replace(half_of_the_cache(config.engine), **alone),
        optimizer=dataclasses.replace(config.optimizer, log=""),
    )


class CascadeMode:
    """A `Mode` over a `CascadeEngine`.

    Attributes:
      promise: what has become of the promised agreement so far.
    """

    def __init__(
        self, compressed: ChoosingMode, dense: ChoosingMode, section: CascadeSection, *, burst: int
    ):
        """Raises ValueError as `Promise` does.

        Args:
          compressed, dense: the same mode twice: each may learn something of its own model.
          section: what is promised.
          burst: requests that wait for the dense model before it works, for full batches.
        """
        self._compressed, self._dense, self.burst = compressed, dense, burst
        self.promise = Promise(section)
        self.fields = compressed.fields
        self.times = Times()

    @classmethod
    def of(cls, make: Callable[[], ChoosingMode], config: RunConfig) -> "CascadeMode":
        """Of what makes the mode, for the engines of a config."""
        burst = 2 * config.engine.rows * config.replicas
        return cls(make(), make(), config.cascade, burst=burst)

    def parse(self, values: Mapping[str, Any]) -> Any:
        """As of the mode."""
        return self._compressed.parse(values)

    def requests(self, work: Any, tokenizer: Tokenizer) -> list[tuple[int, ScoreSpec]]:
        """As of the mode: either model may be asked."""
        return self._compressed.requests(work, tokenizer)

    def open(
        self, engine: CascadeEngine, tokenizer: Tokenizer, *, exact: bool = False
    ) -> "CascadeSession":
        """A session that asks both engines. `exact` as of `ScoringSession`."""
        compressed = self._compressed.open(engine, tokenizer, exact=True)
        dense = self._dense.open(engine.dense, tokenizer, exact=True)
        return CascadeSession(self, compressed, dense, exact=exact)

    def observe(self, row: Mapping[str, Any]) -> None:
        """Lets the promise see a row of the output."""
        if "cascade" in row:
            self.promise.observe(Verdict(**row["cascade"]))

    def account(self) -> dict[str, Any]:
        """What became of the promise, and of time: for a job's summary."""
        return self.promise.account() | {"of_dense_time": self.times.of_dense}

    def choose(self, answer: Mapping[str, Any]) -> tuple[int, float]:
        """As of the mode; the margin as output rows have it."""
        choice, margin = self._compressed.choose(answer)
        return choice, round(min(margin, _MOST_MARGIN), _DIGITS)


@dataclasses.dataclass
class Times:
    """Seconds in all beats and in those of the dense model, for `rows` and `dense_rows`."""

    rows: int = 0
    seconds: float = 0.0
    dense_rows: int = 0
    dense_seconds: float = 0.0

    @property
    def of_dense(self) -> float | None:
        """Their share of the time that the dense model would take for all rows, estimated from what
        those that it answered took; None where it answered none.
        """
        if not self.dense_rows:
            return None
        return round(self.seconds * self.dense_rows / (self.rows * self.dense_seconds), 3)


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """A row that the dense model answers, and what the compressed one chose; None: nothing."""

    choice: int | None
    margin: float
    why: str


class CascadeSession:
    """A `ModeSession` of two. The dense model works when enough rows wait for it, or at the end."""

    def __init__(
        self,
        mode: CascadeMode,
        compressed: ScoringSession,
        dense: ScoringSession,
        *,
        exact: bool = False,
    ):
        self._mode, self._compressed, self._dense = mode, compressed, dense
        self._exact = exact
        self._works: dict[str, Any] = {}
        self._waiting: dict[str, _Waiting] = {}

    @property
    def has_work(self) -> bool:
        return self._compressed.has_work or self._dense.has_work

    def __len__(self) -> int:
        return len(self._compressed) + len(self._dense)

    def add(self, key: str, work: Any) -> None:
        """Queues a row for the compressed model. Raises RowError, and queues nothing."""
        if key in self._waiting:
            raise RowError("duplicate_id", f"{key!r} is already being scored: keys must differ")
        self._compressed.add(key, work)
        self._works[key] = work

    def step(self) -> list[Progress]:
        """One beat of one of the engines."""
        times, begun = self._mode.times, time.perf_counter()
        dense = not self._compressed.has_work or len(self._dense) >= self._mode.burst
        if dense:
            found = [self._last(progress) for progress in self._dense.step()]
        else:
            found = [self._first(progress) for progress in self._compressed.step()]
        seconds, rows = time.perf_counter() - begun, sum(p.row is not None for p in found)
        times.seconds, times.rows = times.seconds + seconds, times.rows + rows
        if dense:
            times.dense_seconds += seconds
            times.dense_rows += rows
        return found

    def close(self) -> None:
        """Drops what is not answered yet."""
        self._compressed.close()
        self._dense.close()
        self._works.clear()
        self._waiting.clear()

    def _first(self, progress: Progress) -> Progress:
        """What the compressed model said: the answer, or a reason to ask the dense one."""
        key, row = progress.key, progress.row
        if row is None:
            return progress
        work = self._works.pop(key)
        choice, margin = (None, 0.0) if "error" in row else self._mode.choose(row)
        why = self._mode.promise.why_dense(key, margin)
        if not why:
            return self._done(progress, Verdict("compressed", "sure", margin, None))
        try:
            self._dense.add(key, work)
        except RowError as error:
            failure = {"error": {"type": error.kind, "message": str(error)}}
            return dataclasses.replace(progress, row=failure)
        self._waiting[key] = _Waiting(choice, margin, why)
        return dataclasses.replace(progress, row=None)

    def _last(self, progress: Progress) -> Progress:
        """What the dense model said."""
        row = progress.row
        if row is None:
            return progress
        first = self._waiting.pop(progress.key)
        if "error" in row:
            return progress
        same = self._mode.choose(row)[0] == first.choice
        return self._done(progress, Verdict("dense", first.why, first.margin, same))

    def _done(self, progress: Progress, verdict: Verdict) -> Progress:
        answer = progress.row if self._exact else plain(progress.row)
        return dataclasses.replace(progress, row=answer | {"cascade": dataclasses.asdict(verdict)})
