"""The XLA attention backend against the plain reference: ragged prefill, decode, windows, caps,
idle rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_jax.kernels import attention_reference, attention_xla
from lepton_jax.kernels.attention import PagedBatch, backend_for, decode_batch

K, G, H, Z, W, PAGES = 2, 3, 16, 8, 40, 110


def filled_cache(rng, dtype, *, table, lengths):
    """NaN but for the rows' tokens; token-major, as the reference keeps it: [P, Z, 2, K, H]."""
    known = np.zeros((PAGES, Z), bool)
    for pages, length in zip(np.asarray(table), np.asarray(lengths), strict=True):
        places = np.arange(length)
        known[pages[places // Z], places % Z] = True
    values = rng.normal(size=(PAGES, Z, 2, K, H))
    filled = np.where(known[:, :, None, None, None], values, np.nan)
    return filled.astype(np.float32).astype(jnp.dtype(dtype))


def page_table(rng, rows):
    return np.int32(rng.permutation(np.arange(1, PAGES))[: rows * 20].reshape(rows, 20))


def prefill_batch(rng, spans, tile, tokens=352):
    """Chunks (start, length) packed at multiples of the tile, and padding up to `tokens`."""
    positions, rows, ends, cu = [], [], [], [0]
    for row, (start, length) in enumerate(spans):
        padded = -(-length // tile) * tile
        positions += [*range(start, start + length), *[-1] * (padded - length)]
        rows += [row] * padded
        ends.append(start + length)
        cu.append(len(positions))
    positions += [-1] * (tokens - len(positions))
    rows += [0] * (tokens - len(rows))
    return PagedBatch(
        *(np.int32(a) for a in (positions, rows)),
        page_table(rng, len(spans)),
        *(np.int32(a) for a in (ends, cu, [len(spans)])),
    )


@functools.cache
def program(backend, decode, soft_cap, window=None):
    """Writes and attends; any window may come with the call where none is given."""

    @jax.jit
    def run(cache, q, k, v, batch, size):
        cache, size = backend.write(cache, k, v, batch), size if window is None else window
        options = dict(decode=decode, scale=0.3, window=size, soft_cap=soft_cap)
        return backend.attend(q, cache, batch, **options)

    return run


def test_rows_are_cut_into_large_tiles_and_their_ends_into_small_ones():
    queries = np.int32([0, 1, 8, 9, 16, 17, 64, 65, 128, 150, 250, 300])
    batch = dataclasses.replace(
        prefill_batch(np.random.default_rng(0), [(0, 1)], 1),
        cu_q_lens=np.append(0, np.cumsum(queries)),
        kv_lens=queries,
    )
    cut = {
        size: (first.tolist(), count.tolist()) for size, first, count in attention_xla._tiles(batch)
    }
    assert cut[128][1] == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert cut[32][1] == [0, 0, 0, 0, 0, 1, 2, 0, 0, 1, 0, 1]
    assert cut[8][1] == [0, 1, 1, 2, 2, 0, 0, 0, 0, 0, 0, 2]
    ends = np.array(cut[8][0]) + 8 * np.array(cut[8][1])
    assert (ends >= batch.cu_q_lens[1:]).all()


LIMITS = [(0, 0.0), (5, 0.0), (40, 0.0), (0, 2.0), (9, 3.0)]  # windows and soft caps
UNLIMITED = 1000


@pytest.mark.parametrize(
    ("window", "soft_cap", "dtype"),
    [*((*limits, "float32") for limits in LIMITS), (0, 0.0, "bfloat16"), (9, 3.0, "bfloat16")],
)
@pytest.mark.parametrize("kind", ["decode", "packed", "aligned", "full"])
def test_matches_reference(kind, window, soft_cap, dtype):
    rng, decode = np.random.default_rng(0), kind == "decode"
    if decode:
        lengths = jnp.asarray([0, 3, 150, 64, 7], jnp.int32)
        rng_table = np.concatenate([page_table(rng, 4), np.zeros((1, 20), np.int32)])
        batch = decode_batch(lengths, np.array([1, 1, 1, 1, 0], bool), rng_table)
    elif kind == "full":  # tiles of 128 that the next row lies in, and that end behind the batch
        batch = prefill_batch(rng, [(40, 100), (34, 66), (0, 70)], 1, tokens=236)
    else:
        spans = [(0, 150), (130, 20), (0, 1), (31, 2), (3, 47)]
        batch = prefill_batch(rng, spans, attention_xla.Q_TILE if kind == "packed" else 32)
    tokens = batch.positions.shape[0]
    q = np.float32(rng.normal(size=(tokens, K, G, H)))
    new = [np.float32(rng.normal(size=(tokens, K, H))) for _ in range(2)]

    def run(backend, call):
        filled = dict(table=batch.page_table, lengths=batch.kv_lens)
        cache = filled_cache(np.random.default_rng(1), dtype, **filled)
        if backend is attention_xla:
            cache = cache.transpose(0, 2, 3, 1, 4)
        assert cache.shape == backend.cache_layer(PAGES, Z, K, H, dtype=dtype).shape
        return call(cache, q, *new, batch, window or UNLIMITED)

    got = run(attention_xla, program(attention_xla, decode, soft_cap, window))
    expected = run(attention_reference, program(attention_reference, decode, soft_cap))
    np.testing.assert_allclose(got, expected, atol=2e-6 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (9, 3.0)])
def test_rows_that_are_visited_with_others_as_long_get_what_they_get_alone(window, soft_cap):
    rng = np.random.default_rng(3)
    lengths = np.int32([150, 3, 64, 7, 0, 1, 159, 80, 2, 2, 9, 30, 31, 32, 33, 100])
    idle = np.arange(16) % 5 == 4
    table = np.int32(rng.integers(1, PAGES, (16, 20)))
    cache = np.float32(rng.normal(size=(PAGES, 2, K, Z, H)))
    q = np.float32(rng.normal(size=(16, K, G, H)))
    options = dict(decode=True, scale=0.3, window=window, soft_cap=soft_cap)
    attend = jax.jit(functools.partial(attention_xla.attend, **options))
    got = attend(q, cache, decode_batch(jnp.asarray(lengths), ~idle, table))
    one = jax.jit(
        lambda q, n, table: attend(q[None], cache, decode_batch(n[None], True, table[None]))
    )
    for row in np.flatnonzero(~idle):
        alone = one(q[row], lengths[row], table[row])[0]
        np.testing.assert_allclose(got[row], alone, atol=2e-6)
    np.testing.assert_array_equal(got[idle], 0)


def test_idle_rows_change_nothing_but_the_null_page():
    rng = np.random.default_rng(0)
    table, lengths = page_table(rng, 2), np.int32([9, 4])
    filled = filled_cache(rng, "float32", table=table, lengths=lengths)
    cache = filled.transpose(0, 2, 3, 1, 4)
    batch = decode_batch(lengths, np.array([False, False]), table)
    q, new = (np.ones(shape, np.float32) for shape in ((2, K, G, H), (2, K, H)))
    written = np.asarray(jax.jit(attention_xla.write)(cache, new, new, batch))
    np.testing.assert_array_equal(written[1:], cache[1:])
    attend = functools.partial(attention_xla.attend, decode=True, scale=1.0)
    np.testing.assert_array_equal(jax.jit(attend)(q, cache, batch), 0)


def test_cpu_and_gpu_share_a_backend():
    assert backend_for("cpu") is backend_for("gpu") is attention_xla


@pytest.mark.parametrize("decode", [True, False])
def test_other_blocks_visit_other_places_and_give_the_same(decode):
    rng = np.random.default_rng(0)
    lengths = np.int32([150, 3, 64, 7])
    batch = decode_batch(jnp.asarray(lengths), True, page_table(rng, 4))
    if not decode:
        batch = prefill_batch(rng, [(0, 70), (130, 20), (31, 2)], 8)
    filled = dict(table=batch.page_table, lengths=batch.kv_lens)
    cache = filled_cache(rng, "float32", **filled).transpose(0, 2, 3, 1, 4)
    q = np.float32(rng.normal(size=(len(batch.positions), K, G, H)))
    attend = functools.partial(attention_xla.attend, decode=decode, scale=0.3)
    want, texts = jax.jit(attend)(q, cache, batch), set()
    for block in (2 * Z, 64, 256):
        backend = backend_for("cpu", block)
        blocked = jax.jit(functools.partial(backend.attend, decode=decode, scale=0.3))
        np.testing.assert_allclose(blocked(q, cache, batch), want, atol=2e-6)
        texts.add(blocked.lower(q, cache, batch).as_text())
        assert backend.Q_TILE == attention_xla.Q_TILE and str(block) in backend.__name__
    assert len(texts) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (9, 3.0)])
