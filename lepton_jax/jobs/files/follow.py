"""A local file of JSON lines that others are still writing: `job.follow`.

`Follower.lines` gives whole lines as they come, and PENDING while there is none, so that the reader
can do other work meanwhile. It ends when nothing has come for so many seconds, or after `stop`.
A line without its end isn't given before the end comes. Read next: `source.py`.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lepton_jax.jobs.files.places import JobError, is_remote


class Pending:
    """The type of PENDING."""


PENDING: Final = Pending()


class Follower:
    """One reader of one growing file."""

    def __init__(self, path: str, seconds: float):
        """Raises JobError where the file is not a local one.

        Args:
          path: of the file, which must exist and may be empty.
          seconds: without a new line after which it ends.
        """
        if is_remote(path) or not Path(path).is_file():
            raise JobError(f"job.follow reads a local file that grows, not {path!r}")
        self._path, self._seconds = path, seconds
        self._stopped = False

    def stop(self) -> None:
        """Ends after the lines that are there."""
        self._stopped = True

    def lines(self) -> Iterator[bytes | Pending]:
        """Each line with its end; of the last only once it is whole, or when nothing follows."""
        with open(self._path, "rb") as file:
            began, last = b"", time.monotonic()
            while True:
                piece = file.readline()
                began += piece
                if began.endswith(b"\n"):
                    yield began
                    began, last = b"", time.monotonic()
                elif self._stopped or time.monotonic() - last >= self._seconds:
                    if began:
                        yield began
                    return
                elif piece:
                    last = time.monotonic()
                else:
                    yield PENDING
