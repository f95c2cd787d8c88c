"""Attention on TPU over int8 caches with a scale for each token and head: layout, writes, tiles.

Caches of plain numbers are `attention_tpu.py`'s, which jax's kernel reads; this one's kernel is
`attention_tpu_kernel.py`. A tile is some queries of one row, so that the kernel reads one row's
pages for it, and of these no block that is after its queries or before their window, nor anything
of idle rows.

Layout: a head of up to 128 lanes is one line, a wider one several; a pair is a line of a key and
that of its value, two pairs share the words of 32 bits. The X pairs of a token, heads outermost,
are padded to 1, 2, 4, 8 or a multiple of 16: [P, Z, 2X, 128], and where 2X is less than 8 as many
tokens together as make 8 lines. Scales are [P, 2K, Z] with both padded to whole registers, a head's
key before its value; where two tokens share a word [P, 2 * 2K, Z/2], the even ones first.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.kernels import attention_tpu_kernel as kernel
from lepton_jax.kernels.attention import PagedBatch
from lepton_jax.kernels.attention_reference import valid_tokens
from lepton_jax.kernels.attention_tpu_kernel import LANES, SUBLANES, Heads, Schedule
from lepton_jax.kernels.kv_cache import QuantizedKV, encode
from lepton_jax.tensors import ParamSpec

BLOCK, PART = 1024, 256  # cached tokens fetched, and worked on, at a time
BLOCK_BYTES = 8 * 2**20  # of vector memory, for both halves of the double buffer
TILE_LINES = 128  # queries of a tile times G; as many fill a matrix unit
MOST_QUERIES = 32  # of a tile: rows are padded to whole ones
MOST_PADDING = 4  # times a batch's tokens, the queries of as many tiles as it has rows


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a token lies, see above.

    Attributes:
      head_lines: of a head.
      token_lines: of a token, 2X.
      together: tokens whose lines fill 8.
      phases: tokens that share a word.
    """

    head_lines: int
    token_lines: int
    together: int
    phases: int

    @classmethod
    def of(cls, num_kv_heads: int, head_dim: int) -> "_Layout":
        head_lines = -(-head_dim // LANES)
        pairs = num_kv_heads * head_lines
        padded = next((n for n in (1, 2, 4, 8) if n >= pairs), _whole(pairs, 16))
        return cls(head_lines, 2 * padded, max(1, 4 // padded), 2 if padded == 1 else 1)


def cache_layer(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, *, dtype: Any
) -> QuantizedKV:
    """One layer's cache as ParamSpecs, in the layout above.

    Raises:
      ValueError: pages of this size don't fill registers.
    """
    dtype = jnp.dtype(dtype)
    if page_size < 4 or page_size & (page_size - 1):
        raise ValueError(
            f"attention on TPU reads {dtype.name} caches in pages of 4, 8, 16, 32, 64, 128, ... "
            f"tokens, not of {page_size}: set engine.page_size to one of these"
        )
    layout = _Layout.of(num_kv_heads, head_dim)
    lines = layout.token_lines * layout.together
    values = num_pages, page_size // layout.together, lines, LANES
    scale = (
        _whole(layout.phases * 2 * num_kv_heads, SUBLANES),
        _whole(page_size // layout.phases, LANES),
    )
    return QuantizedKV(
        ParamSpec(values, dtype, ("pages", "page_tokens", "kv_heads", "head_dim")),
        ParamSpec(
            (num_pages, *scale), jnp.dtype(jnp.float32), ("pages", "kv_heads", "page_tokens")
        ),
    )


def write(cache: QuantizedKV, k: jax.Array, v: jax.Array, batch: PagedBatch) -> QuantizedKV:
    """Stores k and v, both [T, K, H], at the tokens' places, in place if donated: what lies
    together is read, changed and written as a whole.

    A scatter of single lanes or of parts of registers XLA makes in a loop, or turns the array over
    for. Padding and the tokens of idle rows are dropped.
    """
    tokens, num_kv_heads, head_dim = k.shape
    pages, groups, _, _ = cache.values.shape
    layout = _Layout.of(num_kv_heads, head_dim)
    page_size = groups * layout.together
    touched = functools.partial(_touched, batch, tokens=tokens, page_size=page_size)
    new = encode(jnp.stack([k, v], axis=2), cache)  # [T, K, 2, H] and [T, K, 2]

    group = touched(layout.together)
    lines = _in_lines(new.values).swapaxes(2, 3).reshape(tokens, -1, LANES)
    lines = _pad(lines, 1, layout.token_lines)[group.tokens].reshape(len(group.page), -1, LANES)
    changed = jnp.repeat(group.new, layout.token_lines, axis=1)[..., None]
    if layout.together == 1:
        changed = None  # a token that isn't new goes to page 0, which nobody reads
    values = cache.values.reshape(pages * groups, -1, LANES)
    values = _changed(values, group.page * groups + group.place, lines, changed)

    page, like = touched(page_size), cache.scale.shape[1:]
    scale = new.scale.reshape(tokens, -1).astype(jnp.float32)[page.tokens]  # [pages, Z, 2K]
    changed = jnp.broadcast_to(page.new[..., None], scale.shape)
    scale, changed = (_by_phase(array, layout.phases, like) for array in (scale, changed))
    scales = _changed(cache.scale, page.page, scale, changed)
    return QuantizedKV(values.reshape(cache.values.shape), scales)


def _by_phase(scale: jax.Array, phases: int, like: tuple[int, int]) -> jax.Array:
    """`[pages, Z, 2K]` as held, `[pages, phases * 2K, Z / phases]` padded to `like`."""
    pages, tokens, _ = scale.shape
    by_line = scale.reshape(pages, tokens // phases, -1).swapaxes(1, 2)
    return _pad(_pad(by_line, 1, like[0]), 2, like[1])


def _changed(
    held: jax.Array, index: jax.Array, fresh: jax.Array, changed: jax.Array | None
) -> jax.Array:
    """`held` with what is `changed` of the things at these indices; None: all of them."""
    if changed is not None:
        fresh = jnp.where(changed, fresh, held[index])
    return held.at[index].set(fresh)


class _Touched(NamedTuple):
    """Some consecutive tokens' places each, which a batch writes to.

    Attributes:
      page: int32 `[n]`; `place` among those of the page; page 0 where nothing is new.
      tokens: int32 `[n, places]`, of the batch; `new` whether it is there.
    """

    page: jax.Array
    place: jax.Array
    tokens: jax.Array
    new: jax.Array


def _touched(batch: PagedBatch, places: int, *, tokens: int, page_size: int) -> _Touched:
    """What a batch of so many tokens touches, `places` of a page at a time."""
    rows = batch.kv_lens.shape[0]
    counts = jnp.diff(batch.cu_q_lens)
    first, last = batch.kv_lens - counts, batch.kv_lens - 1
    each = jnp.where(_used(batch), last // places - first // places + 1, 0)
    row, index, alive = _dealt(each, min(tokens, tokens // places + 2 * rows))
    position = (first[row] // places + index)[:, None] * places + jnp.arange(places)
    ahead = position - first[row][:, None]
    token = jnp.clip(batch.cu_q_lens[row][:, None] + ahead, 0, tokens - 1)
    new = alive[:, None] & (ahead >= 0) & (position <= last[row][:, None])
    new &= valid_tokens(batch)[token]
    page = batch.page_table[row, position[:, 0] // page_size]
    place = position[:, 0] % page_size // places
    return _Touched(jnp.where(jnp.any(new, axis=1), page, 0), place, token, new)


def attend(
    q: jax.Array,
    cache: QuantizedKV,
    batch: PagedBatch,
    *,
    decode: bool,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    block: int = 0,
) -> jax.Array:
    """Attention of q [T, K, G, H] over the cache; returns [T, K, G, H] in q's dtype.

    Meaning as in `attention_reference.attend`; q, keys, values and weights are multiplied in
    bfloat16 and summed in float32. `block` cached tokens are fetched at a time, 0: BLOCK.
    """
    tokens, num_kv_heads, group, head_dim = q.shape
    layout = _Layout.of(num_kv_heads, head_dim)
    page_size = cache.values.shape[1] * layout.together
    rows, width = batch.page_table.shape
    size = 1 if decode else _tile_size(tokens, rows, group)
    tiles = _tiles(batch, tokens, size, decode=decode)
    heads = Heads(
        count=num_kv_heads,
        lines=layout.head_lines,
        group=group,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        page_size=page_size,
        **_pages_at_a_time(block or BLOCK, page_size, cache, width=width, phases=layout.phases),
        phases=layout.phases,
    )
    lines = _in_lines(q.astype(jnp.bfloat16)[tiles.tokens])  # [M, size, K, G, A, 128]
    lines = jnp.moveaxis(lines, (2, 4), (1, 2)).reshape(len(tiles.row), -1, size * group, LANES)
    schedule = tiles.schedule(heads.span, window)
    out = kernel.attend_tiles(lines, cache, schedule, batch.page_table, heads=heads)
    out = out.reshape(-1, num_kv_heads, heads.lines, size, group, LANES)
    out = out[tiles.owner, :, :, tiles.place].swapaxes(2, 3)  # [T, K, G, A, 128]
    out = out.reshape(tokens, num_kv_heads, group, -1)[..., :head_dim].astype(q.dtype)
    return jnp.where(valid_tokens(batch)[:, None, None, None], out, 0)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """How a batch is cut into M tiles of so many queries, the last of a row's filled up.

    Attributes:
      row: int32 `[M]`; `first` the position of its first query, `stop` that after its last one;
        equal where the tile isn't used.
      tokens: int32 `[M, size]`, the token at each place.
      owner: int32 `[T]`, each token's tile; `place` where it is there.
      count: int32 `[]`, of tiles, the others come behind.
    """

    row: jax.Array
    first: jax.Array
    stop: jax.Array
    tokens: jax.Array
    owner: jax.Array
    place: jax.Array
    count: jax.Array

    def schedule(self, span: int, window: int) -> Schedule:
        """What the kernel visits, in blocks of `span` cached tokens."""
        used = self.stop > self.first
        nearest = jnp.maximum(self.first - window + 1, 0) if window else 0
        begin = jnp.where(used, nearest // span, 0)
        end = jnp.where(used, -(-self.stop // span), 0)
        count, tiles = end - begin, used.shape[0]
        index = jnp.where(used, jnp.arange(tiles), tiles)
        following = jnp.append(jax.lax.cummin(index, reverse=True), tiles)
        before, tiles = jnp.cumsum(count) - count, self.count[None]
        pieces = self.row, self.first, self.stop, begin, end, before, following, tiles
        return Schedule(*(piece.astype(jnp.int32) for piece in pieces))


def _used(batch: PagedBatch) -> jax.Array:
    """bool `[R]`: the rows that have tokens in the batch."""
    return (batch.kv_lens > 0) & (jnp.arange(batch.kv_lens.shape[0]) < batch.num_seqs[0])


def _dealt(counts: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first `most` of all rows' things, of which row r has `counts[r]`, one after the other:
    whose each is, which of the row's, and whether there are so many.
    """
    ends, index = jnp.cumsum(counts), jnp.arange(most)
    row = jnp.sum(ends <= index[:, None], axis=1)  # a search would be a loop on the device
    row = jnp.minimum(row, len(counts) - 1)
    return row, index - (ends - counts)[row], index < ends[-1]


def _tiles(batch: PagedBatch, tokens: int, size: int, *, decode: bool) -> _Tiles:
    if decode:
        row = place = jnp.arange(tokens)
        first = jnp.maximum(batch.kv_lens - 1, 0)
        return _Tiles(row, first, batch.kv_lens, row[:, None], row, 0 * place, jnp.int32(tokens))
    rows = batch.kv_lens.shape[0]
    starts, counts = batch.cu_q_lens[:-1], jnp.diff(batch.cu_q_lens)
    needed = jnp.where(_used(batch), -(-counts // size), 0)
    row, place, alive = _dealt(needed, min(tokens, tokens // size + rows))
    lengths = batch.kv_lens[row]
    first = jnp.maximum(lengths - counts[row] + place * size, 0)
    stop = jnp.where(alive, jnp.minimum(first + size, lengths), first)
    held = (starts[row] + place * size)[:, None] + jnp.arange(size)
    ahead = jnp.arange(tokens) - starts[batch.rows]
    owner = (jnp.cumsum(needed) - needed)[batch.rows] + ahead // size
    return _Tiles(
        row=row,
        first=first,
        stop=stop,
        tokens=jnp.clip(held, 0, tokens - 1),
        owner=jnp.clip(owner, 0, len(row) - 1),
        place=ahead % size,
        count=jnp.sum(needed),
    )


def _tile_size(tokens: int, rows: int, group: int) -> int:
    """Queries of a tile, a power of two: as many as fill a matrix unit, where rows have so many."""
    most = max(1, min(TILE_LINES // group, MOST_QUERIES, MOST_PADDING * tokens // rows))
    return 1 << (most.bit_length() - 1)


def _pages_at_a_time(
    block: int, page_size: int, cache: QuantizedKV, *, width: int, phases: int
) -> dict[str, int]:
    """Pages that are fetched and that are worked on at a time, whose scales fill registers."""
    fill = max(1, phases * LANES // page_size)
    page_bytes = sum(array[0].size * array.dtype.itemsize for array in jax.tree.leaves(cache))
    part = max(fill, PART // page_size // fill * fill)
    pages = min(block // page_size, -(-width // part) * part, BLOCK_BYTES // (2 * page_bytes))
    part = max(fill, min(part, pages // fill * fill))
    return dict(pages=max(part, pages // part * part), part=part)


def _in_lines(x: jax.Array) -> jax.Array:
    """`[..., H]` as `[..., lines, 128]`, zeros behind."""
    lines = -(-x.shape[-1] // LANES)
    return _pad(x, x.ndim - 1, lines * LANES).reshape(*x.shape[:-1], lines, LANES)


def _whole(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _pad(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros behind `array` along `axis` up to `size`."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths)
