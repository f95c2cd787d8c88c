"""Scales between neighbouring weights: the model stays the same, and the right scales are found."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lepton_jax.compression.quantize import quantize
from lepton_jax.compression.scheme import Scheme
from lepton_jax.compression.smooth import (
    PAIRS,
    awq_scales,
    folded,
    pairs_for,
    smoothed,
    smoothquant_scales,
)

CASES = """
    gemma2 gemma3 llama llama_bias mistral mixtral phi3 qwen2 qwen3 qwen3_moe smollm3
""".split()


def layer_of(leaves, index):
    prefix = f"layers.{index}."
    return {
        path.removeprefix(prefix): jnp.asarray(leaf)
        for path, leaf in leaves.items()
        if path.startswith(prefix)
    }


@pytest.mark.parametrize("case", CASES)
def test_any_scales_leave_every_family_as_it_was(case):
    tiny = tiny_models.load(case)
    config, rng = tiny.config, np.random.default_rng(0)
    leaves = dict(tiny.leaves)
    for index in range(config.num_layers):
        for pair in PAIRS:
            layer = layer_of(leaves, index)
            if pair.target not in layer:
                continue
            experts, inputs = layer[pair.target].shape[0], layer[pair.target].shape[-1]
            shape = (experts, inputs) if pair.target == "experts_down" else (inputs,)
            scales = np.exp(rng.standard_normal(shape)).astype(np.float32)
            if pair.target == "out":
                heads = scales.reshape(config.num_kv_heads, config.group, config.head_dim)
                scales = np.broadcast_to(heads[:, :1], heads.shape).reshape(-1)
            changed = folded(layer, pair, jnp.asarray(scales), config)
            assert not np.allclose(changed[pair.target], layer[pair.target])
            leaves |= {f"layers.{index}.{name}": leaf for name, leaf in changed.items()}
    found = tiny_models.run(config, leaves, tiny.ids)
    np.testing.assert_allclose(found, tiny.expected, rtol=0, atol=5e-4)


def test_smoothquant_is_its_formula():
    columns, largest = jnp.asarray([0.5, 2.0, 1.0, 3.0]), jnp.asarray([8.0, 0.5, 100.0, 0.0])
    found = smoothquant_scales(columns, largest, 0.5)
    np.testing.assert_allclose(found, [4.0, 0.5, 10.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(
        smoothquant_scales(columns, largest, 0.75)[0], 8**0.75 / 0.5**0.25, rtol=1e-6
    )


def test_smoothquant_makes_activations_and_weights_equally_hard():
    tiny = tiny_models.load("llama")
    layer = layer_of(tiny.leaves, 0)
    rng = np.random.default_rng(1)
    seen = {
        pair.target: {"largest": jnp.asarray(np.exp(rng.standard_normal(n)), jnp.float32)}
        for pair in PAIRS
        if pair.target in layer
        for n in [layer[pair.target].shape[-1]]
    }
    schemes = {target: Scheme(activations="dynamic") for target in seen}
    schemes["down"] = Scheme()  # weight-only: nothing to gain
    found, exponents = smoothed(
        layer, seen, schemes, config=tiny.config, method="smoothquant", alpha=0.5
    )
    assert exponents == {"qkv": 0.5, "out": 0.5, "gate_up": 0.5}
    np.testing.assert_array_equal(found["down"], layer["down"])
    scales = layer["ffn_norm"] / found["ffn_norm"]
    activations = seen["gate_up"]["largest"] / scales
    columns = jnp.max(jnp.abs(found["gate_up"]), axis=(0, 1))
    np.testing.assert_allclose(activations, columns, rtol=1e-4)


def outlier_layer(seed=0):
    """A weight and inputs of which a few are 30 times the others, as after a norm."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((48, 64)).astype(np.float32)
    x = rng.standard_normal((500, 64)).astype(np.float32)
    x[:, [3, 17, 40]] *= 30
    return weight, x


def test_awq_finds_the_best_of_its_exponents():
    weight, x = outlier_layer()
    scheme = Scheme("int4", group=32)
    sizes, hessian = np.abs(x).mean(0), x.T @ x / len(x)
    scales, exponent = awq_scales(weight, jnp.asarray(sizes), jnp.asarray(hessian), scheme)
    losses = []
    for tried in np.arange(20) / 20:
        s = sizes**tried
        s = s / np.sqrt(s.min() * s.max())
        rounded = np.asarray(quantize(jnp.asarray(weight * s), scheme).dense(jnp.float32)) / s
        losses.append(np.sum((x @ (rounded - weight).T) ** 2))
    best = np.argmin(losses)
    assert best > 0 and losses[best] < 0.6 * losses[0]
    assert float(exponent) == pytest.approx(best / 20)
    expected = sizes ** (best / 20)
    np.testing.assert_allclose(
        scales, expected / np.sqrt(expected.min() * expected.max()), rtol=1e-4
    )


def test_awq_of_experts_minds_each_input_alone():
    """With the diagonal of the Hessian, and of a weight in parts: as if it were one flat weight."""
    weight, x = outlier_layer()
    scheme, squares = Scheme("int4", group=32), (x**2).mean(0)
    sizes = jnp.asarray(np.abs(x).mean(0))
    parts = jnp.asarray(weight).reshape(4, 12, 64)
    found = awq_scales(parts, sizes, jnp.asarray(squares), scheme)
    expected = awq_scales(jnp.asarray(weight), sizes, jnp.diag(jnp.asarray(squares)), scheme)
    assert float(found[1]) == float(expected[1]) > 0
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)


def test_inputs_that_never_came_stay():
    weight, x = outlier_layer()
    x[:, 5] = 0
    scales, _ = awq_scales(
        weight, jnp.asarray(np.abs(x).mean(0)), jnp.asarray(x.T @ x), Scheme("int4", group=32)
    )
    assert float(scales[5]) == 1.0 and np.all(np.isfinite(scales))


def test_who_gains():
    keep, int4, w8a8 = Scheme("keep"), Scheme("int4", group=32), Scheme(activations="static")
    schemes = {"qkv": keep, "out": int4, "gate_up": w8a8, "embed": int4}
    assert [pair.target for pair in pairs_for("awq", schemes)] == ["out", "gate_up"]
    assert [pair.target for pair in pairs_for("smoothquant", schemes)] == ["gate_up"]
