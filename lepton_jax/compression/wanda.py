"""Wanda: a weight matters as its magnitude times the norm of what it is multiplied with.

Source: Sun et al. (arXiv 2306.11695). Weights of one output are compared with each other; which of
them become 0 by these scores is `prune.py`.
"""

import jax
import jax.numpy as jnp


def wanda_scores(weight: jax.Array, squares: jax.Array) -> jax.Array:
    """float32 `[*, O, I]` from a weight of that shape and the squared norms `[*, I]` of inputs.

    Where all norms are 0, as of an expert that no token visited, magnitudes alone decide.
    """
    seen = jnp.any(squares > 0, axis=-1, keepdims=True)
    norms = jnp.where(seen, jnp.sqrt(squares), 1.0)
    return jnp.abs(weight.astype(jnp.float32)) * norms[..., None, :]
