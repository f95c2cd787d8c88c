"""From what a user writes as `model.path` to a file or directory on this machine.

Demo models and hub models are fetched here; nothing is opened beyond what tells the kind. Read
next: `load.py`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lepton_jax.checkpoints.demo import DEMO_MODELS, demo_model
from lepton_jax.checkpoints.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
ACCEPTED = (
    "a Hugging Face directory (config.json and .safetensors), a .gguf file, a directory that "
    "lepton_jax saved (manifest.json), hf:org/name, hf:org/name/file.gguf, "
    + ", ".join(f"demo:{name}" for name in DEMO_MODELS)
)
_GIVE_GGUF = "if it holds GGUF files, give one of them, hf:{}/FILE.gguf"
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


def locate(path: str | os.PathLike) -> tuple[str, Path]:
    """The kind ("hf", "gguf" or "store") and the place of a checkpoint, fetched if need be.

    Raises CheckpointError: nothing is there, it is none of the accepted forms, or it can't be
    fetched.
    """
    text = os.fspath(path)
    if text.startswith("demo:"):
        return "gguf", demo_model(text.removeprefix("demo:"))
    if text.startswith("hf:"):
        if text.endswith(".gguf"):
            return "gguf", _from_hub(text, lambda hub, name, file: hub.hf_hub_download(name, file))
        return "hf", _from_hub(text, _snapshot)
    if text.startswith("published:"):
        raise CheckpointError(
            f"model path {text!r} is the config of a released model, without weights: plan takes "
            f"it; here accepted are {ACCEPTED}"
        )
    place = local_path(text)
    if not text or not place.exists():
        raise CheckpointError(f"model path {text!r} doesn't exist; accepted are {ACCEPTED}")
    if place.is_dir():
        return _directory_kind(place), place
    if place.suffix == ".gguf":
        return "gguf", place
    if place.suffix in (".safetensors", ".json"):
        raise CheckpointError(
            f"model path {text!r} is one file of a checkpoint: give its directory, {place.parent}"
        )
    raise CheckpointError(f"model path {text!r} is of no known kind; accepted are {ACCEPTED}")


def local_path(given: str | os.PathLike) -> Path:
    """A path on a disk of this machine, from one that may begin with `~`.

    Raises CheckpointError on an address such as gs://, and where nobody has that home.
    """
    text = os.fspath(given)
    if "://" in text:
        raise CheckpointError(
            f"{text!r} is an address, and models are read from and written to disks: give a path, "
            "on several hosts one on a shared disk"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise CheckpointError(
            f"{text!r} begins with the home of a user who isn't known here: write the path out"
        ) from error


def _directory_kind(place: Path) -> str:
    if (place / MANIFEST_NAME).is_file():
        return "store"
    if (place / "config.json").is_file():
        return "hf"
    files = sorted(place.glob("*.gguf"))
    hint = f" Did you mean {files[0]}?" if files else ""
    raise CheckpointError(
        f"model path {str(place)!r} is a directory without config.json or {MANIFEST_NAME}; "
        f"accepted are {ACCEPTED}.{hint}"
    )


@functools.cache  # a search plans for many chips
def hub_config(path: str) -> Path:
    """The config.json of an `hf:org/name`, fetched without the weights. Raises CheckpointError."""
    return _from_hub(path, lambda hub, name, _: hub.hf_hub_download(name, "config.json"))


def _snapshot(hub: Any, name: str, _: str) -> str:
    # Some repositories repeat the weights in another layout under consolidated*.
    patterns = dict(allow_patterns=_HUB_FILES, ignore_patterns=["consolidated*"])
    place = hub.snapshot_download(name, **patterns)
    if not (Path(place) / "config.json").is_file():
        raise CheckpointError(f"hf:{name} has no config.json: {_GIVE_GGUF.format(name)}")
    return place


def _from_hub(path: str, fetch: Callable[[Any, str, str], str]) -> Path:
    """What `fetch` makes of huggingface_hub, the org/name of a path and the file that it names."""
    parts = path.removeprefix("hf:").split("/")
    if not all(parts) or not (len(parts) == 2 or (len(parts) > 2 and path.endswith(".gguf"))):
        raise CheckpointError(f"model path {path!r} must be hf:org/name or hf:org/name/file.gguf")
    name, file = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"model path {path!r} needs huggingface_hub: pip install 'lepton_jax[hub]', or give "
            "a directory that you fetched yourself"
        ) from error
    try:
        return Path(fetch(huggingface_hub, name, file))
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client raises errors of several HTTP libraries
        kind, said = type(error).__name__, " ".join(str(error).split())[:300].rstrip(".")
        act = "Check the name, the network, and for gated models the token (`hf auth login`)"
        if "EntryNotFound" in kind:
            act = f"The repository has no such file: {_GIVE_GGUF.format(name)}"
        raise CheckpointError(
            f"model path {path!r} can't be fetched: {kind}: {said}. {act}"
        ) from error
