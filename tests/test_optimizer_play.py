"""Plays, prefill sizes and what refinements promise, by hand."""

import itertools
import random
import types

import pytest

from lepton_jax.config import EngineSection, RunConfig, SamplingParams
from lepton_jax.optimizer.costs import UNIT, Costs, settled
from lepton_jax.optimizer.play import Play, prefill_sizes
from lepton_jax.optimizer.refine import gain, refinements, tokens_a_round
from lepton_jax.optimizer.sample import SampledRequest
from lepton_jax.optimizer.simulated_engine import SimulatedEngine, SimulatedRow, SimulatedSizes
from lepton_jax.telemetry import BeatStats

COSTS = Costs(block=1.0, step=10.0, step_row=2.0, program=3.0, program_token=0.5, gap=0.25)
OTHER = Costs(block=0.1, step=2.0, step_row=1.0, program=1.0, program_token=0.1, step_place=0.01)
SIZES = SimulatedSizes(
    rows=2, page_size=4, num_pages=65, prefill_chunk=128, decode_block=4, max_len=128, queue=2
)


def test_a_play_tells_the_seconds_and_latencies_of_any_costs():
    rows = [SimulatedRow((n,) * 10, 5 + n, 5 + n) for n in range(3)]
    play = Play.of(SimulatedEngine(SIZES, COSTS), rows, queue=2)
    for costs in (COSTS, OTHER):
        assert play.clock(costs)[-1] == pytest.approx(SimulatedEngine(SIZES, costs).run(rows))
    assert play.added.tolist() == [0, 0, play.ended[0]]  # the third waits for the first to end
    clock = play.clock(COSTS)
    assert clock[play.first[0]] == pytest.approx(0.25 + 3 + 128 * 0.5 + 1 + 4 * (10 + 2 * 2))
    assert clock[play.ended[2]] == clock[-1]
    assert play.reached() == ({128}, {(2, 128)})


def padding(sizes, tokens, most) -> int:
    return sum(next(size for size in (*sizes, most) if size >= count) for count in tokens)


def test_prefill_sizes_leave_the_least_padding():
    draw = random.Random(1)
    tokens = [draw.choice([16, 48, 64, 208, 300, 512]) + draw.randrange(3) for _ in range(60)]
    tokens = [min(512, count) for count in tokens]
    plays = [Play(tuple(BeatStats(prefill_tokens=n) for n in tokens), *[None] * 3)]
    found = prefill_sizes(plays, most=512, count=3)
    rounded = sorted({-(-n // 16) * 16 for n in tokens})
    best = min(
        padding(sizes, tokens, 512)
        for count in (1, 2, 3)
        for sizes in itertools.combinations(rounded, count)
        if sizes[-1] >= max(tokens)
    )
    assert len(found) == 3 and padding(found, tokens, 512) == best
    assert prefill_sizes(plays, most=512, count=99) == tuple(rounded)
    assert prefill_sizes([], most=512, count=3) == ()


def test_sizes_of_prefills_are_the_engines():
    engine = SimulatedEngine(SIZES, COSTS)
    assert engine.rungs.prefill == [128]
    sizes = SimulatedSizes(**vars(SIZES) | dict(prefill_sizes=(24, 60, 500), tile=8))
    assert SimulatedEngine(sizes, COSTS).rungs.prefill == [24, 64, 128]


@pytest.mark.parametrize(("given", "made"), [("96,200", (96, 200)), ([8], (8,)), ((), ())])
def test_sizes_are_given_as_a_list(given, made):
    assert EngineSection(prefill_sizes=given).prefill_sizes == made


@pytest.mark.parametrize("given", ["a", "0", [1.5], "-3"])
def test_other_sizes_are_refused(given):
    with pytest.raises(ValueError, match="prefill_sizes"):
        EngineSection(prefill_sizes=given)


def test_speculation_pays_where_tokens_are_cheap():
    cheap = Costs(block=0, step=10.0, step_row=0.0, program=0, program_token=0)
    assert gain(cheap, 8, 3, 2.5) == 2.5
    assert gain(cheap, 8, 3, 2.5, share=0.25) == 1.25  # the draft model's four steps cost one
    dear = Costs(block=0, step=2.0, step_row=1.0, program=0, program_token=0)
    assert gain(dear, 8, 3, 2.5) == pytest.approx(2.5 * 10 / (10 + 8 * 3 * 2))


def test_what_lookup_would_have_given():
    params = SamplingParams(max_tokens=9)
    copies = [SampledRequest((1, 2, 3, 4, 5, 6, 7, 8, 1), params)]
    # the first token ends a round that had nothing proposed; then 3 4 5 and 6, 7 8 1 and 2
    assert tokens_a_round(copies, [(2, 3, 4, 5, 6, 7, 8, 1, 2)], [3]) == {3: 9 / 3}
    assert tokens_a_round(copies, [(90, 91, 92)], [3, 7]) == {3: 1.0, 7: 1.0}
    assert tokens_a_round(copies, [()], [3]) == {3: 0.0}


@pytest.mark.parametrize(("attention", "blocks"), [(0.5, {64: 0.95, 256: 0.95}), (0.0, {64: 1.0})])
def test_other_blocks_of_attention_promise_a_tenth_of_it(attention, blocks):
    given = ("engine.prefill_sizes", "engine.speculation")
    predictor = types.SimpleNamespace(attention_share=lambda config: attention)

    def promised(*more, **engine):
        config = RunConfig(engine=EngineSection(**engine))
        found = refinements(config, None, [], predictor=predictor, given=(*given, *more))
        return {fields["engine.attention_block"]: share for fields, share in found}

    assert blocks.items() <= promised().items()
    assert set(promised(page_size=128)) == {256}  # whole pages
    assert not promised("engine.attention_block") and not promised(attention_block=128)


def test_exact_jobs_reckon_with_the_known_cost_of_a_draft():
    config = RunConfig()
    assert config.job.exact
    assert settled(config, COSTS).draft_cost == pytest.approx(2 * 2 / 12, abs=1e-4)
    assert settled(config, UNIT).draft_cost == 0.005
    given = RunConfig(engine=EngineSection(draft_cost=0.3))
    assert settled(given, COSTS).draft_cost == 0.3
