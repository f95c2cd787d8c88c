"""Reads the key-value section of a GGUF file into a dict of plain Python values, fast.

Only the header is touched (the file is mmapped); tensors belong to `checkpoints/`. The `gguf`
package keeps one numpy view per array element and so needs 8 s for a vocabulary of 262,144 pieces;
this walk needs a fraction of a second. Every length is checked against the file before it is used,
so a cut or mutated file ends in `GgufError`. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian). Read
`gguf_tokenizer.py` next.
"""

from __future__ import annotations

import mmap
import os
import struct

import numpy as np

_SCALARS = {  # GGUF value type -> numpy type
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MAX_NESTING = 4
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class GgufError(ValueError):
    """A file that is not a readable GGUF: the message names the file, the place and what was
    found.
    """


def read_metadata(path: str | os.PathLike) -> dict[str, object]:
    """All metadata keys of the GGUF at `path`: numbers, booleans, strings, and lists of those.

    Raises `GgufError` for anything that is not a whole, well-formed header, `OSError` if the file
    can't be opened.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < 24:
            raise GgufError(f"{path}: too short for a GGUF header (24 bytes); fetch the file again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data, str(path)).metadata()


class _Header:
    """A cursor over the header of one file."""

    def __init__(self, data: mmap.mmap, path: str):
        self.data, self.path, self.position, self.size = data, path, 0, len(data)

    def metadata(self) -> dict[str, object]:
        magic, version = self.data[:4], self.data[4:8]
        if magic != b"GGUF":
            self.fail(f"starts with {bytes(magic)!r}, not with b'GGUF': not a GGUF file")
        (version,) = _U32.unpack(version)
        if version not in (2, 3):
            self.fail(f"GGUF version {version}; versions 2 and 3 (little endian) can be read")
        self.position = 16  # magic, version, number of tensors
        count = self.length("number of metadata keys", item_bytes=13)
        values: dict[str, object] = {}
        for _ in range(count):
            key = self.string("a metadata key")
            if key in values:
                self.fail(f"metadata key {key!r} appears twice")
            values[key] = self.value(self.u32(key), key, depth=0)
        return values

    def value(self, kind: int, key: str, *, depth: int) -> object:
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key, depth=depth)
        return self.numbers(kind, 1, key)[0]

    def array(self, key: str, *, depth: int) -> list:
        if depth >= _MAX_NESTING:
            self.fail(f"{key}: arrays nested deeper than {_MAX_NESTING}")
        kind = self.u32(key)
        if kind == _STRING:
            return self.strings(self.length(key, item_bytes=8), key)
        if kind == _ARRAY:
            count = self.length(key, item_bytes=12)
            return [self.array(key, depth=depth + 1) for _ in range(count)]
        return self.numbers(kind, self.length(key, item_bytes=1), key)

    def numbers(self, kind: int, count: int, key: str) -> list:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            self.fail(f"{key}: value type {kind} is unknown; known are 0 to 12")
        start = self.advance(count * np.dtype(dtype).itemsize, key)
        raw = self.data[start : self.position]  # a copy: no view may outlive the mmap
        return np.frombuffer(raw, dtype).tolist()

    def strings(self, count: int, key: str) -> list[str]:
        data, size, position, unpack = self.data, self.size, self.position, _U64.unpack_from
        found = []
        try:
            for _ in range(count):
                (length,) = unpack(data, position)
                start = position + 8
                position = start + length
                if position > size:
                    break
                found.append(data[start:position].decode("utf-8"))
        except struct.error:
            position = size + 1
        except UnicodeDecodeError as error:
            self.fail(f"{key}[{len(found)}] is not UTF-8 ({error.reason})")
        if position > size:
            self.fail(f"{key}[{len(found)}] ends after the file: the file is cut or damaged")
        self.position = position
        return found

    def string(self, key: str) -> str:
        start = self.advance(self.length(key, item_bytes=1), key)
        try:
            return self.data[start : self.position].decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{key}: the string is not UTF-8 ({error.reason})")

    def length(self, key: str, *, item_bytes: int) -> int:
        (count,) = _U64.unpack_from(self.data, self.advance(8, key))
        if count * item_bytes > self.size - self.position:
            self.fail(f"{key}: a length of {count}, more than the file holds: it is cut or damaged")
        return count

    def u32(self, key: str) -> int:
        return _U32.unpack_from(self.data, self.advance(4, key))[0]

    def advance(self, count: int, key: str) -> int:
        start, self.position = self.position, self.position + count
        if self.position > self.size:
            self.fail(f"{key} ends after the file: it is cut or damaged; fetch it again")
        return start

    def fail(self, message: str):
        raise GgufError(f"{self.path}: {message}")
