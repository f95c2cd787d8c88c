"""How a row's result becomes a line of the output, and what a line says when it is read again.

`PlainFraming` is our own form, {"id", <kept columns>, <result>}; that of OpenAI's batches is
`openai_batch.py`. Read next: `driver.py`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lepton_jax.jobs.files.places import JobError
from lepton_jax.jobs.grading import grade
from lepton_jax.jobs.rows import BadRow, Row, RowId


@dataclasses.dataclass(frozen=True)
class Counts:
    """What an output row adds to a tally.

    Attributes:
      text: what a preview shows of it.
      cut: how many of its answers ended for want of room, finish_reason "length".
      logprob, tokens, bytes: of its text in the mode perplexity.
    """

    error_type: str
    prompt_tokens: int
    generated_tokens: int
    text: str
    grade: float | None = None
    cut: int = 0
    logprob: float = 0.0
    tokens: int = 0
    bytes: int = 0


class Framing(Protocol):
    """One form of output rows; `id_field` is the input's field with the id."""

    id_field: str

    def frame(self, row: Row | BadRow, result: dict) -> dict: ...
    def row_id(self, line: dict) -> RowId | None: ...
    def counts(self, line: dict) -> Counts: ...


class PlainFraming:
    """{"id", <kept columns>, <result>}; an error also says in which line, and file, its row is.

    With `job.answer` also "correct", from 0 to 1.
    """

    id_field = "id"

    def __init__(self, *, several_files: bool, graded: bool = False, mode: str = "generate"):
        """`graded`: "correct" says how right the result is, by the kept column "answer"; `mode`: of
        the results.
        """
        self._several, self._graded = several_files, graded
        of_mode = {"generate": _counts_of_answers, "perplexity": _counts_of_text}
        self._more = of_mode.get(mode, lambda line: {})
        self._own = {"id", "error", "prompt_tokens", "completion_tokens"}  # which are counted
        self._own |= {"token_ids", "choices"} if mode == "generate" else set()
        self._own |= {"correct"} if graded else set()

    def frame(self, row: Row | BadRow, result: dict) -> dict:
        """Raises JobError where a kept column has the name of a field of the result."""
        record = row.record
        graded = self._graded and "answer" in record.kept
        both = sorted({*self._own, *result} & record.kept.keys())
        if both:
            raise JobError(
                f"job.keep has {both[0]!r}, which is a field of the output rows: give it another "
                f"name there, as in --config.job.keep=input_{both[0]}={both[0]}"
            )
        if "error" in result:
            where: dict[str, Any] = {"line": record.line}
            where |= {"file": record.shard} if self._several else {}
            result = result | {"error": result["error"] | where}
        elif graded:
            correct = grade(result, record.kept["answer"])
            result = ({} if correct is None else {"correct": correct}) | result
        return {"id": row.id, **record.kept, **result}

    def row_id(self, line: dict) -> RowId | None:
        return line.get("id")

    def counts(self, line: dict) -> Counts:
        error = line.get("error")
        if error:
            return Counts(error["type"], 0, 0, f"({error['type']}) {error['message']}")
        tokens = line.get("prompt_tokens", 0), line.get("completion_tokens", 0)
        correct = line.get("correct") if self._graded else None
        return Counts("", *tokens, _shown(line), correct, **self._more(line))


def cut_answers(choices: Sequence[Mapping[str, Any]]) -> int:
    """How many answers ended for want of room."""
    return sum(choice.get("finish_reason") == "length" for choice in choices)


def _counts_of_answers(line: dict) -> dict[str, int]:
    return {"cut": cut_answers([line] if "token_ids" in line else line.get("choices", []))}


def _counts_of_text(line: dict) -> dict[str, float]:
    logprob = line["logprob"]  # the logarithm of nothing is null in a file
    total = -math.inf if logprob is None else logprob
    return {"logprob": total, "tokens": line["tokens"], "bytes": line["bytes"]}


def _shown(line: dict) -> str:
    choices = line.get("choices")
    first = choices[0] if choices and isinstance(choices[0], dict) else line
    if isinstance(first.get("text"), str) and "token_ids" in first:
        return first["text"]
    return json.dumps({k: v for k, v in line.items() if k != "id"}, ensure_ascii=False)
