"""Buffers by hand: layouts, packed prefills and blocks, results, and the sizes of programs."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_reference import tiny
from hypothesis import given
from hypothesis import strategies as st

from lepton_jax.config import SamplingParams
from lepton_jax.engine import packing
from lepton_jax.engine.packing import DecodeShape, Layout, PrefillShape
from lepton_jax.engine.request import Chunk, Entry, Plan, Request, Row
from lepton_jax.engine.row_params import SampleSpec, unpack
from lepton_jax.engine.rungs import Sizes, ladder
from lepton_jax.engine.runner import Runner
from lepton_jax.kernels import attention_xla

TILE, EOS = 4, (2,)
SPEC = SampleSpec(stochastic=True, stop_ids=2)


PAGED = SimpleNamespace(Q_TILE=TILE, cache_layer=lambda *sizes, dtype: (sizes, dtype))


def make(backend=PAGED, **sizes) -> Runner:
    """A runner of programs, by default in tiles of 4; nothing is compiled or allocated here."""
    model, leaves = tiny("llama", layers=1)
    fields = dict(rows=3, page_size=4, num_pages=20, prefill_chunk=16, decode_block=5, max_len=24)
    return Runner(
        model,
        leaves,
        sizes=Sizes(**{**fields, **sizes}),
        backend=backend,
        kv_dtype=jnp.float32,
        eos_ids=EOS,
    )


def row(prompt: list[int], outputs: list[int], **params) -> Row:
    request = Request("r", tuple(prompt), SamplingParams(**params), seed=(7 << 32) + 9)
    return Row(request, limit=params.get("max_tokens", 128), outputs=outputs)


def test_pieces_are_views_of_one_buffer():
    layout = Layout(a=(2, 3), none=(4, 0), b=(1,))
    buffer, views = layout.zeros()
    views["a"][1, 2], views["b"][:] = 5, 6
    assert buffer.tolist() == [0, 0, 0, 0, 0, 5, 6]
    assert views["none"].shape == (4, 0)
    assert buffer.dtype == np.int32


def test_a_joined_buffer_has_the_order_of_the_layout_not_of_the_dict():
    layout = Layout(zebra=(2,), ant=(1, 2))
    pieces = {"ant": jnp.array([[3, 4]]), "zebra": jnp.array([1, 2])}
    assert jax.jit(layout.join)(pieces).tolist() == [1, 2, 3, 4]
    split = layout.split(layout.join(pieces))
    assert {name: a.tolist() for name, a in split.items()} == {"zebra": [1, 2], "ant": [[3, 4]]}


@pytest.mark.parametrize("value", [0.0, -1.5, 3e38, float("-inf"), 1e-45])
def test_floats_travel_as_their_bits(value):
    bits = packing.bits_of(jnp.float32(value))
    assert bits.dtype == jnp.int32
    assert np.asarray(bits).view(np.float32) == np.float32(value)


def test_results_carry_logprobs_only_where_asked():
    plain, own, tops = (
        packing.result_layout(DecodeShape(3, 5, 6, SampleSpec(logprobs=n))) for n in (-1, 0, 2)
    )
    assert plain.size == 1 + 3 + 3 + 3 * 6
    assert own.size == plain.size + 3 * 6
    assert tops.size == own.size + 2 * 3 * 6 * 2


def test_a_prefill_by_hand():
    new, resumed = row([10, 11, 12, 13, 14], []), row([20, 21], [22, 23, 24], max_tokens=9)
    resumed.bank = 1
    chunks = (
        Chunk(new, slot=2, pages=(7, 8), start=0, tokens=(10, 11, 12, 13, 14), final=True),
        Chunk(resumed, slot=0, pages=(3, 4), start=3, tokens=(23,), final=False),
    )
    shape = PrefillShape(tokens=16, rows=3, pages=6, spec=SPEC)
    buffer = packing.pack_prefill(Plan(chunks), shape, tile=TILE, slots=3, eos_ids=EOS)
    got = packing.prefill_layout(shape).split(buffer)
    assert got["tokens"].tolist() == [10, 11, 12, 13, 14, 0, 0, 0, 23, *[0] * 7]
    assert got["positions"].tolist() == [0, 1, 2, 3, 4, -1, -1, -1, 3, *[-1] * 7]
    assert got["rows"].tolist()[:12] == [0] * 8 + [1] * 4
    assert got["num_seqs"].tolist() == [2]
    assert got["cu_q_lens"].tolist() == [0, 8, 12, 12]
    assert got["slots"].tolist() == [2, 0, 3]  # 3 is the number of slots: dropped
    assert got["kv_lens"].tolist() == [5, 4, 0]
    assert got["last"].tolist() == [4, 8, 0]
    assert got["final"].tolist() == [1, 0, 0]
    assert got["first"].tolist() == [1, 0, 0]
    assert got["outputs_from"].tolist() == [5, 2, 0]
    assert got["produced"].tolist() == [0, 3, 0]
    assert got["limit"].tolist() == [128, 9, 0]
    assert got["page_table"].tolist() == [[7, 8, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0], [0] * 6]
    assert got["banks"].tolist() == [0, 1, 0]


def test_a_block_by_hand():
    rows = (
        row([10], [], temperature=0.5, stop_token_ids=(4,), max_tokens=6),
        row([20], [], ignore_eos=True, max_tokens=7),
    )
    entries = tuple(
        Entry(r, slot=slot, pages=pages, cached=1)
        for r, slot, pages in zip(rows, (1, 0), ((5,), (6, 9)), strict=True)
    )
    rows[0].bank = 1
    shape = DecodeShape(rows=3, steps=5, pages=2, spec=SPEC)
    buffer = packing.pack_decode(Plan(rows=entries, steps=4), shape, slots=3, eos_ids=EOS)
    got = packing.decode_layout(shape).split(buffer)
    assert got["steps"].tolist() == [4]
    assert got["slots"].tolist() == [1, 0, 3]
    assert got["limit"].tolist() == [6, 7, 0]
    assert got["page_table"].tolist() == [[5, 0], [6, 9], [0, 0]]
    assert got["banks"].tolist() == [1, 0, 0]
    params = unpack(jnp.asarray(got["params"]), SPEC)
    assert params.seed[:2].tolist() == [[7, 9], [7, 9]]
    assert params.temperature.tolist() == [0.5, 0, 0]
    assert params.stop_ids.tolist() == [[4, 2], [-1, -1], [-1, -1]]


def test_a_result_has_floats_again_and_only_the_live_rows():
    shape = DecodeShape(2, 1, 3, SampleSpec(logprobs=1))
    buffer, views = packing.result_layout(shape).zeros()
    views["steps"][:], views["count"][:], views["finish"][:] = 1, [1, 0], [2, 1]
    views["tokens"][0] = [8, 9]
    views["logprob"][0] = np.array([-0.5, -0.25], np.float32).view(np.int32)
    views["top_ids"][0, :, 0] = [8, 3]
    views["top_logprobs"][0, :, 0] = np.array([-0.5, -0.125], np.float32).view(np.int32)
    entry = Entry(row([1], []), slot=0, pages=(1,), cached=1)
    got, steps = packing.read_block(buffer, shape, Plan(rows=(entry,), steps=1))
    assert steps == 1 and got.speculated is None
    assert got.tokens.tolist() == [[8, 9]]
    assert got.count.tolist() == [1] and got.finish.tolist() == [2]
    assert got.logprob.tolist() == [[-0.5, -0.25]]
    assert got.top_ids.tolist() == [[[8], [3]]]
    assert got.top_logprobs.tolist() == [[[-0.5], [-0.125]]]


def test_ladders_by_hand():
    assert ladder(512, 2, 64) == [64, 128, 256, 512]
    assert ladder(32, 4, 2) == [2, 8, 32]
    assert ladder(5, 4, 2) == [2, 5]
    assert ladder(1, 4, 1) == [1]


@given(st.integers(1, 3000), st.integers(2, 4), st.data())
def test_a_ladder_reaches_its_ends_and_wastes_at_most_its_factor(top, factor, data):
    bottom = data.draw(st.integers(1, top))
    sizes = ladder(top, factor, bottom)
    assert sizes == sorted(set(sizes)) and (sizes[0], sizes[-1]) == (bottom, top)
    assert all(large <= factor * small for small, large in itertools.pairwise(sizes))


@pytest.mark.parametrize("chunk", [1, 4, 30, 64, 76, 100, 480, 512])
def test_every_prefill_size_is_whole_tiles(chunk):
    shapes = make(prefill_chunk=chunk).shapes_for(10**6, 1)
    prefill = [s for s in shapes if type(s) is PrefillShape][::-1]  # the first beat's comes first
    sizes = [shape.tokens for shape in prefill]
    assert sizes[-1] == -(-chunk // TILE) * TILE
    assert all(size % TILE == 0 for size in sizes)
    assert [shape.rows for shape in prefill] == [min(3, size // TILE) for size in sizes]


def test_a_small_job_needs_few_programs():
    shapes = make(prefill_chunk=512, rows=64).shapes_for(100, 3)
    assert 100 <= max(s.tokens for s in shapes if type(s) is PrefillShape) < 512
    assert 3 <= max(s.rows for s in shapes if type(s) is DecodeShape) < 64


@pytest.mark.parametrize("cached", [1, 300, 900])
def test_what_the_first_beats_need_is_compiled_first(cached):
    runner = make(attention_xla, prefill_chunk=512, rows=64, max_len=1024)
    prefill, decode, *others = runner.shapes_for(10**4, 64, cached)
    assert prefill.tokens > max(s.tokens for s in others if type(s) is PrefillShape)
    views = {s.view for s in (decode, *others) if type(s) is DecodeShape}
    assert len(views) > 1 and decode.view == min(view for view in views if view >= cached)
