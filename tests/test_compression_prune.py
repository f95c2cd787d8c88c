"""Which weights are kept, against slow numpy, and what becomes of them: leaves, then files."""

import dataclasses

import checkpoint_makers as make
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_leaves import dense_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax.checkpoints.load import describe, load
from lepton_jax.checkpoints.orbax_store import save
from lepton_jax.compression.leaf import compress_weight
from lepton_jax.compression.presets import compress_specs, compressor
from lepton_jax.compression.prune import magnitude_mask, mask_by_score, store, store_on_grid
from lepton_jax.compression.quantize import fit_grid, in_groups, quantize, round_to_grid
from lepton_jax.compression.rules import Rule
from lepton_jax.compression.scheme import Scheme
from lepton_jax.tensors import (
    BitmaskTensor,
    BlockSparseTensor,
    NMTensor,
    ParamSpec,
    QTensor,
    einsum,
)

SHAPE = (3, 16, 32)
HALF = Scheme("keep", prune="magnitude", sparsity=0.5)
TWO_OF_FOUR = Scheme("keep", prune="magnitude", pattern="2:4")
TILES = Scheme("keep", prune="magnitude", sparsity=0.5, pattern="8x4")
PATTERNS = {"half": HALF, "2:4": TWO_OF_FOUR, "tiles": TILES}
TYPES = {"half": BitmaskTensor, "2:4": NMTensor, "tiles": BlockSparseTensor}


def weight(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def changed(scheme, **fields):
    return dataclasses.replace(scheme, **fields)


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3e38]), min_size=24, max_size=24),
    st.sampled_from([0.1, 0.3, 0.5, 0.9]),
)
@settings(max_examples=60, deadline=None)
def test_exactly_the_asked_count_is_kept_and_of_ties_the_first(numbers, sparsity):
    scores = np.asarray(numbers, np.float32).reshape(3, 8)
    scheme = changed(HALF, sparsity=sparsity)
    for per_output in (False, True):
        mask = np.asarray(mask_by_score(jnp.asarray(scores), scheme, per_output=per_output))
        compared = scores if per_output else scores.reshape(1, -1)
        for row, kept in zip(compared, mask.reshape(compared.shape), strict=True):
            count = row.size - round(sparsity * row.size)
            order = sorted(range(row.size), key=lambda i, row=row: (-row[i], i))
            assert set(np.flatnonzero(kept)) == set(order[:count])


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8"])
def test_n_of_m_keeps_the_largest_of_each_group(pattern):
    n, m = map(int, pattern.split(":"))
    w = np.round(weight() * 2)  # with ties
    mask = np.asarray(magnitude_mask(jnp.asarray(w), changed(TWO_OF_FOUR, pattern=pattern)))
    for group, kept in zip(w.reshape(-1, m), mask.reshape(-1, m), strict=True):
        order = sorted(range(m), key=lambda i, group=group: (-abs(group[i]), i))
        assert set(np.flatnonzero(kept)) == set(order[:n])


def test_tiles_are_kept_whole_by_their_norm_equally_many_in_each_row():
    w = weight()
    mask = np.asarray(magnitude_mask(jnp.asarray(w), TILES)).reshape(48, 32)
    for row in range(6):
        rows = slice(8 * row, 8 * row + 8)
        norms = [np.linalg.norm(w.reshape(48, 32)[rows, 4 * t : 4 * t + 4]) for t in range(8)]
        kept = [mask[rows, 4 * t : 4 * t + 4] for t in range(8)]
        largest = set(np.argsort(norms)[-4:])
        for t in range(8):
            assert kept[t].all() if t in largest else not kept[t].any()


@pytest.mark.parametrize("weights", ["keep", "int8"])
@pytest.mark.parametrize("name", PATTERNS)
def test_sparse_leaves_are_planned_and_stand_for_what_dense_ones_do(name, weights):
    w = jnp.asarray(weight())
    dense = compress_weight(w, changed(PATTERNS[name], weights=weights))
    scheme = changed(PATTERNS[name], weights=weights, storage="sparse")
    leaf = compress_weight(w, scheme)
    assert type(leaf) is TYPES[name]
    assert isinstance(dense, QTensor if weights == "int8" else jax.Array)
    values = dense_of(dense) if weights == "int8" else dense
    np.testing.assert_array_equal(dense_of(leaf), values)
    assert np.mean(np.asarray(values) != 0) == pytest.approx(0.5, abs=0.02)
    plan = scheme.plan(ParamSpec(SHAPE, jnp.float32, ("a", "b", "embed"), 1))
    assert jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), leaf) == plan.abstract()
    x = jnp.asarray(weight((5, 32), 1))
    exact = np.einsum("td,abd->tab", np.asarray(x), np.asarray(values))
    product = jax.jit(lambda x, leaf: einsum("TD,ABD->TAB", x, leaf))
    assert np.abs(product(x, leaf) - exact).max() <= 2e-4 * np.abs(exact).max()