def test_a_view_verifies_several_tokens_a_row(window, soft_cap, dtype):
    """Two steps of three tokens on a view, of which rows keep different numbers."""
    rng, view, new = np.random.default_rng(0), 96, 3
    lengths, kept = np.array([1, 3, 90, 64]), np.array([[1, 2], [3, 3], [2, 1], [1, 1]])
    table = page_table(rng, 4)
    cache = filled_cache(rng, dtype, table=table, lengths=lengths)
    ours = cache.transpose(0, 2, 3, 1, 4)
    opened = functools.partial(attention_xla.open_view, tokens=view, steps=2 * new)
    sides = jax.jit(opened)(ours, table, np.int32(lengths))
    places = np.maximum(np.arange(view) - view + lengths[:, None], -1)
    places = np.pad(places, ((0, 0), (0, 2 * new)), constant_values=-1)
    options = dict(scale=0.3, window=window, soft_cap=soft_cap)
    verify = jax.jit(functools.partial(attention_xla.verify_view, **options))

    @jax.jit
    def reference(q, k, v, cache, batch):
        cache = attention_reference.write(cache, k, v, batch)
        return attention_reference.attend(q, cache, batch, decode=False, **options), cache

    for step in range(2):
        positions = lengths[:, None] + np.arange(new)
        q = np.float32(rng.normal(size=(4 * new, K, G, H)))
        k, v = (np.float32(rng.normal(size=(4 * new, K, H))) for _ in range(2))
        begin = view + step * new
        places[:, begin : begin + new] = positions
        span = tuple(np.int32(a) for a in (places, positions, begin, 0))
        got, sides = verify(q, k, v, sides, span=span)
        batch = PagedBatch(
            *(np.int32(a) for a in (positions.ravel(), np.repeat(range(4), new))),
            table,
            *(np.int32(a) for a in (lengths + new, np.arange(5) * new, [4])),
        )
        want, cache = reference(q, k, v, cache, batch)
        np.testing.assert_allclose(got, want, atol=2e-6 if dtype == "float32" else 2e-2)
        places[:, begin : begin + new][np.arange(new) >= kept[:, step, None]] = -1
        lengths = lengths + kept[:, step]
