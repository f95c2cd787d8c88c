"""Receipts: rules as text, digests of weights, sizes by hand, damage, and the page."""

import json
import re
import xml.etree.ElementTree as ET

import jax.numpy as jnp
import numpy as np
import pytest
from engine_reference import tiny

from lepton_jax.compression import receipt as receipts
from lepton_jax.compression.leaf import relative_error
from lepton_jax.compression.presets import scheme_of_each
from lepton_jax.compression.quantize import quantize
from lepton_jax.compression.receipt_page import page, pareto_front, pareto_page
from lepton_jax.compression.recipe import Recipe, parse_rule, rule_text
from lepton_jax.compression.scheme import Scheme
from lepton_jax.compression.structure import Structure, planned_model
from lepton_jax.config import CompressionSection
from lepton_jax.html.svg_plots import Series, scatter

MODEL, LEAVES = tiny("llama", layers=1)
SPECS = MODEL.specs


def estimate(value):
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def receipt(title="int8", kl=4e-3, kept=100, mib=1, rates=(150.0, 150.0)):
    size = {
        "dense_bytes": 4 << 20,
        "device_bytes": mib << 20,
        "disk_bytes": mib << 20,
        "parameters": 100,
        "kept": kept,
        "kept_fraction": kept / 100,
        "compute_fraction": kept / 100,
    }
    dense, now = ({"decode": d, "prefill": p} for d, p in ((100.0, 100.0), rates))
    made = {
        "fingerprint": "f" * 16,
        "weights_sha256": "0" * 64,
        "page_sha256": "0" * 64,
        "source": {"path": "a <model>", "fingerprint": "e" * 16, "dtype": "float32"},
        "engine": {},
        "recipe": {"preset": title, "rules": ["embed -> weights=int8"], "title": title},
        "measure": {"windows": 4},
        "size": size,
        "quality": {
            "places": 99,
            "perplexity": estimate(26.5),
            "dense_perplexity": estimate(26.4),
            "perplexity_ratio": estimate(1.004),
            "kl": estimate(kl),
            "top1": estimate(0.97),
            "top5": estimate(0.98),
        },
        "greedy_prefix": estimate(40.0) | {"of": 48, "prompts": 16},
        "speed": {"repeats": 3, "turns": True, "device": "a device"}
        | receipts.speeds(dense, now, size),
        "held_out": {"sha256": "1" * 64},
        "calibration": None,
        "structured": None,
        "recovery": None,
        "sensitivity": None,
        "kv": None,
        "environment": receipts.environment(),
        "weights": [
            {"path": f"layers.{i}.{kind}", "error": 0.01 * (i + 1), "product_error": None}
            for i in range(3)
            for kind in ("qkv", "down")
        ],
    }
    return made | {"digest": receipts.digest_line(made)}


@pytest.mark.parametrize(
    "text",
    [
        "embed|head -> weights=int8",
        r"layers\.\d+\..* -> weights=int4 group=128 asymmetric=true rounding=gptq",
        "head -> keep",
        r"layers\..* -> weights=float8 activations=dynamic",
        r"a->b -> weights=int8",
    ],
)
def test_rules_are_read_and_written(text):
    rule = parse_rule(text)
    assert rule_text(rule) == text
    assert parse_rule(rule_text(rule)) == rule


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("embed", "'embed': want PATTERN -> FIELD=VALUE"),
        ("-> weights=int8", "want PATTERN -> FIELD=VALUE"),
        ("embed ->", "want PATTERN -> FIELD=VALUE"),
        ("embed -> int8", "'int8' is no FIELD=VALUE; fields are weights, group"),
        ("embed -> bits=8", "'bits=8' is no FIELD=VALUE"),
        ("embed -> weights=int3", "'embed -> weights=int3': .*int3.*allowed are int8, int4"),
        ("embed -> group=x", "group='x': want a whole number"),
        ("embed -> sparsity=x", "sparsity='x': want a number"),
        ("embed -> asymmetric=1", "asymmetric='1': want true or false"),
        ("embed -> weights=int8 weights=int4", "weights is given twice"),
    ],
)
def test_rules_that_can_not_be_are_named(text, says):
    with pytest.raises(ValueError, match=says):
        parse_rule(text)


