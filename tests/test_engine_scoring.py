"""Requests to score, on tiny models, against whole forwards: whatever the chunks, pages and shared
beginnings, the same log-probabilities and hidden states.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_reference import tiny

from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine.loop import Engine
from lepton_jax.engine.scored import Scored, ScoreSpec, Scoring
from lepton_jax.engine.scoring import score, score_layout
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


@jax.jit
def _whole(tokens):
    decoder, caches = MODEL.bind(LEAVES), (None,) * MODEL.config.num_layers
    hidden, _ = decoder(tokens, jnp.arange(MAX_LEN), caches, causal_attend)
    return jax.nn.log_softmax(decoder.logits(hidden)), hidden


def forward(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities `[T, V]` after each token, and hidden states `[T, D]`."""
    padded = np.zeros(MAX_LEN, np.int32)
    padded[: len(tokens)] = tokens
    return tuple(np.asarray(a)[: len(tokens)] for a in _whole(padded))


def check(got: Scored, prompt: list[int], scoring: Scoring) -> None:
    logprobs, hidden = forward(prompt)
    first = len(prompt) - len(scoring.targets)
    for place, wanted in enumerate(scoring.targets):
        row = logprobs[first + place]
        assert got.logprobs[place, : len(wanted)] == pytest.approx(row[list(wanted)], abs=1e-4)
        assert got.greedy[place, : len(wanted)].tolist() == [i == row.argmax() for i in wanted]
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
    pool = engine.scheduler._pools[0]
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


@pytest.mark.parametrize("chunk", [16, 64])
def test_hidden_states_between_layers(chunk):
    """Layer 0 is the table's rows; after layer 1 and a norm it is a model of one layer; the number
    of all layers means the end.
    """
    engine = Engine(MODEL, LEAVES, section=dataclasses.replace(TIGHT, prefill_chunk=chunk))
    prompt = ids(40, 30)
    asked = {
        f"{pool} {layer}": (prompt, Scoring(pool=pool, layer=layer))
        for pool in ("last", "mean")
        for layer in (-1, 0, 1, MODEL.config.num_layers)
    }
    got = {name: one.pooled for name, one in serve(engine, asked).items()}
    hidden = forward(prompt)[1]
    specs = dict(zip(MODEL.specs, LEAVES, strict=True))
    table = np.asarray(specs["embed"])[prompt]
    for pool, of in (("last", lambda a: a[-1]), ("mean", lambda a: a.mean(0))):
        assert got[f"{pool} 0"] == pytest.approx(of(table), abs=1e-5)
        for layer in (-1, MODEL.config.num_layers):
            assert got[f"{pool} {layer}"] == pytest.approx(of(hidden), abs=1e-4)
    cut, leaves = tiny("llama", layers=1)
    normed, _ = jax.jit(
        lambda leaves, ids: cut.bind(leaves)(ids, jnp.arange(40), (None,), causal_attend)
    )(leaves, np.array(prompt))
    state = got["last 1"] / np.sqrt((got["last 1"] ** 2).mean() + cut.config.norm_eps)
    assert state * np.asarray(specs["final_norm"]) == pytest.approx(
        np.asarray(normed)[-1], abs=1e-4
    )
    with pytest.raises(ValueError, match=f"the model has {MODEL.config.num_layers} layers"):
        engine.add_scoring("x", prompt, Scoring(pool="last", layer=9))


@pytest.mark.parametrize(("name", "found"), [("long", 0), ("candidates", 40), ("mean", 0)])
def test_again_and_one_by_one(tight, name, found):
    """Only a prompt whose own places nobody asks for is found in the cache."""
    for _ in range(2):
        before = tight.stats()["prefix_hit_tokens"]
        check(serve(tight, {name: REQUESTS[name]})[name], *REQUESTS[name])
    assert tight.stats()["prefix_hit_tokens"] - before == found


def test_a_text_is_computed_again_where_its_own_places_are_asked(tight):
    before = tight.stats()["prefix_hit_tokens"]
    serve(tight, {"a": REQUESTS["short"], "b": REQUESTS["short"]})
    assert tight.stats()["prefix_hit_tokens"] == before


def test_the_likeliest_id_is_greedy_and_no_other(tight):
    prompt = ids(20, 11)
    best = forward(prompt)[0].argmax(-1)
    targets = tuple((int(i), int(i) ^ 1) for i in best[-5:])
    got = serve(tight, {"a": (prompt, Scoring(targets))})["a"]
    assert got.greedy.tolist() == [[True, False]] * 5


