"""GPTQ: rounds a weight input by input and lets the inputs that follow make up for each error.

    settled = gptq(weight, hessian, scheme)   # values on a grid, for quantize.make_leaf

Source: Frantar et al., "GPTQ" (arXiv 2210.17323). `compensate` is the loop that SparseGPT shares
(`sparsegpt.py`). The Hessian is the mean of `x x^T` over the inputs x of the weight, which
`calibrate.py` gathers. All of it is float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.compression.quantize import Grid, fit_grid, in_groups, on_grid, round_to_grid
from lepton_jax.compression.scheme import Scheme

BLOCK = 128  # inputs between updates of all that follow


class Settled(NamedTuple):
    """A weight whose values are decided.

    Attributes:
      weights: float32 `[O, I]`, what is stored.
      values: float32 `[O, X, I/X]` in steps of the grid, or None where nothing is quantized.
      grid: that of `values`, or None.
    """

    weights: jax.Array
    values: jax.Array | None
    grid: Grid | None


@functools.partial(jax.jit, static_argnames=("scheme", "block", "act_order"))
def gptq(
    weight: jax.Array,
    hessian: jax.Array,
    scheme: Scheme,
    *,
    damp: float = 0.01,
    block: int = BLOCK,
    act_order: bool = False,
    mask: jax.Array | None = None,
) -> Settled:
    """A weight `[O, I]` on the scheme's grid.

    Args:
      weight: any float dtype.
      hessian: float32 `[I, I]`.
      scheme: a group's grid is fitted when its first input is reached, to what the errors before
        have made of the weights; a grid for all inputs is fitted to the weight as it came. Both
        are fitted to the loss that GPTQ minimises, which the paper's range of extremes is not: at
        int4 in groups of 128 the error of SmolLM2's products falls by 5 to 45 %.
      damp: share of the Hessian's mean diagonal that is added to the diagonal.
      block: inputs between updates of all that follow; with groups, those of one group.
      act_order: inputs with the largest diagonal first; the grids are then fitted beforehand.
      mask: bool `[O, I]`, False for weights that are pruned and stay 0.
    """
    weight = weight.astype(jnp.float32)
    if mask is not None:
        weight = jnp.where(mask, weight, 0.0)
    inputs = weight.shape[1]
    order = jnp.argsort(-jnp.diag(hessian)) if act_order else jnp.arange(inputs)
    factor = inverse_factor(hessian[order][:, order], damp)
    grids = ColumnGrids(weight, scheme, factor, order=order, block=block, fitted=act_order)
    kept = jnp.ones((inputs, 1), bool) if mask is None else mask.T[order]

    def begin(part, diagonal, start):
        return grids.begin(part, diagonal, start)

    def settle(part, context, i):
        column, steps = grids.settle(part[i], context, i)
        keep = kept[context.start + i]
        return jnp.where(keep, column, 0.0), jnp.where(keep, steps, 0.0), context

    columns, (values, contexts) = compensate(
        weight.T[order], factor, size=grids.block, begin=begin, settle=settle
    )
    back = jnp.argsort(order)
    return grids.settled(columns[back], values.reshape(columns.shape)[back], contexts)


def inverse_factor(hessian: jax.Array, damp: float) -> jax.Array:
    """Upper triangular U `[I, I]` with `inverse(hessian + damping) = U^T U`.

    An input that is always 0 gets the mean diagonal: its weights are then rounded by themselves.
    From `hessian = R R^T` with R upper triangular (a Cholesky factorization from the last input to
    the first) it is U = R^-1: the inverse itself, which float32 would spoil, is never formed.
    """
    diagonal = jnp.diag(hessian)
    mean = jnp.mean(diagonal)
    mean = jnp.where(mean > 0, mean, 1.0)
    damped = hessian + jnp.diag(jnp.where(diagonal > 0, 0.0, mean) + damp * mean)
    lower = jnp.linalg.cholesky(damped[::-1, ::-1])
    return jax.scipy.linalg.solve_triangular(
        lower[::-1, ::-1], jnp.eye(len(diagonal), dtype=jnp.float32), lower=False
    )


def compensate(
    columns: jax.Array, factor: jax.Array, *, size: int, begin: Callable, settle: Callable
) -> tuple[jax.Array, Any]:
    """Decides the inputs of a weight one after another; those that follow take up the errors.

    Args:
      columns: float32 `[I, O]`: the weight, inputs first.
      factor: `[I, I]` of `inverse_factor`, in the same order of inputs.
      size: inputs of a block; divides I.
      begin: `begin(part [size, O], diagonal [size], start) -> context`, any pytree, for the block
        that starts at input `start`; the diagonal is the factor's.
      settle: `settle(part, context, i) -> (column [O], note, context)`: what input i of the block
        becomes, and something to note of it.

    Returns:
      The columns as they were decided, and (notes, contexts) with leading axes `[I/size, size]`
      and `[I/size]`.
    """
    inputs = columns.shape[0]

    def block(columns, start):
        part = jax.lax.dynamic_slice_in_dim(columns, start, size)
        rows = jax.lax.dynamic_slice_in_dim(factor, start, size)
        local = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)

        def column(state, i):
            part, context = state
            decided, note, context = settle(part, context, i)
            error = (part[i] - decided) / local[i, i]
            part = (part - local[i][:, None] * error).at[i].set(decided)
            return (part, context), (note, error)

        first = begin(part, jnp.diag(local), start)
        (part, context), (notes, errors) = jax.lax.scan(column, (part, first), jnp.arange(size))
        columns = jax.lax.dynamic_update_slice_in_dim(columns, part, start, axis=0)
        later = jnp.where(jnp.arange(inputs) >= start + size, rows, 0.0)
        return columns - jnp.matmul(later.T, errors, precision="highest"), (notes, context)

    return jax.lax.scan(block, columns, jnp.arange(0, inputs, size))


class _Place(NamedTuple):
    """Context of a block: its first input, and the grid `[O, 1]` of its group where it has one."""

    start: jax.Array
    grid: Grid | None


class ColumnGrids:
    """The grids of a weight `[O, I]` while its inputs are decided one by one.

    They are fitted to the loss itself: an input's error counts as the inverse of its squared
    diagonal in the factor. A scheme that quantizes nothing has none. `block` is how many inputs a
    block may have, `unit` how many stay together in one; `fitted`: before the first input is
    decided, also where there are groups.
    """

    def __init__(
        self,
        weight: jax.Array,
        scheme: Scheme,
        factor: jax.Array,
        *,
        order: jax.Array,
        block: int,
        unit: int = 1,
        fitted: bool,
    ):
        inputs = weight.shape[1]
        self.scheme, self._order = scheme, order
        self._solved = jnp.isfinite(factor).all()
        self._quantized = scheme.weights != "keep"
        group = scheme.group_of(inputs) if self._quantized else 0
        self._size = group or inputs
        self._fixed = None
        if self._quantized and (fitted or not group):
            parts = in_groups(weight, scheme)
            importance = (1.0 / jnp.diag(factor) ** 2)[jnp.argsort(order)]
            self._fixed = fit_grid(parts, scheme, importance.reshape(parts.shape[1:]))
        by_group = group and not fitted
        self.block = group if by_group else _divisor(inputs, block, unit)

    def begin(self, part: jax.Array, diagonal: jax.Array, start: jax.Array) -> _Place:
        """For the block `part [size, O]`, as the errors before have made it."""
        if not self._quantized or self._fixed is not None:
            return _Place(start, None)
        importance = 1.0 / diagonal[None] ** 2
        return _Place(start, fit_grid(part.T[:, None, :], self.scheme, importance))

    def settle(self, column: jax.Array, place: _Place, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Column `[O]` i of the block on the grid, and in its steps."""
        if not self._quantized:
            return column, column
        grid = place.grid
        if self._fixed is not None:
            group = self._order[place.start + i] // self._size
            grid = jax.tree.map(lambda a: jnp.take(a, group[None], axis=1), self._fixed)
        steps = round_to_grid(column[:, None, None], grid, self.scheme)
        return on_grid(steps, grid)[:, 0, 0], steps[:, 0, 0]

    def settled(self, columns: jax.Array, values: jax.Array, places: _Place) -> Settled:
        """The result, from columns and steps `[I, O]` and the places of all blocks."""
        if not self._quantized:
            return Settled(columns.T, None, None)
        grid = self._fixed
        if grid is None:
            grid = jax.tree.map(lambda a: a[..., 0].T, places.grid)
        # Integers would hide that nothing was solved.
        grid = jax.tree.map(lambda a: jnp.where(self._solved, a, jnp.nan), grid)
        return Settled(columns.T, values.T.reshape(columns.shape[1], -1, self._size), grid)


def _divisor(inputs: int, most: int, unit: int) -> int:
    """The largest block of at most `most` inputs, whole units of them, that divides them all."""
    sizes = range(most - most % unit, 0, -unit)
    return next((size for size in sizes if inputs % size == 0), unit)
