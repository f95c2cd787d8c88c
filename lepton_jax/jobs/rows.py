"""Rows of a JSONL file, checked one by one: bad ones become a `BadRow`, never an exception.

    {"id": "a", "prompt": "Once upon a time", "sampling": {"max_tokens": 64}}
    {"id": "b", "messages": [{"role": "user", "content": "Hello"}]}
    {"id": "c", "prompt_tokens": [1, 338, 263]}

Only the shape is checked here; whether a prompt fits the tokenizer, the chat template and the
engine turns out later (`session.py`). Read next: `generate.py`.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from lepton_jax.config import SamplingParams, from_mapping, refuse_unknown

PROMPT_FIELDS = ("prompt", "messages", "prompt_tokens")
FIELDS = ("id", *PROMPT_FIELDS, "sampling")
Prompt = str | list[dict] | list[int]
RowId = str | int


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """One row to serve: `prompt` is a text, a list of messages, or a list of token ids."""

    id: RowId
    prompt: Prompt
    sampling: SamplingParams


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that can't be served.

    Attributes:
      id: the row's own, or its line number as a text where it has none.
      type: invalid_json, invalid_row, invalid_sampling or duplicate_id; later also invalid_prompt,
        refused (by the engine) and not_finite (the model's logits).
      message: what is wrong and what would be right.
    """

    id: RowId
    type: str
    message: str

    def as_json(self) -> dict:
        """The output row."""
        return {"id": self.id, "error": {"type": self.type, "message": self.message}}


class RowError(ValueError):
    """Why one row can't be served; `kind` is the `BadRow.type` that it becomes."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def read_rows(path: Path, defaults: SamplingParams) -> Iterator[PromptRow | BadRow]:
    """The rows of a JSONL file in order; blank lines are skipped.

    Args:
      path: of the file.
      defaults: what a row's "sampling" leaves open.

    Of rows with one id the first is served. Ids are the same where their texts are: 1 and "1".
    """
    seen: set[str] = set()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _row(line, number, defaults=defaults, seen=seen)


def _row(
    line: bytes, number: int, *, defaults: SamplingParams, seen: set[str]
) -> PromptRow | BadRow:
    row_id: RowId = str(number)
    try:
        values = _object(line)
        row_id = _id(values, row_id)
        if str(row_id) in seen:
            raise RowError(
                "duplicate_id", f"id {row_id!r} belongs to an earlier row: ids must differ"
            )
        seen.add(str(row_id))
        prompt = _prompt(values)
        return PromptRow(row_id, prompt, _sampling(values, defaults))
    except RowError as error:
        return BadRow(row_id, error.kind, str(error))


def _object(line: bytes) -> dict:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RowError("invalid_json", f"the line is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise RowError("invalid_row", f"the row is a {type(values).__name__}: want an object")
    return values


def _id(values: dict, fallback: str) -> RowId:
    row_id = values.get("id", fallback)
    whole = isinstance(row_id, int) and not isinstance(row_id, bool)
    if not whole and not (isinstance(row_id, str) and row_id and _is_text(row_id)):
        raise RowError(
            "invalid_row", f"id={row_id!a} is not allowed: want a text or a whole number"
        )
    return row_id


def _is_text(value: str) -> bool:
    """Whether it can be written; half of a surrogate pair, which JSON can spell, can't."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _prompt(values: dict) -> Prompt:
    try:
        refuse_unknown(values, FIELDS, where="row")
    except ValueError as error:
        raise RowError("invalid_row", str(error)) from error
    given = [name for name in PROMPT_FIELDS if name in values]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        wanted = ", ".join(PROMPT_FIELDS)
        raise RowError("invalid_row", f"the row has {found} of {wanted}: want exactly one")
    name, prompt = given[0], values[given[0]]
    if name == "prompt":
        good, wanted = isinstance(prompt, str), "a text"
    elif name == "messages":
        good = isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt)
        wanted = 'a list of {"role", "content"} objects'
    else:
        good = isinstance(prompt, list) and all(type(i) is int for i in prompt)
        wanted = "a list of token ids"
    if not good:
        raise RowError("invalid_row", f"{name} is {_short(prompt)}: want {wanted}")
    if not prompt:
        raise RowError("invalid_row", f"{name} is empty: want {wanted}")
    return prompt


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _sampling(values: dict, defaults: SamplingParams) -> SamplingParams:
    own = values.get("sampling", {})
    if not isinstance(own, dict):
        raise RowError("invalid_sampling", f"sampling is {_short(own)}: want an object")
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    if not own:
        return defaults
    try:
        refuse_unknown(own, known, where="sampling")
        return from_mapping(SamplingParams, _values(defaults) | own, where="sampling")
    except ValueError as error:
        raise RowError("invalid_sampling", str(error)) from error


def _values(params: SamplingParams) -> dict:
    return {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
