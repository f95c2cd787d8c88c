"""Measures a compressed model again and compares with its receipt.

What must come out: the hash of the weights and, where quality was measured, of the source's too,
sizes exactly, quality and its intervals within what another device or release of jax may change,
and what the receipt tells of its own numbers: its digest, its page, what is saved, the share of a
gap that was closed. Left out are
tokens/s, which depend on the machine and its company, and what only the compression itself saw:
errors of weights, calibration, training. Read next: `compress.py`, `compression/receipt.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.checkpoints.locate import MANIFEST_NAME
from lepton_jax.checkpoints.orbax_store import disk_bytes
from lepton_jax.compression import receipt as receipts
from lepton_jax.compression import receipt_page
from lepton_jax.compression.presets import scheme_of_each
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import (
    EngineSection,
    ModelSection,
    ReceiptSection,
    RunConfig,
    from_mapping,
)
from lepton_jax.engine.sizing import kv_dtype_of
from lepton_jax.jobs.compress import (
    gap_closed,
    measure_dense,
    measure_kv,
    measure_prefix,
    measure_quality,
)
from lepton_jax.jobs.compress_inputs import Progress, dense_bytes, describe, silent
from lepton_jax.tensors import CompressedTensor

_OF_A_WEIGHT = ("path", "shape", "type", "bytes", "kept")
_ENDS = ("value", "low", "high")
_RELATIVE = {"perplexity": 1e-3, "dense_perplexity": 1e-3, "perplexity_ratio": 1e-3, "kl": 2e-2}
_ABSOLUTE = {"kl": 2e-6, "top1": 3e-3, "top5": 3e-3}


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of a verification: what the receipt says, what was found, and whether it fits."""

    name: str
    recorded: object
    found: object
    fits: bool


def verify_receipt(
    directory: str | Path, *, dense: str = "", progress: Progress = silent
) -> list[Check]:
    """All checks of a checkpoint's receipt.

    Args:
      directory: of the compressed model.
      dense: path of the uncompressed one; "" for what the receipt says.
      progress: called with stage, done, total and what is under way.

    Raises ValueError: no receipt, another format, or the dense model isn't there or is another.
    """
    place = Path(directory).expanduser()
    receipt = receipts.read(place)
    _require_weights(place)
    loaded = checkpoints.load(place, progress=lambda *at: progress("load compressed", *at))
    checks = _hashes(receipt, loaded)
    if failures(checks):
        return checks
    source = receipt["source"]
    path = dense or source["path"]
    if checkpoints.identify(path) != source["fingerprint"]:
        raise ValueError(
            f"{path} isn't the model that was compressed: name that one with --dense=PATH"
        )
    config = RunConfig(
        model=ModelSection(
            path=path,
            dtype=source["dtype"],
            tokenizer=source["tokenizer"],
            chat_variables=source["chat_variables"],
        ),
        engine=_engine(receipt, loaded),
        receipt=dataclasses.replace(
            from_mapping(ReceiptSection, receipt["measure"], where="receipt.measure"), repeats=0
        ),
    )
    checks += _sizes(place, receipt, config, loaded=loaded)
    if failures(checks):
        return checks
    if receipt["quality"]:
        checks += _measured(receipt, config, loaded, progress)
    return checks + _told(place, receipt)


def _engine(receipt: receipts.Receipt, loaded: Loaded) -> EngineSection:
    """What the compressed model is asked in, with the cache that it had when it was measured."""
    engine = from_mapping(EngineSection, receipt["engine"], where="receipt.engine")
    if receipt.get("caches"):
        return dataclasses.replace(engine, kv_dtype=receipt["caches"]["compressed"])
    # Receipts that name no caches are of a time when "auto" depended on what was compressed.
    own = kv_dtype_of(
        engine,
        loaded.model.specs["embed"].dtype,
        compressed=any(isinstance(leaf, CompressedTensor) for leaf in loaded.leaves),
    )
    return dataclasses.replace(engine, kv_dtype=own.name)


def _hashes(receipt: receipts.Receipt, loaded: Loaded) -> list[Check]:
    weights = receipts.weights_sha256(loaded.model.specs, loaded.leaves)
    fingerprint = receipts.fingerprint_of(receipt["source"]["fingerprint"], weights)
    return [
        _exact("weights_sha256", receipt["weights_sha256"], weights),
        _exact("fingerprint", receipt["fingerprint"], fingerprint),
        _exact("checkpoint's fingerprint", receipt["fingerprint"], loaded.fingerprint),
    ]


