"""Rules, the int8 transform against numpy, and agreement of a transform with its spec."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax.compression.presets import (
    PRESETS,
    compress_specs,
    compressor,
    preset_rules,
)
from lepton_jax.compression.quantize import quantize
from lepton_jax.compression.rules import Rule, assign
from lepton_jax.compression.scheme import Scheme
from lepton_jax.tensors import ParamSpec, QTensor

SPECS = {
    "embed": ParamSpec((12, 8), jnp.float32, ("vocab", "embed"), 1),
    "layers.0.out": ParamSpec((8, 24), jnp.float32, ("embed", "heads"), 1),
    "layers.0.router": ParamSpec((4, 8), jnp.float32, ("experts", "embed"), 1),
    "final_norm": ParamSpec((8,), jnp.float32, ("embed",)),
}


def test_first_matching_rule_wins_and_whole_paths_are_matched():
    rules = [Rule(r"layers\.0\..*", "first"), Rule(r"layers\..*", "second")]
    paths = ["layers.0.qkv", "layers.1.qkv", "not.layers.1.qkv"]
    assert assign(rules, paths) == {"layers.0.qkv": "first", "layers.1.qkv": "second"}


def test_unused_rules_are_errors():
    with pytest.raises(ValueError, match=r"match no parameter.*layers.*9"):
        assign([Rule("embed", 1), Rule(r"layers\.9\..*", 2)], SPECS)
    with pytest.raises(ValueError, match="earlier rule"):
        assign([Rule(".*", 1), Rule("embed", 2)], SPECS)
    with pytest.raises(ValueError, match=r"earlier rule took\): \['embed'\]"):
        assign([Rule("embed", 1), Rule("embed", 2)], SPECS)


def test_bad_patterns_are_named():
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        assign([Rule("(", 1)], SPECS)


@settings(deadline=None)
@given(
    st.sampled_from([(1, 1), (1, 7), (5, 1), (3, 4)]),
    st.floats(1e-20, 1e20),
    st.integers(0, 99),
)
def test_int8_error_is_at_most_half_a_step(shape, size, seed):
    w = (np.random.default_rng(seed).normal(size=shape) * size).astype(np.float32)
    q = quantize(jnp.asarray(w), Scheme())
    scale = np.asarray(q.scale, np.float64)
    assert q.values.dtype == jnp.int8 and scale.shape == shape[:1]
    error = np.abs(np.asarray(q.values) * scale[:, None] - w).max(axis=1)
    assert np.all(error <= 0.5001 * scale)
    assert np.abs(np.asarray(q.values)).max() <= 127


def test_zero_channels_stay_zero():
    q = quantize(jnp.zeros((2, 4)), Scheme())
    assert np.all(np.asarray(q.values) == 0) and np.all(np.isfinite(np.asarray(q.scale)))


@pytest.mark.parametrize("preset", PRESETS)
def test_specs_tell_what_the_transform_makes(preset):
    rules = preset_rules(preset)
    compress, specs = compressor(rules, SPECS), compress_specs(rules, SPECS)
    for path, spec in SPECS.items():
        leaf, told = compress(path, spec, jnp.ones(spec.shape, spec.dtype)), specs[path]
        assert isinstance(leaf, QTensor) == isinstance(told, QTensor)
        assert isinstance(leaf, QTensor) == (preset != "none" and path in ("embed", "layers.0.out"))
        pairs = [(leaf, told)]
        if isinstance(leaf, QTensor):
            assert (
                leaf.act_bits
                == told.act_bits
                == (8 if preset in ("w8a8", "fp8") and path == "layers.0.out" else 16)
            )
            pairs = [(leaf.values, told.values), (leaf.scale, told.scale)]
        for array, s in pairs:
            assert (array.shape, array.dtype) == (s.shape, s.dtype)
            assert len(s.axes) == len(s.shape)


def test_spec_of_scales_keeps_the_output_axes():
    told = Scheme(activations="dynamic").plan(SPECS["layers.0.out"])
    assert told.scale.axes == ("embed",) and told.values.inputs == 1


SCHEMES = [
    Scheme(),
    Scheme(rounding="mse"),
    Scheme(group=8),
    Scheme("int4", group=8),
    Scheme("int4", group=8, asymmetric=True),
    Scheme("int4", group=8, rounding="mse"),
    Scheme("int4", group=8, asymmetric=True, rounding="mse"),
    Scheme("float8"),
    Scheme("float8", activations="dynamic"),
]
STEPS = {"int8": 1 / 127, "int4": 1 / 7, "float8": 1 / 14}  # of the largest magnitude, at most


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_quantized_weights_are_planned_and_near(scheme):
    spec = SPECS["layers.0.out"]
    w = np.random.default_rng(0).normal(size=spec.shape).astype(np.float32)
    leaf, plan = quantize(jnp.asarray(w), scheme), scheme.plan(spec)
    assert jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), leaf) == plan.abstract()
    assert leaf.nbytes == plan.nbytes
    error = np.abs(np.asarray(leaf.dense(jnp.float32)) - w)
    if scheme.rounding == "nearest":
        assert error.max() <= 0.52 * STEPS[scheme.weights] * np.abs(w).max()
    assert error.max() > 0


@pytest.mark.parametrize("asymmetric", [False, True])
def test_least_squares_ranges_beat_full_ranges(asymmetric):
    w = jnp.asarray(np.random.default_rng(1).standard_t(4, size=(64, 128)), jnp.float32)
    nearest = Scheme("int4", group=32, asymmetric=asymmetric)

    def squares(scheme):
        return float(jnp.sum((quantize(w, scheme).dense(jnp.float32) - w) ** 2))

    assert squares(dataclasses.replace(nearest, rounding="mse")) < 0.96 * squares(nearest)


def test_groups_are_the_largest_even_divisors():
    scheme = Scheme("int4", group=128)
    assert [scheme.group_of(n) for n in (576, 1536, 640, 128, 96)] == [96, 128, 128, 128, 96]
    with pytest.raises(ValueError, match="no even group up to 128 divides 577"):
        scheme.group_of(577)


MAGNITUDE = dict(prune="magnitude", sparsity=0.5)


def test_a_pattern_says_what_it_keeps():
    scheme = Scheme(prune="magnitude", pattern="2:4")
    assert (scheme.n_of_m, scheme.tile) == ((2, 4), None)
    scheme = Scheme(**MAGNITUDE, pattern="192x32")
    assert (scheme.n_of_m, scheme.tile, scheme.kept_of(18)) == (None, (192, 32), 9)
    kept = {p: Scheme(prune=p, sparsity=0.1, storage="sparse") for p in ("magnitude", "wanda")}
    spec = ParamSpec((3, 16), jnp.float32, ("a", "embed"), 1)
    assert {p: s.plan(spec).values.shape for p, s in kept.items()} == {
        "magnitude": (48 - 5,),
        "wanda": (3 * (16 - 2),),
    }
    assert not kept["magnitude"].calibrated and kept["wanda"].calibrated


def test_unknown_presets_and_schemes_that_can_not_be_are_refused():
    with pytest.raises(ValueError, match="'int5' is unknown: .* none, int8, w8a8, int8_g32, int4"):
        preset_rules("int5")
    for fields, message in (
        (dict(weights="int3"), "weights='int3': allowed are int8, int4, float8"),
        (dict(activations="int8"), "activations='int8': allowed are float, dynamic, static"),
        (dict(rounding="up"), "rounding='up': allowed are nearest, mse, gptq"),
        (dict(weights="int4"), "int4 needs a group"),
        (dict(asymmetric=True), "asymmetric needs a group"),
        (dict(activations="dynamic", group=8), "needs group=0"),
        (dict(activations="static", weights="float8"), "static activations need int8"),
        (dict(weights="keep", group=8), "keep' quantizes nothing"),
        (dict(sparsity=0.5), "without a method: set prune to one of magnitude"),
        (dict(storage="sparse"), "without a method"),
        (MAGNITUDE | dict(sparsity=1.0), "sparsity=1.0: want the share"),
        (MAGNITUDE | dict(sparsity=0.0), "sparsity=0.0: want the share"),
        (MAGNITUDE | dict(pattern="4:4"), "pattern='4:4': want 0 < N < M <= 16"),
        (MAGNITUDE | dict(pattern="2:4", sparsity=0.3), "which is 0.5: leave sparsity out"),
        (MAGNITUDE | dict(pattern="rows"), "pattern='rows': allowed are unstructured, N:M"),
        (MAGNITUDE | dict(pattern="0x8"), "pattern='0x8': allowed"),
        (MAGNITUDE | dict(prune="sparsegpt", pattern="8x8"), "want unstructured or N:M"),
        (MAGNITUDE | dict(asymmetric=True, group=8), "may hold no 0"),
        (MAGNITUDE | dict(weights="float8", storage="sparse"), "want int8 or keep"),
        (MAGNITUDE | dict(activations="dynamic", storage="sparse"), "want int8 or keep"),
    ):
        with pytest.raises(ValueError, match=message):
            Scheme(**fields)
