"""int8 caches with scales on TPU: our kernel equal to the reference when interpreted, lean when
compiled.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from tpu_topology import (
    argument_bytes,
    compile_on,
    compiled_text,
    copies_of,
    donated_bytes,
    kernel_calls,
    temp_bytes,
)

from lepton_jax.engine.draft_model import side_by_side
from lepton_jax.kernels import attention_reference as reference
from lepton_jax.kernels import attention_tpu as tpu
from lepton_jax.kernels import attention_tpu_int8 as ours
from lepton_jax.kernels.attention import PagedBatch, decode_batch, held
from lepton_jax.kernels.kv_cache import QuantizedKV
from lepton_jax.planning.topology import topology_devices

QUICK = {"xla_backend_optimization_level": 0}  # compiling an interpreted kernel outlasts running it
# K, G, H: tokens that share words, narrow and padded heads, two lines a head, pairs padded to 16
HEADS = [(1, 4, 128), (2, 2, 64), (3, 3, 96), (8, 1, 128), (1, 4, 256), (2, 2, 256), (5, 2, 64)]


@pytest.fixture
def interpreted(monkeypatch):
    """What the kernel, interpreted, was called with: `(schedule, heads)` of each trace."""
    calls, kernel = [], ours.kernel.attend_tiles

    def call(lines, cache, schedule, table, *, heads):
        calls.append((schedule, heads))
        return kernel(lines, cache, schedule, table, heads=heads, interpret=True)

    monkeypatch.setattr(ours.kernel, "attend_tiles", call)
    return calls


def chunks(kv_lens, q_lens, *, tokens, page, width, seed=0):
    """Rows whose last `q_lens` tokens are computed, side by side, then padding; a row of none is
    idle.
    """
    rows = len(kv_lens)
    positions, owners = np.full(tokens, -1), np.zeros(tokens, int)
    starts = np.concatenate([[0], np.cumsum(q_lens)])
    for row, (length, count) in enumerate(zip(kv_lens, q_lens, strict=True)):
        positions[starts[row] : starts[row + 1]] = np.arange(length - count, length)
        owners[starts[row] : starts[row + 1]] = row
    pages = 1 + np.random.default_rng(seed).permutation(rows * width).reshape(rows, width)
    return PagedBatch(
        positions=jnp.asarray(positions, jnp.int32),
        rows=jnp.asarray(owners, jnp.int32),
        page_table=jnp.asarray(pages, jnp.int32),
        kv_lens=jnp.asarray(kv_lens, jnp.int32),
        cu_q_lens=jnp.asarray(starts, jnp.int32),
        num_seqs=jnp.array([rows], jnp.int32),
    )


def held_exactly(rng, shape):
    """Keys or values that int8 holds as they are; their heads differ in size, so that a wrong scale
    shows.
    """
    steps = np.clip(np.round(rng.normal(size=shape) * 40), -127, 127)
    steps[..., 0] = 127
    scale = jnp.asarray(np.exp(rng.normal(size=(*shape[:-1], 1))) / 80, jnp.bfloat16)
    return (steps * np.asarray(scale, np.float64)).astype(np.float32)


def empty(backend, pages, page, heads, dtype=jnp.int8):
    specs = backend.cache_layer(pages, page, heads[0], heads[2], dtype=dtype)
    return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), specs)


def assert_parity(batch, heads, *, page, decode=False, **options):
    """Writes the rows' history and then the batch's tokens, and attends, as the reference does with
    a float32 cache; what differs is the rounding of weights to bfloat16.
    """
    num_kv_heads, group, head_dim = heads
    rows, width = batch.page_table.shape
    pages, rng = rows * width + 1, np.random.default_rng(1)
    whole = [width * page] * rows
    history = chunks(whole, whole, tokens=rows * width * page, page=page, width=width)
    history = PagedBatch(**{**vars(history), "page_table": batch.page_table})
    written = [
        (*(held_exactly(rng, (len(where.rows), num_kv_heads, head_dim)) for _ in "kv"), where)
        for where in (history, batch)
    ]
    q = rng.normal(size=(len(batch.rows), num_kv_heads, group, head_dim))
    q = np.asarray(jnp.asarray(q, jnp.bfloat16), np.float32)
    options = {"scale": head_dim**-0.5, "window": 0, "soft_cap": 0.0, "decode": decode} | options

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def program(backend, q, written, batch):
        dtype, here = (jnp.float32 if backend is reference else jnp.int8), dict(options)
        cache = empty(backend, pages, page, heads, dtype)
        for k, v, where in written:
            cache = backend.write(cache, k, v, where)
        if backend is reference:
            here.pop("block", None)
        return backend.attend(q, cache, batch, **here)

    got, want = (np.asarray(program(backend, q, written, batch)) for backend in (ours, reference))
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=0.01 * np.abs(want).max())
    return got


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_prefill_of_ragged_rows_equals_the_reference(interpreted, heads):
    batch = chunks([37, 5, 64], [20, 5, 1], tokens=32, page=16, width=4)
    out = assert_parity(batch, heads, page=16)
    assert not out[26:].any()


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decode_with_idle_rows_equals_the_reference(interpreted, heads):
    table = chunks([1] * 5, [1] * 5, tokens=5, page=16, width=4).page_table
    lengths = jnp.array([0, 9, 40, 30, 63], jnp.int32)
    active = jnp.array([False, True, False, True, True])
    out = assert_parity(decode_batch(lengths, active, table), heads, page=16, decode=True)
    assert not out[[0, 2]].any()


@pytest.mark.parametrize(
    ("block", "part", "options"),
    [
        (128, 128, {"window": 11}),
        (256, 256, {"soft_cap": 3.0}),
        (512, 128, {"window": 130, "soft_cap": 5.0}),
        (512, 256, {}),
    ],
    ids=str,
)
def test_many_blocks_parts_and_tiles(interpreted, monkeypatch, block, part, options):
    """Those before the window and behind a tile's queries are left out."""
    monkeypatch.setattr(ours, "PART", part)
    batch = chunks([700, 60, 310], [90, 60, 1], tokens=160, page=32, width=22)
    assert_parity(batch, (2, 4, 128), page=32, block=block, **options)
    heads = interpreted[-1][1]
    assert (heads.span, heads.part * 32) == (block, part)


