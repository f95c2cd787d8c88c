"""What a compression starts from: the model, its tokenizer, windows of text, and whether the config
makes sense together.

Read next: `compress_model.py` (a recipe applied), `compress.py` (what is measured and written).
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.compression.calibrate import require_methods
from lepton_jax.compression.calibration_data import (
    CALIBRATION_TEXT,
    HELD_OUT_TEXT,
    Windows,
    draw_windows,
    share_seen,
)
from lepton_jax.compression.leaf import relative_error
from lepton_jax.compression.presets import compress_specs, scheme_of_each
from lepton_jax.compression.recipe import Recipe
from lepton_jax.compression.rules import weights_of
from lepton_jax.compression.structure import planned_model
from lepton_jax.compression.trainable import trained_values
from lepton_jax.config import CalibrationSection, ReceiptSection, RunConfig
from lepton_jax.jobs import measures
from lepton_jax.models.build import Model
from lepton_jax.telemetry import scalar_writers
from lepton_jax.tensors import CompressedTensor
from lepton_jax.text import tokenizer as tokenizers

log = logging.getLogger(__name__)

_MOST_SEEN = 0.5  # of what quality is measured on

Progress = Callable[[str, int, int, str], None]  # stage, done, total, what


def silent(stage: str, done: int, total: int, what: str) -> None:
    """The progress of those who don't look."""


def require_alone(config: RunConfig) -> None:
    """Raises ValueError for what compression would leave out: other devices, processes, a draft
    model.
    """
    config.require_one_process("compress")
    if config.mesh.model > 1:
        raise ValueError(
            f"mesh.model={config.mesh.model}: compress works on one device: leave out mesh.model "
            "and mesh.expert"
        )
    if config.engine.speculation == "draft":
        raise ValueError(
            "engine.speculation='draft': compress measures a model without a draft model beside "
            "it: take off or lookup"
        )


def require_fit(config: RunConfig, recipe: Recipe, model: Model) -> None:
    """Raises ValueError where a recipe, or the recovery after it, doesn't suit the dense model:
    rules that nothing uses, schemes that don't fit a weight, options that change nothing, curves
    that no package draws, an output head that the model hasn't.
    """
    _require_head(config, recipe, model)
    if config.recovery.tensorboard:
        scalar_writers("recovery.tensorboard")
    planned = planned_model(recipe.structure, model)
    leaves, specs = compress_specs(recipe.rules, planned.specs), planned.specs
    recipe.require_use(scheme_of_each(recipe.rules, planned.specs))
    require_methods(planned, recipe.rules, recipe.options)
    if recipe.automatic:
        recipe.automatic.require_room(planned, model)
        for index in range(len(recipe.automatic.candidates)):
            everywhere = [index] * len(weights_of(planned.specs))
            rules = recipe.automatic.rules(planned, everywhere, recipe.options)
            require_methods(planned, rules, recipe.options)
        if all(scheme.weights != "keep" for scheme in recipe.automatic.candidates):
            specs = {}  # whichever is chosen, no weight will hold floats
    trained_values(specs, leaves, train=config.recovery.train)


def _require_head(config: RunConfig, recipe: Recipe, model: Model) -> None:
    """Raises ValueError where predictions are needed, and an embedding model makes none."""
    needing = {
        "receipt.compare": config.receipt.compare,
        f"recovery.train={config.recovery.train}": config.recovery.train != "none",
        f"compression.{recipe.automatic}": bool(recipe.automatic),
    }
    asked = [name for name, needed in needing.items() if needed]
    if asked and not model.config.head_path:
        raise ValueError(
            f"{config.model.path} has no output head, and {', '.join(asked)} needs its "
            "predictions: leave that out (--config.receipt.compare=false)"
        )


