"""Long inputs: memory that doesn't grow, a hundred thousand rows with every kind of bad one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from jobs_fakes import ByteTokenizer, FakeEngine, job_config, run_job

from lepton_jax.jobs import driver
from lepton_jax.jobs.driver import Job
from lepton_jax.jobs.generate import GenerateMode

ROOT = Path(__file__).parents[1]
# In twenty ways: a row's text, the type of the error, and what it says.
BAD = [
    ("{", "invalid_json", "Expecting property name"),
    ('{"id": "x" "prompt": "y"}', "invalid_json", "Expecting ',' delimiter"),
    ('{"prompt": "unterminated}', "invalid_json", "Invalid control character"),
    ('{"prompt": "\\x"}', "invalid_json", "Invalid \\escape"),
    ("\udcff", "invalid_json", "utf-8"),
    ("[" * 5000, "invalid_json", "not valid JSON"),
    ("[1]", "invalid_row", "the row is a list"),
    ('"text"', "invalid_row", "the row is a str"),
    ("null", "invalid_row", "the row is a NoneType"),
    ('{"promt": "x"}', "invalid_row", "did you mean 'prompt'"),
    ('{"sampling": {}}', "invalid_row", "none of prompt"),
    ('{"prompt": "x", "messages": []}', "invalid_row", "prompt and messages"),
    ('{"prompt": ""}', "invalid_row", "prompt is empty"),
    ('{"prompt": 3}', "invalid_row", "prompt is 3"),
    ('{"messages": ["x"]}', "invalid_row", "messages is ['x']"),
    ('{"prompt_tokens": [1.5]}', "invalid_row", "want a list of token ids"),
    ('{"id": [], "prompt": "x"}', "invalid_row", "id=[]"),
    ('{"id": "row-0", "prompt": "x"}', "duplicate_id", "'row-0' belongs to an earlier row"),
    ('{"prompt": "x", "sampling": {"top_p": 9}}', "invalid_sampling", "top_p=9"),
    ('{"prompt": "x", "sampling": {"temprature": 1}}', "invalid_sampling", "temperature"),
]


class InstantEngine(FakeEngine):
    """One beat answers all rows that are open."""

    def __init__(self):
        super().__init__(rows=64, block=8, answer=lambda prompt: prompt[:4])

    def add_request(self, request_id, prompt_ids, params):
        super().add_request(request_id, prompt_ids, params)
        self.added.clear()


def test_a_hundred_thousand_rows_with_five_percent_bad_in_twenty_ways(tmp_path):
    rows, wrong = 100_000, {}
    with (tmp_path / "in.jsonl").open("w", errors="surrogateescape") as file:
        for number in range(rows):
            if number % 20 == 7:
                wrong[number + 1] = BAD[number // 20 % len(BAD)]
                file.write(wrong[number + 1][0] + "\n")
            else:
                file.write(f'{{"id": "row-{number}", "prompt": "{number:04}"}}\n')
    config = job_config(tmp_path / "in.jsonl", tmp_path / "out.jsonl", rows=64)
    output, tally = run_job(config, InstantEngine())
    assert (tally.rows, tally.errors) == (rows, rows // 20)
    with output.open() as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            if number in wrong:
                _, kind, says = wrong[number]
                assert (row["error"]["type"], row["error"]["line"]) == (kind, number)
                assert says in row["error"]["message"]
            else:
                assert (row["id"], row["text"]) == (f"row-{number - 1}", f"{number - 1:04}"[:4])
    assert len({text for text, _, _ in BAD}) == 20


def test_only_the_first_rows_are_measured_before_a_long_job(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "_MEASURED", 10)
    (tmp_path / "in.jsonl").write_text('{"prompt": "abc"}\n' * 30)
    config = job_config(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    with Job(config, GenerateMode(config.sampling)) as job:
        job.resume("model")
        workload = job.workload(ByteTokenizer())
    assert [count for count, _ in workload] == [3] * 10 + [2**30]
    monkeypatch.setattr(driver, "_MEASURED", 31)
    with Job(config, GenerateMode(config.sampling)) as job:
        job.resume("model")
        assert [count for count, _ in job.workload(ByteTokenizer())] == [3] * 30


# A process of its own each, because the peak of a process never falls.
CHILD = """
import sys
sys.path.insert(0, {tests!r})
from jobs_fakes import job_config, run_job
from test_jobs_files_scale import InstantEngine
from lepton_jax.telemetry import peak_memory_bytes

source, output, order = sys.argv[1:]
run_job(job_config(source, output, rows=64, order=order), InstantEngine())
print(peak_memory_bytes() / 2**20)
"""


def write_rows(path, rows):
    """Prompts in the form of the path's ending."""
    if path.suffix == ".parquet":
        columns = {"id": map(str, range(rows)), "prompt": map("{:040}".format, range(rows))}
        table = pyarrow.table({name: list(values) for name, values in columns.items()})
        pyarrow.parquet.write_table(table, path, row_group_size=5_000)
        return
    head, line = {
        ".csv": ("id,prompt\n", "{0},{0:040}\n"),
        ".jsonl": ("", '{{"id": "{0}", "prompt": "{0:040}"}}\n'),
    }[path.suffix]
    with path.open("w") as file:
        file.write(head)
        file.writelines(map(line.format, range(rows)))


def rows_in(path):
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_metadata(path).num_rows
    with path.open("rb") as lines:
        return sum(1 for _ in lines) - (path.suffix == ".csv")


def peak_mib(tmp_path, rows, ending, order):
    """Most memory of a job over so many rows, from and to files of this ending, MiB."""
    source, output = tmp_path / f"{rows}.{ending}", tmp_path / f"out-{rows}.{ending}"
    write_rows(source, rows)
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(tests=str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, script, source, output, order],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert rows_in(output) == rows
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "order"), [("jsonl", "finished"), ("csv", "input"), ("parquet", "input")]
)
def test_memory_is_flat_from_ten_thousand_rows_on(tmp_path, ending, order):
    few, many = (peak_mib(tmp_path, count, ending, order) for count in (10_000, 75_000))
    print(f"{ending}, {order}: {few:.0f} MiB for 10,000 rows, {many:.0f} MiB for 75,000")
    # 2^17 slots of 8 bytes for the ids, half as many while they grow, and 20,000 measured requests;
    # a first group of Parquet is in both. Rows that are held take about 1 KB each: 65 MiB or more.
    assert many - few < 24
