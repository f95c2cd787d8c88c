"""Predicted against measured on the CPU at hand, and plans made for it.

The error is printed (`pytest -s`) and kept in the report's properties. Bounds are wide: other work
on the machine slows the engine and the calibration at different moments.
"""

import dataclasses
import json

import jax
import pytest
from compress_makers import model_folder

from lepton_jax import LeptonEngine, SamplingParams
from lepton_jax.config import (
    CompressionSection,
    EngineSection,
    MeshSection,
    ModelSection,
    PlanSection,
    RunConfig,
)
from lepton_jax.planning import chips
from lepton_jax.planning.plan import make_plan
from lepton_jax.planning.report import as_json

PROMPT, NEW = 48, 17


def run_config(path, *, preset, rows, compile=False):
    return RunConfig(
        model=ModelSection(path=str(path)),
        compression=CompressionSection(preset=preset),
        engine=EngineSection(rows=rows, max_len=96, prefill_chunk=64),
        plan=PlanSection(compile=compile, context=PROMPT + NEW // 2),
    )


def measured(config):
    """Seconds of a decode step: the best of three batches of full rows."""
    rows, params = config.engine.rows, SamplingParams(max_tokens=NEW, ignore_eos=True)
    best = float("inf")
    with LeptonEngine() as lepton:
        lepton.load_model(config=config)
        lepton.start(workload=[(PROMPT, params)] * rows)
        for batch in range(4):  # the first waits for programs
            timings = lepton.engine.runner.timings
            before = dataclasses.replace(timings)
            prompts = [
                [1 + (batch + 7 * r + 3 * i) % 60 for i in range(PROMPT)] for r in range(rows)
            ]
            lepton.generate(prompts, params)
            steps = timings.decode_steps - before.decode_steps
            if batch:
                best = min(best, (timings.decode_seconds - before.decode_seconds) / steps)
    return best


def error_of(config, record_property, monkeypatch):
    """Measured over predicted, of an engine that has the machine to itself."""
    chips.measured_cpu.cache_clear()  # as busy as now
    with monkeypatch.context() as alone:
        alone.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        plan = make_plan(config)
    ratio = measured(config) / plan.step_seconds
    name = f"{config.compression.preset} {config.engine.rows} rows"
    record_property(name, ratio)
    print(f"{name}: predicted {1e3 * plan.step_seconds:.2f} ms, measured {ratio:.2f} times that")
    return ratio


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["none", "w8a8"])
def test_smollm2_takes_about_as_long_as_predicted(
    smollm2_path, record_property, monkeypatch, preset
):
    config = run_config(smollm2_path, preset=preset, rows=4)  # one program decodes them
    assert 0.25 < error_of(config, record_property, monkeypatch) < 8


def test_devices_of_one_cpu_have_their_parts_of_its_memory_and_speed(tmp_path, monkeypatch):
    rates = dict(bandwidth=8e9, float32=8e10, bf16=8e10, int8=16e10)
    machine = chips.Chip("cpu", memory=8 << 30, operation=1e-6, platform="cpu", **rates)
    monkeypatch.setattr(chips, "measured_cpu", lambda: machine)
    config = run_config(model_folder(tmp_path / "model"), preset="none", rows=4)
    every = make_plan(config)  # eight devices
    assert every.replicas == 8 and every.budget == int(0.9 * (1 << 30))
    assert (every.chip.bandwidth, every.chip.int8, every.chip.operation) == (1e9, 2e10, 8e-6)
    two = make_plan(dataclasses.replace(config, mesh=MeshSection(data=2)))
    assert two.budget == every.budget and two.chip.bandwidth == 4e9  # the others are idle
    assert two.tokens_per_second == pytest.approx(every.tokens_per_second)
    shared = make_plan(dataclasses.replace(config, mesh=MeshSection(model=8)))
    assert shared.memory.weights < every.memory.weights / 2 and shared.decode_cost.interconnect > 0


def test_the_programs_of_this_machine_are_compiled_and_counted(tmp_path):
    config = run_config(model_folder(tmp_path / "model"), preset="int8", rows=4, compile=True)
    plan = make_plan(config)
    assert plan.target.name == "cpu" and plan.fits
    assert plan.decode.memory.weights == plan.served.weight_bytes
    assert plan.decode.step_bytes >= plan.decode_cost.weight_bytes
    assert 0 <= plan.memory.other < 2**20
    assert as_json(plan)["compiled_decode"]["collectives"] == {}
    json.dumps(as_json(plan))
