"""What the modes that score have in common: a row becomes questions to the engine, their results
become the row's answer.

A mode says which questions (`ask`); the session here sends them, gathers what comes back, and knows
nothing of texts. Modes: `score.py`, `classify.py`, `embed.py`, `rank.py`, `perplexity.py`.
Read next: `modes.py` (the protocol), `pairs.py` (continuations as questions).
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lepton_jax.engine.protocol import TokenEngine as Engine
from lepton_jax.engine.request import StepOutput
from lepton_jax.engine.scored import Scored, ScoreSpec, Scoring
from lepton_jax.jobs.modes import IndependentRows, ModeSession, Progress
from lepton_jax.jobs.row_bar import RowBar
from lepton_jax.jobs.rows import RowError, shown
from lepton_jax.text.tokenizer import Tokenizer

_DIGITS = 6  # of numbers in output rows; float32 is sure of no more


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and what is asked of it."""

    ids: tuple[int, ...]
    scoring: Scoring


@dataclasses.dataclass(frozen=True)
class Asked:
    """A row's questions.

    Attributes:
      questions: in the order in which the engine shall begin them.
      answer: makes the output row without its id of their results, in the same order.
    """

    questions: tuple[Question, ...]
    answer: Callable[[list[Scored]], dict]


class ScoringMode(IndependentRows, abc.ABC):
    """A `Mode`, less `fields` and `parse`. Its answers have numpy arrays and whole precision."""

    @abc.abstractmethod
    def ask(self, work: Any, tokenizer: Tokenizer) -> Asked:
        """A row's questions. Raises RowError (invalid_row, invalid_prompt)."""

    def requests(self, work: Any, tokenizer: Tokenizer) -> list[tuple[int, ScoreSpec]]:
        """(prompt tokens, what is asked) of each question. Raises RowError as `ask`."""
        questions = self.ask(work, tokenizer).questions
        return [(len(question.ids), ScoreSpec.of(question.scoring)) for question in questions]

    def open(
        self, engine: Engine, tokenizer: Tokenizer, *, exact: bool = False
    ) -> "ScoringSession":
        """A session whose rows are fit for a file, or `exact`."""
        return ScoringSession(self, engine, tokenizer, exact=exact)


class ChoosingMode(ScoringMode):
    """Its answers are choices among some alternatives."""

    @abc.abstractmethod
    def choose(self, answer: Mapping[str, Any]) -> tuple[int, float]:
        """The index of an answer's best alternative, and its margin over the second in the measure
        by which they are chosen; 0 where they are equal.
        """


class ScoringSession:
    """A `ModeSession` of questions. `exact` leaves the answers as the mode made them."""

    def __init__(
        self, mode: ScoringMode, engine: Engine, tokenizer: Tokenizer, *, exact: bool = False
    ):
        self._mode, self._engine, self._tokenizer, self._exact = mode, engine, tokenizer, exact
        self._rows: dict[str, _OpenRow] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._rows)

    def __len__(self) -> int:
        return sum(row.unanswered for row in self._rows.values())

    def add(self, key: str, work: Any) -> None:
        """Queues a row under a key of its own. Raises RowError, and queues nothing: of the mode,
        or refused by the engine.
        """
        if key in self._rows:
            raise RowError("duplicate_id", f"{key!r} is already being scored: keys must differ")
        asked = self._mode.ask(work, self._tokenizer)
        added = []
        try:
            for number, question in enumerate(asked.questions):
                # The number is always there, so that no key with a slash can meet another's.
                self._engine.add_scoring(f"{key}/{number}", question.ids, question.scoring)
                added.append(f"{key}/{number}")
        except ValueError as error:
            self._abort(added)
            raise RowError("refused", str(error)) from error
        self._rows[key] = _OpenRow(asked, [None] * len(added))

    def step(self) -> list[Progress]:
        """One beat of the engine."""
        if not self._engine.has_work:
            raise RuntimeError(f"the engine is idle with {len(self)} questions unanswered")
        taken = [self._take(output) for output in self._engine.step()]
        return [progress for progress in taken if progress is not None]

    def drop(self, key: str) -> None:
        """Forgets a row, unless it is answered."""
        row = self._rows.pop(key, None)
        if row is not None:
            self._abort([f"{key}/{number}" for number in range(len(row.results))])

    def close(self) -> None:
        """Drops what is not answered yet."""
        for key in list(self._rows):
            self.drop(key)

    def _take(self, output: StepOutput) -> Progress | None:
        key, _, number = output.request_id.rpartition("/")
        row = self._rows.get(key)
        if row is None:  # another question of the row has failed
            return None
        if output.scored is None:
            self.drop(key)
            message = "the model gave numbers that are not finite: try another dtype or preset"
            return Progress(key, 0, {"error": {"type": "not_finite", "message": message}})
        row.results[int(number)] = output.scored
        tokens = len(row.asked.questions[int(number)].ids)
        if row.unanswered:
            return Progress(key, tokens)
        del self._rows[key]
        answer = row.asked.answer(row.results)
        return Progress(key, tokens, answer if self._exact else plain(answer))

    def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)


