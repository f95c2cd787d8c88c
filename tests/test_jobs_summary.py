"""The summary and the numbers below it, by hand."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
import types

import jax
import psutil
import pytest

from lepton_jax import compile_cache
from lepton_jax.config import CascadeSection
from lepton_jax.distributed.replicas import process_stats
from lepton_jax.jobs.driver import Tally
from lepton_jax.jobs.framing import PlainFraming
from lepton_jax.jobs.openai_batch import BatchFraming
from lepton_jax.jobs.promise import Promise, Verdict
from lepton_jax.jobs.report_page import report_page
from lepton_jax.jobs.summary import (
    ModelCost,
    preview_text,
    summarize,
    summary_text,
    write_summary,
)
from lepton_jax.jobs.trace import Trace
from lepton_jax.telemetry import (
    DevicePeaks,
    StepStats,
    device_peaks,
    peak_memory_bytes,
    roofline,
    running_seconds,
)
from lepton_jax.tensors import ParamSpec, QTensor

STATS = {
    "prefill_tokens": 900,
    "prefill_padding": 100,
    "prefill_seconds": 2.0,
    "decode_tokens": 300,
    "decode_padding": 700,
    "decode_steps": 10,
    "decode_seconds": 0.5,
    "programs": 4,
    "compile_seconds": 3.0,
    "prompt_tokens": 7,
}
COST = ModelCost(weight_bytes=100, parameters=50, int8=False)


def test_stats_of_a_stretch():
    stretch = StepStats.of(STATS | {"decode_tokens": 400}) - StepStats.of(STATS)
    assert (stretch.decode_tokens, stretch.prefill_tokens) == (100, 0)
    whole = StepStats.of(STATS)
    assert (whole.prefill_rate, whole.decode_rate, whole.padding_waste) == (450, 600, 0.4)
    assert StepStats().prefill_rate is StepStats().decode_rate is None
    assert StepStats().padding_waste == 0


def test_what_speculation_gave():
    counts = STATS | {"proposed_tokens": 400, "accepted_tokens": 100, "verified_steps": 9}
    stats = StepStats.of(counts)
    assert (stats.acceptance, stats.tokens_per_step) == (0.25, 1.5)
    assert StepStats().acceptance is StepStats().tokens_per_step is None
    summary = summarize(Tally(), counts, cost=COST, output="out")
    assert summary["accepted_tokens"] == 100
    text = summary_text(summary)
    assert "100 of 400 proposed tokens accepted (25%), 1.50 tokens a step" in text
    assert "speculation" not in summary_text(summarize(Tally(), STATS, cost=COST, output="out"))
    asked = dict(cost=COST, output="out", speculation="lookup")
    assert "lookup proposed nothing" in summary_text(summarize(Tally(), STATS, **asked))
    assert "speculation" not in summary_text(summarize(Tally(), {}, **asked))  # nothing decoded


def test_preempted_rows_are_told():
    summary = summarize(Tally(), STATS | {"preemptions": 3}, cost=COST, output="out")
    assert "3 times a row was put back" in summary_text(summary)
    assert "preemptions" not in summary_text(summarize(Tally(), STATS, cost=COST, output="out"))


def test_what_became_of_a_cascade():
    promise = Promise(CascadeSection(agreement=0.9, calibration=50))
    for _ in range(50):
        promise.observe(Verdict("dense", "calibration", 1.0, True))
    account = promise.account() | {"of_dense_time": 0.5}
    summary = summarize(Tally(), STATS, cost=COST, output="out", cascade=account)
    text = summary_text(summary)
    assert "100.00% as the dense model chooses (100.00% to 100.00%); 90.00% promised" in text
    assert "the compressed model 0, the dense one 0 unsure, 0 audits, 50 calibration" in text
    assert "about 0.50 of what the dense model would take alone" in text
    early = summarize(Tally(), STATS, cost=COST, output="out", cascade=account | {"thresholds": []})
    assert "before its calibration of 50 rows: the dense model answered all" in summary_text(early)
    assert "agreement" not in summary_text(summarize(Tally(), STATS, cost=COST, output="out"))


def test_a_profile_is_told_beside_the_answers():
    told = {
        "profile": "p.json",
        "fields": {"compression.preset": "w8a8", "engine.rows": 64},
        "objective": "cost",
        "effect": 1.586,
        "kl": 0.00456,
        "decisions": 7,
    }
    summary = summarize(Tally(), STATS, cost=COST, output="out", optimizer=told)
    assert summary["optimizer"] == told
    text = summary_text(summary)
    assert "profile         compression.preset=w8a8, engine.rows=64 (p.json)" in text
    assert (
        "T1/T0 0.63, 1.59 times as cheap in seconds x devices, KL at most 0.0046 nats a token"
        in text
    )
    assert "knob turns      7" in text
    unmeasured = summary | {"optimizer": told | {"kl": None}}
    assert "KL not measured" in summary_text(unmeasured)
    without = told | {"profile": None, "fields": {}, "effect": None, "kl": None, "decisions": 0}
    text = summary_text(summary | {"optimizer": without})
    assert "profile" not in text and "turns" not in text


def test_what_replicas_did_is_in_text_json_and_page():
    assert '"pool": null' in json.dumps(summarize(Tally(), STATS, cost=COST, output="out"))
    done = {"tokens_per_second": 1234.5, "utilization": 0.987, "died": False}
    pool = {
        "replicas": [
            {"name": "0", "rows": 7, **done},
            {"name": "1", "rows": 5, **done, "utilization": 0.5, "died": True},
        ],
        "tail_idle": 0.013,
        "seconds": 10.0,
        "ideal_seconds": 9.5,
        "of_ideal": 0.95,
    }
    summary = summarize(Tally(), STATS | {"pool": pool}, cost=COST, output="out")
    assert json.loads(json.dumps(summary))["pool"] == pool
    page = report_page(summary, Trace(lambda: STATS))
    for name, value in (
        ("replica 0", "busy 99%, 7 rows, 1,234 tokens/s"),
        ("replica 1", "busy 50%, 5 rows, 1,234 tokens/s, died"),
        ("time T/m", "9.5 s at best, 10.0 s measured (95%); idle at the end 1.3%"),
    ):
        assert f"{name:<16}{value}\n" in summary_text(summary)
        assert f"<td>{name}</td><td>{value}</td>" in page
    alone = report_page(summarize(Tally(), STATS, cost=COST, output="out"), Trace(lambda: STATS))
    assert "<h2>Replicas</h2>" in page and "Replicas" not in alone


def test_the_device_is_that_of_the_process_which_has_it(monkeypatch):
    def none_here():
        raise AssertionError("the actors have the devices")

    process = {
        "device": "TPU v5 lite",
        "peak_memory_bytes": 2**30,
        "device_peak_memory_bytes": 3 * 2**30,
        "compile_cache_hits": 4,
        "compile_cache_misses": 5,
    }
    assert process.keys() - process_stats().keys() <= {"device_peak_memory_bytes"}
    monkeypatch.setattr(jax, "local_devices", none_here)
    summary = summarize(Tally(), STATS | process, cost=COST, output="out")
    assert {name: summary[name] for name in process} == process
    assert summary["roofline"]["decode_bandwidth"] is not None


def test_shares_of_the_peaks():
    peaks = device_peaks("TPU v5 lite")
    shares = roofline(
        StepStats.of(STATS), peaks, weight_bytes=int(8e9), parameters=int(8e9), int8=False
    )
    assert shares.decode_bandwidth == pytest.approx(8e9 * 10 / 0.5 / 0.819e12)
    assert shares.prefill_flops == pytest.approx(2 * 8e9 * 900 / 2 / 197e12)
    assert device_peaks("cpu") is None


def test_the_cost_of_a_model_is_what_one_token_visits():
    specs = {
        "embed": ParamSpec((10, 4), "int8", ("vocab", "embed"), 1),
        "norm": ParamSpec((4,), "float32", ("embed",)),
        "layers.0.experts_down": ParamSpec((8, 4, 5), "int8", ("experts", "embed", "ffn"), 1),
        "head": ParamSpec((10, 4), "int8", ("vocab", "embed"), 1),
    }
    config = types.SimpleNamespace(tie_embeddings=False, num_experts=8, experts_per_token=2)
    model = types.SimpleNamespace(specs=specs, config=config)
    assert ModelCost.of(model, 240, preset="w8a8") == ModelCost(80, 80, 1)
    config.tie_embeddings = True
    assert ModelCost.of(model, 240) == ModelCost(120, 120, 0)
    assert ModelCost.of(model, 240, devices=4) == ModelCost(30, 30, 0)


def test_what_is_int8_say_the_leaves():
    """A stored w8a8 model is loaded with preset none."""
    specs = {f"layers.0.{name}": ParamSpec((8, 8), "float32", ("x", "y"), 1) for name in "abcd"}
    config = types.SimpleNamespace(tie_embeddings=True)
    model = types.SimpleNamespace(specs=specs, config=config)
    spec = specs["layers.0.a"]
    leaves = (
        QTensor.planned(spec, values="int8", act_bits=8),
        QTensor.planned(spec, values="int8"),
        QTensor.planned(spec, values="float8_e4m3fn", act_bits=8),  # bfloat16's peak is its own
        spec,
    )
    cost = ModelCost.of(model, 512, leaves=leaves)
    assert cost == ModelCost(512, 256, 0.25)
    peaks = DevicePeaks(bandwidth=1.0, bf16=100.0, int8=200.0)
    stats = StepStats(prefill_tokens=10, prefill_seconds=1.0)
    share = roofline(stats, peaks, **dataclasses.asdict(cost)).prefill_flops
    assert share == pytest.approx(2 * 10 * (64 / 200 + 192 / 100))


def test_a_summary_names_what_the_job_did(tmp_path):
    tally = Tally(rows=0, resumed=1, seconds=2.5, first_seconds=7.1234)
    framing = PlainFraming(several_files=False)
    tally.count({"id": "a", "text": "x", "prompt_tokens": 3, "completion_tokens": 4}, framing)
    tally.count({"id": "b", "error": {"type": "refused", "message": ""}}, framing)
    summary = summarize(tally, STATS, cost=COST, output="out.jsonl")
    wanted = {
        "cut_answers": 0,
        "perplexity": None,
        "rows": 2,
        "errors": 1,
        "error_types": {"refused": 1},
        "resumed_rows": 1,
        "prompt_tokens": 3,
        "generated_tokens": 4,
        "seconds": 2.5,
        "first_token_seconds": 7.123,
        "prefill_tokens_per_second": 450,
        "decode_tokens_per_second": 600,
        "programs": 4,
        "compile_seconds": 3.0,
        "padding_waste": 0.4,
    }
    assert {name: summary[name] for name in wanted} == wanted
    assert summary["peak_memory_bytes"] > 2**20
    write_summary(summary, str(tmp_path / "summary.json"))
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    text = summary_text(summary)
    assert "2 (1 errors, 1 from an interrupted run)" in text
    assert "600 tokens/s" in text
    assert "7.1 s after the program's start" in text
    assert "first tokens" not in summary_text(summarize(Tally(), STATS, cost=COST, output="out"))
    if jax.default_backend() == "cpu":
        assert summary["roofline"] is None
        assert "not known" in text


def test_seconds_of_a_program_count_from_its_first_import():
    """Not from the process's beginning, which is that of a shell before it."""
    code = "import time; t0 = time.monotonic(); import lepton_jax; time.sleep(0.3); "
    code += (
        "from lepton_jax.telemetry import running_seconds as r; print(r(), time.monotonic() - t0)"
    )
    command = ["sh", "-c", f"sleep 1; exec {sys.executable} -c '{code}'"]
    running, own = map(float, subprocess.check_output(command, text=True).split())
    assert 0.3 <= running <= own
    before = running_seconds()
    time.sleep(0.05)
    assert running_seconds() - before >= 0.04


