"""What a job does with its rows, in a form that the file side needs not know: one protocol for all
modes.

    mode = mode_for(config)                     # `mode_for.py`, by job.mode
    work = mode.parse(values)                   # a row without its id; RowError where it is wrong
    sizes = mode.requests(work, tokenizer)      # (prompt tokens, what is asked) of each request
    session = mode.open(engine, tokenizer)
    session.add(key, work)                      # RowError, and nothing queued, where refused
    for progress in session.step(): ...         # .row is the output row without its id, once done

The driver of files reads rows and ids, keeps the order, writes, and resumes; a mode knows what the
other fields mean. Read next: `generate.py`; `scoring.py` for the modes that score.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lepton_jax.config import SamplingParams
from lepton_jax.engine.scored import ScoreSpec
from lepton_jax.jobs.session import Engine
from lepton_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a beat did for one row.

    Attributes:
      key: the row's, as given to `ModeSession.add`.
      tokens: generated, or scored, in this beat.
      row: the output row without its id, when the row is done: a result, which has
        "prompt_tokens" and may have "completion_tokens", or {"error": {"type", "message"}}.
    """

    key: str
    tokens: int
    row: dict | None = None


class ModeSession(Protocol):
    """Rows in progress on one engine. Nobody else may step the engine meanwhile."""

    def add(self, key: str, work: Any) -> None:
        """Queues a row. Raises RowError (invalid_prompt, refused) and then queues nothing."""

    def step(self) -> list[Progress]:
        """One beat of the engine; only while `has_work`."""

    @property
    def has_work(self) -> bool: ...

    def __len__(self) -> int:
        """Engine requests that are not finished."""

    def close(self) -> None:
        """Drops what is not done."""


class IndependentRows:
    """Of modes whose rows don't depend on each other."""

    def observe(self, row: Mapping[str, Any]) -> None:
        """Nothing is learnt from a row of the output."""


class Mode(Protocol):
    """What a job does with its rows; `fields` are a row's allowed names besides "id"."""

    fields: Sequence[str]

    def parse(self, values: Mapping[str, Any]) -> Any:
        """The work of a row whose names are all known. Raises RowError on a shape that is wrong.

        No tokenizer is needed: rows can be checked before a model is loaded.
        """

    def requests(
        self, work: Any, tokenizer: Tokenizer
    ) -> list[tuple[int, SamplingParams | ScoreSpec]]:
        """(prompt tokens, what is asked) of a row's engine requests, for plan and warm-up.

        Raises RowError where the tokenizer refuses it.
        """

    def open(self, engine: Engine, tokenizer: Tokenizer) -> ModeSession:
        """A session for rows of this mode."""

    def observe(self, row: Mapping[str, Any]) -> None:
        """The next row of the output as `Progress.row` had it, when it is written; before that
        those of an interrupted run that come before the ones to compute. What a mode learns from
        them, a resumed job learns again.
        """
