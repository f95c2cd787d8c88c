"""One process at a time for one output: a lock that the system gives up when its holder dies.

`flock` (fcntl) on a file that holds the process id. A file left behind by a killed process holds
nobody up. Locks reach the processes of one machine: two machines that write to one bucket or
network disk aren't kept apart. Read next: `../output.py`.
"""

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path

from lepton_jax.jobs.files.places import JobError, is_remote


class JobLock:
    """Holds `<output>.lock`; for a URL a file of this user in the directory for temporary files."""

    def __init__(self, output: str):
        """Raises JobError, naming the process, where another one is on this output."""
        self._path = _lock_path(output)
        self._file: int | None = None
        while self._file is None:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(file, 32).decode(errors="replace").strip() or "unknown"
                os.close(file)
                raise JobError(
                    f"job.output={output!r} is being written by process {holder}: wait for it, "
                    "end it, or give another output"
                ) from error
            if self._is_current(file):
                self._file = file
            else:  # its holder has removed it between our opening and our locking
                os.close(file)
        os.ftruncate(self._file, 0)
        os.write(self._file, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Removes the file first: whoever opened it before finds out and looks again."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False


def _lock_path(output: str) -> Path:
    if not is_remote(output):
        return Path(output + ".lock")
    name = hashlib.sha256(output.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"lepton_jax-{os.getuid()}-{name}.lock"
