"""Sources of a checkpoint become one parameter, or the part that this process's devices have of it.

A part is found without knowing how a family stores its weights: the numbers of the sources' rows go
through the same reordering as the rows would, and those that come out where the part lies are read.
Read next: `source.py` (reading), `models/keymap.py` (the reorderings).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from lepton_jax.checkpoints.errors import CheckpointError
from lepton_jax.checkpoints.source import TensorFiles
from lepton_jax.models.config import ModelConfig
from lepton_jax.models.keymap import Mapping
from lepton_jax.tensors import ParamSpec, Region


def read(
    config: ModelConfig,
    files: TensorFiles,
    *,
    mapping: Mapping,
    spec: ParamSpec,
    region: Region | None = None,
) -> np.ndarray:
    """A parameter in its spec's shape and dtype, or what lies in a region of one that is `in_rows`,
    for which only the rows that it has a part of are read. The sources are freed on return.
    """
    if region is not None:
        return _region(config, files, mapping=mapping, spec=spec, region=region)
    arrays = [files.read(name, np.dtype(spec.dtype)) for name in mapping.sources]
    array = _combined(config, arrays, mapping=mapping, shape=spec.shape, files=files)
    return array.astype(spec.dtype, copy=False)


def in_rows(files: TensorFiles, mapping: Mapping, spec: ParamSpec) -> bool:
    """Whether rows of the sources are rows of the parameter, so that a region can be read."""
    shapes = [files.shape(name) for name in mapping.sources]
    return spec.inputs == 1 and all(
        len(shape) > 1 and shape[-1] == spec.shape[-1] for shape in shapes
    )


def bytes_of(files: TensorFiles, mapping: Mapping, spec: ParamSpec, region: Region | None) -> int:
    """That `read` reads."""
    whole = sum(files.tensors[name].nbytes for name in mapping.sources)
    if region is None:
        return whole
    return whole * math.prod(region.shape[:-1]) // math.prod(spec.shape[:-1])


def _region(
    config: ModelConfig, files: TensorFiles, *, mapping: Mapping, spec: ParamSpec, region: Region
) -> np.ndarray:
    counts = [math.prod(files.shape(name)[:-1]) for name in mapping.sources]
    firsts = (0, *itertools.accumulate(counts))  # row numbers of all sources, one after the other
    numbers = [
        np.arange(first, first + count).reshape(*files.shape(name)[:-1], 1)
        for name, first, count in zip(mapping.sources, firsts, counts, strict=False)
    ]
    *outs, columns = region.slices
    shape, dtype = (*spec.shape[:-1], 1), np.dtype(spec.dtype)
    wanted = _combined(config, numbers, mapping=mapping, shape=shape, files=files)
    wanted = wanted[tuple(outs)].reshape(-1)
    found = np.empty((wanted.size, columns.stop - columns.start), dtype)
    order = np.argsort(wanted, kind="stable")
    for source, run in _runs(wanted[order], firsts):
        first = int(wanted[order[run.start]]) - firsts[source]
        rows = slice(first, first + run.stop - run.start)
        name = mapping.sources[source]
        found[order[run]] = files.read_rows(name, dtype, rows=rows, columns=columns)
    return found.reshape(region.shape)


def _runs(rows: np.ndarray, firsts: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    """Which source, and where, for each run of consecutive ones among ascending row numbers."""
    new = (np.diff(rows) != 1) | np.isin(rows[1:], firsts)
    edges = [0, *(np.flatnonzero(new) + 1), len(rows)]
    for first, end in itertools.pairwise(edges):
        yield int(np.searchsorted(firsts, rows[first], side="right")) - 1, slice(first, end)


def _combined(
    config: ModelConfig,
    arrays: list[np.ndarray],
    *,
    mapping: Mapping,
    shape: tuple[int, ...],
    files: TensorFiles,
) -> np.ndarray:
    """Sources in the order of the parameter, which must give this shape."""
    sources = ", ".join(f"{name} {files.shape(name)}" for name in mapping.sources)
    try:
        array = mapping.combine(config, *arrays)
    except ValueError as error:
        raise CheckpointError(
            f"{files.path}: {mapping.target} can't be made of {sources}: {error}"
        ) from error
    if array.shape != shape:
        raise CheckpointError(
            f"{files.path}: {mapping.target} became {array.shape} instead of {shape} from {sources}"
        )
    return array
