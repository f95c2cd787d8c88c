"""After `Engine.forget` an engine answers as a new one, to the last bit of a log-probability."""

import numpy as np
import pytest
from engine_reference import tiny

from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine.loop import Engine

MODEL, LEAVES = tiny("llama", layers=2)
SECTION = EngineSection(
    rows=4, page_size=4, num_pages=60, prefill_chunk=64, decode_block=4, max_len=64
)


def ids(count, seed):
    return np.random.default_rng(seed).integers(3, MODEL.config.vocab_size, count).tolist()


START = ids(20, 0)
WANTED = {f"r{i}": START[: 4 * (i % 5)] + ids(3 + 5 * i % 17, i + 1) for i in range(12)}
OTHERS = {f"o{i}": ids(5 + 3 * i, 50 + i) for i in range(7)}


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
    engine = Engine(MODEL, LEAVES, section=SECTION)
    new = serve(engine, WANTED)
    hits = engine.stats()["prefix_hit_tokens"]
    serve(engine, OTHERS)
    serve(engine, WANTED)
    assert engine.stats()["prefix_hit_tokens"] > 2 * hits  # known from the first time
    engine.forget()
    before = engine.stats()["prefix_hit_tokens"]
    assert serve(engine, WANTED) == new
    assert engine.stats()["prefix_hit_tokens"] - before == hits


def test_an_engine_at_work_forgets_nothing():
    engine = Engine(MODEL, LEAVES, section=SECTION)
    engine.add_request("a", START, SamplingParams(max_tokens=30))
    engine.step()
    with pytest.raises(ValueError, match="requests are open"):
        engine.forget()


@pytest.mark.parametrize("beat", ["dispatch", "read"])
def test_an_interrupted_beat_leaves_nothing_behind(beat):
    """As Ctrl-C in a notebook: what was planned is not computed, so nobody may share its pages."""
    engine = Engine(MODEL, LEAVES, section=SECTION)
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
