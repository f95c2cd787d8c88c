"""The planning driver from its command line: text, JSON, page, search, exit codes, errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forked_drivers import ENVIRONMENT, forks_of

ROOT = Path(__file__).parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'llama3_70b.py'}"
FLAGS = (CONFIG, "--noconfig.plan.compile")


@pytest.fixture(scope="module")
def plan():
    """A planning driver's end in a folder."""
    with forks_of("plan", imports=("planning.report", "planning.search")) as drive:
        yield drive


def test_a_plan_is_json_and_a_page_and_says_that_it_fits(tmp_path):
    """In a process of its own, as everyone runs it."""
    asked = ("--topology=v5e:2x4", "--json", "--html=plan.html")
    command = [sys.executable, "-m", "lepton_jax.plan", *FLAGS, *asked]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["mesh"] == {"model": 8, "expert": 1, "data": 1}
    written = (tmp_path / "plan.html").read_text()
    assert "llama-3.1-70b" in written and written.count("<svg") == 2


def test_what_does_not_fit_exits_with_1_and_says_what_would(plan, tmp_path):
    other = f"{CONFIG}:published:llama-3.1-405b"
    done = plan(tmp_path, other, FLAGS[1], "--topology=v5e:2x4")
    assert done.returncode == 1, done.stderr
    assert "GiB short" in done.stdout
    assert "would fit: mesh.model=64 with plan.topology=v5e:8x8" in done.stdout


def test_a_search_lists_the_best_first(plan, tmp_path):
    done = plan(tmp_path, *FLAGS, "--search", "--config.plan.chips=v5e,v6e")
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[1].split()
    assert first[0] == "v6e:2x2" and first[1] == "int8"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--topology=v5e:9x9", "error: plan.topology='v5e:9x9': v5e comes in slices of 1x1, 2x2"),
        ("--config.plan.topolgy=x", "did you mean 'topology'?"),
        ("--config.pool.ray=2", "error: a plan is of devices"),
        ("--search --html=plan.html", "error: --html=plan.html: a search has no page"),
    ],
)
def test_mistakes_end_in_one_line_that_names_them(plan, tmp_path, argument, message):
    done = plan(tmp_path, *FLAGS, *argument.split())
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr
