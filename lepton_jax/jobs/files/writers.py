"""Finished rows in the form that its output's name asks for: JSONL, CSV, Parquet; gzip, zstd.

Rows are given as a function that yields them, because CSV and Parquet need two passes: the first
finds the columns and their types, the second writes. Neither holds more than a few thousand rows.
CSV has lists and objects as JSON in their cells, Parquet as lists and structs. The same rows give
the same bytes. Read next: `journal.py`.
"""

import csv
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, BinaryIO

from lepton_jax.jobs.files.places import FORMATS, JobError, compressed, form_of, need

Rows = Callable[[], Iterable[dict[str, Any]]]
_GROUP = 4_096  # rows of Parquet written at once
_CODECS = {"": "snappy", "gzip": "gzip", "zstd": "zstd"}


def encode_row(row: dict[str, Any]) -> bytes:
    """A row as a line of JSON, without its end; half of a surrogate pair becomes "?"."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode(errors="replace")


def write_rows(rows: Rows, file: BinaryIO, *, form: str, codec: str) -> None:
    """All rows to a file.

    Args:
      rows: gives them from the first each time it is called.
      file: to write to.
      form: "jsonl", "csv" or "parquet"; `codec`: "", "gzip" or "zstd".
    """
    if form == "parquet":  # compresses its pages, which readers expect, not the file
        _write_parquet(rows, file, codec)
        return
    with compressed(file, codec) as stream:
        if form == "csv":
            _write_csv(rows, stream)
        else:
            for row in rows():
                stream.write(encode_row(row) + b"\n")


def form_to_write(path: str) -> tuple[str, str]:
    """(format, codec) of an output by its name, "jsonl" where that says nothing of a format.

    Raises JobError now, not after the last row, on another ending or where a package is missing.
    """
    form, codec = form_of(path)
    ending = os.path.splitext(path.lower().removesuffix(".gz").removesuffix(".zst"))[1]
    if not form and ending not in ("", ".json", ".txt"):
        raise JobError(
            f"job.output={path!r} ends in {ending}: want {', '.join(FORMATS)}, or one and .gz, .zst"
        )
    if form == "parquet":
        need("pyarrow.parquet", "files", why="Parquet")
    elif codec == "zstd":
        need("zstandard", "files", why=".zst")
    return form or "jsonl", codec


def _write_csv(rows: Rows, stream: IO[bytes]) -> None:
    names = list(dict.fromkeys(name for row in rows() for name in row))
    text = io.TextIOWrapper(stream, "utf-8", newline="", write_through=True)
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows():
        writer.writerow({name: _cell(value) for name, value in row.items()})
    text.detach()


def _cell(value: Any) -> Any:
    plain = value is None or (isinstance(value, (str, int, float)) and not isinstance(value, bool))
    return value if plain else json.dumps(value, ensure_ascii=False)


def _write_parquet(rows: Rows, file: BinaryIO, codec: str) -> None:
    arrow = need("pyarrow", "files", why="Parquet")
    parquet = need("pyarrow.parquet", "files", why="Parquet")
    schema, texts = _schema(arrow, rows())
    with parquet.ParquetWriter(file, schema, compression=_CODECS[codec]) as writer:
        for group in _groups(rows()):
            columns = [
                arrow.array(_values(group, field.name, texts), field.type) for field in schema
            ]
            writer.write_table(arrow.Table.from_arrays(columns, schema=schema))


def _schema(arrow: Any, rows: Iterable[dict[str, Any]]) -> tuple[Any, frozenset[str]]:
    """The type of each column, and which columns hold values of types that don't go together."""
    types: dict[str, Any] = {}
    texts: set[str] = set()
    for group in _groups(rows):
        for name in dict.fromkeys(name for row in group for name in row):
            if name in texts:
                continue
            try:
                found = arrow.array(_values(group, name)).type
                if "struct<>" in str(found):
                    raise arrow.ArrowInvalid("Parquet has no empty structs")
                types[name] = _unified(arrow, types.get(name), found)
            except (arrow.ArrowInvalid, arrow.ArrowTypeError, OverflowError):
                texts.add(name)
                types[name] = arrow.string()
    return arrow.schema(list(types.items())), frozenset(texts)


def _unified(arrow: Any, earlier: Any, found: Any) -> Any:
    if earlier is None or earlier == found:
        return found
    schemas = [arrow.schema([("column", kind)]) for kind in (earlier, found)]
    return arrow.unify_schemas(schemas, promote_options="permissive").field(0).type


def _values(group: list[dict], name: str, texts: frozenset[str] = frozenset()) -> list[Any]:
    values = [row.get(name) for row in group]
    return [_text(value) for value in values] if name in texts else values


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    remaining = iter(rows)
    while group := list(itertools.islice(remaining, _GROUP)):
        yield group
