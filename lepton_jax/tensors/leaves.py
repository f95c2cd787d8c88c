"""Leaf types: what a parameter is before it has values (`ParamSpec`) and when it is quantized
(`QTensor`).

Every matmul weight is stored `[*out, *in]`: outputs first, contracted inputs last. One layout
serves all platforms (a CPU reads it row by row, a TPU lays it out as it likes) and makes
per-output-channel scales a plain prefix shape. The arithmetic is in `matmul.py`; how arrays become
QTensors is in `lepton_jax/compression`.
"""

import dataclasses
import math
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter without values: enough to plan memory, shard, load and compile.

    Attributes:
      shape: sizes, outputs first.
      dtype: storage dtype.
      axes: a logical name per dimension, such as "vocab" or "embed".
      inputs: how many trailing dimensions a matmul contracts; 0 for norm scales and biases.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str, ...]
    inputs: int = 0

    def __post_init__(self):
        if len(self.axes) != len(self.shape):
            raise ValueError(f"ParamSpec axes {self.axes} must name each dimension of {self.shape}")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * jax.numpy.dtype(self.dtype).itemsize

    def abstract(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class QTensor:
    """An int8 weight with one scale per output channel: `weight = values * scale[..., None]`.

    Attributes:
      values: int8 `[*out, *in]` in -127..127.
      scale: float32 `[*out]`.
      act_bits: precision of the activations it is multiplied with. 16: as good as float
      (weight-only
        quantization). 8: quantized per row while the program runs (W8A8).

    The two members may also be ParamSpecs or ShapeDtypeStructs: an abstract QTensor.
    """

    values: Any
    scale: Any
    act_bits: int = 16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def abstract(self) -> "QTensor":
        """The same leaf of ShapeDtypeStructs, from a leaf of ParamSpecs."""
        return QTensor(self.values.abstract(), self.scale.abstract(), self.act_bits)


jax.tree_util.register_dataclass(QTensor, data_fields=["values", "scale"], meta_fields=["act_bits"])
