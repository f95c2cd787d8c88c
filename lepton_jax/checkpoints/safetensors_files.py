"""Hugging Face safetensors: one file, or shards and their index.json.

The header is parsed and checked here, so that every cut or mutated file is refused with its name
and fault before any array is read. Format: https://huggingface.co/docs/safetensors (8 bytes header
length, JSON header, data without holes). Arrays are read by `source.TensorFiles`.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from lepton_jax.checkpoints.errors import CheckpointError
from lepton_jax.checkpoints.json_files import json_object, read_json
from lepton_jax.checkpoints.source import FLOAT_DTYPES, StoredTensor, TensorFiles

INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the format's own limit
# Bytes of one value; only the float types that we compute in can be read, the others may be there.
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
_READABLE = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def open_safetensors(folder: Path) -> TensorFiles:
    """The weights in a Hugging Face directory.

    Takes the shards that `model.safetensors.index.json` lists, else `model.safetensors`, else the
    only `.safetensors` file. Raises CheckpointError.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        return TensorFiles(folder, _sharded(index))
    files = sorted(folder.glob("*.safetensors"))
    preferred = [file for file in files if file.name == "model.safetensors"] or files
    if len(preferred) != 1:
        found = ", ".join(file.name for file in files) or "no .safetensors file"
        raise CheckpointError(
            f"{folder} needs {INDEX_NAME}, model.safetensors or a single .safetensors file; it has "
            f"{found}. PyTorch pickles (.bin, .pt) are not read: save the model as safetensors"
        )
    return TensorFiles(folder, read_header(preferred[0]))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The arrays of one file, every offset checked. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path}: its header would take {length} of the file's {size} bytes: it is cut "
                    "or no safetensors file; fetch it again"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
    header = json_object(text, path, what="the header")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {n: _tensor(path, n, entry=entry, start=start) for n, entry in header.items()}
    _check_layout(path, tensors, start=start, size=size)
    return tensors


def _tensor(path: Path, name: str, *, entry: Any, start: int) -> StoredTensor:
    """One header entry as a StoredTensor."""

    def fail(fault: str):
        raise CheckpointError(f"{path}: tensor {name!r}: {fault}; the file is damaged")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        fail(f"its entry must have dtype, shape and data_offsets, found {entry!r:.120}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _ITEM_BYTES:
        fail(f"dtype {kind!r:.40} is unknown, known are {', '.join(_ITEM_BYTES)}")
    for what, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or any(
            type(n) is not int or not 0 <= n < 1 << 63 for n in value
        ):
            fail(f"{what} must be a list of whole numbers from 0, found {value!r:.80}")
    if len(shape) > 8:
        fail(f"it has {len(shape)} dimensions, at most 8 are allowed")
    nbytes = math.prod(shape) * _ITEM_BYTES[kind]
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        fail(f"data_offsets {offsets!r:.80} don't span the {nbytes} bytes of {kind} {shape}")
    return StoredTensor(
        path=path,
        offset=start + offsets[0],
        nbytes=nbytes,
        shape=tuple(shape),
        kind=kind,
        dtype=FLOAT_DTYPES[_READABLE[kind]] if kind in _READABLE else None,
        block_bytes=_ITEM_BYTES[kind],
    )


def _check_layout(path: Path, tensors: dict[str, StoredTensor], *, start: int, size: int) -> None:
    """The format allows no holes, overlaps or trailing bytes; this finds cut files early."""
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; fetch it again")
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: tensor {name!r} begins at byte {tensor.offset}, not where the one before "
                f"it ends ({end}); the file is damaged"
            )
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(
            f"{path}: its tensors need {end} bytes and the file has {size}: it is cut or damaged; "
            "fetch it again"
        )


def _sharded(index: Path) -> dict[str, StoredTensor]:
    """The arrays of all shards, each in exactly the shard that the index says."""
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{index}: needs weight_map, an object of tensor name to file name")
    files = sorted({str(file) for file in weights.values()})
    for file in files:
        if Path(file).name != file or not (index.parent / file).is_file():
            raise CheckpointError(
                f"{index}: names {file!r:.120}, which isn't beside it: fetch the missing shard "
                f"(the index lists {len(files)})"
            )
    tensors: dict[str, StoredTensor] = {}
    wrong = []
    for file in files:
        for name, tensor in read_header(index.parent / file).items():
            if name in tensors:
                wrong.append(f"{name!r} is in {tensors[name].path.name} and in {file}")
            elif weights.get(name) != file:
                wrong.append(f"{name!r} is in {file}, the index says {weights.get(name)!r}")
            tensors[name] = tensor
    wrong += [f"{name!r} is in no shard" for name in sorted(set(weights) - set(tensors))]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(f"{index}: doesn't fit its shards: {'; '.join(wrong[:8])}{more}")
    return tensors
