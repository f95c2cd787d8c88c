"""A job that ends at any moment goes on and gives the same file, in every format and place.

The fast tests end it between two beats or within its last step; the slow one kills real processes.
"""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import fsspec
import pytest
from jobs_fakes import EOS, ByteTokenizer, FakeEngine, Killed, MortalEngine, job_config, run_job

from lepton_jax.config import EngineSection, JobSection, OptimizerSection
from lepton_jax.jobs import driver
from lepton_jax.jobs import output as output_module
from lepton_jax.jobs.driver import Job
from lepton_jax.jobs.files import journal
from lepton_jax.jobs.files.places import JobError
from lepton_jax.jobs.files.source import Source
from lepton_jax.jobs.generate import GenerateMode

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
@pytest.mark.parametrize(("beats", "exact"), [(9, False), (9, True), (20, True), (35, False)])
def test_a_job_cut_between_beats_goes_on(tmp_path, source, name, beats, exact, monkeypatch):
    monkeypatch.setattr(journal, "_PIECE_LINES", 3)
    monkeypatch.setattr(driver, "_BLOCK", 1)
    whole = where(tmp_path, name.replace("out", "whole"))
    run_job(job_config(source, whole, exact=exact))
    config = job_config(source, where(tmp_path, name), exact=exact)
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
    config = job_config(source, "memory://resume/out.jsonl", exact=False)
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


class RoundingEngine(MortalEngine):
    """What it answers depends on the rows it computes together, and on all since it was new."""

    def step(self):
        together = sorted(self._open)[: self._rows]
        since = self.steps - (self.forgotten or [0])[-1]
        shift = zlib.crc32(repr((since, together)).encode())
        return [
            dataclasses.replace(
                output,
                token_ids=[t if t == EOS else 97 + (t + shift) % 26 for t in output.token_ids],
            )
            for output in super().step()
        ]


@pytest.mark.parametrize("order", ["input", "finished"])
@pytest.mark.parametrize("beats", [25, 40, 70, 71, 72])
def test_rounding_by_batch_changes_nothing(tmp_path, source, beats, order, monkeypatch):
    monkeypatch.setattr(driver, "_BLOCK", 3)
    config = job_config(source, tmp_path / "out.jsonl", order=order)
    whole, _ = run_job(
        job_config(source, tmp_path / "whole.jsonl", order=order), RoundingEngine(10**9)
    )
    for _ in range(20):
        engine = RoundingEngine(beats)
        try:
            output, tally = run_job(config, engine)
            break
        except Killed:
            assert not (tmp_path / "out.jsonl").exists()
    assert output.read_bytes() == whole.read_bytes()
    assert 0 < tally.resumed < len(ROWS) and len(engine.added) <= len(ROWS) - tally.resumed + 6


def test_without_blocks_such_rounding_shows(tmp_path, source):
    """The engine of the test above is what it says."""
    files = []
    for name, beats in [("whole.jsonl", 10**9), ("out.jsonl", 40)]:
        config = job_config(source, tmp_path / name, exact=False)
        try:
            files.append(run_job(config, RoundingEngine(beats))[0])
        except Killed:
            files.append(run_job(config, RoundingEngine(10**9))[0])
    assert files[0].read_bytes() != files[1].read_bytes()


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


@pytest.mark.parametrize("order", ["input", "finished"])
def test_a_job_of_the_first_rows_can_go_on_to_all(tmp_path, source, order):
    ordered, _ = run_job(job_config(source, tmp_path / "whole.jsonl"))
    lines = ordered.read_text().splitlines()

    def go_on(limit, engine=None, exact=False):
        job = {"order": order, "exact": exact, "limit": limit}
        return run_job(job_config(source, tmp_path / "out.jsonl", **job), engine)

    with pytest.raises(Killed):
        go_on(7, MortalEngine(12))
    with pytest.raises(JobError, match="job.limit was 7, is 0"):
        go_on(0, exact=True)
    with pytest.raises(JobError, match="job.limit=.*has row .*: raise it, or start over"):
        go_on(1)
    with pytest.raises(Killed):
        go_on(20, MortalEngine(12))
    output, tally = go_on(9)
    assert 1 < tally.resumed < tally.rows == 9
    assert sorted(output.read_text().splitlines()) == sorted(lines[:9])
    assert len(lines) == len(go_on(0)[0].read_text().splitlines()) == len(ROWS)
    taken = Source(JobSection(input=str(source), limit=9))
    assert (taken.digests()[0][0], taken.rows, len(list(taken))) == ("in.jsonl", 9, 9)


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


