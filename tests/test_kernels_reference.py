"""The reference attention against loops in numpy, one query and one head at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_jax.kernels import attention_reference as reference
from lepton_jax.kernels.attention import PagedBatch, decode_batch

PAGE, PAGES, K, G, H = 4, 12, 2, 3, 8
TABLE = np.array([[5, 2, 9], [7, 1, 4], [3, 8, 6]])
OPTIONS = [
    {"window": 0, "soft_cap": 0.0},
    {"window": 3, "soft_cap": 0.0},
    {"window": 0, "soft_cap": 2.0},
    {"window": 5, "soft_cap": 1.0},
]


def slow_attention(q, keys, values, position, *, scale, window, soft_cap):
    """One query q [H] at `position` over keys and values [S, H], by the definition."""
    first = max(0, position - window + 1) if window else 0
    scores = np.array([q @ keys[place] * scale for place in range(first, position + 1)])
    if soft_cap:
        scores = soft_cap * np.tanh(scores / soft_cap)
    weights = np.exp(scores) / np.exp(scores).sum()
    return sum(weight * values[first + offset] for offset, weight in enumerate(weights))


def paged(lengths, rng):
    """A cache that is NaN but for the rows' tokens, and their keys and values [rows][S, K, H]."""
    layer = reference.cache_layer(PAGES, PAGE, K, H, dtype=jnp.float32)
    cache = np.full(layer.shape, np.nan, np.float32)
    keys = [rng.normal(size=(length, K, H)).astype(np.float32) for length in lengths]
    values = [rng.normal(size=(length, K, H)).astype(np.float32) for length in lengths]
    for row, length in enumerate(lengths):
        for place in range(length):
            page = TABLE[row, place // PAGE]
            cache[page, place % PAGE, 0] = keys[row][place]
            cache[page, place % PAGE, 1] = values[row][place]
    return cache, keys, values


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prefill_over_pages(options):
    rng = np.random.default_rng(0)
    cache, keys, values = paged([9, 6, 12], rng)
    positions = np.array([5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 11, -1, -1])
    rows = np.array([0] * 4 + [1] * 6 + [2] + [0, 0])
    batch = PagedBatch(
        positions=jnp.asarray(positions, jnp.int32),
        rows=jnp.asarray(rows, jnp.int32),
        page_table=jnp.asarray(TABLE, jnp.int32),
        kv_lens=jnp.array([9, 6, 12], jnp.int32),
        cu_q_lens=jnp.array([0, 4, 10, 11], jnp.int32),
        num_seqs=jnp.array([3], jnp.int32),
    )
    q = rng.normal(size=(len(positions), K, G, H)).astype(np.float32)
    out = np.asarray(
        reference.attend(jnp.asarray(q), cache_of(cache), batch, decode=False, scale=0.7, **options)
    )
    assert not out[-2:].any()
    for token, (row, position) in enumerate(zip(rows[:-2], positions[:-2], strict=True)):
        assert_token(out[token], q[token], keys[row], values[row], position, scale=0.7, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decode_over_pages_with_an_idle_row(options):
    rng = np.random.default_rng(1)
    cache, keys, values = paged([9, 0, 12], rng)
    lengths, active = jnp.array([8, 5, 11], jnp.int32), jnp.array([True, False, True])
    batch = decode_batch(lengths, active, jnp.asarray(TABLE, jnp.int32))
    q = rng.normal(size=(3, K, G, H)).astype(np.float32)
    out = np.asarray(
        reference.attend(jnp.asarray(q), cache_of(cache), batch, decode=True, scale=0.7, **options)
    )
    assert not out[1].any()
    for row, position in ((0, 8), (2, 11)):
        assert_token(out[row], q[row], keys[row], values[row], position, scale=0.7, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_whole_sequence_without_a_cache(options):
    rng = np.random.default_rng(2)
    q = rng.normal(size=(10, K, G, H)).astype(np.float32)
    k, v = (rng.normal(size=(10, K, H)).astype(np.float32) for _ in range(2))
    marker = object()
    out, cache = reference.causal_attend(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), marker, scale=0.4, **options
    )
    assert cache is marker
    for token in range(10):
        assert_token(np.asarray(out[token]), q[token], k, v, token, scale=0.4, **options)


def test_write_places_tokens_and_sends_the_rest_to_the_null_page():
    # Row 0 takes its 7th token, row 1 is idle by its position, row 2 by its length.
    batch = PagedBatch(
        positions=jnp.array([6, -1, 2], jnp.int32),
        rows=jnp.arange(3, dtype=jnp.int32),
        page_table=jnp.asarray(TABLE, jnp.int32),
        kv_lens=jnp.array([7, 3, 0], jnp.int32),
        cu_q_lens=jnp.arange(4, dtype=jnp.int32),
        num_seqs=jnp.array([3], jnp.int32),
    )
    k = jnp.arange(3 * K * H, dtype=jnp.float32).reshape(3, K, H) + 1
    cache = zeros(reference.cache_layer(PAGES, PAGE, K, H, dtype=jnp.bfloat16))
    written = np.asarray(reference.write(cache, k, -k, batch), np.float32)
    np.testing.assert_array_equal(written[2, 2, 0], np.asarray(k[0]))
    np.testing.assert_array_equal(written[2, 2, 1], -np.asarray(k[0]))
    elsewhere = written[1:].copy()
    elsewhere[1, 2] = 0
    assert not elsewhere.any()


def test_output_keeps_the_dtype_of_the_query():
    rng = np.random.default_rng(3)
    cache, _, _ = paged([4, 4, 4], rng)
    lengths = jnp.array([3, 3, 3], jnp.int32)
    batch = decode_batch(lengths, lengths > 0, jnp.asarray(TABLE, jnp.int32))
    q = jnp.ones((3, K, G, H), jnp.bfloat16)
    out = reference.attend(q, cache_of(cache), batch, decode=True, scale=1.0)
    assert out.dtype == jnp.bfloat16 and bool(jnp.isfinite(out).all())


def zeros(layer):
    return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), layer)


def cache_of(array):
    return jnp.asarray(array, jnp.float32)


def assert_token(out, q, keys, values, position, **options):
    """out and q [K, G, H] of one token; keys and values [S, K, H] of its row."""
    for head in range(K):
        for group in range(G):
            want = slow_attention(
                q[head, group], keys[:, head], values[:, head], position, **options
            )
            np.testing.assert_allclose(out[head, group], want, atol=2e-6)
