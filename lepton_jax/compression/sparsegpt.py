"""SparseGPT: prunes a weight input by input, and lets the inputs that follow make up for each loss.

    settled, mask = sparsegpt(weight, hessian, scheme)

Source: Frantar & Alistarh, "SparseGPT" (arXiv 2301.00774). The loop and the Hessian are those of
GPTQ (`gptq.py`), and where the scheme quantizes, what is kept is rounded in the same pass. What the
other methods prune is `prune.py` and `wanda.py`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.compression.gptq import (
    BLOCK,
    ColumnGrids,
    Settled,
    compensate,
    inverse_factor,
)
from lepton_jax.compression.scheme import Scheme


class _Choice(NamedTuple):
    """Context of a block: its grid's place, what it keeps `[size, O]`, the factor's diagonal."""

    place: tuple
    mask: jax.Array
    diagonal: jax.Array


@functools.partial(jax.jit, static_argnames=("scheme", "block"))
def sparsegpt(
    weight: jax.Array,
    hessian: jax.Array,
    scheme: Scheme,
    *,
    damp: float = 0.01,
    block: int = BLOCK,
) -> tuple[Settled, jax.Array]:
    """A weight `[O, I]` with the scheme's zeros, on its grid if it has one, and bool `[O, I]` which
    weights were kept.

    Args:
      weight: any float dtype.
      hessian: float32 `[I, I]`.
      scheme: unstructured sparsity is reached in each block of inputs over all outputs; N:M is
        chosen when the first of M inputs is reached.
      damp: share of the Hessian's mean diagonal that is added to the diagonal.
      block: inputs that are chosen from together at most, in multiples of M; with groups of a grid,
        those of one group.

    Raises ValueError where M doesn't divide the inputs or a group.
    """
    weight = weight.astype(jnp.float32)
    scheme.require_pattern(weight.shape)
    keep, among = scheme.n_of_m or (0, 0)
    order, factor = jnp.arange(weight.shape[1]), inverse_factor(hessian, damp)
    blocks = dict(order=order, block=block, unit=among or 1, fitted=False)
    grids = ColumnGrids(weight, scheme, factor, **blocks)

    def begin(part, diagonal, start):
        mask = jnp.ones(part.shape, bool) if among else _largest(part, diagonal, scheme.sparsity)
        return _Choice(grids.begin(jnp.where(mask, part, 0.0), diagonal, start), mask, diagonal)

    def settle(part, choice, i):
        mask = choice.mask
        if among:
            mask = jax.lax.cond(
                i % among == 0, lambda m: _choose(m, part, choice.diagonal, i), lambda m: m, mask
            )
        column, steps = grids.settle(part[i], choice.place, i)
        notes = jnp.where(mask[i], steps, 0.0), mask[i]
        return jnp.where(mask[i], column, 0.0), notes, choice._replace(mask=mask)

    def _choose(mask, part, diagonal, i):
        rows = jax.lax.dynamic_slice_in_dim(part, i, among)
        score = (rows / jax.lax.dynamic_slice_in_dim(diagonal, i, among)[:, None]) ** 2
        rank = jnp.argsort(jnp.argsort(-score, axis=0), axis=0)
        return jax.lax.dynamic_update_slice_in_dim(mask, rank < keep, i, axis=0)

    columns, ((values, kept), choices) = compensate(
        weight.T, factor, size=grids.block, begin=begin, settle=settle
    )
    settled = grids.settled(columns, values.reshape(columns.shape), choices.place)
    return settled, kept.reshape(columns.shape).T


def _largest(part, diagonal, sparsity: float):
    """bool as `part [size, O]`: all but the share `sparsity` with the least loss."""
    score = (part / diagonal[:, None]) ** 2
    order = jnp.argsort(score.reshape(-1))
    dropped = order[: round(sparsity * order.size)]
    return jnp.ones(order.size, bool).at[dropped].set(False).reshape(part.shape)
