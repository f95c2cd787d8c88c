"""The receipt of a compressed model: what was done to it, what that cost, and how to check it.

    receipt.json    all of it          receipt.html    the same to look at (receipt_page.py)

Both lie in the checkpoint's directory. A receipt belongs to its weights: it holds a digest of them,
and the checkpoint's fingerprint is made from that. Here: putting it together, reading it back, its
one-line digest. Measuring is `quality.py`; doing it all is `lepton_jax/jobs/compress.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.checkpoints.loaded import digest
from lepton_jax.compression.automatic import Choice
from lepton_jax.compression.recipe import parse_scheme, scheme_text
from lepton_jax.compression.sensitivity import Sensitivity
from lepton_jax.models.build import Model
from lepton_jax.models.config import ModelConfig
from lepton_jax.tensors import CompressedTensor
from lepton_jax.tensors.leaves import dense_of

NAME = "receipt.json"
FORMAT = "lepton_jax receipt"
VERSION = 3
_KEYS = (
    "fingerprint", "weights_sha256", "source", "recipe", "measure", "size", "weights", "quality",
    "greedy_prefix", "speed", "held_out", "calibration", "structured", "recovery",
    "sensitivity", "kv", "engine", "environment", "digest", "page_sha256",
)  # fmt: skip
PHASES = ("decode", "prefill")  # that are timed
NONE_SAVED = "none saved"
_NOTICEABLE = 0.95  # a time of more than this share of the dense model's is no saving
_NEAR = 1.15  # times the ideal, at which a measured time counts as ideal
Receipt = dict[str, Any]


class WeightsHash:
    """SHA-256 of every bit of weights, their types and their names, as they come one by one."""

    def __init__(self):
        self._total = hashlib.sha256()

    def add(self, path: str, leaf: Any) -> None:
        compressed = isinstance(leaf, CompressedTensor)
        arrays = leaf.arrays() if compressed else {"": leaf}
        self._total.update(json.dumps([path, leaf.static() if compressed else None]).encode())
        for name, array in arrays.items():
            head = [name, str(jnp.dtype(array.dtype)), list(array.shape)]
            self._total.update(json.dumps(head).encode())
            self._total.update(np.asarray(array).reshape(-1).view(np.uint8))

    def hexdigest(self) -> str:
        return self._total.hexdigest()


def weights_sha256(specs: Mapping[str, Any], leaves: Sequence[Any]) -> str:
    """`WeightsHash` of all leaves."""
    total = WeightsHash()
    for path, leaf in zip(specs, leaves, strict=True):
        total.add(path, leaf)
    return total.hexdigest()


def fingerprint_of(source: str, weights: str) -> str:
    """16 hex digits for a compressed model, from its source's fingerprint and `weights_sha256`."""
    return digest([source, weights])


@jax.jit
def _nonzero(leaf: Any) -> jax.Array:
    return jnp.sum((dense_of(leaf, jnp.float32) != 0).astype(jnp.int32), axis=-1)


def weight_rows(
    model: Model,
    leaves: Sequence[Any],
    *,
    schemes: Mapping[str, Any],
    errors: Mapping[str, Mapping],
) -> list[dict[str, Any]]:
    """A row for each weight of a product: what it became, its bytes and its relative error.

    Args:
      model: the compressed model; `leaves` its weights.
      schemes: `Scheme` of each weight that changed.
      errors: of each of these by kind: "weight" is `relative_error`, "product" that of its product
        with calibration inputs where they were gathered, "exponent" that of the scales of its
        inputs where it was smoothed.
    """
    rows = []
    for (path, spec), leaf in zip(model.specs.items(), leaves, strict=True):
        if not spec.inputs:
            continue
        scheme, kept = schemes.get(path), spec.size
        if scheme is not None and scheme.prune != "none":
            kept = int(np.asarray(_nonzero(leaf), np.int64).sum())
        error = errors.get(path, {"weight": 0.0})
        rows.append(
            {
                "path": path,
                "shape": list(spec.shape),
                "type": type(leaf).__name__ if isinstance(leaf, CompressedTensor) else "array",
                "bytes": sum(array.nbytes for array in jax.tree.leaves(leaf)),
                "kept": kept,
                "error": error["weight"],
                "product_error": error.get("product"),
                "exponent": error.get("exponent"),
            }
        )
    return rows


