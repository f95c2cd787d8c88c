"""A recipe applied to a model: pruned, compressed and recovered, but neither measured nor written.

Recipes that need no activations are applied weight by weight as the model streams in; the others
load it whole and go layer by layer. The methods are in `lepton_jax/compression`; what was done is
measured in `compress.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.checkpoints.loaded import Loaded, leaf_bytes
from lepton_jax.compression import quality, receipt
from lepton_jax.compression.automatic import choose
from lepton_jax.compression.calibrate import compress_layers
from lepton_jax.compression.calibration_data import CALIBRATION_TEXT
from lepton_jax.compression.leaf import relative_error
from lepton_jax.compression.presets import compressor
from lepton_jax.compression.recipe import Recipe, rule_text
from lepton_jax.compression.structured import prune_structure
from lepton_jax.config import RunConfig
from lepton_jax.jobs.compress_inputs import (
    Progress,
    load_options,
    load_tokenizer,
    not_finite,
    recovery_text,
    require_finite,
    stage,
    text_windows,
    windows_of,
)
from lepton_jax.jobs.recovery import RecoveryFolder, train

_TOLD = (
    "errors",
    "source_sha256",
    "calibration",
    "structured",
    "rules",
    "sensitivity",
)  # what a receipt needs besides the weights


@dataclasses.dataclass(frozen=True)
class Result:
    """A compressed model and what is to be told of it.

    Attributes:
      loaded: the model.
      errors: relative errors by weight, as compression made them (recovery comes after).
      source_sha256: of the weights that it was made of.
      calibration: which text it was calibrated on; None without calibration.
      structured: what structured pruning kept; None where there was none.
      rules: that were found for a budget, as texts, and the sensitivities that they come of; None
        where the recipe has its own.
      recovery: how it was trained; None where it wasn't, as the next.
      student: the model before that.
    """

    loaded: Loaded
    errors: dict[str, dict[str, Any]]
    source_sha256: str
    calibration: dict[str, Any] | None = None
    structured: dict[str, Any] | None = None
    rules: list[str] | None = None
    sensitivity: dict[str, Any] | None = None
    recovery: dict[str, Any] | None = None
    student: Loaded | None = None


def make_model(
    config: RunConfig, recipe: Recipe, source: dict[str, str], *, progress: Progress
) -> Result:
    """The model by a recipe, recovered where the config asks for it; `source` says what it is made
    of.
    """
    if config.recovery.train == "none":
        return _compressed(config, recipe, source, progress=progress)
    plan = {
        "source": source,
        "recipe": recipe.as_dict(),
        "calibration": dataclasses.asdict(config.calibration),
        "recovery": dataclasses.asdict(config.recovery) | {"tensorboard": ""},
    }
    folder = RecoveryFolder(config.output, plan)

    def make() -> tuple[Loaded, dict[str, Any]]:
        made = _compressed(config, recipe, source, progress=progress)
        return made.loaded, {name: getattr(made, name) for name in _TOLD}

    student, made = folder.student(make)
    drawn = text_windows(recovery_text(config), load_tokenizer(config), CALIBRATION_TEXT)
    loaded, told = train(
        student,
        _teacher(config, drawn.tokens, progress=progress),
        config.recovery,
        folder=folder.path,
        progress=stage(progress, "recover"),
    )
    return Result(loaded, **made, student=student, recovery=told | {"text": drawn.receipt})


def _teacher(config: RunConfig, tokens: np.ndarray, *, progress: Progress) -> quality.Reference:
    """What the dense model makes of the windows; its weights are freed."""
    loaded = checkpoints.load(
        config.model.path, **load_options(config), progress=stage(progress, "load")
    )
    told = windows_of(progress, "dense on recovery text")
    return quality.reference(loaded.model, loaded.leaves, tokens, progress=told)


def _compressed(
    config: RunConfig, recipe: Recipe, source: dict[str, str], *, progress: Progress
) -> Result:
    work = _calibrate if recipe.calibrated else _stream
    return work(config, recipe, source.get("weights_sha256", ""), progress=progress)


def _stream(config: RunConfig, recipe: Recipe, known: str, *, progress: Progress) -> Result:
    """The model compressed weight by weight as it is read, and hashed where that isn't `known`."""
    options = load_options(config)
    specs = checkpoints.describe(config.model.path, **options).specs
    change, errors, source = compressor(recipe.rules, specs), {}, receipt.WeightsHash()

    def compress_one(path, spec, array):
        if not known:
            source.add(path, array)
        leaf = change(path, spec, array)
        error = float(relative_error(array, leaf))
        if not np.isfinite(error):
            raise ValueError(not_finite(config.model.path, path))
        if leaf is not array:
            errors[path] = {"weight": error}
        return leaf

    loaded = checkpoints.load(
        config.model.path, **options, compress=compress_one, progress=stage(progress, "compress")
    )
    return Result(loaded, errors, known or source.hexdigest())


def _calibrate(config: RunConfig, recipe: Recipe, known: str, *, progress: Progress) -> Result:
    """The model pruned and compressed layer by layer on calibration text."""
    loaded = checkpoints.load(
        config.model.path, **load_options(config), progress=stage(progress, "load")
    )
    require_finite(loaded)
    source = known or receipt.weights_sha256(loaded.model.specs, loaded.leaves)
    drawn = text_windows(config.calibration, load_tokenizer(config), CALIBRATION_TEXT)
    model, leaves = loaded.model, dict(zip(loaded.model.specs, loaded.leaves, strict=True))
    loaded = dataclasses.replace(loaded, leaves=())  # so that each dense one goes when replaced
    structured, errors, found = None, {}, {}
    if recipe.structure:
        model, leaves, structured = prune_structure(
            model,
            leaves,
            drawn.tokens,
            recipe.structure,
            damp=recipe.options.damp,
            progress=stage(progress, "prune"),
        )
    if recipe.automatic:
        choice = choose(
            model,
            leaves,
            drawn.tokens,
            recipe.automatic,
            dense=loaded.model,
            options=recipe.options,
            seed=config.calibration.seed,
            progress=stage(progress, "sensitivity"),
        )
        recipe = dataclasses.replace(recipe, rules=choice.rules)
        found["rules"] = [rule_text(rule) for rule in recipe.rules]
        found["sensitivity"] = receipt.sensitivity(choice)
    if recipe.rules:
        leaves, errors = compress_layers(
            model,
            leaves,
            drawn.tokens,
            recipe.rules,
            options=recipe.options,
            progress=stage(progress, "compress"),
        )
    kept = tuple(leaves[path] for path in model.specs)
    loaded = dataclasses.replace(
        loaded, config=model.config, model=model, leaves=kept, bytes=sum(map(leaf_bytes, kept))
    )
    return Result(loaded, errors, source, drawn.receipt, structured, **found)
