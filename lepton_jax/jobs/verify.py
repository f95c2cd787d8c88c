"""Measures a compressed model again and compares with its receipt.

What must come out: the digest of the weights bit by bit, sizes exactly, quality within what
another device or release of jax may change. Speeds depend on the machine and its company: they are
no part of it. Read next: `compress.py`, `compression/receipt.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.checkpoints.locate import MANIFEST_NAME
from lepton_jax.compression import receipt as receipts
from lepton_jax.config import (
    EngineSection,
    ModelSection,
    ReceiptSection,
    RunConfig,
    from_mapping,
)
from lepton_jax.jobs import measures
from lepton_jax.jobs.compress import measure_dense, measure_kv, measure_quality, prefix_row
from lepton_jax.jobs.compress_inputs import Progress, silent

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
    weights = receipts.weights_sha256(loaded.model.specs, loaded.leaves)
    source = receipt["source"]
    fingerprint = receipts.fingerprint_of(source["fingerprint"], weights)
    checks = [
        _exact("weights_sha256", receipt["weights_sha256"], weights),
        _exact("fingerprint", receipt["fingerprint"], fingerprint),
        _exact("checkpoint's fingerprint", receipt["fingerprint"], loaded.fingerprint),
        _exact("device_bytes", receipt["size"]["device_bytes"], loaded.bytes),
    ]
    if not receipt["quality"] or failures(checks):
        return checks
    asked = dataclasses.replace(
        from_mapping(ReceiptSection, receipt["measure"], where="receipt.measure"), repeats=0
    )
    path = dense or source["path"]
    if checkpoints.identify(path) != source["fingerprint"]:
        raise ValueError(
            f"{path} isn't the model that was compressed: name that one with --dense=PATH"
        )
    config = RunConfig(
        model=ModelSection(path=path, dtype=source["dtype"], tokenizer=source["tokenizer"]),
        engine=from_mapping(EngineSection, receipt["engine"], where="receipt.engine"),
        receipt=asked,
    )
    before = measure_dense(config, progress)
    checks += [
        _exact("source's weights", source["weights_sha256"], before.source["weights_sha256"]),
        _exact("held-out text", receipt["held_out"]["sha256"], before.held_out["sha256"]),
    ]
    found = measure_quality(config, before, loaded, progress=progress).as_dict()
    checks += _near(receipt["quality"], found)
    if receipt["kv"]:
        again = measure_kv(config, before, loaded, progress=progress)
        checks += _near(receipt["kv"], again, "with its cache: ")
    if receipt["greedy_prefix"]:
        ours = measures.measure(
            loaded,
            config.engine,
            asked=asked,
            windows=before.windows,
            progress=lambda *at: progress("compressed in the engine", *at),
        )
        again = prefix_row(ours.answers, before.measures.answers, seed=asked.seed)
        checks.append(_prefix(receipt["greedy_prefix"], again["value"]))
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
    """Of two qualities in JSON types."""
    checks = []
    for name in ("perplexity", "dense_perplexity", "perplexity_ratio", "kl", "top1", "top5"):
        old, new = recorded[name]["value"], found[name]["value"]
        fits = receipts.within(
            old, new, relative=_RELATIVE.get(name, 0.0), absolute=_ABSOLUTE.get(name, 0.0)
        )
        checks.append(Check(where + name, old, new, fits))
    return checks


def _prefix(recorded: dict, found: float) -> Check:
    """One near tie that falls the other way changes an answer's length by up to all of it."""
    slack = recorded["of"] / recorded["prompts"] * 2
    fits = abs(found - recorded["value"]) <= slack
    return Check("greedy prefix", recorded["value"], found, fits)


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:16]
