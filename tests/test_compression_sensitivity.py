"""Measured sensitivities against the KL that compressing one weight alone really makes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from engine_reference import tiny
from first_layers import first_layers

from lepton_jax.checkpoints.load import load
from lepton_jax.compression.allocate import allocate
from lepton_jax.compression.automatic import choose
from lepton_jax.compression.calibration_data import CALIBRATION_TEXT, HELD_OUT_TEXT, draw_windows
from lepton_jax.compression.leaf import compress_weight
from lepton_jax.compression.recipe import Recipe, scheme_text
from lepton_jax.compression.rules import weights_of
from lepton_jax.compression.scheme import Scheme
from lepton_jax.compression.sensitivity import measure_sensitivity
from lepton_jax.config import CompressionSection
from lepton_jax.text import load as load_tokenizer

SCHEMES = (Scheme(), Scheme("int4", group=8))


def true_kl(logits, leaves, tokens, schemes):
    """Of the weights with these schemes, by whole forwards over the windows; nats a token."""
    other = dict(leaves)
    for path, scheme in schemes.items():
        other[path] = compress_weight(leaves[path], scheme).dense(jnp.float32)
    p, q = (jax.nn.log_softmax(logits(tuple(x.values()), tokens)) for x in (leaves, other))
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)))


def forward(model):
    """Logits `[windows, T, V]` of leaves and tokens."""

    def logits(leaves, tokens):
        return jax.lax.map(functools.partial(tiny_models.forward, model, leaves), tokens)

    return jax.jit(logits)


@functools.cache
def measured(case):
    """A model of two layers, of Gemma 2 with and without a window; its leaves by path, tokens, and
    what is found.
    """
    model, leaves = tiny(case, layers=2)
    assert len(set(model.config.layer_windows)) == (2 if case == "gemma2" else 1)
    leaves = dict(zip(model.specs, leaves, strict=True))
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (12, 24))
    tokens, seen = tokens.astype(np.int32), []
    found = measure_sensitivity(
        model, leaves, tokens, SCHEMES, draws=64, progress=lambda *at: seen.append(at)
    )
    assert seen == [(1, 3, "layers.1"), (2, 3, "layers.0"), (3, 3, "embed")]
    return model, leaves, tokens, found


@pytest.mark.parametrize("case", ["gemma2", "qwen3_moe"])
def test_predicted_kl_is_the_true_one_of_every_weight(case):
    model, leaves, tokens, found = measured(case)
    logits = forward(model)
    assert list(found.paths) == weights_of(model.specs)
    for row, path in enumerate(found.paths):
        if model.config.num_experts and not path.startswith(("layers.1.", "head")):
            continue  # what makes the routers of later layers choose otherwise has no gradient
        for column, scheme in enumerate(SCHEMES):
            leaf = compress_weight(leaves[path], scheme)
            assert found.bytes[row, column] == sum(a.nbytes for a in jax.tree.leaves(leaf))
            true = true_kl(logits, leaves, tokens, {path: scheme})
            error = 0.4 * true + 1e-7  # beneath are the roundings of float32
            assert found.kl[row, column] == pytest.approx(true, abs=error), (path, scheme)
    assert (found.kl[:, 1] > found.kl[:, 0]).all()


def test_a_scheme_that_does_not_fit_names_the_weight():
    model, leaves = tiny("llama", layers=2)
    leaves = dict(zip(model.specs, leaves, strict=True))
    tokens = np.full((1, 8), 5, np.int32)
    scheme = Scheme(weights="keep", prune="magnitude", pattern="192x32", sparsity=0.5)
    with pytest.raises(ValueError, match=r"^embed: .*192x32"):
        measure_sensitivity(model, leaves, tokens, (scheme,))


def test_a_budget_in_kl_is_met_with_the_fewest_bytes():
    (model, leaves, tokens, known), sizes = measured("gemma2"), []
    least, most = known.kl.min(1).sum(), known.kl.max(1).sum()
    for budget in (least, (least * most) ** 0.5, most):
        section = CompressionSection(auto_kl=budget, candidates=tuple(map(scheme_text, SCHEMES)))
        automatic = dataclasses.replace(Recipe.from_config(section).automatic, known=known)
        found = choose(model, leaves, tokens, automatic, dense=model)
        assert found.kl <= budget * (1 + 1e-9)
        sizes.append(found.bytes)
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.slow
def test_of_a_real_model(smollm2_path):
    """Predictions are near the truth, and what is made of them beats one scheme for all: of six
    layers, which show both.
    """
    loaded = first_layers(load(smollm2_path, dtype="float32"), 6)
    model, leaves = loaded.model, dict(zip(loaded.model.specs, loaded.leaves, strict=True))
    tokenizer = load_tokenizer(loaded.tokenizer_source)
    seen, held_out = (
        draw_windows(text, tokenizer, windows=8, length=64).tokens
        for text in (CALIBRATION_TEXT, HELD_OUT_TEXT)
    )
    schemes = (Scheme(), Scheme("int4", group=32), Scheme("int4", group=128))
    found, logits = measure_sensitivity(model, leaves, seen, schemes, draws=4), forward(model)
    for path in ("embed", "layers.0.down", "layers.5.out"):
        true = true_kl(logits, leaves, seen, {path: schemes[2]})
        assert found.kl[found.paths.index(path), 2] == pytest.approx(true, rel=0.7), path
    uniform = dict.fromkeys(found.paths, schemes[1])
    chosen = allocate(found.kl, found.bytes, most_bytes=found.bytes[:, 1].sum())
    mixed = {path: schemes[index] for path, index in zip(found.paths, chosen, strict=True)}
    assert len(set(chosen)) == 3
    losses = [true_kl(logits, leaves, held_out, each) for each in (mixed, uniform)]
    print(f"int4 in groups of 32: KL {losses[1]:.3f}; mixed, in the same bytes: {losses[0]:.3f}")
    assert losses[0] < losses[1]
