"""manifest.json of our own checkpoints: what a directory claims to hold, and the checks of that.

The format version goes up whenever an older reader would misread a newer directory. The arrays are
read by `orbax_store.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lepton_jax.checkpoints.errors import CheckpointError
from lepton_jax.checkpoints.json_files import read_json
from lepton_jax.checkpoints.source import FLOAT_DTYPES
from lepton_jax.models.config import ModelConfig, RopeConfig
from lepton_jax.tensors import LEAF_TYPES, CompressedTensor, ParamSpec

FORMAT = "lepton_jax checkpoint"
VERSION = 2
_KEYS = ("config", "dtype", "activation_dtype", "fingerprint", "tokenizer", "leaves")


def leaf_row(leaf: Any) -> dict[str, Any]:
    """A leaf in the table: type and shape, with its dtype or what its type needs to plan it."""
    if isinstance(leaf, CompressedTensor):
        row = {"type": type(leaf).__name__, "shape": list(leaf.shape)}
        return row | {"static": leaf.static()}
    return {"type": "array", "shape": list(leaf.shape), "dtype": str(leaf.dtype)}


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
      config: of the model.
      dtype: of uncompressed weights.
      activation_dtype: of the residual stream.
      fingerprint: of the checkpoint that was loaded first.
      tokenizer: what to load the tokenizer from, relative to the directory.
      leaves: `leaf_row` by parameter path.
    """

    config: ModelConfig
    dtype: str
    activation_dtype: str
    fingerprint: str
    tokenizer: str
    leaves: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        values = {field: getattr(self, field) for field in _KEYS}
        values["config"] = self.config.as_dict()
        return {"format": FORMAT, "version": VERSION} | values

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Parses manifest.json. Raises CheckpointError naming what is wrong with it."""
        values = read_json(path)
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            raise CheckpointError(
                f"{path}: format {values.get('format')!r:.60} version "
                f"{values.get('version')!r:.20} is unknown; this release reads {FORMAT!r} version "
                f"{VERSION}. Save the model again, or use the release that wrote it"
            )
        found = set(values) - {"format", "version"}
        if found != set(_KEYS):
            raise CheckpointError(
                f"{path}: keys missing {sorted(set(_KEYS) - found)}, unknown "
                f"{sorted(found - set(_KEYS))}: it is damaged"
            )
        for key in _KEYS:
            kind = dict if key in ("config", "leaves") else str
            if not isinstance(values[key], kind):
                raise CheckpointError(f"{path}: {key} is {values[key]!r:.60}: it is damaged")
        for key in ("dtype", "activation_dtype"):
            if values[key] not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{path}: {key} {values[key]!r} is unknown: allowed are "
                    f"{', '.join(FLOAT_DTYPES)}"
                )
        tokenizer = PurePosixPath(values["tokenizer"])
        if tokenizer.is_absolute() or ".." in tokenizer.parts:
            raise CheckpointError(
                f"{path}: tokenizer {str(tokenizer)!r} lies outside the directory"
            )
        for name, row in values["leaves"].items():
            _check_row(path, name, row=row)
        config = _config(path, values["config"])
        return cls(config, *(values[key] for key in _KEYS[1:]))

    def compressed(self) -> list[str]:
        """Paths of leaves that aren't plain arrays."""
        return [name for name, row in self.leaves.items() if row["type"] != "array"]

    def check_specs(self, path: Path, specs: Mapping[str, ParamSpec]) -> None:
        """The table holds exactly the model's parameters in their shapes, or CheckpointError."""
        faults = [
            f"{what} {sorted(names)[:8]}"
            for what, names in (
                ("missing", set(specs) - set(self.leaves)),
                ("left over", set(self.leaves) - set(specs)),
                (
                    "of another shape",
                    [
                        f"{name} {self.leaves[name]['shape']} instead of {list(spec.shape)}"
                        for name, spec in specs.items()
                        if name in self.leaves and self.leaves[name]["shape"] != list(spec.shape)
                    ],
                ),
            )
            if names
        ]
        if faults:
            raise CheckpointError(
                f"{path}: its leaves don't fit its config: {'; '.join(faults)}. The directory is "
                "damaged or of another release; save the model again"
            )

    def planned_leaves(self, path: Path, specs: Mapping[str, ParamSpec]) -> dict[str, Any]:
        """Leaves of ParamSpecs as stored, in the order of `specs`.

        Raises CheckpointError where a leaf's type can't hold its weight in the way it claims.
        """
        leaves = {}
        for name, spec in specs.items():
            row = self.leaves[name]
            if row["type"] == "array":
                leaves[name] = spec.astype(FLOAT_DTYPES[row["dtype"]])
                continue
            try:
                leaves[name] = LEAF_TYPES[row["type"]].planned(spec, **row["static"])
            except (ValueError, TypeError, ArithmeticError) as error:
                raise CheckpointError(
                    f"{path}: leaf {name!r} can't be a {row['type']} of {row['static']!r:.120}: "
                    f"{error}. The directory is damaged or of another release"
                ) from error
        return leaves


def _check_row(path: Path, name: str, *, row: Any) -> None:
    kind = row.get("type") if isinstance(row, dict) else None
    if kind == "array":
        good = set(row) == {"type", "shape", "dtype"} and row["dtype"] in FLOAT_DTYPES
    else:
        good = isinstance(kind, str) and kind in LEAF_TYPES
        good = good and set(row) == {"type", "shape", "static"} and isinstance(row["static"], dict)
    if not good:
        raise CheckpointError(
            f"{path}: leaf {name!r} is {row!r:.120}; known are array with shape and dtype, and "
            f"{', '.join(LEAF_TYPES)} with shape and static. It is damaged or of a newer release"
        )


def _config(path: Path, values: dict[str, Any]) -> ModelConfig:
    """A ModelConfig from JSON, which has lists for tuples. Unknown and missing fields raise."""

    def built(cls: type, fields: dict[str, Any]) -> Any:
        known = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != known:
            raise ValueError(
                f"{cls.__name__} fields missing {sorted(known - set(fields))}, unknown "
                f"{sorted(set(fields) - known)}"
            )
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**tuples)

    try:
        ropes = tuple(built(RopeConfig, rope) for rope in values.get("ropes", ()))
        return built(ModelConfig, {"has_head": True} | values | {"ropes": ropes})
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: its config can't be used: {error}. The directory is damaged or of another "
            "release; save the model again"
        ) from error
