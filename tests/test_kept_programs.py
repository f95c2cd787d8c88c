"""Programs that another process left: the same results without tracing, or compiled again."""

import os
import pickle
import shutil
import uuid

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_reference import tiny

from lepton_jax import compile_cache, kept_programs
from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine import speculation, steps
from lepton_jax.engine.loop import Engine
from lepton_jax.kept_programs import KeptProgram, KeptPrograms
from lepton_jax.sharding import Placement

HERE = jax.devices()[:1]
RUN = hash(uuid.uuid4()) % 1_000_003  # constant of programs that no earlier run has compiled


def compiled(number: float):
    """A program that donates, with trees of both directions."""

    def scaled(state, x):
        return {"state": (state["sum"] + x,), "twice": 2 * x + RUN + number}

    abstract = jax.ShapeDtypeStruct((4,), jnp.float32)
    return jax.jit(scaled, donate_argnums=0).lower({"sum": abstract}, abstract).compile()


@pytest.fixture
def kept(tmp_path):
    return KeptPrograms(tmp_path)


def test_a_kept_program_is_the_same_program(kept, tmp_path):
    kept.keep("it", KeptProgram(compiled(1), 2.5))
    found = KeptPrograms(tmp_path).find("it", HERE)
    program = found.program
    assert found.seconds == 2.5
    state, x = jnp.arange(4.0), jnp.ones(4)
    result = program({"sum": state}, x)
    np.testing.assert_array_equal(result["state"][0], np.arange(4.0) + 1)
    np.testing.assert_array_equal(result["twice"], np.full(4, 3.0 + RUN))
    assert state.is_deleted()  # it was donated
    assert kept.find("another", HERE) is None


def test_a_name_is_that_of_one_program_in_one_environment(kept, tmp_path, monkeypatch):
    name = kept.name("a shape", HERE)
    assert name == KeptPrograms(tmp_path).name("a shape", HERE)
    others = [kept.name("another shape", HERE), kept.name("a shape", jax.devices()[1:2])]
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    others.append(KeptPrograms(tmp_path).name("a shape", HERE))
    monkeypatch.undo()
    monkeypatch.setattr(kept_programs, "_VERSIONS", ["jax 0.0.1"])
    others.append(KeptPrograms(tmp_path).name("a shape", HERE))
    monkeypatch.undo()
    with jax.default_matmul_precision("float32"):  # a setting may change in a process
        others.append(kept.name("a shape", HERE))
    assert kept.name("a shape", HERE) == name
    assert len({name, *others}) == 6


def test_a_name_is_of_the_source_that_runs_not_of_a_later_one(tmp_path, monkeypatch):
    before = KeptPrograms(tmp_path).name("a shape", HERE)
    monkeypatch.setattr(kept_programs, "__file__", str(tmp_path / "edited" / "kept_programs.py"))
    monkeypatch.setattr(kept_programs, "_version", lambda package: "0.0.1")
    assert kept_programs._read_source() != kept_programs.source_digest()
    assert KeptPrograms(tmp_path).name("a shape", HERE) == before


@pytest.mark.parametrize("damage", ["a folder", "shorter", "a bit", "another's pickle", "empty"])
def test_what_is_damaged_is_compiled_again(kept, tmp_path, caplog, damage):
    kept.keep("it", KeptProgram(compiled(2), 1.0))
    path = next(tmp_path.glob("*/it"))
    content = bytearray(path.read_bytes())
    if damage == "shorter":
        del content[-100:]
    elif damage == "a bit":
        content[len(content) // 2] ^= 1
    elif damage == "empty":
        content.clear()
    else:
        payload = pickle.dumps((b"", None, None))
        content = kept_programs._digest_of(payload).encode() + payload
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content)
    assert kept.find("it", HERE) is None
    assert "compiled again" in caplog.text and str(path) in caplog.text
    if damage == "a folder":
        path.rmdir()
    kept.keep("it", KeptProgram(compiled(3), 1.0))
    assert kept.find("it", HERE) is not None


def test_environments_that_were_not_used_lately_go(kept, tmp_path, monkeypatch):
    older = [kept_programs._digest(str(age)) for age in range(6)]
    for age, name in enumerate([*older, "a user's own"]):
        folder = tmp_path / name
        folder.mkdir()
        os.utime(folder, (1e9 - age, 1e9 - age))
    sorts, raised = kept_programs._oldest_first, []

    def taken_away(paths):
        """By another process, between the listing and the look."""
        gone = next(path for path in paths if path.name == older[4])
        if not raised:
            raised.append(gone.rmdir())
        return sorts(paths)

    monkeypatch.setattr(kept_programs, "_oldest_first", taken_away)
    kept.name("a shape", HERE)
    left = {path.name for path in tmp_path.iterdir()}
    assert raised and len(left) == kept_programs._FOLDERS + 1
    assert {*older[:3], "a user's own"} < left


