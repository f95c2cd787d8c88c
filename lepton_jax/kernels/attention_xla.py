"""Paged attention as plain XLA programs for CPU and GPU: pages are read where they are, block by
block.

A loop with a dynamic trip count walks over blocks of keys with a running softmax, so the cost
follows the longest live row (decode) or each tile's own context (prefill), never the padded width
of the page table, and no program is compiled per context length. A page keeps each head's keys
together (`[2, K, Z, H]`), so a gathered page goes into the dot as it is: on a 2-core AVX-512 CPU a
third faster than the token-major layout (jax 0.12.0.1, 8 and 32 rows, 200 tokens of context, K=3
G=3 H=64, 2026-11-24).

A quantized cache (`kv_cache.py`) is decoded where it is read: a block of pages at a time, or once
for a whole decode block where there is a view. What a view gets is encoded and decoded first, so a
token has one value, wherever it is read from and however a run was cut into blocks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.kernels.attention import PagedBatch, is_limited
from lepton_jax.kernels.attention_reference import MASKED, slots, valid_tokens
from lepton_jax.kernels.kv_cache import KV, decode, encode, planned
from lepton_jax.tensors.dots import branch

Q_TILE = 1  # sequences of a prefill may start at any token
# Queries of one row that a prefill works on at once, fewer at a row's end. On two AVX-512 cores 128
# instead of 32 read prompts of 512 tokens 1.28 times as fast (w8a8; float32 1.24; 2026-12-01).
_TILES = (128, 32, 8)
# Cached tokens visited at once. On two AVX2 cores attention is at most a tenth faster in blocks of
# 64 (prefill) or 256 (decode), and slower in larger ones (2026-11-30).
BLOCKS = (128, 64, 256)
# Rows that a CPU visits together as it decodes, as far as the longest of them goes: one long row
# made a step of 32 rows twice as long (2026-11-30).
_ALIKE = 8


class View(NamedTuple):
    """A decode block's own copy of its rows' cache: what was cached when it began, and its own new
    tokens, which come behind. A text's token i has place i in the two together.

    Attributes:
      keys, values: of each layer that shares the cache, `[B, K, tokens, H]`; no step changes them.
      tail: the new tokens as the cache stores them, `[layers, B, 2, K, steps, H]`.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    tail: KV


def cache_layer(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, *, dtype: Any
) -> Any:
    """One layer's cache, as ParamSpecs: [P, 2, K, Z, H], keys at index 0 and values at index 1."""
    axes = ("pages", "sides", "kv_heads", "page_tokens", "head_dim")
    return planned((num_pages, 2, num_kv_heads, page_size, head_dim), axes, dtype)


def write(cache: KV, k: jax.Array, v: jax.Array, batch: PagedBatch) -> KV:
    """Stores k and v, both `[T, K, H]`, at the tokens' places in the cache `[P, 2, K, Z, H]`.

    The barrier keeps one write one: of a single token XLA makes a slice update, fuses a copy of it
    into each of its readers, and so copies the whole cache for every layer and step.
    """
    page, place = slots(batch, cache.shape[3])
    new = encode(jnp.stack([k, v], axis=1), cache)
    written = jax.tree.map(lambda held, lines: held.at[page, :, :, place].set(lines), cache, new)
    return jax.lax.optimization_barrier(written)


def attend(
    q: jax.Array,
    cache: KV,
    batch: PagedBatch,
    *,
    decode: bool,
    scale: float,
    window: jax.Array | int = 0,
    soft_cap: float = 0.0,
    block: int = BLOCKS[0],
) -> jax.Array:
    """Attention of q `[T, K, G, H]` over the cache `[P, 2, K, Z, H]`; `[T, K, G, H]` in q's dtype.

    A query at position p sees the positions <= p of its row, with `window` > 0 only those > p -
    window. Padding gives 0. With `decode`, token t belongs to row t; otherwise a row's tokens lie
    side by side from its place in `cu_q_lens`. `block` tokens are visited at once.
    """
    table, span = _blocks(batch.page_table, cache.shape[3], block)
    rows = _decode if decode else _prefill
    out = rows(q, cache, batch, table, span=span, scale=scale, window=window, soft_cap=soft_cap)
    return jnp.where(valid_tokens(batch)[:, None, None, None], out, 0).astype(q.dtype)


