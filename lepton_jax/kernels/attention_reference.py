"""Attention in plain jnp: what every other backend is measured against.

Here: the paged backend (`cache_layer`, `write`, `attend`) in its simplest form, and
`causal_attend`, which needs no cache at all. Every query gathers all pages of its row, so memory
grows as T * S: right for tests, wrong for a hot path.
Not here: the choice between backends and the `PagedBatch` that describes a step (`attention.py`).
Read next: `attention_tpu.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.kernels.attention import PagedBatch, is_limited
from lepton_jax.kernels.kv_cache import KV, encode, planned
from lepton_jax.kernels.kv_cache import decode as decode_kv

Q_TILE = 1  # sequences of a prefill may start at any token

# Far below any score, yet finite: a fully masked query averages instead of turning into NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def cache_layer(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, *, dtype: Any
) -> Any:
    """One layer's cache, as ParamSpecs: [P, Z, 2, K, H], keys at index 0 and values at index 1."""
    axes = ("pages", "page_tokens", "sides", "kv_heads", "head_dim")
    return planned((num_pages, page_size, 2, num_kv_heads, head_dim), axes, dtype)


def slots(batch: PagedBatch, page_size: int) -> tuple[jax.Array, jax.Array]:
    """Where each token's key and value live: (page i32[T], place in the page i32[T]).

    A token counts only if its position is in `[0, kv_len of its row)`; padding and the tokens of
    idle rows go to the null page, page 0.
    """
    position = jnp.maximum(batch.positions, 0)
    page = batch.page_table[batch.rows, position // page_size]
    return jnp.where(valid_tokens(batch), page, 0), position % page_size


def valid_tokens(batch: PagedBatch) -> jax.Array:
    """bool[T]: False for padding and for the tokens of idle rows."""
    return (batch.positions >= 0) & (batch.positions < batch.kv_lens[batch.rows])


def write(cache: KV, k: jax.Array, v: jax.Array, batch: PagedBatch) -> KV:
    """Stores k and v, both [T, K, H], at the tokens' places in the cache [P, Z, 2, K, H]."""
    page, place = slots(batch, cache.shape[1])
    new = encode(jnp.stack([k, v], axis=1), cache)
    return jax.tree.map(lambda held, lines: held.at[page, place].set(lines), cache, new)


def attend(
    q: jax.Array,
    cache: KV,
    batch: PagedBatch,
    *,
    decode: bool,
    scale: float,
    window: jax.Array | int = 0,
    soft_cap: float = 0.0,
) -> jax.Array:
    """Attention of q [T, K, G, H] over the cache [P, Z, 2, K, H]; [T, K, G, H] in q's dtype.

    A query at position p of its row sees the cached positions <= p, and with `window` > 0 only
    those > p - window. `soft_cap` > 0 bounds the scaled scores to (-soft_cap, soft_cap) by tanh.
    Padding and idle rows give 0. With `decode`, token t belongs to row t.
    """
    rows = jnp.arange(q.shape[0]) if decode else batch.rows
    pages = decode_kv(jax.tree.map(lambda a: a[batch.page_table[rows]], cache))  # [T,W,Z,2,K,H]
    tokens, width, page_size, _, num_kv_heads, head_dim = pages.shape
    kv = pages.reshape(tokens, width * page_size, 2, num_kv_heads, head_dim)
    scores = _scores("tkgh,tskh->tkgs", q, kv[:, :, 0], scale=scale, soft_cap=soft_cap)
    seen = _seen(batch.positions, jnp.arange(width * page_size), window)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, MASKED), axis=-1)
    # A page not yet filled may hold anything, and 0 * NaN is NaN: unseen values are cleared.
    values = jnp.where(seen[:, :, None, None], kv[:, :, 1].astype(jnp.float32), 0)
    out = jnp.einsum("tkgs,tskh->tkgh", weights, values, precision="highest")
    return jnp.where(valid_tokens(batch)[:, None, None, None], out, 0).astype(q.dtype)


def causal_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: object,
    *,
    scale: float,
    window: jax.Array | int = 0,
    soft_cap: float = 0.0,
) -> tuple[jax.Array, object]:
    """Attention of one whole sequence to itself: q [T, K, G, H], k and v [T, K, H].

    The decoder's `attend` signature; returns ([T, K, G, H] in q's dtype, the cache as it came).
    """
    places = jnp.arange(q.shape[0])
    scores = _scores("tkgh,skh->tkgs", q, k, scale=scale, soft_cap=soft_cap)
    seen = _seen(places, places, window)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("tkgs,skh->tkgh", weights, v.astype(jnp.float32), precision="highest")
    return out.astype(q.dtype), cache


def _scores(
    subscripts: str, q: jax.Array, k: jax.Array, *, scale: float, soft_cap: float
) -> jax.Array:
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = jnp.einsum(subscripts, q, k, precision="highest") * scale
    return soft_cap * jnp.tanh(scores / soft_cap) if soft_cap else scores


def _seen(positions: jax.Array, places: jax.Array, window: jax.Array | int) -> jax.Array:
    """bool[T, S]: whether the query at each position sees each place of its row."""
    seen = places[None, :] <= positions[:, None]
    if is_limited(window):
        seen &= places[None, :] > positions[:, None] - window
    return seen
