"""Paged attention as plain XLA programs for CPU and GPU: pages are read where they are, block by block.

A loop with a dynamic trip count walks over blocks of keys with a running softmax, so the cost follows the longest
live row (decode) or each tile's own context (prefill), never the padded width of the page table, and no program
is compiled per context length. Reads and writes use the layout of `attention_reference.py`.

Figures (2-core AVX-512 CPU, jax 0.12.0.1, K=3 G=3 H=64, 200 tokens of context, bf16 cache, 2026-11-24), a layer of a
decode step including its write: 0.03 / 0.16 / 0.55 ms at 1 / 8 / 32 rows; a float32 cache: 0.04 / 0.18 / 0.80.
"""

import jax
import jax.numpy as jnp

from lepton_jax.kernels.attention import PagedBatch
from lepton_jax.kernels.attention_reference import MASKED, cache_shape, valid_tokens, write

__all__ = ["Q_TILE", "attend", "cache_shape", "write"]

Q_TILE = 32  # queries of one prompt that a prefill works on at once
_BLOCK = 128  # cached tokens visited at once


def attend(
    q: jax.Array,
    cache: jax.Array,
    batch: PagedBatch,
    *,
    decode: bool,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> jax.Array:
    """Attention of q `[T, K, G, H]` over the cache `[P, Z, 2, K, H]`; `[T, K, G, H]` in q's dtype.

    A query at position p sees the positions <= p of its row, with `window` > 0 only those > p - window.
    Padding gives 0. With `decode`, token t belongs to row t; otherwise every aligned tile of `Q_TILE` tokens
    belongs to one row.
    """
    if decode:
        out = _decode(q, cache, batch, scale=scale, window=window, soft_cap=soft_cap)
    else:
        out = _prefill(q, cache, batch, scale=scale, window=window, soft_cap=soft_cap)
    return jnp.where(valid_tokens(batch)[:, None, None, None], out, 0).astype(q.dtype)


def _decode(q, cache, batch, *, scale, window, soft_cap):
    positions = batch.positions[:, None]  # [B, 1]
    first = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions).min() - window
    table, span = _blocks(batch.page_table, cache.shape[1])
    return _running_softmax(
        q[:, None].transpose(0, 2, 3, 1, 4),  # [B, K, G, 1, H]
        cache,
        table,
        positions,
        blocks=_range(first, positions.max(), span, window),
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )[:, :, :, 0]


def _prefill(q, cache, batch, *, scale, window, soft_cap):
    tile = min(Q_TILE, q.shape[0])
    tiles = q.shape[0] // tile
    table, span = _blocks(batch.page_table, cache.shape[1])
    positions = batch.positions.reshape(tiles, tile)
    queries = q.reshape(tiles, tile, *q.shape[1:]).transpose(
        0, 2, 3, 1, 4
    )  # [tiles, K, G, tile, H]
    rows = batch.rows.reshape(tiles, tile)[:, 0]

    def one_tile(index, out):
        where = positions[index][None]
        o = _running_softmax(
            queries[index][None],
            cache,
            table[rows[index]][None],
            where,
            blocks=_range(where[0, 0] - window, where.max(), span, window),
            scale=scale,
            window=window,
            soft_cap=soft_cap,
        )
        return jax.lax.dynamic_update_slice(out, o.astype(q.dtype), (index, 0, 0, 0, 0))

    out = jax.lax.fori_loop(0, tiles, one_tile, jnp.zeros(queries.shape, q.dtype))
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _blocks(page_table, page_size):
    """The page table padded to whole blocks, `[R, blocks, pages of a block]`, and the tokens of a block."""
    pages = max(1, _BLOCK // page_size)
    rows, width = page_table.shape
    blocks = -(-width // pages)
    padded = jnp.pad(page_table, ((0, 0), (0, blocks * pages - width)))
    return padded.reshape(rows, blocks, pages), pages * page_size


def _range(oldest, newest, span, window):
    """First and one-past-last block that any query sees."""
    start = jnp.maximum(oldest + 1, 0) // span if window else 0
    return start, newest // span + 1


def _running_softmax(q, cache, table, positions, *, blocks, scale, window, soft_cap):
    """q `[R, K, G, M, H]` at positions `[R, M]` over the blocks of `table [R, blocks, pages]`: float32 like q."""
    rows, kv_heads, _, _, head_dim = q.shape
    span = table.shape[2] * cache.shape[1]
    exact = jax.lax.Precision.HIGHEST if cache.dtype == jnp.float32 else None
    queries = q.astype(cache.dtype)

    def visit(block, carry):
        top, total, out = carry
        pages = jax.lax.dynamic_index_in_dim(table, block, axis=1, keepdims=False)
        kv = jnp.take(cache, pages, axis=0, mode="clip").reshape(rows, span, 2, kv_heads, head_dim)
        scores = scale * jnp.einsum(
            "rkgmh,rskh->rkgms",
            queries,
            kv[:, :, 0],
            precision=exact,
            preferred_element_type=jnp.float32,
        )
        if soft_cap:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        places = block * span + jnp.arange(span)
        seen = places <= positions[..., None]
        if window:
            seen &= places > positions[..., None] - window
        scores = jnp.where(seen[:, None, None], scores, MASKED)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - new_top)
        keep = jnp.exp(top - new_top)
        values = jnp.einsum(
            "rkgms,rskh->rkgmh",
            weights.astype(cache.dtype),
            kv[:, :, 1],
            precision=exact,
            preferred_element_type=jnp.float32,
        )
        return new_top, total * keep + weights.sum(-1, keepdims=True), out * keep + values

    lanes = (*q.shape[:-1], 1)
    start = (jnp.full(lanes, MASKED), jnp.zeros(lanes), jnp.zeros(q.shape))
    _, total, out = jax.lax.fori_loop(*blocks, visit, start)
    return out / jnp.maximum(total, 1e-30)
