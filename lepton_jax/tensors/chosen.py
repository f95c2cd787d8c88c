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
from lepton_jax.tensors.leaves import CompressedTensor, ParamSpec, dense_of, flat_of
from lepton_jax.tensors.matmul import matmul
from lepton_jax.tensors.qtensor import QTensor
from lepton_jax.tensors.ragged_dots import ragged_dot


def chooser(spec: ParamSpec, leaves: Sequence[Any]) -> Callable[[jax.Array], Any]:
    """A function from an index i32 `[]` to the leaf there, for leaves of one shape.

    Call it where the leaves come from, outside of the loop: what is small is stacked once.
    """
    grouped = "experts" in spec.axes  # products of consecutive groups of rows
    if not spec.inputs:
        return _stacked(leaves)
    if grouped or not _are_alike(leaves):
        return lambda index: ChosenLeaf(tuple(leaves), index)
    if not isinstance(leaves[0], CompressedTensor):
        return lambda index: Chosen(tuple(leaves), index)
    if not _is_one_dot(leaves[0]):
        return lambda index: ChosenLeaf(tuple(leaves), index)
    values = tuple(leaf.values for leaf in leaves)
    scales = _stacked([dataclasses.replace(leaf, values=None) for leaf in leaves])
    return lambda index: dataclasses.replace(scales(index), values=Chosen(values, index))


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
        return dataclasses.replace(self, leaves=tuple(flat_of(w, keep) for w in self.leaves))

    def matmul(self, x: jax.Array) -> jax.Array:
        # A copy is small beside a product of many rows.
        if x.shape[0] >= MANY_ROWS and _are_alike(self.leaves):
            return matmul(x, branch(self.index, lambda _, w: w, (), self.leaves))
        return branch(self.index, matmul, x, self.leaves)

    def ragged_matmul(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return branch(self.index, lambda x, w: ragged_dot(x, w, group_sizes), x, self.leaves)

    def dense(self, dtype: Any) -> jax.Array:
        return branch(self.index, lambda _, w: dense_of(w, dtype), (), self.leaves)

    def taken(self, ids: jax.Array) -> Self:
        raise TypeError("a chosen weight is multiplied, not looked up")


def _are_alike(leaves: Sequence[Any]) -> bool:
    """Whether they are stored in one way, in arrays of the same shapes and dtypes."""
    kinds = {jax.tree.structure(leaf) for leaf in leaves}
    arrays = {tuple((a.shape, a.dtype) for a in jax.tree.leaves(leaf)) for leaf in leaves}
    return len(kinds) == len(arrays) == 1


def _is_one_dot(leaf: CompressedTensor) -> bool:
    """Whether its product is a dot with its values, and arithmetic around it."""
    return isinstance(leaf, QTensor) and not leaf.grouped and leaf.values.dtype == jnp.int8


def _stacked(trees: Sequence[Any]) -> Callable[[jax.Array], Any]:
    """For what is small. The barrier keeps the slice out of the loops that use it, which a CPU
    wouldn't vectorize with it: silu of a scaled product took 0.21 ms a layer instead of 0.03.
    """
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)

    def at(index: jax.Array) -> Any:
        slices = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stack
        )
        return jax.lax.optimization_barrier(slices)

    return at
