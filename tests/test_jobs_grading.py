"""Grades of answers and their interval, in rows, tally and summary."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs_fakes import Killed, MortalEngine, job_config, run_job

from lepton_jax.jobs.files.places import JobError
from lepton_jax.jobs.grading import grade, interval


@pytest.mark.parametrize(
    "result, answer, wanted",
    [
        ({"label": "good", "probability": 0.9}, "good", 1),
        ({"label": "good"}, "bad", 0),
        ({"ranking": [2, 0, 1], "scores": [1, 0, 3]}, 2, 1),
        ({"ranking": [2, 0, 1]}, 0, 0),
        ({"choices": [{}, {}], "best": 1}, 1, 1),
        ({"text": " Paris\n"}, "Paris", 1),
        ({"text": "Paris, of course"}, "Paris", 0),
        ({"text": '{"a": 1, "b": "x"}'}, {"a": 1, "b": "x"}, 1),
        ({"text": '{"a": 1, "b": "y", "c": 0}'}, {"a": 1, "b": "x"}, 0.5),
        ({"text": '{"a": 1'}, {"a": 1}, 0),
        ({"text": "[1]"}, {"a": 1}, 0),
        ({"text": '{"a": 1, "b": "y"}'}, '{"a": 1, "b": "x"}', 0.5),  # as in a cell of CSV
        ({"text": "{}"}, {"a": None}, 0),
        ({"choices": [{"text": "Paris"}, {"text": "Rome"}]}, "Paris", 1),
        ({"text": "None"}, None, None),
        ({"logprob": -1.5}, "Paris", None),
    ],
)
def test_a_grade_says_how_right_an_answer_is(result, answer, wanted):
    assert grade(result, answer) == wanted


def test_the_interval_is_wilsons():
    # Newcombe 1998, table I, method 3: 81 of 263 and 15 of 148
    assert interval(263, 81 / 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert interval(148, 15 / 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert interval(0, 0.0) == (0, 1)


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_the_interval_holds_the_mean_and_stays_within_0_and_1(count, mean):
    low, high = interval(count, mean)
    assert 0 <= low <= mean + 1e-9 and mean - 1e-9 <= high <= 1


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_with_a_known_answer_are_graded_also_after_a_resume(tmp_path):
    rows = [{"id": n, "prompt": "ab", "wanted": "no such text"} for n in range(4)]
    rows += [{"id": "open", "prompt": "ab"}, {"id": "bad", "prompt": "", "wanted": "x"}]
    write_rows(tmp_path / "in.jsonl", rows)
    config = job_config(tmp_path / "in.jsonl", tmp_path / "out.jsonl", answer="wanted")
    output, tally = run_job(config)
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row.get("correct") for row in written] == [0, 0, 0, 0, None, None]
    assert written[0]["answer"] == "no such text"
    assert (tally.graded, tally.accuracy) == (4, 0)
    right = [{"id": row["id"], "prompt": "ab", "wanted": row.get("text", "")} for row in written]
    write_rows(tmp_path / "in.jsonl", right[:4])
    config = job_config(tmp_path / "in.jsonl", tmp_path / "again.jsonl", answer="wanted")
    output, tally = run_job(config)
    assert (tally.graded, tally.accuracy) == (4, 1)
    lines = output.read_bytes().splitlines(keepends=True)
    output.unlink()
    with pytest.raises(Killed):
        run_job(config, engine=MortalEngine(0))
    partial = tmp_path / "again.jsonl.partial"
    partial.write_bytes(b"".join(lines[:2]))
    _, tally = run_job(config)
    assert (tally.resumed, tally.graded, tally.accuracy) == (2, 4, 1)
    assert output.read_bytes() == b"".join(lines)


def test_batch_requests_are_not_graded(tmp_path):
    request = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}
    write_rows(tmp_path / "in.jsonl", [request])
    with pytest.raises(JobError, match="job.answer"):
        run_job(job_config(tmp_path / "in.jsonl", tmp_path / "out.jsonl", answer="x"))


def test_a_kept_column_is_not_taken_for_a_grade(tmp_path):
    write_rows(tmp_path / "in.jsonl", [{"id": 1, "prompt": "ab", "correct": "x"}])
    paths = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with pytest.raises(JobError, match="job.keep has 'correct', which is a field of the output"):
        run_job(job_config(*paths, answer="wanted", keep="correct"))


def test_columns_that_no_row_has_are_said(tmp_path, caplog):
    write_rows(tmp_path / "in.jsonl", [{"id": 1, "prompt": "ab", "label": "x"}])
    paths = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    run_job(job_config(*paths, answer="labl", keep="label"))
    assert "names 'labl', which no row has" in caplog.text and "'label'" not in caplog.text
