"""8-bit key-value caches: what they store, and that a token reads the same from pages and views."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_jax.kernels import attention_reference, attention_xla, kv_cache
from lepton_jax.kernels.attention import PagedBatch, decode_batch
from lepton_jax.kernels.kv_cache import QUANTIZED, QuantizedKV, decode, encode, planned
from lepton_jax.tensors import ParamSpec

K, G, H, Z, PAGES = 2, 3, 16, 8, 60
STEP = {"int8": 1 / 254, "float8_e4m3fn": 1 / 16}  # largest error, as a share of the magnitude


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def like(dtype):
    return planned((1,), ("head_dim",), dtype)


def zeros(backend, dtype):
    layer = backend.cache_layer(PAGES, Z, K, H, dtype=dtype)
    return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), layer)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_a_value_comes_back_within_a_step(dtype, size):
    x = size * normal(0, 50, K, H)
    largest = jnp.abs(x).max(-1, keepdims=True)
    bound = STEP[dtype] * (largest if dtype == "int8" else jnp.abs(x) + largest / 2**6)
    off = jnp.abs(decode(encode(x, like(dtype))).astype(jnp.float32) - x)
    # A scale and a result in bfloat16 add a little of their own.
    assert bool(jnp.all(off <= bound + largest / 2**7))
    assert float(off.mean()) < STEP[dtype] * float(largest.mean())


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_zeros_and_single_large_values_stay_finite(dtype):
    x = jnp.zeros((3, H)).at[1, 4].set(1e30).at[2].set(1e-42)
    back = decode(encode(x, like(dtype)))
    assert back[0].tolist() == [0.0] * H
    assert float(back[1, 4]) == pytest.approx(1e30, rel=1e-2)
    assert bool(jnp.isfinite(back.astype(jnp.float32)).all())


def test_plain_caches_are_arrays_of_their_dtype():
    assert planned((4, 2, H), ("a", "kv_heads", "c"), jnp.bfloat16) == ParamSpec(
        (4, 2, H), jnp.dtype(jnp.bfloat16), ("a", "kv_heads", "c")
    )
    x = normal(0, 3, H)
    np.testing.assert_array_equal(decode(encode(x, jnp.zeros(1))), x)
    assert encode(x, jnp.zeros(1, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("backend", [attention_xla, attention_reference])
def test_8_bit_caches_take_half_the_bytes_and_name_their_axes(backend):
    def nbytes(dtype, head_dim=64):
        layer = backend.cache_layer(PAGES, Z, K, head_dim, dtype=dtype)
        return sum(spec.nbytes for spec in jax.tree.leaves(layer))

    for dtype in QUANTIZED:
        assert nbytes(dtype) / nbytes("bfloat16") == (64 + 2) / 128
        layer = backend.cache_layer(PAGES, Z, K, H, dtype=dtype)
        for spec in jax.tree.leaves(layer):
            assert spec.shape[spec.axes.index("kv_heads")] == K
            assert spec.shape[spec.axes.index("pages")] == PAGES


def decode_steps(dtype):
    """Rows of 5, 40 and 0 tokens in a cache, and three new tokens for the first two."""
    table = jnp.asarray(np.random.default_rng(3).permutation(np.arange(1, 37)).reshape(3, 12))
    lengths = jnp.asarray([5, 40, 0], jnp.int32)
    counts = [5, 40, 0]
    positions = np.concatenate([np.arange(n) for n in counts])
    rows = np.repeat(np.arange(3), counts)
    history = PagedBatch(
        *(jnp.asarray(a, jnp.int32) for a in (positions, rows, table)),
        kv_lens=lengths,
        cu_q_lens=jnp.asarray(np.cumsum([0, *counts]), jnp.int32),
        num_seqs=jnp.asarray([3], jnp.int32),
    )
    return history, table.astype(jnp.int32), lengths


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("options", [{}, {"window": 9, "soft_cap": 3.0}], ids=str)
def test_pages_equal_the_reference_on_the_same_stored_values(dtype, options):
    history, table, lengths = decode_steps(dtype)
    past = [normal(seed, 45, K, H) for seed in (1, 2)]
    q = normal(4, 45, K, G, H)
    batch = decode_batch(lengths, lengths > 0, table)
    found = []
    for backend in (attention_xla, attention_reference):
        cache = backend.write(zeros(backend, dtype), *past, history)
        attend = functools.partial(backend.attend, scale=0.3, **options)
        prompt = attend(q, cache, history, decode=False)
        cache = backend.write(cache, past[0][:3], past[1][:3], batch)
        found.append((prompt, attend(q[:3], cache, batch, decode=True)))
    for got, want in zip(*found, strict=True):
        assert float(jnp.abs(want).max()) > 0.1
        np.testing.assert_allclose(got, want, atol=2e-2)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("several", [False, True], ids=["one", "verified together"])
def test_a_view_leaves_in_the_cache_what_writing_would(dtype, several):
    history, table, lengths = decode_steps(dtype)
    backend, steps, view = attention_xla, 3, 64
    cache = backend.write(zeros(backend, dtype), *(normal(s, 45, K, H) for s in (1, 2)), history)
    written, open_ = cache, backend.open_view(cache, table, lengths, tokens=view, steps=steps)
    active = jnp.asarray([True, True, False])
    q, k, v = normal(5, steps, 3, K, G, H), normal(6, steps, 3, K, H), 2 * normal(7, steps, 3, K, H)
    expected = []
    for step in range(steps):
        batch = decode_batch(lengths + step, active, table)
        written = backend.write(written, k[step], v[step], batch)
        expected.append(backend.attend(q[step], written, batch, decode=True, scale=0.3))
    if several:
        places = jnp.maximum(jnp.arange(view) - view + lengths[:, None], -1)
        new = lengths[:, None] + jnp.arange(steps)
        span = jnp.concatenate([places, new], 1), new, jnp.int32(view), 0
        flat = [a.swapaxes(0, 1).reshape(3 * steps, *a.shape[2:]) for a in (q, k, v)]
        out, open_ = backend.verify_view(*flat, open_, span=span, scale=0.3)
        got = out.reshape(3, steps, K, G, H).swapaxes(0, 1)
    else:
        got = []
        for step in range(steps):
            span = view - lengths, jnp.int32(view + step), 0
            out, open_ = backend.attend_view(q[step], k[step], v[step], open_, span=span, scale=0.3)
            got.append(out)
    np.testing.assert_allclose(jnp.stack(list(got))[:, :2], jnp.stack(expected)[:, :2], atol=1e-2)
    order = jnp.tile(jnp.asarray([1, 0, 2]), (3, 1)) if several else None
    kept = jnp.asarray([3, 3, 0]) if not several else jnp.asarray([1, 3, 0])
    closed = backend.close_view(cache, open_, table, lengths, written=kept, order=order)
    assert isinstance(closed, QuantizedKV)
    for row, count in enumerate(kept.tolist()):
        for step in range(count):
            place = int(lengths[row]) + step
            source = place if order is None else int(lengths[row]) + int(order[row, step])
            for stored, direct in zip(
                jax.tree.leaves(closed), jax.tree.leaves(written), strict=True
            ):
                mine = stored[table[row, place // Z], :, :, place % Z]
                theirs = direct[table[row, source // Z], :, :, source % Z]
                np.testing.assert_array_equal(mine.astype(jnp.float32), theirs.astype(jnp.float32))


def test_what_is_quantized_is_what_the_config_calls_so():
    from lepton_jax.config import KV_DTYPES

    assert set(kv_cache.QUANTIZED) < set(KV_DTYPES)
