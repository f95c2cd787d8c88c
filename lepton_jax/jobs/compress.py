"""Compresses a model and proves what that cost: weights in, a checkpoint with its receipt out.

    job = CompressJob(config)     # refuses what can't be, before anything is read
    receipt = job.run(progress)   # writes config.output

The dense model is measured first and freed; then the compressed one is made (`compress_model.py`)
and measured, and directory and receipt appear together. Where both fit into memory the dense one
comes back to be timed in turns with the other. `sweep.py` tries many recipes against one
dense model, `verify.py` measures again. The methods are in `lepton_jax/compression`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax import compile_cache
from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.checkpoints.orbax_store import disk_bytes, new_directory, save
from lepton_jax.compression import quality, receipt, receipt_page
from lepton_jax.compression.calibration_data import HELD_OUT_TEXT
from lepton_jax.compression.presets import scheme_of_each
from lepton_jax.compression.recipe import Recipe, parse_rule
from lepton_jax.config import EngineSection, RunConfig
from lepton_jax.engine.sizing import kv_dtype_of
from lepton_jax.jobs import measures
from lepton_jax.jobs.benchmark import device_name
from lepton_jax.jobs.compress_inputs import (
    Progress,
    dense_bytes,
    describe,
    load_options,
    load_tokenizer,
    require_alone,
    require_finite,
    require_fit,
    require_texts,
    silent,
    stage,
    text_windows,
    windows_of,
)
from lepton_jax.jobs.compress_model import Result, make_model
from lepton_jax.jobs.recovery import folder_of
from lepton_jax.kernels.kv_cache import QUANTIZED
from lepton_jax.models.build import Model


@dataclasses.dataclass(frozen=True)
class Dense:
    """What is known of the model before compression; its weights are freed.

    Attributes:
      model: its specs.
      source: path, tokenizer, fingerprint and dtype, and `weights_sha256` where they were loaded.
      bytes: of its weights.
      held_out: what the receipt says of the text.
      windows: int32 `[windows, T]` of that text.
      reference: its predictions there; None, as the next, where nothing is compared.
      answers: token ids of its greedy answers.
      rates: its tokens/s by phase, where it is too large to be timed beside the compressed model.
    """

    model: Model
    source: dict[str, str]
    bytes: int
    held_out: dict[str, Any] | None = None
    windows: np.ndarray | None = None
    reference: quality.Reference | None = None
    answers: list[list[int]] | None = None
    rates: dict[str, float] | None = None


class CompressJob:
    """One recipe on one model."""

    def __init__(self, config: RunConfig):
        """Raises ValueError on a recipe or an output that can't be."""
        require_alone(config)
        if config.sweep.recipes:
            raise ValueError(
                "sweep.recipes are for the driver, python -m lepton_jax.compress: leave them out"
            )
        self.config = config
        self.recipe = Recipe.from_config(config.compression)
        if not self.recipe:
            raise ValueError("compression.preset is none and there are no rules: nothing to do")
        if not config.output:
            raise ValueError("output is empty: name the directory to write, --config.output=DIR")
        self.output = new_directory(config.output)

    def run(self, progress: Progress = silent) -> receipt.Receipt:
        """Measures, compresses, measures again and writes; the receipt."""
        model = describe(self.config)
        require_fit(self.config, self.recipe, model)
        require_texts(self.config, model, calibrated=bool(self.recipe.calibrated))
        dense = measure_dense(self.config, progress)
        made = compress(self.config, self.recipe, dense, progress=progress)
        final = write(self.output, made)
        if self.config.recovery.train != "none":
            shutil.rmtree(folder_of(self.output), ignore_errors=True)
        return final


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A compressed model, and its receipt but for the bytes on disk."""

    loaded: Loaded
    receipt: receipt.Receipt


def measure_dense(config: RunConfig, progress: Progress) -> Dense:
    """Loads the dense model, measures what receipts compare with, and frees it."""
    compile_cache.enable()
    asked, model = config.receipt, describe(config)
    source = {
        "path": config.model.path,
        "tokenizer": config.model.tokenizer,
        "chat_variables": dict(config.model.chat_variables),
        "fingerprint": checkpoints.identify(config.model.path),
        "dtype": np.dtype(model.dtype).name,
    }
    size = dense_bytes(model)
    if not asked.compare:
        return Dense(model, source, size)
    together = measures.fit_together(size)
    loaded = checkpoints.load(
        config.model.path, **load_options(config), progress=stage(progress, "load")
    )
    require_finite(loaded)
    source["weights_sha256"] = receipt.weights_sha256(loaded.model.specs, loaded.leaves)
    held_out = text_windows(asked, load_tokenizer(config), HELD_OUT_TEXT)
    windows = held_out.tokens
    told = windows_of(progress, "dense on held-out text")
    reference = quality.reference(loaded.model, loaded.leaves, windows, progress=told)
    side, told = _dense_side(config, loaded), stage(progress, "dense in the engine")
    answers = measures.greedy_answers(side, asked=asked, windows=windows, progress=told)
    rates = None
    if asked.repeats and not together:
        (rates,) = measures.rates([side], repeats=asked.repeats, progress=told)
    return Dense(model, source, size, held_out.receipt, windows, reference, answers, rates)


def compress(config: RunConfig, recipe: Recipe, dense: Dense, *, progress: Progress) -> Compressed:
    """The model by a recipe, measured."""
    result = make_model(config, recipe, dense.source, progress=progress)
    loaded = result.loaded
    if result.rules is not None:
        recipe = dataclasses.replace(recipe, rules=tuple(map(parse_rule, result.rules)))
    weights = receipt.weights_sha256(loaded.model.specs, loaded.leaves)
    fingerprint = receipt.fingerprint_of(dense.source["fingerprint"], weights)
    loaded = dataclasses.replace(
        loaded,
        fingerprint=fingerprint,
        tokenizer_source=Path(config.model.tokenizer or loaded.tokenizer_source),
    )
    schemes = scheme_of_each(recipe.rules, loaded.model.specs)
    rows = receipt.weight_rows(loaded.model, loaded.leaves, schemes=schemes, errors=result.errors)
    size = receipt.sizes(
        dense.model, dense.bytes, model=loaded.model, rows=rows, bytes_now=loaded.bytes
    )
    found, greedy, speed = None, None, None
    if dense.reference is not None:
        found, greedy, speed = _measured(config, dense, loaded, size=size, progress=progress)
    made = {
        "fingerprint": fingerprint,
        "weights_sha256": weights,
        "source": dense.source | {"weights_sha256": result.source_sha256},
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
        "sensitivity": result.sensitivity,
        "recovery": _recovery_told(config, dense, result, found=found, progress=progress),
        "kv": measure_kv(config, dense, loaded, progress=progress),
        "caches": caches(config.engine, dense.model) if dense.reference else None,
        "environment": receipt.environment(),
        "weights": rows,
    }
    return Compressed(loaded, made | {"digest": receipt.digest_line(made)})


def _recovery_told(
    config: RunConfig, dense: Dense, result: Result, *, found: dict | None, progress: Progress
) -> dict[str, Any] | None:
    """How the model was trained, with the quality before it; `found` is that after it."""
    if result.recovery is None:
        return None
    if found is None:
        return result.recovery | {"before": None, "gap_closed": None}
    before = measure_quality(config, dense, result.student, progress=progress)
    closed = gap_closed(
        before.perplexity.value,
        found["perplexity"]["value"],
        dense=found["dense_perplexity"]["value"],
    )
    return result.recovery | {"before": before.as_dict(), "gap_closed": closed}


def gap_closed(before: float, after: float, *, dense: float) -> float | None:
    """The share of the gap in perplexity to the dense model that recovery closed; None where
    compression left no gap.
    """
    return (before - after) / (before - dense) if before > dense else None


def write(output: Path, made: Compressed) -> receipt.Receipt:
    """The checkpoint with receipt.json and receipt.html, whole or not at all; the receipt."""
    final = {}

    def complete(folder: Path) -> None:
        final.update(made.receipt)
        final["size"] = made.receipt["size"] | {"disk_bytes": disk_bytes(folder)}
        write_receipt(folder, final)

    save(output, made.loaded, complete=complete)
    return final


def write_receipt(folder: Path, final: receipt.Receipt) -> None:
    """Both forms of a receipt, which gets the page's digest."""
    page = receipt_page.page(final)
    final["page_sha256"] = hashlib.sha256(page.encode()).hexdigest()
    (folder / receipt.NAME).write_text(receipt.to_text(final), encoding="utf-8")
    (folder / receipt_page.NAME).write_text(page, encoding="utf-8")


