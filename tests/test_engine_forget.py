"""After `Engine.forget` an engine answers as a new one, to the last bit of a log-probability."""

import gc
import weakref

import jax
import numpy as np
import pytest
from engine_reference import tiny

from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine.loop import Engine
from lepton_jax.engine.scored import Scoring

MODEL, LEAVES = tiny("llama", layers=1)
KEPT = jax.tree.leaves(LEAVES)
SECTION = EngineSection(
    rows=4, page_size=4, num_pages=60, prefill_chunk=64, decode_block=4, max_len=64
)
PROGRAMS = {}  # of all engines here


def ids(count, seed):
    return np.random.default_rng(seed).integers(3, MODEL.config.vocab_size, count).tolist()


START = ids(20, 0)
WANTED = {f"r{i}": START[: 4 * (i % 5)] + ids(3 + 5 * i % 17, i + 1) for i in range(12)}
OTHERS = {f"o{i}": ids(5 + 3 * i, 50 + i) for i in range(7)}


def make():
    engine = Engine(MODEL, LEAVES, section=SECTION)
    engine.runner.programs.compiled = PROGRAMS
    return engine


def serve(engine, prompts):
    """All that comes of these prompts: ids and log-probabilities."""
    for i, (name, prompt) in enumerate(prompts.items()):
        drawn = SamplingParams(max_tokens=3 + i % 9, temperature=float(i % 2), logprobs=1)
        engine.add_request(name, prompt, drawn)
    answers = {name: [] for name in prompts}
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id].append((output.token_ids, output.logprobs))
    return answers


def test_what_follows_does_not_depend_on_what_was_before():
    engine = make()
    new = serve(engine, WANTED)
    hits = engine.stats()["prefix_hit_tokens"]
    serve(engine, OTHERS)
    serve(engine, WANTED)
    assert engine.stats()["prefix_hit_tokens"] > 2 * hits  # known from the first time
    engine.forget()
    before = engine.stats()["prefix_hit_tokens"]
    assert serve(engine, WANTED) == new
    assert engine.stats()["prefix_hit_tokens"] - before == hits


def test_what_other_rows_needed_is_forgotten():
    """Or a resumed job, which doesn't see these rows, would run other programs."""
    engine = make()
    known = [(20, SamplingParams(temperature=1.0, logprobs=1))]
    engine.warm_up(known, only=lambda shape: False)
    expected = engine.runner.spec, engine.runner.score_spec
    engine.add_request("a", START, SamplingParams(max_tokens=1, min_tokens=1))
    engine.add_scoring("b", START, Scoring(((5, 6),)))
    while engine.has_work:
        engine.step()
    assert engine.runner.spec != expected[0] and engine.runner.score_spec != expected[1]
    engine.forget()
    assert (engine.runner.spec, engine.runner.score_spec) == expected
    engine.add_request("c", START, SamplingParams(max_tokens=2))
    assert sum(len(out.token_ids) for _ in range(6) for out in engine.step()) == 2


@pytest.mark.parametrize("way", ["close", "drop"])
def test_an_engine_that_is_not_needed_any_more_gives_its_memory_back(way):
    engine = make()
    engine.warm_up([(5, SamplingParams())], only=lambda shape: False)
    runner = engine.runner
    held = jax.tree.leaves((runner._caches, runner._state, runner.leaves))
    held = [weakref.ref(array) for array in held if not any(array is kept for kept in KEPT)]
    assert len(held) > 4
    gc.disable()
    try:
        if way == "close":
            engine.close()
        del runner
        if way == "drop":
            del engine
        assert not [ref for ref in held if ref() is not None]
    finally:
        gc.enable()


def test_an_engine_at_work_forgets_nothing():
    engine = make()
    engine.add_request("a", START, SamplingParams(max_tokens=30, temperature=1.0, logprobs=1))
    engine.step()
    with pytest.raises(ValueError, match="requests are open"):
        engine.forget()


@pytest.mark.parametrize("beat", ["dispatch", "read"])
def test_an_interrupted_beat_leaves_nothing_behind(beat):
    """As Ctrl-C in a notebook: what was planned is not computed, so nobody may share its pages."""
    engine = make()
    new = serve(engine, WANTED)
    engine.forget()
    whole = getattr(engine.runner, beat)

    def interrupted(_):
        raise KeyboardInterrupt

    setattr(engine.runner, beat, interrupted)
    with pytest.raises(KeyboardInterrupt):
        serve(engine, {f"broken {name}": prompt for name, prompt in WANTED.items()})
    setattr(engine.runner, beat, whole)
    assert not engine.has_work
    assert serve(engine, WANTED) == new