@pytest.mark.parametrize("name", ["memory://resume/out.jsonl", "out.csv"])
def test_the_file_for_which_the_last_step_has_no_room_is_named(tmp_path, source, name, monkeypatch):
    config = job_config(source, where(tmp_path, name))
    remote = "://" in name

    def full(rows, file, **form):
        file.write(b"some")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(output_module.writers, "write_rows", full)
        patch.setattr(output_module.tempfile, "tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        folder = tmp_path / ("temporary" if remote else "jobs")
        act = "make room there, or set TMPDIR" if remote else "make room and run"
        with pytest.raises(JobError, match=f"^{folder}/out.*tmp can't be .*No space .*kept: {act}"):
            run_job(config)
        assert not list(tmp_path.rglob("*.tmp"))
    _, tally = run_job(config)
    assert tally.resumed == len(ROWS)


# Jobs as processes of their own, forked from one that has imported everything, killed at random.
KILLER = """
import json, os, random, signal, sys, time, traceback
sys.path.insert(0, {tests!r})
from lepton_jax.jobs import driver
driver._BLOCK = 3
from jobs_fakes import FakeEngine, job_config, run_job
from test_jobs_files_modes import Scorer, score_file

class SlowEngine(FakeEngine):
    def step(self):
        time.sleep(0.001)
        return super().step()

class SlowScorer(Scorer):
    def step(self):
        time.sleep(0.001)
        return super().step()

def start(output, order, mode):
    pid = os.fork()
    if pid:
        return pid
    try:
        source = folder + "/" + mode + ".jsonl"
        if mode in ("generate", "batch"):
            engine = SlowEngine(rows=4, answer=lambda prompt: prompt[::-1] * 2)
            run_job(job_config(source, output, rows=4, order=order), engine)
        else:
            score_file(source, output, mode, SlowScorer())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def ended(pid):
    done, status = os.waitpid(pid, os.WNOHANG)
    return done and (status,)

folder, kills_each, *cases = sys.argv[1:]
draw, kills = random.Random(5), 0
for case in cases:
    name, *how = case.split(":")
    output = folder + "/killed-" + name
    began = time.monotonic()
    assert os.waitpid(start(folder + "/whole-" + name, *how), 0)[1] == 0
    took, mine = time.monotonic() - began, 0
    while mine < int(kills_each):
        pid = start(output, *how)
        time.sleep(draw.uniform(0, took))
        if status := ended(pid):
            assert status == (0,), status
            os.unlink(output)  # it came through: from the start again
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            mine += 1
    assert os.waitpid(start(output, *how), 0)[1] == 0
    kills += mine
print(kills)
"""


def batch_request(name, prompt):
    body = {"model": "m", "prompt": prompt, "max_tokens": 20}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_nothing(tmp_path):
    texts = ["abcdefgh"[: 1 + i % 8] * 5 for i in range(80)]
    asked = {
        "generate": [{"id": i, "prompt": text} for i, text in enumerate(texts)],
        "batch": [batch_request(str(i), text) for i, text in enumerate(texts)],
        "rank": [{"id": i, "query": t, "candidates": [t, "b"]} for i, t in enumerate(texts)],
    }
    for mode in ("classify", "embed", "score", "perplexity"):
        asked[mode] = [{"id": i, "text": text} for i, text in enumerate(texts)]
    for mode, rows in asked.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{mode}.jsonl").write_text(lines + "{\n")
    script = tmp_path / "killer.py"
    script.write_text(KILLER.format(tests=str(ROOT / "tests")))
    cases = [f"{name}:input:generate" for name in NAMES] + ["finished.jsonl:finished:generate"]
    cases += ["classify.csv:input:classify", "embed.parquet:input:embed", "b.jsonl:input:batch"]
    cases += [f"{mode}.jsonl:input:{mode}" for mode in ("rank", "score", "perplexity")]
    done = subprocess.run(
        [sys.executable, script, tmp_path, "5", *cases],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 50
    for case in cases:
        name, order, _ = case.split(":")
        found, wanted = ((tmp_path / f"{kind}-{name}").read_bytes() for kind in ("killed", "whole"))
        if order == "finished":
            found, wanted = (sorted(data.splitlines()) for data in (found, wanted))
        assert found == wanted, name
    assert not list(tmp_path.glob("*.partial*")) + list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("rows", [1, 4])
def test_no_row_is_lost_where_blocks_have_another_size(tmp_path, source, rows, monkeypatch):
    """A long row of an early block is open while many behind it are written."""
    monkeypatch.setattr(driver, "_BLOCK", 4)
    source.write_text(
        "".join(
            json.dumps({"id": n, "prompt": "abc" * (20 if n == 1 else 1)}) + "\n" for n in range(30)
        )
    )
    asked = dict(order="finished")
    config = job_config(source, tmp_path / "out.jsonl", rows=8, exact=True, **asked)
    with pytest.raises(Killed):
        run_job(config, MortalEngine(16, rows=8))
    config = job_config(source, tmp_path / "out.jsonl", rows=rows, exact=True, **asked)
    with pytest.raises(JobError, match="engine.rows was 8, is .*--config.job.exact=false"):
        run_job(config)
    config = job_config(source, tmp_path / "out.jsonl", rows=rows, exact=False, **asked)
    output, tally = run_job(config)
    ids = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert tally.resumed > 10 and sorted(ids) == list(range(30))


def test_what_was_inexact_once_does_not_become_exact(tmp_path, source):
    paths = source, tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run_job(job_config(*paths), MortalEngine(12))
    with pytest.raises(Killed):
        run_job(job_config(*paths, rows=1, exact=False), MortalEngine(12))
    with pytest.raises(JobError, match="job.exact was False, is True"):
        run_job(job_config(*paths, rows=1))


def test_another_memory_plans_other_pages_and_computes_other_rows_together(tmp_path, source):
    config = job_config(source, tmp_path / "out.jsonl")
    with pytest.raises(Killed):
        run_job(config, MortalEngine(12, pages=(40,)))
    with Job(config, GenerateMode(config.sampling)) as job:
        job.resume("model")  # and ends before it has planned
    with pytest.raises(JobError, match="engine.num_pages was 40, is 30.*--config.job.exact=false"):
        run_job(config, FakeEngine(pages=(30,)))
    given = dataclasses.replace(config, engine=EngineSection(rows=2, num_pages=40))
    output, tally = run_job(given, FakeEngine(pages=(40,)))  # as the message says
    assert tally.resumed > 0 and output.read_bytes().count(b"\n") == len(ROWS)


def test_pages_of_replicas_are_compared_and_may_differ_without_exact(tmp_path, source):
    config = job_config(source, tmp_path / "out.jsonl", exact=False)
    with pytest.raises(Killed):
        run_job(config, MortalEngine(12, pages=(40, 30)))
    _, tally = run_job(config, FakeEngine(pages=(30, 30)))
    assert tally.resumed > 0 and tally.rows == len(ROWS)


def test_a_batch_request_is_done_when_all_its_inputs_are(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "_BLOCK", 1)
    body = {"prompt": ["ab", "cd" * 9, "e"], "temperature": 1.0, "n": 2}
    request = {"method": "POST", "url": "/v1/completions", "body": body}
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"custom_id": n} | request) + "\n" for n in range(12)))
    whole, _ = run_job(job_config(path, tmp_path / "whole.jsonl"))
    for beats in (7, 16, 29):  # within a request
        with pytest.raises(Killed):
            run_job(job_config(path, tmp_path / "out.jsonl"), MortalEngine(beats))
    output, tally = run_job(job_config(path, tmp_path / "out.jsonl"))
    assert 0 < tally.resumed < 12
    assert output.read_bytes() == whole.read_bytes()


