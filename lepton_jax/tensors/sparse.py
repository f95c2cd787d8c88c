"""What the sparse leaf types share: values of some dtype, and a scale where they are integers.

Types: `bitmask.py` (any places), `nm.py` (N of every M inputs), `block_sparse.py` (whole tiles,
whose product skips what is empty). Which weights are kept is `lepton_jax/compression/prune.py`.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lepton_jax.tensors import dots
from lepton_jax.tensors.cut import Cut
from lepton_jax.tensors.leaves import CompressedTensor, ParamSpec, flattened

VALUES = ("float32", "bfloat16", "float16", "int8")


class SparseTensor(CompressedTensor):
    """A weight `[*out, I]` most of which is zero.

    Attributes:
      values: what is kept, of a dtype in VALUES.
      scale: float32 `[*out]` by which int8 values are multiplied; None with float values.
      by_output: the fields that begin with `[*out]`, and how many dimensions follow in each.
    """

    by_output: ClassVar[Mapping[str, int]]
    values: Any
    scale: Any

    @abc.abstractmethod
    def spread(self) -> jax.Array:
        """The stored values in their places `[*out, I]`, zeros elsewhere, without the scale."""

    @abc.abstractmethod
    def like(self, weights: list[jax.Array], scales: list[Any]) -> list[Self]:
        """Leaves of this pattern and of equal shapes for the nonzero values of weights `[*out,
        I]`, in the values' dtype and without their scales.
        """

    def pieces(self, cut: Cut) -> list[Self]:
        """Packed anew: what is kept isn't spread evenly, and a part has its own places."""
        scales = [None] * cut.parts if self.scale is None else cut.split(self.scale)
        return self.like(cut.split(_spread(self)), scales)

    def astype(self, dtype: Any) -> Self:
        if self.scale is not None:
            return self
        return dataclasses.replace(self, values=self.values.astype(dtype))

    def flat(self, keep: int = 0) -> Self:
        fields = self.by_output.items()
        flat = {name: flattened(getattr(self, name), keep, inner) for name, inner in fields}
        return dataclasses.replace(self, **flat)

    def taken(self, ids: jax.Array) -> Self:
        taken = {name: take_rows(getattr(self, name), ids) for name in self.by_output}
        return dataclasses.replace(self, **taken)

    def dense(self, dtype: Any) -> jax.Array:
        wide = self.spread().astype(jnp.float32)
        scale = None if self.scale is None else self.scale[..., None]
        return scaled(wide, scale).astype(dtype)


@jax.jit
def _spread(leaf: SparseTensor) -> jax.Array:
    return leaf.spread()


def values_dot(x: jax.Array, values: jax.Array) -> jax.Array:
    """`x [M, I]` times the transpose of float or int8 values `[O, I]`: float32 `[M, O]`."""
    return (dots.precise_int8_dot if values.dtype == jnp.int8 else dots.float_dot)(x, values)


def scaled(y: jax.Array, scale: jax.Array | None) -> jax.Array:
    return y if scale is None else y * scale


def planned_values(
    spec: ParamSpec, values: str, shape: tuple[int, ...], axes: tuple[str, ...]
) -> tuple[ParamSpec, ParamSpec | None]:
    """Specs of the values, in this shape and with these axes, and of the scale."""
    if values not in VALUES:
        raise ValueError(f"values={values!r}: allowed are {', '.join(VALUES)}")
    scale = ParamSpec(spec.shape[:-1], jnp.float32, spec.axes[:-1]) if values == "int8" else None
    return ParamSpec(shape, jnp.dtype(values), axes), scale


def take_rows(array: Any, ids: jax.Array) -> Any:
    """Rows `ids [...]` along the first dimension, clipped; None stays."""
    return None if array is None else jnp.take(array, ids, axis=0, mode="clip")
