"""The engine on several devices: the tokens, log-probabilities and hidden states of one device, and
programs in which the devices tell each other no more than they must.
"""

import dataclasses
import math
import re

import checkpoint_makers as make
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_reference import tiny

from lepton_jax.checkpoints.errors import CheckpointError
from lepton_jax.checkpoints.load import load
from lepton_jax.checkpoints.orbax_store import save
from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine.knobs import longest_draft
from lepton_jax.engine.loop import Engine
from lepton_jax.engine.packing import DecodeShape, PrefillShape
from lepton_jax.engine.scored import Scoring
from lepton_jax.models.build import abstract_model
from lepton_jax.sharding import Placement

LAYERS = 2
MODEL, LEAVES = tiny("gemma3", layers=LAYERS)
VOCAB, HIDDEN = MODEL.config.vocab_size, MODEL.config.hidden_size
SECTION = EngineSection(
    rows=4, page_size=4, num_pages=36, prefill_chunk=32, decode_block=4, max_len=96
)


def ids(count, seed):
    return np.random.default_rng(seed).integers(3, VOCAB, count).tolist()


def params(**fields):
    return SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **fields})


LONG = ids(50, 1)
REQUESTS = {
    "greedy": (ids(5, 2), params(max_tokens=30)),
    "long": (LONG, params(logprobs=3)),
    "begins as long": (LONG[:30] + ids(9, 3), params(temperature=1.2, seed=3)),
    "nucleus": (ids(3, 5), params(temperature=1.1, top_k=30, top_p=0.8, min_p=0.01, seed=5)),
    "penalties": (
        LONG[:20],
        params(repetition_penalty=1.4, presence_penalty=0.6, frequency_penalty=0.5),
    ),
    "bias": (ids(6, 6), params(logit_bias={7: 0.6, 70: 0.5}, logprobs=2, temperature=0.7, seed=1)),
    "no end yet": (ids(4, 10), params(logit_bias={2: 3.0}, ignore_eos=False, min_tokens=5)),
}


def served(engine):
    """Tokens and log-probabilities by request."""
    for name, request in REQUESTS.items():
        engine.add_request(name, *request)
    answers = {name: ([], []) for name in REQUESTS}
    while engine.has_work:
        for output in engine.step():
            tokens, logprobs = answers[output.request_id]
            tokens.extend(output.token_ids)
            logprobs.extend(output.logprobs or ())
    return answers


def scored(engine):
    """One text scored and pooled, in several chunks, after all layers and after one."""
    targets = tuple((i, (i + 1) % VOCAB) for i in LONG[1:])
    engine.add_scoring("text", LONG[:-1], Scoring(targets, pool="mean"))
    engine.add_scoring("inner", LONG[:-1], Scoring(pool="mean", layer=1))
    found = {o.request_id: o.scored for o in _until_idle(engine) if o.scored is not None}
    return found["text"], found["inner"]


def _until_idle(engine):
    while engine.has_work:
        yield from engine.step()


@pytest.fixture(scope="module")
def alone():
    engine = Engine(MODEL, LEAVES, section=SECTION, eos_ids=(2,))
    return served(engine), scored(engine)


def last(count):
    """An engine on the last devices of the eight, not the first."""
    return Engine(MODEL, LEAVES, section=SECTION, eos_ids=(2,), devices=jax.devices()[8 - count :])


@pytest.fixture(scope="module")
def pair():
    return last(2)


def same_answers(engine, alone):
    for name, (tokens, logprobs) in served(engine).items():
        want, want_logprobs = alone[0][name]
        assert (name, tokens) == (name, want)
        for (own, top), (want_own, want_top) in zip(logprobs, want_logprobs, strict=True):
            assert own == pytest.approx(want_own, abs=1e-5)
            assert [i for i, _ in top] == [i for i, _ in want_top]
            assert [p for _, p in top] == pytest.approx([p for _, p in want_top], abs=1e-5)
    for leaf in jax.tree.leaves((engine.runner.leaves, engine.runner._caches)):
        assert leaf.sharding.device_set == set(engine.runner.placement.devices)


def test_two_devices_answer_as_one_does(alone, pair):
    same_answers(pair, alone)
    assert pair.runner.placement.devices == tuple(jax.devices()[6:])


def test_two_banks_of_two_answer_and_score_as_one_device_does(alone):
    engine = last(4)
    same_answers(engine, alone)
    assert engine.runner.placement.devices == tuple(jax.devices()[4:])
    (got, inner), (want, want_inner) = scored(engine), alone[1]
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
    np.testing.assert_array_equal(got.greedy, want.greedy)
    np.testing.assert_allclose(got.pooled, want.pooled, atol=1e-5)
    np.testing.assert_allclose(inner.pooled, want_inner.pooled, atol=1e-5)


