"""The generate job on a fake engine: order, error rows, resuming after a kill, impossible files."""

import dataclasses
import json
import os

import pytest
from jobs_fakes import ByteTokenizer, FakeEngine, Killed, MortalEngine, job_config
from jobs_fakes import run_job as run

from lepton_jax.config import ModelSection, OptimizerSection, RunConfig
from lepton_jax.jobs import driver, row_bar
from lepton_jax.jobs.driver import Job
from lepton_jax.jobs.files.places import JobError
from lepton_jax.jobs.generate import GenerateMode
from lepton_jax.jobs.row_bar import RowBar


def config_for(tmp_path, *, rows=2, output="out/rows.jsonl", restart=False, **sampling):
    source, output = tmp_path / "in.jsonl", tmp_path / output
    job = {"restart": restart, "exact": False}
    return job_config(source, output, rows=rows, sampling=sampling, **job)


def write_rows(tmp_path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")


def job_for(config):
    return Job(config, GenerateMode(config.sampling))


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


PROMPTS = [{"id": f"r{i}", "prompt": "abc" * (7 - i % 7)} for i in range(20)]


def test_answers_come_in_input_order_whatever_their_lengths(tmp_path):
    write_rows(tmp_path, PROMPTS)
    output, tally = run(config_for(tmp_path))
    rows = rows_in(output)
    assert [row["id"] for row in rows] == [row["id"] for row in PROMPTS]
    assert [row["text"] for row in rows] == [row["prompt"] for row in PROMPTS]
    first = {"id": "r0", "text": "abc" * 7, "token_ids": [*b"abc" * 7, 256]}
    counts = {"finish_reason": "stop", "prompt_tokens": 21, "completion_tokens": 22}
    assert rows[0] == first | counts
    assert (tally.rows, tally.errors, tally.resumed) == (20, 0, 0)
    assert tally.generated_tokens == tally.prompt_tokens + 20
    assert sorted(os.listdir(tmp_path / "out")) == ["rows.jsonl"]


def test_the_bar_moves_before_a_row_is_written(tmp_path, monkeypatch):
    """A long first row holds up the others' turn."""
    shown = []

    class Drawn(row_bar.tqdm):
        def update(self, n=1):
            shown.append((self.n, self.postfix))
            return super().update(n)

    monkeypatch.setattr(row_bar, "tqdm", Drawn)
    rows = [{"id": "long", "prompt": "x" * 60}, {"id": "short", "prompt": "y"}]
    write_rows(tmp_path, rows)
    run(config_for(tmp_path))
    assert shown[0][0] == shown[5][0] == 0
    assert "tokens/s, 0 errors, 1 answered ahead" in shown[5][1]
    assert "ahead" not in shown[-1][1]


def test_tokens_alone_draw_the_bar(capsys):
    with RowBar(9) as bar:
        bar._bar.mininterval = 0.0
        capsys.readouterr()
        bar.add_beat(40, 2)
        said = capsys.readouterr().err
    assert "0/9" in said and "tokens/s" in said


def test_the_first_tokens_are_timed_not_the_first_row(tmp_path, monkeypatch):
    clock = iter((1.5, 2.5))
    monkeypatch.setattr(driver, "running_seconds", lambda: next(clock))
    write_rows(tmp_path, ["{", *PROMPTS])  # answered before the engine has begun
    _, tally = run(config_for(tmp_path))
    assert tally.first_seconds == 1.5
    write_rows(tmp_path, ["{"])
    _, tally = run(config_for(tmp_path, restart=True))
    assert tally.first_seconds is None


def test_bad_rows_become_error_rows_and_the_others_are_untouched(tmp_path):
    bad = [
        "{",
        {"id": "empty", "prompt": ""},
        {"id": "long", "prompt": "x" * 100},
        {"id": "chat", "messages": [{"role": "bad", "content": "x"}]},
        {"id": "r0", "prompt": "again"},
        {"id": "nan", "prompt": "x"},
    ]
    write_rows(tmp_path, [PROMPTS[0], *bad, PROMPTS[1]])
    engine = FakeEngine()
    engine.fails = {"nan/0"}
    output, tally = run(config_for(tmp_path), engine)
    rows = rows_in(output)
    kinds = [row["error"]["type"] if "error" in row else row["text"] for row in rows]
    assert kinds == [
        "abc" * 7,
        "invalid_json",
        "invalid_row",
        "refused",
        "invalid_prompt",
        "duplicate_id",
        "not_finite",
        "abc" * 6,
    ]
    assert [row["id"] for row in rows] == ["r0", "2", "empty", "long", "chat", "r0", "nan", "r1"]
    assert (tally.rows, tally.errors) == (8, 6)


def test_tools_go_through_the_chat_template(tmp_path):
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    chat = {"id": "a", "messages": [{"role": "user", "content": "hi"}], "tools": tools}
    write_rows(tmp_path, [chat])
    with job_for(config_for(tmp_path)) as job:
        job.resume("model")
        assert job.workload(ByteTokenizer())[0][0] == len("clock!u:hi;")
    output, _ = run(config_for(tmp_path))
    assert rows_in(output)[0]["text"] == "clock!u:hi;"


def test_several_choices_and_logprobs(tmp_path):
    sampling = {"n": 2, "logprobs": 1, "seed": 1}
    write_rows(tmp_path, [{"id": 7, "prompt": "ab", "sampling": sampling}])
    output, tally = run(config_for(tmp_path))
    choice = {"text": "ab", "token_ids": [97, 98, 256], "finish_reason": "stop"}
    logprobs = [{"logprob": -float(t), "top": []} for t in choice["token_ids"]]
    choices = [choice | {"logprobs": logprobs}] * 2
    assert rows_in(output) == [
        {"id": 7, "choices": choices, "prompt_tokens": 2, "completion_tokens": 6}
    ]
    assert tally.generated_tokens == 6


def test_the_workload_is_the_lengths_of_the_rows_that_can_be_served(tmp_path):
    own = {"id": "own", "prompt": "abcd", "sampling": {"n": 2, "seed": 3}}
    write_rows(tmp_path, [{"prompt": "ab"}, "{", own])
    config = config_for(tmp_path, max_tokens=9)
    with job_for(config) as job:
        job.resume("model")
        workload = job.workload(ByteTokenizer())
    assert [count for count, _ in workload] == [2, 4, 4]
    assert [params.seed for _, params in workload] == [None, 3, 4]
    assert {params.max_tokens for _, params in workload} == {9}


@pytest.mark.parametrize("beats", [0, 1, 7, 25])
def test_a_killed_run_goes_on_where_it_was_and_gives_the_same_file(tmp_path, beats):
    write_rows(tmp_path, [*PROMPTS[:5], "{", *PROMPTS[5:]])
    whole, _ = run(config_for(tmp_path, output="whole.jsonl"))
    config = config_for(tmp_path)
    with pytest.raises(Killed):
        run(config, MortalEngine(beats))
    done = len(rows_in(tmp_path / "out/rows.jsonl.partial"))
    assert not (tmp_path / "out/rows.jsonl").exists()
    engine = FakeEngine()
    output, tally = run(config, engine)
    assert output.read_bytes() == whole.read_bytes()
    assert (tally.rows, tally.errors, tally.resumed) == (21, 1, done)
    assert len(engine.added) == 20 - done + (done > 5)
    assert sorted(os.listdir(tmp_path / "out")) == ["rows.jsonl"]


def test_half_a_line_at_the_end_of_the_partial_file_is_written_again(tmp_path):
    write_rows(tmp_path, PROMPTS)
    config = config_for(tmp_path)
    with pytest.raises(Killed):
        run(config, MortalEngine(20))
    partial = tmp_path / "out/rows.jsonl.partial"
    whole = partial.read_bytes()
    partial.write_bytes(whole + b'{"id": "r9", "te')
    output, tally = run(config)
    assert tally.resumed == whole.count(b"\n") > 0
    assert [row["id"] for row in rows_in(output)] == [row["id"] for row in PROMPTS]


def test_a_kill_between_the_renaming_and_the_end_leaves_a_job_that_can_run_again(tmp_path):
    write_rows(tmp_path, PROMPTS)
    config = config_for(tmp_path)
    with pytest.raises(Killed):
        run(config, MortalEngine(20))
    (tmp_path / "out/rows.jsonl.partial").rename(tmp_path / "out/rows.jsonl")
    output, tally = run(config)
    assert (tally.resumed, len(rows_in(output))) == (0, 20)
    assert sorted(os.listdir(tmp_path / "out")) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("input", "the input has changed: in.jsonl"),
        ("model", "the model is another one"),
        ("sampling", "sampling.max_tokens was 128, is 50"),
        ("ids", "doesn't fit the input at row 2"),
        ("meta", "nobody knows of what"),
    ],
)
def test_another_input_model_or_config_is_refused_until_told_to_start_over(tmp_path, change, says):
    write_rows(tmp_path, PROMPTS)
    own, fingerprint = {}, "model"
    with pytest.raises(Killed):
        run(config_for(tmp_path), MortalEngine(20))
    partial = tmp_path / "out/rows.jsonl.partial"
    if change == "input":
        write_rows(tmp_path, [*PROMPTS[:-1], {"id": "new", "prompt": "x"}])
    elif change == "model":
        fingerprint = "another"
    elif change == "sampling":
        own = {"max_tokens": 50}
    elif change == "meta":
        (tmp_path / "out/rows.jsonl.partial.meta").write_text("{")
    else:
        partial.write_bytes(partial.read_bytes().replace(b'"r1"', b'"x1"'))
    kept = partial.read_bytes()
    with pytest.raises(JobError, match=says) as refused:
        run(config_for(tmp_path, **own), fingerprint=fingerprint)
    assert "--config.job.restart=true" in str(refused.value)
    assert partial.read_bytes() == kept
    _, tally = run(config_for(tmp_path, restart=True, **own), fingerprint=fingerprint)
    assert (tally.resumed, tally.rows) == (0, 20)


