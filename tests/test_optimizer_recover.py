"""LeptonOptimizer.recover: from Python, with paths or loaded models, and what it refuses."""

import sys

import numpy as np
import pytest
from compress_makers import RECEIPT, model_folder

from lepton_jax import LeptonEngine, LeptonOptimizer, compress
from lepton_jax.checkpoints.load import load
from lepton_jax.checkpoints.orbax_store import save
from lepton_jax.config import CalibrationSection, MeshSection, ReceiptSection, RunConfig

SPARSE = r"layers\..* -> weights=keep prune=magnitude pattern=2:4 storage=sparse"
TEXT = CalibrationSection(window_tokens=32)
FIELDS = dict(steps=8, windows=12, held_out=4, evaluate_every=4, calibration=TEXT)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    dense = model_folder(folder / "dense", layers=1)
    config = RunConfig(receipt=ReceiptSection(**RECEIPT | {"compare": False}))
    compress(dense, folder / "sparse", rules=(SPARSE,), config=config)
    return folder / "sparse", dense


def test_paths_in_a_nearer_model_out(models, tmp_path):
    student, dense = models
    optimizer, seen = LeptonOptimizer(learning_rate=1e-2), []
    found = optimizer.recover(
        student,
        dense,
        folder=tmp_path / "kept",
        listen=lambda *at: seen.append(at),
        tensorboard=str(tmp_path / "curves"),
        **FIELDS,
    )
    before = load(student)
    assert found.bytes == before.bytes and found.fingerprint != before.fingerprint
    kl = [row[2] for row in optimizer.training["evaluations"]]
    assert min(kl) < kl[0] and len(seen) == 8
    assert optimizer.training["learning_rate"] == 1e-2 and optimizer.training["train"] == "all"
    assert optimizer.training["text"]["length"] == 32
    (events,) = (tmp_path / "curves").iterdir()
    assert all(f"recovery/{name}".encode() in events.read_bytes() for name in ("kl", "held_out_kl"))
    save(tmp_path / "out", found)
    again = load(tmp_path / "out")
    assert again.fingerprint == found.fingerprint
    index = list(found.model.specs).index("layers.0.down")
    np.testing.assert_array_equal(again.leaves[index].values, found.leaves[index].values)
    with LeptonEngine() as engine:
        engine.load_model(tmp_path / "out")
        assert engine.fingerprint == found.fingerprint and engine.receipt is None


def test_what_it_refuses(models, monkeypatch):
    student, dense = models
    optimizer = LeptonOptimizer()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if it weren't installed
    with pytest.raises(ValueError, match=r"recovery.tensorboard needs tensorboardX: pip install"):
        optimizer.recover("not read", dense, tensorboard="curves")
    with pytest.raises(ValueError, match="window_tokens is 129, but the model's longest contex"):
        optimizer.recover(student, dense, calibration=CalibrationSection(window_tokens=129))
    with pytest.raises(ValueError, match="recover: unknown field 'step'; did you mean 'steps'"):
        optimizer.recover(student, dense, step=3)
    with pytest.raises(ValueError, match="train='none' is not allowed here: want norms, lora"):
        optimizer.recover(student, dense, train="none")
    with pytest.raises(ValueError, match=r"None is no model: want a path, or an engine"):
        optimizer.recover(student, None)
    cut = LeptonEngine().load_model(dense, config=RunConfig(mesh=MeshSection(model=2)))
    with pytest.raises(ValueError, match=r"lies on 2 devices.*or load it with mesh\.model=1"):
        optimizer.recover(student, cut)
