"""Recovery from Python: a compressed and a dense model in, the recovered one out.

`LeptonOptimizer.recover` is the face of this; a compression with recovery in one command is
`python -m lepton_jax.compress`. The training is `lepton_jax/compression/recover.py`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.compression.calibration_data import CALIBRATION_TEXT, draw_windows
from lepton_jax.compression.quality import reference
from lepton_jax.compression.receipt import fingerprint_of, weights_sha256
from lepton_jax.compression.recover import recover
from lepton_jax.compression.training import Listen
from lepton_jax.config import CalibrationSection, RecoverySection
from lepton_jax.sharding import Placement
from lepton_jax.telemetry import scalar_writers
from lepton_jax.text import tokenizer as tokenizers


def recover_model(
    student: Any,
    teacher: Any,
    section: RecoverySection,
    *,
    calibration: CalibrationSection | None = None,
    folder: str | os.PathLike | None = None,
    listen: Listen | None = None,
) -> tuple[Loaded, dict[str, Any]]:
    """The recovered model, and what is told of the training.

    Args:
      student: the compressed model: a path, what `checkpoints.load` gives, or something that holds
        that as `.loaded`, such as a `LeptonEngine`.
      teacher: the dense model, likewise.
      section: how to train; its `windows` are drawn from the calibration text.
      calibration: text, window_tokens and seed; by default the text that ships.
      folder: where the training is kept; one that is there goes on.
      listen: called as `Training.run` says.

    Raises ValueError where the two models don't belong together, one lies on several devices or
    has a shorter context than a window, or nothing can be trained.
    """
    calibration = calibration or CalibrationSection()
    if section.train == "none":
        raise ValueError("recovery.train='none' is not allowed here: want norms, lora or all")
    if section.tensorboard:
        scalar_writers("recovery.tensorboard")
    tokenizer = getattr(teacher, "tokenizer", None)  # of an engine
    student, teacher = _loaded(student), _loaded(teacher)
    for model in (student, teacher):
        model.config.require_room("calibration.window_tokens", calibration.window_tokens)
    drawn = draw_windows(
        Path(calibration.text).expanduser() if calibration.text else CALIBRATION_TEXT,
        tokenizer or tokenizers.load(teacher.tokenizer_source),
        windows=section.windows,
        length=calibration.window_tokens,
        seed=calibration.seed,
    )
    seen = reference(teacher.model, teacher.leaves, drawn.tokens)
    folder = None if folder is None else Path(folder).expanduser()
    taught = dict(taught_by=teacher.fingerprint)
    found, told = recover(student, seen, section, folder=folder, listen=listen, **taught)
    weights = weights_sha256(found.model.specs, found.leaves)
    found = dataclasses.replace(found, fingerprint=fingerprint_of(student.fingerprint, weights))
    return found, told | {"text": drawn.receipt}


def _loaded(model: Any) -> Loaded:
    if isinstance(model, str | os.PathLike):
        return checkpoints.load(model, **checkpoints.dtypes_here("auto"))
    found = getattr(model, "loaded", model)
    if not isinstance(found, Loaded):
        raise ValueError(f"{model!r:.80} is no model: want a path, or an engine with a model")
    devices = len(Placement.holding(found.leaves, found.model.heads).devices)
    if devices > 1:
        raise ValueError(
            f"{model!r:.80} lies on {devices} devices, each with a part of every weight, and "
            "recovery trains on one: give the model's path, or load it with mesh.model=1"
        )
    return found