def _sizes(
    place: Path, receipt: receipts.Receipt, config: RunConfig, *, loaded: Loaded
) -> list[Check]:
    """Bytes and kept parameters, of the whole and of each weight."""
    rules = Recipe.of(rules=receipt["recipe"]["rules"]).rules
    schemes = scheme_of_each(rules, loaded.model.specs)
    rows = receipts.weight_rows(loaded.model, loaded.leaves, schemes=schemes, errors={})
    dense = describe(config)
    found = receipts.sizes(
        dense, dense_bytes(dense), model=loaded.model, rows=rows, bytes_now=loaded.bytes
    )
    found["disk_bytes"] = disk_bytes(place)
    wrong = [
        Check(f"{field} of {new.get('path')}", old.get(field), new.get(field), False)
        for old, new in itertools.zip_longest(receipt["weights"], rows, fillvalue={})
        for field in _OF_A_WEIGHT
        if old.get(field) != new.get(field)
    ]
    whole = [_exact(name, receipt["size"].get(name), value) for name, value in found.items()]
    return whole + (wrong or [_exact("weights", len(receipt["weights"]), len(rows))])


def _measured(
    receipt: receipts.Receipt, config: RunConfig, loaded: Loaded, progress: Progress
) -> list[Check]:
    """Quality and greedy answers against the dense model, whose weights are hashed on the way."""
    before = measure_dense(config, progress)
    weights = receipt["source"]["weights_sha256"]
    checks = [
        _exact("source's weights", weights, before.source["weights_sha256"]),
        _exact("held-out text", receipt["held_out"]["sha256"], before.held_out["sha256"]),
    ]
    found = measure_quality(config, before, loaded, progress=progress).as_dict()
    checks += _near(receipt["quality"], found)
    if receipt["kv"]:
        again = measure_kv(config, before, loaded, progress=progress)
        checks += _near(receipt["kv"], again, "with its cache: ")
    if receipt["greedy_prefix"]:
        again = measure_prefix(config, before, loaded, progress=progress)
        checks.append(_prefix(receipt["greedy_prefix"], again))
    return checks


def _told(place: Path, receipt: receipts.Receipt) -> list[Check]:
    """What the receipt makes of its own numbers, and whether the page is what was written."""
    speed, quality, recovery = receipt["speed"], receipt["quality"], receipt["recovery"]
    checks = []
    if speed:
        rates = [{n: speed[n][of] for n in receipts.PHASES} for of in ("dense", "compressed")]
        again = receipts.speeds(*rates, receipt["size"])
        checks += [_exact(f"speed: {name}", speed[name], row) for name, row in again.items()]
    if recovery and recovery["before"]:
        ends = [found["perplexity"]["value"] for found in (recovery["before"], quality)]
        closed = gap_closed(*ends, dense=quality["dense_perplexity"]["value"])
        checks.append(_exact("gap_closed", recovery["gap_closed"], closed))
    checks.append(_exact("digest", receipt["digest"], receipts.digest_line(receipt)))
    page = place / receipt_page.NAME
    text = page.read_bytes() if page.is_file() else b""
    checks.append(_exact(page.name, receipt["page_sha256"], hashlib.sha256(text).hexdigest()))
    return checks


def _require_weights(place: Path) -> None:
    if not (place / MANIFEST_NAME).is_file():
        raise ValueError(
            f"{place} holds a receipt without its weights: sweep again with sweep.keep=true"
        )


def failures(checks: Sequence[Check]) -> list[str]:
    """Names of the checks that don't fit."""
    return [check.name for check in checks if not check.fits]


def report(checks: Sequence[Check]) -> str:
    """A table for people."""
    rows = [("", "receipt", "measured", "")]
    rows += [
        (c.name, _short(c.recorded), _short(c.found), "ok" if c.fits else "NO") for c in checks
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _exact(name: str, recorded: object, found: object) -> Check:
    return Check(name, recorded, found, recorded == found)


def _near(recorded: Mapping, found: Mapping, where: str = "") -> list[Check]:
    """Of two qualities in JSON types, with their intervals."""
    checks = [_exact(where + "places", recorded["places"], found["places"])]
    for name in ("perplexity", "dense_perplexity", "perplexity_ratio", "kl", "top1", "top5"):
        old, new = recorded[name], found[name]
        relative, absolute = _RELATIVE.get(name, 0.0), _ABSOLUTE.get(name, 0.0)
        fits = all(
            receipts.within(old[end], new[end], relative=relative, absolute=absolute)
            for end in _ENDS
        )
        checks.append(Check(where + name, old, new, fits))
    return checks


def _prefix(recorded: Mapping, found: Mapping) -> Check:
    """One near tie that falls the other way changes an answer's length by up to all of it, and an
    end of the interval by some times that answer's share in the mean.
    """
    slack = found["of"] / found["prompts"] * 2
    fits = all(
        abs(found[end] - recorded[end]) <= (slack if end == "value" else 2 * slack) for end in _ENDS
    )
    fits &= all(found[name] == recorded[name] for name in ("of", "prompts"))
    return Check("greedy prefix", recorded, found, fits)


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and set(_ENDS) <= set(value):
        return "{:.6g} [{:.4g}, {:.4g}]".format(*(value[end] for end in _ENDS))
    if isinstance(value, Mapping):
        return " ".join(map(_short, value.values()))
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:16]
