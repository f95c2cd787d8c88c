"""Quality against numpy's slow way: every logit of both models, no slices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from engine_reference import tiny

from lepton_jax.compression import quality
from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.compression.quality import common_prefix, compare, estimate, reference

MODEL, LEAVES = tiny("llama", layers=2)
WINDOWS = np.random.default_rng(0).integers(3, MODEL.config.vocab_size, (6, 37)).astype(np.int32)


def compressed(preset="int8"):
    compress = compressor(preset_rules(preset), MODEL.specs)
    items = zip(MODEL.specs.items(), LEAVES, strict=True)
    return tuple(compress(path, spec, leaf) for (path, spec), leaf in items)


@jax.jit
def logits_of(leaves, ids):
    return tiny_models.forward(MODEL, leaves, ids)


def log_probs(leaves, ids):
    logits = np.asarray(logits_of(leaves, ids), np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("slice_size", [128, 36, 10])
def test_all_measures_are_those_of_whole_logits(monkeypatch, slice_size):
    monkeypatch.setattr(quality, "_SLICE", slice_size)
    other = compressed()
    found = compare(reference(MODEL, LEAVES, WINDOWS), MODEL, other, seed=1)
    rows = []
    for ids in WINDOWS:
        p, q, following = log_probs(LEAVES, ids)[:-1], log_probs(other, ids)[:-1], ids[1:]
        best, theirs = np.argsort(-p, axis=1)[:, :5], np.argsort(-q, axis=1)[:, :5]
        five = [len({*a} & {*b}) / 5 for a, b in zip(best, theirs, strict=True)]
        places = np.arange(len(following))
        rows.append(
            [
                np.mean(np.sum(np.exp(p) * (p - q), axis=1)),
                -np.mean(q[places, following]),
                -np.mean(p[places, following]),
                np.mean(best[:, 0] == theirs[:, 0]),
                np.mean(five),
            ]
        )
    kl, loss, dense_loss, top1, top5 = np.mean(rows, axis=0)
    assert found.places == 6 * 36
    assert found.kl.value == pytest.approx(kl, rel=1e-2) and kl > 1e-6
    assert found.perplexity.value == pytest.approx(np.exp(loss), rel=1e-5)
    assert found.dense_perplexity.value == pytest.approx(np.exp(dense_loss), rel=1e-5)
    assert found.perplexity_ratio.value == pytest.approx(np.exp(loss - dense_loss), rel=1e-5)
    assert found.top1.value == pytest.approx(top1, abs=5e-3) and found.top1.value < 1
    assert found.top5.value == pytest.approx(top5, abs=5e-3) and found.top5.value < 1


def test_a_model_against_itself():
    found = compare(reference(MODEL, LEAVES, WINDOWS), MODEL, LEAVES, seed=0)
    assert found.kl == (0, 0, 0) and found.perplexity_ratio == (1, 1, 1)
    assert found.top1 == found.top5 == (1, 1, 1)
    assert found.perplexity == found.dense_perplexity


def test_predictions_that_are_not_finite_are_refused():
    broken = (*LEAVES[:-1], LEAVES[-1] * jnp.nan)
    with pytest.raises(ValueError, match="not finite"):
        compare(reference(MODEL, LEAVES, WINDOWS), MODEL, broken, seed=0)


def test_nothing_but_the_head_is_kept_of_the_dense_model():
    kept = reference(MODEL, LEAVES, WINDOWS)
    assert kept.hidden.shape == (*WINDOWS.shape, MODEL.config.hidden_size)
    assert isinstance(kept.hidden, np.ndarray)
    held = [f.name for f in dataclasses.fields(kept)]
    assert held == ["model", "head", "windows", "hidden"]
    assert kept.head.shape == (MODEL.config.vocab_size, MODEL.config.hidden_size)


def test_intervals_hold_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(5)
    hits = 0
    for number in range(200):
        low, high = estimate(rng.normal(3.0, 1.0, 40), seed=number)[1:]
        hits += low <= 3.0 <= high
        assert 0.3 < high - low < 1.1
    assert 0.88 <= hits / 200 <= 0.99


def test_intervals_are_seeded_and_go_through_functions():
    values = [1.0, 2.0, 4.0]
    assert estimate(values, seed=3) == estimate(values, seed=3)
    assert estimate(values, seed=3, through=np.exp).value == pytest.approx(np.exp(7 / 3))
    assert estimate([2.0, 2.0], seed=0) == (2.0, 2.0, 2.0)


def test_common_beginnings():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2]) == 2
    assert common_prefix([5], [6]) == 0
