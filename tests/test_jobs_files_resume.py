"""A job that ends at any moment goes on and gives the same file, in every format and place.

The fast tests end it between two beats or within its last step; the slow one kills real processes.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from jobs_fakes import Killed, MortalEngine, job_config, run_job

from lepton_jax.jobs import output as output_module
from lepton_jax.jobs.files import journal
from lepton_jax.jobs.files.places import JobError

ROOT = Path(__file__).parents[1]
NAMES = ("out.jsonl", "out.csv", "out.parquet", "out.jsonl.gz", "out.csv.zst")
PLACES = [*NAMES, "memory://resume/out.jsonl", "memory://resume/out.parquet"]
ROWS = [{"id": f"r{i}", "prompt": "abc" * (1 + i * 5 % 7)} for i in range(30)] + [{"id": "r3"}]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    yield path
    store = fsspec.filesystem("memory")
    if store.exists("/resume"):
        store.rm("/resume", recursive=True)


def content(path):
    with fsspec.open(str(path), "rb") as file:
        return file.read()


def where(tmp_path, name):
    return name if "://" in name else tmp_path / "jobs" / name


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("beats", [9, 20, 35])
def test_a_job_cut_between_beats_goes_on(tmp_path, source, name, beats, monkeypatch):
    monkeypatch.setattr(journal, "_PIECE_LINES", 3)
    whole = where(tmp_path, name.replace("out", "whole"))
    run_job(job_config(source, whole))
    config = job_config(source, where(tmp_path, name))
    resumed = 0
    for _ in range(100):
        try:
            _, tally = run_job(config, MortalEngine(beats))
        except Killed:
            continue
        resumed = tally.resumed
        break
    assert resumed > len(ROWS) // 2
    assert content(where(tmp_path, name)) == content(whole)
    if "://" not in name:
        assert sorted(os.listdir(tmp_path / "jobs")) == sorted([name, name.replace("out", "whole")])


def test_a_bucket_loses_only_the_piece_that_was_not_sent(tmp_path, source, monkeypatch):
    monkeypatch.setattr(journal, "_PIECE_LINES", 4)
    config = job_config(source, "memory://resume/out.jsonl")
    # The end of a process sends nothing more; here the piece is lost as it would be then.
    with monkeypatch.context() as dying:
        dying.setattr(journal.BucketJournal, "close", lambda self: None)
        with pytest.raises(Killed):
            run_job(config, MortalEngine(30))
    store = fsspec.filesystem("memory")
    pieces = store.find("/resume/out.jsonl.partial")
    assert pieces == [f"/resume/out.jsonl.partial/{i:08}.jsonl" for i in range(len(pieces))]
    _, tally = run_job(config)
    assert tally.resumed == 4 * len(pieces) > 0


def die(*_):
    raise Killed


def half_written(_rows, file, **_form):
    file.write(b"half")
    raise Killed


def cut(patch, moment, output):
    """Makes the last step of this output end at a moment."""
    if moment == "while the final form is written":
        patch.setattr(output_module.writers, "write_rows", half_written)
    elif moment == "before it has its name":
        patch.setattr(output_module.places, "put", die)
        patch.setattr(output_module.os, "replace", die)
    elif moment == "before the partial is removed":
        patch.setattr(output._journal, "remove", die)
    else:
        patch.setattr(output, "_remove_meta", die)


@pytest.mark.parametrize("name", [*NAMES, "memory://resume/out.csv"])
@pytest.mark.parametrize(
    "moment",
    [
        "while the final form is written",
        "before it has its name",
        "before the partial is removed",
        "before the meta file is removed",
    ],
)
def test_a_job_cut_in_its_last_step_completes_its_file(tmp_path, source, name, moment, monkeypatch):
    whole = where(tmp_path, name.replace("out", "whole"))
    run_job(job_config(source, whole))
    config = job_config(source, where(tmp_path, name))
    finish = output_module.Output.finish

    def dying(output):
        with monkeypatch.context() as patch:
            cut(patch, moment, output)
            finish(output)

    with monkeypatch.context() as patch:
        patch.setattr(output_module.Output, "finish", dying)
        if name == "out.jsonl" and "final form" in moment:
            run_job(config)  # a plain file only gets its name
        else:
            with pytest.raises(Killed):
                run_job(config)
    _, tally = run_job(config)
    assert content(where(tmp_path, name)) == content(whole)
    assert tally.rows == len(ROWS)
    if "://" not in name:
        assert sorted(os.listdir(tmp_path / "jobs")) == sorted([name, name.replace("out", "whole")])


def test_rows_as_they_finish_are_all_there_once(tmp_path, source):
    config = job_config(source, tmp_path / "out.jsonl", order="finished")
    with pytest.raises(Killed):
        run_job(config, MortalEngine(20))
    partial = tmp_path / "out.jsonl.partial"
    places_done = [int(line.partition(b"\t")[0]) for line in partial.read_bytes().splitlines()]
    assert places_done != sorted(places_done)
    output, tally = run_job(config)
    ordered, _ = run_job(job_config(source, tmp_path / "ordered.jsonl"))
    assert tally.resumed == len(places_done) > 0
    lines = output.read_text().splitlines()
    assert lines != ordered.read_text().splitlines()
    assert sorted(lines) == sorted(ordered.read_text().splitlines())


def test_another_order_is_another_run(tmp_path, source):
    with pytest.raises(Killed):
        run_job(job_config(source, tmp_path / "out.jsonl"), MortalEngine(20))
    with pytest.raises(JobError, match="job.order was 'input', is 'finished'"):
        run_job(job_config(source, tmp_path / "out.jsonl", order="finished"))


def test_a_changed_shard_is_named(tmp_path, source):
    for i in range(2):
        (tmp_path / f"part-{i}.jsonl").write_text(
            "".join(f'{{"prompt": "x{j}"}}\n' for j in range(9))
        )
    config = job_config(tmp_path / "part-*.jsonl", tmp_path / "out.csv")
    with pytest.raises(Killed):
        run_job(config, MortalEngine(3))
    (tmp_path / "part-1.jsonl").write_text('{"prompt": "y"}\n')
    with pytest.raises(JobError, match=r"the input has changed: part-1.jsonl\."):
        run_job(config)
    (tmp_path / "part-2.jsonl").write_text("")
    with pytest.raises(JobError, match="was part-0.jsonl, part-1.jsonl, is part-0.jsonl, part-1"):
        run_job(config)


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_full_disk_keeps_the_rows_and_the_job_goes_on(tmp_path, source, name, monkeypatch):
    config = job_config(source, tmp_path / name)
    whole, _ = run_job(job_config(source, tmp_path / name.replace("out", "whole")))
    append = journal.FileJournal.append

    def full(self, line):
        if sum(1 for _ in self.lines()) < 7:
            append(self, line)
        else:
            self._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
            append(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(journal.FileJournal, "append", full)
        with pytest.raises(JobError, match="No space left on device; the rows so far are kept"):
            run_job(config)
    output, tally = run_job(config)
    assert tally.resumed == 7
    assert output.read_bytes() == whole.read_bytes()


# A process of its own: an engine whose beats take time, so that there is a moment to be killed in.
CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from jobs_fakes import FakeEngine, job_config, run_job

class SlowEngine(FakeEngine):
    def step(self):
        time.sleep(0.002)
        return super().step()

source, output, order = sys.argv[1:]
engine = SlowEngine(rows=4, answer=lambda prompt: prompt[::-1] * 2)
run_job(job_config(source, output, rows=4, order=order), engine)
"""


