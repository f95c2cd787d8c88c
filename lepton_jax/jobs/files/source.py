"""The input of a job as records: rows of one file or of many shards, whatever their format.

A `Record` is a row's fields, or why it has none. Columns are renamed and copied as the config says;
what the fields mean is not known here. Nothing is held but the row at hand.
Read next: `tables.py` (CSV and Parquet), `../rows.py` (records become rows).
"""

import dataclasses
import itertools
import logging
import math
import string
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from lepton_jax.config import JobSection
from lepton_jax.jobs.files import tables
from lepton_jax.jobs.files.follow import PENDING, Follower, Pending
from lepton_jax.jobs.files.nested_json import parse_json
from lepton_jax.jobs.files.places import JobError, digest, expand, form_of, open_content

log = logging.getLogger(__name__)

_LONGEST_LINE = 2**26  # bytes; a longer one is an error row, not a full memory
TABLES = ("csv", "parquet")


class RowError(ValueError):
    """Why one row can't be served; `kind` is the `BadRow.type` that it becomes."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Record:
    """One row as it was read.

    Attributes:
      line: of the file, from 1; in Parquet the number of the row. Where `shard` is not "", the
        file's name among several.
      values: its fields by the names that the job gives them, or what is wrong with it.
      kept: columns for the output row.
    """

    line: int
    shard: str
    values: dict[str, Any] | RowError
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def where(self) -> str:
        """Names the row in a job: its line, with several files after the file's name."""
        return f"{self.shard}:{self.line}" if self.shard else str(self.line)


class Source:
    """The files of `job.input`.

    Attributes:
      names: paths or URLs, in order.
      format: "jsonl", "csv", "parquet" or "openai_batch".
    """

    def __init__(self, job: JobSection):
        """Raises JobError where a file can't be read or the job's columns are no columns."""
        if not job.input:
            raise JobError("job.input is empty: give a file of rows, --config.job.input=FILE")
        self.names = expand(job.input)
        self._columns = {new: old for new, old in pairs(job.columns, "job.columns")}
        self._keep = {new: old for new, old in pairs(job.keep, "job.keep")}
        self._answer = {"answer": job.answer} if job.answer else {}
        inserted = {name for _, name in template_parts(job.template) if name}
        self._inserted = {name: name for name in sorted(inserted - self._columns.keys())}
        self._limit = job.limit or None
        self._unseen = {*self._keep.values(), *self._answer.values()}
        self._served: frozenset[str] = frozenset()
        # Columns of a table come together and not all are for us; an odd key in JSON is a typo,
        # unless rows are a table by what a template takes of them.
        self.format = self._format(job)
        self._strict = self.format not in TABLES and not self._columns and not job.template
        self._json = {"sampling"} if job.template else tables.JSON_FIELDS
        self._rows: int | None = None
        self.follower = self._follower(job) if job.follow else None

    def digests(self) -> list[list[str]]:
        """[name, digest] of each file: what the answers depend on. Reads local files once,
        archives twice.

        A file that is followed has none: it may have grown.
        """
        if self.follower:
            return [[*short_names(self.names), "grows"]]
        found, rows = [], 0
        for name, short in zip(self.names, short_names(self.names), strict=True):
            mark, lines = digest(name)
            found.append([short, mark])
            rows = None if rows is None or lines is None else rows + lines
        if self.format == "parquet":
            rows = sum(tables.parquet_rows(name) for name in self.names)
        elif self.format == "csv" and rows is not None:
            rows -= len(self.names)
        self._rows = rows if rows is None else min(rows, self._limit or rows)
        return found

    @property
    def rows(self) -> int | None:
        """About how many there are, after `digests`; None where only reading would tell."""
        return self._rows

    def columns(self) -> list[str]:
        """Names of the first file's columns; of JSON rows there are none to know before."""
        if self.format not in TABLES:
            return []
        with open_content(self.names[0]) as content:
            read = tables.csv_columns if self.format == "csv" else tables.parquet_columns
            return read(content, self.names[0])

    def serve(self, fields: Sequence[str], *, id_field: str) -> None:
        """Says what the rows are read for. Raises JobError where a table has none of these fields,
        or lacks a column of the job.
        """
        self._served = frozenset([id_field, *fields])
        there = self.columns()
        if not there:
            return
        wanted = {"columns": self._columns, "keep": self._keep, "answer": self._answer}
        wanted |= {"template": self._inserted}
        for name, columns in wanted.items():
            for old in columns.values():
                if old not in there:
                    raise JobError(
                        f"job.{name} names {old!r}, but {self.names[0]!r} has {', '.join(there)}"
                    )
        if not any(field in self._columns or field in there for field in fields):
            template = f", or --config.job.template='... {{{there[0]}}} ...'"
            raise JobError(
                f"{self.names[0]!r} has the columns {', '.join(there)}, and none of "
                f"{', '.join(fields)}: say which is which, as in "
                f"--config.job.columns={fields[0]}={there[0]}{template * ('prompt' in fields)}"
            )

    def report_unseen(self) -> None:
        """Warns of columns to keep, or with answers, that no row has had."""
        for name in sorted(self._unseen):
            log.warning("job.keep or job.answer names %r, which no row has", name)

    def __iter__(self) -> Iterator[Record]:
        """The records in order, as many as the job takes."""
        return itertools.islice(self._records(), self._limit)

    def _records(self) -> Iterator[Record]:
        several = len(self.names) > 1
        for name, short in zip(self.names, short_names(self.names), strict=True):
            shard = short if several else ""
            for line, values in self._read(name):
                if isinstance(values, RowError):
                    yield Record(line, shard, values)
                else:
                    yield self._record(line, shard, values)

    def followed(self) -> Iterator[Record | Pending]:
        """All records, and those that come; PENDING while there is none. Where nothing is followed:
        as iteration.
        """
        if self.follower is None:
            yield from self
            return
        number = 0
        for line in self.follower.lines():
            if isinstance(line, Pending):
                yield PENDING
                continue
            number += 1
            if line.strip():
                values = _object(line)
                bad = isinstance(values, RowError)
                yield Record(number, "", values) if bad else self._record(number, "", values)

    def _follower(self, job: JobSection) -> Follower:
        if len(self.names) > 1 or self.format != "jsonl" or form_of(self.names[0])[1]:
            raise JobError(
                f"job.follow reads one file of plain JSON lines, not job.input={job.input!r}"
            )
        return Follower(self.names[0], job.follow)

    def _record(self, line: int, shard: str, values: dict[str, Any]) -> Record:
        copied = self._keep | self._answer
        kept = {new: storable(values[old]) for new, old in copied.items() if old in values}
        if self._unseen:
            self._unseen -= values.keys()
        renamed = {*self._columns, *self._columns.values()} - self._inserted.keys()
        others = renamed | {*copied.values()} - self._served  # what is copied is read too
        mine = {name: value for name, value in values.items() if name not in others}
        mine |= {new: values[old] for new, old in self._columns.items() if old in values}
        if self.format == "csv":
            try:
                mine = tables.parse_json_cells(mine, self._json & self._served)
            except ValueError as error:
                return Record(line, shard, RowError("invalid_row", str(error)), kept)
        return Record(line, shard, mine, kept)

    @property
    def strict(self) -> bool:
        """Whether a field that nobody reads is an error rather than one more column."""
        return self._strict

    def _read(self, name: str) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
        if self.format == "parquet":
            yield from tables.read_parquet(name)
            return
        with open_content(name) as content:
            if self.format == "csv":
                for line, row in tables.read_csv(content, name):
                    yield line, RowError("invalid_row", row) if isinstance(row, str) else row
            else:
                yield from read_json_lines(content)

    def _format(self, job: JobSection) -> str:
        found = job.format or form_of(self.names[0])[0] or "jsonl"
        with open_content(self.names[0]) as content:  # whatever it is, it must be readable
            first = next(read_json_lines(content), None) if found == "jsonl" else content.read(1)
        if not job.format and found == "jsonl" and first and isinstance(first[1], dict):
            is_batch = {"custom_id", "url", "body"} <= first[1].keys()
            return "openai_batch" if is_batch and not self._columns else found
        return found


