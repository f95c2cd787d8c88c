"""Every family and RoPE kind gives transformers' logits on tiny random models, in float32."""

import dataclasses

import numpy as np
import pytest
import tiny_models

from lepton_jax.models.config import NO_ROPE, RopeConfig

TOLERANCE = 2e-4
# A feature that is taken out must change the logits by at least this: 50 times the tolerance.
POWER = 1e-2


@pytest.fixture(scope="module")
def loaded():
    """Fixtures by case, each loaded once."""
    cache = {}

    def load(case):
        if case not in cache:
            cache[case] = tiny_models.load(case)
        return cache[case]

    return load


@pytest.mark.parametrize("case", sorted(tiny_models.CASES))
def test_logits_match_transformers(loaded, case):
    tiny = loaded(case)
    assert tiny.expected.std() > 0.5, "fixture without power"
    found = tiny_models.run(tiny.config, tiny.leaves, tiny.ids)
    np.testing.assert_allclose(found, tiny.expected, rtol=0, atol=TOLERANCE)


def plain_ropes(config):
    """The ropes without their scaling."""
    return tuple(RopeConfig(rope.theta, rope.dim) for rope in config.ropes)


WITHOUT = {
    "window": lambda c: {"layer_windows": (0,) * c.num_layers},
    "window_off_by_one": lambda c: {"layer_windows": tuple(w and w + 1 for w in c.layer_windows)},
    "alternation": lambda c: {"layer_windows": c.layer_windows[1:] + c.layer_windows[:1]},
    "rope_scaling": lambda c: {"ropes": plain_ropes(c)},
    "attention_factor": lambda c: {
        "ropes": tuple(dataclasses.replace(rope, attention_factor=1.0) for rope in c.ropes)
    },
    "long_factors": lambda c: {"context_len": 0},
    "partial_rotation": lambda c: {"ropes": (RopeConfig(c.ropes[0].theta, c.head_dim),)},
    "no_rope_layers": lambda c: {"layer_ropes": (0,) * c.num_layers},
    "all_rope": lambda c: {"layer_ropes": (NO_ROPE,) * c.num_layers},
    "local_rope": lambda c: {"layer_ropes": (0,) * c.num_layers},
    "qk_norm": lambda c: {"qk_norm": False},
    "post_norms": lambda c: {"post_norms": False},
    "attn_soft_cap": lambda c: {"attn_soft_cap": 0.0},
    "final_soft_cap": lambda c: {"final_soft_cap": 0.0},
    "attn_scale": lambda c: {"attn_scale": c.head_dim**-0.5},
    "embed_scale": lambda c: {"embed_scale": 1.0},
    "qkv_bias": lambda c: {"qkv_bias": False},
    "out_bias": lambda c: {"out_bias": False},
    "ffn_bias": lambda c: {"ffn_bias": False},
    "activation": lambda c: {"activation": "silu" if c.activation != "silu" else "gelu_tanh"},
    "expert_weights": lambda c: {"norm_expert_weights": not c.norm_expert_weights},
    "one_expert": lambda c: {"experts_per_token": 1},
}
FEATURES = {
    "llama": ("all_rope", "activation"),
    "llama_bias": ("qkv_bias", "out_bias", "ffn_bias"),
    "llama_linear": ("rope_scaling",),
    "llama_dynamic": ("rope_scaling",),
    "llama_llama3": ("rope_scaling",),
    "llama_yarn": ("rope_scaling", "attention_factor"),
    "llama_yarn_mscale": ("rope_scaling", "attention_factor"),
    "llama_longrope": ("rope_scaling", "attention_factor", "long_factors"),
    "smollm3": ("no_rope_layers", "window", "window_off_by_one", "alternation"),
    "mistral": ("window", "window_off_by_one"),
    "mixtral": ("expert_weights", "one_expert"),
    "qwen2": ("qkv_bias", "window", "alternation"),
    "qwen3": ("qk_norm",),
    "qwen3_moe": ("qk_norm", "expert_weights", "one_expert"),
    "gemma2": (
        *("window", "alternation", "attn_soft_cap", "final_soft_cap", "attn_scale"),
        *("post_norms", "embed_scale", "activation"),
    ),
    "gemma3": ("window", "alternation", "local_rope", "rope_scaling", "qk_norm", "attn_scale"),
    "phi3": ("window", "partial_rotation", "rope_scaling", "attention_factor"),
    "phi3_long": ("long_factors", "attention_factor"),
}


@pytest.mark.parametrize(
    ("case", "feature"), [(case, f) for case, features in FEATURES.items() for f in features]
)
def test_a_missing_feature_would_show(loaded, case, feature):
    tiny = loaded(case)
    changes = WITHOUT[feature](tiny.config)
    assert any(getattr(tiny.config, name) != value for name, value in changes.items())
    found = tiny_models.run(dataclasses.replace(tiny.config, **changes), tiny.leaves, tiny.ids)
    assert np.abs(found - tiny.expected).max() > POWER
