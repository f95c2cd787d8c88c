"""The TPU attention backend: equal to the reference when interpreted, lean when compiled."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from tpu_topology import compile_on, compiled_text, copies_of, donated_bytes, temp_bytes
from tpu_topology import topology_mesh as mesh_of

from lepton_jax import compat
from lepton_jax.kernels import attention_reference as reference
from lepton_jax.kernels import attention_tpu as tpu
from lepton_jax.kernels.attention import PagedBatch, decode_batch, held

PAGE = 16
QUICK = {"xla_backend_optimization_level": 0}  # compiling an interpreted kernel outlasts running it
PAGES = 24


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the kernel through Pallas' interpreter, which its jitted entry gives no way to ask for.

    The interpreter forgets between grid steps what a kernel wrote to its scalars, and this kernel
    keeps its place there, so these tests fit one grid step: one block of queries and of heads.
    """
    import jax._src.literals
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

    call = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(kernel, "pl", types.SimpleNamespace(**{**vars(pl), "pallas_call": call}))
    # The interpreter asks a constant index for its shape; jax's literal integers have none.
    monkeypatch.setattr(jax._src.literals.TypedInt, "shape", (), raising=False)
    tpu._jax_kernel.clear_cache()
    yield
    tpu._jax_kernel.clear_cache()


def prefill_batch(kv_lens, q_lens, *, tokens, width=4):
    """Sequences whose last `q_lens` tokens are computed, one after another, then padding."""
    rows = len(kv_lens)
    positions, owners = np.full(tokens, -1), np.zeros(tokens, int)
    starts = np.concatenate([[0], np.cumsum(q_lens)])
    for row, (kv_len, q_len) in enumerate(zip(kv_lens, q_lens, strict=True)):
        positions[starts[row] : starts[row + 1]] = np.arange(kv_len - q_len, kv_len)
        owners[starts[row] : starts[row + 1]] = row
    return PagedBatch(
        positions=jnp.asarray(positions, jnp.int32),
        rows=jnp.asarray(owners, jnp.int32),
        page_table=page_table(rows, width),
        kv_lens=jnp.asarray(kv_lens, jnp.int32),
        cu_q_lens=jnp.asarray(starts, jnp.int32),
        num_seqs=jnp.array([rows], jnp.int32),
    )


def page_table(rows, width):
    pages = np.random.default_rng(7).permutation(np.arange(1, PAGES))
    return jnp.asarray(pages[: rows * width].reshape(rows, width), jnp.int32)


def layer(num_kv_heads, head_dim, *, pages=PAGES, page=PAGE, dtype=jnp.bfloat16):
    """One layer's cache, abstract."""
    return tpu.cache_layer(pages, page, num_kv_heads, head_dim, dtype=dtype)


def normal(seed, shape, dtype):
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return values.astype(jnp.dtype(dtype))


def run(backend, batch, heads, *, decode, dtype=jnp.float32, kv_dtype=None, **options):
    """Fills the rows' history, writes the batch's tokens, attends: the same for every backend.

    `kv_dtype`: keys and values are numbers of it, and the cache under test is one; the reference's
    stays as it is, for it would have scales.
    """
    num_kv_heads, group, head_dim = heads
    tokens = batch.positions.shape[0]
    rows, width = batch.page_table.shape
    history = prefill_batch(
        [width * PAGE] * rows, [width * PAGE] * rows, tokens=rows * width * PAGE
    )
    q = normal(5, (tokens, num_kv_heads, group, head_dim), dtype)
    written = [
        (
            *(normal(seed + n, (len(where.rows), *heads[::2]), kv_dtype or dtype) for n in (0, 1)),
            where,
        )
        for seed, where in ((1, history), (3, batch))
    ]
    options = {"scale": head_dim**-0.5, "window": 0, "soft_cap": 0.0} | options
    stored = kv_dtype if kv_dtype and backend is tpu else dtype
    spec = backend.cache_layer(PAGES, PAGE, num_kv_heads, head_dim, dtype=stored)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def program(q, written, batch):
        cache = jnp.zeros(spec.shape, spec.dtype)
        for k, v, where in written:
            cache = backend.write(cache, k.astype(dtype), v.astype(dtype), where)
        return backend.attend(q, cache, batch, decode=decode, **options)

    return np.asarray(program(q, written, batch), np.float32)


def assert_parity(batch, heads, *, atol, **options):
    """Returns what the kernel gives."""
    got, want = run(tpu, batch, heads, **options), run(reference, batch, heads, **options)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=atol)
    return got


@pytest.mark.parametrize("heads", [(2, 4, 128), (1, 7, 96)], ids=str)
def test_prefill_of_ragged_sequences_equals_the_reference(interpreted, heads):
    batch = prefill_batch([37, 5, 64], [20, 5, 1], tokens=32)
    assert_parity(batch, heads, decode=False, atol=1e-5)


def test_prefill_in_bfloat16_with_five_heads_padded_to_eight(interpreted):
    batch = prefill_batch([37, 5, 64], [20, 5, 1], tokens=32)
    assert_parity(batch, (5, 1, 80), decode=False, dtype=jnp.bfloat16, atol=3e-2)


