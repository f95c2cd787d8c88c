"""GGUF files: metadata, and tensors decoded from every block type that the `gguf` package knows.

The walk over the metadata is `lepton_jax.text.gguf_metadata`'s; this adds the tensor table behind
it. The package's own reader trusts counts and lengths, so it isn't used: every size is checked
against the file first, and only the block decoders come from the package. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Arrays are read by `source.TensorFiles`.
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lepton_jax.checkpoints.errors import CheckpointError
from lepton_jax.checkpoints.source import FLOAT_DTYPES, StoredTensor, TensorFiles
from lepton_jax.text.gguf_metadata import GgufError, _Header

_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_DIMS = 4


def open_gguf(path: Path) -> tuple[dict[str, Any], TensorFiles]:
    """The metadata of a GGUF file and its tensors. Raises CheckpointError."""
    try:
        if path.stat().st_size < 24:
            raise CheckpointError(f"{path}: too short for a GGUF header; fetch the file again")
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            header = _TensorHeader(data, str(path))
            metadata = header.metadata()
            _refuse_parts(path, metadata)
            return metadata, TensorFiles(path, header.tensors(path, metadata))
    except GgufError as error:  # its message begins with the path
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error


def metadata_only(path: Path, target: Path) -> None:
    """Writes the metadata of one GGUF as a GGUF without tensors: a tokenizer in one small file."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _TensorHeader(data, str(path))
        header.metadata()
        target.write_bytes(data[:8] + struct.pack("<Q", 0) + data[16 : header.position])


def _refuse_parts(path: Path, metadata: dict[str, Any]) -> None:
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"{path} is one of {parts} parts of a split GGUF: join them with llama.cpp's "
            "`llama-gguf-split --merge` and give the result"
        )


class _TensorHeader(_Header):
    """The cursor over a header, continued over the tensor table."""

    def tensors(self, path: Path, metadata: dict[str, Any]) -> dict[str, StoredTensor]:
        """The table behind the metadata; call once, after `metadata()`."""
        (count,) = struct.unpack_from("<Q", self.data, 8)
        if count * 32 > self.size:
            self.fail(f"{count} tensors, more than the file holds: it is cut or damaged")
        rows: dict[str, dict[str, Any]] = {}
        for _ in range(count):
            name = self.string("a tensor's name")
            if name in rows:
                self.fail(f"tensor {name!r} appears twice")
            dims = self.u32(f"the dimensions of {name!r}")
            if not 1 <= dims <= _MAX_DIMS:
                self.fail(f"tensor {name!r} has {dims} dimensions; 1 to {_MAX_DIMS} are allowed")
            shape = tuple(reversed([self._u64(name) for _ in range(dims)]))
            type_id, offset = self.u32(f"the type of {name!r}"), self._u64(name)
            rows[name] = {"shape": shape, "type_id": type_id, "offset": offset}
        if not rows:
            self.fail("holds no tensors: give the model's own GGUF, not a vocabulary")
        start = self._data_start(metadata)
        tensors = {}
        for name, row in rows.items():
            row["offset"] += start
            tensors[name] = self._tensor(path, name, **row)
        self._check_overlap(tensors)
        return tensors

    def _u64(self, name: str) -> int:
        return struct.unpack_from("<Q", self.data, self.advance(8, f"the entry of {name!r}"))[0]

    def _data_start(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            self.fail(f"general.alignment is {alignment!r}; a whole number up to 2^20 is needed")
        return -(-self.position // alignment) * alignment

    def _tensor(
        self, path: Path, name: str, *, shape: tuple, type_id: int, offset: int
    ) -> StoredTensor:
        block_size, block_bytes, kind = self._block(name, type_id)
        if min(shape) < 1 or shape[-1] % block_size:
            self.fail(
                f"tensor {name!r} of shape {shape} can't be {kind}: sizes must be positive and the "
                f"last a multiple of {block_size}"
            )
        nbytes = math.prod(shape) // block_size * block_bytes
        if offset + nbytes > self.size:
            self.fail(
                f"tensor {name!r} would end at byte {offset + nbytes} of {self.size}: the file is "
                "cut or damaged; fetch it again"
            )
        plain = FLOAT_DTYPES.get(_PLAIN.get(kind, ""))
        decode = None if plain is not None else _decoder(type_id)
        return StoredTensor(
            path=path,
            offset=offset,
            nbytes=nbytes,
            shape=shape,
            kind=kind,
            dtype=FLOAT_DTYPES["float32"] if decode else plain,
            block_bytes=block_bytes,
            block_size=block_size,
            decode=decode,
        )

    def _block(self, name: str, type_id: int) -> tuple[int, int, str]:
        try:
            kind = gguf.GGMLQuantizationType(type_id)
        except ValueError:
            self.fail(
                f"tensor {name!r} has type {type_id}, which gguf {_gguf_version()} doesn't know: "
                "the file is damaged or needs a newer gguf package"
            )
        return *gguf.GGML_QUANT_SIZES[kind], kind.name

    def _check_overlap(self, tensors: dict[str, StoredTensor]) -> None:
        end, last = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                self.fail(f"tensors {last!r} and {name!r} overlap: the file is damaged")
            end, last = tensor.offset + tensor.nbytes, name


@functools.cache
def _decoder(type_id: int):
    """`uint8[n * block_bytes] -> float32[n * block_size]`, or None for types without a decoder."""
    kind = gguf.GGMLQuantizationType(type_id)
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]

    def decode(raw: np.ndarray) -> np.ndarray:
        # One long row: the package walks over rows 16 at a time, in Python.
        return gguf.dequantize(raw.reshape(1, -1), kind).reshape(-1)

    try:
        decode(np.zeros(block_bytes, np.uint8))
    except NotImplementedError:
        return None
    return decode


def _gguf_version() -> str:
    from importlib.metadata import version

    return version("gguf")
