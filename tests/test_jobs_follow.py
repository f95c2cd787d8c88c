"""A growing input, the end of following, and alerts."""

import json
import os
import signal
import threading
import time

import pytest
from jobs_fakes import Killed, MortalEngine, job_config, run_job

from lepton_jax import cli
from lepton_jax.config import JobSection, ScoringSection
from lepton_jax.jobs.alerts import Alerts, parse_alert
from lepton_jax.jobs.classify import ClassifyMode
from lepton_jax.jobs.files.follow import PENDING, Follower
from lepton_jax.jobs.files.places import JobError


def test_lines_come_whole_and_pending_in_between(tmp_path):
    path = tmp_path / "live.jsonl"
    path.write_bytes(b"one\ntw")
    follower = Follower(str(path), 60.0)
    lines = follower.lines()
    assert [next(lines), next(lines), next(lines)] == [b"one\n", PENDING, PENDING]
    with path.open("ab") as file:
        file.write(b"o\nthree")
    assert [next(lines), next(lines)] == [b"two\n", PENDING]
    follower.stop()
    assert list(lines) == [b"three"]


def test_it_ends_when_nothing_has_come_for_long_enough(tmp_path):
    path = tmp_path / "live.jsonl"
    path.write_bytes(b"one\n")
    started = time.monotonic()
    assert [line for line in Follower(str(path), 0.2).lines() if line is not PENDING] == [b"one\n"]
    assert 0.2 <= time.monotonic() - started < 5


def follow_config(tmp_path, **job):
    source, output = tmp_path / "live.jsonl", tmp_path / "out.jsonl"
    return job_config(source, output, **{"follow": 1.0, "exact": False} | job)


def append(path, *rows):
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_rows_that_come_while_the_job_runs_are_answered_once(tmp_path):
    path = tmp_path / "live.jsonl"
    path.write_text("")

    def write():
        for number in range(6):
            append(path, {"id": number, "prompt": "ab" * number or "a"})
            time.sleep(0.05)
        with path.open("a") as file:
            file.write("not json\n\n")

    writer = threading.Thread(target=write)
    writer.start()
    output, tally = run_job(follow_config(tmp_path))
    writer.join()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4, 5, "7"]
    assert (tally.rows, tally.errors) == (7, 1)


def test_a_cut_job_goes_on_with_an_input_that_has_grown(tmp_path):
    path = tmp_path / "live.jsonl"
    append(path, *({"id": number, "prompt": "ab"} for number in range(3)))
    config = follow_config(tmp_path, follow=0.1)
    output, _ = run_job(config)
    lines = output.read_bytes().splitlines(keepends=True)
    output.unlink()
    with pytest.raises(Killed):
        run_job(config, engine=MortalEngine(0))
    (tmp_path / "out.jsonl.partial").write_bytes(lines[0])
    append(path, {"id": "new", "prompt": "ab"})
    output, tally = run_job(follow_config(tmp_path, follow=0.2))  # how long to wait is no answer
    assert (tally.rows, tally.resumed) == (4, 1)
    assert output.read_bytes().startswith(b"".join(lines))


def test_only_a_local_file_of_json_lines_can_be_followed(tmp_path):
    (tmp_path / "in.csv").write_text("prompt\na\n")
    for name in ("in.csv", "*.csv"):
        config = job_config(tmp_path / name, tmp_path / "out.jsonl", follow=1.0, exact=False)
        with pytest.raises(JobError, match="job.follow reads one file of plain JSON lines"):
            run_job(config)
    with pytest.raises(ValueError, match="exact=True is not allowed: want false with job.follow"):
        JobSection(input="x", follow=1.0)


def test_the_first_interrupt_ends_the_following_and_the_next_one_the_program():
    calls = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        with cli.interrupts(lambda: calls.append("end")):
            os.kill(os.getpid(), signal.SIGINT)
            assert calls == ["end"]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == ["end"]


def test_a_condition_names_a_label_and_a_probability():
    assert parse_alert("bad>=0.5", ["good", "bad"]) == ("bad", 0.5)
    assert parse_alert("a>=b>=1", ["a>=b"]) == ("a>=b", 1)
    assert parse_alert("", ["bad"]) is None
    for wrong in ("bad", "bad>=2", "bad>=", "worse>=0.5", "bad>0.5", "bad>=nan"):
        with pytest.raises(ValueError, match="want LABEL>=P"):
            parse_alert(wrong, ["good", "bad"])
    with pytest.raises(ValueError, match="want LABEL>=P"):
        ClassifyMode(ScoringSection(labels=("good", "bad"), alert="worse>=1"))


def test_alerts_are_stored_one_by_one(tmp_path, caplog):
    alerts = Alerts(str(tmp_path / "out.jsonl"))
    for number in range(2):
        alerts.add({"id": number, "label": "bad", "probability": 0.9})
        stored = (tmp_path / "out.jsonl.alerts.jsonl").read_text().splitlines()
        assert len(stored) == alerts.count == number + 1
    assert "alert: row 1: bad 0.900" in caplog.text
    with pytest.raises(JobError, match="local job.output"):
        Alerts("gs://bucket/out.jsonl")
    alerts.clear()
    assert not (tmp_path / "out.jsonl.alerts.jsonl").exists()
    (tmp_path / "full").mkdir()
    blocked = Alerts(str(tmp_path / "full" / "x" / "out.jsonl"))
    with pytest.raises(JobError, match="can't be written"):
        blocked.add({"id": 1, "label": "bad", "probability": 0.9})
