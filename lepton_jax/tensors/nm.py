"""`NMTensor`: N kept of every M consecutive inputs, as values and their places in the group.

Saves memory, not time: the weight is decompressed while the program runs, place by place of a
group, because these pieces need no interleaving; the activations are permuted instead. Figures:
README. What else is sparse: `sparse.py`.
"""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp

from lepton_jax.tensors.decompress import in_order
from lepton_jax.tensors.leaves import ParamSpec, register_leaf
from lepton_jax.tensors.sparse import (
    SparseTensor,
    planned_values,
    scaled,
    values_dot,
)


@register_leaf("values", "indices", "scale")
@dataclasses.dataclass(frozen=True)
class NMTensor(SparseTensor):
    """A weight `[*out, I]` of X = I/M groups of M inputs, N of each kept.

    Attributes:
      values: `[*out, N*X]`: the first kept value of each group, then the second of each, and so on.
      indices: uint8 `[*out, N*X/4]`, or `N*X/2` where M is more than 4: each value's place in its
        group, in 2 or 4 bits. Byte j holds those of the values j, j + bytes, j + 2 bytes, ..., the
        first in the lowest bits.
      n: kept inputs of a group.
      m: inputs of a group.
      scale: float32 `[*out]` of int8 values, or None.
    """

    by_output = {"values": 1, "indices": 1, "scale": 0}
    values: Any
    indices: Any
    n: int
    m: int
    scale: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], self.values.shape[-1] // self.n * self.m)

    @classmethod
    def planned(cls, spec: ParamSpec, *, n: int, m: int, values: str = "float32") -> Self:
        *outs, inputs = spec.shape
        _check(inputs, n, m)
        kept = inputs // m * n
        stored, scale = planned_values(spec, values, (*outs, kept), spec.axes)
        return cls(
            values=dataclasses.replace(stored, inputs=spec.inputs),
            indices=ParamSpec((*outs, kept // _per_byte(m)), jnp.uint8, spec.axes),
            n=n,
            m=m,
            scale=scale,
        )

    @classmethod
    @functools.partial(jax.jit, static_argnums=0, static_argnames=("n", "m"))
    def of(cls, weight: jax.Array, mask: jax.Array, scale: Any = None, *, n: int, m: int) -> Self:
        """The leaf of the values where `mask` is true, both `[*out, I]`; true at most N times in a
        group, and where it is fewer times zeros fill up.
        """
        *outs, inputs = weight.shape
        _check(inputs, n, m)
        groups = mask.reshape(*outs, inputs // m, m)
        places = jnp.argsort(~groups, axis=-1, stable=True)[..., :n]  # those kept, in their order
        values = jnp.where(groups, weight.reshape(groups.shape), 0)
        values = jnp.take_along_axis(values, places, axis=-1)

        def by_rank(array):
            return jnp.swapaxes(array, -1, -2).reshape(*outs, -1)

        places = by_rank(places).astype(jnp.uint8).reshape(*outs, _per_byte(m), -1)
        shifts = _bits(m) * jnp.arange(_per_byte(m), dtype=jnp.uint8)
        indices = jnp.sum(places << shifts[:, None], axis=-2, dtype=jnp.uint8)
        return cls(by_rank(values), indices, n, m, scale)

    def like(self, weights: list[jax.Array], scales: list[Any]) -> list[Self]:
        pairs = zip(weights, scales, strict=True)
        return [self.of(w, w != 0, scale, n=self.n, m=self.m) for w, scale in pairs]

    def static(self) -> dict[str, Any]:
        return dict(n=self.n, m=self.m, values=jnp.dtype(self.values.dtype).name)

    def matmul(self, x: jax.Array) -> jax.Array:
        x, leaf = in_order(x, self)
        product = jax.lax.platform_dependent(x, leaf, cpu=_one_dot, default=_dot_per_place)
        return scaled(product, leaf.scale)

    def spread(self) -> jax.Array:
        return jnp.stack(self.by_place(), axis=-1).reshape(self.shape)

    def by_place(self) -> list[jax.Array]:
        """For each of the M places in a group the stored values `[*out, X]`, or zeros."""
        bits, per_byte = _bits(self.m), _per_byte(self.m)
        parts = [(self.indices >> (bits * part)) & (2**bits - 1) for part in range(per_byte)]
        indices = jnp.concatenate(parts, axis=-1)
        ranks = list(
            zip(
                *(jnp.split(array, self.n, axis=-1) for array in (indices, self.values)),
                strict=True,
            )
        )
        places = []
        for place in range(self.m):
            dense = jnp.zeros((), self.values.dtype)
            for index, values in ranks:
                dense = jnp.where(index == place, values, dense)
            places.append(dense)
        return places


def _one_dot(x: jax.Array, leaf: NMTensor) -> jax.Array:
    """A CPU holds the decompressed weight for the moment anyway, and one large dot is faster."""
    by_place = jnp.swapaxes(x.reshape(x.shape[0], -1, leaf.m), 1, 2).reshape(x.shape)
    return values_dot(by_place, jnp.concatenate(leaf.by_place(), axis=-1))


def _dot_per_place(x: jax.Array, leaf: NMTensor) -> jax.Array:
    """Each piece of the weight comes from elementwise operations that can be fused into its dot."""
    by_place = x.reshape(x.shape[0], -1, leaf.m)
    return sum(values_dot(by_place[..., i], piece) for i, piece in enumerate(leaf.by_place()))


def _check(inputs: int, n: int, m: int) -> None:
    if not 0 < n < m <= 16:
        raise ValueError(f"{n}:{m}: want 0 < N < M <= 16")
    if inputs % m or inputs // m * n % _per_byte(m):
        raise ValueError(
            f"{n}:{m} does not fit {inputs} inputs: want a multiple of {m} whose kept values fill "
            f"whole bytes of {_per_byte(m)} indices"
        )


def _bits(m: int) -> int:
    return 2 if m <= 4 else 4


def _per_byte(m: int) -> int:
    return 8 // _bits(m)
