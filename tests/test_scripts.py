"""Measuring scripts run to their end on a tiny model (their figures are for people to look at),
README's table of plans is its script's, and environments are made by a python that only notes what
it is asked for.
"""

import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compress_makers import model_folder

from lepton_jax.planning.programs import Program
from lepton_jax.planning.traffic import Traffic

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_speculation_is_measured_for_each_contender(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPTS / "bench_speculation.py"))["main"]
    flags = ["--preset=none", "--draft=int8", "--draft_tokens=2"]
    flags += ["--workloads=story", "--rows=1", "--new=6", "--rounds=1"]
    main([f"--model={model_folder(tmp_path / 'model', layers=1)}", *flags])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["kind"] for record in records] == ["off", "lookup", "draft"]
    assert [record["same_texts"] for record in records] == ["1/1"] * 3


def test_readmes_table_of_plans_is_what_its_script_prints():
    script = runpy.run_path(str(SCRIPTS / "plan_table.py"))
    lines = (SCRIPTS.parent / "README.md").read_text().splitlines()
    below = lines[lines.index(script["HEAD"]) + 2 :]
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), below))
    known = tuple(f"| {' | '.join(script['names_of'](case))} |" for case in script["CASES"])
    assert rows and [row for row in rows if not row.startswith(known)] == []
    case, other = script["CASES"][:2]
    assert script["line"](case, script["plan_of"](case), None) == rows[0]
    plan = script["plan_of"](other)
    moved = Traffic(read=8 * plan.decode_cost.weight_bytes)
    program = Program("decode", 8, plan.memory, moved, seconds=1.0, text="")
    assert script["line"](other, plan, program).count("|") == script["HEAD"].count("|")


def test_leaves_are_measured_beside_the_dense_one(capsys):
    script = runpy.run_path(str(SCRIPTS / "bench_leaves.py"))
    script["main"](["--shapes=128x256", "--rows=1,2", "--rounds=2", "--mib=0.2"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| outputs x inputs | weight | bytes | ms, rows=1 | ms, rows=2 |"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [cell[1] for cell in cells] == list(script["LEAVES"])
    assert {cell[0] for cell in cells} == {"128x256"}
    share = {name: float(bytes_) for _, name, bytes_, *_ in cells}
    assert share["float32"] == 1 and share["int8"] == pytest.approx(0.25 + 1 / 256, abs=1e-3)
    assert share["2:4"] == pytest.approx(0.5 + 1 / 32, abs=1e-3)  # and 2 bits of 32 for each kept
    assert all(cell.endswith(" (1.00)") for cell in cells[0][3:])
    with pytest.raises(SystemExit, match="2"):
        script["main"](["--shapes=128x250", "--leaf=2:4=weights=keep prune=magnitude pattern=2:4"])
    assert "128x250: pattern 2:4 does not divide 250 inputs" in capsys.readouterr().err


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


def a_python(place, answer):
    """An executable that says of itself what `find_python.sh` asks."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(f"#!/bin/sh\necho '{answer}' | sed \"s|PLACE|$0|\"\n")
    place.chmod(0o755)
    return place


def find_python(tmp_path, *flags, **variables):
    tools = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    return subprocess.run(
        [SCRIPTS / "find_python.sh", *flags],
        env={"PATH": tools, "HOME": str(tmp_path / "home")} | variables,
        capture_output=True,
        text=True,
    )


def test_the_newest_python_is_found_on_the_path_and_in_pyenv(tmp_path):
    a_python(
        tmp_path / "bin" / "python3.14", "has no venv module (apt-get install python3.14-venv)"
    )
    on_path = a_python(tmp_path / "bin" / "python3.12", "ok 3.12.1 PLACE")
    a_python(tmp_path / "bin" / "python3.11", "ok 3.11.9 PLACE")
    assert find_python(tmp_path).stdout.strip() == str(on_path)
    versions = tmp_path / "home" / ".pyenv" / "versions"
    a_python(versions / "3.13.2" / "bin" / "python3.13", "ok 3.13.2 PLACE")
    newer = a_python(versions / "3.13.10" / "bin" / "python3.13", "ok 3.13.10 PLACE")
    assert find_python(tmp_path).stdout.strip() == str(newer)
    all_ = [line.split()[0] for line in find_python(tmp_path, "--all").stdout.splitlines()]
    assert all_[:3] == ["3.13.10", "3.12.1", "3.11.9"]
    elsewhere = a_python(
        tmp_path / "root" / "versions" / "3.13.11" / "bin" / "python3.13", "ok 3.13.11 PLACE"
    )
    asked = find_python(tmp_path, PYENV_ROOT=str(tmp_path / "root"))
    assert asked.stdout.strip() == str(elsewhere)
    named = find_python(tmp_path, PYTHON=str(on_path))
    assert named.stdout.strip() == str(on_path)


def test_what_cannot_be_used_is_named_with_the_reason(tmp_path):
    reason = "has no venv module (on Debian and Ubuntu: apt-get install python3.14-venv)"
    place = a_python(tmp_path / "bin" / "python3.14", reason)
    found = find_python(tmp_path, PYTHON=str(place))
    assert found.returncode == 1 and f"{place} {reason}" in found.stderr
    assert "Install Python 3.11 or newer with its venv module, or name one" in found.stderr
    assert find_python(tmp_path, "--newest").returncode == 2


def ran_twice(tmp_path, *command):
    """What the python of a checkout's environment was asked for by a script that ran twice, from
    another folder, and the checkout.
    """
    checkout = tmp_path / "a checkout"
    shutil.copytree(SCRIPTS, checkout / "scripts")
    shutil.copy(SCRIPTS.parent / "pyproject.toml", checkout)
    python, asked = checkout / ".venv" / "bin" / "python", tmp_path / "asked"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$PWD: $@" >>"{asked}"\n')
    python.chmod(0o755)
    script, *arguments = command
    for _ in "ab":
        ran = subprocess.run(
            [checkout / "scripts" / script, *arguments], cwd="/", capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
    return checkout, asked.read_text().splitlines()


def test_the_quickstart_runs_twice_from_anywhere_and_hands_its_arguments_on(tmp_path):
    checkout, lines = ran_twice(tmp_path, "quickstart.sh", "--config.job.keep=a b")
    run = "-m lepton_jax.run --config=configs/quickstart.py --config.job.keep=a b"
    assert [line for line in lines if "lepton_jax.run" in line] == [f"{checkout}: {run}"] * 2
    assert sum(" install " in line for line in lines) == 1


def test_the_tests_run_twice_from_anywhere_and_hand_their_arguments_on(tmp_path):
    checkout, lines = ran_twice(tmp_path, "test.sh", "-k", "a b")
    asked = [line.removeprefix(f"{checkout}: -m ") for line in lines]
    assert [line.split()[:2] for line in asked if line.startswith("ruff")] == [
        ["ruff", "check"],
        ["ruff", "format"],
    ] * 2
    tests = [line for line in asked if line.startswith("pytest")]
    assert [line.endswith(" -k a b") for line in tests] == [True] * 4
    assert [" -m not slow" in line for line in tests] == [True, False] * 2
    assert sum(" install " in line for line in lines) == 1


def test_a_cascade_is_not_measured_on_its_calibration_alone(monkeypatch, capsys):
    main = runpy.run_path(str(SCRIPTS / "bench_cascade.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["bench_cascade.py", "--rows=736", "--model=/gone"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--rows=736: want more than the 736 of the calibration" in capsys.readouterr().err
