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
    return np.float32(np.random.default_rng(seed).normal(size=shape))


@functools.partial(jax.jit, static_argnums=1)
def there_and_back(x, dtype):
    return decode(encode(x, planned((1,), ("head_dim",), dtype)))


def zeros(backend, dtype):
    layer = backend.cache_layer(PAGES, Z, K, H, dtype=dtype)
    return jax.tree.map(lambda spec: np.zeros(spec.shape, spec.dtype), layer)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_a_value_comes_back_within_a_step(dtype, size):
    x = np.float32(size) * normal(0, 50, K, H)
    largest = np.abs(x).max(-1, keepdims=True)
    bound = STEP[dtype] * (largest if dtype == "int8" else np.abs(x) + largest / 2**6)
    off = np.abs(np.float32(there_and_back(x, dtype)) - x)
    # A scale and a result in bfloat16 add a little of their own.
    assert np.all(off <= bound + largest / 2**7)
    assert off.mean() < STEP[dtype] * largest.mean()


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_zeros_and_single_large_values_stay_finite(dtype):
    x = np.zeros((3, H), np.float32)
    x[1, 4], x[2] = 1e30, 1e-42
    back = np.float32(there_and_back(x, dtype))
    assert back[0].tolist() == [0.0] * H
    assert back[1, 4] == pytest.approx(1e30, rel=1e-2)
    assert np.isfinite(back).all()


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


def decode_steps():
    """Rows of 5, 40 and 0 tokens in a cache, its pages and the rows' lengths."""
    table = np.int32(np.random.default_rng(3).permutation(np.arange(1, 37)).reshape(3, 12))
    counts = [5, 40, 0]
    history = PagedBatch(
        *(np.int32(a) for a in (np.r_[:5, :40], np.repeat(range(3), counts), table)),
        *(np.int32(a) for a in (counts, np.cumsum([0, *counts]), [3])),
    )
    return history, table, np.int32(counts)


@pytest.mark.parametrize(
    ("dtype", "options"), [("int8", {"window": 9, "soft_cap": 3.0}), ("float8_e4m3fn", {})]
)
def test_pages_equal_the_reference_on_the_same_stored_values(dtype, options):
    history, table, lengths = decode_steps()
    past = [normal(seed, 45, K, H) for seed in (1, 2)]
    q, batch = normal(4, 45, K, G, H), decode_batch(lengths, lengths > 0, table)
    found = []
    for backend in (attention_xla, attention_reference):
        attend = functools.partial(backend.attend, scale=0.3, **options)

        @jax.jit
        def run(cache, q, k, v, history, batch, attend=attend, backend=backend):
            cache = backend.write(cache, k, v, history)
            prompt = attend(q, cache, history, decode=False)
            cache = backend.write(cache, k[:3], v[:3], batch)
            return prompt, attend(q[:3], cache, batch, decode=True)

        found.append(run(zeros(backend, dtype), q, *past, history, batch))
    for got, want in zip(*found, strict=True):
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, atol=2e-2)


STEPS, VIEW, NEW = 3, 64, np.arange(3)


@jax.jit
def step_by_step(cache, q, k, v, table, lengths):
    """What each step gives, and the cache it leaves, where it writes to the pages."""
    found = []
    for step in range(STEPS):
        batch = decode_batch(lengths + step, np.array([True, True, False]), table)
        cache = attention_xla.write(cache, k[step], v[step], batch)
        found.append(attention_xla.attend(q[step], cache, batch, decode=True, scale=0.3))
    return jnp.stack(found), cache


@functools.partial(jax.jit, static_argnames="several")
def on_a_view(cache, q, k, v, table, lengths, several, **kept):
    """The same by a view, the steps one by one or verified together."""
    view = attention_xla.open_view(cache, table, lengths, tokens=VIEW, steps=STEPS)
    if several:
        places = jnp.maximum(jnp.arange(VIEW) - VIEW + lengths[:, None], -1)
        new = lengths[:, None] + NEW
        span = jnp.concatenate([places, new], 1), new, jnp.int32(VIEW), 0
        flat = [a.swapaxes(0, 1).reshape(3 * STEPS, *a.shape[2:]) for a in (q, k, v)]
        out, view = attention_xla.verify_view(*flat, view, span=span, scale=0.3)
        got = out.reshape(3, STEPS, K, G, H).swapaxes(0, 1)
    else:
        found = []
        for step in range(STEPS):
            span, new = (VIEW - lengths, jnp.int32(VIEW + step), 0), (q[step], k[step], v[step])
            out, view = attention_xla.attend_view(*new, view, span=span, scale=0.3)
            found.append(out)
        got = jnp.stack(found)
    return got, attention_xla.close_view(cache, view, table, lengths, **kept)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("several", [False, True], ids=["one", "verified together"])
def test_a_view_leaves_in_the_cache_what_writing_would(dtype, several):
    history, table, lengths = decode_steps()
    past = [normal(seed, 45, K, H) for seed in (1, 2)]
    cache = jax.jit(attention_xla.write)(zeros(attention_xla, dtype), *past, history)
    q, k, v = normal(5, STEPS, 3, K, G, H), normal(6, STEPS, 3, K, H), 2 * normal(7, STEPS, 3, K, H)
    expected, written = step_by_step(cache, q, k, v, table, lengths)
    order = np.tile(np.int32([1, 0, 2]), (3, 1)) if several else None
    kept = np.int32([1, 3, 0] if several else [3, 3, 0])
    got, closed = on_a_view(cache, q, k, v, table, lengths, several, written=kept, order=order)
    np.testing.assert_allclose(got[:, :2], expected[:, :2], atol=1e-2)
    assert isinstance(closed, QuantizedKV)
    stored, direct = (jax.tree.map(np.asarray, jax.tree.leaves(a)) for a in (closed, written))
    for mine, theirs in zip(stored, direct, strict=True):
        for row, step in [(r, s) for r, count in enumerate(kept) for s in range(count)]:
            place = lengths[row] + step
            source = place if order is None else lengths[row] + order[row, step]
            got = mine[table[row, place // Z], :, :, place % Z]
            want = theirs[table[row, source // Z], :, :, source % Z]
            np.testing.assert_array_equal(np.float32(got), np.float32(want))


def test_what_is_quantized_is_what_the_config_calls_so():
    from lepton_jax.config import KV_DTYPES

    assert set(kv_cache.QUANTIZED) < set(KV_DTYPES)
