"""What a job has done so far, line by line, so that the next process goes on after a kill.

`FileJournal` is a local file that grows by whole lines. `BucketJournal` is for stores where a file
can't grow: numbered pieces, each written at once, a new one after some rows or seconds; a kill
loses the piece that isn't written yet, and its rows are computed again. Both give back whole lines
only. Read next: `../output.py`.
"""

import os
import time
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path
from typing import Protocol

from lepton_jax.jobs.files.places import JobError, file_system, reason

_PIECE_LINES = 2_000
_PIECE_SECONDS = 30.0


class Journal(Protocol):
    """Lines that were appended, without their line ends."""

    def lines(self) -> Iterator[bytes]: ...
    def open(self, keep: int) -> None:
        """Ready to append after the first `keep` lines; the others are dropped."""

    def append(self, line: bytes) -> None:
        """Raises JobError where it can't be written; the lines before are kept."""

    def sync(self) -> None:
        """Makes sure that all is stored."""

    def close(self) -> None: ...
    def remove(self) -> None: ...


class FileJournal:
    """Lines in a local file; the system has a line once `append` returns, so no kill loses it."""

    def __init__(self, path: Path):
        self.path = path
        self._file: RawIOBase | None = None

    def lines(self) -> Iterator[bytes]:
        if not self.path.exists():
            return
        with self.path.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    yield line[:-1]

    def open(self, keep: int) -> None:
        self._file = self.path.open("ab", buffering=0)
        with self.path.open("rb") as lines:
            for _ in range(keep):
                lines.readline()
            self._file.truncate(lines.tell())

    def append(self, line: bytes) -> None:
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise cannot_write(str(self.path), error) from error

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(str(self.path), error) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class BucketJournal:
    """Lines in numbered pieces below a URL."""

    def __init__(self, url: str):
        self._url = url
        self._files, self._root = file_system(url)
        self._pending: list[bytes] = []
        self._next = 0
        self._begun = time.monotonic()

    def lines(self) -> Iterator[bytes]:
        number = 0
        while self._files.exists(self._piece(number)):
            yield from self._files.cat_file(self._piece(number)).split(b"\n")[:-1]
            number += 1

    def open(self, keep: int) -> None:
        number, left = 0, keep
        while self._files.exists(self._piece(number)):
            lines = self._files.cat_file(self._piece(number)).split(b"\n")[:-1]
            if left < len(lines):
                break
            left -= len(lines)
            number += 1
        self._pending = lines[:left] if left else []
        self._next = number
        # From the last down: a kill meanwhile must not leave a gap with older pieces behind it.
        for old in sorted(self._numbers(), reverse=True):
            if old >= number:
                self._files.rm_file(self._piece(old))
        self._begun = time.monotonic()

    def append(self, line: bytes) -> None:
        self._pending.append(line)
        waited = time.monotonic() - self._begun
        if len(self._pending) >= _PIECE_LINES or waited >= _PIECE_SECONDS:
            self.sync()

    def sync(self) -> None:
        if self._pending:
            try:
                content = b"".join(line + b"\n" for line in self._pending)
                self._files.pipe_file(self._piece(self._next), content)
            except OSError as error:
                raise cannot_write(self._url, error) from error
            self._next += 1
        self._pending, self._begun = [], time.monotonic()

    def close(self) -> None:
        """What is pending goes out too: nothing of it has to be computed again. Once."""
        try:
            self.sync()
        finally:
            self._pending = []

    def remove(self) -> None:
        for number in sorted(self._numbers(), reverse=True):
            self._files.rm_file(self._piece(number))

    def _piece(self, number: int) -> str:
        return f"{self._root}/{number:08}.jsonl"

    def _numbers(self) -> list[int]:
        if not self._files.exists(self._root):
            return []
        names = (Path(name) for name in self._files.ls(self._root, detail=False))
        return [int(name.stem) for name in names if name.stem.isdecimal()]


def cannot_write(path: str, error: OSError, *, act: str = "make room") -> JobError:
    """What to say of a full disk and the like; `act`: what to do before the job is run again."""
    return JobError(
        f"{path} can't be written: {reason(error)}; the rows so far are kept: "
        f"{act} and run the same command again"
    )