@pytest.mark.parametrize(("page", "block"), [(128, 256), (4, 128), (16, 512)])
def test_pages_of_any_size(interpreted, page, block):
    """Tokens that share a word, whose scales are half as many to a page."""
    width = 512 // page
    batch = chunks([300, 511], [40, 9], tokens=64, page=page, width=width)
    assert_parity(batch, (1, 2, 128), page=page, block=block)
    assert interpreted[-1][1].span == max(block, 256)


def test_decode_reads_only_blocks_in_the_window(interpreted):
    table = chunks([1] * 3, [1] * 3, tokens=3, page=16, width=40).page_table
    lengths = jnp.array([600, 0, 255], jnp.int32)
    batch = decode_batch(lengths, lengths > 0, table)
    assert_parity(batch, (4, 2, 64), page=16, decode=True, window=100, block=128)
    assert interpreted[-1][1].span == 128
    plan = ours._tiles(batch, 3, 1, decode=True).schedule(128, 100)
    assert plan.begin.tolist() == [3, 0, 1] and plan.end.tolist() == [5, 0, 2]
    assert plan.before.tolist() == [0, 2, 2] and plan.following.tolist() == [0, 2, 2, 3]


def test_rows_that_another_bank_has_are_neither_read_nor_written(interpreted):
    whole = chunks([37, 30, 5, 64], [12, 9, 5, 1], tokens=32, page=16, width=4)
    batch = held(whole, jnp.array([True, False, True, False]))
    out = assert_parity(batch, (1, 4, 128), page=16)
    assert not out[12:21].any() and not out[26:].any()
    plan = ours._tiles(batch, 32, 8, decode=False).schedule(64, 0)
    assert plan.end.sum() == plan.used[0] == 2 + 1


@pytest.mark.parametrize("heads", [(1, 2, 64), (2, 1, 64), (3, 3, 96)], ids=str)
def test_proposals_that_arent_leave_rows_as_they_were(interpreted, heads):
    """Places without a token keep what an earlier row left, which may be no number."""
    table = chunks([1] * 3, [1] * 3, tokens=3, page=16, width=2).page_table
    positions = jnp.array([[10, 11, -1, -1], [-1] * 4, [3, 4, 5, 6]], jnp.int32)
    batch = side_by_side(jnp.array([10, 0, 3], jnp.int32), positions, table)
    k, v = (held_exactly(np.random.default_rng(n), (12, heads[0], heads[2])) for n in (0, 1))
    q = jnp.asarray(held_exactly(np.random.default_rng(2), (12, *heads)))
    history = chunks([10, 1, 3], [10, 1, 3], tokens=16, page=16, width=2)
    history = PagedBatch(**{**vars(history), "page_table": table})
    past = [held_exactly(np.random.default_rng(n), (16, heads[0], heads[2])) for n in (3, 4)]

    def answer(backend, dtype, left):
        cache = empty(backend, 7, 16, heads, dtype)
        if left is not None:
            cache = QuantizedKV(cache.values, jnp.full_like(cache.scale, left))
        cache = backend.write(backend.write(cache, *past, history), k, v, batch)
        return np.asarray(backend.attend(q, cache, batch, decode=False, scale=0.1))

    want = answer(reference, jnp.float32, None)
    for left in (None, np.nan, np.inf):
        got = answer(ours, jnp.int8, left)
        np.testing.assert_allclose(got, want, atol=0.01 * np.abs(want).max())


