"""The product of experts: its kernel for TPU equals `by_expert`, and both a loop in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_leaves import dense_of

from lepton_jax.compression.leaf import compress_weight
from lepton_jax.compression.scheme import Scheme
from lepton_jax.tensors import QTensor, ragged_dots, ragged_dots_tpu

SHAPES = {"plain": (128, 256), "blocks": (384, 8192), "turned": (256, 96)}  # O, I
E = 5
GROUPED = {
    "int4": (128, Scheme("int4", group=128)),
    "int4-offset": (64, Scheme("int4", group=64, asymmetric=True)),
    "int8-grouped": (32, Scheme(group=32)),
}


def weights(kind, shape):
    """An `[E, O, I]` leaf or array, and what it stands for."""
    rng = np.random.default_rng(0)
    if kind in ("float32", "bfloat16"):
        w = jnp.asarray(np.float32(rng.normal(size=(E, *shape))).astype(jnp.dtype(kind)))
        return w, np.asarray(w, np.float64)
    if kind in GROUPED:
        group, scheme = GROUPED[kind]
        leaf = compress_weight(jnp.asarray(np.float32(rng.normal(size=(E, *shape)))), scheme)
        assert leaf.group == group
        return leaf, np.asarray(dense_of(leaf), np.float64)
    scale = jnp.asarray(np.float32(rng.uniform(0.5, 1, size=(E, shape[0])) / 64))
    if kind == "float8":
        values = np.float32(rng.normal(size=(E, *shape)) * 64).astype(jnp.float8_e4m3fn)
    else:
        values = rng.integers(-127, 128, (E, *shape), np.int8)
    values = jnp.asarray(values)
    static = jnp.float32(4 / 127) if kind == "static" else None
    leaf = QTensor(values, scale, 16 if kind in ("int8", "float8") else 8, act_scale=static)
    return leaf, np.asarray(dense_of(leaf), np.float64)


def rows(sizes, inputs, spare=0):
    x = np.random.default_rng(1).normal(size=(sum(sizes) + spare, inputs))
    return np.float32(np.clip(x, -4, 4))


def exact(x, dense, sizes):
    parts = np.split(np.asarray(x, np.float64), np.cumsum(sizes)[:-1])
    return np.concatenate([part @ w.T for part, w in zip(parts, dense, strict=True)])


def error(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


TOLERANCES = {
    "float32": 1e-6,
    "bfloat16": 5e-3,
    "int8": 5e-3,
    "w8a8": 2e-2,
    "static": 3e-2,
    "float8": 5e-3,
    "int4": 1e-2,
    "int4-offset": 1e-2,
    "int8-grouped": 1e-2,
}


@pytest.mark.parametrize(
    ("kind", "shape"), [(k, "plain") for k in TOLERANCES] + [("int8", "blocks"), ("int8", "turned")]
)
def test_the_interpreted_kernel_equals_the_loop_and_numpy(kind, shape):
    w, dense = weights(kind, SHAPES[shape])
    sizes = [3, 0, 20, 1, 9]
    x = rows(sizes, SHAPES[shape][1])
    assert ragged_dots_tpu.takes(w)
    got = ragged_dots_tpu.kernel_dot(x, w, np.int32(sizes), interpret=True)
    loop = jax.jit(ragged_dots.by_expert)(x, w, np.int32(sizes))
    want = exact(x, dense, sizes)
    assert error(got, want) < TOLERANCES[kind] and error(loop, want) < TOLERANCES[kind]


@pytest.mark.parametrize(
    "sizes", [[0, 0, 0, 0, 33], [33, 0, 0, 0, 0], [1, 0, 0, 0, 0], [16, 16, 16, 16, 16], [0] * 5]
)
def test_groups_of_any_size_and_chunks_of_rows(sizes, monkeypatch):
    monkeypatch.setattr(ragged_dots_tpu, "ROWS_BYTES", 16 * 1024)  # 16 rows stay at a time
    w, dense = weights("int8", SHAPES["plain"])
    x = rows(sizes, SHAPES["plain"][1], spare=87 - sum(sizes))  # of one size: one program
    want = exact(x[: sum(sizes)], dense, sizes)
    kernel = ragged_dots_tpu.kernel_dot.__wrapped__  # its jit would remember the chunks
    for got in (
        jax.jit(functools.partial(kernel, interpret=True))(x, w, np.int32(sizes)),
        jax.jit(ragged_dots.by_expert)(x, w, np.int32(sizes)),
    ):
        assert got.shape == (len(x), dense.shape[1]) and np.isfinite(got).all()
        if sum(sizes):
            assert error(got[: sum(sizes)], want) < TOLERANCES["int8"]


def test_only_experts_with_rows_are_fetched_and_each_once_a_chunk():
    sizes = jnp.asarray([0, 5, 0, 30, 0, 0, 13])
    visits, (expert, begin, end) = ragged_dots_tpu._schedule(sizes, 48, 16)
    assert visits == 7
    expert, begin, end = (np.asarray(a).reshape(3, 7) for a in (expert, begin, end))
    assert [list(dict.fromkeys(chunk)) for chunk in expert.tolist()] == [[1, 3], [3], [3, 6]]
    assert (end - begin).sum(axis=1).tolist() == [16, 16, 16]
    assert ((end - begin) > 0).sum() == 5


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_gradients_are_those_of_the_dense_weights(kind):
    w, dense = weights(kind, (8, 16))  # the XLA of jax 0.8.1 can't compile int8 products of 64
    sizes = [3, 0, 2, 1, 1]
    x = rows(sizes, 16)

    each = dense[np.repeat(range(E), sizes)]
    want = np.einsum("mo,moi->mi", np.cos(exact(x, dense, sizes)), each)

    def ours(x):
        return jnp.sum(jnp.sin(ragged_dots.ragged_dot(x, w, np.int32(sizes))))

    np.testing.assert_allclose(jax.jit(jax.grad(ours))(x), want, atol=2e-3)
