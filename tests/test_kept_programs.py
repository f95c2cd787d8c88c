"""Programs that another process left: the same results without tracing, or compiled again."""

import os
import pickle
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
from lepton_jax.kept_programs import KeptPrograms
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
    kept.keep("it", compiled(1))
    program = KeptPrograms(tmp_path).find("it", HERE)
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
    monkeypatch.setattr(kept_programs, "_version", lambda package: "0.0.1")
    others.append(KeptPrograms(tmp_path).name("a shape", HERE))
    monkeypatch.undo()
    with jax.default_matmul_precision("float32"):  # a setting may change in a process
        others.append(kept.name("a shape", HERE))
    assert kept.name("a shape", HERE) == name
    assert len({name, *others}) == 6


@pytest.mark.parametrize("damage", ["shorter", "a bit", "another's pickle", "empty"])
def test_what_is_damaged_is_compiled_again(kept, tmp_path, caplog, damage):
    kept.keep("it", compiled(2))
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
    path.write_bytes(content)
    assert kept.find("it", HERE) is None
    assert "compiled again" in caplog.text and str(path) in caplog.text
    kept.keep("it", compiled(3))
    assert kept.find("it", HERE) is not None


def test_environments_that_were_not_used_lately_go(kept, tmp_path):
    for age in range(6):
        folder = tmp_path / f"older{age}"
        folder.mkdir()
        os.utime(folder, (1e9 - age, 1e9 - age))
    kept.name("a shape", HERE)
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == kept_programs._FOLDERS
    assert {"older0", "older1", "older2"} < left


@pytest.fixture
def cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    compile_cache._use(str(tmp_path))
    yield tmp_path
    compile_cache._use(before)


def test_what_jax_had_already_is_not_kept(cache):
    made = []

    def fetch(text):
        def compile_it(mark):
            made.append(mark)
            return compiled(4)

        return compile_cache.fetch(text, compile_it, devices=HERE)

    fetch("first")  # compiled, so it is kept
    before = compile_cache.counts()
    fetch("first")
    assert len(made) == 1
    assert compile_cache.counts().hits == before.hits + 1
    fetch("second")  # the same program: jax fetches it
    fetch("second")
    assert len(made) == 3 and len(set(made)) == 2
    assert len(list((cache / "programs").glob("*/*"))) == 1


def test_a_folder_that_cannot_be_made_costs_no_more_than_time(cache, caplog):
    (cache / "programs").write_text("")
    for _ in range(2):
        program = compile_cache.fetch("it", lambda mark: compiled(5), devices=HERE)
        np.testing.assert_array_equal(
            program({"sum": jnp.zeros(4)}, jnp.zeros(4))["twice"], np.full(4, 5.0 + RUN)
        )
    assert caplog.text.count("can't be kept") == 1


@pytest.mark.parametrize("hosts", [1, 2])
def test_several_hosts_keep_nothing(cache, monkeypatch, hosts):
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    compile_cache.fetch("it", lambda mark: compiled(6 + hosts), devices=HERE)
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
