"""Requests to score, on tiny models, against whole forwards: whatever the chunks, pages and shared
beginnings, the same log-probabilities and hidden states.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_reference import tiny

from lepton_jax.config import EngineSection
from lepton_jax.engine.loop import Engine
from lepton_jax.engine.scored import Scored, ScoreSpec, Scoring
from lepton_jax.kernels.attention_reference import causal_attend

MODEL, LEAVES = tiny("llama", layers=2)
VOCAB = MODEL.config.vocab_size
MAX_LEN = 96
TIGHT = EngineSection(
    rows=4, page_size=4, num_pages=40, prefill_chunk=64, decode_block=4, max_len=MAX_LEN
)


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, count).tolist()


def whole_text(tokens: list[int]) -> tuple[list[int], Scoring]:
    """Prompt and question of a text of which every token but the first is scored."""
    return tokens[:-1], Scoring(tuple((i,) for i in tokens[1:]))


def forward(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities `[T, V]` after each token, and hidden states `[T, D]`."""
    decoder, caches = MODEL.bind(LEAVES), (None,) * MODEL.config.num_layers
    hidden, _ = decoder(jnp.asarray(tokens), jnp.arange(len(tokens)), caches, causal_attend)
    return np.asarray(jax.nn.log_softmax(decoder.logits(hidden))), np.asarray(hidden)


def check(got: Scored, prompt: list[int], scoring: Scoring) -> None:
    logprobs, hidden = forward(prompt)
    first = len(prompt) - len(scoring.targets)
    for place, wanted in enumerate(scoring.targets):
        row = logprobs[first + place]
        assert got.logprobs[place, : len(wanted)] == pytest.approx(row[list(wanted)], abs=1e-4)
        assert got.best[place] == row.argmax()
    if not scoring.pool:
        assert got.pooled is None
    else:
        pooled = hidden[-1] if scoring.pool == "last" else hidden.mean(0)
        assert got.pooled == pytest.approx(pooled, abs=1e-4)


def serve(engine: Engine, requests: dict) -> dict[str, Scored]:
    for name, (prompt, scoring) in requests.items():
        engine.add_scoring(name, prompt, scoring)
    got, beats = {}, 0
    while engine.has_work:
        beats += 1
        assert beats < 200
        for output in engine.step():
            assert output.finish_reason == "scored" and output.request_id not in got
            got[output.request_id] = output.scored
    pool = engine.scheduler._pool
    assert pool.available == pool.num_pages - 1
    return got


CONTEXT = ids(41, 1)
REQUESTS = {
    "short": whole_text(ids(5, 2)),
    "long": whole_text(ids(MAX_LEN + 1, 3)),
    "two": whole_text(ids(2, 4)),
    "end only": (CONTEXT, Scoring(((7,),) * 3)),
    "choice a": (CONTEXT + ids(4, 5), Scoring(((8,), (9,), (10,), (11,)))),
    "choice b": (CONTEXT + ids(2, 6), Scoring(((8,), (9,)))),
    "candidates": (CONTEXT, Scoring(((5, 6, 7),))),
    "ragged": (ids(9, 7), Scoring(((5,), (6, 7), (8, 9, 10)))),
    "last": (ids(70, 8), Scoring(pool="last")),
    "mean": (ids(70, 9), Scoring(pool="mean")),
    "shared mean": ([*CONTEXT, 5], Scoring(pool="mean")),
    "shared last": ([*CONTEXT, 6], Scoring(((5,),), pool="last")),
    "one": (ids(1, 10), Scoring(((3,),), pool="mean")),
}


@pytest.fixture(scope="module")
def tight() -> Engine:
    engine = Engine(MODEL, LEAVES, section=TIGHT)
    engine.runner.require(ScoreSpec(4, True))
    return engine


def test_all_together_in_chunks_on_shared_pages(tight):
    before = tight.stats()
    got = serve(tight, REQUESTS)
    for name, request in REQUESTS.items():
        check(got[name], *request)
    after = tight.stats()
    # "choice a", "choice b", "candidates" and "shared last" find the context's ten full pages.
    assert after["prefix_hit_tokens"] - before["prefix_hit_tokens"] == 4 * 40
    assert after["scored_tokens"] == sum(len(s.targets) for _, s in REQUESTS.values())


def test_again_and_one_by_one(tight):
    for name in ("long", "candidates", "mean"):
        check(serve(tight, {name: REQUESTS[name]})[name], *REQUESTS[name])


def test_a_text_is_computed_again_where_its_own_places_are_asked(tight):
    before = tight.stats()["prefix_hit_tokens"]
    serve(tight, {"a": REQUESTS["short"], "b": REQUESTS["short"]})
    assert tight.stats()["prefix_hit_tokens"] == before
