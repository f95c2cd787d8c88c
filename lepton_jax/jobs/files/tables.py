"""Rows out of CSV and Parquet.

A cell that is empty, or null, is no field. What isn't a text in a CSV file is JSON in its cell, as
in a column "messages"; in Parquet it is lists and structs. Read next: `writers.py` (the way back).
"""

import csv
import io
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from lepton_jax.jobs.files.nested_json import parse_json
from lepton_jax.jobs.files.places import JobError, need, open_stored

_BATCH = 1024  # rows of Parquet decoded at once
_LONGEST_CELL = 2**26  # characters
# Fields of all modes that are no texts: their CSV cells are JSON.
JSON_FIELDS = frozenset(
    "messages tools prompt_tokens sampling choices candidates".split(),
)


def read_csv(content: BinaryIO, name: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line at which the row begins, fields or what is wrong) of each row below the header."""
    reader = _reader(content)
    header = _header(reader, name)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"the row is not valid CSV: {error}"
            continue
        if cells:
            yield line, _fields(header, cells)


def csv_columns(content: BinaryIO, name: str) -> list[str]:
    """The header of a file. Raises JobError where there is none."""
    return _header(_reader(content), name)


def read_parquet(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, fields) of each row; nulls are left out, at any depth of structs."""
    number = 0
    with _parquet(name) as file:
        for batch in file.iter_batches(batch_size=_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield number, _without_nulls(row)


def parquet_rows(name: str) -> int:
    """How many rows a file has."""
    with _parquet(name) as file:
        return file.metadata.num_rows


def parquet_columns(_content: BinaryIO, name: str) -> list[str]:
    """Names of a file's columns."""
    with _parquet(name) as file:
        return file.schema_arrow.names


@contextmanager
def _parquet(name: str) -> Iterator[Any]:
    parquet = need("pyarrow.parquet", "files", why="Parquet")
    errors = need("pyarrow", "files", why="Parquet").ArrowException
    with open_stored(name) as stored:
        try:
            yield parquet.ParquetFile(stored)
        except (errors, OSError) as error:
            raise JobError(f"job.input={name!r} can't be read as Parquet: {error}") from error


def _reader(content: BinaryIO) -> Any:
    csv.field_size_limit(_LONGEST_CELL)
    # What is no UTF-8 becomes halves of surrogate pairs, so that one bad row stays one bad row.
    text = io.TextIOWrapper(content, "utf-8-sig", errors="surrogateescape", newline="")
    return csv.reader(text, strict=True)


def _header(reader: Any, name: str) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise JobError(f"job.input={name!r} has no CSV header: {error}") from error
    if not header or len(set(header)) < len(header) or not all(header):
        raise JobError(
            f"job.input={name!r} has the header {header}: want a first line of names, each once"
        )
    return header


def _fields(header: list[str], cells: list[str]) -> dict[str, Any] | str:
    if len(cells) != len(header):
        return f"the row has {len(cells)} cells: want {len(header)}, as the header"
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return "the row is not valid UTF-8"
    return {name: cell for name, cell in zip(header, cells, strict=True) if cell}


def parse_json_cells(values: dict[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """The values with those of these fields parsed. Raises ValueError naming the one that is no
    JSON.
    """
    parsed = dict(values)
    for name in sorted(values.keys() & fields):
        try:
            parsed[name] = parse_json(values[name])
        except ValueError as error:
            raise ValueError(f"{name} is not valid JSON: {error}") from error
    return parsed


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