def _measured(config: RunConfig, dense: Dense, loaded: Loaded, *, size: dict, progress: Progress):
    """Quality, greedy prefix and speed against the dense model."""
    asked = config.receipt
    found = measure_quality(config, dense, loaded, progress=progress)
    greedy = measure_prefix(config, dense, loaded, progress=progress)
    speed = None
    if asked.repeats:
        speed = _speed(config, dense, loaded, size=size, progress=progress)
    return found.as_dict(), greedy, speed


def _speed(
    config: RunConfig, dense: Dense, loaded: Loaded, *, size: dict, progress: Progress
) -> dict[str, Any]:
    """Tokens/s of both models; the dense one is read again to take turns where it fits."""
    repeats, turns = config.receipt.repeats, dense.rates is None
    ours, told = _our_side(config, dense, loaded), stage(progress, "speed in the engine")
    if turns:
        reading = stage(progress, "load dense")
        again = checkpoints.load(config.model.path, **load_options(config), progress=reading)
        sides = _dense_side(config, again), ours
        before, now = measures.rates(sides, repeats=repeats, progress=told)
    else:
        before, (now,) = dense.rates, measures.rates([ours], repeats=repeats, progress=told)
    circumstances = {"repeats": repeats, "turns": turns, "device": device_name()}
    return circumstances | receipt.speeds(before, now, size)


