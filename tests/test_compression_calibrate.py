"""Compression with calibration tokens, on tiny models of every family: what the layers see, what
becomes of their weights, and what is refused.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from dense_leaves import dense_of

from lepton_jax.compression import calibrated_leaf
from lepton_jax.compression.calibrate import Options, compress_layers
from lepton_jax.compression.calibrated_leaf import compress_calibrated, relative_errors
from lepton_jax.compression.layer_programs import LayerPrograms, embedded, final_inputs
from lepton_jax.compression.quantize import quantize
from lepton_jax.compression.recipe import parse_rule
from lepton_jax.compression.scheme import Scheme
from lepton_jax.compression.statistics import act_range, measure, merge, zeros
from lepton_jax.models.build import abstract_model
from lepton_jax.models.decoder import rms_norm
from lepton_jax.tensors import NMTensor, QTensor

PRODUCTS = r"layers\.\d+\.(qkv|out|gate_up|down|experts_gate_up|experts_down)"


@pytest.fixture(scope="module")
def tiny():
    return tiny_models.with_tokens


def alike(model, leaves, tokens):
    """A model's first two layers, as if they had the window and positions of the first."""
    windows, ropes = model.config.layer_windows, model.config.layer_ropes
    config = dataclasses.replace(
        model.config, num_layers=2, layer_windows=windows[:1] * 2, layer_ropes=ropes[:1] * 2
    )
    model = abstract_model(config, jnp.float32, jnp.float32)
    return model, {path: leaves[path] for path in model.specs}, tokens


def without_rounding_of_inputs(leaves):
    """Of the same products where weights alone are compressed, in programs that all have."""
    return {path: dense_of(leaf) for path, leaf in leaves.items()}


def hidden_states(model, leaves, ids):
    caches = (None,) * model.config.num_layers
    ordered = tuple(leaves[path] for path in model.specs)
    decoder = model.bind(ordered)
    return decoder(ids, jnp.arange(len(ids)), caches, tiny_models.causal_attend)[0]


def compressed(model, leaves, tokens, *texts, **options):
    rules = [parse_rule(text) for text in texts]
    return compress_layers(model, dict(leaves), tokens, rules, options=Options(**options))


@pytest.mark.parametrize("case", ["gemma3", "llama_longrope", "qwen3_moe", "smollm3"])
def test_layer_by_layer_is_the_decoder(tiny, case):
    model, leaves, tokens = tiny(case)
    programs, x = LayerPrograms(model), embedded(model, leaves["embed"], jnp.asarray(tokens))
    for index in range(model.config.num_layers):
        prefix = f"layers.{index}."
        layer = {p.removeprefix(prefix): leaf for p, leaf in leaves.items() if prefix in p}
        x = programs.of(index, leaves.get("rope_factors")).outputs(layer, x)
    found = rms_norm(x, leaves["final_norm"], model.config.norm_eps)
    for ids, ours in zip(tokens, found, strict=True):
        np.testing.assert_allclose(ours, hidden_states(model, leaves, ids), rtol=1e-4, atol=1e-4)
    distinct = set(zip(model.config.layer_windows, model.config.layer_ropes, strict=True))
    assert len(programs._made) == len(distinct)