@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_nothing(tmp_path):
    draw = random.Random(5)
    source = tmp_path / "in.jsonl"
    rows = [{"id": i, "prompt": "abcdefgh"[: 1 + i % 8] * 5} for i in range(100)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(tests=str(ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(output, order="input"):
        return subprocess.Popen(
            [sys.executable, script, source, output, order],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    cases = [(name, "input") for name in NAMES] + [("finished.jsonl", "finished")]
    kills = dict.fromkeys(cases, 0)
    for name, order in cases:
        whole = tmp_path / f"whole-{name}"
        began = time.monotonic()
        assert start(whole, order).wait(60) == 0
        took = time.monotonic() - began
        output = tmp_path / f"killed-{name}"
        while kills[name, order] < 9:
            with start(output, order) as child:
                try:
                    child.wait(draw.uniform(0.3, 0.95) * took)
                    output.unlink(missing_ok=True)  # it came through: once more
                except subprocess.TimeoutExpired:
                    child.send_signal(signal.SIGKILL)
                    kills[name, order] += 1
        assert start(output, order).wait(60) == 0
        found, wanted = output.read_bytes(), whole.read_bytes()
        if order == "finished":
            found, wanted = (sorted(data.splitlines()) for data in (found, wanted))
        assert found == wanted, name
        assert not list(tmp_path.glob(f"killed-{name}.partial*"))
    assert sum(kills.values()) >= 50
