"""Attention on TPU: jax's Pallas kernel `ragged_paged_attention`, fitted to our paged cache.

Here: the cache layout the kernel reads, padding of heads to what it can tile, its block sizes, and
the in-place write. Not here: int8 caches with their scales, which have a kernel of our own
(`attention_tpu_int8.py`; jax's takes one constant for a whole cache, so float8 is stored as it is).
To compile without a TPU, lower in `jax.sharding.use_abstract_mesh` or `shard_map` over topology
devices, which tell Pallas the chip (`tests/tpu_topology.py`).

Heads up to 128 wide: [P, Z, 2K, H], a head's key and value side by side, H padded to 128 and K to
1, 2, 4 or a multiple of 8; zeros appended to q, k and v change no score. Wider heads (Gemma's 256)
are refused when they share a page, so each kv head then has pages of its own, [K * P, Z, 2, H],
head h's page p at h * P + p, and a device loop calls the kernel once per kv head.
Read next: `attention_reference.py`, which says the same in a few lines of jnp.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax import compat
from lepton_jax.kernels import attention_tpu_int8 as with_scales
from lepton_jax.kernels.attention import PagedBatch
from lepton_jax.kernels.attention_reference import slots, valid_tokens
from lepton_jax.kernels.kv_cache import KV, QuantizedKV
from lepton_jax.tensors import ParamSpec, vector_memory

Q_TILE = 1  # sequences of a prefill may start at any token

LANES = 128  # of a TPU vector register; the kernel reads a head's key as whole registers
CACHE_DTYPES = ("bfloat16", "float32", "float8_e4m3fn")

# Block sizes. jax's table of sizes tuned on v6e mostly takes 1,024 cached tokens in at most 16
# pages (more spill the scalar registers), and 32 query tokens, or 64 where there are few heads.
BLOCKS = (1024, 512, 2048)
KV_BLOCK_PAGES = 16
KV_BLOCK_BYTES = 8 * 2**20  # for both halves of the double buffer
# A block of queries is computed in full for every row with a token in it. In decode that is one
# token a row, so blocks are small: 32 lines (tokens times G) still fill two bf16 registers.
DECODE_BLOCK_LINES = 32


def cache_layer(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, *, dtype: Any
) -> ParamSpec | QuantizedKV:
    """One layer's cache, K and H padded: [P, Z, 2K, H]; wide heads [K * P, Z, 2, H].

    Raises:
      ValueError: the kernel can't read this dtype, or not at this head_dim or page size.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.int8:
        layer = with_scales.cache_layer(num_pages, page_size, num_kv_heads, head_dim, dtype=dtype)
        _check_that_it_pays(page_size, num_kv_heads, head_dim)
        return layer
    _check_dtype(dtype, num_kv_heads, head_dim)
    lanes = _padded_head_dim(head_dim)
    if _has_own_pages(num_kv_heads, head_dim):
        axes = ("kv_heads", "page_tokens", "sides", "head_dim")  # a head's pages side by side
        return ParamSpec((num_kv_heads * num_pages, page_size, 2, lanes), dtype, axes)
    shape = (num_pages, page_size, 2 * _padded_kv_heads(num_kv_heads), lanes)
    return ParamSpec(shape, dtype, ("pages", "page_tokens", "kv_heads", "head_dim"))