def test_the_inputs_of_weights_are_what_is_gathered(tiny):
    model, leaves, tokens = tiny("llama")
    x = embedded(model, leaves["embed"], jnp.asarray(tokens))
    layer = {p[len("layers.0.") :]: leaf for p, leaf in leaves.items() if "layers.0." in p}
    kinds = ("hessian", "squares", "largest", "sizes")
    seen = LayerPrograms(model).of(0, None).statistics(layer, x, (("qkv", kinds), ("down", kinds)))
    normed = np.asarray(rms_norm(x, layer["attn_norm"], model.config.norm_eps))
    normed = normed.reshape(-1, normed.shape[-1])
    np.testing.assert_allclose(seen["qkv"]["hessian"], normed.T @ normed, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(seen["qkv"]["squares"], (normed**2).sum(0), rtol=1e-4)
    np.testing.assert_allclose(seen["qkv"]["largest"], np.abs(normed).max(0), rtol=1e-5)
    np.testing.assert_allclose(seen["qkv"]["sizes"], np.abs(normed).sum(0), rtol=1e-4)
    assert float(seen["down"]["count"]) == tokens.size
    np.testing.assert_allclose(np.diag(seen["down"]["hessian"]), seen["down"]["squares"], rtol=1e-5)
    final = final_inputs(model, x, leaves["final_norm"], ("largest",))
    expected = rms_norm(x, leaves["final_norm"], model.config.norm_eps)
    np.testing.assert_allclose(final["largest"], jnp.abs(expected).max((0, 1)), rtol=1e-5)


def test_experts_gather_from_their_own_tokens():
    x = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
    sizes = jnp.asarray([3, 0, 7])
    found = measure(jnp.asarray(x), ("hessian", "squares"), sizes)
    for expert, rows in enumerate((x[:3], x[:0], x[3:])):
        np.testing.assert_allclose(found["hessian"][expert], rows.T @ rows, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["squares"][expert], (rows**2).sum(0), rtol=1e-5)
    np.testing.assert_array_equal(found["count"], [3, 0, 7])


def test_statistics_of_two_batches_are_those_of_both():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((20, 6)), jnp.float32)
    kinds = ("hessian", "squares", "largest", "sizes", "histogram")
    merged = merge(measure(x[:8], kinds, None), measure(x[8:], kinds, None))
    for kind, whole in merge(zeros(kinds, 6), measure(x, kinds, None)).items():
        np.testing.assert_allclose(merged[kind], whole, rtol=1e-5)


def test_ranges_of_activations():
    x = np.random.default_rng(0).standard_normal((400, 50)).astype(np.float32)
    x[7, 3] = 40
    seen = measure(jnp.asarray(x), ("largest", "histogram"), None)
    assert float(act_range(seen, "absmax", 99)) == 40
    for percent in (90.0, 99.5):
        expected = np.percentile(np.abs(x), percent)
        assert float(act_range(seen, "percentile", percent)) == pytest.approx(expected, rel=0.03)

    counts = np.random.default_rng(1).integers(1, 3e6, seen["histogram"].shape)
    many = seen | {"histogram": jnp.asarray(counts, jnp.float32)}  # sums are rounded in float32
    assert float(act_range(many, "percentile", 100)) == 40

    def error(limit):
        steps = np.clip(np.round(x / (limit / 127)), -127, 127)
        return np.sum((steps * limit / 127 - x) ** 2)

    found = float(act_range(seen, "mse", 99))
    best = min(error(limit) for limit in 40 * 2.0 ** (-np.arange(64) / 8))
    assert found < 40 and error(found) <= 1.05 * best


def test_wanda_is_the_textbooks():
    rng = np.random.default_rng(0)
    weight, squares = rng.standard_normal((6, 16)), np.exp(rng.standard_normal(16))
    for pattern, sparsity, size in (("unstructured", 0.5, 16), ("2:4", 0.5, 4), ("1:4", 0.75, 4)):
        scheme = Scheme("keep", prune="wanda", sparsity=sparsity, pattern=pattern)
        expected = weight.copy()
        for row in expected:
            for start in range(0, 16, size):
                scores = [abs(row[i]) * squares[i] ** 0.5 for i in range(start, start + size)]
                for i in np.argsort(scores)[: round(sparsity * size)]:
                    row[start + i] = 0
        statistics = {"count": jnp.asarray(9.0), "squares": jnp.asarray(squares, jnp.float32)}
        array = jnp.asarray(weight, jnp.float32)
        found = compress_calibrated(array, scheme, statistics, Options())
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_expert_that_no_token_visited_is_pruned_by_magnitude():
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 8)), jnp.float32)
    seen = {"count": jnp.asarray([5.0, 0.0]), "squares": jnp.stack([jnp.arange(8.0), jnp.zeros(8)])}
    scheme = Scheme("keep", prune="wanda", sparsity=0.5)
    found = compress_calibrated(weight, scheme, seen, Options())
    by_size = jnp.sort(jnp.abs(weight[1]), axis=-1)[:, 4:5]
    expected = jnp.where(jnp.abs(weight[1]) >= by_size, weight[1], 0)
    np.testing.assert_array_equal(found[1], expected)


