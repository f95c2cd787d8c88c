"""Rules, the int8 transform against numpy, and agreement of a transform with its spec."""

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
from lepton_jax.compression.quantize import Int8, quantize, quantize_spec
from lepton_jax.compression.rules import Rule, assign
from lepton_jax.tensors import ParamSpec, QTensor

SPECS = {
    "embed": ParamSpec((12, 8), jnp.float32, ("vocab", "embed"), 1),
    "layers.0.out": ParamSpec(
        (8, 2, 3, 4), jnp.float32, ("embed", "kv_heads", "group", "head_dim"), 3
    ),
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


def test_bad_patterns_are_named():
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        assign([Rule("(", 1)], SPECS)


@settings(deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(1, 3),
    st.floats(1e-20, 1e20),
    st.integers(0, 99),
)
def test_int8_error_is_at_most_half_a_step(rows, width, inner, size, seed):
    w = (np.random.default_rng(seed).normal(size=(rows, width, inner)) * size).astype(np.float32)
    q = quantize(jnp.asarray(w), 2, Int8())
    scale = np.asarray(q.scale, np.float64)
    assert q.values.dtype == jnp.int8 and scale.shape == (rows,)
    error = np.abs(np.asarray(q.values) * scale[:, None, None] - w).max(axis=(1, 2))
    assert np.all(error <= 0.5001 * scale)
    assert np.abs(np.asarray(q.values)).max() <= 127


def test_zero_channels_stay_zero():
    q = quantize(jnp.zeros((2, 4)), 1, Int8())
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
                == (8 if (preset, path) == ("w8a8", "layers.0.out") else 16)
            )
            pairs = [(leaf.values, told.values), (leaf.scale, told.scale)]
        for array, s in pairs:
            assert (array.shape, array.dtype) == (s.shape, s.dtype)
            assert len(s.axes) == len(s.shape)


def test_spec_of_scales_keeps_the_output_axes():
    told = quantize_spec(SPECS["layers.0.out"], Int8(8))
    assert told.scale.axes == ("embed",) and told.values.inputs == 3


def test_unknown_preset_and_bits_are_refused():
    with pytest.raises(ValueError, match="'int5' is unknown: allowed are none, int8, w8a8"):
        preset_rules("int5")
    with pytest.raises(ValueError, match="act_bits=4: allowed are 8"):
        Int8(act_bits=4)
