"""A job: a file of rows to a file of output rows, in any mode, resumable after a kill.

    job = Job(config, mode)             # checks input and output before a model is loaded
    job.resume(fingerprint)             # what an interrupted run has left to do
    workload = job.workload(tokenizer)  # lengths of the open rows, for plan and warm-up
    tally = job.run(engine, tokenizer)

Rows are read as the engine takes them and written as soon as their turn comes: in the order of the
input, or as they are finished where `job.order` says so. What is held at any time: the rows in the
engine, the answers that wait for an earlier row, and some bytes for each id (`rows.IdSet`).

Rounding depends on which rows are computed together, and a sampled token on rounding. Therefore,
with `job.exact`, rows go through the engine in blocks: each begins in an engine that is as new, so
that a resumed job can compute the block at hand again just as it was, and adds what is not written
yet. Read next: `modes.py`, `rows.py`, `output.py`; `summary.py` makes a report of the tally.
"""

import dataclasses
import datetime
import itertools
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from lepton_jax import kept_programs
from lepton_jax.config import RunConfig
from lepton_jax.distributed.hosts import ALONE, Hosts
from lepton_jax.jobs.alerts import Alerts
from lepton_jax.jobs.files.follow import Pending
from lepton_jax.jobs.files.places import JobError, digest, is_same
from lepton_jax.jobs.files.source import Source
from lepton_jax.jobs.framing import Framing, PlainFraming
from lepton_jax.jobs.modes import Mode, ModeSession
from lepton_jax.jobs.openai_batch import BatchFraming, BatchMode
from lepton_jax.jobs.output import Output, Unwritten
from lepton_jax.jobs.perplexity import bits_per_byte, perplexity_of
from lepton_jax.jobs.row_bar import RowBar
from lepton_jax.jobs.rows import BadRow, Row, RowError, read_rows
from lepton_jax.jobs.session import Engine
from lepton_jax.jobs.trace import Trace
from lepton_jax.optimizer.trial import look_ahead
from lepton_jax.telemetry import running_seconds, scalar_writers
from lepton_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_MOST_UNWRITTEN = 50_000  # answers held while an earlier row runs; about 1 KB each
_BLOCK = 64  # times the engine's rows: a block; its end leaves slots idle for 1/64 of it at most
_MEASURED = 20_000  # requests whose lengths are known before the job begins
_UNMEASURED = 2**30  # tokens: the longest that the engine serves
_PREVIEW_ROWS = 4
_POLL_SECONDS = 0.2  # between looks at an input that is followed
# Fields of the job on which no answer depends.
_NOT_FOR_ANSWERS = "input output limit restart report tensorboard follow exact".split()
_ANSWERS = ("max_len", "kv_dtype")  # fields of the engine on which more than rounding depends
_PLANNED = "num_pages"  # one that may be left to the engine: what it has planned is compared


@dataclasses.dataclass
class Tally:
    """What a job has done; `resumed` of the rows by an earlier run, `seconds` of this one.

    `first_seconds` are those that the process had run when the first tokens came, loading and
    compiling too; None where none did.
    `prompt_tokens` and `generated_tokens` are those of the rows in the output, `preview` its first
    rows as (id, text), `grades` the sum over the `graded` rows, `alerts` those of this run. `cut`
    counts answers that ended for want of room; `logprob`, `tokens` and `bytes` are of the texts of
    the mode perplexity.
    """

    rows: int = 0
    resumed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    first_seconds: float | None = None
    error_types: Counter = dataclasses.field(default_factory=Counter)
    preview: list[tuple[Any, str]] = dataclasses.field(default_factory=list)
    graded: int = 0
    grades: float = 0.0
    alerts: int = 0
    cut: int = 0
    logprob: float = 0.0
    tokens: int = 0
    bytes: int = 0

    @property
    def perplexity(self) -> float | None:
        """exp of the mean loss a token over all texts; None where there are none, or one that the
        model holds for impossible.
        """
        return perplexity_of(self.logprob, self.tokens) if self._is_known else None

    @property
    def bits_per_byte(self) -> float | None:
        """The mean loss a byte over all texts; None as of `perplexity`."""
        return bits_per_byte(self.logprob, self.bytes) if self._is_known else None

    @property
    def _is_known(self) -> bool:
        return bool(self.tokens) and math.isfinite(self.logprob)

    @property
    def accuracy(self) -> float | None:
        """The mean grade of the answered rows whose answer is known; None where none is."""
        return self.grades / self.graded if self.graded else None

    @property
    def errors(self) -> int:
        return self.error_types.total()

    def count(self, row: dict, framing: Framing) -> None:
        """Adds an output row."""
        counts = framing.counts(row)
        self.rows += 1
        self.prompt_tokens += counts.prompt_tokens
        self.generated_tokens += counts.generated_tokens
        self.cut += counts.cut
        self.logprob += counts.logprob
        self.tokens += counts.tokens
        self.bytes += counts.bytes
        if counts.grade is not None:
            self.graded += 1
            self.grades += counts.grade
        if counts.error_type:
            self.error_types[counts.error_type] += 1
        if len(self.preview) < _PREVIEW_ROWS:
            self.preview.append((framing.row_id(row), counts.text))


