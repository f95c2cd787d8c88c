"""Named arrays in weight files, read one at a time.

The format modules parse and check a header and describe each array as a `StoredTensor`; from there
on all formats are alike: `TensorFiles.read` fetches one array slab by slab, decoding and casting on
the way, so that a read costs the finished array and a few MiB. Nothing is mapped or kept open: a
file that shrinks meanwhile is an error, not a crash. Read next: `safetensors_files.py`.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from lepton_jax.checkpoints.errors import CheckpointError

FLOAT_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_SLAB_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where one array lies and how its bytes become numbers.

    Attributes:
      path: its file.
      offset: of its first byte in the file.
      nbytes: that it takes there.
      shape: of the array.
      kind: the format's name of its type, for messages.
      dtype: of the decoded values; None if the type can't be decoded.
      block_bytes: bytes of the smallest unit that decodes on its own.
      decode: `uint8[n * block_bytes] -> values`, flat; None if the bytes are the values.
      block_size: the number of values in that unit.
    """

    path: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    kind: str
    dtype: np.dtype | None
    block_bytes: int
    block_size: int = 1
    decode: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class TensorFiles:
    """The arrays of one checkpoint by name.

    Args:
      path: what errors call the checkpoint.
      tensors: what is in it; every offset already checked against its file.

    Attributes:
      bytes_read: of the arrays, until now.
    """

    def __init__(self, path: Path, tensors: dict[str, StoredTensor]):
        self.path = path
        self.tensors = tensors
        self.bytes_read = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Of the decoded values. Raises CheckpointError if they aren't float weights."""
        tensor = self.tensors[name]
        if tensor.dtype is None:
            raise CheckpointError(
                f"{tensor.path}: tensor {name!r} has type {tensor.kind}, which can't be read as a "
                f"weight; float types ({', '.join(FLOAT_DTYPES)}) and the block types of the gguf "
                "package can. Convert the checkpoint to one of them"
            )
        return tensor.dtype

    def weights_dtype(self) -> np.dtype:
        """The float dtype of most of the bytes; bfloat16 where these are quantized blocks."""
        bytes_of = collections.Counter()
        for tensor in self.tensors.values():
            if tensor.dtype in FLOAT_DTYPES.values():
                own = tensor.dtype if tensor.decode is None else FLOAT_DTYPES["bfloat16"]
                bytes_of[own] += tensor.nbytes
        if not bytes_of:
            raise CheckpointError(f"{self.path} holds no float tensors, so it is no model")
        return bytes_of.most_common(1)[0][0]

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """The whole array in `dtype`, in memory of its own.

        Raises CheckpointError: the file got shorter or unreadable, or a value of the file is
        outside float16's range.
        """
        flat = _aligned_empty(self.tensors[name].size, dtype)
        with self._opened(name) as file:
            self._fill(flat, file, name=name, start=0)
        return flat.reshape(self.shape(name))

    def read_rows(
        self, name: str, dtype: np.dtype, *, rows: slice, columns: slice = slice(None)
    ) -> np.ndarray:
        """Rows of an array `[..., I]` that is taken as `[R, I]`, or some columns of them. No other
        row is read, and of these rows all: disks fetch ahead, so that columns would save nothing.
        Errors as of `read`.
        """
        tensor = self.tensors[name]
        width = tensor.shape[-1]
        first, end, _ = rows.indices(tensor.size // width)
        left, right, _ = columns.indices(width)
        found = np.empty((end - first, right - left), dtype)
        with self._opened(name) as file:
            if right - left == width:
                self._fill(found.reshape(-1), file, name=name, start=first * width)
                return found
            slab = np.empty((max(1, _SLAB_BYTES // (4 * width)), width), dtype)
            for row in range(first, end, len(slab)):
                part = slab[: end - row]
                self._fill(part.reshape(-1), file, name=name, start=row * width)
                found[row - first : row - first + len(part)] = part[:, left:right]
        return found

    @contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        """The file of an array that can be decoded."""
        self.dtype(name)
        path = self.tensors[name].path
        try:
            with open(path, "rb", buffering=0) as file:
                yield file
        except OSError as error:
            raise CheckpointError(f"{path}: can't read tensor {name!r}: {error}") from error

    def _fill(self, flat: np.ndarray, file: BinaryIO, *, name: str, start: int) -> None:
        """Values of a tensor from number `start` on; both ends are those of blocks."""
        tensor, done = self.tensors[name], 0
        blocks = min(flat.size, max(tensor.block_size, _SLAB_BYTES // 4)) // tensor.block_size
        buffer = memoryview(bytearray(blocks * tensor.block_bytes))
        file.seek(tensor.offset + start // tensor.block_size * tensor.block_bytes)
        while done < flat.size:
            count = min(blocks, (flat.size - done) // tensor.block_size)
            raw = buffer[: count * tensor.block_bytes]
            got = 0
            while got < len(raw):
                more = file.readinto(raw[got:])
                if not more:
                    raise CheckpointError(
                        f"{tensor.path} ends within tensor {name!r}: it was cut meanwhile"
                    )
                got += more
            self.bytes_read += got
            values = _decode(tensor, raw)
            flat[done : done + values.size] = _cast(values, flat.dtype, tensor=tensor, name=name)
            done += values.size

    def sample(self) -> list[list]:
        """A few bytes from the middle of each of up to 64 tensors, for `fingerprint`."""
        names, found = sorted(self.tensors), []
        for name in names[:: max(1, len(names) // 64)]:
            tensor = self.tensors[name]
            with open(tensor.path, "rb") as file:
                file.seek(tensor.offset + tensor.nbytes // 2)
                found.append([name, file.read(min(32, tensor.nbytes // 2)).hex()])
        return found


def _aligned_empty(size: int, dtype: np.dtype) -> np.ndarray:
    """On a CPU, jax takes over an array at a multiple of 64 bytes and copies any other: peak of
    loading Gemma 3 270M as int8 1287 without, 821 MiB with this (2-core AVX-512, 2026-11).
    """
    raw = np.empty(size * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * dtype.itemsize].view(dtype)


def _decode(tensor: StoredTensor, raw: memoryview) -> np.ndarray:
    if tensor.decode is None:
        return np.frombuffer(raw, tensor.dtype)
    return tensor.decode(np.frombuffer(raw, np.uint8))


def _cast(values: np.ndarray, dtype: np.dtype, *, tensor: StoredTensor, name: str) -> np.ndarray:
    if dtype != np.float16 or tensor.dtype == np.float16:
        return values.astype(dtype, copy=False)
    with np.errstate(over="ignore"):  # looked for in the next line
        cast = values.astype(dtype)
    if np.isinf(cast).any():
        raise CheckpointError(
            f"{tensor.path}: tensor {name!r} has values outside float16's range (65504): load it "
            "with dtype bfloat16 or float32"
        )
    return cast
