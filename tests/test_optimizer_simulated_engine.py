"""The cost model and the simulated engine, by arithmetic done by hand."""

import itertools
import random

import pytest

from lepton_jax.engine.scored import Scoring
from lepton_jax.optimizer.costs import UNIT, CostMeter, Costs, assumed
from lepton_jax.optimizer.simulated_engine import SimulatedEngine, SimulatedRow, SimulatedSizes
from lepton_jax.telemetry import BeatStats

COSTS = Costs(block=1.0, step=10.0, step_row=2.0, program=3.0, program_token=0.5, gap=0.25)
SIZES = SimulatedSizes(
    rows=2, page_size=4, num_pages=65, prefill_chunk=128, decode_block=4, max_len=128
)


def test_costs_by_hand():
    costs = Costs(1.0, 10.0, 2.0, 3.0, 0.5, block_place=0.01, step_place=0.001, gap=4.0)
    assert costs.step_seconds(4, 100) == pytest.approx(10 + 4 * (2 + 0.1))
    assert costs.decode_seconds(3, 4, 100) == pytest.approx(1 + 4 + 3 * 18.4)
    assert costs.prefill_seconds(128) == 67
    assert costs.beat_steps(4, 100) == pytest.approx((4 + 5) / 18.4)
    assert costs.scaled(2).prefill_seconds(128) == 134
    assert UNIT.decode_seconds(8, 32) == 9 and UNIT.prefill_seconds(128) == 1


def test_what_is_assumed_of_a_platform():
    """In steps of 32 rows: prompts are dear on a CPU and beats on the others."""
    cpu, tpu = assumed("cpu"), assumed("tpu")
    prefills = [c.prefill_seconds(128) / c.step_seconds(32) for c in (cpu, tpu)]
    assert prefills[0] > 2 * prefills[1] and cpu.beat_steps(32) < tpu.beat_steps(32) / 5


def test_two_rows_by_hand():
    """A prefill of both with a block of 4 steps, a block of 2 for the one that is left, and a last
    beat that reads.
    """
    engine = SimulatedEngine(SIZES, COSTS)
    rows = [SimulatedRow((1,) * 10, 5, 5), SimulatedRow((2,) * 10, 7, 7)]
    first = 0.25 + (3 + 128 * 0.5) + (1 + 4 * (10 + 2 * 2))
    second = 0.25 + (1 + 2 * (10 + 2 * 2))  # the program of 2 rows: the smallest
    assert engine.run(rows) == pytest.approx(first + second)
    assert engine.tokens == 12


def test_a_row_that_stops_early_is_known_one_beat_late():
    """Of 4 steps 2 are real; the block that was dispatched meanwhile runs no step at all."""
    engine = SimulatedEngine(SIZES, COSTS)
    seconds = engine.run([SimulatedRow((1,) * 10, 50, 3)])
    assert seconds == pytest.approx(0.25 + 67 + (1 + 2 * 14) + 0.25 + 1)
    assert engine.tokens == 3


def test_prompts_to_score_cost_their_prefill():
    engine = SimulatedEngine(SIZES, COSTS)
    rows = [SimulatedRow((n,) * 9, 0, 0, Scoring(targets=((5,),))) for n in range(3)]
    assert engine.run(rows) == pytest.approx(2 * (0.25 + 67))  # two slots, then one
    assert engine.scheduler.counters.scored_tokens == 3


def test_what_prompts_share_is_computed_once():
    rows = [SimulatedRow((*range(100), n), 1, 1) for n in range(4)]
    seconds = []
    for shared in (True, False):
        sizes = SimulatedSizes(**vars(SIZES) | dict(prefix_cache=shared))
        engine = SimulatedEngine(sizes, COSTS)
        seconds.append(engine.run(rows))
        assert (engine.scheduler.counters.prefix_hit_tokens == 300) == shared
    assert seconds[0] < seconds[1]


def beats(costs: Costs, *, noise=lambda: 1.0) -> list[BeatStats]:
    return [
        BeatStats(
            prefill_places=places,
            prefill_tokens=places,
            prefill_seconds=costs.prefill_seconds(places) * noise(),
            steps=steps,
            row_places=rows,
            view=view,
            decode_seconds=costs.decode_seconds(steps, rows, view) * noise(),
            gap_seconds=costs.gap * noise(),
        )
        for _ in range(7)
        for places in (128, 256, 512)
        for steps in (1, 4, 8)
        for rows in (4, 32)
        for view in (256, 1024)
    ]


def test_a_meter_finds_the_costs_through_noise():
    true = Costs(0.004, 0.01, 0.0008, 0.02, 0.0005, block_place=1e-7, step_place=2e-7, gap=0.002)
    draw = random.Random(0)

    def noise() -> float:
        return draw.lognormvariate(0, 0.05) * (30 if draw.random() < 0.05 else 1)

    for wild, within in ((lambda: 1.0, 1e-6), (noise, 0.06)):
        meter = CostMeter()
        for beat in beats(true, noise=wild):
            meter.take(beat)
        found = meter.costs(UNIT)
        for steps, rows, view in ((1, 4, 256), (8, 32, 1024), (6, 16, 512)):
            wanted = true.decode_seconds(steps, rows, view)
            assert found.decode_seconds(steps, rows, view) == pytest.approx(wanted, rel=within)
        for places in (128, 384, 512):
            assert found.prefill_seconds(places) == pytest.approx(
                true.prefill_seconds(places), rel=within
            )
        assert found.gap == pytest.approx(true.gap, rel=within)
        assert all(value >= 0 for value in vars(found).values())


def test_a_meter_that_saw_little_keeps_the_proportions_it_was_given():
    meter = CostMeter()
    assert meter.costs(COSTS) == COSTS
    meter.take(BeatStats(steps=8, row_places=4, decode_seconds=3 * COSTS.decode_seconds(8, 4)))
    found = meter.costs(COSTS)
    assert found.decode_seconds(2, 16) == pytest.approx(3 * COSTS.decode_seconds(2, 16))
    assert found.prefill_seconds(99) == pytest.approx(3 * COSTS.prefill_seconds(99))


def test_rows_keep_their_share_where_all_steps_had_as_many():
    true = Costs(0.002, 0.01, 0.0008, 0.005, 0.0006, step_place=1e-7)
    meter = CostMeter()
    for steps, view in itertools.product((1, 4, 8), (128, 256, 512)):
        seconds = true.decode_seconds(steps, 64, view)
        meter.take(BeatStats(steps=steps, row_places=64, view=view, decode_seconds=seconds))
    found = meter.costs(true.scaled(2.0))
    for steps, view in ((1, 128), (6, 512), (8, 384)):
        wanted = true.decode_seconds(steps, 64, view)
        assert found.decode_seconds(steps, 64, view) == pytest.approx(wanted, rel=1e-3)
    assert found.draft_share == pytest.approx(true.draft_share, rel=0.05)
    assert found.verify_seconds(64, 7) == pytest.approx(true.verify_seconds(64, 7), rel=0.05)


def test_speculative_blocks_are_another_programs():
    meter = CostMeter()
    meter.take(BeatStats(steps=8, row_places=4, decode_seconds=9.0, draft=3))
    assert meter.costs(COSTS).decode_seconds(1, 1) == COSTS.decode_seconds(1, 1)