def write(cache: KV, k: jax.Array, v: jax.Array, batch: PagedBatch) -> KV:
    """Stores k and v, both [T, K, H], at the tokens' places: a scatter, in place if donated.

    Padding and the tokens of idle rows go to page 0.
    """
    if isinstance(cache, QuantizedKV):
        return with_scales.write(cache, k, v, batch)
    tokens, num_kv_heads, head_dim = k.shape
    pages, page_size, _, lanes = cache.shape
    kv = jnp.stack([k, v], axis=2)  # [T, K, 2, H]
    if cache.dtype == jnp.float8_e4m3fn:
        most = float(jnp.finfo(cache.dtype).max)
        kv = jnp.clip(kv, -most, most)  # what is larger would become NaN
    kv = kv.astype(cache.dtype)
    page, place = slots(batch, page_size)
    flat = page * page_size + place  # one index per token: XLA's cheapest scatter
    if _has_own_pages(num_kv_heads, head_dim):
        head_start = jnp.arange(num_kv_heads) * (pages // num_kv_heads * page_size)
        flat = flat[:, None] + head_start[None, :]
        kv = _pad(kv, 3, lanes)
    else:
        kv = _pad(_pad(kv, 1, _padded_kv_heads(num_kv_heads)), 3, lanes).reshape(tokens, -1, lanes)
    places = cache.reshape(pages * page_size, -1, lanes)
    return places.at[flat].set(kv).reshape(cache.shape)


def attend(
    q: jax.Array,
    cache: KV,
    batch: PagedBatch,
    *,
    decode: bool,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    block: int = 0,
) -> jax.Array:
    """Attention of q [T, K, G, H] over the cache; returns [T, K, G, H] in q's dtype.

    Meaning as in `attention_reference.attend`; each of the `num_seqs` sequences needs a query
    token. `block` cached tokens are fetched at a time, as far as vector memory has room. The kernel
    multiplies in the cache's dtype, a float8 cache in bfloat16, and sums in float32.
    """
    if isinstance(cache, QuantizedKV):
        options = dict(scale=scale, window=window, soft_cap=soft_cap, block=block)
        return with_scales.attend(q, cache, batch, decode=decode, **options)
    tokens, num_kv_heads, group, head_dim = q.shape
    narrow = cache.dtype == jnp.float8_e4m3fn
    pages, page_size, combined, lanes = cache.shape
    kv_lens, page_table, cu_q_lens, num_seqs = _sequences(batch, decode)
    pages_at_once = _pages_per_block(
        block, page_size, page_size * combined * lanes * cache.dtype.itemsize
    )
    options = dict(
        sm_scale=scale,
        sliding_window=window or None,
        soft_cap=soft_cap or None,
        k_scale=1.0 if narrow else None,  # with a scale the kernel widens to q's dtype
        v_scale=1.0 if narrow else None,
        num_kv_pages_per_block=min(page_table.shape[1], pages_at_once),
        num_queries_per_block=_queries_per_block(tokens, combined // 2, group, decode),
        vmem_limit_bytes=vector_memory.claim(),
    )
    kernel = functools.partial(_jax_kernel, options=tuple(options.items()))
    padded = _pad(q.astype(jnp.bfloat16 if narrow else cache.dtype), 3, lanes)
    if _has_own_pages(num_kv_heads, head_dim):

        def one_head(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
            head, q_head = operands  # i32[], [T, G, H]
            table = page_table + head * (pages // num_kv_heads)
            return kernel(q_head, cache, kv_lens, table, cu_q_lens, num_seqs)

        heads = jnp.arange(num_kv_heads, dtype=jnp.int32)
        out = jax.lax.map(one_head, (heads, padded.swapaxes(0, 1))).swapaxes(0, 1)
    else:
        padded = _pad(padded, 1, combined // 2)
        flat = padded.reshape(tokens, -1, lanes)
        out = kernel(flat, cache, kv_lens, page_table, cu_q_lens, num_seqs).reshape(padded.shape)
    out = out[:, :num_kv_heads, :, :head_dim].astype(q.dtype)
    # Blocks past the last sequence are never computed: their memory may hold anything.
    return jnp.where(valid_tokens(batch)[:, None, None, None], out, 0)


@functools.partial(jax.jit, static_argnames="options")  # traced once for all layers
def _jax_kernel(q: jax.Array, cache: jax.Array, *sequences: jax.Array, options: tuple) -> jax.Array:
    """jax's kernel, over a cache that XLA doesn't move to vector memory, where a small one fits."""
    kernel = compat.ragged_paged_attention().__wrapped__
    return kernel(q, vector_memory.kept_out(cache), *sequences, **dict(options))


def _sequences(batch: PagedBatch, decode: bool) -> tuple[jax.Array, ...]:
    """(kv_lens, page_table, cu_q_lens, num_seqs) as the kernel wants them.

    It fetches a row's first pages ahead, even for a row without cached tokens, which then never
    collects them, and the next row takes them for its own: idle rows read one token of page 0.
    """
    idle = batch.kv_lens <= 0
    kv_lens = jnp.where(idle, 1, batch.kv_lens)
    page_table = jnp.where(idle[:, None], 0, batch.page_table)
    if not decode:
        return kv_lens, page_table, batch.cu_q_lens, batch.num_seqs
    rows = batch.kv_lens.shape[0]
    return kv_lens, page_table, jnp.arange(rows + 1, dtype=jnp.int32), jnp.array([rows], jnp.int32)


def _pages_per_block(block: int, page_size: int, page_bytes: int) -> int:
    """Pages fetched at a time, within KV_BLOCK_BYTES: of `block` tokens, or where that is 0 of
    BLOCKS[0], within KV_BLOCK_PAGES.
    """
    pages = block // page_size if block else min(BLOCKS[0] // page_size, KV_BLOCK_PAGES)
    return max(1, min(pages, KV_BLOCK_BYTES // (2 * page_bytes)))


def _queries_per_block(tokens: int, num_kv_heads: int, group: int, decode: bool) -> int:
    if decode:
        return max(1, min(tokens, DECODE_BLOCK_LINES // group))
    return min(tokens, 32 if num_kv_heads * group > 8 else 64)


def _has_own_pages(num_kv_heads: int, head_dim: int) -> bool:
    """Whether each kv head has pages of its own: several heads, wider than a register."""
    return head_dim > LANES and num_kv_heads > 1


def _padded_head_dim(head_dim: int) -> int:
    return -(-head_dim // LANES) * LANES


def _padded_kv_heads(num_kv_heads: int) -> int:
    """The next K whose 2K lines tile 16- and 32-bit registers: 1, 2, 4 or a multiple of 8."""
    return next((n for n in (1, 2, 4) if n >= num_kv_heads), -(-num_kv_heads // 8) * 8)


def _pad(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros behind `array` along `axis` up to `size`."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths)


def _check_that_it_pays(page_size: int, num_kv_heads: int, head_dim: int) -> None:
    """Raises ValueError where int8 saves nothing, with the page size from which on it does."""

    def share(size: int) -> float:
        narrow = with_scales.cache_layer(1, size, num_kv_heads, head_dim, dtype=jnp.int8)
        wide = cache_layer(1, size, num_kv_heads, head_dim, dtype=jnp.bfloat16)
        return sum(spec.nbytes for spec in jax.tree.leaves(narrow)) / wide.nbytes

    if share(page_size) < 1:
        return
    pays = next(size for size in (8, 16, 32, 64, LANES) if share(size) < 1)
    raise ValueError(
        f"an int8 cache in pages of {page_size} tokens would take {share(page_size):.0%} of what "
        "bfloat16 takes, since on TPU each page's scales fill whole registers: set "
        f"engine.page_size to {pays} or more, or engine.kv_dtype to bfloat16"
    )


def _check_dtype(dtype: jnp.dtype, num_kv_heads: int, head_dim: int) -> None:
    if dtype.name not in CACHE_DTYPES:
        raise ValueError(
            f"attention on TPU reads caches in {', '.join(CACHE_DTYPES)} or int8, not in "
            f"{dtype.name}: set engine.kv_dtype to one of these"
        )
    if dtype == jnp.float32 and head_dim > LANES:
        raise ValueError(
            f"attention on TPU reads no float32 cache at head_dim {head_dim} (kv_heads "
            f"{num_kv_heads}): float32 heads go up to {LANES}. Set engine.kv_dtype to bfloat16"
        )
    if dtype == jnp.float8_e4m3fn and (num_kv_heads < 3 or head_dim > LANES):
        # 8-bit registers hold 4 heads or more: fewer, padded, would take what bfloat16 takes.
        raise ValueError(
            f"attention on TPU reads no float8 cache at head_dim {head_dim} with {num_kv_heads} "
            f"kv heads on a device: it needs 3 or more, up to {LANES} wide. Set engine.kv_dtype "
            "to bfloat16"
        )