class Job:
    """One run over one input. Use it as a context manager, or `close` it: it holds a lock."""

    def __init__(self, config: RunConfig, mode: Mode, *, hosts: Hosts = ALONE):
        """Raises JobError where the input can't be read or the output not be written.

        Of several `hosts` the first writes.
        """
        self._config, self._hosts = config, hosts
        if config.job.exact and config.optimizer.feedback == "on":
            raise JobError(
                "optimizer.feedback='on' decides by the clock, so a resumed job can't give the "
                "bytes of one that never stopped: set job.exact=false, or optimizer.feedback to "
                "deterministic"
            )
        self._source = Source(config.job)
        if config.job.tensorboard:
            scalar_writers("job.tensorboard")
        batch = self._source.format == "openai_batch"
        self._mode = BatchMode(mode, config.job.mode) if batch else mode
        self._framing: Framing = BatchFraming() if batch else self._plain_framing()
        self._source.serve(self._mode.fields, id_field=self._framing.id_field)
        alerts = config.scoring.alert and hosts.first
        self.output = Output(config.job) if hosts.first else Unwritten(config.job)
        try:
            self._check_output(batch)
            self._alerts = Alerts(self.output.path) if alerts else None
        except JobError:
            self.close()
            raise
        self._done = bytearray()  # a 1 at the place of each row that an earlier run has done
        self._first_open = 0  # the first place without one
        # For chat templates; a resumed job's is that of the first run.
        self._now = datetime.datetime.now()
        at_once = config.engine.rows * config.replicas
        self._block = _BLOCK * at_once if config.job.exact else sys.maxsize
        self._total: int | None = None
        self.tally = Tally()

    def _check_output(self, batch: bool) -> None:
        job = self._config.job
        if any(is_same(self.output.path, name) for name in self._source.names):
            raise JobError(f"job.output={job.output!r} is the input: give another file")
        for name in ("answer", "keep", "template"):
            if batch and getattr(job, name):
                raise JobError(
                    f"job.{name} is for rows of our own form, not for batch requests, which have "
                    "OpenAI's fields: leave it out"
                )
        if batch and self.output.form != "jsonl":
            raise JobError("answers to batch requests are JSON lines: give a job.output in .jsonl")

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the output to others. What is done stays for a later run."""
        self.output.close()

    def resume(self, fingerprint: str) -> None:
        """Takes over what an interrupted run has done. Raises JobError where it is of another run.

        Args:
          fingerprint: of the model.
        """
        exact, in_order = self._config.job.exact, self._config.job.order == "input"
        parts = self._parts(fingerprint)
        if self._hosts.share(parts["input"]) != parts["input"]:
            raise JobError(
                f"job.input={self._config.job.input!r} holds other files on host "
                f"{self._hosts.index} than on host 0: give all hosts the same, or a place that all "
                "share"
            )
        began = self.output.begin(
            parts, rounding=self._rounding(), restart=self._config.job.restart
        )
        self._total = self._source.rows
        rows = self._rows() if in_order else None
        block: list[dict] = []  # rows that are computed again come to the mode when they are
        for place, done in self.output.done_rows():
            row = next(rows, None) if rows else None
            fits = row is not None and str(row.id) == str(self._framing.row_id(done))
            if 0 < self._config.job.limit <= place:
                raise JobError(
                    f"job.limit={self._config.job.limit}, and {self.output.path}.partial has row "
                    f"{place + 1}: raise it, or start over with --config.job.restart=true"
                )
            if in_order and not fits:
                raise JobError(
                    f"{self.output.path}.partial doesn't fit the input at row {place + 1}: to "
                    "start over, add --config.job.restart=true"
                )
            self._mark(place)
            self.tally.count(done, self._framing)
            self.tally.resumed += 1
            block.append(done)
            if not exact or len(block) == self._block:
                for observed in block:
                    self._mode.observe(observed)
                block.clear()
        if self._hosts.count > 1:
            began, self.tally.resumed = self._hosts.share([began, self.tally.resumed])
            for place in range(self.tally.resumed):  # rows are in the order of the input
                self._mark(place)
        self._now = datetime.datetime.fromisoformat(began)
        if self.tally.resumed:
            again = self.tally.resumed - self._begin if exact else 0
            log.warning(
                "going on after %d rows of an interrupted run%s",
                self.tally.resumed,
                f"; the last {again} are computed once more (job.exact)" if again else "",
            )

    def workload(self, tokenizer: Tokenizer) -> list[tuple[int, Any]]:
        """(prompt tokens, what is asked) of the requests, also of those that are already served:
        programs and sizes must be those that another run of this input has.

        Of a long input only the first are measured, and a last one stands for the longest that the
        engine serves, because what comes later may be as long.
        """
        requests: list[tuple[int, Any]] = []
        tokenizer.now = self._now
        for row in self._rows():
            if isinstance(row, Row):
                try:
                    requests += self._mode.requests(row.work, tokenizer)
                except RowError:
                    continue  # it becomes an error row when its turn comes
            if len(requests) >= _MEASURED:
                break
        longer = len(requests) >= _MEASURED or (requests and self._config.job.follow)
        return [*requests, (_UNMEASURED, requests[-1][1])] if longer else requests

    def end_following(self) -> None:
        """Completes a job that follows its input with the rows that are there."""
        if self._source.follower:
            self._source.follower.stop()

    def run(self, engine: Engine, tokenizer: Tokenizer, *, trace: Trace | None = None) -> Tally:
        """Serves the open rows and completes the output. Raises JobError where it can't be.

        `trace` listens, where a report is wanted.
        """
        started = time.perf_counter()
        self.output.plan(engine.pages)
        session = self._opened(engine, tokenizer)
        beats = _Beats(
            engine,
            session,
            block=self._block,
            look_ahead=look_ahead(self._config) * self._config.replicas,
            in_order=self._config.job.order == "input",
            trace=trace,
        )
        try:
            self.output.open(self.tally.resumed)
            if self._alerts and not self.tally.resumed:
                self._alerts.clear()
            with RowBar(self._total, done=self.tally.rows, errors=self.tally.errors) as bar:
                for row, result in beats.results(self._open_rows(), bar):
                    self._mode.observe(result)
                    if self._is_done(row):
                        continue  # of a block that is computed again
                    line = self._framing.frame(row, result)
                    if line.get("alert") and self._alerts:
                        self._alerts.add(line)
                    self.output.write(row.place, line)
                    self.tally.count(line, self._framing)
                    bar.add_row(self.tally.errors)
            self.output.finish()
            self._hosts.share(True)  # jax gives a host up that the others have left for long
            self._source.report_unseen()
        finally:
            session.close()
            self.output.close()
            if trace:
                trace.close()
        self.tally.seconds = time.perf_counter() - started
        self.tally.first_seconds = beats.first_seconds
        self.tally.alerts = self._alerts.count if self._alerts else 0
        return self.tally

    def _opened(self, engine: Engine, tokenizer: Tokenizer) -> ModeSession:
        tokenizer.now = self._now
        try:
            return self._mode.open(engine, tokenizer)
        except RowError as error:  # of what the mode itself asks
            raise JobError(f"job.mode={self._config.job.mode} can't begin: {error}") from error

    def _rows(self, *, follow: bool = False) -> Iterator[Row | BadRow | Pending]:
        """The input's rows; with `follow` also those that come, where the job follows its input."""
        source = self._source
        records = source.followed() if follow else source
        return read_rows(records, self._mode, id_field=self._framing.id_field, strict=source.strict)

    def _plain_framing(self) -> PlainFraming:
        several, job = len(self._source.names) > 1, self._config.job
        return PlainFraming(several_files=several, graded=bool(job.answer), mode=job.mode)

    def _open_rows(self) -> Iterator[Row | BadRow | Pending]:
        """What is to be computed: with `job.exact` from the beginning of the block at hand."""
        if self._config.job.exact:
            return (row for row in self._rows() if row.place >= self._begin)
        return (row for row in self._rows(follow=True) if not self._is_done(row))

    def _is_done(self, row: Row | BadRow | Pending) -> bool:
        return (
            not isinstance(row, Pending)
            and row.place < len(self._done)
            and bool(self._done[row.place])
        )

    def _mark(self, place: int) -> None:
        if place >= len(self._done):
            self._done.extend(bytes(max(place + 1 - len(self._done), 2**16)))
        self._done[place] = 1
        while self._first_open < len(self._done) and self._done[self._first_open]:
            self._first_open += 1

    @property
    def _begin(self) -> int:
        """The place from which on rows are computed: the beginning of the block at hand."""
        return self._first_open // self._block * self._block

    def _rounding(self) -> dict[str, Any]:
        """By name what says which rows are computed together, and so how numbers are rounded."""
        config = self._config
        others = (*_ANSWERS, _PLANNED)
        engine = {n: v for n, v in vars(config.engine).items() if n not in others}
        return {
            "job.limit": config.job.limit,
            "pool.ray": config.pool.ray,
            "optimizer.objective": config.optimizer.objective,
            **{f"engine.{name}": value for name, value in engine.items()},
            **{f"mesh.{name}": value for name, value in vars(config.mesh).items()},
            **kept_programs.circumstances(),
        }

    def _parts(self, fingerprint: str) -> dict[str, Any]:
        """All else that the answers depend on."""
        config = self._config
        job = {n: v for n, v in vars(config.job).items() if n not in _NOT_FOR_ANSWERS}
        engine = {name: getattr(config.engine, name) for name in _ANSWERS}
        sections = {
            "model": vars(config.model),
            "compression": vars(config.compression),
            "sampling": vars(config.sampling),
            "scoring": vars(config.scoring),
            "engine": engine,
            "job": job,
        }
        optimizer = config.optimizer
        profile = "" if optimizer.profile in ("auto", "off") else digest(optimizer.profile)[0]
        sections["optimizer"] = {"feedback": optimizer.feedback, "profile": profile}
        if config.cascade.agreement:
            sections["cascade"] = vars(config.cascade)
        flat = {f"{s}.{name}": v for s, values in sections.items() for name, v in values.items()}
        return {"input": self._source.digests(), "model": fingerprint} | flat


