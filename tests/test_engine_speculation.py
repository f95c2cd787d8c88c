"""Speculative decoding on tiny models: the same tokens, whatever is proposed.

The requests and what they must give are those of test_engine_loop.py: penalties, biases, draws,
stops, log-probabilities, preemption.
"""

import dataclasses

import jax
import numpy as np
import pytest
from engine_reference import Reference, tiny
from test_engine_loop import EOS, LEAVES, MAX_LEN, MODEL, REQUESTS, TIGHT, check, ids, params, serve

from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine.knobs import longest_draft
from lepton_jax.engine.lookup import lookup
from lepton_jax.engine.loop import Engine

LOOKUP = dataclasses.replace(TIGHT, speculation="lookup", draft_tokens=3, num_pages=33)


LIKES_REPEATS = {  # of the model's own there are few
    "repeats": (ids(9, 31), params(frequency_penalty=-0.4, max_tokens=40)),
    "repeats, drawn": (ids(7, 32), params(presence_penalty=-2.0, temperature=0.4, seed=6)),
    "repeats a bias": (ids(5, 33), params(logit_bias={7: 5.0, 8: 5.5}, temperature=0.7, seed=7)),
}


@pytest.fixture(scope="module")
def answers():
    REQUESTS.update(LIKES_REPEATS)
    reference = Reference(MODEL, LEAVES, EOS)
    answers = {name: reference.answer(*r, max_len=MAX_LEN) for name, r in REQUESTS.items()}
    yield answers
    for name in LIKES_REPEATS:
        del REQUESTS[name]


def speculating(section: EngineSection, model=MODEL, leaves=LEAVES, **options) -> Engine:
    """An engine that speculates wherever it can."""
    engine = Engine(model, leaves, section=section, eos_ids=EOS, **options)
    engine.scheduler.draft_policy = longest_draft
    return engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return speculating(LOOKUP)


def test_together_on_few_pages(engine, answers):
    check(serve(engine, {name: REQUESTS[name] for name in answers}), answers)
    stats = engine.stats()
    assert stats["preemptions"] > 0 and stats["prefix_hit_tokens"] > 0
    assert stats["proposed_tokens"] > stats["accepted_tokens"] > 20
    assert 0 < stats["verified_steps"] < stats["decode_steps"]  # few pages: some blocks are plain


def test_over_pages_where_the_backend_has_no_views(answers):
    section = EngineSection(
        rows=3, page_size=16, prefill_chunk=64, decode_block=3, max_len=MAX_LEN,
        prefix_cache=False, speculation="lookup", draft_tokens=4,
    )  # fmt: skip
    engine = speculating(section)
    engine.runner.rungs.views.clear()
    names = ["greedy", "long", "drawn", "penalties", "no eos yet", "end of space", "logprobs"]
    names += LIKES_REPEATS
    chosen = {name: answers[name] for name in names}
    check(serve(engine, {name: REQUESTS[name] for name in names}), chosen)
    stats = engine.stats()
    assert stats["verified_steps"] == stats["decode_steps"] > 0 and stats["accepted_tokens"] > 20


def test_layers_with_windows():
    model, leaves = tiny("gemma3", layers=2)
    assert any(model.config.layer_windows) and not all(model.config.layer_windows)
    section = dataclasses.replace(LOOKUP, rows=2, num_pages=0)
    engine, reference = speculating(section, model, leaves), Reference(model, leaves, EOS)
    prompt, params = ids(40, 1), SamplingParams(max_tokens=30)
    got = serve(engine, {"a": (prompt, params), "b": (prompt[:9], params)})
    for name, count in ("a", 40), ("b", 9):
        want = reference.answer(prompt[:count], params, max_len=MAX_LEN)
        assert got[name].token_ids == want.token_ids
    assert engine.stats()["accepted_tokens"] > 0


def like(engine: Engine, **fields) -> Engine:
    """A new engine that shares another's programs, also after it forgets."""
    section = dataclasses.replace(LOOKUP, **fields)
    new = Engine(MODEL, LEAVES, section=section, eos_ids=EOS)
    new.runner.require(engine.runner.spec)
    new.runner.programs.compiled = engine.runner.programs.compiled
    new.runner.warm_up([], wait=False)
    return new


def test_a_text_that_repeats_takes_few_steps(engine):
    engine = like(engine)
    engine.scheduler.draft_policy = longest_draft
    params = SamplingParams(max_tokens=28, logit_bias={5: 1e4})
    assert serve(engine, {"a": ([5, 6], params)})["a"].token_ids == [5] * 28
    # 1 token by the prefill, 4 by the first block, which is plain; then 4 a step: 16 and 7
    stats = engine.stats()
    assert (stats["decode_steps"], stats["verified_steps"]) == (4 + 4 + 2, 6)
    assert stats["accepted_tokens"] == 12 + 5
    assert stats["proposed_tokens"] == 12 + 5  # none beyond the limit


def slow_lookup(text: list[int], draft: int) -> list[int]:
    for count in (3, 2, 1):
        if len(text) <= count:
            continue
        for end in range(len(text) - 2, count - 2, -1):
            if text[end - count + 1 : end + 1] == text[-count:]:
                source = text[end + 1 :]
                return [source[i % len(source)] for i in range(draft)]
    return [-1] * draft


def test_lookup_is_the_longest_suffix_then_the_latest_place():
    rng, size = np.random.default_rng(0), 24
    texts = rng.integers(0, 4, (200, size))
    lengths = rng.integers(0, size, 200)
    found = jax.jit(lookup, static_argnums=2)
    got = found(texts.astype(np.int32), lengths.astype(np.int32), 5)
    want = [slow_lookup(t[: n + 1].tolist(), 5) for t, n in zip(texts, lengths, strict=True)]
    assert got.tolist() == want
    assert slow_lookup([1, 2, 3, 9, 2, 3, 7, 1, 2, 3], 5) == [9, 2, 3, 7, 1]
    assert slow_lookup([4, 8, 8], 3) == [8, 8, 8] and slow_lookup([1, 2], 1) == [-1]


def test_what_copies_is_found_out_and_what_does_not_stays_plain(engine):
    engine = like(engine, draft_cost=0.1)
    varied = (ids(9, 34), params(repetition_penalty=1.9, max_tokens=40))
    serve(engine, {"varied": varied})
    stats = engine.stats()
    assert stats["verified_steps"] == 0 and stats["decode_steps"] == 39
    alike = params(logit_bias={5: 1e4}, max_tokens=60)
    assert serve(engine, {"alike": ([5, 6], alike)})["alike"].token_ids == [5] * 60
    stats = engine.stats()
    assert stats["accepted_tokens"] >= 30 and stats["decode_steps"] - 39 < 40
    engine.forget()
    serve(engine, {"varied": varied})
    assert engine.stats()["verified_steps"] == stats["verified_steps"]
