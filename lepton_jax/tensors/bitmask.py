"""`BitmaskTensor`: any places kept; one bit a weight, and the kept values one after another.

Saves memory, not time: the weight is decompressed while the program runs. Figures: README. What
else is sparse: `sparse.py`.
"""

import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp

from lepton_jax.tensors.cut import Cut
from lepton_jax.tensors.decompress import by_outputs, in_order
from lepton_jax.tensors.leaves import ParamSpec, register_leaf
from lepton_jax.tensors.sparse import (
    SparseTensor,
    planned_values,
    scaled,
    values_dot,
)


@register_leaf("mask", "values", "starts", "scale")
@dataclasses.dataclass(frozen=True)
class BitmaskTensor(SparseTensor):
    """A weight `[*out, I]` of which a number of values is kept.

    Attributes:
      mask: uint8 `[*out, I/8]`; bit i of byte j says whether input i * I/8 + j is kept, so that the
        inputs of one bit are neighbours.
      values: `[kept]`, output by output, in the order of its bytes, then of their bits.
      starts: int32 `[*out]`, where an output's values begin.
      scale: float32 `[*out]` of int8 values, or None.
    """

    by_output = {"mask": 1, "starts": 0, "scale": 0}
    mask: Any
    values: Any
    starts: Any
    scale: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.mask.shape[:-1], 8 * self.mask.shape[-1])

    @classmethod
    def planned(cls, spec: ParamSpec, *, kept: int, values: str = "float32") -> Self:
        *outs, inputs = spec.shape
        if inputs % 8:
            raise ValueError(f"a bitmask needs inputs in multiples of 8, not {inputs}")
        if not 0 < kept <= spec.size < 2**31:
            raise ValueError(f"kept={kept}: want 1 to {spec.size} values, below 2**31")
        stored, scale = planned_values(spec, values, (kept,), ("kept",))
        return cls(
            mask=ParamSpec((*outs, inputs // 8), jnp.uint8, spec.axes, spec.inputs),
            values=stored,
            starts=ParamSpec(tuple(outs), jnp.int32, spec.axes[:-1]),
            scale=scale,
        )

    @classmethod
    @functools.partial(jax.jit, static_argnums=0, static_argnames="kept")
    def of(cls, weight: jax.Array, mask: jax.Array, scale: Any = None, *, kept: int) -> Self:
        """The leaf of the values where `mask` is true, at `kept` places; both are `[*out, I]`."""
        *outs, inputs = weight.shape
        if inputs % 8:
            raise ValueError(f"a bitmask needs inputs in multiples of 8, not {inputs}")
        flat = _by_byte(mask)
        counts = jnp.sum(flat, axis=-1, dtype=jnp.int32)
        starts = jnp.cumsum(counts) - counts
        places = starts[:, None] + jnp.cumsum(flat, axis=-1, dtype=jnp.int32) - 1
        places = jnp.where(flat, places, kept)
        values = jnp.zeros((kept,), weight.dtype)
        values = values.at[places].set(_by_byte(weight), mode="drop")
        bits = flat.reshape(-1, inputs // 8, 8).astype(jnp.uint8) << jnp.arange(8, dtype=jnp.uint8)
        packed = jnp.sum(bits, axis=-1, dtype=jnp.uint8)
        return cls(packed.reshape(*outs, -1), values, starts.reshape(outs), scale)

    def like(self, weights: list[jax.Array], scales: list[Any]) -> list[Self]:
        kept = max(1, *(int(jnp.count_nonzero(w)) for w in weights))
        return [self.of(w, w != 0, s, kept=kept) for w, s in zip(weights, scales, strict=True)]

    def planned_piece(self, part: ParamSpec, cut: Cut) -> Self:
        """As if what is kept were spread evenly."""
        kept = -(-math.prod(self.values.shape) * part.size // math.prod(self.shape))
        return self.planned(part, **self.static() | dict(kept=kept))

    def static(self) -> dict[str, Any]:
        return dict(kept=math.prod(self.values.shape), values=jnp.dtype(self.values.dtype).name)

    def spread(self) -> jax.Array:
        counts = _ones(self.mask).astype(jnp.int32)
        before = self.starts[..., None] + jnp.cumsum(counts, axis=-1) - counts  # [*out, I/8]
        mask, bit = self.mask[..., None, :], jnp.arange(8, dtype=jnp.uint8)[:, None]
        lower = _ones(mask & ((jnp.uint8(1) << bit) - jnp.uint8(1)))
        places = before[..., None, :] + lower.astype(jnp.int32)  # [*out, 8, I/8]
        kept = self.values.at[places].get(mode="clip")
        return jnp.where((mask >> bit) & 1 == 1, kept, 0).reshape(self.shape)

    def matmul(self, x: jax.Array) -> jax.Array:
        x, leaf = in_order(x, self)
        return scaled(
            jax.lax.platform_dependent(x, leaf, tpu=_dot_by_outputs, default=_whole_dot),
            leaf.scale,
        )


def _whole_dot(x: jax.Array, leaf: BitmaskTensor) -> jax.Array:
    return values_dot(x, leaf.spread())


def _dot_by_outputs(x: jax.Array, leaf: BitmaskTensor) -> jax.Array:
    def product(x, rows):
        return _whole_dot(x, dataclasses.replace(leaf, mask=rows[0], starts=rows[1]))

    return by_outputs(x, (leaf.mask, leaf.starts), product=product)


def _ones(byte: jax.Array) -> jax.Array:
    """How many bits of a uint8 are 1; jax's own population count has no gradient before 0.12."""
    pairs = byte - ((byte >> 1) & 0x55)
    quads = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (quads + (quads >> 4)) & 0x0F


def _by_byte(array: jax.Array) -> jax.Array:
    """`[*out, I]` as `[O, I]` in the order in which values are stored."""
    inputs = array.shape[-1]
    return jnp.swapaxes(array.reshape(-1, 8, inputs // 8), 1, 2).reshape(-1, inputs)