def test_compressed_and_speculating():
    model, dense = tiny("llama", layers=1)
    compress = compressor(preset_rules("int8"), model.specs)
    pairs = zip(model.specs.items(), dense, strict=True)
    leaves = [compress(path, spec, leaf) for (path, spec), leaf in pairs]
    section = EngineSection(**vars(SECTION) | dict(kv_dtype="int8", rows=2))
    section = dataclasses.replace(section, speculation="lookup", draft_tokens=3)
    answers = []
    for count in (1, 2):
        engine = Engine(model, leaves, section=section, devices=jax.devices()[:count])
        engine.scheduler.draft_policy = longest_draft
        engine.add_request("a", [5, 6, 7] * 6, params(max_tokens=24))
        answers.append([i for output in _until_idle(engine) for i in output.token_ids])
        assert engine.stats()["accepted_tokens"] > 0
    assert answers[0] == answers[1]


def test_a_draft_model_is_cut_by_its_own_heads():
    config = dataclasses.replace(MODEL.config, num_heads=6)  # 3 for each kv head, not 2
    draft = abstract_model(config, jnp.float32, jnp.float32)
    leaves = tuple(jnp.zeros(spec.shape, spec.dtype) for spec in draft.specs.values())
    section = dataclasses.replace(SECTION, speculation="draft")
    engine = Engine(MODEL, LEAVES, section=section, devices=jax.devices()[:2])
    engine.draft_with(draft, leaves)
    held = dict(zip(draft.specs, engine.runner._draft_leaves, strict=True))
    (_, width), *others = {s.data.shape for s in held["layers.0.out"].addressable_shards}
    assert (width, others) == (3 * config.head_dim, [])


def collectives(text):
    """(operation, elements of its result) of a compiled module."""
    found = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (all-\w+|collective-\w+|reduce-scatter)\(", text)
    return [(what, math.prod(int(n) for n in dims.split(",") if n)) for dims, what in found]


def test_devices_tell_each_other_no_more_than_they_must():
    engine = Engine(MODEL, LEAVES, section=SECTION, devices=jax.devices()[:2])
    engine.add_request("greedy", ids(5, 2), params())
    list(_until_idle(engine))
    kinds = set()
    for shape, program in engine.runner.programs.compiled.items():
        kinds.add(type(shape))
        found = collectives(program.as_text())
        # Two in the loop over layers; one for the embedding, the best logit and its first id.
        assert engine.runner.model.runs == (LAYERS,)
        assert [what for what, _ in found] == ["all-reduce"] * (2 + 3)
        tokens = shape.tokens if isinstance(shape, PrefillShape) else shape.rows
        sizes = sorted(size for _, size in found)
        assert sizes == [shape.rows] * 2 + [tokens * HIDDEN] * (2 + 1)
    assert kinds == {PrefillShape, DecodeShape}


def test_candidates_travel_and_logits_do_not(pair):
    pair.add_request("drawn", *REQUESTS["nucleus"])
    list(_until_idle(pair))
    for shape, program in pair.runner.programs.compiled.items():
        assert shape.spec.truncate
        gathered = [size for what, size in collectives(program.as_text()) if what == "all-gather"]
        # The best candidates of each device, and every device's total.
        assert gathered and max(gathered) <= shape.rows * 2 * 64


def test_a_device_gets_its_part_of_a_weight_and_no_more(tmp_path, monkeypatch):
    sent, send = [], jax.device_put

    def spy(x, device=None, **options):
        sent.append(sum(np.asarray(a).nbytes for a in jax.tree.leaves(x)))
        return send(x, device, **options)

    folder = make.hf_folder(tmp_path)
    whole = load(folder)
    monkeypatch.setattr(jax, "device_put", spy)
    shared = load(folder, devices=jax.devices()[:2])
    largest = max(leaf.nbytes for leaf in whole.leaves)
    assert max(sent) <= largest // 2
    for spec, leaf, parts in zip(
        shared.model.specs.values(), whole.leaves, shared.leaves, strict=True
    ):
        cut = {"kv_heads", "heads", "ffn", "vocab"} & set(spec.axes)
        for shard in parts.addressable_shards:
            assert shard.data.nbytes == leaf.nbytes // (2 if cut else 1)
    engine = Engine(shared.model, shared.leaves, section=SECTION)  # where the leaves are
    assert engine.runner.placement.devices == tuple(jax.devices()[:2])


def test_compressed_as_it_arrives_and_moved_to_other_devices(tmp_path):
    folder, devices = make.hf_folder(tmp_path), jax.devices()
    specs = load(folder).model.specs
    shared = load(folder, compress=compressor(preset_rules("w8a8"), specs), devices=devices[:2])
    placement = Placement(devices[4:6], shared.model.heads)
    moved = placement.put_all(specs, shared.leaves)
    for before, after in zip(jax.tree.leaves(shared.leaves), jax.tree.leaves(moved), strict=True):
        assert after.sharding.device_set == set(devices[4:6])
        np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
    for count in (1, 4):
        elsewhere = Placement(devices[:count], shared.model.heads)
        with pytest.raises(ValueError, match=f"parts on 2 devices can't be moved to {count}"):
            elsewhere.put_all(specs, shared.leaves)
    with pytest.raises(CheckpointError, match=r"^embed lies in parts on 2 devices.*mesh.model=1"):
        save(tmp_path / "saved", shared)
    assert not (tmp_path / "saved").exists()