def test_a_scheme_without_calibration_is_what_loading_does(tiny):
    model, leaves, tokens = tiny("llama")
    rule = r"embed|layers\.\d+\.(qkv|down) -> weights=int4 group=16 rounding=mse"
    found, errors = compressed(model, leaves, tokens, rule)
    assert set(found) == set(model.specs)
    for path in errors:
        expected = quantize(leaves[path], parse_rule(rule).action)
        jax.tree.map(np.testing.assert_array_equal, found[path], expected)
        change = np.linalg.norm(dense_of(expected) - leaves[path])
        assert errors[path]["weight"] == pytest.approx(
            change / np.linalg.norm(leaves[path]), rel=1e-4
        )
    assert found["final_norm"] is leaves["final_norm"]


GPTQ = "weights=int4 group=16 rounding=gptq"
SPARSEGPT = "weights=int8 prune=sparsegpt pattern=2:4 storage=sparse"
WANDA = "weights=keep prune=wanda sparsity=0.25"


@pytest.mark.parametrize(
    ("case", "methods", "limit"),
    [
        ("gemma3", {"qkv|down": (GPTQ, QTensor), "out|gate_up": (SPARSEGPT, NMTensor)}, 0.5),
        ("qwen3_moe", {"qkv|out|experts_.*": (GPTQ, QTensor)}, 0.3),
        ("qwen3_moe", {"qkv|out|experts_.*": (WANDA, jax.Array)}, 0.3),
    ],
)
def test_families_and_methods(tiny, case, methods, limit):
    model, leaves, tokens = alike(*tiny(case))
    steps = []
    rules = [parse_rule(rf"layers\.\d+\.({of}) -> {how}") for of, (how, _) in methods.items()]
    found, errors = compress_layers(
        model, dict(leaves), tokens, rules, progress=lambda *step: steps.append(step)
    )
    assert [step[0] for step in steps] == list(range(1, model.config.num_layers + 2))
    for path, error in errors.items():
        name = path.split(".")[-1]
        (kind,) = (kind for of, (_, kind) in methods.items() if re.fullmatch(of, name))
        assert isinstance(found[path], kind) and found[path].shape == leaves[path].shape
        assert 0 < error["weight"] < 0.8
        # what the methods are for: products change less than weights do (experts of a tiny model
        # see too few tokens for that)
        if "product" in error and ".experts" not in path:
            assert error["product"] < error["weight"]
    assert len(errors) == 4 * model.config.num_layers
    hidden = hidden_states(model, without_rounding_of_inputs(found), tokens[0])
    exact = hidden_states(model, leaves, tokens[0])
    assert 0 < np.linalg.norm(hidden - exact) < limit * np.linalg.norm(exact)


def test_the_tied_table_is_calibrated_on_final_states(tiny):
    model, leaves, tokens = tiny("gemma3")
    assert model.config.tie_embeddings
    rule = "embed -> weights=int8 activations=static rounding=gptq"
    found, errors = compressed(model, leaves, tokens, rule)
    largest = max(float(jnp.abs(hidden_states(model, leaves, ids)).max()) for ids in tokens)
    assert float(found["embed"].act_scale) == pytest.approx(largest / 127, rel=1e-4)
    assert errors["embed"]["product"] < errors["embed"]["weight"]