@dataclasses.dataclass(frozen=True)
class _OpenRow:
    asked: Asked
    results: list[Scored | None]

    @property
    def unanswered(self) -> int:
        return sum(result is None for result in self.results)


def score_all(
    mode: Any,
    works: Mapping[str, Any],
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    progress: bool = False,
) -> list[dict]:
    """Exact answers to all works (by keys of their own), in their order. Raises RowError.

    `mode`: a `ScoringMode`, or what opens a session as it does; `progress` as in `answer_all`.
    """
    session = mode.open(engine, tokenizer, exact=True)
    return answer_all(session, works, observe=mode.observe, progress=progress)


def answer_all(
    session: ModeSession,
    works: Mapping[str, Any],
    *,
    observe: Callable[[dict], None],
    progress: bool = False,
) -> list[dict]:
    """A session's answers to all works, in their order; `observe` is told each as it comes, and the
    session is closed. `progress` shows a bar meanwhile. Raises RowError.
    """
    answers: dict[str, dict] = {}
    try:
        for key, work in works.items():
            session.add(key, work)
        with RowBar(len(works), shown=progress) as bar:
            while session.has_work:
                for done in session.step():
                    bar.add_beat(done.tokens)
                    if done.row is not None:
                        answers[done.key] = done.row
                        if "error" in done.row:
                            raise RowError(*done.row["error"].values())
                        observe(done.row)
                        bar.add_row()
    finally:
        session.close()
    return [answers[key] for key in works]


def margin(scores: Sequence[float]) -> float:
    """Of the best over the second."""
    second, best = np.sort(np.asarray(scores, np.float64))[-2:]
    return float(best - second) if best > second else 0.0


def plain(value: Any) -> Any:
    """In JSON types, numbers to six decimals; the logarithm of nothing becomes null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    return value


def need_text(values: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    """The text in a field. Raises RowError (invalid_row) where there is none."""
    text = values.get(name)
    if not isinstance(text, str) or not (text or empty):
        found = f"is {shown(text)}" if name in values else "is missing"
        raise RowError("invalid_row", f"{name} {found}: want a text")
    return text


def need_texts(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The list of two or more texts in a field. Raises RowError (invalid_row)."""
    texts = values.get(name)
    good = isinstance(texts, (list, tuple)) and len(texts) > 1
    if not good or not all(isinstance(text, str) and text for text in texts):
        found = f"is {shown(texts)}" if name in values else "is missing"
        raise RowError("invalid_row", f"{name} {found}: want a list of two or more texts")
    return tuple(texts)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text, with those that a model wants around it. Raises RowError (invalid_prompt)."""
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise RowError("invalid_prompt", str(error)) from error
