"""Records become rows, checked one by one: bad ones become a `BadRow`, never an exception.

Here is what all rows have: an id of their own, and names that somebody reads. What the other fields
mean a mode knows; that of generate is `generate.py`. Whether a prompt fits the tokenizer, the chat
template and the engine turns out later (`session.py`). Read next: `driver.py`.
"""

import dataclasses
import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lepton_jax.config import refuse_unknown
from lepton_jax.jobs.files.follow import PENDING, Pending
from lepton_jax.jobs.files.source import Record, RowError

__all__ = ["BadRow", "IdSet", "Prompt", "Prompts", "Row", "RowError", "RowId", "read_rows"]

Prompt = str | list[dict] | list[int]
Prompts = Prompt | Sequence[Prompt]
RowId = str | int
ASIDE = " (a column for something else is set aside by --config.job.columns=other={})"
_LEAST_SLOTS = 2**10


@dataclasses.dataclass(frozen=True)
class Row:
    """One row to serve: `work` is what its mode makes of its fields."""

    place: int
    record: Record
    id: RowId
    work: Any


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that can't be served.

    Attributes:
      place: in the input, from 0.
      id: the row's own, or its line number as a text where it has none.
      type: invalid_json, invalid_row, invalid_sampling or duplicate_id; later also invalid_prompt,
        refused (by the engine) and not_finite (the model's logits).
      message: what is wrong and what would be right.
    """

    place: int
    record: Record
    id: RowId
    type: str
    message: str

    @property
    def result(self) -> dict:
        """What the output row says."""
        return {"error": {"type": self.type, "message": self.message}}


class IdSet:
    """Ids that were there before, as 8 bytes each in a table that is at most three quarters full.

    That is 11 to 22 bytes an id, whatever its length. Two different ids are taken for one with a
    chance of n^2 / 2^65 for n rows: 3 in a million for 10 million rows.
    """

    def __init__(self):
        self._slots = array("Q", bytes(8 * _LEAST_SLOTS))
        self._count = 0

    def add(self, row_id: RowId) -> bool:
        """Whether it is new. Ids are the same where their texts are: 1 and "1"."""
        digest = hashlib.blake2b(str(row_id).encode(), digest_size=8).digest()
        mark = int.from_bytes(digest, "little") or 1  # 0 marks a free slot
        slots = self._slots
        mask = len(slots) - 1
        place = mark & mask
        while slots[place]:
            if slots[place] == mark:
                return False
            place = (place + 1) & mask
        slots[place] = mark
        self._count += 1
        if 4 * self._count > 3 * len(slots):
            self._grow()
        return True

    def _grow(self) -> None:
        slots = array("Q", bytes(16 * len(self._slots)))
        mask = len(slots) - 1
        for mark in self._slots:
            if mark:
                place = mark & mask
                while slots[place]:
                    place = (place + 1) & mask
                slots[place] = mark
        self._slots = slots


def read_rows(
    records: Iterable[Record | Pending], mode: Any, *, id_field: str = "id", strict: bool = True
) -> Iterator[Row | BadRow | Pending]:
    """Rows in the order of the records. Of rows with one id the first is served. PENDING stays what
    it is.

    Args:
      records: of a source.
      mode: what parses the fields (`modes.Mode`).
      id_field: the field with the id.
      strict: a field that the mode doesn't know is an error; otherwise it is left out.
    """
    ids = IdSet()
    known = [id_field, *mode.fields]
    places = itertools.count()
    for record in records:
        if isinstance(record, Pending):
            yield PENDING
            continue
        place, row_id = next(places), record.where
        try:
            if isinstance(record.values, RowError):
                raise record.values
            row_id = _id(record.values, id_field, fallback=row_id)
            if not ids.add(row_id):
                message = f"id {row_id!r} belongs to an earlier row: ids must differ"
                raise RowError("duplicate_id", message)
            values = _known(record.values, known, strict=strict)
            if id_field not in mode.fields:
                values.pop(id_field, None)
            yield Row(place, record, row_id, mode.parse(values))
        except RowError as error:
            yield BadRow(place, record, row_id, error.kind, str(error))


def _known(values: Mapping[str, Any], known: Sequence[str], *, strict: bool) -> dict[str, Any]:
    if not strict:
        return {name: value for name, value in values.items() if name in known}
    try:
        refuse_unknown(values, known, where="row")
    except ValueError as error:
        unknown = next(name for name in values if name not in known)
        raise RowError("invalid_row", f"{error}{ASIDE.format(unknown)}") from error
    return dict(values)


def _id(values: Mapping[str, Any], name: str, *, fallback: str) -> RowId:
    row_id = values.get(name, fallback)
    whole = isinstance(row_id, int) and not isinstance(row_id, bool)
    if not whole and not (isinstance(row_id, str) and row_id and _is_text(row_id)):
        raise RowError(
            "invalid_row", f"{name}={row_id!a} is not allowed: want a text or a whole number"
        )
    return row_id


def _is_text(value: str) -> bool:
    """Whether it can be written; half of a surrogate pair, which JSON can spell, can't."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def each_prompt(prompts: Prompts) -> list:
    """Several prompts, or a single text, list of ids or list of messages, as a list."""
    found = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
    return [found] if found and isinstance(found[0], (int, Mapping)) else found


def need_messages(values: Mapping[str, Any]) -> list[dict]:
    """The messages of a row. Raises RowError (invalid_row)."""
    messages, wanted = values.get("messages"), 'a list of {"role", "content"} objects'
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise RowError("invalid_row", f"messages is {shown(messages)}: want {wanted}")
    if not messages:
        raise RowError("invalid_row", f"messages is empty: want {wanted}")
    return messages


def shown(value: object) -> str:
    """A value in a message, shortened."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
