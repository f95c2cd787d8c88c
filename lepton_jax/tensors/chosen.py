"""One of several weights, chosen while a program runs: what a loop over layers multiplies with.

A loop over stacked layers would copy each weight out of the stack before its product, three times
the traffic of a decode step. Here the weights stay where they are: `Chosen` stands for one of
several arrays, and a product with it (`dots.dot`) branches to the product with that one. What
surrounds the product, rounding of activations and scales, is in the loop once. Leaves whose product
is more than one dot become `ChosenLeaf`, which branches around all of it. Who builds them:
`lepton_jax/models/runs.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from lepton_jax.tensors.cut import Cut
from lepton_jax.tensors.dots import MANY_ROWS, Chosen, branch
from lepton_jax.tensors.leaves import CompressedTensor, ParamSpec
from lepton_jax.tensors.matmul import matmul
from lepton_jax.tensors.qtensor import QTensor
from lepton_jax.tensors.ragged_dots import ragged_dot


def chooser(spec: ParamSpec, leaves: Sequence[Any]) -> Callable[[jax.Array], Any]:
    """A function from an index i32 `[]` to the leaf there, for leaves of one shape.

    Call it where the leaves come from, outside of the loop: what is small is stacked once.
    """
    first = leaves[0]
    grouped = "experts" in spec.axes  # products of consecutive groups of rows
    if isinstance(first, QTensor) and not grouped and _is_one_dot(leaves):
        values = [leaf.values for leaf in leaves]
        scale = _stacked([leaf.scale for leaf in leaves])
        act_scale = (
            first.act_scale
            if first.act_scale is None
            else _stacked([leaf.act_scale for leaf in leaves])
        )
        return lambda index: dataclasses.replace(
            first,
            values=Chosen(tuple(values), index),
            scale=scale(index),
            act_scale=act_scale and act_scale(index),
        )
    if any(isinstance(leaf, CompressedTensor) for leaf in leaves) or grouped:
        return lambda index: ChosenLeaf(tuple(leaves), index)
    if spec.inputs:
        return lambda index: Chosen(tuple(leaves), index)
    return _stacked(leaves)


@dataclasses.dataclass(frozen=True)
class ChosenLeaf(CompressedTensor):
    """One of several weights `[*out, I]` of any kinds. It is no stored type: no checkpoint holds
    it.
    """

    leaves: tuple
    index: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaves[0].shape

    @classmethod
    def planned(cls, spec: ParamSpec, **static: Any) -> Self:
        raise ValueError(f"{spec.shape}: a chosen weight is not stored, so it has no plan")

    def pieces(self, cut: Cut) -> list[Self]:
        raise ValueError(f"{self.shape}: a chosen weight is not stored, so it has no pieces")

    def flat(self, keep: int = 0) -> Self:
        def one(w):
            if isinstance(w, CompressedTensor):
                return w.flat(keep)
            return w.reshape(*w.shape[:keep], -1, w.shape[-1])

        return dataclasses.replace(self, leaves=tuple(map(one, self.leaves)))

    def matmul(self, x: jax.Array) -> jax.Array:
        if x.shape[0] >= MANY_ROWS and self._are_alike:  # a copy is small beside the product
            return matmul(x, self._copy())
        return branch(self.index, matmul, x, self.leaves)

    def ragged_matmul(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return branch(self.index, lambda x, w: ragged_dot(x, w, group_sizes), x, self.leaves)

    def dense(self, dtype: Any) -> jax.Array:
        return branch(self.index, lambda _, w: _dense(w, dtype), (), self.leaves)

    def taken(self, ids: jax.Array) -> Self:
        raise TypeError("a chosen weight is multiplied, not looked up")

    @property
    def _are_alike(self) -> bool:
        kinds = {jax.tree.structure(leaf) for leaf in self.leaves}
        shapes = {tuple((a.shape, a.dtype) for a in jax.tree.leaves(w)) for w in self.leaves}
        return len(kinds) == len(shapes) == 1

    def _copy(self) -> Any:
        return branch(self.index, lambda _, w: w, (), self.leaves)


def _is_one_dot(leaves: Sequence[Any]) -> bool:
    """Whether the products are of int8 values that are stored alike."""
    kinds = {(jax.tree.structure(leaf), getattr(leaf, "act_bits", 0)) for leaf in leaves}
    first = leaves[0]
    return len(kinds) == 1 and not first.grouped and first.values.dtype == jnp.int8


def _dense(w: Any, dtype: Any) -> jax.Array:
    return w.dense(dtype) if isinstance(w, CompressedTensor) else w.astype(dtype)


def _stacked(arrays: Sequence[jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """For what is small. The barrier keeps the slice out of the loops that use it, which a CPU
    wouldn't vectorize with it: silu of a scaled product took 0.21 ms a layer instead of 0.03.
    """
    stack = jnp.stack(arrays)

    def at(index: jax.Array) -> jax.Array:
        chosen = jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
        return jax.lax.optimization_barrier(chosen)

    return at