def test_presets_and_rules_exclude_each_other():
    with pytest.raises(ValueError, match=r"preset='int8' and compression.rules are both given"):
        Recipe.of(preset="int8", rules=("embed -> keep",))
    assert Recipe.of(preset="none").rules == ()
    assert Recipe.of(rules=("embed -> keep",)).preset == ""


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (CompressionSection(rules=("embed -> weights=int8 rounding=gptq",)), "rule 'embed -> wei"),
        (CompressionSection(preset="int8", smooth="awq"), "smooth=awq needs calibration"),
    ],
)
def test_loading_refuses_what_needs_calibration(section, says):
    with pytest.raises(ValueError, match=rf"{says}.*lepton_jax.compress --config=.*path=m --con"):
        Recipe.from_config(section).require_no_calibration("m")
    Recipe.of(preset="w8a8").require_no_calibration("m")


STATIC = "layers.* -> weights=int8 activations=static"


@pytest.mark.parametrize(
    ("fields", "idle"),
    [
        (dict(preset="int8", smooth="smoothquant"), "smooth='smoothquant'"),
        (dict(rules=("embed -> weights=int8",), smooth="awq"), "smooth='awq'"),
        (dict(drop_layers=1, smooth="awq"), "smooth='awq'"),
        (dict(preset="int4", smooth="awq", alpha=0.7), "alpha=0.7"),
        (dict(preset="w8a8", ranges="mse"), "ranges='mse'"),
        (dict(rules=(STATIC,), percentile=99.0), "percentile=99.0"),
        (dict(preset="int8", keep_experts=2, damp=0.1), "damp=0.1"),
        (dict(rules=(STATIC,), act_order=True), "act_order=True"),
        (
            dict(
                rules=("layers.* -> weights=int8 rounding=gptq prune=sparsegpt pattern=2:4",),
                act_order=True,
            ),
            "act_order=True",
        ),
        (dict(preset="w8a8", smooth="smoothquant", alpha=0.7), ""),
        (dict(auto_kl=0.1, smooth="awq"), ""),
        (dict(rules=("head -> weights=int4 group=4 rounding=mse",), smooth="awq"), ""),
        (dict(rules=(STATIC,), ranges="percentile", percentile=99.0), ""),
        (dict(keep_ffn=0.5, damp=0.1), ""),
        (dict(rules=("layers.* -> weights=int8 rounding=gptq",), act_order=True, damp=0.1), ""),
    ],
)
def test_options_that_change_nothing_are_refused(fields, idle):
    recipe = Recipe.from_config(CompressionSection(**fields))
    schemes = scheme_of_each(recipe.rules, SPECS)
    if not idle:
        return recipe.require_use(schemes)
    with pytest.raises(ValueError, match=rf"compression\.{idle} changes nothing here, it is for"):
        recipe.require_use(schemes)


def test_the_digest_sees_every_bit_and_the_type():
    first = receipts.weights_sha256(SPECS, LEAVES)
    assert first == receipts.weights_sha256(SPECS, LEAVES)
    for index in (0, len(LEAVES) - 1):
        bits = np.array(LEAVES[index])
        bits.reshape(-1).view(np.int32)[-1] ^= 1
        changed = [*LEAVES]
        changed[index] = jnp.asarray(bits)
        assert receipts.weights_sha256(SPECS, changed) != first
    int8 = [quantize(LEAVES[0], Scheme()), *LEAVES[1:]]
    dynamic = [quantize(LEAVES[0], Scheme(activations="dynamic")), *LEAVES[1:]]
    found = {receipts.weights_sha256(SPECS, leaves) for leaves in (LEAVES, int8, dynamic)}
    assert len(found) == 3


