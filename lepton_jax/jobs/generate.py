"""The generate job: a file of prompts to a file of answers, in input order, resumable after a kill.

    job = GenerateJob(config)           # checks input and output before a model is loaded
    job.resume(fingerprint)             # what an interrupted run has left to do
    workload = job.workload(tokenizer)  # lengths of the open rows, for plan and warm-up
    tally = job.run(engine, tokenizer)

Rows are read as the engine takes them and written as soon as all before them are done. An output
row is {"id", "text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens"}, with
"logprobs" where asked: [{"logprob", "top": [[id, logprob], ...]} for each token]. With n > 1 it is
{"id", "choices": [{"text", "token_ids", "finish_reason"}, ...], "prompt_tokens",
"completion_tokens"}, the last of all choices together.
Read next: `rows.py`, `session.py`, `output.py`; `summary.py` makes a report of the tally.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from lepton_jax.config import RunConfig, SamplingParams
from lepton_jax.jobs.output import JobError, OutputFile, check_input, file_digest
from lepton_jax.jobs.rows import BadRow, PromptRow, RowError, read_rows
from lepton_jax.jobs.session import Choice, Completion, Engine, Session, encode, expand
from lepton_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_LOOK_AHEAD = 4  # times the engine's rows: queued requests, so that freed slots are filled at once
_MOST_UNWRITTEN = 50_000  # answers held while an earlier row runs; about 1 KB each


@dataclasses.dataclass
class Tally:
    """What a job has done; `resumed` of the rows by an earlier run, `seconds` of this one.

    `prompt_tokens` and `generated_tokens` are those of the rows in the output.
    """

    rows: int = 0
    resumed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    error_types: Counter = dataclasses.field(default_factory=Counter)

    @property
    def errors(self) -> int:
        return self.error_types.total()

    def count(self, row: dict) -> None:
        """Adds an output row."""
        self.rows += 1
        if "error" in row:
            self.error_types[row["error"]["type"]] += 1
        else:
            self.prompt_tokens += row["prompt_tokens"]
            self.generated_tokens += row["completion_tokens"]


class GenerateJob:
    """One run over one file."""

    def __init__(self, config: RunConfig):
        """Raises JobError where the input can't be read or the output not be written."""
        self._config = config
        self._input = check_input(config.job.input)
        self.output = OutputFile(config.job.output)
        if self.output.path.exists() and self.output.path.samefile(self._input):
            raise JobError(f"job.output={config.job.output!r} is the input: give another file")
        self._key = ""
        self._total = 0
        self.tally = Tally()

    def resume(self, fingerprint: str) -> None:
        """Takes over what an interrupted run of this input, config and model has done."""
        self._key = self._run_key(fingerprint)
        for row, done in zip(self._rows(), self.output.done_rows(self._key), strict=False):
            if done.get("id") != row.id:
                log.warning("%s doesn't fit the input: starting over", self.output.partial)
                self.tally = Tally()
                return
            self.tally.count(done)
            self.tally.resumed += 1
        if self.tally.resumed:
            log.warning("going on after %d rows of an interrupted run", self.tally.resumed)

    def workload(self, tokenizer: Tokenizer) -> list[tuple[int, SamplingParams]]:
        """(prompt tokens, params) of each request that is still to be served."""
        requests = []
        self._total = self.tally.resumed
        for row in self._open_rows():
            self._total += 1
            if isinstance(row, PromptRow):
                try:
                    count = len(encode(tokenizer, row.prompt))
                except RowError:
                    continue  # it becomes an error row when its turn comes
                requests += [(count, params) for params in expand(row.sampling)]
        return requests

    def run(self, engine: Engine, tokenizer: Tokenizer) -> Tally:
        """Serves the open rows and completes the output. Raises JobError where it can't be."""
        started = time.perf_counter()
        session = Session(engine, tokenizer)
        look_ahead = _LOOK_AHEAD * self._config.engine.rows
        self.output.open(self._key, self.tally.resumed)
        try:
            with _Progress(self._total, self.tally.resumed) as progress:
                for row in _in_order(self._open_rows(), session, look_ahead, progress):
                    self.output.write(row)
                    self.tally.count(row)
            self.output.finish()
        finally:
            session.close()
            self.output.close()
        self.tally.seconds = time.perf_counter() - started
        return self.tally

    def _rows(self) -> Iterator[PromptRow | BadRow]:
        return read_rows(self._input, self._config.sampling)

    def _open_rows(self) -> Iterator[PromptRow | BadRow]:
        return itertools.islice(self._rows(), self.tally.resumed, None)

    def _run_key(self, fingerprint: str) -> str:
        """A digest of all that the answers depend on; sizes of the engine are no part of it."""
        config = self._config
        parts = [
            file_digest(self._input),
            fingerprint,
            dataclasses.asdict(config.model),
            dataclasses.asdict(config.compression),
            dataclasses.asdict(config.sampling),
            [config.engine.max_len, config.engine.kv_dtype],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def output_row(row_id: str | int, completion: Completion) -> dict:
    """The output row of an answered prompt; an error row where the model failed."""
    if any(choice.finish_reason == "error" for choice in completion.choices):
        message = "the model gave logits that are not finite: try another dtype or preset"
        return BadRow(row_id, "not_finite", message).as_json()
    pieces = [_choice(choice) for choice in completion.choices]
    answer = pieces[0] if len(pieces) == 1 else {"choices": pieces}
    return {"id": row_id, **answer} | {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": sum(len(choice.token_ids) for choice in completion.choices),
    }


def _choice(choice: Choice) -> dict:
    piece = {
        "text": choice.text,
        "token_ids": choice.token_ids,
        "finish_reason": choice.finish_reason,
    }
    if choice.logprobs is not None:
        piece["logprobs"] = [
            {"logprob": _finite(value), "top": [[i, _finite(p)] for i, p in top]}
            for value, top in choice.logprobs
        ]
    return piece


def _finite(value: float) -> float | None:
    """JSON has no infinity: the logarithm of nothing becomes null."""
    return value if math.isfinite(value) else None


def _in_order(
    rows: Iterable[PromptRow | BadRow], session: Session, look_ahead: int, progress: "_Progress"
) -> Iterator[dict]:
    """Output rows in the order of the rows, each as soon as all before it are done."""
    queue = enumerate(rows)
    more = True
    places: dict[str, tuple[int, str | int]] = {}  # by session key: the row's place and id
    waiting: dict[int, dict] = {}  # output rows whose turn has not come, by place
    due = 0
    while more or session.has_work:
        while more and len(session) < look_ahead and len(waiting) < _MOST_UNWRITTEN:
            place, row = next(queue, (-1, None))
            if row is None:
                more = False
            elif bad := row if isinstance(row, BadRow) else _add(session, row):
                waiting[place] = bad.as_json()
            else:
                places[str(row.id)] = place, row.id
        for delta in session.step() if session.has_work else ():
            progress.add_tokens(delta.new_tokens)
            if delta.completion:
                place, row_id = places.pop(delta.key)
                waiting[place] = output_row(row_id, delta.completion)
        while due in waiting:
            yield waiting.pop(due)
            progress.add_row()
            due += 1


def _add(session: Session, row: PromptRow) -> BadRow | None:
    try:
        session.add(str(row.id), row.prompt, row.sampling)
    except RowError as error:
        return BadRow(row.id, error.kind, str(error))
    return None


class _Progress:
    """A bar of rows with their ETA, and the tokens generated per second."""

    def __init__(self, total: int, done: int):
        self._bar = tqdm(total=total, initial=done, unit="row", dynamic_ncols=True)
        self._started = time.perf_counter()
        self._tokens = 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def add_tokens(self, count: int) -> None:
        self._tokens += count
        rate = self._tokens / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)

    def add_row(self) -> None:
        self._bar.update()