def test_chats_with_other_variables_are_another_run(tmp_path):
    write_rows(tmp_path, PROMPTS)
    with pytest.raises(Killed):
        run(config_for(tmp_path), MortalEngine(20))
    model = ModelSection(chat_variables={"think": False})
    with pytest.raises(JobError, match="model.chat_variables was {}, is {'think': False}"):
        run(dataclasses.replace(config_for(tmp_path), model=model))


def test_other_sizes_of_the_engine_may_go_on(tmp_path):
    write_rows(tmp_path, PROMPTS)
    with pytest.raises(Killed):
        run(config_for(tmp_path), MortalEngine(20))
    _, tally = run(config_for(tmp_path, rows=1))
    assert tally.resumed > 0


def test_look_ahead_is_bounded(tmp_path):
    write_rows(tmp_path, [{"prompt": "abcdef"}] * 50)
    engine = MortalEngine(1)
    with pytest.raises(Killed):
        run(config_for(tmp_path, rows=2), engine)
    assert len(engine.added) == 8
    latency = OptimizerSection(objective="latency")
    engine = MortalEngine(1)
    with pytest.raises(Killed):
        run(dataclasses.replace(config_for(tmp_path, restart=True), optimizer=latency), engine)
    assert len(engine.added) == 2  # nothing queues


