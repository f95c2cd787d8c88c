"""Recovery on a tiny model: what trains and what stays, the loss by hand, going on, stopping."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from dense_leaves import dense_of
from engine_reference import tiny

from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.compression import recover
from lepton_jax.compression.calibrate import compress_layers
from lepton_jax.compression.quality import reference
from lepton_jax.compression.recipe import parse_rule
from lepton_jax.compression.trainable import Trainable, _gathered
from lepton_jax.compression.training import Training
from lepton_jax.compression.window_loss import WindowLoss
from lepton_jax.config import RecoverySection
from lepton_jax.tensors import BitmaskTensor, BlockSparseTensor, CompressedTensor, NMTensor

MODEL, LEAVES = tiny("llama", layers=1)
LEAVES = dict(zip(MODEL.specs, LEAVES, strict=True))
TOKENS = np.random.default_rng(0).integers(0, MODEL.config.vocab_size, (10, 24)).astype(np.int32)
QUICK = RecoverySection(
    train="all", steps=24, learning_rate=1e-2, held_out=3, evaluate_every=8, rank=4
)


@pytest.fixture(scope="module")
def teacher():
    return reference(MODEL, tuple(LEAVES.values()), TOKENS)


SPARSE = "weights=keep prune=magnitude"
MIXED = {  # by path, and what trains of its numbers
    "embed": ("weights=int8", {"scale"}),
    "layers.0.qkv": (f"{SPARSE} pattern=2:4 storage=sparse", {"values"}),
    "layers.0.out": (f"{SPARSE} sparsity=0.5 storage=sparse", {"values"}),
    "layers.0.gate_up": (f"{SPARSE} sparsity=0.05", {""}),  # few zeros, stored with the others
    "layers.0.down": ("weights=int8 prune=magnitude pattern=2:4 storage=sparse", {"scale"}),
    "head": ("weights=int4 group=16", {"scale"}),
}


@functools.cache
def student():
    """A leaf of each kind."""
    rules = [parse_rule(f"{path} -> {scheme}") for path, (scheme, _) in MIXED.items()]
    return compress_layers(MODEL, dict(LEAVES), TOKENS, rules)[0]


@pytest.mark.parametrize("train", ["all", "lora", "norms"])
def test_it_comes_nearer_and_stays_as_small(train, teacher):
    before = student()
    section = dataclasses.replace(QUICK, train=train)
    after, counters = Training(MODEL, before, teacher, section).run()
    kl = [row[2] for row in counters.evaluations]
    assert [row[0] for row in counters.evaluations] == [0, 8, 16, 24]
    assert min(kl[1:]) < (0.97 if train == "norms" else 0.9) * kl[0]
    assert counters.best_kl == min(kl)
    for path in MODEL.specs:
        a, b = before[path], after[path]
        assert type(a) is type(b)
        arrays = [(x.arrays() if isinstance(x, CompressedTensor) else {"": x}) for x in (a, b)]
        changed = set()
        for name, array in arrays[0].items():
            now = arrays[1][name]
            assert (array.shape, array.dtype) == (now.shape, now.dtype)
            if not np.array_equal(array, now):
                changed.add(name)
        fields = MIXED[path][1] if path in MIXED else {""}
        fixed = train == "norms" and path in MIXED and fields != {"scale"}
        assert changed == (set() if fixed else fields), path
        zeros = np.asarray(dense_of(a)) == 0
        assert not np.any(np.asarray(dense_of(b))[zeros]), f"{path}: zeros must stay"
        assert path != "layers.0.gate_up" or 0 < zeros.mean() < 0.1


def test_a_step_is_compiled_once(teacher):
    """Also where the leaves have been put on a device, as loading does."""
    some = {path: student()[path] for path in ("embed", "layers.0.qkv")}
    placed = jax.device_put(LEAVES | some, jax.devices()[0])
    training = Training(MODEL, placed, teacher, dataclasses.replace(QUICK, train="norms", steps=3))
    compiled = []
    training.run(listen=lambda step, _: compiled.append(training._update._cache_size()))
    assert compiled == [1, 1, 1]


def test_the_loss_is_kl_and_the_hidden_states_error(teacher):
    before = student()
    ids, hidden = TOKENS[0], teacher.hidden[0]
    window_loss = jax.jit(WindowLoss(MODEL, MODEL, hidden_weight=0.5))
    loss, parts = window_loss(before, teacher.head, ids, hidden)
    forward = jax.jit(functools.partial(tiny_models.forward, MODEL))
    theirs, ours = (
        np.asarray(forward(tuple(map(dense_of, leaves.values())), ids), np.float64)
        for leaves in (LEAVES, before)
    )
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (theirs, ours))
    kl = np.mean(np.sum(np.exp(p) * (p - q), axis=-1))
    state = np.asarray(reference(MODEL, tuple(before.values()), TOKENS[:1]).hidden[0])
    off = np.sum((state - hidden) ** 2) / np.sum(hidden**2)
    assert float(parts["kl"]) == pytest.approx(kl, rel=1e-4)
    assert float(parts["hidden"]) == pytest.approx(off, rel=1e-4)
    assert float(loss) == pytest.approx(kl + 0.5 * off, rel=1e-4)


def test_gradients_against_differences(teacher):
    """Through decompression, layers and slices of logits, by a step along a random direction."""
    before, head = student(), student()["head"]
    # In bfloat16 its scale would move by steps.
    before = before | {"head": dataclasses.replace(head, scale=head.scale.astype(jnp.float32))}
    parts = Trainable(MODEL, before, train="all", rank=1)
    loss = WindowLoss(MODEL, MODEL, hidden_weight=1.0)
    start = parts.zeros(before, seed=0)
    rng = np.random.default_rng(1)
    way = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), start)

    @jax.jit
    def at(size):
        moved = jax.tree.map(lambda a, d: a + size * d, start, way)
        return loss(parts.applied(before, moved), teacher.head, TOKENS[1], teacher.hidden[1])[0]

    slope = (at(1e-2) - at(-1e-2)) / 2e-2
    assert float(jax.jit(jax.grad(at))(0.0)) == pytest.approx(float(slope), rel=0.02)


def test_a_change_finds_the_stored_places():
    rng = np.random.default_rng(1)
    weight, dense = rng.normal(size=(2, 2, 8, 32)).astype(np.float32)
    order = np.argsort(np.argsort(-np.abs(weight.reshape(-1, 4)), axis=-1), axis=-1)
    two, positive = (order < 2).reshape(weight.shape), weight > 0
    tiles = rng.permuted(np.arange(8).reshape(1, 8) % 2 == 0, axis=1).repeat(4, 0)
    of_tiles = tiles.repeat(4, 0).repeat(4, 1).reshape(weight.shape)

    @jax.jit
    def spread(leaf, dense):
        return dataclasses.replace(leaf, values=_gathered(leaf, dense)).dense(jnp.float32)

    for mask, leaf in (
        (two, NMTensor.of(jnp.asarray(weight), jnp.asarray(two), n=2, m=4)),
        (
            positive,
            BitmaskTensor.of(jnp.asarray(weight), jnp.asarray(positive), kept=int(positive.sum())),
        ),
        (of_tiles, BlockSparseTensor.of(jnp.asarray(weight), jnp.asarray(tiles), kept=4)),
    ):
        np.testing.assert_array_equal(spread(leaf, dense), np.where(mask, dense, 0))


def test_a_training_that_goes_on_is_the_same(teacher):
    before = student()
    kept = []
    whole, counters = Training(MODEL, before, teacher, QUICK).run(
        keep=lambda state: kept.append(jax.device_get(state))
    )
    assert [state.counters.step for state in kept] == list(range(1, 25))
    again, others = Training(MODEL, before, teacher, QUICK).run(kept[10])
    assert others.evaluations == counters.evaluations
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_kept_training_goes_on_for_the_same_models_and_settings_alone(
    teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr(recover, "_SAVE_SECONDS", 0.0)
    section = dataclasses.replace(QUICK, steps=2)
    before = student()

    def run(leaves=before, teacher=teacher, taught_by="", **fields):
        loaded = Loaded(MODEL.config, MODEL, tuple(leaves.values()), tmp_path, "", 0)
        changed = dataclasses.replace(section, **fields)
        kept = dict(folder=tmp_path, taught_by=taught_by)
        return recover.recover(loaded, teacher, changed, **kept)[1]

    assert run()["resumed_at"] is None
    assert run(tensorboard=str(tmp_path / "curves"))["resumed_at"] == 2
    for other in (
        {"leaves": before | {"final_norm": 2 * before["final_norm"]}},
        {"teacher": dataclasses.replace(teacher, windows=teacher.windows[::-1])},
        {"teacher": dataclasses.replace(teacher, head=2 * teacher.head)},
        {"taught_by": "another of the same head"},
        {"learning_rate": 2e-2},
        {"seed": 1},
    ):
        with pytest.raises(ValueError, match="holds the training of another model, or with other"):
            run(**other)


def test_it_ends_when_nothing_helps(teacher):
    """The dense model itself can't come nearer: the start is what is left."""
    seen = []
    section = dataclasses.replace(QUICK, evaluate_every=2, patience=2, learning_rate=0.1, batch=2)
    found, counters = Training(MODEL, LEAVES, teacher, section).run(
        listen=lambda step, values: seen.append((step, sorted(values)))
    )
    assert (counters.step, counters.best_step) == (4, 0)
    for path, leaf in LEAVES.items():
        np.testing.assert_array_equal(found[path], leaf)
    plain = ["hidden", "kl", "learning_rate", "loss"]
    watched = sorted([*plain, "held_out_kl"])
    assert seen == [(1, plain), (2, watched), (3, plain), (4, watched)]


