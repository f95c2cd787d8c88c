"""The engine on 8-bit caches: half the bytes, nearly the same answers, and the same ones however a
run is cut into pages, chunks, blocks and rows.
"""

import functools

import numpy as np
import pytest
from engine_reference import Reference, tiny

from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine import loop
from lepton_jax.engine.loop import Engine
from lepton_jax.engine.scored import Scoring
from lepton_jax.kernels import attention_tpu, attention_tpu_kernel

MODEL, LEAVES = tiny("llama", layers=2)
MAX_LEN, NEW = 96, 16
ROOMY = dict(rows=1, page_size=16, prefix_cache=False)
TIGHT = dict(rows=4, page_size=4, num_pages=30, prefill_chunk=32, decode_block=4)
GREEDY = SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=0)


def ids(count, seed):
    return np.random.default_rng(seed).integers(3, MODEL.config.vocab_size, count).tolist()


SHARED = ids(40, 0)
PROMPTS = [SHARED + ids(5, 1), ids(7, 2), SHARED + ids(9, 3), ids(30, 4), SHARED + ids(2, 5)]


def make(kv_dtype, sizes):
    return Engine(MODEL, LEAVES, section=EngineSection(**sizes, max_len=MAX_LEN, kv_dtype=kv_dtype))


def answers(engine, prompts=PROMPTS):
    """Tokens and their log-probabilities, in the order of the prompts."""
    found = [([], []) for _ in prompts]
    for name, prompt in enumerate(prompts):
        engine.add_request(str(name), prompt, GREEDY)
    while engine.has_work:
        for output in engine.step():
            tokens, logprobs = found[int(output.request_id)]
            tokens += output.token_ids
            logprobs += [own for own, _ in output.logprobs or ()]
    return found


def crowded(kv_dtype):
    """An engine on few pages and what it answered."""
    engine = make(kv_dtype, TIGHT)
    found, stats = answers(engine), engine.stats()
    assert stats["preemptions"] > 0 and stats["prefix_hit_tokens"] > 0
    return engine, found


def assert_same(found, others):
    for (mine, near), (theirs, far) in zip(found, others, strict=True):
        assert mine == theirs
        np.testing.assert_allclose(near, far, atol=2e-2)


def test_answers_are_those_of_other_pages_chunks_and_blocks():
    _, found = crowded("int8")
    assert_same(found, answers(make("int8", ROOMY)))


def test_answers_are_those_of_prompts_alone_in_smaller_chunks_and_blocks():
    engine, found = crowded("float8_e4m3fn")
    engine.scheduler.turn(prefill_chunk=8, decode_block=1)
    alone = []
    for prompt in PROMPTS:
        engine.forget()
        hits = engine.stats()["prefix_hit_tokens"]
        alone += answers(engine, [prompt])
        assert engine.stats()["prefix_hit_tokens"] == hits
    assert_same(found, alone)


def test_the_kernel_for_tpu_answers_alike(monkeypatch):
    """Interpreted, in a whole engine: what it rounds more decides nearly equal tokens only."""
    _, wanted = crowded("int8")
    call = functools.partial(attention_tpu_kernel.attend_tiles, interpret=True)
    monkeypatch.setattr(attention_tpu_kernel, "attend_tiles", call)
    monkeypatch.setattr(attention_tpu, "_check_that_it_pays", lambda *_: None)  # pages of 4
    monkeypatch.setattr(loop, "backend_for", lambda *_: attention_tpu)
    _, found = crowded("int8")
    same = [mine == theirs for (mine, _), (theirs, _) in zip(found, wanted, strict=True)]
    assert sum(same) >= 3
    for (mine, near), (theirs, far) in zip(found, wanted, strict=True):
        other = next((n for n in range(NEW) if mine[n] != theirs[n]), NEW)
        np.testing.assert_allclose(near[:other], far[:other], atol=0.04)
        np.testing.assert_allclose(near[other : other + 1], far[other : other + 1], atol=0.15)


@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 0.02), ("float8_e4m3fn", 0.1)])
def test_log_probabilities_stay_close_to_those_of_whole_forwards(kv_dtype, most):
    """Of prompts to score, which read all their beginning from the cache."""
    reference, engine = Reference(MODEL, LEAVES), make(kv_dtype, TIGHT)
    text = ids(60, 6)
    engine.add_scoring("text", text[:-1], Scoring(targets=tuple((t,) for t in text[1:])))
    found = None
    while engine.has_work:
        found = next((o.scored for o in engine.step() if o.scored is not None), found)
    exact = []
    for place in range(1, len(text)):
        logits = reference.logits(text[:place]).astype(np.float64)
        exact.append(logits[text[place]] - np.logaddexp.reduce(logits))
    off = np.abs(found.logprobs[:, 0] - exact)
    assert 0 < off.mean() < most


def test_an_8_bit_cache_takes_half_the_bytes():
    wide, narrow = (make(kv_dtype, TIGHT).runner for kv_dtype in ("bfloat16", "int8"))
    head = MODEL.config.head_dim
    assert narrow.kv_bytes / wide.kv_bytes == (head + 2) / (2 * head)
    # A budget in bytes holds as many more pages; a view is as wide as it was.
    assert narrow._view(4, 40) == wide._view(4, 40)