def test_an_interrupted_run_leaves_no_request_in_the_engine(tmp_path):
    write_rows(tmp_path, PROMPTS)
    engine = MortalEngine(3)
    with pytest.raises(Killed):
        run(config_for(tmp_path), engine)
    assert not engine.has_work


def test_files_that_cannot_be_are_named_before_anything_else(tmp_path):
    with pytest.raises(JobError, match=r"job.input is empty"):
        job_for(RunConfig())
    config = config_for(tmp_path)
    with pytest.raises(JobError, match=r"in.jsonl' can't be read: No such file"):
        job_for(config)
    write_rows(tmp_path, PROMPTS)
    (tmp_path / "file").write_text("")
    for output, says in [
        ("", "is a directory"),
        ("file/rows.jsonl", "can't be written"),
        ("in.jsonl", "is the input"),
    ]:
        with pytest.raises(JobError, match=says):
            job_for(config_for(tmp_path, output=output))
    assert sorted(os.listdir(tmp_path)) == ["file", "in.jsonl"]


def test_a_full_disk_ends_the_job_with_what_to_do(tmp_path):
    write_rows(tmp_path, PROMPTS)
    with job_for(config_for(tmp_path)) as job:
        job.resume("model")
        job.output.open(0)
        job.output._journal.close()
        job.output._journal._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        with pytest.raises(JobError, match="No space left.*make room and run the same command"):
            job.output.write(0, {"id": 1})


def test_a_second_process_on_the_same_output_is_refused(tmp_path):
    write_rows(tmp_path, PROMPTS)
    config = config_for(tmp_path)
    with job_for(config), pytest.raises(JobError, match=rf"written by process {os.getpid()}:"):
        job_for(config)
    (tmp_path / "out/rows.jsonl.lock").write_text("1\n")  # of a process that was killed
    _, tally = run(config)
    assert tally.rows == 20
    assert sorted(os.listdir(tmp_path / "out")) == ["rows.jsonl"]


def test_an_empty_input_gives_an_empty_output(tmp_path):
    write_rows(tmp_path, [""])
    output, tally = run(config_for(tmp_path))
    assert (output.read_bytes(), tally.rows) == (b"", 0)
