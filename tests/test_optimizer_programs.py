"""Programs that are compiled while a job runs: only where they pay, and answers stay."""

import dataclasses
import math
import random
import time

import pytest
from engine_reference import tiny
from test_optimizer_controller import CPU, DEFAULT, SIZES, TPU, WORK

from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine.knobs import Knobs
from lepton_jax.engine.loop import Engine
from lepton_jax.optimizer.controller import Controller, Machine
from lepton_jax.optimizer.costs import CostMeter, Costs
from lepton_jax.optimizer.decisions import PROGRAM, explained
from lepton_jax.optimizer.feedback import Feedback
from lepton_jax.optimizer.simulated_engine import SimulatedEngine
from lepton_jax.telemetry import BeatStats


def served(work, costs, *, compile_seconds, timed=True, **options):
    engine = SimulatedEngine(SIZES, costs, compile_seconds=compile_seconds, **options)
    engine.scheduler.turn(**DEFAULT)
    feedback = Feedback(engine, timed=timed, costs=costs)
    return engine.run(work), [d for d in feedback.decisions if d.knob == PROGRAM]


@pytest.mark.parametrize("name", ["medium", "long"])
def test_the_tail_of_a_job_gets_its_program(name):
    """Rows run out: 32 places for 16 rows cost a CPU nearly twice what 16 cost."""
    without, none = served(WORK[name], CPU, compile_seconds=math.inf)
    seconds, decisions = served(WORK[name], CPU, compile_seconds=0.05)
    assert not none and decisions
    assert seconds < without - sum(d.numbers["compile_seconds"] for d in decisions)
    assert len(decisions) <= 2 * 2  # 16 and 8 between 4 and 32, for each view


def test_the_clock_decides_so_a_deterministic_job_compiles_nothing():
    assert not served(WORK["medium"], CPU, compile_seconds=0.05, timed=False)[1]


def test_what_does_not_pay_is_left():
    assert not served(WORK["medium"], TPU, compile_seconds=0.05)[1]  # rows cost it nothing
    assert not served(WORK["medium"], CPU, compile_seconds=60.0)[1]


def test_noise_makes_it_compile_no_more_than_there_is():
    for seed in range(5):
        _, decisions = served(
            WORK["long"],
            CPU,
            compile_seconds=0.3,
            noise=lambda draw: math.exp(draw.gauss(0, 0.5)),
            seed=seed,
        )
        keys = [(d.before, d.after) for d in decisions]
        assert all(after <= before / 2 for before, after in keys)
        assert len(decisions) <= 2 * 2


def beats(controller: Controller, beat: BeatStats, count: int = 4) -> list:
    return [d for _ in range(count) for d in controller.decide(beat) if d.knob == PROGRAM]


def machine(seconds: float) -> Machine:
    knobs = Knobs(8, 512, 32)
    return Machine(knobs, knobs, (128, 512), (4, 32), compile_seconds=lambda: seconds)


DRAIN = BeatStats(
    rows=12, row_places=32, view=256, steps=8, rounds=96, decode_tokens=96, ended=2,
    decode_seconds=8 * 0.32, running=12, slots=32, tokens_left=500,
)  # fmt: skip


def test_what_is_reckoned():
    # Of a step of 0.32 s, 32 rows are all but 1/10: 16 rows take 0.176 s. A row lives 48 steps, and
    # 12 rows fall to 4 in 48 (1/5 + ... + 1/12) = 48.96, or 15.67 s, of which compiling takes 2.8.
    costs = Costs(block=0.0, step=0.032, step_row=0.009, program=0.0, program_token=0.001)
    controller = Controller(machine(2.8), costs=costs, meter=CostMeter())
    (decision,) = beats(controller, DRAIN)
    assert (decision.beat, decision.before, decision.after) == (4, 32, 16)
    numbers = decision.numbers
    assert numbers["steps"] == pytest.approx(48 * sum(1 / left for left in range(5, 13)))
    assert numbers["step_before"] == pytest.approx(0.32, rel=1e-3)
    assert numbers["step_after"] == pytest.approx(0.176, rel=1e-3)
    assert numbers["saved_seconds"] == pytest.approx(0.45 * (48.96 * 0.32 - 2.8), rel=1e-3)
    assert "decode_program 32 -> 16: no row waits" in explained([decision])
    assert not beats(controller, DRAIN, 40)  # it was asked for
    assert not beats(Controller(machine(3.0), costs=costs, meter=CostMeter()), DRAIN)


def test_the_last_row_gets_a_program_of_its_own():
    costs = Costs(block=0.0, step=0.032, step_row=0.032, program=0.0, program_token=0.001)
    last = dict(rows=1, row_places=4, rounds=8, running=1, ended=1, tokens_left=2000)
    beat = BeatStats(**{**vars(DRAIN), **last, "decode_seconds": 8 * 0.16})
    half = dataclasses.replace(beat, ended=0)
    controller = Controller(machine(0.1), costs=costs, meter=CostMeter())
    decisions = [d for b in (beat, half) * 8 for d in controller.decide(b) if d.knob == PROGRAM]
    assert [(d.before, d.after) for d in decisions] == [(4, 1)]
    assert decisions[0].numbers["steps"] == pytest.approx(16, rel=0.05)  # a row's life


@pytest.mark.parametrize(
    "change",
    [dict(waiting=1), dict(tokens_left=5), dict(ended=0), dict(running=17), dict(running=0),
     dict(running=3), dict(draft=3), dict(steps=0, decode_seconds=0.0)],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_when_nothing_is_compiled(change):
    costs = Costs(block=0.0, step=0.032, step_row=0.009, program=0.0, program_token=0.001)
    controller = Controller(machine(1.0), costs=costs, meter=CostMeter())
    assert not beats(controller, BeatStats(**{**vars(DRAIN), **change}), 12)


def test_an_engine_runs_it_once_it_is_there():
    model, leaves = tiny("llama", layers=1)
    section = EngineSection(
        rows=8, page_size=8, num_pages=80, prefill_chunk=64, decode_block=2, max_len=64
    )
    draw = random.Random(3)
    work = [[draw.randrange(3, 70) for _ in range(5)] for _ in range(7)]
    limits = [4, 4, 30, 30, 30, 30, 30]

    def run(*, grown: bool):
        engine = Engine(model, leaves, section=section)
        engine.runner.rungs.decode[:] = [1, 8]
        for n, (prompt, limit) in enumerate(zip(work, limits, strict=True)):
            params = SamplingParams(max_tokens=limit, ignore_eos=True)
            engine.add_request(str(n), prompt, params)
        tokens, places = {str(n): [] for n in range(7)}, []
        read = engine.runner.read

        def noted(flight):
            if flight.decode_shape:
                places.append((len(flight.plan.rows), flight.decode_shape.rows))
            return read(flight)

        engine.runner.read = noted
        while engine.has_work:
            for out in engine.step():
                tokens[out.request_id] += out.token_ids
            if grown and len(places) == 4:
                engine.runner.grow(4)
                engine.runner.grow(5)
            if grown and len(places) == 6:
                deadline = time.monotonic() + 120
                while len(engine.runner.programs.compiled) < 4 and time.monotonic() < deadline:
                    time.sleep(0.05)
        assert engine.stats()["late_compiles"] == 0
        return tokens, places

    expected, regular = run(grown=False)
    assert {size for _, size in regular} == {8}
    tokens, places = run(grown=True)
    assert tokens == expected
    assert [size for _, size in places[:5]] == [8] * 5
    assert places[-1] == (5, 5) and all(rows <= size for rows, size in places)
