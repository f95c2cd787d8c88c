"""A second model proposes: the same tokens as without it, and few steps where it agrees."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from engine_reference import Reference, tiny
from test_engine_loop import EOS, LEAVES, MAX_LEN, MODEL, TIGHT, ids, params, serve
from tpu_topology import copies_of

from lepton_jax.engine.knobs import Knobs, longest_draft
from lepton_jax.engine.loop import Engine
from lepton_jax.engine.row_params import SampleSpec
from lepton_jax.models.build import abstract_model

DRAFT = dataclasses.replace(TIGHT, speculation="draft", draft_tokens=3, num_pages=0)
SHALLOW = tiny("llama", layers=1)  # the first of the model's two layers
REQUESTS = {
    "greedy": (ids(5, 2), params(max_tokens=40)),
    "long": (ids(81, 1), params(max_tokens=20)),
    "drawn": (ids(9, 4), params(temperature=1.3, seed=1 << 40, max_tokens=30)),
    "nucleus": (ids(3, 5), params(temperature=1.1, top_k=30, top_p=0.8, seed=5)),
    "penalties": (ids(30, 6), params(repetition_penalty=1.4, frequency_penalty=0.5)),
    "eos": (ids(4, 10), params(logit_bias={2: 3.0}, ignore_eos=False, min_tokens=5)),
    "end of space": (ids(MAX_LEN - 3, 11), params(max_tokens=50)),
}


def answers_of(model, leaves) -> dict[str, list[int]]:
    reference = Reference(model, leaves, EOS)
    return {n: reference.answer(*r, max_len=MAX_LEN).token_ids for n, r in REQUESTS.items()}


@pytest.fixture(scope="module")
def answers() -> dict[str, list[int]]:
    return answers_of(*SHALLOW)


def drafted(model, leaves, *, by, asked=tuple(REQUESTS)) -> Engine:
    """An engine whose programs serve all requests of these names from the first on."""
    engine = Engine(model, leaves, section=DRAFT, eos_ids=EOS)
    engine.draft_with(*by)
    engine.scheduler.draft_policy = longest_draft
    for name in asked:
        engine.runner.require(SampleSpec.of(REQUESTS[name][1], EOS))
    return engine


def tokens(engine: Engine, requests: dict) -> dict[str, list[int]]:
    return {name: output.token_ids for name, output in serve(engine, requests).items()}


@pytest.fixture(scope="module")
def itself() -> Engine:
    return drafted(*SHALLOW, by=SHALLOW, asked=("greedy", "drawn", "nucleus", "long"))


def test_a_model_that_proposes_to_itself_is_always_right(itself, answers):
    most = Knobs(DRAFT.decode_block, DRAFT.prefill_chunk, DRAFT.rows, 3)
    itself.scheduler.knobs = most
    for name in ("greedy", "drawn", "nucleus"):
        before = itself.stats()
        assert tokens(itself, {name: REQUESTS[name]})[name] == answers[name]
        after = itself.stats()
        proposed = after["proposed_tokens"] - before["proposed_tokens"]
        assert proposed == after["accepted_tokens"] - before["accepted_tokens"] > 0
    # greedy: 1 token by the prefill, 4 by a plain block, 35 by steps of 4
    before = itself.stats()["decode_steps"]
    serve(itself, {"greedy": REQUESTS["greedy"]})
    assert itself.stats()["decode_steps"] - before == 4 + 9


def test_it_catches_up_with_what_plain_blocks_decoded(itself, answers):
    most = Knobs(DRAFT.decode_block, DRAFT.prefill_chunk, DRAFT.rows, 3)
    itself.scheduler.knobs = dataclasses.replace(most, draft=0)
    before, got = itself.stats(), []
    itself.add_request("long", *REQUESTS["long"])
    while len(got) < 9:
        got += [token for output in itself.step() for token in output.token_ids]
    assert itself.stats()["proposed_tokens"] == before["proposed_tokens"]
    itself.scheduler.knobs = most
    outputs = []
    while itself.has_work:
        outputs += itself.step()
    assert got + [token for output in outputs for token in output.token_ids] == answers["long"]
    after = itself.stats()
    told = [output.drafted for output in outputs if output.drafted]
    assert {draft for _, _, draft in told} == {3}
    accepted = after["accepted_tokens"] - before["accepted_tokens"]
    assert sum(accepted for _, accepted, _ in told) == accepted > 0
    proposed = after["proposed_tokens"] - before["proposed_tokens"]
    assert proposed == after["accepted_tokens"] - before["accepted_tokens"] > 0


def test_a_worse_model_changes_no_token():
    engine = drafted(MODEL, LEAVES, by=SHALLOW)
    assert tokens(engine, REQUESTS) == answers_of(MODEL, LEAVES)
    stats = engine.stats()
    assert 0 < stats["accepted_tokens"] < stats["proposed_tokens"]


def test_what_cannot_draft_is_refused():
    config = dataclasses.replace(MODEL.config, vocab_size=70)
    other = abstract_model(config, jnp.float32, jnp.float32), LEAVES
    with pytest.raises(ValueError, match="a vocabulary of 70 tokens, the model one of 72"):
        Engine(MODEL, LEAVES, section=DRAFT).draft_with(*other)


def test_an_engine_without_its_draft_model_serves_nothing():
    engine = Engine(MODEL, LEAVES, section=DRAFT, eos_ids=EOS)
    with pytest.raises(RuntimeError, match="call draft_with"):
        engine.add_request("a", *REQUESTS["greedy"])


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA copies it up to jax 0.10.2")
def test_a_single_rows_block_copies_no_cache_of_the_draft_model():
    # So many pages a row that attention looks at them in a loop: it and the cache that goes on
    # were two readers of one token's write.
    shallow, leaves = SHALLOW
    config = dataclasses.replace(shallow.config, max_position=1024)
    model = abstract_model(config, jnp.float32, jnp.float32)
    section = dataclasses.replace(DRAFT, rows=1, max_len=1024)
    engine = Engine(model, leaves, section=section, eos_ids=EOS)
    engine.draft_with(model, leaves)
    runner = engine.runner
    text = runner.lower(runner._decode_shape(1, 60, 3)).compile().as_text()
    for cache in jax.tree.leaves(runner._abstract_drafting()):
        assert copies_of(text, cache.shape) == []