def test_copies_and_work_keep_out_of_each_others_way(monkeypatch):
    """With copies that are late, memory that is no number at first, and races detected."""
    from jax.experimental.pallas import tpu as pltpu

    def pairs(values, heads):  # this interpreter reads no reference that is shaped anew
        pages, groups, lines, _ = values.shape
        flat = np.prod([pages, groups, lines // 4])
        words = pltpu.bitcast(values[...].reshape(flat * 4, 128), jnp.int32)
        step = flat * heads.phases // (pages * heads.page_size)
        for pair in range(heads.count * heads.lines * heads.phases):
            own, shift = words[pair // 2 :: step], (24, 8)[pair % 2]
            yield kernel._byte(own, shift), kernel._byte(own, shift - 8)

    kernel, batch = ours.kernel, chunks([700, 3, 310], [9, 3, 1], tokens=16, page=32, width=22)
    call = functools.partial(
        kernel.attend_tiles.__wrapped__,
        interpret=pltpu.InterpretParams(
            dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan"
        ),
    )
    monkeypatch.setattr(kernel, "_pairs", pairs)
    monkeypatch.setattr(kernel, "attend_tiles", call)
    assert_parity(batch, (2, 4, 128), page=32, block=256, window=300)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("heads", [(1, 1, 64), (2, 1, 64), (3, 1, 64), (1, 1, 256)], ids=str)
def test_only_the_batchs_places_are_written(heads):
    """Also where a row's tokens have no position: proposals that aren't, of a row that is done."""
    shape = (6, heads[0], heads[2])
    batch = chunks([21, 3], [3, 3], tokens=6, page=16, width=2)
    positions = jnp.array([18, 19, -1, -1, -1, -1], jnp.int32)
    batch = PagedBatch(**{**vars(batch), "positions": positions})
    cache = empty(ours, 5, 16, heads)
    written = ours.write(cache, jnp.ones(shape), jnp.ones(shape), batch)
    by_place = np.asarray(written.values).reshape(5, 16, -1, 128)
    page = int(batch.page_table[0, 1])
    found = {
        (p, z) for p, z, *_ in zip(*map(np.ndarray.tolist, np.nonzero(by_place)), strict=True) if p
    }
    assert found == {(page, 2), (page, 3)}
    assert {p for p in np.asarray(written.scale).any((1, 2)).nonzero()[0].tolist() if p} == {page}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_lies_together_keeps_what_isnt_written(data):
    """Writes in any pieces leave what one write leaves, for every way that tokens lie together."""
    heads = data.draw(st.sampled_from([(1, 1, 64), (2, 1, 64), (4, 1, 64)]))
    length = data.draw(st.integers(1, 30))
    cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=4)) | {0, length})
    k, v = (held_exactly(np.random.default_rng(n), (length, heads[0], heads[2])) for n in (0, 1))

    def fill(pieces):
        cache = empty(ours, 5, 8, heads)
        for begin, end in pieces:
            batch = chunks([end], [end - begin], tokens=32, page=8, width=4)
            padded = ((0, 32 - (end - begin)), (0, 0), (0, 0))
            new = (np.pad(side[begin:end], padded) for side in (k, v))
            cache = ours.write(cache, *new, batch)
        return [np.asarray(leaf)[1:] for leaf in jax.tree.leaves(cache)]

    whole, pieces = fill([(0, length)]), fill(itertools.pairwise(cuts))
    for want, got in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_cache_takes_what_its_layout_says():
    wide = tpu.cache_layer(100, 64, 8, 128, dtype=jnp.bfloat16)
    narrow = tpu.cache_layer(100, 64, 8, 128, dtype=jnp.int8)
    assert isinstance(narrow, QuantizedKV)
    assert narrow.values.shape == (100, 64, 16, 128) and 2 * narrow.values.nbytes == wide.nbytes
    assert narrow.scale.nbytes == narrow.values.nbytes // 16
    assert tpu.cache_layer(100, 64, 1, 128, dtype=jnp.int8).values.shape == (100, 16, 8, 128)
    assert tpu.cache_layer(100, 64, 1, 256, dtype=jnp.int8).values.shape == (100, 32, 8, 128)
    for page in (4, 16):  # 250 and 100 %
        with pytest.raises(ValueError, match=rf"{page} tokens .*0% of .*engine.page_size to 32 or"):
            tpu.cache_layer(100, page, 1, 128, dtype=jnp.int8)
    with pytest.raises(ValueError, match=r"int8 caches in pages of 4.*not of 48: set engine.page"):
        tpu.cache_layer(100, 48, 8, 128, dtype=jnp.int8)


