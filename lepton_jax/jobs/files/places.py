"""Paths: local ones and, through fsspec, URLs such as gs:// and s3://; globs; gzip and zstd.

Only bytes here. A package that is missing is named with the pip command that brings it.
Read next: `source.py`, `journal.py`.
"""

import contextlib
import glob
import gzip
import hashlib
import importlib
import io
import os
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from lepton_jax.whole_file import write_whole

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
CODECS = {".gz": "gzip", ".zst": "zstd"}
_BLOCK = 2**20  # bytes


class JobError(ValueError):
    """A job that can't begin or end; the message names the file or field and what to do."""


def need(module: str, extra: str, *, why: str) -> types.ModuleType:
    """An optional package. Raises JobError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise JobError(
            f"{why} needs {package}: pip install {package}, "
            f'or pip install "lepton_jax[{extra}]" for all that belongs to it'
        ) from error


def is_remote(path: str) -> bool:
    """Whether it is a URL that fsspec opens."""
    return "://" in path


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. Raises JobError where there is none."""
    fsspec = need("fsspec", "remote", why=f"{url!r}")
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        hint = "gs:// needs pip install gcsfs, s3:// pip install s3fs"
        raise JobError(f"{url!r} can't be opened: {error} ({hint})") from error


def form_of(path: str) -> tuple[str, str]:
    """(format, codec) by the endings of a name: ("csv", "gzip") of a.csv.gz; "" where unknown."""
    stem, ending = os.path.splitext(path.lower())
    codec = CODECS.get(ending, "")
    if codec:
        ending = os.path.splitext(stem)[1]
    return FORMATS.get(ending, ""), codec


def expand(pattern: str) -> list[str]:
    """The files of a path or a glob, sorted by name. Raises JobError where there are none."""
    if is_remote(pattern):
        files, inside = file_system(pattern)
        if not glob.has_magic(inside):
            return [pattern]
        found = [files.unstrip_protocol(name) for name in files.glob(inside)]
    else:
        pattern = os.path.expanduser(pattern)
        if os.path.exists(pattern) or not glob.has_magic(pattern):
            return [pattern]
        found = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    if not found:
        raise JobError(f"job.input={pattern!r} matches no file")
    return sorted(found)


def is_same(path: str, other: str) -> bool:
    """Whether two paths or URLs are one file."""
    if path == other or is_remote(path) or is_remote(other):
        return path == other
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def reason(error: Exception) -> str:
    """Why the system said no, in its words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def open_stored(path: str) -> BinaryIO:
    """A file's bytes as they are stored. Raises JobError where it can't be read."""
    try:
        if is_remote(path):
            files, inside = file_system(path)
            return files.open(inside, "rb")
        return open(path, "rb")
    except FileNotFoundError as error:
        where = "" if is_remote(path) or os.path.isabs(path) else f" in {os.getcwd()}"
        raise JobError(f"job.input={path!r} can't be read: No such file{where}") from error
    except OSError as error:
        raise JobError(f"job.input={path!r} can't be read: {reason(error)}") from error


@contextlib.contextmanager
def open_content(path: str) -> Iterator[BinaryIO]:
    """A file's content, decompressed as its ending says.

    Raises JobError where it can't be read, also later: a broken archive shows while it is read.
    """
    codec = form_of(path)[1]
    failures: tuple[type[Exception], ...] = (OSError, EOFError, *_broken(codec))
    with open_stored(path) as stored:
        try:
            yield _decompressed(stored, codec)
        except failures as error:
            raise JobError(f"job.input={path!r} can't be read on: {reason(error)}") from error


@contextlib.contextmanager
def compressed(file: BinaryIO, codec: str) -> Iterator[IO[bytes]]:
    """A stream that writes to `file` by a codec; the same bytes for the same content."""
    if codec == "gzip":
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as stream:
            yield stream
    elif codec == "zstd":
        zstandard = need("zstandard", "files", why=".zst")
        with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as stream:
            yield stream
    else:
        yield file


def digest(path: str) -> tuple[str, int | None]:
    """What tells a file's content from another, and its lines where they are known.

    SHA-256 of a local file. Of a remote one what its store says of it (as S3's ETag): a bucket is
    not read twice.
    """
    if is_remote(path):
        files, inside = file_system(path)
        try:
            return f"{files.checksum(inside):x}", None
        except OSError as error:
            raise JobError(f"job.input={path!r} can't be read: {reason(error)}") from error
    sha, (form, codec) = hashlib.sha256(), form_of(path)
    with open_stored(path) as data:
        lines: int | None = _lines(_hashed(data, sha))
    if codec and form != "parquet":
        lines = None  # a broken archive is told where its rows are read
        with contextlib.suppress(JobError), open_content(path) as content:
            lines = _lines(iter(lambda: content.read(_BLOCK), b""))
    return sha.hexdigest(), None if form == "parquet" else lines


def _hashed(data: BinaryIO, sha: Any) -> Iterator[bytes]:
    while block := data.read(_BLOCK):
        sha.update(block)
        yield block


def _lines(blocks: Iterable[bytes]) -> int:
    count, last = 0, b"\n"
    for block in blocks:
        count, last = count + block.count(b"\n"), block
    return count + (not last.endswith(b"\n"))


def put(local: Path, path: str) -> None:
    """Moves a finished local file to its place; there it is whole or not at all."""
    if not is_remote(path):
        os.replace(local, path)
        return
    files, inside = file_system(path)
    files.put_file(str(local), inside)
    local.unlink()


def write_small(path: str, content: bytes) -> None:
    """A file of a few KB, whole or not at all."""
    if is_remote(path):
        files, inside = file_system(path)
        files.pipe_file(inside, content)
        return
    write_whole(Path(path), content)


def _decompressed(stored: BinaryIO, codec: str) -> BinaryIO:
    if codec == "gzip":
        return gzip.GzipFile(fileobj=stored, mode="rb")
    if codec == "zstd":
        zstandard = need("zstandard", "files", why=".zst")
        decompressor = zstandard.ZstdDecompressor()
        return io.BufferedReader(decompressor.stream_reader(stored, read_across_frames=True))
    return stored


def _broken(codec: str) -> tuple[type[Exception], ...]:
    if codec == "gzip":
        return (importlib.import_module("zlib").error,)
    if codec == "zstd":
        return (need("zstandard", "files", why=".zst").ZstdError,)
    return ()