def sensitivity(choice: Choice) -> dict[str, Any]:
    """What automatic mixed precision measured: of each weight the predicted KL in nats a token and
    the bytes under each scheme, and which one it got; and the prediction for the whole. Of what
    GPTQ rounds the KL is that of rounding to nearest.
    """
    found = choice.sensitivity
    rows = [
        {"path": path, "kl": kl.tolist(), "bytes": size.tolist(), "chosen": chosen}
        for path, kl, size, chosen in zip(
            found.paths, found.kl, found.bytes, choice.chosen, strict=True
        )
    ]
    return {
        "schemes": [scheme_text(scheme) for scheme in found.schemes],
        "predicted_kl": choice.kl,
        "predicted_bytes": choice.bytes,
        "weights": rows,
    }


def read_sensitivity(told: Mapping[str, Any]) -> Sensitivity:
    """What was measured, from what `sensitivity` made of it."""
    rows = told["weights"]
    return Sensitivity(
        paths=tuple(row["path"] for row in rows),
        schemes=tuple(map(parse_scheme, told["schemes"])),
        kl=np.array([row["kl"] for row in rows]),
        bytes=np.array([row["bytes"] for row in rows], np.int64),
    )


def sizes(
    dense: Model, dense_bytes: int, *, model: Model, rows: Sequence[Mapping], bytes_now: int
) -> dict:
    """Bytes, kept parameters k of N, and what that makes of a token's products at best.

    A table of embeddings that only looks rows up is no part of k and N. "compute_fraction" is k/N
    of what multiplies one token: of experts as many as it visits, so that leaving experts out saves
    memory and no products.
    """
    looked_up = () if dense.config.tie_embeddings else ("embed",)
    counts = {p: s.size for p, s in dense.specs.items() if s.inputs and p not in looked_up}
    kept = {row["path"]: row["kept"] for row in rows if row["path"] not in looked_up}
    k, total = sum(kept.values()), sum(counts.values())
    return {
        "dense_bytes": dense_bytes,
        "device_bytes": bytes_now,
        "parameters": total,
        "kept": k,
        "kept_fraction": k / total,
        "compute_fraction": _visited(kept, model.config) / _visited(counts, dense.config),
    }


def _visited(counts: Mapping[str, int], config: ModelConfig) -> float:
    """Parameters that multiply one token."""
    share = config.experts_per_token / config.num_experts if config.num_experts else 1.0
    return sum(n * (share if ".experts_" in path else 1.0) for path, n in counts.items())


