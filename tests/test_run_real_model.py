"""The driver on the real model: the shipped prompts, and a process killed between its blocks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def start(tmp_path, model, output, *flags):
    command = [sys.executable, "-m", "lepton_jax.run", "--config=configs/quickstart.py"]
    settings = {"model.path": model, "compression.preset": "none", "job.output": tmp_path / output}
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    with (tmp_path / "log.txt").open("wb") as log:
        return subprocess.Popen([*command, *flags], cwd=ROOT, stdout=log, stderr=log)


def finish(process, tmp_path):
    code = process.wait(timeout=540)
    assert code == 0, (tmp_path / "log.txt").read_text()[-3000:]


def test_the_shipped_prompts_are_answered_in_order(tmp_path, smollm2_path):
    flags = ["--config.sampling.max_tokens=12", "--explain"]
    finish(start(tmp_path, smollm2_path, "out.jsonl", *flags), tmp_path)
    prompts = (ROOT / "configs/data/quickstart.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(answers) == 32
    assert [row["id"] for row in answers] == [json.loads(line)["id"] for line in prompts]
    assert answers[0]["text"] == "The capital of France is Paris."
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert (summary["rows"], summary["errors"], summary["late_compiles"]) == (32, 0, 0)
    said = (tmp_path / "log.txt").read_text()
    decisions = re.findall(r"^beat \d+: (\w+) \S+ -> \S+: .+ \(.+\)$", said, re.MULTILINE)
    assert len(decisions) == summary["optimizer"]["decisions"] > 0


def test_a_killed_process_leaves_rows_that_the_next_one_goes_on_from(tmp_path, smollm2_path):
    """Where activations are int8 the least rounding shows, and in drawn tokens most of all."""
    name, whole = "out.parquet", "whole.parquet"
    rows = (ROOT / "configs/data/quickstart.jsonl").read_text().splitlines()[:8]
    (tmp_path / "in.jsonl").write_text("\n".join(rows) + "\n")
    flags = [
        f"--config.job.input={tmp_path / 'in.jsonl'}",
        "--config.engine.rows=2",
        "--config.engine.prefill_chunk=128",
        "--config.sampling.max_tokens=40",
        "--config.compression.preset=w8a8",
        "--config.sampling.temperature=0.9",
    ]
    finish(start(tmp_path, smollm2_path, whole, *flags), tmp_path)
    process = start(tmp_path, smollm2_path, name, *flags)
    partial = tmp_path / f"{name}.partial"
    deadline = time.monotonic() + 300
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not os.path.exists(tmp_path / name)
    done = partial.read_bytes().count(b"\n")
    finish(start(tmp_path, smollm2_path, name, *flags), tmp_path)
    summary = json.loads((tmp_path / f"{name}.summary.json").read_text())
    assert (summary["rows"], summary["resumed_rows"]) == (8, done)
    assert (tmp_path / name).read_bytes() == (tmp_path / whole).read_bytes()