def require_texts(
    config: RunConfig, model: Model, *, calibrated: bool, swept: bool = False
) -> None:
    """Raises ValueError where texts are too short or nothing reads them, windows longer than the
    model's context, or quality would be measured on text that compression saw. `swept`: other
    recipes of the sweep read the calibration text.
    """
    asked, recovers = config.receipt, config.recovery.train != "none"
    if config.calibration.text and not (calibrated or recovers or swept):
        raise ValueError(
            f"calibration.text={config.calibration.text!r} changes nothing here, it is for "
            "calibrated recipes (rounding=gptq, prune=wanda or sparsegpt, activations=static, "
            "smooth, structured pruning, auto_bytes or auto_kl) and recovery: leave it out"
        )
    tokens = measures.longest_texts(asked) if asked.compare else {}
    if calibrated or recovers:
        tokens["calibration.window_tokens"] = config.calibration.window_tokens
    for name, count in tokens.items():
        model.config.require_room(name, count)
    if not tokens and not config.model.tokenizer:
        return
    tokenizer = load_tokenizer(config)  # one that the config names will be saved
    held_out = [text_windows(asked, tokenizer, HELD_OUT_TEXT)] if asked.compare else []
    sections = [config.calibration] * calibrated + [recovery_text(config)] * recovers
    seen = [text_windows(section, tokenizer, CALIBRATION_TEXT) for section in sections]
    for measured in held_out if seen else ():
        _require_unseen(measured, seen)


def _require_unseen(measured: Windows, seen: Sequence[Windows]) -> None:
    """Raises ValueError where most of what is measured is what compression reads of its text, in
    any of these draws; warns of less.
    """
    text, held_out = seen[0].receipt, measured.receipt
    if text["sha256"] == held_out["sha256"]:
        raise ValueError(
            f"calibration.text and receipt.text are the same, {text['path']}: quality must be "
            "measured on text that calibration never saw"
        )
    share = max(share_seen(measured.tokens, read.tokens) for read in seen)
    told = (
        f"{share:.1%} of what quality is measured on (receipt.text, {held_out['path']}) is in what "
        f"calibration reads (calibration.text, {text['path']})"
    )
    if share > _MOST_SEEN:
        raise ValueError(f"{told}: give texts that don't share passages")
    if share:
        log.warning("%s, in runs of 32 tokens and more", told)


def load_tokenizer(config: RunConfig) -> tokenizers.Tokenizer:
    """The model's, without its weights, or the one that the config names."""
    source = config.model.tokenizer or checkpoints.tokenizer_source(config.model.path)
    tokenizer = tokenizers.load(source)
    tokenizer.set_chat_variables(config.model.chat_variables)
    return tokenizer


def text_windows(
    section: ReceiptSection | CalibrationSection, tokenizer: tokenizers.Tokenizer, shipped: Path
) -> Windows:
    """The windows of a section's text, or of the shipped one where it names none."""
    drawn = draw_windows(
        Path(section.text).expanduser() if section.text else shipped,
        tokenizer,
        windows=section.windows,
        length=section.window_tokens,
        seed=section.seed,
    )
    place = section.text or f"shipped: {shipped.name}"
    return dataclasses.replace(drawn, receipt=drawn.receipt | {"path": place})


def recovery_text(config: RunConfig) -> CalibrationSection:
    """The calibration text, but as many windows as recovery asks for."""
    return dataclasses.replace(config.calibration, windows=config.recovery.windows)


def load_options(config: RunConfig) -> dict[str, Any]:
    """Dtypes, as arguments of `checkpoints.load`."""
    return checkpoints.dtypes_here(config.model.dtype)


def describe(config: RunConfig) -> Model:
    """The dense model without its weights."""
    return checkpoints.describe(config.model.path, **load_options(config))


def dense_bytes(model: Model) -> int:
    """Of the weights that a description's model has."""
    return sum(spec.nbytes for spec in model.specs.values())


def require_finite(loaded: Loaded) -> None:
    """Raises ValueError on weights that are compressed already, or not finite."""
    for path, leaf in zip(loaded.model.specs, loaded.leaves, strict=True):
        if isinstance(leaf, CompressedTensor):
            raise ValueError(
                f"{loaded.tokenizer_source} holds compressed weights ({path} and others): compress "
                "the original model"
            )
        if not np.isfinite(float(relative_error(leaf, leaf))):
            raise ValueError(not_finite(loaded.tokenizer_source, path))


def not_finite(model: str | os.PathLike, path: str) -> str:
    return (
        f"{os.fspath(model)}: weight {path} has values that are not finite (NaN or infinity): the "
        "checkpoint is damaged, fetch it again"
    )


def stage(progress: Progress, stage: str) -> Callable[[int, int, str], None]:
    """A progress for one stage."""
    return lambda done, total, what: progress(stage, done, total, what)


def windows_of(progress: Progress, stage: str) -> Callable[[int, int], None]:
    """A progress for a stage that goes window by window."""
    return lambda done, total: progress(stage, done, total, "window")
