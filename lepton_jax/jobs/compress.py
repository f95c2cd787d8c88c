"""Compresses a model and proves what that cost: weights in, a checkpoint with its receipt out.

    job = CompressJob(config)     # refuses what can't be, before anything is read
    receipt = job.run(progress)   # writes config.output

The dense model is measured first and freed; then the weights are compressed as they stream in, the
result is measured, and directory and receipt appear together. `sweep.py` tries many recipes against
one dense model, `verify.py` measures again. The methods are in `lepton_jax/compression`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax import compile_cache
from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.checkpoints.loaded import Loaded, leaf_bytes
from lepton_jax.checkpoints.orbax_store import new_directory, save
from lepton_jax.compression import quality, receipt, receipt_page
from lepton_jax.compression.calibrate import compress_layers
from lepton_jax.compression.calibration_data import (
    CALIBRATION_TEXT,
    HELD_OUT_TEXT,
    Windows,
    draw_windows,
)
from lepton_jax.compression.presets import compressor, scheme_of_each
from lepton_jax.compression.recipe import Recipe
from lepton_jax.compression.structure import planned_model
from lepton_jax.compression.structured import prune_structure
from lepton_jax.config import CalibrationSection, ReceiptSection, RunConfig
from lepton_jax.jobs import measures
from lepton_jax.jobs.benchmark import device_name
from lepton_jax.models.build import Model
from lepton_jax.tensors import CompressedTensor
from lepton_jax.text import tokenizer as tokenizers

Progress = Callable[[str, int, int, str], None]  # stage, done, total, what


def silent(stage: str, done: int, total: int, what: str) -> None:
    """The progress of those who don't look."""


@dataclasses.dataclass(frozen=True)
class Dense:
    """What is known of the model before compression; its weights are freed.

    Attributes:
      model: its specs.
      source: path, tokenizer, fingerprint and dtype.
      bytes: of its weights.
      held_out: what the receipt says of the text.
      windows: int32 `[windows, T]` of that text.
      reference: its predictions there; None, as the next, where nothing is compared.
      measures: what its engine gave.
    """

    model: Model
    source: dict[str, str]
    bytes: int
    held_out: dict[str, Any] | None = None
    windows: np.ndarray | None = None
    reference: quality.Reference | None = None
    measures: measures.EngineMeasures | None = None


class CompressJob:
    """One recipe on one model."""

    def __init__(self, config: RunConfig):
        """Raises ValueError on a recipe or an output that can't be."""
        self.config = config
        self.recipe = Recipe.from_config(config.compression)
        if not self.recipe:
            raise ValueError("compression.preset is none and there are no rules: nothing to do")
        if not config.output:
            raise ValueError("output is empty: name the directory to write, --config.output=DIR")
        self.output = new_directory(config.output)

    def run(self, progress: Progress = silent) -> receipt.Receipt:
        """Measures, compresses, measures again and writes; the receipt."""
        require_sense(self.config, [self.recipe])
        dense = measure_dense(self.config, progress)
        made = compress(self.config, self.recipe, dense, progress=progress)
        return write(self.output, made)


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A compressed model, and its receipt but for the bytes on disk."""

    loaded: Loaded
    receipt: receipt.Receipt


def require_sense(config: RunConfig, recipes: Sequence[Recipe]) -> None:
    """Raises ValueError for what can be known before hours of work: rules that nothing uses, texts
    that are too short, windows longer than the model's context.
    """
    model, asked = describe(config), config.receipt
    for recipe in recipes:
        scheme_of_each(recipe.rules, planned_model(recipe.structure, model).specs)
    calibrated = any(recipe.calibrated for recipe in recipes)
    tokens = measures.longest_texts(asked) if asked.compare else {}
    if calibrated:
        tokens["calibration.window_tokens"] = config.calibration.window_tokens
    for name, count in tokens.items():
        measures.require_room(name, count, model.config)
    if not tokens:
        return
    tokenizer = load_tokenizer(config)
    drawn = []
    if asked.compare:
        drawn.append(text_windows(asked, tokenizer, HELD_OUT_TEXT))
    if calibrated:
        drawn.append(text_windows(config.calibration, tokenizer, CALIBRATION_TEXT))
    if len({windows.receipt["sha256"] for windows in drawn}) < len(drawn):
        raise ValueError(
            f"calibration.text and receipt.text are the same, {drawn[0].receipt['path']}: quality "
            "must be measured on text that calibration never saw"
        )


def load_tokenizer(config: RunConfig) -> tokenizers.Tokenizer:
    """The model's, or the one that the config names."""
    source = config.model.tokenizer or checkpoints.tokenizer_source(config.model.path)
    return tokenizers.load(source)