class _Beats:
    """Feeds a session and takes its results, in order or as they come; `first_seconds` as in
    `Tally`.
    """

    def __init__(
        self,
        engine: Engine,
        session: ModeSession,
        *,
        block: int,
        look_ahead: int,
        in_order: bool,
        trace: Trace | None,
    ):
        self._engine, self._session, self._block = engine, session, block
        self._look_ahead, self._in_order, self._trace = look_ahead, in_order, trace
        self._block_at_hand = -1
        self.first_seconds: float | None = None

    def results(
        self, rows: Iterable[Row | BadRow | Pending], bar: RowBar
    ) -> Iterator[tuple[Row | BadRow, dict]]:
        """(row, output row without its id) of all rows."""
        session, queue = self._session, _Queue(rows)
        open_rows: dict[str, tuple[int, Row]] = {}
        waiting: dict[int, tuple[Row | BadRow, dict]] = {}
        numbers = itertools.count()
        more, turn = True, 0
        while more or session.has_work:
            while more and len(session) < self._look_ahead and len(waiting) < _MOST_UNWRITTEN:
                row = queue.head
                if row is None:
                    more = False
                    break
                if isinstance(row, Pending):
                    if not session.has_work:
                        time.sleep(_POLL_SECONDS)
                    queue.pop()
                    break
                if not self._may_begin(row):
                    break
                queue.pop()
                number = next(numbers)
                failure = row.result if isinstance(row, BadRow) else self._add(row)
                if failure is None:
                    open_rows[str(row.id)] = number, row
                else:
                    waiting[number] = row, failure
                    if not self._in_order:
                        break
            tokens = 0
            for progress in session.step() if session.has_work else ():
                tokens += progress.tokens
                if progress.row is not None:
                    number, row = open_rows.pop(progress.key)
                    waiting[number] = row, progress.row
                    if self._trace:
                        self._trace.end(progress.key, progress.row)
            if tokens and self.first_seconds is None:
                self.first_seconds = running_seconds()
            if self._trace:
                self._trace.beat(last=not (more or session.has_work))
            if self._in_order:
                while turn in waiting:
                    yield waiting.pop(turn)
                    turn += 1
            else:
                yield from waiting.values()
                waiting.clear()
            bar.add_beat(tokens, len(waiting))

    def _may_begin(self, row: Row | BadRow) -> bool:
        """Whether its block has begun, or begins now because the one before is over."""
        block = row.place // self._block
        if block != self._block_at_hand:
            if self._session.has_work:
                return False
            self._engine.forget()
            self._block_at_hand = block
        return True

    def _add(self, row: Row) -> dict | None:
        try:
            self._session.add(str(row.id), row.work)
        except RowError as error:
            return {"error": {"type": error.kind, "message": str(error)}}
        if self._trace:
            self._trace.begin(str(row.id))
        return None


class _Queue:
    """Rows with a look at the next, `head`; None at the end."""

    def __init__(self, rows: Iterable[Row | BadRow | Pending]):
        self._rows = iter(rows)
        self.head = next(self._rows, None)

    def pop(self) -> None:
        self.head = next(self._rows, None)
