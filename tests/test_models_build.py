"""Specs, binding of leaves of any type, and what the decoder does with them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lepton_jax.kernels.attention_reference import causal_attend
from lepton_jax.models.build import abstract_model
from lepton_jax.models.config import RopeConfig
from lepton_jax.models.decoder import Decoder
from lepton_jax.models.rope import rope_table, rotate
from lepton_jax.tensors import ParamSpec, QTensor


def quantized(leaf, inputs):
    """Symmetric int8 with one scale per output channel."""
    flat = leaf.reshape(*leaf.shape[: leaf.ndim - inputs], -1).astype(np.float32)
    scale = np.abs(flat).max(-1) / 127
    values = np.round(flat / scale[..., None]).astype(np.int8).reshape(leaf.shape)
    return QTensor(jnp.asarray(values), jnp.asarray(scale), 16)


def forward(model, leaves, ids):
    """Logits, from a program of its own: the model is bound anew."""
    return jax.jit(lambda leaves, ids: tiny_models.forward(model, leaves, ids))(leaves, ids)


def test_specs_follow_the_config():
    config = tiny_models.read_config("llama")
    specs = abstract_model(config, jnp.bfloat16, jnp.bfloat16).specs
    K, G, H, D, F, V = 2, 2, 16, 32, 56, 72
    layer = {
        "attn_norm": ParamSpec((D,), jnp.dtype("float32"), ("embed",), 0),
        "down": ParamSpec((D, F), jnp.dtype("bfloat16"), ("embed", "ffn"), 1),
        "ffn_norm": ParamSpec((D,), jnp.dtype("float32"), ("embed",), 0),
        "gate_up": ParamSpec((2, F, D), jnp.dtype("bfloat16"), ("gate_up", "ffn", "embed"), 1),
        "out": ParamSpec((D, K * G * H), jnp.dtype("bfloat16"), ("embed", "heads"), 1),
        "qkv": ParamSpec(
            (K, G + 2, H, D), jnp.dtype("bfloat16"), ("kv_heads", "qkv", "head_dim", "embed"), 1
        ),
    }
    table = ParamSpec((V, D), jnp.dtype("bfloat16"), ("vocab", "embed"), 1)
    expected = {"embed": table}
    expected |= {f"layers.{i}.{name}": spec for i in range(3) for name, spec in layer.items()}
    expected |= {"final_norm": layer["attn_norm"], "head": table}
    assert list(specs.items()) == list(expected.items())


def test_layers_of_deep_models_stay_in_order():
    config = tiny_models.read_config("llama")
    flat = (0,) * 12
    config = dataclasses.replace(config, num_layers=12, layer_ropes=flat, layer_windows=flat)
    specs = abstract_model(config, jnp.float32, jnp.float32).specs
    assert [path for path in specs if path.endswith(".qkv")] == [
        f"layers.{i}.qkv" for i in range(12)
    ]


def test_binding_adds_nothing_to_a_program():
    tiny = tiny_models.load("gemma2")
    model = abstract_model(tiny.config, jnp.float32, jnp.float32)

    def leaves_of_bound(leaves):
        decoder = model.bind(leaves)
        assert isinstance(decoder, Decoder)
        return decoder.embed.get_value(), decoder.layers[1].qkv.get_value()

    jaxpr = jax.make_jaxpr(leaves_of_bound)(tiny_models.in_order(model, tiny.leaves))
    assert not jaxpr.eqns


def test_models_are_not_changed_by_binding():
    tiny = tiny_models.load("qwen3")
    model = abstract_model(tiny.config, jnp.float32, jnp.float32)
    leaves = tiny_models.in_order(model, tiny.leaves)
    zeros = tuple(jnp.zeros_like(leaf) for leaf in leaves)
    first = forward(model, leaves, tiny.ids)
    assert not np.any(forward(model, zeros, tiny.ids))
    again = forward(model, leaves, tiny.ids)
    np.testing.assert_array_equal(first, again)


def test_another_number_of_leaves_raises():
    model = abstract_model(tiny_models.read_config("llama"), jnp.float32, jnp.float32)
    with pytest.raises(ValueError, match="3 leaves for 21 parameters"):
        model.bind((1, 2, 3))


def test_a_longer_context_takes_the_same_leaves_and_longropes_other_factors():
    tiny = tiny_models.load("phi3_long")
    short = dataclasses.replace(tiny.config, context_len=0)
    model = abstract_model(short, jnp.float32, jnp.float32).with_context(40)
    found = forward(model, tiny_models.in_order(model, tiny.leaves), tiny.ids)
    np.testing.assert_allclose(found, tiny.expected, atol=2e-4)
    with pytest.raises(ValueError, match="129 must be 1..128"):
        model.with_context(129)


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_quantized_leaves_pass_through_inside_jit(case):
    tiny = tiny_models.load(case)
    model = abstract_model(tiny.config, jnp.float32, jnp.float32)
    dense = dict(zip(model.specs, tiny_models.in_order(model, tiny.leaves), strict=True))
    mixed = tuple(
        quantized(np.asarray(leaf), model.specs[path].inputs)
        if model.specs[path].inputs and "router" not in path
        else leaf
        for path, leaf in dense.items()
    )
    found = np.asarray(forward(model, mixed, tiny.ids))
    error = np.sqrt(np.mean((found - tiny.expected) ** 2))
    assert 1e-5 < error < 0.1 * tiny.expected.std()


def test_bfloat16_stays_bfloat16_between_blocks():
    tiny = tiny_models.load("gemma3")
    model = abstract_model(tiny.config, jnp.bfloat16, jnp.bfloat16)
    seen = []

    def attend(q, k, v, cache, **how):
        seen.extend([q.dtype, k.dtype, v.dtype])
        return causal_attend(q, k, v, cache, **how)

    @jax.jit
    def run(leaves, ids):
        decoder = model.bind(leaves)
        hidden, _ = decoder(ids, jnp.arange(ids.shape[0]), (None,) * 3, attend)
        return hidden, decoder.logits(hidden)

    hidden, logits = run(tiny_models.in_order(model, tiny.leaves), jnp.asarray(tiny.ids))
    assert set(seen) == {jnp.dtype("bfloat16")} == {hidden.dtype}
    assert logits.dtype == jnp.float32
    error = np.sqrt(np.mean((np.asarray(logits) - tiny.expected) ** 2))
    assert error < 0.15 * tiny.expected.std()


def test_attend_gets_each_layers_window_cap_scale_and_cache():
    tiny = tiny_models.load("gemma2")
    model = abstract_model(tiny.config, jnp.float32, jnp.float32)
    calls = []

    def attend(q, k, v, cache, *, scale, window, soft_cap):
        calls.append((cache, scale, window, soft_cap, q.shape, k.shape, v.shape))
        return q, f"new {cache}"

    decoder = model.bind(tiny_models.in_order(model, tiny.leaves))
    ids, after = jnp.asarray(tiny.ids[:5]), []

    def run(ids):
        hidden, caches = decoder(ids, jnp.arange(5), ("a", "b", "c"), attend)
        after.extend(caches)
        return hidden

    jax.eval_shape(run, ids)
    shapes = ((5, 2, 2, 16), (5, 2, 16), (5, 2, 16))
    scale = 24**-0.5
    assert calls == [
        ("a", scale, 8, 2.0, *shapes),
        ("b", scale, 0, 2.0, *shapes),
        ("c", scale, 8, 2.0, *shapes),
    ]
    assert after == ["new a", "new b", "new c"]
    with pytest.raises(ValueError, match="1 caches for 3 layers"):
        decoder(ids, jnp.arange(5), (None,), attend)


ROPES = [
    RopeConfig(10_000.0, 16),
    RopeConfig(10_000.0, 16, "dynamic", factor=4.0, trained_len=24),
    RopeConfig(10_000.0, 16, "yarn", factor=4.0, trained_len=24, attention_factor=1.1),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.kind)
def test_a_tokens_rotation_depends_on_its_position_only(rope):
    table = jax.jit(functools.partial(rope_table, rope))
    whole = np.stack(table(np.arange(60)))
    parts = [np.stack(table(np.arange(s, s + 15))) for s in (0, 15, 30, 45)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-6)
    padded = np.stack(table(np.array([-1, 59, -1, 3])))
    np.testing.assert_allclose(padded[:, [1, 3]], whole[:, [59, 3]], atol=1e-6)
    assert np.isfinite(padded).all()


def test_rotation_by_hand():
    x = jnp.asarray([[[1.0, 2.0, 3.0, 4.0, 5.0]]])  # T 1, one head of H 5, of which 4 rotate
    angle = np.asarray([[np.pi / 2, np.pi]])
    found = rotate(x, (jnp.cos(angle), jnp.sin(angle)))
    np.testing.assert_allclose(found[0, 0], [-3.0, -2.0, 1.0, -4.0, 5.0], atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "mrope"}, "'mrope' is unknown; known: default"),
        ({"dim": 7}, "dim 7 must be even"),
        ({"kind": "yarn"}, "'yarn' needs the trained length"),
    ],
)
def test_impossible_ropes_raise(values, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**({"theta": 1e4, "dim": 16} | values))