def text_windows(
    section: ReceiptSection | CalibrationSection, tokenizer: tokenizers.Tokenizer, shipped: Path
) -> Windows:
    """The windows of a section's text, or of the shipped one where it names none."""
    drawn = draw_windows(
        Path(section.text).expanduser() if section.text else shipped,
        tokenizer.encode,
        windows=section.windows,
        length=section.window_tokens,
        seed=section.seed,
    )
    place = section.text or f"shipped: {shipped.name}"
    return dataclasses.replace(drawn, receipt=drawn.receipt | {"path": place})


def _options(config: RunConfig) -> dict[str, Any]:
    return checkpoints.dtypes_here(config.model.dtype)


def describe(config: RunConfig) -> Model:
    """The dense model without its weights."""
    return checkpoints.describe(config.model.path, **_options(config))


def measure_dense(config: RunConfig, progress: Progress) -> Dense:
    """Loads the dense model, measures what receipts compare with, and frees it."""
    compile_cache.enable()
    asked, model = config.receipt, describe(config)
    source = {
        "path": config.model.path,
        "tokenizer": config.model.tokenizer,
        "fingerprint": checkpoints.identify(config.model.path),
        "dtype": np.dtype(model.dtype).name,
    }
    size = sum(spec.nbytes for spec in model.specs.values())
    if not asked.compare:
        return Dense(model, source, size)
    loaded = checkpoints.load(
        config.model.path, **_options(config), progress=_stage(progress, "load")
    )
    _require_finite(loaded)
    held_out = text_windows(asked, load_tokenizer(config), HELD_OUT_TEXT)
    windows = held_out.tokens
    reference = quality.reference(
        loaded.model, loaded.leaves, windows, progress=_windows(progress, "dense on held-out text")
    )
    return Dense(
        model,
        source,
        size,
        held_out.receipt,
        windows,
        reference,
        measures.measure(
            loaded,
            config.engine,
            asked=asked,
            windows=windows,
            progress=_stage(progress, "dense in the engine"),
        ),
    )


def compress(config: RunConfig, recipe: Recipe, dense: Dense, *, progress: Progress) -> Compressed:
    """The model by a recipe, measured."""
    work = _calibrate if recipe.calibrated else _stream
    result = work(config, recipe, progress=progress)
    loaded = result.loaded
    weights = receipt.weights_sha256(loaded.model.specs, loaded.leaves)
    fingerprint = receipt.fingerprint_of(dense.source["fingerprint"], weights)
    loaded = dataclasses.replace(loaded, fingerprint=fingerprint)
    schemes = scheme_of_each(recipe.rules, loaded.model.specs)
    rows = receipt.weight_rows(loaded.model, loaded.leaves, schemes=schemes, errors=result.errors)
    size = receipt.sizes(dense.model, dense.bytes, rows=rows, bytes_now=loaded.bytes)
    found, greedy, speed = None, None, None
    if dense.reference is not None:
        found, greedy, speed = _measured(config, dense, loaded, size=size, progress=progress)
    made = {
        "fingerprint": fingerprint,
        "weights_sha256": weights,
        "source": dense.source,
        "engine": dataclasses.asdict(config.engine),
        "recipe": recipe.as_dict() | {"title": recipe.title},
        "measure": dataclasses.asdict(config.receipt),
        "size": size,
        "quality": found,
        "greedy_prefix": greedy,
        "speed": speed,
        "held_out": dense.held_out,
        "calibration": result.calibration,
        "structured": result.structured,
        "environment": receipt.environment(),
        "weights": rows,
    }
    return Compressed(loaded, made | {"digest": receipt.digest_line(made)})


def write(output: Path, made: Compressed) -> receipt.Receipt:
    """The checkpoint with receipt.json and receipt.html, whole or not at all; the receipt."""
    final = {}

    def complete(folder: Path) -> None:
        final.update(made.receipt)
        final["size"] = made.receipt["size"] | {"disk_bytes": _bytes_below(folder)}
        write_receipt(folder, final)

    save(output, made.loaded, complete=complete)
    return final


