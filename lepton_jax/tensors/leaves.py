"""Leaf types: what a parameter is before it has values (`ParamSpec`) and what all compressed
weights have in common (`CompressedTensor`).

Every matmul weight is stored `[*out, in]`: outputs first, the contracted input last. One layout
serves all platforms (a CPU reads it row by row, a TPU lays it out as it likes) and makes
per-output-channel scales a plain prefix shape. Quantized weights are `qtensor.py`; how arrays
become compressed is `lepton_jax/compression`.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lepton_jax.tensors.cut import Cut
from lepton_jax.tensors.ragged_dots import ragged_dot
from lepton_jax.tensors.ragged_dots_tpu import Streamed


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A parameter without values: enough to plan memory, shard, load and compile.

    Attributes:
      shape: sizes, outputs first.
      dtype: storage dtype.
      axes: a logical name per dimension, such as "vocab" or "embed".
      inputs: how many trailing dimensions a matmul contracts: 1, or 0 for norm scales and biases.
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
        return self.size * jnp.dtype(self.dtype).itemsize

    def astype(self, dtype: Any) -> Self:
        return dataclasses.replace(self, dtype=dtype)

    def abstract(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


class CompressedTensor(abc.ABC):
    """A weight `[*out, in]` in a storage type of its own, multiplied as it is stored.

    A subclass is a frozen dataclass whose array fields are pytree children and whose other fields
    are static and fit JSON; `register_leaf` makes both known. The arrays may also be ParamSpecs or
    ShapeDtypeStructs: an abstract leaf. `lepton_jax/checkpoints` stores any registered type.
    """

    array_fields: ClassVar[tuple[str, ...]] = ()

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """`[*out, in]` of the weight that it stands for."""

    @classmethod
    @abc.abstractmethod
    def planned(cls, spec: ParamSpec, **static: Any) -> Self:
        """The leaf of ParamSpecs for a weight of this spec and these static fields.

        Raises ValueError, naming the field, where they don't go together.
        """

    @abc.abstractmethod
    def pieces(self, cut: Cut) -> list[Self]:
        """Leaves of equal shapes for the parts of this weight, with values.

        Raises ValueError, saying why, where this storage can't hold such a part.
        """

    def cuts(self, cut: Cut) -> dict[str, Cut] | None:
        """How each of its arrays is cut into those of the parts of this weight; None where parts
        have arrays of their own making.
        """
        return None

    def planned_piece(self, part: ParamSpec, cut: Cut) -> Self:
        """What `pieces` gives of a planned leaf: a leaf of ParamSpecs for a weight `part`."""
        return self.planned(part, **self.static())

    @abc.abstractmethod
    def flat(self, keep: int = 0) -> Self:
        """The same weight as `[O, I]`, all outputs but the first `keep` in one dimension."""

    @abc.abstractmethod
    def matmul(self, x: jax.Array) -> jax.Array:
        """`x [M, I]` times the transpose of this `[O, I]`: float32 `[M, O]`."""

    @abc.abstractmethod
    def dense(self, dtype: Any) -> jax.Array:
        """The weight that it stands for, `[*out, in]`."""

    @abc.abstractmethod
    def taken(self, ids: jax.Array) -> Self:
        """The leaf of entries `ids [...]`, clipped, along the first dimension: rows of a `[O, I]`,
        or of `[E, O, I]` one expert's `[O, I]`.
        """

    def astype(self, dtype: Any) -> Self:
        """The same weight where it keeps float values: these in another dtype."""
        return self

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows `ids [...]` of a `[O, I]`: float32 `[..., I]`. Ids beyond the ends are clipped."""
        return self.taken(ids).dense(jnp.float32)

    def ragged_matmul(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Consecutive groups of `x [M, I]` times their own weights of `[E, O, I]`: `[M, O]`."""
        return ragged_dot(x, self, group_sizes)

    @property
    def streams(self) -> bool:
        """Whether a kernel of a TPU reads experts as they are stored, as `streamed` tells it."""
        return False

    def streamed(self, x: jax.Array) -> Streamed:
        """`ragged_matmul` of `x [M, I]` and this `[E, O, I]`, in the terms of that kernel."""
        raise NotImplementedError(f"{type(self).__name__}.streams is {self.streams}")

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in jax.tree.leaves(self))

    def abstract(self) -> Self:
        """The same leaf of ShapeDtypeStructs, from a leaf of ParamSpecs."""
        return jax.tree.map(lambda spec: spec.abstract(), self)

    def arrays(self) -> dict[str, Any]:
        """Its arrays by field name."""
        named = {name: getattr(self, name) for name in self.array_fields}
        return {name: array for name, array in named.items() if array is not None}

    def static(self) -> dict[str, Any]:
        """Its other fields by name."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name not in self.array_fields}


def flat_of(w: Any, keep: int = 0) -> Any:
    """Any weight `[*out, in]`, compressed or not, as `CompressedTensor.flat` gives it."""
    if isinstance(w, CompressedTensor):
        return w.flat(keep)
    return flattened(w, keep, 1)


def flattened(array: Any, keep: int, inner: int) -> Any:
    """An array with all but its first `keep` and last `inner` dimensions in one; None stays."""
    if array is None:
        return None
    last = array.shape[len(array.shape) - inner :]
    return array.reshape(*array.shape[:keep], -1, *last)


def dense_of(w: Any, dtype: Any) -> jax.Array:
    """Any weight `[*out, in]`, compressed or not, as an array."""
    return w.dense(dtype) if isinstance(w, CompressedTensor) else w.astype(dtype)


LEAF_TYPES: dict[str, type[CompressedTensor]] = {}


def register_leaf(*array_fields: str):
    """Class decorator: a pytree whose children are `array_fields`, known in LEAF_TYPES."""

    def register(cls: type) -> type:
        static = [f.name for f in dataclasses.fields(cls) if f.name not in array_fields]
        jax.tree_util.register_dataclass(cls, data_fields=array_fields, meta_fields=static)
        cls.array_fields = array_fields
        LEAF_TYPES[cls.__name__] = cls
        return cls

    return register