def test_scoring_and_generating_rows_take_turns(tight):
    """Neither waits for the other to be done, and shared pages are written before they are read."""
    prompt = ids(50, 12)
    alone = Engine(MODEL, LEAVES, section=TIGHT)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    alone.add_request("a", prompt, params)
    expected = []
    while alone.has_work:
        expected += [i for output in alone.step() for i in output.token_ids]
    scorings = {f"s{n}": ([*prompt, n + 3], Scoring(((5,), (6,)))) for n in range(3)}
    tight.add_request("a", prompt, params)
    for name, request in scorings.items():
        tight.add_scoring(name, *request)
    tight.add_request("b", [*prompt[:48], 9], params)
    tokens, got = [], {}
    while tight.has_work:
        for output in tight.step():
            tokens += output.token_ids if output.request_id == "a" else []
            if output.scored:
                got[output.request_id] = output.scored
    assert tokens == expected
    for name, request in scorings.items():
        check(got[name], *request)


def test_abort_while_chunks_are_in_flight(tight):
    tight.add_scoring("long", *REQUESTS["long"])
    tight.add_scoring("short", *REQUESTS["short"])
    tight.step()
    tight.abort("long")
    outputs = []
    while tight.has_work:
        outputs += tight.step()
    assert [output.request_id for output in outputs] == ["short"]
    check(outputs[0].scored, *REQUESTS["short"])


def test_bad_requests_are_refused(tight):
    too_long = whole_text(ids(MAX_LEN + 2, 13))
    cases = [
        ("what is scored has token id 72, which is outside", [5], Scoring(((VOCAB,),))),
        ("the prompt has token id -1, which is outside", [-1], Scoring(((5,),))),
        ("97 tokens, but engine.max_len=96 leaves room for 96", *too_long),
        ("targets of 2 places of 1 tokens", [5], Scoring(((5,), (6,)))),
        ("no tokens", [], Scoring(pool="last")),
    ]
    for message, prompt, scoring in cases:
        with pytest.raises(ValueError, match=message):
            tight.add_scoring("bad", prompt, scoring)
    for fields in ({}, {"pool": "first"}, {"targets": ((5,), ())}):
        with pytest.raises(ValueError, match=r"nothing is asked|is unknown|without targets"):
            Scoring(**fields)
    assert not tight.has_work


def test_broken_numbers_are_errors(tight):
    broken = dict(zip(MODEL.specs, LEAVES, strict=True))
    broken["final_norm"] *= jnp.nan
    engine = Engine(MODEL, tuple(broken.values()), section=TIGHT)
    engine.runner.require(tight.runner.score_spec)
    engine.runner.programs.compiled = tight.runner.programs.compiled
    for name in ("short", "mean"):
        engine.add_scoring(name, *REQUESTS[name])
    outputs = [output for _ in range(3) for output in engine.step()]
    assert {(o.request_id, o.finish_reason, o.scored) for o in outputs} == {
        ("short", "error", None),
        ("mean", "error", None),
    }


def test_a_warmed_up_engine_compiles_nothing_more():
    request = ids(40, 14), Scoring(((5, 6, 7), (7,)), pool="last")
    workload = [(40, ScoreSpec.of(request[1]))]
    engine = Engine(MODEL, LEAVES, section=TIGHT, workload=workload, strict=True)
    engine.warm_up(workload)
    serve(engine, {"a": request})
    assert engine.stats()["programs"] == 1 and engine.stats()["late_compiles"] == 0


def test_logits_of_a_large_vocabulary_are_never_whole():
    """Temporaries of the program stay below a few slices, far below T x V floats."""
    model, leaves = tiny("llama", layers=1)
    section = dataclasses.replace(TIGHT, prefill_chunk=512, rows=8)
    engine = Engine(model, leaves, section=section)
    engine.runner.require(ScoreSpec(1))
    (shape,) = engine.runner.score_shapes_for(512)[-1:]
    inputs = jax.ShapeDtypeStruct((score_layout(shape).size,), jnp.int32)

    class Wide:
        """Only its hidden states and logits: `V` = 262,144."""

        def __call__(self, tokens, positions, caches, attend, *, tap=None):
            return jnp.zeros((tokens.shape[0], 8)), caches

        def logits(self, hidden):
            return hidden @ jnp.ones((8, 262_144))

    class WideModel:
        config = dataclasses.replace(model.config, vocab_size=262_144, hidden_size=8)
        axis = model.axis

        def bind(self, leaves):
            return Wide()

    run = functools.partial(score, model=WideModel(), backend=engine.runner.backend, shape=shape)
    compiled = jax.jit(run).lower((), (), inputs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100 << 20
