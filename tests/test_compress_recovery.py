"""Recovery in the compression driver: killed and given again, receipts, curves, mistakes."""

import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compress_makers import RECEIPT, edit_receipt, model_folder
from forked_drivers import ENVIRONMENT

from lepton_jax import compress
from lepton_jax.checkpoints.load import load
from lepton_jax.config import (
    CalibrationSection,
    CompressionSection,
    ReceiptSection,
    RecoverySection,
    RunConfig,
)
from lepton_jax.jobs import compress_model
from lepton_jax.jobs.compress import gap_closed
from lepton_jax.jobs.recovery import RecoveryFolder
from lepton_jax.jobs.verify import failures, report, verify_receipt

ROOT = Path(__file__).parents[1]
SPARSE = r"layers\..* -> weights=keep prune=magnitude pattern=2:4 storage=sparse"
QUICK = ReceiptSection(**RECEIPT | {"prompts": 0})
CONFIG = RunConfig(
    compression=CompressionSection(drop_layers=1, rules=("embed|head -> weights=int8", SPARSE)),
    receipt=QUICK,
    calibration=CalibrationSection(windows=4, window_tokens=32),
    recovery=RecoverySection(
        train="all", steps=12, windows=24, held_out=4, evaluate_every=4, learning_rate=1e-2
    ),
)

KILLED = """
import sys, time
from pathlib import Path
from lepton_jax import api
from lepton_jax.compression import recover
from lepton_jax.compression.training import Training

recover._SAVE_SECONDS = 0.0
run = Training.run

def stuck(self, state, *, keep, listen):
    def heard(step, found):
        listen(step, found)
        if step == 6:
            Path(sys.argv[3]).write_text("here")
            time.sleep(600)

    return run(self, state, keep=keep, listen=heard)

Training.run = stuck
sys.path.insert(0, "tests")
from test_compress_recovery import CONFIG
api.compress(sys.argv[1], sys.argv[2], config=CONFIG)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A model that was pruned, compressed and recovered in one go, and its receipt."""
    folder = tmp_path_factory.mktemp("whole")
    section = dataclasses.replace(CONFIG.recovery, tensorboard=str(folder / "events"))
    seen = []
    made = compress(
        model,
        folder / "out",
        config=dataclasses.replace(CONFIG, recovery=section),
        progress=lambda *at: seen.append(at),
    )
    return folder, made, seen


def test_the_receipt_has_before_and_after(whole):
    folder, made, seen = whole
    told = made["recovery"]
    assert told["steps_done"] == 12 and told["tokens"] == 12 * 32 and told["resumed_at"] is None
    assert [row[0] for row in told["evaluations"]] == [0, 4, 8, 12]
    before, after = told["before"], made["quality"]
    assert after["kl"]["value"] < before["kl"]["value"]
    values = [before["perplexity"]["value"], after["perplexity"]["value"]]
    assert told["gap_closed"] == gap_closed(*values, dense=after["dense_perplexity"]["value"])
    assert made["digest"].startswith("drop_layers=1; ") and "recovered (all)" in made["digest"]
    page = (folder / "out" / "receipt.html").read_text()
    assert "all: 12 steps over 384 tokens" in page and "KL on windows that were held out" in page
    steps = [at for at in seen if at[0] == "recover"]
    assert [at[1:3] for at in steps] == [(i, 12) for i in range(1, 13)]
    assert steps[-1][3].startswith("KL ") and steps[-1][3].endswith(" held out")


def test_the_result_is_as_compressed_as_before(whole, tmp_path):
    folder, made, _ = whole
    types = {row["path"]: row["type"] for row in made["weights"]}
    assert types["embed"] == "QTensor" and types["layers.0.down"] == "NMTensor"
    loaded = load(folder / "out")
    assert loaded.bytes == made["size"]["device_bytes"]
    copy = shutil.copytree(folder / "out", tmp_path / "copy")
    edit_receipt(copy, lambda r: r["recovery"].update(gap_closed=1.0))
    checks = verify_receipt(copy)
    assert failures(checks) == ["gap_closed"], report(checks)


