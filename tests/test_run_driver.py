"""The driver from its command line: flags, exit codes, one-line errors; the engine is a fake."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from compress_makers import config_file, model_folder
from forked_drivers import forks_of

ROOT = Path(__file__).parents[1]
# The driver as it is, but with an engine that echoes its prompts.
ECHO = """
import sys, types
sys.path.insert(0, {tests!r})
from jobs_fakes import ByteTokenizer, FakeEngine
from lepton_jax.tensors import ParamSpec

class LeptonEngine:
    def __init__(self, sync=None):
        pass
    fingerprint = "echo"
    receipt, feedback = {{"digest": "int8: 25% of the bytes"}}, None
    tokenizer = ByteTokenizer()
    def __enter__(self):
        return self
    def __exit__(self, *_):
        pass
    def load_model(self, path, **options):
        self.path = path
        if path not in ("echo", "large"):
            raise ValueError("model path " + repr(path) + " doesn't exist")
        specs = {{"embed": ParamSpec((4, 4), "float32", ("vocab", "embed"), 1)}}
        config = types.SimpleNamespace(tie_embeddings=True)
        model = types.SimpleNamespace(specs=specs, config=config)
        self.loaded = types.SimpleNamespace(model=model, bytes=64, leaves=())
    def start(self, workload, profile):
        if self.path == "large":
            raise RuntimeError("RESOURCE_EXHAUSTED: 9 GiB are missing\\nin a long list")
        self.engine = FakeEngine()

sys.modules["lepton_jax.api"] = types.SimpleNamespace(LeptonEngine=LeptonEngine)
"""
NEEDED = ("api", "distributed.hosts", "jobs.driver", "jobs.tuning", "jobs.report_page")


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    """A driver's end in a folder."""
    no_profiles = str(tmp_path_factory.mktemp("cache"))
    with forks_of("run", imports=NEEDED, before=ECHO.format(tests=str(ROOT / "tests"))) as drive:
        yield functools.partial(drive, XDG_CACHE_HOME=no_profiles)


@pytest.fixture
def files(tmp_path):
    """A config, and an input with a good row and a bad one."""
    job = {"input": "in.jsonl", "output": "out.jsonl"}
    overrides = {"model": {"path": "echo"}, "job": job, "sampling": {"logprobs": 1}}
    (tmp_path / "config.py").write_text(f"def get_config(arg=None):\n    return {overrides}\n")
    (tmp_path / "broken.py").write_text("def get_config(arg=None):\n    return 1 / 0\n")
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "hi"}\n{"id": "b"}\n')
    return tmp_path


def test_answers_a_summary_and_the_exit_codes(drive, files):
    done = drive(files, "--config=config.py", "--config.engine.rows=2", "--explain")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("int8: 25% of the bytes\n")
    assert done.stdout.strip().endswith("no knob was turned")
    rows = [json.loads(line) for line in (files / "out.jsonl").read_text().splitlines()]
    assert rows[0]["text"] == "hi" and len(rows[0]["logprobs"]) == 3
    assert rows[1]["error"]["type"] == "invalid_row"
    summary = json.loads((files / "out.jsonl.summary.json").read_text())
    assert (summary["rows"], summary["errors"]) == (2, 1)
    assert (summary["optimizer"]["profile"], summary["optimizer"]["decisions"]) == (None, 0)
    assert "2 (1 errors)" in done.stdout
    assert "2/2" in done.stderr
    assert re.search(r"\d tokens/s, 1 errors\]", done.stderr)
    (files / "in.jsonl").write_text('{"id": "a", "prompt": "hi"}\n')
    assert drive(files, "--config=config.py", "--config.sampling.logprobs=none").returncode == 0
    assert "logprobs" not in (files / "out.jsonl").read_text()


