"""Every mode over files: rows in each format, results in each format, the same after a kill."""

import csv
import dataclasses
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from jobs_fakes import Killed, job_config, run_job
from test_jobs_score import Bytes, FakeScorer

from lepton_jax.config import MODES, ScoringSection
from lepton_jax.jobs import driver
from lepton_jax.jobs.mode_for import mode_for

README = Path(__file__).resolve().parent.parent / "README.md"
TEXTS = [f"text number {i * i}" for i in range(12)]
ROWS = {
    "score": [{"id": t, "context": t, "choices": ["yes", "no", "maybe"]} for t in TEXTS],
    "classify": [{"id": t, "text": t} for t in TEXTS],
    "embed": [{"id": t, "text": t} for t in TEXTS],
    "rank": [{"id": t, "query": t, "candidates": ["one", "another"]} for t in TEXTS],
    "perplexity": [{"id": t, "text": t * 3} for t in TEXTS],
}
FORMATS = ("jsonl", "csv", "parquet")


class Scorer(FakeScorer):
    """Lives for so many beats."""

    def __init__(self, beats=10**9):
        super().__init__()
        self._beats = beats

    def forget(self):
        assert not self.open

    def step(self):
        self._beats -= 1
        if self._beats < 0:
            raise Killed
        return super().step()


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            cells = (
                {n: v if isinstance(v, str) else json.dumps(v) for n, v in r.items()} for r in rows
            )
            writer.writerows(cells)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


SCORING = {
    "classify": {"labels": ("good", "bad"), "template": "{text}: {label}"},
    "perplexity": {"window": 16, "stride": 8},
}


def score_file(source, output, mode, engine):
    config = job_config(source, output, mode=mode)
    config = dataclasses.replace(config, scoring=ScoringSection(**SCORING.get(mode, {})))
    return run_job(config, engine, mode=mode_for(config), tokenizer=Bytes())


def test_there_are_rows_for_every_mode():
    assert {*ROWS, "generate"} == {*MODES}


@pytest.mark.parametrize("mode", ROWS)
def test_readme_shows_each_field_of_an_output_row(tmp_path, mode):
    write(tmp_path / "in.jsonl", ROWS[mode][:1])
    output, _ = score_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", mode, Scorer())
    row = json.loads(output.read_text())
    shown = README.read_text(encoding="utf-8")
    fields = [*row, *(row["choices"][0] if mode == "score" else ())]
    assert not [name for name in fields if f'"{name}": ' not in shown]


@pytest.mark.parametrize("mode", ROWS)
def test_formats_hold_the_same_rows_and_results(tmp_path, mode):
    for ending in FORMATS:
        write(tmp_path / f"in.{ending}", ROWS[mode])
        output, tally = score_file(
            tmp_path / f"in.{ending}", tmp_path / f"{ending}.jsonl", mode, Scorer()
        )
        assert (tally.rows, tally.errors) == (12, 0)
        assert output.read_bytes() == (tmp_path / "jsonl.jsonl").read_bytes()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == TEXTS
    table, _ = score_file(tmp_path / "in.jsonl", tmp_path / "out.parquet", mode, Scorer())
    assert pyarrow.parquet.read_table(table).to_pylist() == rows


@pytest.mark.parametrize("mode", ROWS)
@pytest.mark.parametrize("ending", FORMATS)
def test_a_killed_job_of_any_mode_gives_the_same_file(tmp_path, mode, ending, monkeypatch):
    monkeypatch.setattr(driver, "_BLOCK", 2)
    write(tmp_path / "in.jsonl", ROWS[mode])
    whole, told = score_file(tmp_path / "in.jsonl", tmp_path / f"whole.{ending}", mode, Scorer())
    with pytest.raises(Killed):
        score_file(tmp_path / "in.jsonl", tmp_path / f"out.{ending}", mode, Scorer(10))
    output, tally = score_file(tmp_path / "in.jsonl", tmp_path / f"out.{ending}", mode, Scorer())
    assert 0 < tally.resumed < 12
    assert output.read_bytes() == whole.read_bytes()
    assert (tally.logprob, tally.tokens, tally.bytes) == (told.logprob, told.tokens, told.bytes)
    assert bool(tally.perplexity) == (mode == "perplexity")
