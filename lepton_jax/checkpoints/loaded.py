"""What loading gives: a model, its leaves on the device, and where its tokenizer is.

Also the small rules that every way of loading shares: which dtype "auto" means and how a checkpoint
gets its fingerprint. Loading itself is `load.py`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lepton_jax.checkpoints.errors import CheckpointError
from lepton_jax.checkpoints.source import FLOAT_DTYPES, TensorFiles
from lepton_jax.models.build import Model, abstract_model
from lepton_jax.models.config import ModelConfig


@dataclass(frozen=True)
class Loaded:
    """A model ready to run.

    Attributes:
      config: its sizes and quirks.
      model: specs of its parameters, and `bind`.
      leaves: one per spec, in their order: jax arrays, or leaf types such as QTensor.
      tokenizer_source: what `lepton_jax.text.tokenizer.load` takes.
      fingerprint: 16 hex digits that change with the config, the tensor table or sampled values.
      bytes: that the leaves take on the device.
    """

    config: ModelConfig
    model: Model
    leaves: tuple[Any, ...]
    tokenizer_source: Path
    fingerprint: str
    bytes: int


def leaf_bytes(leaf: Any) -> int:
    """Bytes of all arrays of a leaf."""
    return sum(array.nbytes for array in jax.tree.leaves(leaf))


def weight_dtype(asked: Any, own: np.dtype, *, platform: str | None = None) -> np.dtype:
    """The dtype to keep weights in.

    Args:
      asked: "auto", a name in FLOAT_DTYPES, or such a dtype.
      own: what the checkpoint holds (bfloat16 for quantized blocks).
      platform: of the devices that they are for; None: this machine's.

    "auto" is float32 on a CPU, where a single row in bfloat16 is 20 times slower (2-core AVX-512,
    2026-11), else `kept_dtype`. Raises CheckpointError where float16 is asked for on a TPU.
    """
    platform = platform or jax.default_backend()
    if isinstance(asked, str) and asked == "auto":
        return FLOAT_DTYPES["float32"] if platform == "cpu" else kept_dtype(own, platform)
    dtype = float_dtype(asked, "dtype", allowed=("auto", *FLOAT_DTYPES))
    if kept_dtype(dtype, platform) != dtype:
        raise CheckpointError(
            f"model.dtype={dtype.name}: a TPU has none; allowed are auto, float32, bfloat16"
        )
    return dtype


def kept_dtype(own: np.dtype, platform: str | None = None) -> np.dtype:
    """A checkpoint's own dtype, or bfloat16 on a TPU for float16, which that doesn't have."""
    halved = (platform or jax.default_backend()) == "tpu" and own == np.float16
    return FLOAT_DTYPES["bfloat16"] if halved else own


def dtypes_here(dtype: Any, platform: str | None = None) -> dict[str, Any]:
    """The arguments of `load` for a model that a device of `platform`, by default this machine's,
    shall run.

    On a CPU bfloat16 is for weights: arithmetic between the products is faster in float32.
    """
    activations = "float32" if (platform or jax.default_backend()) == "cpu" else None
    return dict(dtype=dtype, activation_dtype=activations)


def float_dtype(
    asked: Any, field: str, *, allowed: tuple[str, ...] = tuple(FLOAT_DTYPES)
) -> np.dtype:
    """A float dtype from its name or itself; CheckpointError naming `field` on anything else."""
    name = asked if isinstance(asked, str) else np.dtype(asked).name
    if name not in FLOAT_DTYPES:
        raise CheckpointError(f"{field}={name!r} is unknown: allowed are {', '.join(allowed)}")
    return FLOAT_DTYPES[name]


def build_model(
    place: Path, config: ModelConfig, *, dtype: np.dtype, activation_dtype: Any
) -> Model:
    """`abstract_model`, with CheckpointError for configs that only a damaged file can hold.

    Args:
      place: the checkpoint, for errors.
      config: what it says.
      dtype: of the weights.
      activation_dtype: a name in FLOAT_DTYPES or such a dtype; None = that of the weights.
    """
    activations = float_dtype(activation_dtype or dtype, "activation_dtype")
    try:
        return abstract_model(config, dtype, activations)
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise CheckpointError(
            f"{place}: no model can be built from its config: {str(error)[:300]}"
        ) from error


def fingerprint(config: ModelConfig, files: TensorFiles) -> str:
    """16 hex digits of the config, the tensor table, the file sizes and a few sampled bytes.

    Two checkpoints of one architecture differ by the samples; the whole content isn't read.
    """
    table = [[name, list(t.shape), t.kind] for name, t in sorted(files.tensors.items())]
    paths = sorted({tensor.path for tensor in files.tensors.values()})
    try:
        sizes, sample = [path.stat().st_size for path in paths], files.sample()
    except OSError as error:
        raise CheckpointError(f"{files.path}: can't be read: {error}") from error
    return digest([config.as_dict(), table, sizes, sample])


def digest(value: Any) -> str:
    """16 hex digits of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
