"""A foreign checkpoint (Hugging Face or GGUF) becomes leaves, one parameter at a time.

`open_foreign` reads config and tensor table, `match` fits the file's names to ours before anything
is read, `stream` does the work: read, combine in numpy, transfer, compress, forget. The host never
holds more than the sources of one parameter and their combination; one of several hosts reads what
its devices have of it (`combine.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lepton_jax.checkpoints.combine import bytes_of, in_rows, read
from lepton_jax.checkpoints.errors import CheckpointError, is_out_of_memory
from lepton_jax.checkpoints.gguf_files import open_gguf
from lepton_jax.checkpoints.json_files import read_json
from lepton_jax.checkpoints.safetensors_files import open_safetensors
from lepton_jax.checkpoints.source import TensorFiles
from lepton_jax.models.build import Model
from lepton_jax.models.config import ModelConfig
from lepton_jax.models.keymap import Mapping, expand
from lepton_jax.models.registry import canonical_name, config_from_gguf, config_from_hf, key_map
from lepton_jax.sharding import Placement
from lepton_jax.tensors import ParamSpec, Region

# What becomes of each parameter; with a method `divides(path, spec, region) -> bool`, which says
# whether the leaf of a region is that region of the leaf, it may be called with regions.
Compress = Callable[[str, ParamSpec, jax.Array], Any]
Progress = Callable[[int, int, str], None]
_COUNTS = ("num_hidden_layers", "num_local_experts", "num_experts", "block_count", "expert_count")


def open_foreign(kind: str, place: Path) -> tuple[ModelConfig, TensorFiles]:
    """Config and tensors of a Hugging Face directory ("hf") or a GGUF file ("gguf")."""
    if kind == "gguf":
        metadata, files = open_gguf(place)
        values = {key.split(".", 1)[-1]: value for key, value in metadata.items()}
        config_of = functools.partial(config_from_gguf, metadata, files.names)
    else:
        values, files = read_json(place / "config.json"), open_safetensors(place)
        config_of = functools.partial(config_from_hf, values, files.names)
    _check_counts(place, values, tensors=len(files.names))
    try:
        config = config_of()
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{place}: {error}") from error
    return config, files


def _check_counts(place: Path, values: dict[str, Any], *, tensors: int) -> None:
    """Layers and experts are spelled out one by one: a damaged count must not fill the memory."""
    nested = values.get("text_config")
    for found in (values, nested if isinstance(nested, dict) else {}):
        for key in _COUNTS:
            count = found.get(key)
            if isinstance(count, int) and count > max(tensors, 1024):
                raise CheckpointError(
                    f"{place}: {key} is {count}, more than its {tensors} tensors allow: "
                    "it is damaged"
                )


def match(model: Model, files: TensorFiles, *, kind: str) -> dict[str, Mapping]:
    """For each parameter its mapping, sources renamed to the file's names; `kind` "hf" or "gguf".

    Raises one CheckpointError with all missing, duplicate, left-over and ill-fitting names.
    """
    config, known, faults = model.config, {}, []
    twice = []
    for name in files.names:
        ours = canonical_name(config, kind, name)
        if ours in known:
            twice += [known[ours], name]
        elif ours is not None:
            known[ours] = name
    mappings = {m.target: m for m in expand(key_map(config, kind), config)}
    if set(mappings) != set(model.specs):
        faults.append(_listed("parameters without a mapping", set(model.specs) ^ set(mappings)))
    needed = {source for mapping in mappings.values() for source in mapping.sources}
    faults.append(_listed("missing", needed - set(known)))
    faults.append(_listed("duplicate", twice))
    faults.append(_listed("left over", [known[name] for name in set(known) - needed]))
    if not any(faults):
        faults.append(_ill_fitting(model, files, mappings=mappings, known=known))
    if any(faults):
        raise CheckpointError(
            f"{files.path}: its weights don't fit a {config.family} model of {config.num_layers} "
            f"layers: {'; '.join(filter(None, faults))}. The config belongs to another checkpoint, "
            f"or lepton_jax/models/families/{config.family}.py needs these names"
        )
    return {
        target: dataclasses.replace(m, sources=tuple(known[source] for source in m.sources))
        for target, m in mappings.items()
    }


def _listed(what: str, names: Iterable[str]) -> str:
    """All names; where many differ only in numbers, these as `*` with their count."""
    names = sorted(names)
    if not names:
        return ""
    if len(names) > 12:
        patterns: dict[str, list[str]] = {}
        for name in names:
            patterns.setdefault(re.sub(r"\d+", "*", name), []).append(name)
        names = [
            f"{pattern} ({len(same)} of them)" if len(same) > 1 else same[0]
            for pattern, same in patterns.items()
        ]
    return f"{what}: {', '.join(names)}"


def _ill_fitting(
    model: Model, files: TensorFiles, *, mappings: dict[str, Mapping], known: dict[str, str]
) -> str:
    """Mappings only reorder: a parameter has as many values as its sources."""
    wrong = []
    for target, mapping in mappings.items():
        sources = [known[source] for source in mapping.sources]
        if sum(files.tensors[name].size for name in sources) != model.specs[target].size:
            shapes = ", ".join(f"{name} {files.shape(name)}" for name in sources[:6])
            wrong.append(f"{target} {model.specs[target].shape} from {shapes}")
        for name in sources:
            files.dtype(name)
    return f"sizes that don't fit: {'; '.join(wrong[:8])}" if wrong else ""


def stream(
    model: Model,
    files: TensorFiles,
    *,
    mappings: dict[str, Mapping],
    compress: Compress | None,
    progress: Progress | None,
    placement: Placement,
) -> tuple[Any, ...]:
    """The leaves in the order of `model.specs`, each finished before the next is read."""

    def region_of(path: str, spec: ParamSpec) -> Region | None:
        """What this process needs of a parameter; None: all of it."""
        region = placement.region(spec)
        if region is None or not in_rows(files, mappings[path], spec):
            return None
        divides = getattr(compress, "divides", None)
        apart = compress is None or (divides is not None and divides(path, spec, region))
        return region if apart else None

    regions = {path: region_of(path, spec) for path, spec in model.specs.items()}
    total = sum(bytes_of(files, mappings[p], s, regions[p]) for p, s in model.specs.items())
    leaves = []
    for path, spec in model.specs.items():
        mapping, region = mappings[path], regions[path]
        try:
            array = read(model.config, files, mapping=mapping, spec=spec, region=region)
            how = dict(model=model, compress=compress, placement=placement, region=region)
            leaves.append(placed(path, array, **how))
            del array
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if is_out_of_memory(error):
                raise _out_of_memory(model, files, path=path) from error
            raise
        if progress is not None:
            progress(files.bytes_read, total, path)
    return tuple(leaves)


def placed(
    path: str,
    leaf: Any,
    *,
    model: Model,
    compress: Compress | None,
    placement: Placement,
    region: Region | None = None,
) -> Any:
    """One parameter, or this process's region of it, compressed and on its devices; ready, so that
    its sources can go.

    Compressing may need all of a weight, such as the largest value of a row: it is done on the
    first device, which holds all of that for the moment. Else a device gets its part only.
    """
    spec = model.specs[path]
    if compress is not None:
        leaf = compress(path, spec, jax.device_put(leaf, placement.first))
    try:
        return jax.block_until_ready(placement.put(spec, leaf, region))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _out_of_memory(model: Model, files: TensorFiles, *, path: str) -> CheckpointError:
    gib = sum(spec.nbytes for spec in model.specs.values()) / 2**30
    return CheckpointError(
        f"{files.path}: out of memory at {path}: uncompressed, the model takes {gib:.2f} GiB in "
        f"{np.dtype(model.dtype).name}. Use model.dtype=bfloat16, compression.preset=int8, or a "
        "larger device"
    )
