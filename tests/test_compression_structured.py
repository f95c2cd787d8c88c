"""Structured pruning on tiny models of several families: exact where what goes is nothing, scores
against slow numpy, and what is refused.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lepton_jax.compression.blocks import block_energies, inputs_of, largest, refit
from lepton_jax.compression.layer_programs import LayerPrograms, embedded
from lepton_jax.compression.structure import Structure, planned_model
from lepton_jax.compression.structured import prune_structure
from lepton_jax.config import CompressionSection


@pytest.fixture(scope="module")
def tiny():
    return tiny_models.with_tokens


def logits(model, leaves, ids):
    return np.asarray(tiny_models.forward(model, tuple(leaves.values()), jnp.asarray(ids)))


def exact(case, tiny, structure, change):
    """A model to which `change(leaves, config)` was done, pruned: what was kept, once its logits
    are found to be those of the whole.
    """
    model, leaves, tokens = tiny(case)
    leaves = {path: np.array(leaf) for path, leaf in leaves.items()}
    change(leaves, model.config)
    leaves = {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
    smaller, kept, told = prune_structure(model, leaves, tokens, structure)
    assert list(kept) == list(smaller.specs)
    assert all(kept[path].shape == spec.shape for path, spec in smaller.specs.items())
    assert sum(s.size for s in smaller.specs.values()) < sum(s.size for s in model.specs.values())
    ids = tokens[0]
    np.testing.assert_allclose(
        logits(smaller, kept, ids), logits(model, leaves, ids), rtol=1e-4, atol=1e-4
    )
    return told


@pytest.mark.parametrize("case", ["gemma3", "llama_bias", "llama_longrope"])
def test_layers_that_add_nothing_go(case, tiny):
    def change(leaves, config):
        for name in ("out", "down", "out_bias", "down_bias"):
            path = f"layers.1.{name}"
            if path in leaves:
                leaves[path][:] = 0

    told = exact(case, tiny, Structure(drop_layers=1), change)
    assert told["layers"] == [0, 2]
    assert np.argmin(told["influence"]) == 1 and abs(told["influence"][1]) < 1e-6


@pytest.mark.parametrize("case", ["gemma2", "llama_bias", "qwen2"])
def test_heads_and_channels_that_add_nothing_go(case, tiny):
    rng = np.random.default_rng(0)
    idle = {}

    def change(leaves, config):
        K, F = config.num_kv_heads, config.ffn_size
        for i in range(config.num_layers):
            heads = idle[i, "heads"] = rng.choice(K, 1, replace=False)
            channels = idle[i, "channels"] = rng.choice(F, F // 4, replace=False)
            parts = leaves[f"layers.{i}.out"].reshape(-1, K, config.group * config.head_dim)
            parts[:, heads] = 0
            leaves[f"layers.{i}.down"][:, channels] = 0

    told = exact(case, tiny, Structure(keep_ffn=0.75, keep_kv_heads=1), change)
    for i, heads in enumerate(told["kv_heads"]):
        assert heads == [1 - int(idle[i, "heads"][0])]
    assert all(error < 1e-5 for errors in told["errors"] for error in errors.values())


def test_experts_that_nobody_visits_go(tiny):
    def change(leaves, config):
        # One feature that is large in every token makes the router avoid expert 1.
        leaves["embed"][:, 0] = 10
        for i in range(config.num_layers):
            leaves[f"layers.{i}.ffn_norm"][0] = 1
            leaves[f"layers.{i}.router"][1, 0] = -50

    told = exact("mixtral", tiny, Structure(keep_experts=3), change)
    assert told["experts"] == [[0, 2, 3], [0, 2, 3]]


def test_experts_are_told_by_the_weight_that_they_get(tiny):
    model, leaves, tokens = tiny("qwen3_moe")  # whose weights are not divided by their sum
    _, _, told = prune_structure(model, leaves, tokens, Structure(keep_experts=2))
    inputs = (
        LayerPrograms(model)
        .of(0, None)
        .inputs(
            {
                name.removeprefix("layers.0."): leaf
                for name, leaf in leaves.items()
                if name.startswith("layers.0.")
            },
            embedded(model, leaves["embed"], jnp.asarray(tokens)),
            "router",
        )
    )
    router, mass = np.asarray(leaves["layers.0.router"]), np.zeros(model.config.num_experts)
    for token in np.asarray(inputs).reshape(-1, model.config.hidden_size):
        odds = np.exp(router @ token)
        for expert in np.argsort(odds)[-2:]:
            mass[expert] += odds[expert] / odds.sum()
    assert told["experts"][0] == sorted(np.argsort(mass)[-2:].tolist())


def test_all_at_once_and_with_real_losses(tiny):
    model, leaves, tokens = tiny("smollm3")
    structure = Structure(drop_layers=1, keep_ffn=0.5, keep_kv_heads=1)
    seen = []
    smaller, kept, told = prune_structure(
        model, leaves, tokens, structure, progress=lambda *at: seen.append(at)
    )
    config = smaller.config
    assert (config.num_layers, config.ffn_size, config.num_kv_heads) == (3, 28, 1)
    assert config.num_heads == model.config.group and config.head_dim == model.config.head_dim
    assert config == planned_model(structure, model).config or told["layers"] != [0, 1, 2]
    ropes = tuple(model.config.layer_ropes[i] for i in told["layers"])
    assert config.layer_ropes == ropes
    assert [at[0] for at in seen] == [1, 2, 3, 4, 1, 2, 3]
    assert np.isfinite(logits(smaller, kept, tokens[0])).all()
    errors = [errors[name] for errors in told["errors"] for name in ("out", "down")]
    assert all(0.001 < error < 1 for error in errors)


def test_least_squares_beats_leaving_out(tiny):
    model, leaves, tokens = tiny("llama")
    whole = logits(model, leaves, tokens[0])
    structure = Structure(keep_ffn=0.5)
    smaller, refitted, _ = prune_structure(model, leaves, tokens, structure)
    # so much damping that nothing is made up for
    _, plain, _ = prune_structure(model, leaves, tokens, structure, damp=1e9)
    off = [np.square(logits(smaller, kept, tokens[0]) - whole).mean() for kept in (refitted, plain)]
    assert off[0] < 0.8 * off[1]


def test_scores_and_refit_against_plain_loops():
    rng = np.random.default_rng(3)
    weight, x = rng.normal(size=(5, 12)), rng.normal(size=(40, 12)) @ rng.normal(size=(12, 12))
    hessian = jnp.asarray(x.T @ x / len(x), jnp.float32)
    scores = block_energies(jnp.asarray(weight, jnp.float32), hessian, blocks=4)
    by_hand = []
    for block in range(4):
        part = slice(3 * block, 3 * block + 3)
        by_hand.append(np.mean([np.sum((weight[:, part] @ row[part]) ** 2) for row in x]))
    np.testing.assert_allclose(scores, by_hand, rtol=1e-4)
    kept = largest(scores, 2)
    assert kept.tolist() == sorted(np.argsort(by_hand)[2:].tolist())
    inputs = inputs_of(kept, 3)
    assert inputs.tolist() == [3 * b + i for b in kept.tolist() for i in range(3)]
    found, error = refit(jnp.asarray(weight, jnp.float32), hessian, inputs, jnp.asarray(0.0))
    target = x @ weight.T
    solved = np.linalg.lstsq(x[:, inputs], target, rcond=None)[0].T
    np.testing.assert_allclose(found, solved, rtol=2e-3, atol=2e-3)
    off = np.linalg.norm(target - x[:, inputs] @ solved.T) / np.linalg.norm(target)
    assert float(error) == pytest.approx(off, rel=1e-3)


def test_equal_scores_keep_the_first():
    assert largest(jnp.asarray([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("case", "structure", "says"),
    [
        ("llama", Structure(drop_layers=3), "drop_layers=3: this model allows 0 to 2"),
        ("llama", Structure(drop_layers=-1), "drop_layers=-1"),
        ("llama", Structure(keep_kv_heads=3), "keep_kv_heads=3: this model allows 1 to 2, or 0"),
        ("llama", Structure(keep_ffn=0.0), "keep_ffn=0.0: want a share"),
        ("llama", Structure(keep_ffn=1.5), "keep_ffn=1.5: want a share"),
        ("llama", Structure(keep_experts=2), "keep_experts=2: this model has no experts"),
        ("mixtral", Structure(keep_ffn=0.5), "is 4 experts; remove whole ones"),
        ("mixtral", Structure(keep_experts=1), "keep_experts=1: this model allows 2 to 4"),
        ("mixtral", Structure(keep_experts=5), "keep_experts=5: this model allows 2 to 4"),
    ],
)
def test_what_does_not_fit_is_named(case, structure, says, tiny):
    model, leaves, tokens = tiny(case)
    with pytest.raises(ValueError, match=says):
        prune_structure(model, leaves, tokens, structure)


def test_every_field_of_a_structure_is_in_the_config():
    names = {field.name for field in dataclasses.fields(CompressionSection)}
    defaults = {f.name: f.default for f in dataclasses.fields(CompressionSection)}
    for field in dataclasses.fields(Structure):
        assert field.name in names and defaults[field.name] == field.default
    assert not Structure() and str(Structure(drop_layers=2, keep_ffn=0.5)) == (
        "drop_layers=2 keep_ffn=0.5"
    )