def test_smoothing_helps_static_activations(tiny):
    model, leaves, tokens = tiny("llama")
    leaves = {path: np.array(leaf) for path, leaf in leaves.items()}
    outlier = np.ones_like(leaves["layers.0.attn_norm"])
    outlier[3] = 30
    for index in range(model.config.num_layers):
        for norm, weight in (("attn_norm", "qkv"), ("ffn_norm", "gate_up")):
            leaves[f"layers.{index}.{norm}"] *= outlier
            leaves[f"layers.{index}.{weight}"] /= outlier
    leaves = {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
    exact = hidden_states(model, leaves, tokens[0])
    rule = f"{PRODUCTS} -> weights=int8 activations=static"
    distances = {}
    for smooth in ("none", "smoothquant"):
        found, errors = compressed(model, leaves, tokens, rule, smooth=smooth)
        assert isinstance(found["layers.0.qkv"], QTensor)
        assert ("exponent" in errors["layers.0.qkv"]) == (smooth != "none")
        distances[smooth] = float(jnp.linalg.norm(hidden_states(model, found, tokens[0]) - exact))
    assert distances["smoothquant"] < 0.4 * distances["none"]


@pytest.mark.parametrize(
    ("smooth", "scheme"),
    [("awq", "weights=int4 group=16"), ("smoothquant", "weights=int8 activations=dynamic")],
)
def test_smoothing_helps_experts(tiny, smooth, scheme):
    """A few inputs of the experts' products are 30 times the others, in an equal model."""
    model, leaves, tokens = tiny("qwen3_moe")
    leaves = {path: np.array(leaf) for path, leaf in leaves.items()}
    inputs, channels = (
        np.ones(size, np.float32) for size in (model.config.hidden_size, model.config.ffn_size)
    )
    inputs[[3, 8]] = channels[[2, 9]] = 30
    for index in range(model.config.num_layers):
        for name in ("router", "experts_gate_up"):
            leaves[f"layers.{index}.{name}"] /= inputs
        leaves[f"layers.{index}.ffn_norm"] *= inputs
        leaves[f"layers.{index}.experts_gate_up"][:, 1] *= channels[:, None]
        leaves[f"layers.{index}.experts_down"] /= channels
    leaves = {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
    exact = hidden_states(model, leaves, tokens[0])
    rule, distances = rf"layers\.\d+\.experts_.* -> {scheme}", {}
    for method in ("none", smooth):
        found, errors = compressed(model, leaves, tokens, rule, smooth=method)
        assert len(errors) == 2 * model.config.num_layers
        assert all(("exponent" in error) == (method != "none") for error in errors.values())
        distances[method] = float(jnp.linalg.norm(hidden_states(model, found, tokens[0]) - exact))
    assert distances[smooth] < 0.7 * distances["none"]


@pytest.mark.parametrize(
    ("case", "rules", "message"),
    [
        ("llama", ["nothing -> weights=int8"], "match no parameter"),
        ("mixtral", ["embed -> weights=int8 rounding=gptq"], "'embed': the embedding is looked up"),
        (
            "mixtral",
            [f"{PRODUCTS} -> weights=int8 activations=static"],
            "of experts has no static activations",
        ),
    ],
)
def test_rules_that_are_refused(tiny, case, rules, message):
    with pytest.raises(ValueError, match=message):
        compressed(*tiny(case), *rules)


def test_too_many_experts_for_their_hessians(tiny, monkeypatch):
    monkeypatch.setattr(calibrated_leaf, "MOST_HESSIANS", 1000)
    with pytest.raises(ValueError, match="needs the Hessians of .* experts"):
        compressed(*tiny("mixtral"), f"{PRODUCTS} -> weights=int8 rounding=gptq")


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("weights=int8 rounding=gptq", {}),
        ("weights=int4 group=4 rounding=gptq", {"act_order": True}),
        ("weights=int8 prune=sparsegpt sparsity=0.5", {}),
    ],
)
def test_a_hessian_that_cannot_be_factored_is_told(tiny, rule, options):
    """jax's factorization gives NaN then, which integers would hide."""
    _, leaves, _ = tiny("llama")
    array = leaves["layers.1.qkv"]
    scheme = parse_rule(f"layers.* -> {rule}").action
    pair = np.array([[1.0, 2.0], [2.0, 1.0]], np.float32)  # symmetric and indefinite
    hessian = jnp.asarray(np.kron(np.eye(array.shape[-1] // 2, dtype=np.float32), pair))
    seen = {"count": jnp.ones(()), "hessian": hessian}
    leaf = compress_calibrated(array, scheme, seen, Options(**options))
    errors = relative_errors(array, leaf, seen)
    assert not all(np.isfinite(float(error)) for error in errors.values())


def test_weights_that_are_refused(tiny):
    model, leaves, tokens = tiny("llama")
    rule = r"layers\.1\.qkv -> weights=int8 rounding=gptq"
    broken = dict(leaves, **{"layers.1.qkv": leaves["layers.1.qkv"].at[0, 0, 0].set(jnp.nan)})
    with pytest.raises(ValueError, match=r"layers\.1\.qkv: not finite after compression"):
        compressed(model, broken, tokens, rule)
    done = dict(leaves, **{"layers.1.qkv": quantize(leaves["layers.1.qkv"], Scheme())})
    with pytest.raises(ValueError, match=r"layers\.1\.qkv is compressed already"):
        compressed(model, done, tokens, rule)
    with pytest.raises(ValueError, match="want \\[windows, T\\]"):
        compressed(model, leaves, tokens[0], rule)


@pytest.mark.parametrize(
    ("field", "value"), [("smooth", "both"), ("ranges", "max"), ("alpha", 2.0), ("damp", 0.0)]
)
def test_options_that_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"compression\.{field}="):
        dataclasses.replace(Options(), **{field: value})