def write_receipt(folder: Path, final: receipt.Receipt) -> None:
    """Both forms of a receipt."""
    (folder / receipt.NAME).write_text(receipt.to_text(final), encoding="utf-8")
    (folder / receipt_page.NAME).write_text(receipt_page.page(final), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class _Result:
    """A compressed model with the relative errors of its weights, which text it was calibrated on,
    and what structured pruning kept; None where there was none.
    """

    loaded: Loaded
    errors: dict[str, dict[str, Any]]
    calibration: dict[str, Any] | None = None
    structured: dict[str, Any] | None = None


def _stream(config: RunConfig, recipe: Recipe, *, progress: Progress) -> _Result:
    """The model compressed weight by weight as it is read."""
    options = _options(config)
    specs = checkpoints.describe(config.model.path, **options).specs
    change, errors = compressor(recipe.rules, specs), {}

    def compress_one(path, spec, array):
        leaf = change(path, spec, array)
        error = float(receipt.relative_error(array, leaf))
        if not np.isfinite(error):
            raise ValueError(_not_finite(config.model.path, path))
        if leaf is not array:
            errors[path] = {"weight": error}
        return leaf

    loaded = checkpoints.load(
        config.model.path, **options, compress=compress_one, progress=_stage(progress, "compress")
    )
    return _Result(loaded, errors)


def _calibrate(config: RunConfig, recipe: Recipe, *, progress: Progress) -> _Result:
    """The model pruned and compressed layer by layer on calibration text."""
    loaded = checkpoints.load(
        config.model.path, **_options(config), progress=_stage(progress, "load")
    )
    _require_finite(loaded)
    drawn = text_windows(config.calibration, load_tokenizer(config), CALIBRATION_TEXT)
    model, leaves = loaded.model, dict(zip(loaded.model.specs, loaded.leaves, strict=True))
    structured, errors = None, {}
    if recipe.structure:
        model, leaves, structured = prune_structure(
            model,
            leaves,
            drawn.tokens,
            recipe.structure,
            damp=recipe.options.damp,
            progress=_stage(progress, "prune"),
        )
    if recipe.rules:
        leaves, errors = compress_layers(
            model,
            leaves,
            drawn.tokens,
            recipe.rules,
            options=recipe.options,
            progress=_stage(progress, "compress"),
        )
    kept = tuple(leaves[path] for path in model.specs)
    loaded = dataclasses.replace(
        loaded, config=model.config, model=model, leaves=kept, bytes=sum(map(leaf_bytes, kept))
    )
    return _Result(loaded, errors, drawn.receipt, structured)


def _measured(config: RunConfig, dense: Dense, loaded: Loaded, *, size: dict, progress: Progress):
    """Quality, greedy prefix and speed against the dense model."""
    asked = config.receipt
    found = measure_quality(config, dense, loaded, progress=progress)
    ours = measures.measure(
        loaded,
        config.engine,
        asked=asked,
        windows=dense.windows,
        progress=_stage(progress, "compressed in the engine"),
    )
    greedy = prefix_row(ours.answers, dense.measures.answers, seed=asked.seed)
    speed = None
    if asked.repeats:
        kept = size["kept_fraction"]
        speed = {"repeats": asked.repeats, "device": device_name()}
        for name in ("decode", "prefill"):
            best = [max(getattr(m, name)) for m in (dense.measures, ours)]
            speed[name] = receipt.speed_row(*best, kept_fraction=kept)
    return found.as_dict(), greedy, speed


def measure_quality(
    config: RunConfig, dense: Dense, loaded: Loaded, *, progress: Progress
) -> quality.Quality:
    """A compressed model against the dense one."""
    return quality.compare(
        dense.reference,
        loaded.model,
        loaded.leaves,
        seed=config.receipt.seed,
        progress=_windows(progress, "compressed on held-out text"),
    )


def prefix_row(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], *, seed: int
) -> dict[str, Any] | None:
    """Mean length of the common beginning of greedy answers, with its interval."""
    if not ours:
        return None
    lengths = [quality.common_prefix(a, b) for a, b in zip(ours, theirs, strict=True)]
    row = quality.estimate(lengths, seed=seed).as_dict()
    return row | {"of": len(ours[0]), "prompts": len(ours)}


def _require_finite(loaded: Loaded) -> None:
    for path, leaf in zip(loaded.model.specs, loaded.leaves, strict=True):
        if isinstance(leaf, CompressedTensor):
            raise ValueError(
                f"{loaded.tokenizer_source} holds compressed weights ({path} and others): compress "
                "the original model"
            )
        if not np.isfinite(float(receipt.relative_error(leaf, leaf))):
            raise ValueError(_not_finite(loaded.tokenizer_source, path))


def _not_finite(model: str | os.PathLike, path: str) -> str:
    return (
        f"{os.fspath(model)}: weight {path} has values that are not finite (NaN or infinity): the "
        "checkpoint is damaged, fetch it again"
    )


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _stage(progress: Progress, stage: str) -> Callable[[int, int, str], None]:
    return lambda done, total, what: progress(stage, done, total, what)


def _windows(progress: Progress, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(stage, done, total, "window")
