"""The bench driver and the comparison with peers: workloads, timing on a tiny model, reports."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from engine_reference import tiny

from lepton_jax import bench
from lepton_jax.config import BenchSection, CompressionSection, EngineSection, RunConfig
from lepton_jax.jobs import benchmark, starts, workloads
from lepton_jax.jobs.summary import ModelCost
from lepton_jax.jobs.workloads import WORKLOADS, Workload
from lepton_jax.telemetry import DevicePeaks, StepStats
from lepton_jax.tensors import QTensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import compare_peers  # noqa: E402

SECTION = EngineSection(rows=2, page_size=8, prefill_chunk=16, decode_block=2, max_len=64)
DECODE = Workload("decode", "decode", 3, 15, 9, rows=3)
PREFILL = Workload("prefill", "prefill", 2, 20, 1, rows=2)
JOB = Workload("job", "job", 5, 31, 4, varied=True)


@pytest.fixture(scope="module")
def loaded():
    """A tiny Llama as the loader would give it."""
    model, leaves = tiny("llama", layers=1)
    size = sum(leaf.nbytes for leaf in leaves)
    return types.SimpleNamespace(config=model.config, model=model, leaves=leaves, bytes=size)


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_are_what_the_workload_says(name):
    work = WORKLOADS[name]
    prompts = work.prompts(1, 1000)
    assert len(prompts) == work.requests
    assert [len(prompt) for prompt in prompts] == work.lengths()
    assert sum(work.lengths()) == work.prompt_tokens
    assert all(0 <= token < 1000 for prompt in prompts for token in prompt)
    assert prompts == work.prompts(1, 1000) != work.prompts(2, 1000)


def test_the_job_is_varied():
    lengths = WORKLOADS["job"].lengths()
    assert min(lengths) < 50 and max(lengths) > 250 and len(set(lengths)) > 80


def test_the_same_prompts_on_every_machine():
    assert JOB.lengths() == [8, 4, 9, 5, 5]
    assert JOB.prompts(7, 100)[0] == [34, 93, 62, 22, 82, 78, 7, 11]


def test_selecting_measurements():
    assert workloads.select("all") == ["starts", *WORKLOADS]
    assert workloads.select("job, decode_1") == ["job", "decode_1"]
    with pytest.raises(ValueError, match=r"'decode_2' is unknown: allowed are all, starts"):
        workloads.select("job,decode_2")


def test_timing_counts_each_kind_of_token(loaded):
    vocab = loaded.config.vocab_size
    decode = benchmark.Bench(loaded, SECTION, workload=DECODE)
    assert decode.engine.runner.sizes.rows == 3
    timing = decode.run(DECODE.prompts(0, vocab))
    assert timing.tokens == 3 * (9 - 3)  # the first block: an entry token and two steps
    assert 0 < timing.seconds < 60
    assert decode.run(DECODE.prompts(1, vocab)).tokens == timing.tokens
    one_by_one = dataclasses.replace(SECTION, prefill_chunk=8)
    late = benchmark.Bench(loaded, one_by_one, workload=DECODE)  # first tokens come in two beats
    assert late.run(DECODE.prompts(0, vocab)).tokens == timing.tokens
    prefill = benchmark.Bench(loaded, SECTION, workload=PREFILL)
    assert prefill.run(PREFILL.prompts(0, vocab)).tokens == 20


def test_rows_that_end_early_are_an_error(loaded):
    short = dataclasses.replace(SECTION, max_len=10)
    bench = benchmark.Bench(loaded, short, workload=DECODE)
    with pytest.raises(RuntimeError, match="want 9 tokens of each row, got"):
        bench.run(DECODE.prompts(0, loaded.config.vocab_size))


def test_a_record_says_what_was_measured(loaded):
    config = RunConfig(engine=SECTION, bench=BenchSection(repeats=3))
    record = json.loads(json.dumps(benchmark.measure(loaded, config, JOB)))
    values = record.pop("values")
    assert len(values) == 3 and record["best"] == max(values)
    assert record["value"] == sorted(values)[1] > 0
    expected = {"name": "job", "unit": "tokens/s", "preset": "none", "dtype": "float32"}
    assert expected.items() <= record.items()
    assert record["platform"] == jax.default_backend()
    assert record["programs"] >= 2 and record["compile_seconds"] > 0
    assert record["peak_rss_mb"] > 50 and record["device"]


def test_a_record_names_the_compression(loaded):
    engine = types.SimpleNamespace(stats=dict)

    def preset(loaded=loaded, **fields):
        section = CompressionSection(**fields)
        return benchmark.circumstances(loaded, engine, section)["preset"]

    assert (preset(), preset(preset="w8a8")) == ("none", "w8a8")
    assert preset(rules=("embed -> weights=int8",)) == "weights=int8"
    leaf = QTensor.planned(loaded.model.specs["embed"], values="int8")
    stored = types.SimpleNamespace(model=loaded.model, leaves=(leaf,))
    assert preset(stored) == "as stored"


def test_first_token_serves_no_more_than_it(loaded):
    config = RunConfig(engine=SECTION, compression=CompressionSection(preset="none"))
    record = benchmark.first_token(loaded, config, JOB)
    assert record["programs"] >= 2 and "value" not in record


def test_shares_of_a_known_device(monkeypatch):
    peaks = DevicePeaks(bandwidth=1e6, bf16=1e6, int8=2e6)
    monkeypatch.setattr(benchmark, "device_peaks", lambda kind: peaks)
    stats = StepStats(prefill_tokens=100, prefill_seconds=0.5, decode_steps=10, decode_seconds=2.0)
    cost = ModelCost(weight_bytes=1000, parameters=500, int8=False)
    assert benchmark._share(stats, cost, "decode") == pytest.approx(0.005)
    assert benchmark._share(stats, cost, "prefill") == pytest.approx(0.2)
    monkeypatch.setattr(benchmark, "device_peaks", lambda kind: None)
    assert benchmark._share(stats, cost, "decode") is None


def test_spread():
    assert benchmark.spread([3.0, 1.0, 2.5], "s", best=min) == {
        "value": 2.5,
        "unit": "s",
        "best": 1.0,
        "values": [3.0, 1.0, 2.5],
    }


# The comparison


def results(**rates):
    return {name: {"best": rate, "peak_rss_mb": 100 + rate} for name, rate in rates.items()}


def test_report_gives_the_ratios_of_our_best_and_slowest():
    names = ["ours int8", "ours w8a8", "peer x"]
    rates = dict(zip(names, (30, 80, 40), strict=True))
    text = compare_peers.report({"job": results(**rates)}, names)
    assert "| ours w8a8 | 80 | 180-180 |" in text
    assert "| our best / peer x | 2.00 (w8a8) |" in text
    assert "| our slowest / peer x | 0.75 (int8) |" in text
    assert "ratio" not in compare_peers.report({"job": results(**rates)}, names[:2])


def test_wrong_counts_of_tokens_are_refused():
    work = WORKLOADS["decode_8"]
    compare_peers.check("peer", work, 8 * 127)
    compare_peers.check("ours w8a8", work, 8 * 119)
    for name, tokens in (("peer", 8 * 119), ("ours w8a8", 8 * 128), ("ours w8a8", 8 * 20)):
        with pytest.raises(RuntimeError, match="decode_8 counted"):
            compare_peers.check(name, work, tokens)


def test_a_contender_that_fails_says_why():
    worker = compare_peers.Worker("x", sys.executable, {"engine": "none", "prepare": False})
    try:
        with pytest.raises(RuntimeError, match=r"x: KeyError: 'none'\n(.|\n)*Traceback"):
            worker.ask([[1]])
    finally:
        worker.stop()


def test_options_name_what_is_allowed(capsys):
    with pytest.raises(SystemExit):
        compare_peers.parse(["--measure=decode_3", "--model=x.gguf"])
    assert "--measure=decode_3 is unknown: allowed are decode_1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare_peers.parse(["--rounds=0", "--model=x.gguf"])
    assert "--rounds=0: want 1 or more" in capsys.readouterr().err


def test_contenders_are_told_all_they_need():
    options = compare_peers.parse(
        ["--model=x.gguf", "--presets=none:bfloat16,int8", "--peers=llama.cpp:Q8_0"]
    )
    specs = compare_peers.contenders(options)
    assert list(specs) == ["ours none:bfloat16", "ours int8", "llama.cpp Q8_0"]
    assert specs["ours int8"]["dtype"] == "auto"
    assert specs["ours none:bfloat16"]["preset"] == "none"
    assert specs["llama.cpp Q8_0"]["type"] == "Q8_0"


# Whole processes


def drive(*arguments, timeout=60, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lepton_jax.bench", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_the_driver_refuses_unknown_measurements():
    done = drive("--config=configs/bench.py", "--config.bench.measure=decode_7")
    assert done.returncode == 2, done.stderr
    assert "error: bench.measure='decode_7' is unknown" in done.stderr
    assert not done.stdout


def test_a_draft_model_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(RunConfig(engine=EngineSection(speculation="draft")))
    assert "error: bench measures one model" in capsys.readouterr().err


def test_a_start_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=r"exit code 2: .*nowhere\.py.* there is no such file"):
        starts.time_start(["--config=nowhere.py"], str(tmp_path))


@pytest.mark.slow
def test_starts_and_a_prefill_of_a_real_models_layers(beginning_path):
    done = drive(
        f"--config=configs/bench.py:{beginning_path}",
        "--config.bench.measure=starts,prefill_512x1",
        "--config.bench.repeats=1",
        "--config.engine.rows=4",
        "--config.engine.prefill_chunk=128",
        timeout=600,
        XLA_FLAGS="--xla_backend_optimization_level=0",
    )
    assert done.returncode == 0, done.stderr
    records = {r["name"]: r for r in map(json.loads, done.stdout.splitlines())}
    assert list(records) == ["cold_start", "warm_start", "prefill_512x1"]
    cold, warm, prefill = records.values()
    # Of few layers what else the machine does decides which start is quicker.
    assert warm["compile_seconds"] < cold["compile_seconds"]
    assert {r["unit"] for r in records.values()} == {"s", "tokens/s"}
    assert {r["preset"] for r in records.values()} == {"w8a8"}
    assert prefill["value"] > 0