def test_prefill_of_sequences_some_of_which_another_bank_has(interpreted):
    whole = prefill_batch([37, 30, 5, 64], [12, 9, 5, 1], tokens=32)
    batch = held(whole, jnp.array([True, False, True, False]))
    out = assert_parity(batch, (1, 4, 128), decode=False, atol=1e-5)
    assert not out[12:21].any() and not out[26:].any()


def test_decode_with_idle_rows_and_a_padded_head_equals_the_reference(interpreted):
    lengths = jnp.array([0, 9, 40, 30, 63], jnp.int32)
    active = jnp.array([False, True, False, True, True])
    batch = decode_batch(lengths, active, page_table(5, 4))
    out = assert_parity(batch, (3, 3, 64), decode=True, atol=1e-5)
    assert not out[[0, 2]].any()


@pytest.mark.parametrize(
    ("decode", "options"),
    [
        (False, {"window": 11}),
        (False, {"soft_cap": 3.0}),
        (True, {"window": 17, "soft_cap": 5.0}),
    ],
)
def test_window_and_soft_cap_equal_the_reference(interpreted, options, decode):
    batch = prefill_batch([37, 50], [20, 9], tokens=32)
    if decode:
        lengths = jnp.array([36, 0, 51], jnp.int32)
        batch = decode_batch(lengths, lengths > 0, page_table(3, 4))
    assert_parity(batch, (2, 2, 64), decode=decode, scale=1.0, atol=2e-5, **options)


def test_a_float8_cache_equals_the_reference_on_float8_values(interpreted):
    batch = prefill_batch([37, 50], [20, 9], tokens=32)
    options = {"decode": False, "dtype": jnp.bfloat16, "kv_dtype": jnp.float8_e4m3fn}
    assert_parity(batch, (4, 2, 128), atol=3e-2, **options)


def test_several_wide_heads_have_pages_of_their_own(interpreted):
    lengths = jnp.array([36, 0, 51], jnp.int32)
    batch = decode_batch(lengths, lengths > 0, page_table(3, 4))
    assert layer(4, 256).shape == (4 * PAGES, PAGE, 2, 256)
    options = {"window": 20, "decode": True, "dtype": jnp.bfloat16}
    assert_parity(batch, (4, 2, 256), atol=3e-2, **options)


@pytest.mark.parametrize("heads", [(2, 1, 64), (3, 1, 256)], ids=str)
def test_padding_and_idle_rows_write_only_to_the_null_page(heads):
    num_kv_heads, _, head_dim = heads
    table = page_table(3, 4)
    shape = layer(num_kv_heads, head_dim).shape
    k = jnp.ones((3, num_kv_heads, head_dim), jnp.bfloat16)
    batch = decode_batch(jnp.array([20, 33, 5], jnp.int32), jnp.array([False, True, False]), table)
    # A row can also be idle by its length alone, with a position left from an earlier block.
    batch = PagedBatch(**{**vars(batch), "positions": jnp.array([20, 33, -1], jnp.int32)})
    written = np.asarray(tpu.write(jnp.zeros(shape, jnp.bfloat16), k, k, batch), np.float32)
    by_page = written.reshape(-1, PAGES, PAGE, written.shape[2] * written.shape[3])
    pages, places = np.nonzero(by_page.any(axis=(0, 3)))
    kept = [
        (page, place) for page, place in zip(pages.tolist(), places.tolist(), strict=True) if page
    ]
    assert kept == [(int(table[1, 2]), 1)]


def test_a_cache_the_kernel_cannot_read_is_refused_by_name():
    with pytest.raises(ValueError, match=r"head_dim 256 \(kv_heads 4\).*bfloat16"):
        layer(4, 256, dtype=jnp.float32)
    with pytest.raises(ValueError, match="or int8, not in float16: set engine.kv_dtype"):
        layer(4, 128, dtype=jnp.float16)
    for heads in [(2, 128), (1, 256), (4, 256)]:
        with pytest.raises(ValueError, match="no float8 cache .* 3 or more, up to 128 wide.*bfl"):
            layer(*heads, dtype=jnp.float8_e4m3fn)


def test_float8_caches_hold_half_and_clip_what_is_too_large():
    wide, narrow = (layer(8, 128, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float8_e4m3fn))
    assert narrow.shape == wide.shape and 2 * narrow.nbytes == wide.nbytes
    batch = prefill_batch([2], [2], tokens=2)
    k = jnp.full((2, 8, 128), 1e4).at[1].set(-0.3)
    written = tpu.write(jnp.zeros(narrow.shape, narrow.dtype), k, -k, batch)
    found = written[batch.page_table[0, 0]].astype(jnp.float32)  # [Z, 2K, H]
    np.testing.assert_array_equal(found[0], np.tile([[448.0], [-448.0]], (8, 1)) * np.ones(128))
    np.testing.assert_allclose(found[1, ::2], -0.3, rtol=1 / 16)


