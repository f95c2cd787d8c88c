"""Whole models on several devices: the logits of transformers for every family, and of one device
for every storage type. Tiny models, one program each.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lepton_jax.compression.leaf import compress_weight
from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.compression.rules import weights_of
from lepton_jax.compression.scheme import Scheme
from lepton_jax.models.build import abstract_model
from lepton_jax.sharding import Placement, grid_of
from lepton_jax.sharding.placement import CUT_SPEC, WHOLE_SPEC, specs_of

SPARSE = dict(prune="magnitude", storage="sparse")
SCHEMES = {
    "n_of_m": Scheme("keep", pattern="2:4", **SPARSE),
    "bitmask": Scheme("int8", sparsity=0.5, **SPARSE),
    "tiles": Scheme("keep", sparsity=0.5, pattern="4x8", **SPARSE),
    "int4_g16": Scheme("int4", group=16, asymmetric=True),
}


def logits_on(count, model, leaves, ids, *, expert=1):
    """Logits `[T, V]` of leaves in the order of the specs, on `count` devices."""
    placement = Placement(grid_of(jax.devices()[:count], expert), model.heads)
    placed = placement.put_all(model.specs, leaves)
    shared = model.on(placement.axis)

    def step(leaves, ids):
        return tiny_models.forward(shared, leaves, ids)

    program = placement.program(step, (specs_of(placed), WHOLE_SPEC), CUT_SPEC)
    shares = np.split(np.asarray(program(placed, jnp.asarray(ids))), count)
    vocab = model.config.vocab_size
    logits = np.concatenate(shares, axis=-1)
    assert np.isneginf(logits[:, vocab:]).all()
    return logits[:, :vocab]


def model_of(case):
    fixture = tiny_models.load(case)
    model = abstract_model(fixture.config, jnp.float32, jnp.float32)
    return fixture, model, tiny_models.in_order(model, fixture.leaves)


VARIANTS = ("llama_", "phi3_long", "gemma3_multimodal")  # of positions or names: nothing is cut
CASES = [case for case in tiny_models.CASES if not case.startswith(VARIANTS)] + ["llama_bias"]


# Three devices divide nothing here: kv heads, ffn or vocabulary are padded. Four make two banks.
@pytest.mark.parametrize(("case", "count"), [(c, 2 + i % 3) for i, c in enumerate(CASES)])
def test_logits_of_transformers_from_several_devices(case, count):
    fixture, model, leaves = model_of(case)
    logits = logits_on(count, model, leaves, fixture.ids)
    np.testing.assert_allclose(logits, fixture.expected, atol=2e-4)


# Each device a whole expert; half of the experts on two devices each; five experts.
@pytest.mark.parametrize(
    ("case", "count", "expert"), [("mixtral", 4, 4), ("mixtral", 4, 2), ("qwen3_moe", 5, 5)]
)
def test_logits_of_transformers_with_experts_spread(case, count, expert):
    fixture, model, leaves = model_of(case)
    logits = logits_on(count, model, leaves, fixture.ids, expert=expert)
    np.testing.assert_allclose(logits, fixture.expected, atol=2e-4)


@functools.cache
def drawn(case):
    """A model of one layer whose ffn every storage type can halve, its leaves and token ids."""
    config = dataclasses.replace(
        tiny_models.load(case).config,
        ffn_size=64,
        num_layers=1,
        layer_windows=(0,),
        layer_ropes=(0,),
    )
    model, rng = abstract_model(config, jnp.float32, jnp.float32), np.random.default_rng(3)
    leaves = [rng.normal(size=s.shape).astype(np.float32) * 0.2 for s in model.specs.values()]
    return model, [jnp.asarray(leaf) for leaf in leaves], rng.integers(0, config.vocab_size, 24)


@functools.cache
def compressed_on_one(name, case):
    """Leaves of a drawn model and one device's logits from them."""
    model, dense, ids = drawn(case)
    leaves = compressed(name, model, dense)
    return leaves, logits_on(1, model, leaves, ids)


def compressed(name, model, dense):
    """Leaves in the order of the specs, by a preset, or by a scheme for all weights or for those of
    experts where there are any.
    """
    pairs = zip(model.specs.items(), dense, strict=True)
    if name in SCHEMES:
        weights = weights_of(model.specs)
        weights = [path for path in weights if "experts_" in path] or weights
        return [compress_weight(a, SCHEMES[name]) if p in weights else a for (p, _), a in pairs]
    compress = compressor(preset_rules(name), model.specs)
    return [compress(path, spec, leaf) for (path, spec), leaf in pairs]


@pytest.mark.parametrize("name", [*SCHEMES, "int8", "w8a8", "fp8"])
def test_logits_of_one_device_from_compressed_leaves(name):
    case = "mixtral" if name == "int8" else "llama"
    model, dense, ids = drawn(case)
    leaves, one = compressed_on_one(name, case)
    two = logits_on(2, model, leaves, ids)
    if name in ("w8a8", "fp8"):
        # Activations of 8 bits are scaled by what a device has of a row: other rounding, no worse.
        exact = logits_on(1, model, dense, ids)
        assert np.std(one - two) < np.std(one - exact)
        assert np.std(two - exact) < 1.1 * np.std(one - exact)
    else:
        assert np.abs(one - two).max() < (0.03 if name == "int4_g16" else 2e-3) * one.std()


@pytest.mark.parametrize(
    ("name", "count"), [("int8", 4), ("int4_g16", 4), ("bitmask", 4), ("tiles", 2)]
)
def test_logits_of_one_device_with_compressed_experts_spread(name, count):
    model, _, ids = drawn("mixtral")
    leaves, one = compressed_on_one(name, "mixtral")
    shared = logits_on(count, model, leaves, ids, expert=2)
    assert np.abs(one - shared).max() < (0.03 if name == "int4_g16" else 2e-3) * one.std()