def test_programs_that_were_not_used_lately_make_room(kept, tmp_path, monkeypatch):
    program = KeptProgram(compiled(10), 1.0)
    for age, name in enumerate(("new", "middle", "old", "oldest")):
        kept.keep(name, program)
        os.utime(next(tmp_path.glob(f"*/{name}")), (1e9 - age, 1e9 - age))
    size = next(tmp_path.glob("*/new")).stat().st_size
    assert kept.find("oldest", HERE) is not None  # used just now
    monkeypatch.setattr(kept_programs, "_MOST_BYTES", 3 * size)
    kept.keep("newest", program)
    assert {path.name for path in tmp_path.glob("*/*")} == {"newest", "oldest", "new"}


@pytest.fixture
def cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    compile_cache._use(str(tmp_path))
    yield tmp_path
    compile_cache._use(before)


def marked(number: float, made: list):
    """A way to compile a program that has its mark in its name."""

    def compile_it(mark):
        made.append(mark)

        def scaled(x):
            return x + RUN + number

        scaled.__name__ = f"scaled_{mark}"
        return jax.jit(scaled).lower(jax.ShapeDtypeStruct((4,), jnp.float32)).compile()

    return compile_it


def fetch(text, compile_it):
    return compile_cache.fetch(text, compile_it, devices=HERE)


def test_a_program_is_compiled_once(cache):
    made, before = [], compile_cache.counts()
    for _ in range(2):
        program = fetch("it", marked(4, made)).program
        np.testing.assert_array_equal(program(jnp.zeros(4)), np.full(4, 4.0 + RUN))
    assert len(made) == 1
    assert compile_cache.counts().hits == before.hits + 1


@pytest.mark.parametrize("loss", ["the folder", "damage"])
def test_what_was_lost_is_kept_again(cache, loss):
    """jax still has the program that was lost, and what jax fetched can't be kept."""
    made = []
    fetch("it", marked(5, made))
    path = next((cache / "programs").glob("*/*"))
    if loss == "damage":
        path.write_bytes(b"")
    else:
        shutil.rmtree(cache / "programs")
    compile_cache._use(str(cache))  # as another process begins
    fetch("it", marked(5, made))
    assert len(made) == 3 and made[0] == made[1] != made[2]
    fetch("it", marked(5, made))
    assert len(made) == 3


def test_another_load_may_switch_keeping_off_meanwhile(cache):
    def compile_it(mark):
        compile_cache._use(None)
        return compiled(7)

    assert fetch("it", compile_it).seconds > 0


def test_programs_are_not_kept_where_the_cache_of_jax_is_off(cache):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        fetch("it", marked(8, []))
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not (cache / "programs").exists()


def test_a_url_is_for_jax_alone(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.chdir(tmp_path)
    try:
        jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
        assert compile_cache.enable() is None
        assert jax.config.jax_compilation_cache_dir == "gs://bucket/cache"
        assert not list(tmp_path.iterdir())
    finally:
        compile_cache._use(before)


def test_a_folder_that_cannot_be_made_costs_no_more_than_time(cache, caplog):
    (cache / "programs").write_text("")
    for _ in range(2):
        program = fetch("it", lambda mark: compiled(9)).program
        np.testing.assert_array_equal(
            program({"sum": jnp.zeros(4)}, jnp.zeros(4))["twice"], np.full(4, 9.0 + RUN)
        )
    assert caplog.text.count("can't be kept") == 1


@pytest.mark.parametrize("hosts", [1, 2])
def test_several_hosts_keep_nothing(cache, monkeypatch, hosts):
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    compile_cache.fetch("it", lambda mark: compiled(20 + hosts), devices=HERE)
    assert any(cache.glob("programs/*/*")) == (hosts == 1)


@pytest.mark.parametrize("devices", [1, 2])
def test_an_engine_starts_without_tracing(cache, monkeypatch, devices):
    """Prefills, blocks and blocks with drafts; on two devices each has its own half."""
    model, leaves = tiny("llama", layers=1)
    section = EngineSection(
        rows=2,
        page_size=4,
        num_pages=24,
        prefill_chunk=32,
        decode_block=3,
        max_len=40,
        speculation="lookup",
        draft_tokens=2,
    )
    placement = Placement(jax.devices()[:devices], model.heads)
    placed = placement.put_all(model.specs, leaves)

    def answers():
        engine = Engine(model, placed, section=section)
        engine.add_request("greedy", [5, 6, 7, 5, 6, 7, 5, 6], SamplingParams(max_tokens=9))
        engine.add_request("drawn", [9, 8], SamplingParams(max_tokens=7, temperature=1.0, seed=1))
        tokens = {"greedy": [], "drawn": []}
        while engine.has_work:
            for out in engine.step():
                tokens[out.request_id] += out.token_ids
        return tokens

    def traced(*_, **__):
        raise AssertionError("a program was traced again")

    first = answers()
    assert len(first["greedy"]) == 9 and len(first["drawn"]) == 7
    compile_cache._use(str(cache))  # as another process begins
    monkeypatch.setattr(steps, "prefill", traced)
    monkeypatch.setattr(steps, "decode_block", traced)
    monkeypatch.setattr(speculation, "speculative_block", traced)
    assert answers() == first
