"""Programs compiled ahead, in time, late and not at all, by a compiler that the tests hold."""

import threading
import time

import pytest

from lepton_jax.engine.programs import LateCompileError, Programs
from lepton_jax.kept_programs import KeptProgram


class Compiler:
    """Gives `program <shape>`; a shape in `held` is compiled once `release` is set."""

    def __init__(self, *held):
        self.calls, self.held, self.release = [], held, threading.Event()

    def __call__(self, shape):
        self.calls.append(shape)
        if shape in self.held:
            assert self.release.wait(10)
        if shape == "bad":
            raise MemoryError("no room for the program")
        return KeptProgram(f"program {shape}", 3.0)


def test_waiting_compiles_everything_once():
    compiler = Compiler()
    programs = Programs(compiler)
    programs.warm_up(["a", "b", "a"], wait=True)
    assert programs.compiled == {"a": "program a", "b": "program b"}
    assert programs.get("a") == "program a" and sorted(compiler.calls) == ["a", "b"]
    assert programs.seconds > 0 and programs.late == 0


def test_what_is_needed_goes_before_what_is_queued():
    compiler = Compiler("slow", "slower")
    programs = Programs(compiler)
    programs.warm_up(["slow", "slower", "later", "needed"], wait=False)
    assert programs.get("needed") == "program needed"  # both compile threads are held meanwhile
    assert "later" not in programs.compiled and programs.late == 0
    compiler.release.set()
    assert programs.get("slow") == "program slow"
    assert programs.get("later") == "program later"
    assert sorted(compiler.calls) == ["later", "needed", "slow", "slower"]


def test_late_programs_are_counted_and_told(caplog):
    programs = Programs(Compiler())
    assert programs.get("first") == "program first" and not caplog.text  # nothing was warmed up
    programs.warm_up(["a"], wait=True)
    assert programs.get("b") == "program b"
    assert programs.late == 1 and "b was not part of the warm-up" in caplog.text
    assert programs.get("b") == "program b" and programs.late == 1


def test_late_programs_are_no_news_where_the_warm_up_was_a_guess(caplog):
    programs = Programs(Compiler())
    programs.warm_up(["a"], wait=True, guessed=True)
    assert programs.get("b") == "program b"
    assert programs.late == 1 and not caplog.text


def test_strict_programs_refuse_late_ones():
    programs = Programs(Compiler(), strict=True)
    programs.warm_up(["a"], wait=False)
    assert programs.get("a") == "program a"
    with pytest.raises(LateCompileError, match="b was not part of the warm-up"):
        programs.get("b")


@pytest.mark.parametrize("wait", [True, False])
def test_a_failed_compilation_reaches_who_needs_it(wait):
    programs = Programs(Compiler())
    with pytest.raises(MemoryError, match="no room"):
        programs.warm_up(["bad"], wait=wait)
        programs.get("bad")
    with pytest.raises(MemoryError, match="no room"):
        programs.get("bad")


def test_what_nobody_needs_is_compiled_beside_the_rest(caplog):
    programs = Programs(Compiler())
    programs.add("a")
    assert programs.get("a") == "program a" and programs.mean_seconds == 3.0
    programs.add("a")
    programs.add("bad")
    deadline = time.monotonic() + 10
    while "no room" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.001)
    assert "saved time can't be had: bad" in caplog.text and "no room" in caplog.text
    assert programs.get("b") == "program b" and programs.late == 0  # nothing was warmed up


def test_closing_drops_what_has_not_begun():
    compiler = Compiler("slow", "slower")
    programs = Programs(compiler)
    programs.warm_up(["slow", "slower", "never"], wait=False)
    programs.close()
    compiler.release.set()
    assert programs.get("slow") == "program slow"  # begun, or compiled again: it can still be had
    assert "never" not in compiler.calls


def test_seconds_count_what_is_still_being_compiled():
    compiler = Compiler("slow")
    programs = Programs(compiler)
    programs.warm_up(["slow"], wait=False)
    while not compiler.calls:
        time.sleep(0.001)
    first = programs.seconds
    assert 0 < first < programs.seconds
    compiler.release.set()
    assert programs.get("slow") == "program slow"
    assert programs.seconds > first
