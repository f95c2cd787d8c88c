"""Loops over layers against the same layers one after the other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from engine_reference import tiny

from lepton_jax.compression.leaf import compress_weight
from lepton_jax.compression.scheme import Scheme
from lepton_jax.kernels.attention_reference import causal_attend
from lepton_jax.models.config import NO_ROPE
from lepton_jax.models.runs import runs_of
from lepton_jax.tensors import ParamSpec, dots, matmul
from lepton_jax.tensors.chosen import ChosenLeaf, chooser

WEIGHT = ParamSpec((24, 64), jnp.float32, ("heads", "embed"), inputs=1)
SCHEMES = {
    "float32": None,
    "int8": Scheme(),
    "w8a8": Scheme(activations="dynamic"),
    "int8 in groups": Scheme(group=16),
    "int4": Scheme("int4", group=16),
    "float8": Scheme("float8"),
}


def forward(model, leaves, ids):
    decoder = model.bind(leaves)
    places = []

    def attend(*operands, layer=None, **options):
        places.append(layer)
        return causal_attend(*operands, **options)

    hidden, _ = decoder(ids, jnp.arange(ids.shape[0]), (None,) * len(model.runs), attend)
    return decoder.logits(hidden), places


def check_the_loop(model, leaves, ids, runs, **tolerance):
    """Its logits are those of the layers one after the other; how often a layer was traced."""
    looped, seen = model.in_loops(leaves), []
    assert looped.runs == runs

    def run(leaves, ids):
        logits, places = forward(looped, leaves, ids)
        seen.extend(places)
        return logits

    got = jax.jit(run)(leaves, ids)
    want = jax.jit(lambda leaves, ids: forward(model, leaves, ids)[0])(leaves, ids)
    np.testing.assert_allclose(got, want, **tolerance)
    assert [None if place is None else place.count for place in seen] == [
        None if count == 1 else count for count in runs
    ]


@pytest.mark.parametrize("case", ["llama", "qwen2", "phi3", "gemma2", "gemma3", "mixtral"])
def test_a_loop_is_the_layers_one_after_the_other(case):
    """Windows and ropes that differ from layer to layer are in one loop too."""
    model, leaves = tiny(case)
    ids = jnp.asarray(tiny_models.load(case).ids)
    check_the_loop(model, leaves, ids, (model.config.num_layers,), atol=2e-5)


def test_each_layer_may_be_stored_in_another_way():
    model, leaves = tiny("llama")
    kinds = [Scheme(), None, Scheme("int4", group=16)]
    mixed = []
    for path, leaf in zip(model.specs, leaves, strict=True):
        first, *rest = path.split(".")
        scheme = kinds[int(rest[0]) % 3] if first == "layers" and leaf.ndim > 1 else None
        mixed.append(leaf if scheme is None else compress_weight(leaf, scheme))
    ids = jnp.asarray(tiny_models.load("llama").ids)
    check_the_loop(model, tuple(mixed), ids, (model.config.num_layers,), atol=2e-4)


def test_layers_of_other_shapes_or_without_rope_are_runs_of_their_own():
    model, leaves = tiny("llama")
    config, paths = (
        dataclasses.replace(model.config, layer_ropes=(0, 0, NO_ROPE)),
        list(model.specs),
    )
    assert config.num_layers == 3
    assert runs_of(model.config, paths, leaves) == (3,)
    assert runs_of(config, paths, leaves) == (2, 1)
    shapes = dict(zip(paths, leaves, strict=True))
    shapes["layers.0.down"] = shapes["layers.0.down"][:, :-8]
    assert runs_of(model.config, paths, list(shapes.values())) == (1, 2)
    check_the_loop(
        type(model)(config, jnp.float32, jnp.float32),
        leaves,
        jnp.asarray(tiny_models.load("llama").ids),
        (2, 1),
        atol=2e-5,
    )


def test_a_tap_sees_every_layer_of_a_run():
    model, leaves = tiny("llama")
    ids = tiny_models.load("llama").ids[:8]
    attend = lambda *operands, layer=None, **options: causal_attend(*operands, **options)  # noqa: E731

    @functools.partial(jax.jit, static_argnums=0)
    def kept(each, leaves, ids, wanted):
        def tap(kept, layer, x):
            return jnp.where(layer == wanted, x, kept)

        caches = (None,) * len(each.runs)
        _, _, found = each.bind(leaves)(ids, jnp.arange(8), caches, attend, tap=tap)
        return found

    looped = model.in_loops(leaves)
    assert looped.runs != model.runs
    for layer in range(3):
        states = kept(model, leaves, ids, layer)
        assert jnp.abs(states).max() > 0
        np.testing.assert_allclose(kept(looped, leaves, ids, layer), states, atol=1e-5)
    assert not kept(looped, leaves, ids, 3).any()  # those after the last layer are no tap's


MIXTURES = [list(SCHEMES), ["int8", "int8 in groups"], ["int8", "w8a8"]]
FEW_OR_MANY = [
    *(([kind], rows) for kind in SCHEMES for rows in (1, dots.MANY_ROWS)),
    *((kinds, rows) for kinds in MIXTURES for rows in (3, dots.MANY_ROWS)),
]


@pytest.mark.parametrize(("kinds", "rows"), FEW_OR_MANY, ids=str)
def test_a_chosen_weight_is_that_weight(kinds, rows):
    rng = np.random.default_rng(0)
    leaves = []
    for index in range(3):
        array = jnp.asarray(np.float32(rng.normal(size=WEIGHT.shape)))
        scheme = SCHEMES[kinds[index % len(kinds)]]
        leaves.append(array if scheme is None else compress_weight(array, scheme))
    x = np.float32(rng.normal(size=(rows, 64)))
    choose = chooser(WEIGHT, leaves)
    product = jax.jit(lambda index: matmul.matmul(x, choose(index)))
    for index, leaf in enumerate(leaves):
        want = jax.jit(functools.partial(matmul.matmul, x))(leaf)
        np.testing.assert_allclose(product(index), want, atol=1e-5)


def test_norms_are_chosen_from_a_stack():
    spec = ParamSpec((4,), jnp.float32, ("embed",))
    choose = chooser(spec, [jnp.full(4, float(i)) for i in range(3)])
    assert [float(choose(jnp.int32(i))[0]) for i in range(3)] == [0.0, 1.0, 2.0]


def test_a_chosen_leaf_is_not_stored():
    leaf = ChosenLeaf((jnp.zeros((2, 3, 4)), jnp.ones((2, 3, 4))), jnp.int32(1))
    assert leaf.shape == (2, 3, 4) and leaf.flat(keep=1).shape == (2, 3, 4)
    np.testing.assert_array_equal(leaf.dense(jnp.float32), 1)
    with pytest.raises(ValueError, match="not stored"):
        ChosenLeaf.planned(WEIGHT)
    with pytest.raises(ValueError, match="not stored"):
        leaf.pieces(None)
    with pytest.raises(TypeError, match="not looked up"):
        leaf.taken(jnp.zeros(1, jnp.int32))