def test_it_ends_when_the_time_is_up(teacher):
    section = dataclasses.replace(QUICK, minutes=1e-6)
    _, counters = Training(MODEL, student(), teacher, section).run()
    assert counters.step == 1 and [row[0] for row in counters.evaluations] == [0, 1]


def test_what_cannot_be_is_named(teacher):
    rules = [parse_rule(r"layers\..* -> weights=int4 group=16")]
    int4 = compress_layers(MODEL, dict(LEAVES), TOKENS, rules)[0]
    with pytest.raises(ValueError, match=r"train='lora': no weight of a layer holds floats"):
        Training(MODEL, int4, teacher, dataclasses.replace(QUICK, train="lora"))
    with pytest.raises(ValueError, match=r"held_out=10 of 10 windows leaves none"):
        Training(MODEL, int4, teacher, dataclasses.replace(QUICK, held_out=10))
    broken = dataclasses.replace(teacher, hidden=np.full_like(teacher.hidden, np.nan))
    with pytest.raises(ValueError, match="not finite"):
        Training(MODEL, int4, broken, QUICK).run()
    wider = dataclasses.replace(MODEL.config, vocab_size=MODEL.config.vocab_size + 1)
    other = dataclasses.replace(teacher, model=type(MODEL)(wider, jnp.float32, jnp.float32))
    with pytest.raises(ValueError, match="recovery wants the model that it was made of"):
        Training(MODEL, int4, other, QUICK)
