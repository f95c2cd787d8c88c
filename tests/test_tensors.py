"""Leaf operations against float64 numpy, for every leaf type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_jax.tensors import ParamSpec, QTensor, einsum, einsum_parts, ragged_einsum, take


def quantized(w, n_in, act_bits):
    flat = w.reshape(*w.shape[: w.ndim - n_in], -1)
    scale = np.abs(flat).max(-1) / 127
    values = np.round(flat / scale[..., None]).reshape(w.shape).astype(np.int8)
    return QTensor(jnp.asarray(values), jnp.asarray(scale, jnp.float32), act_bits)


def dequantized(q, n_in):
    scale = np.asarray(q.scale, np.float64)
    return np.asarray(q.values, np.float64) * scale.reshape(scale.shape + (1,) * n_in)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize(
    ("kind", "tolerance"), [("f32", 1e-6), ("bf16", 1e-2), ("int8", 2e-4), ("w8a8", 2e-2)]
)
@pytest.mark.parametrize("subscripts", ["TD,KJHD->TKJH", "TKGH,DKGH->TD"])
def test_einsum_matches_float64(rows, kind, tolerance, subscripts):
    rng = np.random.default_rng(0)
    sizes = dict(T=rows, D=24, K=2, J=5, H=8, G=3)
    left, right = subscripts.split("->")[0].split(",")
    x = rng.normal(size=[sizes[c] for c in left])
    w = rng.normal(size=[sizes[c] for c in right])
    n_in = 1 if subscripts.startswith("TD") else 3
    leaf = {
        "f32": lambda: jnp.asarray(w, jnp.float32),
        "bf16": lambda: jnp.asarray(w, jnp.bfloat16),
        "int8": lambda: quantized(w, n_in, 16),
        "w8a8": lambda: quantized(w, n_in, 8),
    }[kind]()
    exact = np.einsum(subscripts, x, dequantized(leaf, n_in) if kind in ("int8", "w8a8") else w)
    got = jax.jit(lambda x, w: einsum(subscripts, x, w))(jnp.asarray(x, jnp.float32), leaf)
    assert got.shape == exact.shape
    assert np.abs(np.asarray(got) - exact).max() <= tolerance * np.abs(exact).max()


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-6), ("int8", 1e-5), ("w8a8", 2e-2)])
def test_ragged_einsum_matches_float64(kind, tolerance):
    rng = np.random.default_rng(1)
    sizes = np.array([3, 0, 4, 2])
    x, w = rng.normal(size=(9, 16)), rng.normal(size=(4, 2, 6, 16))
    leaf = jnp.asarray(w, jnp.float32)
    if kind != "f32":
        leaf = quantized(w, 1, 16 if kind == "int8" else 8)
        w = dequantized(leaf, 1)
    exact = np.einsum("TD,TCFD->TCF", x, w[np.repeat(np.arange(4), sizes)])
    got = jax.jit(lambda x, w, s: ragged_einsum("TD,ECFD->TCF", x, w, s))(
        jnp.asarray(x, jnp.float32), leaf, jnp.asarray(sizes, jnp.int32)
    )
    assert np.abs(np.asarray(got) - exact).max() <= tolerance * np.abs(exact).max()


@pytest.mark.parametrize("act_bits", [0, 16])
def test_einsum_parts_are_the_slices_of_einsum(act_bits):
    rng = np.random.default_rng(3)
    x, w = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32), rng.normal(size=(2, 6, 8))
    leaf = quantized(w, 1, act_bits) if act_bits else jnp.asarray(w, jnp.float32)
    whole = einsum("TD,CFD->TCF", x, leaf)
    for part, got in enumerate(einsum_parts("TD,CFD->CTF", x, leaf)):
        np.testing.assert_array_equal(got, whole[:, part])
    with pytest.raises(ValueError, match="same letter"):
        einsum_parts("TD,CFD->ETF", x, leaf)


def test_take_dequantizes_rows():
    w = np.random.default_rng(2).normal(size=(10, 8))
    leaf = quantized(w, 1, 8)
    ids = jnp.asarray([[3, 9], [0, 3]])
    got = take(leaf, ids, jnp.float32)
    np.testing.assert_allclose(got, dequantized(leaf, 1)[np.asarray(ids)], rtol=1e-6)
    np.testing.assert_array_equal(take(jnp.asarray(w), ids, jnp.float32)[0, 0], np.float32(w[3]))


def test_zero_rows_stay_zero_and_finite():
    leaf = quantized(np.ones((4, 8)), 1, 8)
    assert np.all(np.asarray(einsum("TD,FD->TF", jnp.zeros((1, 8)), leaf)) == 0)


@pytest.mark.parametrize("subscripts", ["TD,DF->TF", "TD,FD->FT", "TD,FE->TF"])
def test_einsum_refuses_other_patterns(subscripts):
    with pytest.raises(ValueError, match="contracted letters last in both"):
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
