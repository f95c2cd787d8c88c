"""Measuring scripts run to their end on a tiny model; their figures are for people to look at."""

import json
import runpy
from pathlib import Path

from compress_makers import model_folder

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_speculation_is_measured_for_each_contender(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPTS / "bench_speculation.py"))["main"]
    flags = ("--preset=none", "--draft=int8", "--workloads=story", "--rows=1", "--new=6")
    main([f"--model={model_folder(tmp_path / 'model')}", *flags, "--rounds=1"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["kind"] for record in records] == ["off", "lookup", "draft"]
    assert [record["same_texts"] for record in records] == ["1/1"] * 3