def measure_quality(
    config: RunConfig,
    dense: Dense,
    loaded: Loaded,
    *,
    kv_dtype: str | None = None,
    progress: Progress,
) -> quality.Quality:
    """A compressed model against the dense one; `kv_dtype` as in `quality.compare`."""
    cached = "" if kv_dtype is None else f", {kv_dtype} cache"
    return quality.compare(
        dense.reference,
        loaded.model,
        loaded.leaves,
        seed=config.receipt.seed,
        kv_dtype=kv_dtype,
        progress=windows_of(progress, f"compressed on held-out text{cached}"),
    )


def measure_kv(
    config: RunConfig, dense: Dense, loaded: Loaded, *, progress: Progress
) -> dict[str, Any] | None:
    """Quality of a compressed model that reads keys and values from the engine's 8-bit cache; None
    where the cache is a wide one, or nothing is compared.
    """
    dtype = config.engine.kv_dtype
    if dtype not in QUANTIZED or dense.reference is None:
        return None
    found = measure_quality(config, dense, loaded, kv_dtype=dtype, progress=progress)
    return {"dtype": dtype} | found.as_dict()


def measure_prefix(
    config: RunConfig, dense: Dense, loaded: Loaded, *, progress: Progress
) -> dict[str, Any] | None:
    """How far greedy answers follow the dense model's; None where none were asked for."""
    answers = measures.greedy_answers(
        _our_side(config, dense, loaded),
        asked=config.receipt,
        windows=dense.windows,
        progress=stage(progress, "compressed in the engine"),
    )
    return _prefix_row(answers, dense.answers, seed=config.receipt.seed)


def caches(engine: EngineSection, dense: Model) -> dict[str, str]:
    """Dtypes of the caches that the "dense" and the "compressed" model are timed and asked with:
    the dense one's own, unless engine.kv_dtype names another for the compressed one.
    """
    embed = dense.specs["embed"].dtype
    own = kv_dtype_of(EngineSection(), embed, compressed=False)
    return {"dense": own.name, "compressed": kv_dtype_of(engine, embed, compressed=False).name}


def _dense_side(config: RunConfig, loaded: Loaded) -> measures.Side:
    dtype = caches(config.engine, loaded.model)["dense"]
    return loaded, dataclasses.replace(config.engine, kv_dtype=dtype)


def _our_side(config: RunConfig, dense: Dense, loaded: Loaded) -> measures.Side:
    dtype = caches(config.engine, dense.model)["compressed"]
    return loaded, dataclasses.replace(config.engine, kv_dtype=dtype)


def _prefix_row(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], *, seed: int
) -> dict[str, Any] | None:
    """Mean length of the common beginning of greedy answers, with its interval."""
    if not ours:
        return None
    lengths = [quality.common_prefix(a, b) for a, b in zip(ours, theirs, strict=True)]
    row = quality.estimate(lengths, seed=seed).as_dict()
    return row | {"of": len(ours[0]), "prompts": len(ours)}