def open_view(
    cache: KV,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    tokens: int,
    steps: int,
    layers: int = 1,
) -> View:
    """The rows' cached keys and values side by side for a decode block.

    Each row's text ends at place `tokens`, whatever its length, so the token of step i has place
    `tokens + i` in every row and one slice update writes all rows. The copy is paid once a block;
    the steps then read without gathers. `layers` share the cache.
    """
    pages, _, kv_heads, page_size, head_dim = cache.shape
    index = jnp.maximum(jnp.arange(tokens) - tokens + lengths[:, None], 0)  # [B, tokens]
    page = jnp.take_along_axis(page_table, index // page_size, axis=1)

    @jax.jit  # traced once for all layers
    def side(half, layer):
        here = page + layer * (pages // layers)
        first = (2 * here + half)[:, None] * kv_heads + jnp.arange(kv_heads)[:, None]
        line = first * page_size + (index % page_size)[:, None]
        taken = jax.tree.map(lambda a: jnp.take(_lines(a), line, axis=0, mode="clip"), cache)
        return decode(taken)

    keys, values = (tuple(side(half, i) for i in range(layers)) for half in (0, 1))
    shape = (layers, len(lengths), 2, kv_heads, steps, head_dim)
    tail = jax.tree.map(lambda a: jnp.zeros(shape[: a.ndim + 1], a.dtype), cache)
    return View(keys, values, tail)


def attend_view(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    view: View,
    *,
    span: tuple[jax.Array, jax.Array, jax.Array | int],
    scale: float,
    window: jax.Array | int = 0,
    soft_cap: float = 0.0,
) -> tuple[jax.Array, View]:
    """A decode step on a view: stores k and v `[B, K, H]` and attends q `[B, K, G, H]`.

    `span`: first place of each row's text in the view, `[B]`; the place of the new token, the same
    in all rows; which of the view's layers it is. Returns the result, like q, and the new view.
    """
    starts, place, layer = span
    view = _extended(view, k[:, :, None], v[:, :, None], place, layer=layer)
    places = jnp.arange(_size(view))
    seen = (places >= starts[:, None]) & (places <= place)
    if is_limited(window):
        seen &= places > place - window
    out = _view_softmax(q, view, seen[:, None, None], layer=layer, scale=scale, soft_cap=soft_cap)
    return out.astype(q.dtype), view


def verify_view(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    view: View,
    *,
    span: tuple[jax.Array, jax.Array, jax.Array, jax.Array | int],
    scale: float,
    window: jax.Array | int = 0,
    soft_cap: float = 0.0,
) -> tuple[jax.Array, View]:
    """As `attend_view` for M tokens a row side by side: q `[B * M, K, G, H]`, k and v alike.

    Rows may grow by different numbers of tokens: the new ones lie at the same places in all rows,
    and what a row has rejected leaves a hole there.

    Args:
      q, k, v: of the new tokens.
      view: of `open_view`.
      span: the position of the token at each place of the view i32 `[B, S]`, the new ones included,
        -1: none; the new tokens' positions i32 `[B, M]`; the place of the first of them; which of
        the view's layers it is.
      scale, window, soft_cap: as in `attend`.
    """
    positions, queries, place, layer = span
    rows, new = queries.shape
    _, kv_heads, group, head_dim = q.shape

    def heads_first(x):  # [B * M, K, ...] to [B, K, M, ...]
        return x.reshape(rows, new, *x.shape[1:]).swapaxes(1, 2)

    view = _extended(view, heads_first(k), heads_first(v), place, layer=layer)
    lines = heads_first(q).reshape(rows, kv_heads, new * group, head_dim)
    there, asking = positions[:, None], queries[:, :, None]
    seen = (there >= 0) & (there <= asking)  # [B, M, S]
    if is_limited(window):
        seen &= there > asking - window
    seen = jnp.repeat(seen, group, axis=1)[:, None]
    out = _view_softmax(lines, view, seen, layer=layer, scale=scale, soft_cap=soft_cap)
    out = out.reshape(rows, kv_heads, new, group, head_dim).swapaxes(1, 2)
    return out.reshape(q.shape).astype(q.dtype), view


def close_view(
    cache: KV,
    view: View,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    written: jax.Array,
    order: jax.Array | None = None,
) -> KV:
    """Stores the first `written` `[B]` of a block's new tokens in the cache `[P, 2, K, Z, H]`; the
    first as `order` i32 `[B, steps]` lists them, or else as they lie in the view.
    """
    pages, _, kv_heads, page_size, _ = cache.shape
    layers, steps = len(view.keys), view.tail.shape[4]
    new = jnp.arange(steps)
    index = lengths[:, None] + new  # [B, steps]
    page = jnp.take_along_axis(page_table, index // page_size, axis=1, mode="clip")
    page = page + (pages // layers) * jnp.arange(layers)[:, None, None]  # [layers, B, steps]
    page = jnp.where(new < written[:, None], page, 0)
    halves = (2 * page[:, :, None] + jnp.arange(2)[:, None])[:, :, :, None] * kv_heads
    line = (halves + jnp.arange(kv_heads)[:, None]) * page_size + (index % page_size)[:, None, None]
    tail = view.tail
    if order is not None:
        tail = jax.tree.map(
            lambda a: jnp.take_along_axis(
                a, order.reshape(1, -1, 1, 1, steps, *[1] * (a.ndim - 5)), axis=4
            ),
            tail,
        )

    def store(held, lines):
        return _lines(held).at[line].set(lines, mode="promise_in_bounds").reshape(held.shape)

    return jax.tree.map(store, cache, tail)


def _extended(
    view: View, k: jax.Array, v: jax.Array, place: jax.Array, *, layer: jax.Array | int
) -> View:
    """A view with a layer's new keys and values, `[B, K, M, H]`, from `place` on."""
    new = encode(jnp.stack([k, v], axis=1), view.tail)  # [B, 2, K, M, H]
    first = place - view.keys[0].shape[2]

    def put(held, lines):
        start = (layer, 0, 0, 0, first, 0)[: held.ndim]
        return jax.lax.dynamic_update_slice(held, lines[None], start)

    return view._replace(tail=jax.tree.map(put, view.tail, new))


def _size(view: View) -> int:
    """How many places it has."""
    return view.keys[0].shape[2] + view.tail.shape[4]


def _view_softmax(q, view: View, seen, *, layer, scale, soft_cap):
    """q `[B, K, M, H]` over the places that are `seen [B, 1, M or 1, S]`: float32 like q.

    The few new tokens are no dots, of which a CPU makes a product for each row and head.
    """
    dtype, tokens = view.keys[0].dtype, view.keys[0].shape[2]
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dot = functools.partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    new_keys, new_values = decode(
        jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), view.tail)
    ).swapaxes(0, 1)[:, :, :, None]  # [B, K, 1, steps, H]
    q = q.astype(dtype)
    old = branch(layer, functools.partial(dot, "bkmh,bksh->bkms"), q, view.keys)
    new = jnp.sum(q[:, :, :, None].astype(jnp.float32) * new_keys, axis=-1)
    scores = scale * jnp.concatenate([old, new], axis=-1)
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen, scores, MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    old, new = weights[..., :tokens].astype(dtype), weights[..., tokens:, None]
    out = branch(layer, functools.partial(dot, "bkms,bksh->bkmh"), old, view.values)
    return (out + jnp.sum(new * new_values, axis=-2)) / weights.sum(-1)[..., None]


def _lines(pages: jax.Array) -> jax.Array:
    """`[P, 2, K, Z, ...]` as `[P * 2 * K * Z, ...]`."""
    return pages.reshape(-1, *pages.shape[4:])


def _decode(q, cache, batch, table, *, span, scale, window, soft_cap):
    def together(q, table, positions):
        first = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions).min() - window
        return _running_softmax(
            q[..., None, :],  # [B, K, G, 1, H]
            cache,
            table,
            positions[:, None],
            blocks=_range(first, positions.max(), span, window),
            scale=scale,
            window=window,
            soft_cap=soft_cap,
        )[:, :, :, 0]

    def by_length(*rows):
        order = jnp.argsort(rows[-1])
        groups = [a[order].reshape(-1, _ALIKE, *a.shape[1:]) for a in rows]
        out = jax.lax.map(lambda group: together(*group), groups).reshape(q.shape)
        return jnp.zeros_like(out).at[order].set(out)

    rows = q, table, batch.positions
    if len(q) % _ALIKE or len(q) == _ALIKE:
        return together(*rows)
    return jax.lax.platform_dependent(*rows, cpu=by_length, default=together)


def _prefill(q, cache, batch, table, *, span, scale, window, soft_cap):
    """Tile by tile of a row's queries. Where a scored text shares all but its end with others, few
    of a large tile would be its own.
    """
    beyond = (0, _TILES[0])
    queries = jnp.pad(q, (beyond, (0, 0), (0, 0), (0, 0)))
    positions = jnp.pad(batch.positions, beyond, constant_values=-1)

    def one_tile(index, out, *, size, behind, origin):
        row = jnp.sum(index >= behind)  # behind: tiles up to the end of each row
        start = origin[row] + size * index
        tile, where, held = (
            jax.lax.dynamic_slice_in_dim(a, start, size) for a in (queries, positions, out)
        )
        where = jnp.where(start + jnp.arange(size) < batch.cu_q_lens[row + 1], where, -1)
        o = _running_softmax(
            tile.transpose(1, 2, 0, 3)[None],  # [1, K, G, size, H]
            cache,
            table[row][None],
            where[None],
            blocks=_range(where[0] - window, where.max(), span, window),
            scale=scale,
            window=window,
            soft_cap=soft_cap,
        )
        o = o[0].transpose(2, 0, 1, 3).astype(q.dtype)
        o = jnp.where((where >= 0)[:, None, None, None], o, held)
        return jax.lax.dynamic_update_slice(out, o, (start, 0, 0, 0))

    out = jnp.zeros(queries.shape, q.dtype)
    for size, first, count in _tiles(batch):
        behind = jnp.cumsum(count)
        origin = first - size * (behind - count)
        tile = functools.partial(one_tile, size=size, behind=behind, origin=origin)
        out = jax.lax.fori_loop(0, behind[-1], tile, out)
    return out[: q.shape[0]]


def _tiles(batch):
    """(queries of a tile, the first token of each row's tiles `[R]`, how many it has `[R]`), for
    each of `_TILES`. What a row has left is cut into whole tiles, and its end is one more where it
    fills more than half of it, or all of the smallest.
    """
    first = batch.cu_q_lens[:-1]
    left = jnp.where(batch.kv_lens > 0, batch.cu_q_lens[1:] - first, 0)
    for size in _TILES:
        least = 0 if size == _TILES[-1] else size // 2
        count = left // size + (left % size > least)
        yield size, first, count
        first, left = first + count * size, jnp.maximum(left - count * size, 0)


def _blocks(page_table, page_size, block):
    """The page table padded to whole blocks of about `block` tokens, `[R, blocks, pages of a
    block]`, and the tokens of one.
    """
    rows, width = page_table.shape
    pages = max(1, min(width, block // page_size))
    blocks = -(-width // pages)
    padded = jnp.pad(page_table, ((0, 0), (0, blocks * pages - width)))
    return padded.reshape(rows, blocks, pages), pages * page_size


def _range(oldest, newest, span, window):
    """First and one-past-last block that any query sees."""
    start = jnp.maximum(oldest + 1, 0) // span if is_limited(window) else 0
    return start, newest // span + 1


def _running_softmax(q, cache, table, positions, *, blocks, scale, window, soft_cap):
    """q `[R, K, G, M, H]` at positions `[R, M]` over the blocks of `table [R, blocks, pages]`:
    float32 like q.
    """
    pages, page_size = table.shape[2], cache.shape[3]
    exact = jax.lax.Precision.HIGHEST if cache.dtype == jnp.float32 else None
    dot = functools.partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    queries = jnp.repeat(q[:, None].astype(cache.dtype), pages, axis=1)
    halves = jax.tree.map(
        lambda a: a.reshape(-1, *a.shape[2:]), cache
    )  # a page's keys, then values
    inside = jnp.arange(pages * page_size).reshape(pages, page_size)
    newest = positions.max(axis=1)[:, None, None]

    def visit(block, carry):
        top, total, out = carry
        ids = 2 * jax.lax.dynamic_index_in_dim(table, block, axis=1, keepdims=False)
        k, v = (  # [R, pages, K, Z, H]
            decode(
                jax.tree.map(lambda a, side=side: jnp.take(a, side, axis=0, mode="clip"), halves)
            )
            for side in (ids, ids + 1)
        )
        scores = scale * dot("rpkgmh,rpkzh->rpkgmz", queries, k)
        if soft_cap:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        places = block * pages * page_size + inside
        # Behind a row's last token a page may hold anything, and 0 * NaN is NaN.
        v = jnp.where((places <= newest)[:, :, None, :, None], v, 0)
        query = positions[:, None, :, None]
        seen = places[:, None] <= query  # [R, pages, M, Z]
        if is_limited(window):
            seen &= places[:, None] > query - window
        scores = jnp.where(seen[:, :, None, None], scores, MASKED)
        new_top = jnp.maximum(top, scores.max((1, 5)))
        weights = jnp.exp(scores - new_top[:, None, ..., None])
        keep = jnp.exp(top - new_top)
        values = dot("rpkgmz,rpkzh->rpkgmh", weights.astype(cache.dtype), v).sum(1)
        return new_top, total * keep + weights.sum((1, 5)), out * keep[..., None] + values

    lanes = q.shape[:-1]
    start = (jnp.full(lanes, MASKED), jnp.zeros(lanes), jnp.zeros(q.shape))
    _, total, out = jax.lax.fori_loop(*blocks, visit, start)
    return out / jnp.maximum(total, 1e-30)[..., None]