LAYERS, STEPS, ROWS, WIDTH, TOKENS = 2, 8, 64, 16, 512
LARGE = 2200  # pages: a layer's cache is beyond VMEM, into which XLA would move a small one whole


def decode_block(caches, x, lengths, table):
    """Several steps of several layers of attention, each layer's input its predecessor's output."""

    def step(_, state):
        caches, x, lengths = state
        batch = decode_batch(lengths, lengths > 0, table)
        new_caches = []
        for cache in caches:
            cache = tpu.write(cache, x[:, :, 0], x[:, :, -1] * 0.5, batch)
            x = tpu.attend(x, cache, batch, decode=True, scale=0.1, window=0, soft_cap=0.0)
            new_caches.append(cache)
        return tuple(new_caches), x, lengths + 1

    return jax.lax.fori_loop(0, STEPS, step, (caches, x, lengths))


def prefill(caches, x, batch):
    new_caches = []
    for cache in caches:
        cache = tpu.write(cache, x[:, :, 0], x[:, :, -1] * 0.5, batch)
        x = tpu.attend(x, cache, batch, decode=False, scale=0.1, window=300, soft_cap=30.0)
        new_caches.append(cache)
    return tuple(new_caches), x


def assert_lean(compiled, shape, itemsize=2):
    assert temp_bytes(compiled) < 16 * 2**20
    assert donated_bytes(compiled) >= LAYERS * itemsize * int(np.prod(shape))
    assert copies_of(compiled_text(compiled), shape) == []


CHIPS_AND_HEADS = [
    ("v6e:1x1", (8, 4, 128)),
    ("v6e:1x1", (3, 3, 64)),
    ("v6e:1x1", (1, 4, 256)),
    ("v5e:1x1", (4, 2, 256)),
    ("v5e:1x1", (32, 1, 96)),
]


def test_the_copies_of_a_cache_that_is_not_donated_are_seen():
    cache = layer(2, 128, pages=LARGE, page=64).abstract()
    x = jax.ShapeDtypeStruct((TOKENS, 2, 1, 128), jnp.bfloat16)
    batch = prefill_batch([300, 700], [212, 200], tokens=TOKENS)
    compiled = compile_on(mesh_of("v6e:1x1"), prefill, (cache,) * LAYERS, x, batch)
    assert donated_bytes(compiled) == 0
    assert len(copies_of(compiled_text(compiled), cache.shape)) >= LAYERS


def test_an_old_jax_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
    with pytest.raises(ImportError, match=r"needs 0\.8\.1 or newer: pip install"):
        compat.ragged_paged_attention()


@pytest.mark.parametrize(("chip", "heads"), CHIPS_AND_HEADS, ids=str)
def test_a_decode_block_compiles_without_copying_its_caches(chip, heads):
    num_kv_heads, group, head_dim = heads
    cache = layer(num_kv_heads, head_dim, pages=LARGE, page=64).abstract()
    compiled = compile_on(
        mesh_of(chip),
        decode_block,
        (cache,) * LAYERS,
        jax.ShapeDtypeStruct((ROWS, num_kv_heads, group, head_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((ROWS,), jnp.int32),
        jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.int32),
        donate_argnums=[0],
    )
    assert_lean(compiled, cache.shape)


# Of each kind of cache one: as it is, of padded heads, of pages for each head.
@pytest.mark.parametrize(
    ("chip", "heads"), [CHIPS_AND_HEADS[0], CHIPS_AND_HEADS[1], CHIPS_AND_HEADS[3]], ids=str
)
def test_prefill_compiles_without_copying_its_caches(chip, heads):
    num_kv_heads, group, head_dim = heads
    cache = layer(num_kv_heads, head_dim, pages=LARGE, page=64).abstract()
    compiled = compile_on(
        mesh_of(chip),
        prefill,
        (cache,) * LAYERS,
        jax.ShapeDtypeStruct((TOKENS, num_kv_heads, group, head_dim), jnp.bfloat16),
        prefill_batch([300, 700], [212, 200], tokens=TOKENS),
        donate_argnums=[0],
    )
    assert_lean(compiled, cache.shape)


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "heads"), [("v6e:1x1", (8, 4, 128)), ("v5e:1x1", (3, 3, 64))])
def test_float8_caches_compile_without_copies(chip, heads):
    num_kv_heads, group, head_dim = heads
    cache = layer(num_kv_heads, head_dim, pages=LARGE, page=64, dtype=jnp.float8_e4m3fn).abstract()
    x = jax.ShapeDtypeStruct((ROWS, num_kv_heads, group, head_dim), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    table = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.int32)
    caches, mesh = (cache,) * LAYERS, mesh_of(chip)
    block = compile_on(mesh, decode_block, caches, x, lengths, table, donate_argnums=[0])
    assert_lean(block, cache.shape, itemsize=1)
    x = jax.ShapeDtypeStruct((TOKENS, num_kv_heads, group, head_dim), jnp.bfloat16)
    batch = prefill_batch([300, 700], [212, 200], tokens=TOKENS)
    filled = compile_on(mesh, prefill, caches, x, batch, donate_argnums=[0])
    assert_lean(filled, cache.shape, itemsize=1)
