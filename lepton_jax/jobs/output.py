"""The output file of a job: written in order, whole at the end, resumable before.

Rows go to `<output>.partial`; `<output>.partial.meta` says for which input, config and model. A
rerun with the same three goes on after the last whole row, any other starts over. The last step
renames the file, so an output that exists is complete. Read next: `generate.py`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path

log = logging.getLogger(__name__)

_FORMAT = 1  # of output rows; a change makes older partial files start over


class JobError(ValueError):
    """A job that can't begin or end; the message names the file or field and what to do."""


def check_input(path: str) -> Path:
    """The input as a path. Raises JobError where it can't be read."""
    if not path:
        raise JobError("job.input is empty: give a JSONL file, --config.job.input=FILE")
    place = Path(path).expanduser()
    try:
        with place.open("rb"):
            return place
    except OSError as error:
        raise JobError(f"job.input={path!r} can't be read: {error.strerror}") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


class OutputFile:
    """`path` and, beside it, `<path>.partial`, `<path>.partial.meta`, `<path>.summary.json`."""

    def __init__(self, path: str):
        """Raises JobError where it can't be written; its directory is made where it is missing."""
        if not path:
            raise JobError("job.output is empty: give a file to write, --config.job.output=FILE")
        self.path = Path(path).expanduser()
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.meta = self.path.with_name(self.path.name + ".partial.meta")
        self.summary = self.path.with_name(self.path.name + ".summary.json")
        self._file: RawIOBase | None = None
        if self.path.is_dir():
            raise JobError(f"job.output={path!r} is a directory: give a file")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            probe = self.path.with_name(self.path.name + ".probe")
            probe.write_bytes(b"")
            probe.unlink()
            if self.partial.exists():
                self.partial.open("ab").close()
        except OSError as error:
            raise JobError(f"job.output={path!r} can't be written: {error.strerror}") from error

    def done_rows(self, key: str) -> Iterator[dict]:
        """The rows that an earlier, interrupted run with this key has written, in order."""
        if not self.partial.exists():
            return  # a kill right after the renaming leaves the meta file alone
        if not self._meta_matches(key):
            if self.partial.stat().st_size:
                log.warning("%s is of another input, config or model: starting over", self.partial)
            return
        with self.partial.open("rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    return
                yield row

    def open(self, key: str, keep_rows: int) -> None:
        """Ready to write after the first `keep_rows` rows of the partial file."""
        if keep_rows:
            with self.partial.open("r+b") as file:
                for _ in range(keep_rows):
                    file.readline()
                file.truncate(file.tell())
        else:
            self.partial.write_bytes(b"")
            self.meta.write_text(json.dumps({"format": _FORMAT, "key": key}))
        self._file = self.partial.open("ab", buffering=0)

    def write(self, row: dict) -> None:
        """Appends a row; the system has it once this returns, so a kill doesn't lose it.

        Raises JobError where it can't be written, as on a full disk; the rows before are kept.
        """
        line = memoryview(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise JobError(
                f"{self.partial} can't be written: {error.strerror}; the rows so far are kept: "
                "make room and run the same command again"
            ) from error

    def close(self) -> None:
        """Leaves the partial file for a later run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """Gives the complete file its name."""
        os.fsync(self._file.fileno())
        self.close()
        os.replace(self.partial, self.path)
        self.meta.unlink()

    def _meta_matches(self, key: str) -> bool:
        try:
            return json.loads(self.meta.read_bytes()) == {"format": _FORMAT, "key": key}
        except (OSError, ValueError):
            return False
