"""Which consecutive blocks of a weight's inputs matter, and how the kept ones make up for the rest.

A block is what structured pruning removes as a whole: one ffn channel of `down`, or the G x H
inputs of `out` that belong to one kv head. Both are told by the mean x x^T of the weight's inputs
(`statistics.py`). Who removes the parts that feed those inputs: `structured.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="blocks")
def block_energies(weight: jax.Array, hessian: jax.Array, *, blocks: int) -> jax.Array:
    """Mean squared norm of each block's share of the product: `[blocks]`.

    Args:
      weight: `[O, I]`.
      hessian: mean x x^T of its inputs, `[I, I]`.
      blocks: how many consecutive parts of equal size the inputs have.

    It is the error that removing the block alone would cause: trace(W_b H_bb W_b^T).
    """
    size = weight.shape[1] // blocks
    parts = jnp.swapaxes(weight.astype(jnp.float32).reshape(-1, blocks, size), 0, 1)
    inner = jnp.einsum("bibj->bij", hessian.reshape(blocks, size, blocks, size))
    product = jnp.matmul(parts, inner, precision="highest")
    return jnp.sum(product * parts, axis=(1, 2))


def largest(scores: jax.Array, count: int) -> jax.Array:
    """Indices `[count]` of the largest scores, in rising order; of equal ones the first."""
    return jnp.sort(jnp.argsort(-scores, stable=True)[:count])


def inputs_of(kept: jax.Array, size: int) -> jax.Array:
    """The inputs `[len(kept) * size]` of blocks of this size."""
    return (kept[:, None] * size + jnp.arange(size)).reshape(-1)


@jax.jit
def refit(
    weight: jax.Array, hessian: jax.Array, kept: jax.Array, damp: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The weight for the inputs `kept` alone that comes nearest to the whole product.

    Args:
      weight: `[O, I]`.
      hessian: mean x x^T of its inputs, `[I, I]`.
      kept: indices of inputs, `[C]`.
      damp: share of the mean diagonal that is added to the diagonal.

    Returns:
      `[O, C]` in the weight's dtype, and the error of its product relative to the whole one, a
      ratio of norms.

    What was removed is added to the kept weights by least squares: W_S + W_R H_RS H_SS^-1, so that
    inputs or weights of zeros change nothing.
    """
    wide = weight.astype(jnp.float32)
    removed = wide.at[:, kept].set(0.0)
    inner = hessian[jnp.ix_(kept, kept)]
    inner = inner + jnp.diag(jnp.full(kept.shape, damp * jnp.mean(jnp.diag(hessian)) + 1e-30))
    across = jnp.matmul(removed, hessian[:, kept], precision="highest")
    factor = jax.scipy.linalg.cho_factor(inner, lower=True)
    made_up = jax.scipy.linalg.cho_solve(factor, across.T).T
    change = (-removed).at[:, kept].add(made_up)
    ratio = _energy(change, hessian) / jnp.maximum(_energy(wide, hessian), 1e-30)
    return (wide[:, kept] + made_up).astype(weight.dtype), jnp.sqrt(jnp.maximum(ratio, 0.0))


def _energy(weight, hessian):
    return jnp.sum(jnp.matmul(weight, hessian, precision="highest") * weight)
