"""Every storage type in parts: side by side they are the weight with padding, to the last bit.

Where a part can't be stored, that is an error with a reason.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_leaves import dense_of

from lepton_jax.compression.leaf import compress_weight
from lepton_jax.compression.presets import compressor
from lepton_jax.compression.rules import Rule
from lepton_jax.compression.scheme import Scheme
from lepton_jax.sharding import MeshAxis, Placement
from lepton_jax.sharding.heads import Heads
from lepton_jax.sharding.partition import cut_of, piece_plan, pieces_of, uneven_costs
from lepton_jax.tensors import BitmaskTensor, Cut, CutTwice, ParamSpec

OUT, WIDTH = 24, 96
SPEC = ParamSpec((3, OUT, WIDTH), jnp.float32, ("kv_heads", "qkv", "embed"), inputs=1)
WEIGHT = np.random.default_rng(0).normal(size=SPEC.shape).astype(np.float32)
SPARSE = dict(prune="magnitude", storage="sparse")
SCHEMES = {
    "plain": None,
    "int8": Scheme(),
    "w8a8": Scheme(activations="dynamic"),
    "int8_g32": Scheme(group=32),
    "int4_asymmetric": Scheme("int4", group=16, asymmetric=True),
    "float8": Scheme("float8"),
    "n_of_m": Scheme("keep", pattern="2:4", **SPARSE),
    "n_of_m_int8": Scheme("int8", pattern="4:8", **SPARSE),
    "bitmask": Scheme("keep", sparsity=0.6, **SPARSE),
    "bitmask_int8": Scheme("int8", sparsity=0.6, **SPARSE),
    "tiles": Scheme("keep", sparsity=0.5, pattern="8x16", **SPARSE),
}
CUTS = {
    "outputs": Cut(1, 3, 8),
    "padded outputs": Cut(0, 2, 2),
    "inputs": Cut(2, 2, 48),
    "padded inputs": Cut(2, 2, 64),
    "outputs twice": Cut(0, 6, 1, copies=2),
    "inputs twice": Cut(2, 4, 48, copies=2),
    "groups of outputs": CutTwice(1, 9, 8, Cut(0, 3, 1)),
    "groups of inputs": CutTwice(2, 6, 48, Cut(0, 3, 1)),
    "padded groups": CutTwice(2, 4, 64, Cut(0, 2, 2)),
}


@functools.cache
def leaf_of(name):
    weight = jnp.asarray(WEIGHT)
    return weight if SCHEMES[name] is None else compress_weight(weight, SCHEMES[name])


def dense(leaf):
    return np.asarray(dense_of(leaf))


def padded(array, cut):
    widths = [(0, 0)] * array.ndim
    for one in (cut, cut.outer) if isinstance(cut, CutTwice) else (cut,):
        widths[one.dim] = (0, one.along * one.share - array.shape[one.dim])
    return np.pad(array, widths)


def joined(parts, cut):
    if isinstance(cut, CutTwice):
        rows = [parts[i : i + cut.along] for i in range(0, cut.parts, cut.along)]
        return np.concatenate([np.concatenate(row, cut.dim) for row in rows], cut.outer.dim)
    return np.concatenate(parts, cut.dim)


# Sparse leaves are packed anew from parts of the weight, which are made alike for all of them.
PACKED_ANEW = ("outputs", "padded outputs", "padded inputs", "groups of inputs")
CASES = [
    (name, how)
    for name, scheme in SCHEMES.items()
    for how in (PACKED_ANEW if scheme and scheme.storage == "sparse" else CUTS)
]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_parts_side_by_side_are_the_weight(name, how):
    leaf, cut = leaf_of(name), CUTS[how]
    pieces = pieces_of(leaf, cut)
    shapes = [jax.tree.map(jnp.shape, piece) for piece in pieces]
    assert len(pieces) == cut.parts and all(shape == shapes[0] for shape in shapes)
    for copy in range(cut.copies):
        whole = joined([dense(piece) for piece in pieces[copy :: cut.copies]], cut)
        np.testing.assert_array_equal(whole, padded(dense(leaf), cut))


@pytest.mark.parametrize(("name", "how"), CASES)
def test_the_plan_of_a_part_is_what_the_part_becomes(name, how):
    cut, scheme = CUTS[how], SCHEMES[name]
    plan = SPEC if scheme is None else scheme.plan(SPEC)
    plan, piece = piece_plan(plan, SPEC, cut), pieces_of(leaf_of(name), cut)[0]
    assert plan.shape == piece.shape == cut.shape(SPEC.shape)
    if isinstance(piece, BitmaskTensor):  # how many it keeps is known once there are values
        kept = piece.values.shape[0]
        assert plan.values.shape[0] == pytest.approx(kept, rel=0.25 if "padded" not in how else 1)
        plan = dataclasses.replace(plan, values=dataclasses.replace(plan.values, shape=(kept,)))
    if name != "tiles":  # so many tiles are kept by inputs as the fullest row needs
        planned = jax.tree.map(lambda spec: (tuple(spec.shape), jnp.dtype(spec.dtype)), plan)
        assert planned == jax.tree.map(lambda a: (a.shape, a.dtype), piece)


def test_smaller_groups_where_a_cut_goes_through_one():
    leaf = leaf_of("int4_asymmetric")
    pieces = leaf.pieces(Cut(2, 4, 24))
    assert leaf.group == 16 and pieces[0].group == 8
    whole = np.concatenate([dense(piece) for piece in pieces], axis=2)
    np.testing.assert_array_equal(whole, dense(leaf))
    with pytest.raises(ValueError, match="groups of 16 packed inputs, 3 in a part"):
        leaf.pieces(Cut(2, 32, 3))


@pytest.mark.parametrize("name", SCHEMES)
def test_parts_of_the_inputs_add_up(name):
    leaf = leaf_of(name)
    x = np.float32(np.random.default_rng(1).normal(size=(4, WIDTH)))

    @jax.jit
    def product(piece, x):
        if isinstance(piece, jax.Array):
            return x @ piece.reshape(-1, x.shape[1]).T
        return piece.flat().matmul(x)

    pieces = pieces_of(leaf, Cut(2, 2, 48))
    added = sum(product(piece, part) for piece, part in zip(pieces, np.split(x, 2, 1), strict=True))
    exact = x @ dense(leaf).reshape(-1, WIDTH).T
    slack = 0.2 if name in ("w8a8", "float8", "int8_g32", "int4_asymmetric") else 2e-3
    np.testing.assert_allclose(added, exact, atol=slack)


@pytest.mark.parametrize(
    ("name", "parts", "said"),
    [("n_of_m", 4, "2:4 does not fit"), ("bitmask", 8, "multiples of 8"), ("tiles", 4, "8x20")],
)
def test_what_cannot_be_cut_says_why_and_what_to_change(name, parts, said):
    spec = dataclasses.replace(SPEC, axes=("a", "b", "ffn"), shape=(3, OUT, 40))
    scheme = SCHEMES[name]
    if name == "tiles":
        scheme = dataclasses.replace(scheme, pattern="8x20")
    leaf = compress_weight(jnp.asarray(WEIGHT[..., :40]), scheme)
    placement = Placement(jax.devices()[:parts])
    with pytest.raises(ValueError, match=f"along ffn into {parts} parts .*{said}.*Set mesh.model"):
        placement.put(spec, leaf)


def test_tiles_that_cross_experts_are_refused_before_they_are_made_and_cut():
    axes = ("experts", "gate_up", "expert_ffn", "embed")
    spec = ParamSpec((4, 2, 32, 16), jnp.float32, axes, inputs=1)
    tall, leaf = Scheme("keep", sparsity=0.5, pattern="128x8", **SPARSE), jnp.ones(spec.shape)
    with pytest.raises(ValueError, match="tiles of 128 outputs do not divide those of one expert"):
        compressor([Rule("w", tall)], {"w": spec})
    leaf = compress_weight(leaf, dataclasses.replace(tall, pattern="32x8"))
    assert len(jax.tree.leaves(Placement(jax.devices()[:2]).put(spec, leaf))) == 2
    said = "tiles of 32 outputs do not divide those of one expert. Set mesh.model lower"
    with pytest.raises(ValueError, match=f"for mesh.model=4: {said}"):
        Placement(jax.devices()[:4]).put(spec, leaf)


def test_the_table_names_one_dimension_and_keeps_heads_together():
    axis = MeshAxis(size=2)
    heads = ParamSpec((32, 3 * 4 * 16), jnp.float32, ("embed", "heads"), inputs=1)
    assert cut_of(heads, axis, Heads(3, 4, 16)) == Cut(1, 2, 128)
    assert cut_of(SPEC, axis, Heads(3, 4, 16)) == cut_of(SPEC, axis, None) == Cut(0, 2, 2)
    assert cut_of(ParamSpec((8,), jnp.float32, ("embed",)), axis, None) is None
    axis = MeshAxis(size=8, banks=2)  # four devices a bank: three kv heads and one of zeros
    assert cut_of(heads, axis, Heads(3, 4, 16)) == Cut(1, 8, 64, copies=2)
    assert cut_of(SPEC, axis, Heads(3, 4, 16)) == Cut(0, 8, 1, copies=2)
    both = ParamSpec((8, 8), jnp.float32, ("ffn", "vocab"))
    with pytest.raises(ValueError, match="'ffn', 'vocab'.* would all be cut along mesh.model"):
        cut_of(both, axis, None)


# kv heads of Llama 3.1 70B, Qwen2.5 7B, Gemma 3 1B, SmolLM2; devices; banks.
@pytest.mark.parametrize(
    ("kv_heads", "devices", "banks"),
    [(8, 8, 1), (8, 16, 2), (4, 8, 2), (1, 4, 4), (3, 4, 1), (3, 8, 2), (3, 7, 1), (2, 6, 3)],
)
def test_as_many_banks_as_leave_no_device_without_a_kv_head(kv_heads, devices, banks):
    assert Heads(kv_heads, 4, 64).banks(devices) == banks
    axis = Placement(jax.devices()[:devices], Heads(kv_heads, 4, 64)).axis if devices < 9 else None
    assert axis is None or (axis.banks, axis.kv_share(kv_heads)) == (banks, 1)


def test_what_does_not_divide_says_what_it_costs():
    specs = {
        "qkv": SPEC,
        "gate_up": ParamSpec((2, 56, 32), jnp.float32, ("gate_up", "ffn", "embed")),
    }
    heads = Heads(3, OUT - 2, 16)
    assert uneven_costs(specs, MeshAxis(size=2), heads) == [
        "mesh.model=2 for 3 kv heads: padded to 4, 33 % more attention and cache"
    ]
    assert uneven_costs(specs, MeshAxis(size=3), heads) == [
        "56 ffn padded to 57 for mesh.model=3: 1.8 % more of what works on the ffn"
    ]
    assert uneven_costs({}, MeshAxis(size=8, banks=2), heads) == [
        "mesh.model=8 for 3 kv heads: 2 banks, each with its own rows' cache and with all weights "
        "around attention; padded to 4, 33 % more attention and cache"
    ]
