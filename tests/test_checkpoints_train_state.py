"""States of a training: they come back bit by bit, older ones go, and damage is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lepton_jax.checkpoints.errors import CheckpointError
from lepton_jax.checkpoints.orbax_arrays import Reader
from lepton_jax.checkpoints.train_state import TrainStates


def tree(seed):
    trained = {"layers.0.qkv": {"values": jax.random.normal(jax.random.key(seed), (3, 4))}}
    return {"trained": trained, "moments": optax.adam(1e-3).init(trained)}


def test_the_newest_state_comes_back(tmp_path):
    states = TrainStates(tmp_path / "state")
    assert states.restore(tree(0)) is None
    states.save(tree(1), {"step": 5, "evaluations": [[0, None, 0.5]]})
    states.save(tree(2), {"step": 10, "evaluations": []})
    (tmp_path / "state" / "step-00000099.partial").mkdir()  # a save that was killed
    found, counters = TrainStates(tmp_path / "state").restore(tree(0))
    assert counters == {"step": 10, "evaluations": []}
    assert jax.tree.structure(found) == jax.tree.structure(tree(2))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree(2)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert names == ["step-00000010", "step-00000099.partial"]
    states.save(tree(3), {"step": 10})  # the same step again
    assert states.restore(tree(0))[1] == {"step": 10}
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000010"]


def test_damage_is_named(tmp_path):
    states = TrainStates(tmp_path)
    states.save({"a": jnp.ones(3)}, {"step": 1})
    with pytest.raises(CheckpointError, match="of another training: remove it to start anew"):
        states.restore({"a": jnp.ones(3), "b": jnp.ones(2)})
    with pytest.raises(CheckpointError, match="of another training"):
        states.restore({"a": jnp.ones(4)})
    (tmp_path / "step-00000001" / "counters.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step-00000001 can't be read"):
        states.restore({"a": jnp.ones(3)})


def test_out_of_memory_is_no_damage(tmp_path, monkeypatch):
    def exhausted(*_args, **_options):
        raise MemoryError

    states = TrainStates(tmp_path)
    states.save({"a": jnp.ones(3)}, {"step": 1})
    monkeypatch.setattr(Reader, "read", exhausted)
    with pytest.raises(MemoryError):
        states.restore({"a": jnp.ones(3)})


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"can't be written"):
        TrainStates(tmp_path / "file").save({"a": jnp.ones(3)}, {"step": 1})