def test_relative_errors():
    weight = jnp.asarray([[3.0, 0.0], [0.0, 4.0]])
    assert relative_error(weight, weight) == 0
    assert relative_error(weight, weight * 0.5) == pytest.approx(0.5)
    assert relative_error(weight * 0, weight * 0) == 0
    assert np.isnan(relative_error(weight.at[0, 0].set(jnp.nan), weight))
    leaf = quantize(weight, Scheme())
    off = np.linalg.norm(np.asarray(leaf.dense(jnp.float32) - weight))
    assert relative_error(weight, leaf) == pytest.approx(off / 5, abs=1e-7)


def test_kept_weights_are_counted():
    index = list(SPECS).index("layers.0.down")
    pruned = np.array(LEAVES[index])
    pruned[:, ::2] = 0
    leaves = [*LEAVES]
    leaves[index] = jnp.asarray(pruned)
    schemes = {"layers.0.down": Scheme(weights="keep", prune="magnitude", sparsity=0.5)}
    errors = {"layers.0.down": {"weight": 0.5, "product": 0.25, "exponent": 0.35}}
    rows = receipts.weight_rows(MODEL, leaves, schemes=schemes, errors=errors)
    assert [row["path"] for row in rows] == [p for p, s in SPECS.items() if s.inputs]
    size = receipts.sizes(MODEL, 10, model=MODEL, rows=rows, bytes_now=5)
    down = next(row for row in rows if row["path"] == "layers.0.down")
    assert (down["kept"], down["error"], down["product_error"]) == (pruned.size // 2, 0.5, 0.25)
    assert [row["exponent"] for row in rows if row["exponent"]] == [down["exponent"]] == [0.35]
    total = sum(s.size for p, s in SPECS.items() if s.inputs and p != "embed")
    assert (size["parameters"], size["kept"]) == (total, total - pruned.size // 2)
    assert size["kept_fraction"] == pytest.approx(size["kept"] / total)
    assert size["compute_fraction"] == size["kept_fraction"]


def test_experts_left_out_save_memory_and_no_products():
    model = tiny("qwen3_moe", layers=1)[0]
    count = model.config.num_experts
    smaller = planned_model(Structure(keep_experts=count - 2), model)
    rows = [{"path": p, "kept": s.size} for p, s in smaller.specs.items() if s.inputs]
    size = receipts.sizes(model, 10, model=smaller, rows=rows, bytes_now=5)
    experts = sum(s.size for p, s in model.specs.items() if ".experts_" in p)
    router = model.specs["layers.0.router"].size
    assert size["parameters"] - size["kept"] == (experts + router) * 2 // count
    used = size["parameters"] - experts * (1 - model.config.experts_per_token / count)
    assert size["compute_fraction"] == pytest.approx(1 - router * 2 / count / used)


def test_the_digest_line():
    assert receipt()["digest"] == (
        "int8: KL 0.004 [0.0036, 0.0044] nats a token, perplexity 26.40 -> 26.50 (+0.40%), top-1 "
        "97.0%, 25% of the bytes, decode time 0.67 (ideal 1.00), prefill time 0.67 (ideal 1.00)"
    )
    slow = receipt(kept=70, rates=(122.0, 97.0))["digest"]
    assert slow.endswith(
        "k/N 0.70, decode time 0.82 (ideal 0.70), prefill time 1.03 (ideal 0.70; none saved)"
    )
    bare = receipt(kept=50) | {"quality": None, "speed": None}
    assert receipts.digest_line(bare) == "int8: 25% of the bytes, k/N 0.50"


NONE, LESS, ALL = "none saved", "saved, but less than the ideal", "saved, as the ideal or more"


@pytest.mark.parametrize(
    ("made", "memory", "decode", "prefill"),
    [
        (receipt(kept=50, rates=(100.0, 98.0)), "saved", NONE, NONE),
        (receipt(kept=70, rates=(122.0, 140.0)), "saved", LESS, ALL),
        (receipt(kept=100, rates=(150.0, 80.0)), "saved", ALL, NONE),
        (receipt(kept=50, mib=4, rates=(101.0, 100.0)), NONE, NONE, NONE),
        (receipt(kept=50, mib=5, rates=(200.0, 120.0)), NONE, ALL, LESS),
    ],
)
def test_memory_and_the_time_of_each_phase_are_claimed_apart(made, memory, decode, prefill):
    assert made["speed"]["saved"] == {"memory": memory, "decode": decode, "prefill": prefill}
    text = " ".join(page(made).split())
    assert f"Memory: {memory}. Time of decode: {decode}. Time of prefill: {prefill}." in text


def test_reading_back(tmp_path):
    made = receipt()
    (tmp_path / "receipt.json").write_text(receipts.to_text(made))
    assert receipts.read(tmp_path).items() >= made.items()
    assert receipts.of_loaded(tmp_path, "f" * 16)["digest"] == made["digest"]
    with pytest.raises(ValueError, match=r"receipt.json is the receipt of other weights"):
        receipts.of_loaded(tmp_path, "0" * 16)
    assert receipts.of_loaded(tmp_path / "none", "0" * 16) is None


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[:40], "can't be read"),
        (lambda text: "[]", "is no receipt"),
        (lambda text: text.replace('"version": 3', '"version": 9'), "version 9 is unknown"),
        (lambda text: text.replace('"weights_sha256"', '"weights"'), "lacks weights_sha256"),
    ],
)
def test_damage_is_named(tmp_path, damage, says):
    (tmp_path / "receipt.json").write_text(damage(receipts.to_text(receipt())))
    with pytest.raises(ValueError, match=says):
        receipts.read(tmp_path)