def read_json_lines(content: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """(line, object or error) of each line that isn't blank."""
    for number in itertools.count(1):
        line = content.readline(_LONGEST_LINE)
        if not line:
            return
        if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := content.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
            yield number, RowError("invalid_row", f"the line is longer than {_LONGEST_LINE} bytes")
        elif line.strip():
            yield number, _object(line)


def pairs(text: str, name: str) -> list[tuple[str, str]]:
    """[("prompt", "question"), ("id", "id")] of "prompt=question,id". Raises JobError."""
    found = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        new, _, old = (part.strip() for part in piece.partition("="))
        if not new or ("=" in piece and not old):
            raise JobError(f'{name}={text!r} is not allowed: want names as in "prompt=question,id"')
        if new in dict(found):
            raise JobError(f"{name}={text!r} is not allowed: {new!r} is there twice")
        found.append((new, old or new))
    return found


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """[("Shop: ", "shop"), (".", None)] of "Shop: {shop}.": texts, and the column after each.

    Raises JobError where braces don't hold names of columns.
    """
    example = "want names of columns in braces, and {{ and }} for braces, as in 'Shop: {shop}.'"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise JobError(f"job.template={template!r} is not allowed: {error}: {example}") from error
    for _, name, form, conversion in parts:
        if name == "" or form or conversion:
            found = f"{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}"
            raise JobError(f"job.template={template!r} has {{{found}}}: {example}")
    if template and not any(name for _, name, _, _ in parts):
        raise JobError(f"job.template={template!r} has no column: {example}")
    return [(text, name) for text, name, _, _ in parts]


def short_names(names: Sequence[str]) -> list[str]:
    """Of files, without folders; of several with the same, from the folder that all are in."""
    paths = [PurePosixPath(name) for name in names]
    short = [path.name for path in paths]
    if len(set(short)) == len(short):
        return short
    common = 0
    while len({path.parts[: common + 1] for path in paths}) == 1:
        common += 1
    return ["/".join(path.parts[common:]) for path in paths]


def storable(value: Any) -> Any:
    """A value as JSON can hold it: no number that isn't finite, no half of a surrogate pair."""
    if isinstance(value, dict):
        return {storable(str(name)): storable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [storable(inner) for inner in value]
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int) else str(value)


def _object(line: bytes) -> dict | RowError:
    try:
        values = parse_json(line.decode("utf-8-sig"))
    except ValueError as error:
        return RowError("invalid_json", f"the line is not valid JSON: {error}")
    if not isinstance(values, dict):
        return RowError("invalid_row", f"the row is a {type(values).__name__}: want an object")
    return values
