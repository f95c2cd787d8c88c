"""GPTQ against the textbook loops in float64, on random layers with correlated inputs.

The one difference to the textbook is ours too: grids are fitted to GPTQ's loss, not to extremes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_leaves import dense_of

from lepton_jax.compression.gptq import gptq, inverse_factor
from lepton_jax.compression.quantize import make_leaf, quantize
from lepton_jax.compression.scheme import Scheme


def layer(outputs=24, inputs=48, tokens=400, seed=0):
    """A weight and the Hessian of inputs that depend on each other."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outputs, inputs))
    mixing = rng.standard_normal((inputs, inputs)) / np.sqrt(inputs)
    x = rng.standard_normal((tokens, inputs)) @ mixing * np.exp(rng.standard_normal(inputs))
    return weight.astype(np.float32), (x.T @ x / tokens).astype(np.float32)


def bf16(number):
    return np.asarray(jnp.asarray(number, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32))


def fit(rows, scheme, importance):
    """(scale, offset), each [O], of rows [O, n] by their extremes, or by the least squared error
    with each of the n inputs weighed.
    """
    top, bottom = {"int8": (127, -127), "int4": (7, -8)}[scheme.weights]
    kept = bf16 if scheme.group else np.float32
    best = None
    clips = [1 - 0.02 * i for i in range(20)] if scheme.rounding != "nearest" else [1.0]
    for clip in clips:
        if scheme.asymmetric:
            high, low = clip * rows.max(1), clip * rows.min(1)
            scale = kept((high - low) / (top - bottom))
            offset = kept(low - bottom * scale)
        else:
            scale = kept(clip * np.abs(rows).max(1) / top)
            offset = np.zeros_like(scale)
        steps = np.clip(np.round((rows - offset[:, None]) / scale[:, None]), bottom, top)
        error = ((steps * scale[:, None] + offset[:, None] - rows) ** 2) @ importance
        if best is None:
            best = [scale, offset, error]
        better = error < best[2]
        best = [np.where(better, a, b) for a, b in zip((scale, offset, error), best, strict=True)]
    return best[0], best[1]


def textbook(weight, hessian, scheme, *, damp=0.01, order=None):
    """Frantar et al., algorithm 1, without blocks; the weight that is stored, [O, I]."""
    w, h = weight.astype(np.float64), hessian.astype(np.float64)
    inputs = w.shape[1]
    order = np.arange(inputs) if order is None else order
    group = scheme.group_of(inputs) or inputs
    top, bottom = {"int8": (127, -127), "int4": (7, -8)}[scheme.weights]
    dynamic = scheme.group and np.array_equal(order, np.arange(inputs))
    h = h[order][:, order] + damp * np.mean(np.diag(h)) * np.eye(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    importance = (1 / np.diag(upper) ** 2)[np.argsort(order)]
    starts = range(0, inputs, group)
    fitted = [fit(w[:, g : g + group], scheme, importance[g : g + group]) for g in starts]
    w = w[:, order]
    result = np.zeros_like(w)
    for i in range(inputs):
        if dynamic and i % group == 0:
            part = slice(i, i + group)
            fitted[i // group] = fit(w[:, part], scheme, importance[part])
        scale, offset = fitted[order[i] // group]
        steps = np.clip(np.round((w[:, i] - offset) / scale), bottom, top)
        result[:, i] = steps * scale + offset
        error = (w[:, i] - result[:, i]) / upper[i, i]
        for j in range(i, inputs):
            w[:, j] -= error * upper[i, j]
    return result[:, np.argsort(order)]


SCHEMES = [
    Scheme("int8", rounding="gptq"),
    Scheme("int4", group=16, rounding="gptq"),
    Scheme("int4", group=16, asymmetric=True, rounding="gptq"),
    Scheme("int8", group=8, rounding="gptq"),
    Scheme("int8", group=24, asymmetric=True, rounding="gptq"),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gptq_is_the_textbooks(scheme):
    weight, hessian = layer()
    settled = gptq(weight, hessian, scheme, block=16)
    expected = textbook(weight, hessian, scheme)
    step = np.asarray(settled.grid.scale).max()
    wrong = np.abs(np.asarray(settled.weights) - expected) > 1e-4
    # float32 against float64: a value halfway between two steps may fall to either side, and what
    # follows it in its row then differs by less than a step or two
    assert wrong.any(axis=1).mean() <= 0.1
    assert np.abs(np.asarray(settled.weights) - expected).max() <= 2.5 * step


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[1]], ids=str)
def test_large_inputs_first(scheme):
    weight, hessian = layer(seed=1)
    settled = gptq(weight, hessian, scheme, block=16, act_order=True)
    expected = textbook(weight, hessian, scheme, order=np.argsort(-np.diag(hessian), kind="stable"))
    assert (np.abs(np.asarray(settled.weights) - expected) > 1e-4).any(axis=1).mean() <= 0.1


@pytest.mark.parametrize("scheme", SCHEMES[::2], ids=str)
def test_what_is_stored_is_what_was_settled_and_beats_rounding(scheme):
    weight, hessian = layer(seed=2)
    settled = gptq(weight, hessian, scheme, block=16)
    leaf = make_leaf(settled.values, settled.grid, scheme)
    np.testing.assert_allclose(dense_of(leaf), settled.weights, rtol=1e-6, atol=1e-6)
    plain = quantize(jnp.asarray(weight), dataclasses.replace(scheme, rounding="mse"))

    def loss(dense):
        error = np.asarray(dense, np.float64) - weight
        return np.einsum("oi,ij,oj->", error, hessian, error)

    assert loss(settled.weights) < 0.7 * loss(dense_of(plain))


def test_uncorrelated_inputs_leave_plain_rounding():
    weight, _ = layer()
    scheme = Scheme("int4", group=16, rounding="gptq")
    settled = gptq(weight, np.eye(48, dtype=np.float32), scheme)
    plain = quantize(jnp.asarray(weight), Scheme("int4", group=16, rounding="mse"))
    np.testing.assert_allclose(settled.weights, dense_of(plain), atol=1e-6)


def test_inputs_that_never_came_are_rounded_by_themselves():
    weight, hessian = layer()
    hessian[:, 5] = hessian[5] = 0
    settled = gptq(weight, hessian, Scheme(rounding="gptq"))
    assert np.all(np.isfinite(settled.weights))
    scale = np.asarray(settled.grid.scale)[:, 0]
    assert np.all(np.abs(np.asarray(settled.weights)[:, 5] - weight[:, 5]) <= 0.5001 * scale)


def test_pruned_weights_stay_zero_and_the_others_make_up_for_them():
    weight, hessian = layer(seed=3)
    mask = np.random.default_rng(0).random(weight.shape) < 0.5
    settled = gptq(weight, hessian, Scheme(rounding="gptq"), mask=jnp.asarray(mask))
    assert not np.any(np.asarray(settled.weights)[~mask])
    assert not np.any(np.asarray(settled.values).reshape(weight.shape)[~mask])


def test_the_factor_is_that_of_the_inverse():
    _, hessian = layer()
    upper = np.asarray(inverse_factor(jnp.asarray(hessian), 0.01), np.float64)
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(48)
    assert np.array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(48), atol=2e-3)


def test_one_program_for_layers_of_one_shape():
    before = gptq._cache_size()
    for seed in range(3):
        jax.block_until_ready(gptq(*map(jnp.asarray, layer(12, 16, seed=seed)), SCHEMES[0]))
    assert gptq._cache_size() == before + 1