def test_no_receipt_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no receipt.json: it isn't the output"):
        receipts.read(tmp_path)


def svgs(text):
    return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def circles(svg):
    return [node for node in svg.iter() if node.tag.endswith("circle") and len(node)]


def test_the_page_needs_nothing_else_and_shows_the_numbers():
    text = page(receipt())
    assert not re.search(r"<script|<link|<img|url\(|src=", text)
    assert "a &lt;model&gt;" in text and "26.500" in text and "0.004" in text
    errors, against = svgs(text)
    assert len(circles(errors)) == 6 and len(circles(against)) == 2
    bare = receipt() | {"quality": None, "greedy_prefix": None, "speed": None}
    assert "Not measured" in page(bare) and len(svgs(page(bare))) == 1


def test_the_pareto_page():
    found = {"a": receipt(kl=1e-3), "b": receipt(kl=1e-2)}
    text = pareto_page(found, title="T", columns=("recipe",), rows=[("a",), ("<b>",)])
    assert "&lt;b&gt;" in text
    by_bytes, by_speed = svgs(text)
    assert len(circles(by_bytes)) == len(circles(by_speed)) == 3  # both, and the one in front


def test_pareto_fronts():
    points = [(3, 1), (1, 3), (2, 2), (3, 3), (2, 4), (1, 3)]
    assert [points[i] for i in pareto_front(points)] == [(1, 3), (2, 2), (3, 1)]


def test_plots_put_points_where_they_belong():
    series = [Series("s", [(0.0, 1.0), (10.0, 10.0), (5.0, 0.0)], labels=["a", "b", "c"])]
    (svg,) = svgs(scatter(series, title="t & u", x="x", y="y", log_y=True))
    (ax, ay), (bx, by) = [(float(c.get("cx")), float(c.get("cy"))) for c in circles(svg)]
    assert ax < bx and ay > by  # 0 has no place on a logarithmic axis, and y grows downwards
    (svg,) = svgs(scatter(series, title="t", x="x", y="y"))
    xs = [float(c.get("cx")) for c in circles(svg)]
    assert xs[2] == pytest.approx((xs[0] + xs[1]) / 2, abs=0.2)


def test_receipts_are_json():
    assert json.loads(receipts.to_text(receipt()))["format"] == "lepton_jax receipt"
