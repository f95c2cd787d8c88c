"""Proposals without a model: what followed the last time that a text ended as it does now.

Prompt lookup (Saxena, 2023; n-gram speculation): the longest suffix of a row's text, up to 3
tokens, that occurs earlier in it, the latest such place, and the tokens behind it. Cheap enough to
run in every step; it pays where answers copy from their prompts or from themselves.
"""

import jax
import jax.numpy as jnp

SUFFIX = 3  # longest suffix that is compared, in tokens


def lookup(texts: jax.Array, lengths: jax.Array, draft: int) -> jax.Array:
    """Proposals i32[B, draft] for rows whose known tokens are `texts[: lengths + 1]`; -1: none.

    Args:
      texts: i32[B, S].
      lengths: i32[B], place of the last known token.
      draft: tokens to propose. Behind the text's end the copy goes on with what it has copied.
    """
    size = texts.shape[1]
    places = jnp.arange(size)
    rank = jnp.zeros(texts.shape, jnp.int32)
    same = places < lengths[:, None]
    for back in range(SUFFIX):
        last = jnp.take_along_axis(texts, jnp.maximum(lengths[:, None] - back, 0), 1)
        shifted = jnp.pad(texts, ((0, 0), (back, 0)))[:, :size]
        same &= (shifted == last) & (places >= back)
        rank += same
    best = jnp.max(rank * size + places, axis=1)  # the longest suffix, then the latest place
    found, place = best >= size, best % size
    period = jnp.maximum(lengths - place, 1)
    source = place[:, None] + 1 + jnp.arange(draft) % period[:, None]
    copied = jnp.take_along_axis(texts, jnp.minimum(source, size - 1), axis=1)
    return jnp.where(found[:, None], copied, -1)
