"""Leaf operations against float64 numpy, for every leaf type."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_leaves import dense_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax.tensors import ParamSpec, QTensor, dots, einsum, einsum_parts, ragged_einsum, take
from lepton_jax.tensors.decompress import BLOCK, by_outputs
from lepton_jax.tensors.qtensor import pack_int4

packed_int4 = jax.jit(pack_int4, static_argnums=1)


def quantized(w, kind):
    """A QTensor of an array, by the arithmetic of its docstring, and the weight it stands for."""
    if kind in ("int8", "w8a8", "static"):
        scale = np.abs(w).max(-1) / 127
        values = np.round(w / scale[..., None])
        act_scale = jnp.float32(3 / 127) if kind == "static" else None
        bits = 16 if kind == "int8" else 8
        leaf = QTensor(
            jnp.asarray(np.int8(values)),
            jnp.asarray(np.float32(scale)),
            bits,
            act_scale=act_scale,
        )
        return leaf, values * scale[..., None]
    if kind.startswith("fp8"):
        scale = np.abs(w).max(-1) / 448
        values = jnp.asarray((w / scale[..., None]).astype(jnp.float8_e4m3fn))
        leaf = QTensor(values, jnp.asarray(np.float32(scale)), 8 if kind == "fp8_act" else 16)
        return leaf, np.asarray(values, np.float64) * scale[..., None]
    groups = w.reshape(*w.shape[:-1], -1, GROUP)
    low = groups.min(-1) if kind == "int4_offset" else -np.abs(groups).max(-1)
    step = (groups.max(-1) - low) / 15 if kind == "int4_offset" else -low / 7
    scale = step.astype(jnp.bfloat16).astype(np.float64)
    offset = (low + 8 * scale).astype(jnp.bfloat16).astype(np.float64)
    offset = offset if kind == "int4_offset" else np.zeros_like(scale)
    values = np.clip(np.round((groups - offset[..., None]) / scale[..., None]), -8, 7)
    means = values * scale[..., None] + offset[..., None]
    flat = jnp.asarray(np.int8(values.reshape(w.shape)))
    kept = flat if kind == "int8_grouped" else packed_int4(flat, scale.shape[-1])
    leaf = QTensor(
        kept,
        jnp.asarray(scale.astype(jnp.bfloat16)),
        offset=jnp.asarray(offset.astype(jnp.bfloat16)) if kind == "int4_offset" else None,
    )
    return leaf, means.reshape(w.shape)


GROUP = 8
TOLERANCES = {
    "int8": 2e-4, "w8a8": 2e-2, "static": 2e-2, "fp8": 1e-2, "fp8_act": 5e-2,
    "int8_grouped": 1e-5, "int4": 1e-5, "int4_offset": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("subscripts", ["TD,KJHD->TKJH", "TD,FD->TF"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_einsum_of_arrays_matches_float64(rows, subscripts, dtype, tolerance):
    x, w = inputs(subscripts, rows)
    got = jax.jit(lambda x, w: einsum(subscripts, x, w))(x, jnp.asarray(w, dtype))
    exact = np.einsum(subscripts, np.asarray(x, np.float64), w)
    assert got.shape == exact.shape
    assert np.abs(np.asarray(got) - exact).max() <= tolerance * np.abs(exact).max()


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("subscripts", ["TD,KJHD->TKJH", "TD,FD->TF"])
@pytest.mark.parametrize("kind", TOLERANCES)
def test_einsum_of_qtensors_matches_float64(rows, subscripts, kind):
    x, w = inputs(subscripts, rows)
    leaf, means = quantized(w, kind)
    exact = np.einsum(subscripts, np.asarray(x, np.float64), means)
    got = jax.jit(lambda x, w: einsum(subscripts, x, w))(x, leaf)
    assert got.shape == exact.shape and leaf.shape == w.shape
    assert np.abs(np.asarray(got) - exact).max() <= TOLERANCES[kind] * np.abs(exact).max()
    np.testing.assert_allclose(dense_of(leaf), means, rtol=1e-2, atol=1e-6)


def inputs(subscripts, rows):
    rng = np.random.default_rng(0)
    sizes = dict(T=rows, D=24, K=2, J=5, H=8, F=6)
    left, right = subscripts.split("->")[0].split(",")
    x = np.clip(rng.normal(size=[sizes[c] for c in left]), -3, 3)
    return jnp.asarray(x, jnp.float32), rng.normal(size=[sizes[c] for c in right])


@pytest.mark.parametrize("kind", TOLERANCES)
def test_qtensors_are_planned_as_they_are_made(kind):
    leaf, _ = quantized(np.random.default_rng(4).normal(size=(6, 3, 24)), kind)
    spec = ParamSpec((6, 3, 24), jnp.float32, ("a", "b", "embed"), 1)
    planned = QTensor.planned(spec, **leaf.static())
    assert planned.abstract() == jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), leaf
    )
    assert planned.nbytes == leaf.nbytes and planned.shape == leaf.shape
    assert planned.values.axes == spec.axes


@pytest.mark.parametrize(
    ("static", "message"),
    [
        (dict(values="int3"), "values='int3': allowed are int8, int4"),
        (dict(act_bits=4), "act_bits=4: allowed are 8"),
        (dict(group=5), "group=5 does not divide the 24 inputs"),
        (dict(values="int4", group=3), "group=3 does not divide"),
        (dict(values="int4"), "want a group"),
        (dict(group=8, act_bits=8), "group must be 0"),
        (dict(static_activations=True), "need act_bits=8"),
    ],
)
def test_plans_that_can_not_be(static, message):
    spec = ParamSpec((6, 24), jnp.float32, ("a", "embed"), 1)
    with pytest.raises(ValueError, match=message):
        QTensor.planned(spec, **static)


# Few shapes: outputs, groups and half of a group's values. Each is a compilation.
@given(
    st.sampled_from([(1, 1, 1), (1, 4, 1), (2, 1, 8), (3, 3, 5)]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=50, deadline=None)
def test_packing_keeps_every_value(sizes, seed):
    outs, groups, half = sizes
    values = np.random.default_rng(seed).integers(-8, 8, (outs, 2 * half * groups), np.int8)
    packed = packed_int4(values, groups)
    assert packed.dtype == jnp.uint8 and packed.nbytes * 2 == values.size
    leaf = QTensor(packed, np.ones((outs, groups), jnp.bfloat16))
    np.testing.assert_array_equal(dense_of(leaf), values)


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-6), *TOLERANCES.items()])
def test_ragged_einsum_matches_float64(kind, tolerance):
    rng = np.random.default_rng(1)
    sizes = np.array([3, 0, 4, 2])
    x, w = rng.normal(size=(9, 16)), rng.normal(size=(4, 2, 6, 16))
    leaf = jnp.asarray(w, jnp.float32)
    if kind != "f32":
        leaf, w = quantized(w, kind)
    exact = np.einsum("TD,TCFD->TCF", x, w[np.repeat(np.arange(4), sizes)])
    got = jax.jit(lambda x, w, s: ragged_einsum("TD,ECFD->TCF", x, w, s))(
        jnp.asarray(x, jnp.float32), leaf, jnp.asarray(sizes, jnp.int32)
    )
    assert np.abs(np.asarray(got) - exact).max() <= tolerance * np.abs(exact).max()


@pytest.mark.parametrize("kind", ["f32", "int8"])
def test_einsum_parts_are_the_slices_of_einsum(kind):
    rng = np.random.default_rng(3)
    x, w = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32), rng.normal(size=(2, 6, 8))
    leaf = jnp.asarray(w, jnp.float32) if kind == "f32" else quantized(w, kind)[0]
    whole = einsum("TD,CFD->TCF", x, leaf)
    for part, got in enumerate(einsum_parts("TD,CFD->CTF", x, leaf)):
        np.testing.assert_array_equal(got, whole[:, part])
    with pytest.raises(ValueError, match="same letter"):
        einsum_parts("TD,CFD->ETF", x, leaf)


@pytest.mark.parametrize("kind", TOLERANCES)
def test_take_dequantizes_rows(kind):
    leaf, means = quantized(np.random.default_rng(2).normal(size=(10, 8)), kind)
    ids = jnp.asarray([[3, 9], [0, 3]])
    np.testing.assert_allclose(take(leaf, ids, jnp.float32), means[np.asarray(ids)], rtol=1e-2)


def test_take_of_an_array_rounds_once():
    w = np.random.default_rng(2).normal(size=(10, 8))
    np.testing.assert_array_equal(
        take(jnp.asarray(w), jnp.asarray([3]), jnp.float32)[0], np.float32(w[3])
    )


@jax.jit
def in_blocks(x, leaf):
    return by_outputs(x, leaf, product=lambda x, part: x @ part.dense(jnp.float32).T)


def test_products_by_blocks_of_outputs_are_those_of_the_whole():
    leaf, means = quantized(np.random.default_rng(5).normal(size=(384, 8192)), "int4")
    x = jnp.asarray(np.random.default_rng(6).normal(size=(3, 8192)), jnp.float32)
    assert BLOCK == 256 * 8192  # so three blocks of 128 outputs
    got = in_blocks(x, leaf)
    np.testing.assert_allclose(got, np.asarray(x) @ means.T, atol=1e-2)


@pytest.mark.parametrize("outs", [(2, 384), (6, 2, 64)], ids=str)  # a block within L, of several
def test_blocks_of_outputs_of_several_dimensions(outs):
    leaf, means = quantized(np.random.default_rng(5).normal(size=(*outs, 8192)), "int4")
    flat = leaf.flat()
    assert flat.grouped and flat.scale.shape == (
        math.prod(outs[:-1]),
        outs[-1],
        leaf.scale.shape[-1],
    )
    x = jnp.asarray(np.random.default_rng(6).normal(size=(3, 8192)), jnp.float32)
    got = in_blocks(x, flat)
    np.testing.assert_allclose(got, np.asarray(x) @ means.reshape(-1, 8192).T, atol=1e-2)


@pytest.mark.parametrize(("rows", "vnni"), [(63, False), (64, False), (64, True)])
def test_int8_weights_and_float_activations_on_any_cpu(rows, vnni, monkeypatch):
    monkeypatch.setattr(dots, "multiplies_int8", lambda: vnni)
    rng = np.random.default_rng(7)
    x, values = rng.normal(size=(rows, 48)), rng.integers(-127, 128, (6, 48))
    product = jax.jit(lambda x, values: dots.precise_int8_dot(x, values))
    products = product.lower(jnp.float32(x), jnp.int8(values))
    exact = x @ values.T
    error = np.abs(products.compile()(jnp.float32(x), jnp.int8(values)) - exact).max()
    assert error < 2e-4 * np.abs(exact).max()
    int8_products = re.findall(r"dot_general.*xi8>", products.as_text())
    assert bool(int8_products) == (rows < 64 or vnni)


def test_zero_rows_stay_zero_and_finite():
    leaf, _ = quantized(np.ones((4, 8)), "w8a8")
    assert np.all(np.asarray(einsum("TD,FD->TF", jnp.zeros((1, 8)), leaf)) == 0)


@pytest.mark.parametrize("subscripts", ["TD,DF->TF", "TD,FD->FT", "TD,FE->TF"])
def test_einsum_refuses_other_patterns(subscripts):
    with pytest.raises(ValueError, match="contracted letter last in both"):
        einsum(subscripts, jnp.ones((2, 3)), jnp.ones((3, 3)))


def test_einsum_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        einsum("TD,FD->TF", jnp.ones((2, 3, 4)), jnp.ones((3, 3)))


def test_specs_know_their_size_and_name_each_axis():
    spec = ParamSpec((3, 4), jnp.bfloat16, ("ffn", "embed"), 1)
    assert spec.nbytes == 24
    assert spec.abstract().shape == (3, 4)
    with pytest.raises(ValueError, match="must name each dimension"):
        ParamSpec((3, 4), jnp.bfloat16, ("ffn",))
