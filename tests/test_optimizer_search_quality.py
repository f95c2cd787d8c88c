"""What a search finds, on engines that only take time: everything is run, so the best is known.

The true costs aren't those of the roofline that predictions begin with.
"""

import dataclasses
import random
import types

import jax.numpy as jnp
import numpy as np
import pytest
from engine_reference import tiny

from lepton_jax.config import EngineSection, OptimizerSection, RunConfig, SamplingParams
from lepton_jax.models.build import abstract_model
from lepton_jax.optimizer import predict
from lepton_jax.optimizer import search as searching
from lepton_jax.optimizer.costs import ON_CPU, Costs
from lepton_jax.optimizer.feedback import Feedback
from lepton_jax.optimizer.found import Found
from lepton_jax.optimizer.play import Play
from lepton_jax.optimizer.predict import Predictor
from lepton_jax.optimizer.sample import SampledRequest
from lepton_jax.optimizer.search import Search
from lepton_jax.optimizer.simulated_engine import SimulatedEngine
from lepton_jax.optimizer.space import space
from lepton_jax.optimizer.trial import Trial
from lepton_jax.planning.chips import Chip

CHIP = Chip("cpu", memory=8 << 30, bandwidth=1e10, float32=1e11, bf16=1e11, int8=2e11)
TPU = Costs(0.001, 0.008, 0.00001, 0.008, 0.00001, step_place=2e-7, gap=0.0005)
SPACE = {
    ("engine.rows",): [(4,), (16,), (64,)],
    ("engine.decode_block",): [(2,), (8,)],
    ("engine.prefill_chunk",): [(64,), (512,)],
    ("mesh.data", "mesh.model"): [(1, 1), (2, 1)],
}
GIVEN = ("engine.speculation", "engine.prefill_sizes", "engine.attention_block")

MODEL = abstract_model(
    dataclasses.replace(tiny("llama")[0].config, max_position=512), jnp.float32, jnp.float32
)


def requests(count, *, prompt, limit) -> list[SampledRequest]:
    draw = random.Random(count)
    return [
        SampledRequest(
            tuple(draw.randrange(90) for _ in range(draw.randint(*prompt))),
            SamplingParams(max_tokens=limit(draw)),
        )
        for _ in range(count)
    ]


WORK = {
    "short": requests(70, prompt=(20, 60), limit=lambda draw: 1 + int(draw.expovariate(0.2))),
    "long": requests(24, prompt=(10, 30), limit=lambda draw: 90),
    "tail": requests(40, prompt=(20, 200), limit=lambda d: min(200, int(8 * d.paretovariate(0.8)))),
}


def asked(**fields) -> RunConfig:
    """A config that a search begins with."""
    engine = EngineSection(page_size=16, max_len=512)
    return RunConfig(engine=engine, optimizer=OptimizerSection(**fields))


def tried_out(costs: Costs, config: RunConfig, sample, *, draw, noise=0.0) -> Trial:
    """A run on machines with these costs."""
    sizes = Predictor(MODEL, sample)._sizes(config)
    seconds, beats, whole = [], [], []
    for n in range(config.mesh.data):
        factor = (lambda d: d.lognormvariate(0, noise)) if noise else (lambda d: 1.0)
        engine = SimulatedEngine(sizes, costs, noise=factor, seed=draw.randrange(1 << 30))
        Feedback(engine, timed=False, costs=costs)
        part = sample[n :: config.mesh.data]
        rows = [predict.simulated(request, request.limit) for request in part]
        play = Play.of(engine, rows, queue=sizes.queue)
        seconds.append(engine.seconds)
        beats += play.beats
        clock = play.clock(costs)
        whole += list(clock[play.ended] - clock[play.added])
    outputs = tuple((1,) * request.limit for request in sample)
    late = float(np.percentile(whole, 95))
    return Trial(max(seconds), late, late, outputs, 0.0, 0, tuple(beats), {})


@pytest.fixture
def find(monkeypatch):
    """`find(costs, requests, **options)`: a search on machines with these costs."""
    loaded = types.SimpleNamespace(model=MODEL, leaves=())
    monkeypatch.setattr(searching.Shelf, "model", lambda *_: loaded)
    monkeypatch.setattr(Predictor, "_chip", lambda *_: CHIP)  # each device is one of its own

    def find(costs: Costs, work, *, noise=0.0, objective="throughput", **options) -> Found:
        draw = random.Random(0)

        def try_out(models, config, sample, **_) -> Trial:
            return tried_out(costs, config, sample, draw=draw, noise=noise)

        def take_turns(finalists, sample, **_) -> list[Trial]:
            return [try_out(one.models, one.config, sample) for one in finalists]

        monkeypatch.setattr(searching, "try_out", try_out)
        monkeypatch.setattr(searching, "take_turns", take_turns)
        config = asked(objective=objective, trials=options.pop("trials", 5))
        accuracy = types.SimpleNamespace(kl=lambda precision: 0.0)
        options = dict(choices=SPACE, accuracy=accuracy, given=GIVEN) | options
        return Search(config, work, types.SimpleNamespace(eos_ids=()), **options).run()

    return find


@pytest.mark.parametrize(("name", "costs"), [("short", TPU), ("long", TPU), ("tail", ON_CPU)])
def test_five_trials_come_within_5_percent_of_the_best_of_all(find, name, costs):
    work = WORK[name]
    few = find(costs, work, noise=0.05)
    assert len(few.tried) <= 6

    def seconds(candidate) -> float:
        config = candidate.applied(asked())
        return tried_out(costs, config, work, draw=random.Random(0)).seconds

    every = {candidate: seconds(candidate) for candidate in space(asked(), SPACE, given=GIVEN)}
    assert len(every) == few.considered == 4 * 2 * 2 * 2
    best, chosen = min(every, key=every.get), few.best.candidate
    assert seconds(chosen) <= 1.05 * every[best], (chosen.text(), best.text())
    many = find(costs, work, trials=10, margin=float("inf"))
    errors = [abs(one.error) for one in many.tried[3:]]
    assert len(errors) >= 7 and np.median(errors) < 0.1


def test_the_cheapest_is_not_the_fastest(find):
    """Four replicas are quicker, and each is paid for."""
    found = {goal: find(TPU, WORK["long"], objective=goal).best for goal in ("throughput", "cost")}
    meshes = {goal: dict(best.candidate.fields)["mesh.data"] for goal, best in found.items()}
    assert meshes["throughput"] > meshes["cost"] == 1
    assert found["throughput"].trial.seconds < found["cost"].trial.seconds
    assert found["cost"].score == found["cost"].trial.seconds
    assert found["throughput"].score == found["throughput"].trial.seconds
