"""SparseGPT against the textbook loops in float64, on random layers with correlated inputs."""

import dataclasses

import numpy as np
import pytest
from dense_leaves import dense_of
from test_compression_gptq import fit, layer

from lepton_jax.compression.quantize import make_leaf
from lepton_jax.compression.scheme import Scheme, planned_leaf
from lepton_jax.compression.sparsegpt import sparsegpt
from lepton_jax.tensors import ParamSpec

TOPS = {"int8": (127, -127), "int4": (7, -8)}


def textbook(weight, hessian, scheme, *, block, damp=0.01):
    """Frantar & Alistarh, algorithm 1: the weight that is stored, `[O, I]`."""
    w, h = weight.astype(np.float64), hessian.astype(np.float64)
    outputs, inputs = w.shape
    h = h + damp * np.mean(np.diag(h)) * np.eye(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    quantized = scheme.weights in TOPS
    if quantized and not scheme.group:
        scale, _ = fit(w, scheme, np.ones(inputs))
    result, mask = np.zeros_like(w), np.ones(w.shape, bool)
    for start in range(0, inputs, block):
        stop = start + block
        if scheme.pattern == "unstructured":
            losses = [
                ((w[o, i] / upper[i, i]) ** 2, o, i)
                for o in range(outputs)
                for i in range(start, stop)
            ]
            for _, o, i in sorted(losses)[: round(scheme.sparsity * len(losses))]:
                mask[o, i] = False
        if quantized and scheme.group:
            part = np.where(mask[:, start:stop], w[:, start:stop], 0)
            scale, _ = fit(part, scheme, np.ones(block))
        for i in range(start, stop):
            if scheme.pattern != "unstructured":
                keep, among = map(int, scheme.pattern.split(":"))
                if i % among == 0:
                    for o in range(outputs):
                        losses = [(w[o, j] / upper[j, j]) ** 2 for j in range(i, i + among)]
                        for j in np.argsort(losses)[: among - keep]:
                            mask[o, i + j] = False
            column = w[:, i]
            if quantized:
                top, bottom = TOPS[scheme.weights]
                column = np.clip(np.round(column / scale), bottom, top) * scale
            result[:, i] = np.where(mask[:, i], column, 0)
            error = (w[:, i] - result[:, i]) / upper[i, i]
            for j in range(i, inputs):
                w[:, j] -= error * upper[i, j]
    return result


SCHEMES = [
    Scheme("keep", prune="sparsegpt", sparsity=0.5),
    Scheme("keep", prune="sparsegpt", pattern="2:4"),
    Scheme("keep", prune="sparsegpt", sparsity=0.75, pattern="1:4"),
    Scheme("int8", prune="sparsegpt", sparsity=0.3),
    Scheme("int8", prune="sparsegpt", sparsity=0.5, pattern="4:8"),
    Scheme("int4", group=16, prune="sparsegpt", sparsity=0.5, pattern="2:4"),
    Scheme("int4", group=16, prune="sparsegpt", sparsity=0.5),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_sparsegpt_is_the_textbooks(scheme):
    weight, hessian = layer()
    settled, mask = sparsegpt(weight, hessian, scheme, block=16)
    found, expected = np.asarray(settled.weights), textbook(weight, hessian, scheme, block=16)
    # rounding may fall to the other side of a tie in float32, which changes what follows in its row
    wrong = (np.abs(found - expected) > 1e-4).any(axis=1).mean()
    assert wrong <= (0.1 if settled.grid is not None else 0.0)
    assert not np.any(found[~np.asarray(mask)])


@pytest.mark.parametrize("scheme", [SCHEMES[2], SCHEMES[4], SCHEMES[6]], ids=str)
def test_the_mask_has_the_pattern_and_storage_keeps_it(scheme):
    weight, hessian = layer(outputs=20, inputs=64, seed=4)
    settled, mask = sparsegpt(weight, hessian, scheme, block=32)
    mask = np.asarray(mask)
    if scheme.pattern == "unstructured":
        size = 16 if scheme.group else 32
        kept = mask.reshape(20, -1, size).sum(axis=(0, 2))
        assert np.all(kept == 20 * size - round(scheme.sparsity * 20 * size))
    else:
        keep, among = map(int, scheme.pattern.split(":"))
        assert np.all(mask.reshape(-1, among).sum(axis=1) == keep)
    if settled.grid is not None:
        leaf = make_leaf(settled.values, settled.grid, scheme)
        np.testing.assert_allclose(dense_of(leaf), settled.weights, rtol=1e-6, atol=1e-6)


def test_what_is_kept_makes_up_for_what_is_not():
    weight, hessian = layer(outputs=40, inputs=96, seed=2)
    settled, mask = sparsegpt(weight, hessian, SCHEMES[0])

    def loss(dense):
        error = np.asarray(dense, np.float64) - weight
        return np.einsum("oi,ij,oj->", error, hessian, error)

    assert loss(settled.weights) < 0.75 * loss(np.where(mask, weight, 0))


def test_blocks_are_multiples_of_m():
    weight, hessian = layer(outputs=12, inputs=96)
    scheme = Scheme("keep", prune="sparsegpt", pattern="8:16")
    settled, mask = sparsegpt(weight, hessian, scheme, block=24)  # the largest that fits is 16
    assert np.all(np.asarray(mask).reshape(-1, 16).sum(axis=1) == 8)
    expected = textbook(weight, hessian, scheme, block=16)
    np.testing.assert_allclose(settled.weights, expected, atol=1e-4)


def test_groups_that_m_does_not_divide_are_refused_before_anything_is_read():
    scheme = Scheme("int4", group=6, prune="sparsegpt", pattern="2:4")
    with pytest.raises(ValueError, match="pattern 2:4 does not divide groups of 6 inputs"):
        sparsegpt(*layer(), scheme)
    spec = ParamSpec((4, 96), np.dtype(np.float32), ("out", "in"), inputs=1)
    with pytest.raises(ValueError, match=r"^layers\.0\.down: .* groups of 6 inputs.*another group"):
        planned_leaf("layers.0.down", spec, scheme)
    wanda = dataclasses.replace(scheme, prune="wanda")  # compares all inputs at once
    assert planned_leaf("layers.0.down", spec, wanda).group == 6
