"""The recipes: each config runs on the real model and is about as often right as its page says."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lepton_jax import cli
from lepton_jax.jobs.files.source import Source
from lepton_jax.jobs.mode_for import mode_for
from lepton_jax.jobs.rows import read_rows

CHECKOUT = Path(__file__).resolve().parent.parent
RECIPES = CHECKOUT / "configs" / "recipes"
# What the pages say, less what another machine's rounding may change: three rows at most.
LEAST = {"intents": 0.775, "sentiment": 0.8, "products": 0.7, "credit": 0.58, "reports": 0.8}


def test_every_recipe_has_a_page_and_a_line_in_the_list():
    names = {path.stem for path in RECIPES.glob("*.py")}
    listed = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert names == set(LEAST)
    for name in names:
        assert f"({name}.md)" in listed
        page = (RECIPES / f"{name}.md").read_text(encoding="utf-8")
        assert f"python -m lepton_jax.run --config=configs/recipes/{name}.py" in page


def test_what_a_page_offers_beside_its_command_fits_the_config():
    offered = 0
    for name in LEAST:
        page = (RECIPES / f"{name}.md").read_text(encoding="utf-8")
        config = runpy.run_path(str(RECIPES / f"{name}.py"))["get_config"]()
        for flags in re.findall(r"`(--config\.[^`]*)`", page):
            for flag in shlex.split(flags):
                field, value = flag.removeprefix("--config.").split("=", 1)
                section, field = field.split(".")
                config[section][field] = value
            offered += 1
        assert mode_for(cli.run_config(cli.whole_config(config)))
    assert offered


def test_reports_are_asked_by_the_columns_of_a_table(monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    config = runpy.run_path(str(RECIPES / "reports.py"))["get_config"]()
    config = cli.run_config(cli.whole_config(config))
    source, mode = Source(config.job), mode_for(config)
    source.serve(mode.fields, id_field="id")
    rows = list(read_rows(source, mode, strict=source.strict))
    assert len(rows) == 10 and rows[0].id == "North"
    for row in rows:
        shop = json.loads(row.record.kept["answer"])
        assert '\n{"shop": "Castle", "last_month": 92, "this_month": 71, "tr' in row.work.prompt
        last = f"Shop: {row.id}. Sales last month: {shop['last_month']}. Sales this month: "
        assert row.work.prompt.endswith(
            f"\n\n{last}{shop['this_month']}. Trend: {shop['trend']}.\n"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LEAST))
def test_a_recipe_is_as_right_as_its_page_says(name, smollm2_path, tmp_path):
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "lepton_jax.run", f"--config=configs/recipes/{name}.py"]
    ran = subprocess.run(
        [*command, f"--config.model.path={smollm2_path}", f"--config.job.output={output}"],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    summary = json.loads(Path(f"{output}.summary.json").read_text())
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert summary["accuracy"]["rows"] == len(rows) == summary["rows"] >= 10
    assert summary["accuracy"]["mean"] == pytest.approx(sum(r["correct"] for r in rows) / len(rows))
    assert summary["accuracy"]["mean"] >= LEAST[name]
    assert "correct" in ran.stdout
    if name == "reports":
        keys = [(set(json.loads(row["text"])), set(json.loads(row["answer"]))) for row in rows]
        assert all(found == wanted for found, wanted in keys)
    if name == "sentiment":
        alerts = Path(f"{output}.alerts.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in alerts] == [r["id"] for r in rows if r["alert"]]
        assert len(alerts) == summary["alerts"] >= 5