def test_answers_that_had_no_room_are_counted():
    ends = [{"text": "", "token_ids": [1], "finish_reason": end} for end in ("length", "stop")]
    tally, framing = Tally(), PlainFraming(several_files=False)
    for row in (*ends, {"choices": [ends[0], *ends]}, ends[0] | {"choices": ["kept", "column"]}):
        tally.count({"id": "a"} | row, framing)
    summary = summarize(tally, STATS, cost=COST, output="out")
    assert summary["cut_answers"] == 4
    assert "4 answers, at max_tokens or max_len" in summary_text(summary)
    assert "cut short" not in summary_text(summarize(Tally(), STATS, cost=COST, output="out"))
    batch = Tally()
    for choices in (ends, ends[:1]):
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        body = {"choices": choices, "usage": usage}
        line = {"custom_id": "a", "response": {"status_code": 200, "body": body}, "error": None}
        batch.count(line, BatchFraming())
    assert batch.cut == 2


def test_the_perplexity_of_a_file_is_that_of_all_its_tokens():
    framing = PlainFraming(several_files=False, mode="perplexity")
    rows = [
        {"perplexity": 2.0, "logprob": -3 * math.log(2), "tokens": 3, "bytes": 6},
        {"error": {"type": "refused", "message": ""}},
        {"perplexity": 8.0, "logprob": -math.log(8), "tokens": 1, "bytes": 3},
    ]
    tally = Tally()
    for row in rows:
        tally.count({"id": "a"} | row, framing)
    summary = summarize(tally, STATS, cost=COST, output="out")
    assert summary["perplexity"] == pytest.approx(2**1.5)  # 6 bits over 4 tokens
    assert summary["bits_per_byte"] == pytest.approx(6 / 9)
    assert "2.828 a token, 0.6667 bits a byte, of all texts" in summary_text(summary)
    impossible = {"perplexity": 1e304, "logprob": None, "tokens": 1, "bytes": 1}
    tally.count({"id": "b"} | impossible, framing)
    summary = summarize(tally, STATS, cost=COST, output="out")
    assert summary["perplexity"] is summary["bits_per_byte"] is None
    assert "perplexity" not in summary_text(summary)


