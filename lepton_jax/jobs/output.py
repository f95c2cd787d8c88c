"""The output of a job: resumable while it is written, whole once it has its name.

Rows go to `<output>.partial`, as JSON lines whatever the output's format; `<output>.partial.meta`
says of which input, model and settings they are, and when the first run began. The same command
goes on after the last whole row; one that differs in any of these is refused, with what differs.
The last step gives the file its form and its name, so an output that exists is complete. Below a
URL the partial is a folder of pieces, and the whole file is written to this machine's folder for
temporary files before it is sent. `<output>.lock` keeps a second process away. Read next:
`files/journal.py`, `driver.py`.
"""

import datetime
import json
import logging
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lepton_jax.config import JobSection
from lepton_jax.jobs.files import places, writers
from lepton_jax.jobs.files.journal import BucketJournal, FileJournal, Journal, cannot_write
from lepton_jax.jobs.files.lock import JobLock
from lepton_jax.jobs.files.places import JobError, reason

log = logging.getLogger(__name__)

_FORMAT = 3  # of output rows; a change makes older partial files refused
_EXACT, _PAGES = "job.exact", "engine.num_pages"
_AGAIN = "to start over, add --config.job.restart=true"
Parts = Mapping[str, Any]


class Output:
    """What a job writes to `job.output`.

    Attributes:
      path: the finished file's path or URL; `summary` and `report` go beside it.
      form: "jsonl", "csv" or "parquet".
    """

    def __init__(self, job: JobSection):
        """Takes the lock. Raises JobError where the output can't be written or is taken."""
        if not job.output:
            raise JobError("job.output is empty: give a file to write, --config.job.output=FILE")
        self._remote = places.is_remote(job.output)
        self.path = job.output if self._remote else os.path.expanduser(job.output)
        self.form, self._codec = writers.form_to_write(self.path)
        self._finished_order, self._exact = job.order == "finished", job.exact
        self._partial = self.path + ".partial"
        self._meta = self.path + ".partial.meta"
        self.summary = self.path + ".summary.json"
        self.report = self.path + ".report.html"
        if not self._remote:
            self._check_writable(job.output)
        self._journal: Journal = (
            BucketJournal(self._partial) if self._remote else FileJournal(Path(self._partial))
        )
        self._told: dict[str, Any] = {}  # what the meta file says
        self._lock = JobLock(self.path)

    def begin(self, parts: Parts, *, rounding: Parts, restart: bool) -> str:
        """Takes over the partial of an interrupted run, or makes sure that there is none.

        Args:
          parts: all that the answers depend on, by name; JSON.
          rounding: that on which only their rounding depends; it may change without `job.exact`.
          restart: drop what another run has left.

        Returns when the first run began, in ISO form. Raises JobError, naming the parts that
        differ, where it is of another input, model or settings.
        """
        # As it comes back from the file: tuples become lists and keys become texts.
        rounding = {_EXACT: self._exact, **rounding}
        parts = json.loads(json.dumps({"format": _FORMAT, **parts, **rounding}))
        began = datetime.datetime.now().isoformat(timespec="seconds")
        fresh = restart or next(self._journal.lines(), None) is None
        try:
            if fresh:
                self._journal.remove()
            theirs = {} if fresh else self._checked(parts, rounding)
        except OSError as error:
            raise JobError(f"{self._partial} can't be removed: {reason(error)}") from error
        kept = {name: theirs[name] for name in ("began", _PAGES) if name in theirs}
        self._tell({"began": began} | parts | kept)
        return self._told["began"]

    def plan(self, pages: Sequence[int]) -> None:
        """Takes the pages of each cache, which may come from the memory; after `begin`. Where they
        are few, rows wait or are computed again, and others are computed together.

        Raises JobError where they were others in the interrupted run, unless without `job.exact`.
        """
        mine = pages[0] if len({*pages}) == 1 else list(pages)
        theirs = self._told.get(_PAGES, mine)
        if self._exact and theirs != mine:
            raise self._refusal([_change(_PAGES, theirs, mine)], only_rounding=True)
        self._tell(self._told | {_PAGES: mine})

    def done_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(place in the input, output row) of the rows that are done, as they were written."""
        for number, line in enumerate(self._journal.lines()):
            try:
                place, row = self._parsed(number, line)
            except ValueError:
                return
            yield place, row

    def open(self, keep: int) -> None:
        """Ready to write after the first `keep` rows. Raises JobError where it can't be."""
        try:
            self._journal.open(keep)
        except OSError as error:
            raise cannot_write(self._partial, error) from error

    def write(self, place: int, row: dict[str, Any]) -> None:
        """Adds the output row of the input's row at `place`, from 0.

        Raises JobError where it can't be written, as on a full disk; the rows before are kept.
        """
        line = writers.encode_row(row)
        self._journal.append(b"%d\t%b" % (place, line) if self._finished_order else line)

    def finish(self) -> None:
        """Gives the complete file its form and its name. Raises JobError where it can't be."""
        self._journal.sync()
        self._journal.close()
        try:
            if self._is_final():
                os.replace(self._partial, self.path)
            else:
                self._write_final()
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            self._journal.remove()
            self._remove_meta()
        except OSError as error:
            log.warning("%s can't be removed: %s", self._partial, reason(error))

    def close(self) -> None:
        """Leaves what is done for a later run, and the output to others."""
        try:
            self._journal.close()
        except JobError as error:
            log.warning("the last rows are to be computed again: %s", error)
        finally:
            self._lock.release()

    def _is_final(self) -> bool:
        """Whether the journal already is what the output shall be."""
        other_form = self.form != "jsonl" or self._codec
        return not (other_form or self._remote or self._finished_order)

    def _write_final(self) -> None:
        fresh, act = Path(self.path + ".tmp"), "make room"
        if self._remote:
            name = f"{os.path.basename(self.path)}.{os.getpid()}.tmp"
            fresh = Path(tempfile.gettempdir()) / name
            act = "make room there, or set TMPDIR to a folder on a larger disk,"
        try:
            try:
                with fresh.open("wb") as file:
                    writers.write_rows(self._rows, file, form=self.form, codec=self._codec)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise cannot_write(str(fresh), error, act=act) from error
            places.put(fresh, self.path)
        finally:
            fresh.unlink(missing_ok=True)

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Output rows as they were written. Raises JobError where a bucket doesn't give them."""
        try:
            for _, row in self.done_rows():
                yield row
        except OSError as error:
            raise JobError(f"{self._partial} can't be read: {reason(error)}") from error

    def _parsed(self, number: int, line: bytes) -> tuple[int, dict[str, Any]]:
        place = number
        if self._finished_order:
            head, _, line = line.partition(b"\t")
            place = int(head)
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("not a row")
        return place, row

    def _tell(self, told: dict[str, Any]) -> None:
        """Writes the meta file."""
        self._told = told
        try:
            places.write_small(self._meta, json.dumps(told, indent=1).encode())
        except OSError as error:
            raise JobError(f"{self._meta} can't be written: {reason(error)}") from error

    def _checked(self, parts: Parts, rounding: Collection[str]) -> dict[str, Any]:
        """What the meta file says of the run whose rows are there."""
        try:
            theirs = json.loads(self._read_meta())
        except (OSError, ValueError) as error:
            raise JobError(
                f"{self._partial} holds rows but {self._meta} can't be read, so nobody knows of "
                f"what: {_AGAIN}"
            ) from error
        if theirs.get("format") != parts["format"]:
            raise JobError(f"{self._partial} is of another version of lepton_jax: {_AGAIN}")
        changed = [
            name
            for name in sorted({*theirs, *parts} - {"began", _PAGES})
            if theirs.get(name) != parts.get(name) and (self._exact or name not in rounding)
        ]
        if changed:
            said = [_change(name, theirs.get(name), parts.get(name)) for name in changed]
            raise self._refusal(said, only_rounding=set(changed) <= set(rounding))
        return theirs

    def _refusal(self, said: Sequence[str], *, only_rounding: bool) -> JobError:
        """To go on with another run's rows."""
        inexact = f"with --config.{_EXACT}=false only rounding may differ; "
        return JobError(
            f"{self._partial} is of another run: {'; '.join(said)}. Go back to what it was to go "
            f"on with it; {inexact if only_rounding else ''}{_AGAIN}"
        )

    def _read_meta(self) -> bytes:
        if self._remote:
            files, inside = places.file_system(self._meta)
            return files.cat_file(inside)
        return Path(self._meta).read_bytes()

    def _remove_meta(self) -> None:
        if self._remote:
            files, inside = places.file_system(self._meta)
            files.rm_file(inside)
        else:
            Path(self._meta).unlink(missing_ok=True)

    def _check_writable(self, given: str) -> None:
        path = Path(self.path)
        if path.is_dir():
            raise JobError(f"job.output={given!r} is a directory: give a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            probe = Path(self.path + ".probe")
            probe.write_bytes(b"")
            probe.unlink()
            if os.path.exists(self._partial):
                open(self._partial, "ab").close()
        except OSError as error:
            raise JobError(f"job.output={given!r} can't be written: {reason(error)}") from error


class Unwritten:
    """The output on a host that doesn't write: `Output`'s methods without effect."""

    def __init__(self, job: JobSection):
        """Raises JobError where `job.output` names no form that can be written."""
        self.path = job.output
        self.form, _ = writers.form_to_write(self.path)

    def begin(self, parts: Parts, *, rounding: Parts, restart: bool) -> str:
        """Host 0 makes sure of that, and says when the job began."""
        return ""

    def plan(self, pages: Sequence[int]) -> None:
        """Host 0 compares them; they are the same on all."""

    def done_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """None: only host 0 knows."""
        return iter(())

    def open(self, keep: int) -> None:
        """Nothing to open."""

    def write(self, place: int, row: dict[str, Any]) -> None:
        """Host 0 writes the same row."""

    def finish(self) -> None:
        """Nothing to finish."""

    def close(self) -> None:
        """Nothing to close."""


def _change(name: str, theirs: Any, mine: Any) -> str:
    if name == "input":
        return f"the input {_input_change(theirs or [], mine or [])}"
    if name == "model":
        return "the model is another one"
    return f"{name} was {theirs!r}, is {mine!r}"


def _input_change(theirs: list[list[str]], mine: list[list[str]]) -> str:
    before, now = dict(theirs), dict(mine)
    if list(before) != list(now):
        return f"was {', '.join(before)}, is {', '.join(now)}"
    changed = [name for name in now if now[name] != before[name]]
    return f"has changed: {', '.join(changed)}"