def test_pruned_weights_are_zero_and_the_others_as_they_were():
    w = weight()
    kept = np.asarray(compress_weight(jnp.asarray(w), HALF))
    small = np.sort(np.abs(w).ravel())[: w.size // 2].max()
    np.testing.assert_array_equal(kept, np.where(np.abs(w) > small, w, 0))
    half = compress_weight(jnp.asarray(w, jnp.bfloat16), changed(HALF, storage="sparse"))
    assert half.values.dtype == jnp.bfloat16


def test_scales_are_those_of_kept_values():
    w = weight((4, 8))
    w[0, 0] = 100.0
    mask = np.ones_like(w, bool)
    mask[0, 0] = False
    leaf = store(jnp.asarray(w), jnp.asarray(mask), Scheme("int8", prune="wanda", sparsity=0.1))
    np.testing.assert_allclose(leaf.scale[0], np.abs(w[0, 1:]).max() / 127, rtol=1e-6)
    assert leaf.values[0, 0] == 0


@pytest.mark.parametrize("name", PATTERNS)
def test_values_on_a_grid_are_stored_as_they_are(name):
    scheme = changed(PATTERNS[name], weights="int8", storage="sparse")
    w = jnp.asarray(weight())
    mask = magnitude_mask(w, scheme)
    parts = in_groups(jnp.where(mask, w, 0), scheme)
    grid = fit_grid(parts, scheme)
    values = jnp.clip(round_to_grid(parts, grid, scheme) + 3, -127, 127)
    values = jnp.where(mask.reshape(values.shape), values, 0)
    leaf = store_on_grid(values, grid, mask, scheme)
    want = values.reshape(SHAPE) * grid.scale
    np.testing.assert_array_equal(dense_of(leaf), want)


def test_int4_groups_and_dynamic_activations_go_with_dense_storage():
    w = jnp.asarray(weight())
    for fields in (dict(weights="int4", group=8), dict(weights="int8", activations="dynamic")):
        leaf = compress_weight(w, changed(HALF, **fields))
        masked = jnp.where(magnitude_mask(w, HALF), w, 0)
        want = quantize(masked, Scheme(**fields))
        assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), leaf, want))


RULES = [
    Rule("embed|head", Scheme("keep", prune="magnitude", sparsity=0.5, storage="sparse")),
    Rule(r"layers\.0\..*", Scheme("int8", prune="magnitude", sparsity=0.5, storage="sparse")),
    Rule(r".*\.gate_up", Scheme("int8", prune="magnitude", pattern="2:4", storage="sparse")),
    Rule(r".*\.(down|out)", changed(TILES, storage="sparse")),
    Rule(".*", Scheme("keep")),
]


def test_sparse_models_load_save_and_restore_bit_by_bit(tmp_path):
    make.hf_folder(tmp_path / "hf")
    specs = describe(tmp_path / "hf").specs
    before = load(tmp_path / "hf", compress=compressor(RULES, specs))
    told = compress_specs(RULES, specs)
    for path, leaf in zip(before.model.specs, before.leaves, strict=True):
        assert leaf.nbytes == told[path].nbytes and type(leaf).__name__ in (
            type(told[path]).__name__,
            "ArrayImpl",
        )
    after = load(save(tmp_path / "saved", before))
    assert jax.tree.structure(after.leaves) == jax.tree.structure(before.leaves)
    for ours, theirs in zip(*map(jax.tree.leaves, (after.leaves, before.leaves)), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert {type(leaf) for leaf in after.leaves} >= set(TYPES.values())
    assert after.bytes == before.bytes


def test_calibrated_schemes_are_refused():
    for fields in (dict(prune="wanda", sparsity=0.5), dict(rounding="gptq")):
        with pytest.raises(ValueError, match="needs calibration.*lepton_jax.compress"):
            compress_weight(jnp.ones(SHAPE), Scheme(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(pattern="2:3"), "pattern 2:3 does not divide 32 inputs"),
        (dict(sparsity=0.5, pattern="5x4"), "5x4 do not cover 48 outputs"),
        (dict(sparsity=0.9, pattern="8x8"), "sparsity=0.9 leaves none of 4"),
        (dict(sparsity=0.9999), "leaves none of 1536"),
    ],
)
def test_patterns_that_do_not_fit_a_weight(fields, message):
    scheme = Scheme("keep", prune="magnitude", **fields)
    with pytest.raises(ValueError, match=message):
        compress_weight(jnp.ones(SHAPE), scheme)
    with pytest.raises(ValueError, match=message):
        scheme.plan(ParamSpec(SHAPE, jnp.float32, ("a", "b", "embed"), 1))