def test_shares_appear_in_the_text_where_the_peaks_are_known():
    summary = summarize(Tally(), STATS, cost=COST, output="out")
    summary["roofline"] = {"decode_bandwidth": 0.5, "prefill_flops": None}
    summary["device_peak_memory_bytes"] = 2**30
    text = summary_text(summary)
    assert "50.0% of the memory bandwidth in decode" in text
    assert "on the device 1,024 MiB" in text


def test_a_summary_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    write_summary({}, str(tmp_path / "gone" / "summary.json"))
    assert "summary.json can't be written: No such file" in caplog.text


def test_a_preview_shows_the_first_answers_in_a_line_each():
    rows = [
        {"id": "a", "text": "one\n two" + " x" * 200, "token_ids": []},
        {"id": "b", "choices": [{"text": "first", "token_ids": []}, {"text": "second"}]},
        {"id": "c", "error": {"type": "refused", "message": "too long"}},
        {"id": "d", "logprob": -1.5, "prompt_tokens": 3},
        {"id": "e", "text": "", "token_ids": []},
    ]
    tally = Tally()
    for row in rows:
        tally.count(row, PlainFraming(several_files=False))
    lines = preview_text(tally).splitlines()
    assert lines[0].startswith("a: one two x x")
    assert lines[0].endswith("...") and len(lines[0]) < 170
    assert lines[1:] == [
        "b: first",
        "c: (refused) too long",
        'd: {"logprob": -1.5, "prompt_tokens": 3}',
    ]