def test_another_objective_computes_other_rows_together(tmp_path, source):
    config = job_config(source, tmp_path / "out.jsonl")
    with pytest.raises(Killed):
        run_job(config, MortalEngine(12))
    latency = dataclasses.replace(config, optimizer=OptimizerSection(objective="latency"))
    with pytest.raises(JobError, match="optimizer.objective was 'throughput', is 'latency'"):
        run_job(latency)


def test_batch_requests_with_numbers_for_ids_go_on(tmp_path):
    body = {"messages": [{"role": "user", "content": "abc" * 5}]}
    request = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"custom_id": n} | request) + "\n" for n in range(20)))
    config = job_config(path, tmp_path / "out.jsonl", exact=False)
    with pytest.raises(Killed):
        run_job(config, MortalEngine(25))
    output, tally = run_job(config)
    assert tally.resumed and len(output.read_text().splitlines()) == 20


class DatedTokenizer(ByteTokenizer):
    """Its template asks for the time."""

    now = None

    def apply_chat(self, messages, tools=None, **variables):
        return self.encode(f"{self.now:%d.%m.%Y %H:%M:%S}")


def test_a_resumed_job_has_the_day_on_which_it_began(tmp_path, monkeypatch):
    path = tmp_path / "in.jsonl"
    message = [{"role": "user", "content": "x"}]
    path.write_text("".join(json.dumps({"id": n, "messages": message}) + "\n" for n in range(9)))
    config = job_config(path, tmp_path / "out.jsonl")

    def at(day, engine):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls):
                return cls(2026, 1, day, 23, 59, 30)

        for module in (driver, output_module):
            monkeypatch.setattr(module.datetime, "datetime", Clock)
        return run_job(config, engine, tokenizer=DatedTokenizer())

    with pytest.raises(Killed):
        at(30, MortalEngine(12))
    output, tally = at(31, MortalEngine(10**9))
    texts = {json.loads(line)["text"] for line in output.read_text().splitlines()}
    assert tally.resumed and texts == {"30.01.2026 23:59:30"}


def test_a_bucket_that_takes_nothing_more_is_one_error(tmp_path, source, monkeypatch):
    monkeypatch.setattr(journal, "_PIECE_LINES", 4)
    config = job_config(source, "memory://resume/out.jsonl")
    store = fsspec.filesystem("memory")

    def full(path, content):
        if "partial/" in path:
            raise OSError(28, "No space left on device")
        return type(store).pipe_file(store, path, content)

    monkeypatch.setattr(store, "pipe_file", full, raising=False)
    with pytest.raises(JobError, match="No space left"):
        run_job(config)


def test_a_partial_that_cannot_be_removed_is_a_warning(source, monkeypatch, caplog):
    def refuse(self):
        if self._numbers():
            raise PermissionError(13, "not allowed")

    monkeypatch.setattr(journal.BucketJournal, "remove", refuse)
    run_job(job_config(source, "memory://resume/out.jsonl"))
    assert "out.jsonl.partial can't be removed: not allowed" in caplog.text
    assert content("memory://resume/out.jsonl")