ROWS, WIDTH, TOKENS, PAGES = 64, 16, 512, 2200
CHIPS_AND_HEADS = [
    ("v5e:1x1", (8, 4, 128)),
    ("v6e:1x1", (1, 8, 128)),
    ("v5e:1x1", (2, 8, 128)),
    ("v6e:1x1", (3, 3, 64)),
    ("v5e:1x1", (1, 4, 256)),
    ("v6e:1x1", (8, 2, 256)),
    ("v5e:1x1", (32, 1, 96)),
    ("v4:1x1x1", (8, 4, 128)),
    ("v5p:1x1x1", (8, 4, 128)),
    ("tpu7x:1x1x1", (8, 4, 128)),
    ("v5e:1x1", (40, 1, 128)),
]


def both(caches, new, lengths, table, prompt, batch, *, block):
    """Four steps and a prefill through two layers, each fed by the one before."""

    def through(caches, x, batch, **options):
        after = []
        for cache in caches:
            cache = tpu.write(cache, x[:, :, 0], x[:, :, -1] * 0.5, batch)
            x = tpu.attend(x, cache, batch, scale=0.1, block=block, **options)
            after.append(cache)
        return tuple(after), x

    def step(_, carry):
        caches, x, lengths = carry
        batch = decode_batch(lengths, lengths > 0, table)
        return *through(caches, x, batch, decode=True), lengths + 1

    caches, new, lengths = jax.lax.fori_loop(0, 4, step, (caches, new, lengths))
    caches, prompt = through(caches, prompt, batch, decode=False, window=300, soft_cap=30.0)
    return caches, new, lengths, prompt


# The first of them is the one that every run compiles.
@pytest.mark.parametrize(
    ("chip", "heads"),
    [
        pytest.param(*each, marks=[pytest.mark.slow] if index else [], id=str(each))
        for index, each in enumerate(CHIPS_AND_HEADS)
    ],
)
def test_programs_compile_without_copies_of_their_caches(chip, heads):
    """Nor is one moved to vector memory and back, and none is padded."""
    check_compiled(chip, heads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "page", "block"),
    [
        ((8, 4, 128), 8, 0),
        ((8, 4, 128), 16, 0),
        ((1, 8, 128), 128, 0),
        ((8, 4, 128), 256, 2048),
        ((2, 8, 128), 64, 512),
    ],
    ids=str,
)
def test_any_size_of_pages_and_blocks_compiles(heads, page, block):
    check_compiled("v5e:1x1", heads, page=page, block=block)


def check_compiled(chip, heads, *, page=64, block=0):
    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    width = WIDTH * 64 // page
    specs = tpu.cache_layer(PAGES, page, heads[0], heads[2], dtype=jnp.int8)
    caches = (jax.tree.map(lambda spec: spec.abstract(), specs),) * 2
    batch = chunks([300, 700], [212, 200], tokens=TOKENS, page=page, width=width)
    one_device = np.array(topology_devices(chip)[:1]).reshape(1, 1)  # of a TPU7x chip's two
    compiled = compile_on(
        Mesh(one_device, ("data", "model")),
        functools.partial(both, block=block),
        caches,
        jax.ShapeDtypeStruct((ROWS, *heads), jnp.bfloat16),
        ints(ROWS),
        ints(ROWS, width),
        jax.ShapeDtypeStruct((TOKENS, *heads), jnp.bfloat16),
        batch,
        donate_argnums=[0],
    )
    text, held_bytes = compiled_text(compiled), 2 * sum(s.nbytes for s in jax.tree.leaves(specs))
    assert len(kernel_calls(text, "paged_attention_int8")) == 4
    assert temp_bytes(compiled) < 16 * 2**20
    assert donated_bytes(compiled) >= held_bytes
    assert argument_bytes(compiled) < 1.1 * held_bytes
    for spec in jax.tree.leaves(specs):
        assert copies_of(text, spec.shape) == []