def test_peak_memory_remembers_what_was_given_back():
    block = bytearray(b"x" * (256 << 20))
    held = psutil.Process().memory_info().rss
    del block
    assert psutil.Process().memory_info().rss < held - (128 << 20)
    assert peak_memory_bytes() > held - (1 << 20)  # the system counts in batches of pages


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    kept = jax.config.jax_compilation_cache_dir
    try:
        assert compile_cache.enable(tmp_path / "file" / "cache") is None
        assert "can't be written" in caplog.text
        compile_cache._use(str(tmp_path / "file" / "told"))  # as JAX_COMPILATION_CACHE_DIR does
        assert compile_cache.enable() is None
        assert "told can't be written" in caplog.text
        assert "set JAX_COMPILATION_CACHE_DIR to" in caplog.text
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home is known
        assert compile_cache.enable() is None
        assert "a cache in the home directory can't be written" in caplog.text
        assert compile_cache.enable(tmp_path / "cache") == tmp_path / "cache"
        before = compile_cache.counts()
        program = jax.jit(lambda x: x * 3.25 + 1).lower(1.0)
        program.compile()
        assert compile_cache.counts().misses == before.misses + 1
        assert any((tmp_path / "cache").iterdir())
        assert compile_cache.enable(tmp_path / "another") == tmp_path / "another"
        jax.jit(lambda x: x * 3.25 + 2).lower(1.0).compile()
        assert any((tmp_path / "another").iterdir())
    finally:
        compile_cache._use(kept)
