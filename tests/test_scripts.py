"""Measuring scripts run to their end on a tiny model (their figures are for people to look at), and
environments are made by a python that only notes what it is asked for.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from compress_makers import model_folder

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_speculation_is_measured_for_each_contender(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPTS / "bench_speculation.py"))["main"]
    flags = ("--preset=none", "--draft=int8", "--workloads=story", "--rows=1", "--new=6")
    main([f"--model={model_folder(tmp_path / 'model')}", *flags, "--rounds=1"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["kind"] for record in records] == ["off", "lookup", "draft"]
    assert [record["same_texts"] for record in records] == ["1/1"] * 3


def in_environment(venv, call, **variables):
    """Runs a function of environment.sh on a virtual environment; what its python was asked for."""
    python, asked = venv / "bin" / "python", venv / "asked"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\necho "$@" >>"{asked}"\n')
    python.chmod(0o755)
    ran = subprocess.run(
        [
            "bash",
            "-euc",
            f'source "$1"; {call}',
            "script",
            str(SCRIPTS / "environment.sh"),
            str(venv),
        ],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    return ran, asked.read_text().splitlines()


def test_a_python_that_cannot_be_used_is_named(tmp_path):
    ran, _ = in_environment(tmp_path, 'make_environment "$2"', PYTHON="/nope")
    assert ran.returncode == 1
    assert "PYTHON=/nope can't be used" in ran.stderr and "remove the folder" not in ran.stderr


def test_the_newest_packages_are_looked_for_each_time(tmp_path):
    for versions, installations in (("", 1), ("newest", 2)):
        call = f'install_package "$2" test {versions}'
        for _ in "ab":
            ran, asked = in_environment(tmp_path / f"of-{versions}", call)
            assert ran.returncode == 0, ran.stderr
        assert len(asked) == installations
        assert all(("--upgrade-strategy eager" in line) == bool(versions) for line in asked)


def test_a_cascade_is_not_measured_on_its_calibration_alone(monkeypatch, capsys):
    main = runpy.run_path(str(SCRIPTS / "bench_cascade.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["bench_cascade.py", "--rows=736", "--model=/gone"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--rows=736: want more than the 736 of the calibration" in capsys.readouterr().err
