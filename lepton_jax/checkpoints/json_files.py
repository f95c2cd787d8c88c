"""JSON objects from files that may be damaged: config.json, indexes, headers, manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lepton_jax.checkpoints.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the fault."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
    return json_object(text, path, what="the file")


def json_object(text: bytes, path: Path, *, what: str) -> dict[str, Any]:
    """The object in `text`; `path` and `what` say in errors where it stands."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: {what} must be a JSON object, found {type(value).__name__}: "
            "it is damaged; fetch it again"
        )
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a name appear twice, the last one winning: a tensor would be lost silently."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r:.120} appears twice")
        values[name] = value
    return values