MISTAKES = [
    ([], "--config is missing"),
    (["--config.engine.rows=2"], "--config is missing"),
    (["--config=nope.py"], "there is no such file"),
    (["--config=config.py", "--config.engine.row=2"], "did you mean 'rows'"),
    (["--config=config.py", "--config.engine.rows=two"], "--config.engine.rows=two"),
    (["--config=config.py", "--config.engine.rows=0"], "rows=0 is not allowed: want 1"),
    (["--config=config.py", "--config.sampling.seed=x"], "want a whole number or none"),
    (["--config=config.py", "--config.mesh.model=0"], "model=0 is not allowed"),
    (["--config=config.py", "--follow=2"], "job.exact=True is not allowed: want false"),
    (["--config=config.py", "--follow=-1", "--config.job.exact=false"], "job.follow=-1.0 is not"),
    (["--config=config.py", "--input=x"], "--input; did you mean --config.job.input?"),
    (["--config=config.py", "--explian"], "unknown flag --explian; did you mean --explain?"),
    (["--config=config.py", "stray"], "unknown arguments 'stray'"),
    (["--config=config.py", "--config.model.path=gone"], "'gone' doesn't exist"),
    (["--config=config.py", "--config.job.input=gone"], "'gone' can't be read: No such file in /"),
    (["--config=config.py", "--config.job.output=o.xlsx"], "ends in .xlsx: want .jsonl"),
    (["--config=config.py", "--config.job.output="], "job.output is empty"),
    (["--config=config.py", "--config.optimizer.feedback=on"], "set job.exact=false"),
    (["--config=config.py", "--config.optimizer.feedback=no"], "one of off, deterministic, on"),
    (["--config=config.py", "--config.pool.ray=2", "--explain"], "leave out pool.ray"),
    (["--config=config.py", "--config.model.path=large"], "too little memory: lower config.engine"),
    (["--config=broken.py"], "get_config fails: ZeroDivisionError"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(drive, files, arguments, message):
    done = drive(files, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_table_in_and_parquet_out(drive, files):
    (files / "in.csv").write_text("key,question,label\nk1,hi,x\nk2,,y\n")
    done = drive(
        files,
        "--config=config.py",
        "--config.job.input=in.csv",
        "--config.job.output=out.parquet",
        "--config.job.columns=prompt=question,id=key",
        "--config.job.keep=label",
    )
    assert done.returncode == 1, done.stderr
    rows = pyarrow.parquet.read_table(files / "out.parquet").to_pylist()
    assert [(row["id"], row["label"], row["text"]) for row in rows] == [
        ("k1", "x", "hi"),
        ("k2", "y", None),
    ]
    assert "k1: hi" in done.stdout


def test_a_report_and_scalars_where_they_are_asked_for(drive, files):
    done = drive(files, "--config=config.py", "--report", "--config.job.tensorboard=events")
    assert done.returncode == 1, done.stderr
    assert "<svg" in (files / "out.jsonl.report.html").read_text()
    assert any((files / "events").iterdir())
    refused = drive(files, "--config=config.py", "--config.job.tensorboard=in.jsonl/x")
    assert refused.returncode == 2 and refused.stdout == "int8: 25% of the bytes\n"


@pytest.mark.slow
def test_two_replicas_of_a_model_and_what_each_did(tmp_path):
    """The engine as it is, on a tiny model."""
    (tmp_path / "in.jsonl").write_text("".join(f'{{"prompt": "row {n}"}}\n' for n in range(4)))
    config = config_file(
        tmp_path / "config.py",
        model={"path": str(model_folder(tmp_path / "model"))},
        engine={"rows": 2, "page_size": 16, "max_len": 32, "prefill_chunk": 32},
        sampling={"max_tokens": 4, "ignore_eos": True},
        job={"input": "in.jsonl", "output": "out.jsonl", "report": True},
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "lepton_jax.run", f"--config={config}", "--config.mesh.data=2"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    pool = json.loads((tmp_path / "out.jsonl.summary.json").read_text())["pool"]
    assert [replica["rows"] for replica in pool["replicas"]] == [2, 2]
    assert "replica 1" in run.stdout and "at best" in run.stdout
    assert "<td>replica 1</td>" in (tmp_path / "out.jsonl.report.html").read_text()


def test_another_run_is_refused_until_told_to_start_over(drive, files):
    (files / "out.jsonl.partial").write_text('{"id": "a", "text": ""}\n')
    (files / "out.jsonl.partial.meta").write_text('{"format": 3, "model": "another"}')
    done = drive(files, "--config=config.py")
    assert done.returncode == 2
    assert "the model is another one" in done.stderr and "Traceback" not in done.stderr
    assert drive(files, "--config=config.py", "--config.job.restart=true").returncode == 1


def test_a_summary_that_cannot_be_written_is_no_traceback(drive, files):
    (files / "out.jsonl.summary.json").mkdir()
    done = drive(files, "--config=config.py")
    assert done.returncode == 1
    assert "summary.json can't be written" in done.stderr and "Traceback" not in done.stderr
    assert "2 (1 errors)" in done.stdout


ENDLESS = """
import signal, sys, time
from lepton_jax import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
def main(config):
    try:
        print("begun", flush=True)
        while True:
            time.sleep(0.01)
            if config.job.follow:  # as one that says more than its reader wants
                print("more", flush=True)
    finally:
        print("given back", file=sys.stderr, flush=True)

cli.run_driver(main)
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGPIPE])
def test_an_end_from_outside_gives_back_what_is_held(files, end):
    (files / "endless.py").write_text(ENDLESS)
    command = [sys.executable, "endless.py", "--config=config.py", "--config.job.exact=false"]
    command.append(f"--config.job.follow={int(end == signal.SIGPIPE)}.0")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=files, env=environment, **pipes) as driver:
        assert driver.stdout.readline() == "begun\n"
        if end == signal.SIGPIPE:
            driver.stdout.close()
        else:
            driver.send_signal(end)
        _, said = driver.communicate(timeout=60)
    assert driver.returncode == 128 + end
    assert said == "given back\n" + "interrupted\n" * (end == signal.SIGINT)


def test_help_documents_every_field():
    """In a process of its own, as everyone runs it."""
    command = [sys.executable, "-m", "lepton_jax.run", "--helpfull"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for text in ("--config.engine.rows (int, default 32)", "--config.sampling.seed (int | None"):
        assert text in done.stdout
