"""Sparse leaves: exact packings, promised bytes, the products of the weight they stand for.

Masks and weights are numpy's; the packings are checked against slow loops over their definition.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax.tensors import (
    BitmaskTensor,
    BlockSparseTensor,
    NMTensor,
    ParamSpec,
    bitmask,
    einsum,
    einsum_parts,
    nm,
    ragged_einsum,
    take,
    tile_dots,
    tile_dots_tpu,
)
from lepton_jax.tensors.tile_dots import gathered_dot, tiled_dot

KINDS = ["bitmask", "2:4", "4:8", "tiles"]
DTYPES = ["float32", "bfloat16", "int8"]
# Both N:M kinds are one code: what one of them computes in a dtype, the other does too.
STORED = [(kind, dtype) for kind in KINDS for dtype in DTYPES]
STORED = [pair for pair in STORED if pair not in (("2:4", "bfloat16"), ("4:8", "int8"))]


@jax.jit
def spread(leaf):
    return leaf.spread()


def random_weight(shape, dtype, seed=0):
    """Values of a dtype `[*out, I]`, and a scale `[*out]` where they are int8."""
    rng = np.random.default_rng(seed)
    if dtype == "int8":
        scale = jnp.asarray(np.float32(rng.uniform(0.5, 2, shape[:-1])))
        return jnp.asarray(rng.integers(-127, 128, shape, np.int8)), scale
    return jnp.asarray(rng.normal(size=shape).astype(jnp.dtype(dtype))), None


def n_of_m_mask(shape, n, m, seed=0):
    order = np.argsort(np.random.default_rng(seed).random((*shape[:-1], shape[-1] // m, m)))
    return (order < n).reshape(shape)


def tile_choice(tile_rows, columns, kept, seed=0):
    return np.argsort(np.random.default_rng(seed).random((tile_rows, columns))) < kept


def sparse(kind, shape, dtype, seed=0):
    """A leaf and, by hand, the float64 weight that it stands for."""
    values, scale = random_weight(shape, dtype, seed)
    if kind == "tiles":
        chosen = tile_choice(int(np.prod(shape[:-1])) // 8, shape[-1] // 4, 3, seed)
        leaf = BlockSparseTensor.of(values, chosen, scale, kept=3)
        mask = np.repeat(np.repeat(chosen, 8, 0), 4, 1).reshape(shape)
    elif kind == "bitmask":
        mask = np.random.default_rng(seed).random(shape) < 0.4
        leaf = BitmaskTensor.of(values, mask, scale, kept=int(mask.sum()))
    else:
        n, m = map(int, kind.split(":"))
        mask = n_of_m_mask(shape, n, m, seed)
        leaf = NMTensor.of(values, mask, scale, n=n, m=m)
    wide = np.asarray(values, np.float64) * mask
    return leaf, wide if scale is None else wide * np.asarray(scale, np.float64)[..., None]


@pytest.mark.parametrize(("kind", "dtype"), STORED)
def test_products_are_those_of_the_weight_they_stand_for(kind, dtype):
    leaf, dense = sparse(kind, (2, 24, 32), dtype)
    assert leaf.shape == dense.shape

    @jax.jit
    def products(x, w):
        parts = einsum_parts("TD,CFD->CTF", x, w)
        return w.dense(jnp.float32), einsum("TD,CFD->TCF", x, w), jnp.stack(parts, 1)

    for rows in (1, 5):
        x = np.random.default_rng(rows).normal(size=(rows, 32))
        exact = np.einsum("td,cfd->tcf", x, dense)
        tolerance = (2e-2 if dtype == "bfloat16" else 2e-4) * np.abs(exact).max()
        whole, got, parts = products(np.float32(x), leaf)
        np.testing.assert_allclose(whole, dense, rtol=1e-6)
        assert got.dtype == jnp.float32 and np.abs(got - exact).max() <= tolerance
        assert np.abs(parts - exact).max() <= tolerance


@pytest.mark.parametrize(("kind", "dtype"), STORED)
def test_experts_and_rows(kind, dtype):
    leaf, dense = sparse(kind, (3, 2, 8, 32), dtype)
    x, sizes = np.random.default_rng(1).normal(size=(7, 32)), np.array([3, 0, 4])
    exact = np.einsum("td,tcfd->tcf", x, dense[np.repeat(np.arange(3), sizes)])
    product = jax.jit(lambda x, w, sizes: ragged_einsum("TD,ECFD->TCF", x, w, sizes))
    got = product(np.float32(x), leaf, np.int32(sizes))
    assert np.abs(got - exact).max() <= 1e-2 * np.abs(exact).max()
    table, dense = sparse(kind, (24, 32), dtype)
    ids = np.int32([[0, 23], [9, 500]])
    got = jax.jit(lambda table, ids: take(table, ids, jnp.float32))(table, ids)
    np.testing.assert_allclose(got, dense[np.asarray([[0, 23], [9, 23]])], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_activations_are_those_of_the_dense_weight(kind):
    leaf, dense = sparse(kind, (16, 32), "float32")
    x = np.float32(np.random.default_rng(2).normal(size=(3, 32)))

    def total(x, w):
        return jnp.sum(jnp.sin(einsum("TD,FD->TF", x, w)))

    slope = jax.jit(jax.grad(total))(x, leaf)
    np.testing.assert_allclose(slope, np.cos(x @ dense.T) @ dense, atol=1e-4)


SHAPE = (4, 48, 64)
WEIGHTS, OUTPUTS = 4 * 48 * 64, 4 * 48
BYTES = {
    "bitmask": lambda size, leaf: WEIGHTS / 8 + leaf.values.size * size + 4 * OUTPUTS,
    "2:4": lambda size, leaf: WEIGHTS / 2 * (size + 2 / 8),
    "4:8": lambda size, leaf: WEIGHTS / 2 * (size + 4 / 8),
    "tiles": lambda size, leaf: WEIGHTS * 3 / 16 * (size + 4 / 32),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_what_the_format_promises_and_the_plan_tells(kind, dtype):
    leaf, _ = sparse(kind, SHAPE, dtype)
    size = jnp.dtype(dtype).itemsize
    scales = 4 * OUTPUTS if dtype == "int8" else 0
    assert leaf.nbytes == BYTES[kind](size, leaf) + scales
    if kind == "bitmask":
        assert leaf.values.size == np.count_nonzero(np.random.default_rng(0).random(SHAPE) < 0.4)
    spec = ParamSpec(SHAPE, jnp.float32, ("a", "b", "embed"), 1)
    planned = type(leaf).planned(spec, **leaf.static())
    made = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), leaf)
    assert planned.abstract() == made and planned.nbytes == leaf.nbytes
    assert planned.shape == SHAPE and planned.static() == leaf.static()
    for field in jax.tree.leaves(planned):
        assert len(field.axes) == len(field.shape)


# Few shapes and dtypes at a time: each is a compilation.
shapes = st.sampled_from([(1, 1, 2), (3, 4, 3)])
dtypes = st.sampled_from(["bfloat16", "int8"])


# Of each two of shape, share and dtype all pairs.
bitmasks = st.sampled_from(
    [
        ((1, 1, 2), 0, "bfloat16"),
        ((1, 1, 2), 0.4, "int8"),
        ((1, 1, 2), 1, "bfloat16"),
        ((3, 4, 3), 0, "int8"),
        ((3, 4, 3), 0.4, "bfloat16"),
        ((3, 4, 3), 1, "int8"),
    ]
)


@given(bitmasks, st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_bitmask_packing_is_exact(stored, seed):
    shape, share, dtype = stored
    shape = (*shape[:2], 8 * shape[2])
    values, _ = random_weight(shape, dtype, seed)
    kept = max(1, int(share * values.size))
    mask = np.random.default_rng(seed).permutation(values.size).reshape(shape) < kept
    leaf = BitmaskTensor.of(values, mask, kept=kept)
    kept, stored, before = iter(np.asarray(leaf.values)), np.asarray(leaf.mask), np.asarray(values)
    count = shape[-1] // 8
    for place in np.ndindex(*shape[:-1], count, 8):  # the docstring, spelt out
        *row, j, i = place
        bit = (stored[(*row, j)] >> i) & 1
        assert bit == mask[(*row, i * count + j)]
        if bit:
            assert next(kept) == before[(*row, i * count + j)]
    assert_bits_equal(spread(leaf), values, mask)


@given(
    st.sampled_from([(1, 2), (2, 4), (3, 4), (5, 8)]),
    dtypes,
    st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_n_of_m_packing_is_exact(pattern, dtype, seed):
    (n, m), outs, shape = pattern, 3, (3, 32)
    values, _ = random_weight(shape, dtype, seed)
    mask = n_of_m_mask(shape, n, m, seed)
    leaf = NMTensor.of(values, mask, n=n, m=m)
    bits, size, count = (2 if m <= 4 else 4), leaf.indices.shape[-1], shape[-1] // m
    indices, kept, before = map(np.asarray, (leaf.indices, leaf.values, values))
    for out in range(outs):
        for group in range(count):
            for rank, i in enumerate(np.flatnonzero(mask[out].reshape(count, m)[group])):
                place = rank * count + group
                assert (indices[out, place % size] >> (place // size * bits)) % 2**bits == i
                assert kept[out, place] == before[out, group * m + i]
    assert_bits_equal(spread(leaf), values, mask)


@given(shapes, st.integers(1, 2), dtypes, st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_tile_packing_is_exact(shape, kept, dtype, seed):
    outs, tile_rows, columns = shape
    shape = (outs, 4 * tile_rows, 3 * columns)
    values, _ = random_weight(shape, dtype, seed)
    chosen = tile_choice(outs * tile_rows, columns, kept, seed)
    leaf = BlockSparseTensor.of(values, chosen, kept=kept)
    tiles = np.asarray(leaf.tiles)
    stored = np.asarray(leaf.values).reshape(len(tiles), 4, kept, 3)
    before = np.asarray(values).reshape(len(tiles), 4, columns, 3)
    for row, choice in enumerate(chosen):
        assert list(tiles[row]) == list(np.flatnonzero(choice))
        np.testing.assert_array_equal(stored[row], before[row][:, choice])
    mask = np.repeat(np.repeat(chosen, 4, 0), 3, 1).reshape(shape)
    assert_bits_equal(spread(leaf), values, mask)


def assert_bits_equal(got, values, mask):
    assert got.dtype == values.dtype
    values = np.asarray(values)
    assert np.asarray(got).tobytes() == np.where(mask, values, values.dtype.type(0)).tobytes()


def test_groups_that_keep_fewer_are_filled_with_zeros():
    mask = np.array([[1, 0, 0, 0, 0, 0, 0, 0] + [0, 1, 1, 0] * 2], bool)
    values = np.arange(1, 17, dtype=np.float32)[None]
    leaf = NMTensor.of(values, mask, n=2, m=4)
    np.testing.assert_array_equal(spread(leaf), np.where(mask, values, 0))


@pytest.mark.parametrize(
    ("cls", "shape", "static", "message"),
    [
        (BitmaskTensor, (4, 12), dict(kept=3), "multiples of 8, not 12"),
        (BitmaskTensor, (4, 16), dict(kept=0), "kept=0: want 1 to 64"),
        (BitmaskTensor, (4, 16), dict(kept=65), "kept=65: want 1 to 64"),
        (BitmaskTensor, (4, 16), dict(kept=3, values="int4"), "values='int4': allowed are float32"),
        (NMTensor, (4, 16), dict(n=4, m=4), "4:4: want 0 < N < M <= 16"),
        (NMTensor, (4, 18), dict(n=2, m=4), "2:4 does not fit 18 inputs"),
        (NMTensor, (4, 8), dict(n=1, m=4), "1:4 does not fit 8 inputs.*whole bytes of 4"),
        (BlockSparseTensor, (6, 16), dict(height=4, width=4, kept=1), "4x4 do not cover 6 outputs"),
        (BlockSparseTensor, (8, 16), dict(height=4, width=4, kept=5), "kept=5: want 1 to 4 tiles"),
        (BlockSparseTensor, (3, 4, 16), dict(height=6, width=4, kept=2), "those of one expert"),
    ],
)
def test_plans_that_can_not_be(cls, shape, static, message):
    axes = ("experts", "ffn", "embed")[-len(shape) :]
    with pytest.raises(ValueError, match=message):
        cls.planned(ParamSpec(shape, jnp.float32, axes, 1), **static)


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_interpreted_equals_the_gather(rows, dtype):
    values, _ = random_weight((96, 48), dtype)
    chosen = tile_choice(3, 6, 3)
    tiles = jnp.asarray([np.flatnonzero(row) for row in chosen], jnp.int32)
    assert tile_dots_tpu.fits(values, tiles)
    x = np.float32(np.random.default_rng(3).normal(size=(rows, 96)))
    got = tile_dots_tpu.kernel_dot(x, values, tiles, interpret=True)
    want = jax.jit(gathered_dot)(x, values, tiles)
    assert got.shape == want.shape == (rows, 96) and got.dtype == want.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_the_kernel_has_the_gradient_of_the_gather(monkeypatch):
    kernel = functools.partial(tile_dots_tpu.kernel_dot, interpret=True)
    monkeypatch.setattr(tile_dots_tpu, "kernel_dot", kernel)
    tiles = jnp.asarray([[0, 2], [1, 2]], jnp.int32)
    for dtype in ("float32", "int8"):
        values, _ = random_weight((64, 16), dtype)
        x = jnp.asarray(np.random.default_rng(4).normal(size=(3, 24)), jnp.float32)
        both = (0, 1) if dtype == "float32" else (0,)

        def slopes(dot, values=values, x=x, both=both):
            total = jax.grad(lambda x, v: jnp.sum(jnp.sin(dot(x, v, tiles))), both)
            return jax.jit(total)(x, values)

        for got, want in zip(slopes(tile_dots._kernel_dot), slopes(gathered_dot), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_accelerators_compute_equals_what_a_cpu_does(dtype):
    x = jnp.asarray(np.random.default_rng(6).normal(size=(3, 8192)), jnp.float32)
    leaf, _ = sparse("bitmask", (384, 8192), dtype)  # three blocks of outputs
    ways = bitmask._dot_by_outputs, bitmask._whole_dot
    pairs = [[jax.jit(way)(x, leaf) for way in ways]]
    leaf, _ = sparse("2:4", (24, 8192), dtype)
    pairs.append([jax.jit(way)(x, leaf) for way in (nm._dot_per_place, nm._one_dot)])
    for got, want in pairs:
        tolerance = (1e-2 if dtype == "bfloat16" else 3e-4) * np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=tolerance)


def test_what_the_kernel_does_not_take():
    def taken(outputs, kept, tile_rows, count):
        values = jax.ShapeDtypeStruct((outputs, kept), jnp.float32)
        return tile_dots_tpu.fits(values, jax.ShapeDtypeStruct((tile_rows, count), jnp.int32))

    assert taken(64, 1024, 2, 8)
    assert not taken(64, 1024, 4, 8)  # tiles of 16 outputs
    assert not taken(64, 1024, 2, 256)
    assert not taken(2**20, 1024, 2**15, 8)


def test_less_work_with_fewer_tiles():
    """The compiled product's operations fall with k/N, which a masked dense product's don't."""

    def flops(kept):
        values, tiles = jnp.zeros((768, 32 * kept)), jnp.zeros((4, kept), jnp.int32)
        compiled = jax.jit(tiled_dot).lower(jnp.zeros((8, 512)), values, tiles).compile()
        return compiled.cost_analysis()["flops"]

    assert 0.45 < flops(8) / flops(16) < 0.55 and 0.2 < flops(4) / flops(16) < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_programs_are_asked_not_to_decompress_ahead(kind):
    """XLA of jax 0.12 heeds it on a CPU; that of 0.10.2 still decompresses all layers first."""
    leaf, _ = sparse(kind, (32, 32), "float32")

    def layers(x):
        return einsum("TD,FD->TF", einsum("TD,FD->TF", x, leaf), leaf)

    assert jax.jit(layers).lower(jnp.zeros((2, 32))).as_text().count("optimization_barrier") == 2