def test_nothing_is_left_but_the_result_and_the_curves(whole):
    folder = whole[0]
    assert sorted(path.name for path in folder.iterdir()) == ["events", "out"]
    events = b"".join(file.read_bytes() for file in (folder / "events").iterdir())
    for name in ("loss", "kl", "hidden", "learning_rate", "held_out_kl"):
        assert f"recovery/{name}".encode() in events


def test_a_killed_recovery_goes_on(model, whole, tmp_path, monkeypatch):
    output, mark = tmp_path / "out", tmp_path / "mark"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, model, output, mark],
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 300
    while not (mark.exists() and mark.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists() and (tmp_path / "out.recovery" / "step-00000005").is_dir()
    longer = dataclasses.replace(CONFIG.recovery, steps=13)
    with pytest.raises(ValueError, match=r"interrupted recovery with another recovery: give the"):
        compress(model, output, config=dataclasses.replace(CONFIG, recovery=longer))

    def again(*_, **__):
        raise AssertionError("the compressed model was kept, it isn't made again")

    monkeypatch.setattr(compress_model, "_compressed", again)
    made = compress(model, output, config=CONFIG)
    assert made["recovery"]["resumed_at"] == 5 and made["recovery"]["steps_done"] == 12
    assert made["weights_sha256"] == whole[1]["weights_sha256"]
    assert made["structured"] == whole[1]["structured"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mark", "out"]


def test_a_state_that_is_damaged_is_named(model, tmp_path):
    folder = tmp_path / "out.recovery" / "student"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match=r"out.recovery holds an interrupted recovery"):
        compress(model, tmp_path / "out", config=CONFIG)


def test_a_compression_without_recovery_takes_no_kept_training_away(model, tmp_path):
    kept = tmp_path / "out.recovery"
    kept.mkdir()
    (kept / "theirs").write_text("x")
    compress(model, tmp_path / "out", preset="int8", config=RunConfig(receipt=QUICK))
    assert (kept / "theirs").read_text() == "x"


def test_a_compression_that_failed_leaves_nothing_to_go_on_with(tmp_path):
    def fail():
        raise ValueError("no such weight")

    with pytest.raises(ValueError, match="no such weight"):
        RecoveryFolder(tmp_path / "out", {"recipe": "wrong"}).student(fail)
    RecoveryFolder(tmp_path / "out", {"recipe": "right"})


def test_mistakes_are_named_before_anything_is_read(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if it weren't installed
    drawn = dataclasses.replace(CONFIG.recovery, tensorboard=str(tmp_path / "curves"))
    with pytest.raises(ValueError, match=r"recovery.tensorboard needs tensorboardX: pip install"):
        compress(model, tmp_path / "out", config=dataclasses.replace(CONFIG, recovery=drawn))
    few = dataclasses.replace(CONFIG.recovery, windows=10**6)
    with pytest.raises(ValueError, match=r"1000000 windows of 32 tokens need 32000000 tokens"):
        compress(model, tmp_path / "out", config=dataclasses.replace(CONFIG, recovery=few))
    for field, value in (("train", "some"), ("learning_rate", 0), ("minutes", -1), ("steps", 0)):
        with pytest.raises(ValueError, match=f"recovery.{field}="):
            RecoverySection(**{field: value})
    with pytest.raises(ValueError, match=r"held_out=8 is not allowed: want fewer than .*windows=8"):
        RecoverySection(train="all", windows=8)
    with pytest.raises(ValueError, match=r"steps=9 is not allowed: want 400 without training, or"):
        RecoverySection(steps=9)
    assert not list(tmp_path.iterdir())


def test_the_share_of_the_gap():
    assert gap_closed(40.0, 30.0, dense=20.0) == 0.5
    assert gap_closed(40.0, 45.0, dense=20.0) == -0.25
    assert gap_closed(20.0, 19.0, dense=20.0) is None