def environment() -> dict[str, Any]:
    """Device and versions."""
    device = jax.local_devices()[0]
    packages = ("jax", "jaxlib", "flax", "numpy")
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "lepton_jax": _version("lepton_jax"),
        **{name: metadata.version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout
        return "not installed"


def digest_line(receipt: Mapping[str, Any]) -> str:
    """What `run` prints when it loads the model."""
    size, quality, speed = receipt["size"], receipt["quality"], receipt["speed"]
    parts = []
    if quality:
        kl, ratio = quality["kl"], quality["perplexity_ratio"]["value"]
        parts += [
            f"KL {kl['value']:.2g} [{kl['low']:.2g}, {kl['high']:.2g}] nats a token",
            f"perplexity {quality['dense_perplexity']['value']:.2f} -> "
            f"{quality['perplexity']['value']:.2f} ({ratio - 1:+.2%})",
            f"top-1 {quality['top1']['value']:.1%}",
        ]
    if receipt["kv"]:
        ratio = receipt["kv"]["perplexity_ratio"]["value"]
        parts.append(f"with a {receipt['kv']['dtype']} cache {ratio - 1:+.2%}")
    parts.append(f"{size['device_bytes'] / size['dense_bytes']:.0%} of the bytes")
    if size["kept"] != size["parameters"]:
        parts.append(f"k/N {size['kept_fraction']:.2f}")
    if speed:
        parts += [_time_text(name, speed[name], speed["saved"][name]) for name in PHASES]
    title, recovery = receipt["recipe"]["title"], receipt["recovery"]
    if recovery:
        title += f", recovered ({recovery['train']})"
        if recovery["gap_closed"] is not None:
            parts.insert(0, f"{recovery['gap_closed']:.0%} of the perplexity gap closed")
    return f"{title}: {', '.join(parts)}"


def _time_text(name: str, row: Mapping[str, float], saved: str) -> str:
    ideal = f"{row['ideal_compute_ratio']:.2f}" + (f"; {saved}" if saved == NONE_SAVED else "")
    return f"{name} time {row['measured_time_ratio']:.2f} (ideal {ideal})"


def to_text(receipt: Receipt) -> str:
    """receipt.json's content."""
    return json.dumps({"format": FORMAT, "version": VERSION} | receipt, indent=1) + "\n"


def read(directory: Path) -> Receipt:
    """A checkpoint's receipt. Raises ValueError: none is there, or it is damaged."""
    place = directory / NAME
    try:
        receipt = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{directory} has no {NAME}: it isn't the output of lepton_jax.compress"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{place} can't be read: {error}") from error
    if not isinstance(receipt, dict) or receipt.get("format") != FORMAT:
        raise ValueError(f"{place} is no receipt of lepton_jax")
    if receipt.get("version") != VERSION:
        raise ValueError(
            f"{place}: version {receipt.get('version')!r:.20} is unknown; this release reads "
            f"{VERSION}. Compress the model again"
        )
    missing = [key for key in _KEYS if key not in receipt]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}: it is damaged")
    return receipt


def require_match(receipt: Receipt, fingerprint: str, *, place: Path) -> None:
    """Raises ValueError where a receipt is that of other weights than the checkpoint's."""
    if receipt["fingerprint"] != fingerprint:
        raise ValueError(
            f"{place / NAME} is the receipt of other weights ({receipt['fingerprint']!r:.40} "
            f"instead of {fingerprint}): remove it, or compress the model again"
        )


def of_loaded(path: str | Path, fingerprint: str) -> Receipt | None:
    """The receipt beside a model that was just loaded; None where it has none.

    Raises ValueError where it is damaged or that of other weights.
    """
    place = Path(path).expanduser()
    if not (place / NAME).is_file():
        return None
    receipt = read(place)
    require_match(receipt, fingerprint, place=place)
    return receipt


def speed_row(dense: float, now: float, *, compute_fraction: float) -> dict[str, float]:
    """Tokens/s of both and their ratio, beside the ideal share of compute (`sizes`)."""
    return {
        "dense": dense,
        "compressed": now,
        "ratio": now / dense,
        "ideal_compute_ratio": compute_fraction,
        "measured_time_ratio": dense / now,
    }


def speeds(
    dense: Mapping[str, float], now: Mapping[str, float], size: Mapping[str, Any]
) -> dict[str, Any]:
    """A `speed_row` of each phase, and under "saved" in words what comes of them and of the bytes.

    Args:
      dense, now: tokens/s of each of PHASES, before and after compression.
      size: what `sizes` gave.
    """
    ideal = size["compute_fraction"]
    rows = {name: speed_row(dense[name], now[name], compute_fraction=ideal) for name in PHASES}
    memory = "saved" if size["device_bytes"] < size["dense_bytes"] else NONE_SAVED
    return rows | {"saved": {"memory": memory} | {n: _time_saved(r) for n, r in rows.items()}}


def _time_saved(row: Mapping[str, float]) -> str:
    if row["measured_time_ratio"] > _NOTICEABLE:
        return NONE_SAVED
    if row["measured_time_ratio"] > _NEAR * row["ideal_compute_ratio"]:
        return "saved, but less than the ideal"
    return "saved, as the ideal or more"


def within(recorded: float, measured: float, *, relative: float, absolute: float) -> bool:
    """Whether a number is reproduced."""
    return math.isclose(recorded, measured, rel_tol=relative, abs_tol=absolute)
