"""Our own checkpoints: a directory that restores to the same leaves, bit by bit.

    manifest.json   format version, config, dtypes, fingerprint, and the table of leaves
    leaves/         the arrays, by Orbax (readable with any PyTreeCheckpointer)
    tokenizer/      the tokenizer's files as they were

A directory is complete or absent: it is written under another name and renamed. What a killed
process left under such a name is removed by the next save to the same place. What the manifest
holds and how it is checked is `manifest.py`.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import glob
import json
import math
import operator
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from lepton_jax.checkpoints import orbax_arrays
from lepton_jax.checkpoints.errors import CheckpointError, is_out_of_memory, naming_damage
from lepton_jax.checkpoints.gguf_files import metadata_only
from lepton_jax.checkpoints.loaded import (
    Loaded,
    build_model,
    kept_dtype,
    leaf_bytes,
    weight_dtype,
)
from lepton_jax.checkpoints.locate import MANIFEST_NAME, local_path
from lepton_jax.checkpoints.manifest import Manifest, leaf_row
from lepton_jax.checkpoints.source import FLOAT_DTYPES
from lepton_jax.checkpoints.stream import Compress, Progress, placed
from lepton_jax.models.build import Model
from lepton_jax.sharding import Devices, Placement, grids_of_parts
from lepton_jax.sharding.partition import check_experts
from lepton_jax.tensors import CompressedTensor

_LEAVES, _TOKENIZER = "leaves", "tokenizer"
_PARTIAL = "-partial-"  # in the names of directories that aren't finished
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "config.json", "vocab.json", "merges.txt",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
_SAVE_AGAIN = "the directory is damaged, save the model again"


def save(
    path: str | os.PathLike, loaded: Loaded, *, complete: Callable[[Path], None] | None = None
) -> Path:
    """Writes a loaded model with its tokenizer to a new directory.

    Args:
      path: of the directory.
      loaded: the model.
      complete: called with the directory under its scratch name, when all but its own files are
        there; it may add files.

    Raises CheckpointError: the path exists, can't be written, the disk is full, or devices share
    the model; nothing is left behind then.
    """
    target = new_directory(path)
    for name, leaf in zip(loaded.model.specs, loaded.leaves, strict=True):
        for grid in grids_of_parts(leaf):
            raise CheckpointError(
                f"{name} lies in parts on {math.prod(grid)} devices, and {target} is to hold it "
                "whole: load the model with mesh.model=1 and save that"
            )
    scratch = lock = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        prefix = f".{target.name}{_PARTIAL}"
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        lock = _lock(scratch)
        _write(scratch, loaded)
        if complete is not None:
            complete(scratch)
        os.chmod(scratch, 0o755)  # mkdtemp's are private
        os.replace(scratch, target)
    except CheckpointError:
        raise
    except Exception as error:  # Orbax raises errors of several storage layers
        raise CheckpointError(
            f"{target} can't be written: {type(error).__name__}: {str(error)[:300]}. Check the "
            "space and permissions of its disk"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)
    return target


def _write(folder: Path, loaded: Loaded) -> None:
    paths = tuple(loaded.model.specs)
    tree = _nested({path: _arrays(leaf) for path, leaf in zip(paths, loaded.leaves, strict=True)})
    orbax_arrays.write(folder / _LEAVES, tree)
    manifest = Manifest(
        config=loaded.config,
        dtype=np.dtype(loaded.model.dtype).name,
        activation_dtype=np.dtype(loaded.model.activation_dtype).name,
        fingerprint=loaded.fingerprint,
        tokenizer=_copy_tokenizer(loaded.tokenizer_source, folder / _TOKENIZER),
        leaves={p: leaf_row(leaf) for p, leaf in zip(paths, loaded.leaves, strict=True)},
    )
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest.to_json(), indent=1) + "\n")


def disk_bytes(folder: Path) -> int:
    """Of what `save` wrote to a directory; other files in it don't count."""
    saved = [folder / MANIFEST_NAME]
    for name in (_LEAVES, _TOKENIZER):
        saved += [file for file in (folder / name).rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in saved)


def new_directory(path: str | os.PathLike) -> Path:
    """The absolute path of a directory to be written. Raises CheckpointError where it exists or is
    on no disk of this machine.
    """
    target = local_path(path).absolute()
    if target.exists():
        raise CheckpointError(f"{target} exists: name a new directory or remove it first")
    return target


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed; None where there is none to
    have: a living process holds it, or the file system knows no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(target: Path) -> None:
    """Removes what killed saves to `target` left behind: their locks went with them."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}{_PARTIAL}*"):
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def restore(
    path: Path,
    *,
    dtype: Any = "auto",
    activation_dtype: Any = None,
    compress: Compress | None = None,
    progress: Progress | None = None,
    devices: Devices | None = None,
) -> Loaded:
    """Reads a directory that `save` wrote; arguments as those of `load.load`.

    "auto" keeps the stored dtypes. Raises CheckpointError: an unknown format version, leaves that
    are missing, left over or of another shape, or `compress` on leaves that are already compressed.
    """
    manifest = Manifest.read(path / MANIFEST_NAME)
    if compress is not None and manifest.compressed():
        raise CheckpointError(
            f"{path} holds compressed leaves ({manifest.compressed()[0]} and others): load it with "
            "compression.preset=none, or compress the original checkpoint"
        )
    model = model_of(path, manifest, dtype=dtype, activation_dtype=activation_dtype)
    placement = Placement(jax.local_devices()[:1] if devices is None else devices, model.heads)
    check_experts(model.config.num_experts, placement.axis)
    planned = manifest.planned_leaves(path, model.specs)
    abstract = {name: leaf.abstract() for name, leaf in planned.items()}
    total, done, leaves = sum(map(_abstract_bytes, abstract.values())), 0, []
    with _naming_want_of_memory(path, total), orbax_arrays.reading(path / _LEAVES) as reader:
        _check_stored(path, reader, abstract=abstract)
        for group in _groups(abstract):
            own = {} if compress is not None else _own_pieces(group, model, planned, placement)
            found = _read(path, reader, group=group, own=own, placement=placement)
            for name, arrays in found.items():
                done += _abstract_bytes(abstract[name])
                dtype = model.specs[name].dtype
                if name in own:
                    pieces = placement.pieces_in(arrays)
                    pieces = [_filled(abstract[name], piece).astype(dtype) for piece in pieces]
                    leaf = jax.block_until_ready(placement.joined(pieces))
                else:
                    leaf = _filled(abstract[name], arrays).astype(dtype)
                    leaf = placed(name, leaf, model=model, compress=compress, placement=placement)
                leaves.append(leaf)
                if progress is not None:
                    progress(done, total, name)
    return Loaded(
        config=manifest.config,
        model=model,
        leaves=tuple(leaves),
        tokenizer_source=path / manifest.tokenizer,
        fingerprint=manifest.fingerprint,
        bytes=sum(map(leaf_bytes, leaves)),
    )


def model_of(
    path: Path,
    manifest: Manifest,
    *,
    dtype: Any,
    activation_dtype: Any,
    platform: str | None = None,
) -> Model:
    """The model that a manifest describes; dtype "auto" keeps both dtypes as stored."""
    weights, activations = (
        kept_dtype(FLOAT_DTYPES[stored], platform)
        for stored in (manifest.dtype, manifest.activation_dtype)
    )
    if not (isinstance(dtype, str) and dtype == "auto"):
        weights = activations = weight_dtype(dtype, weights, platform=platform)
    activations = activation_dtype or activations
    model = build_model(path, manifest.config, dtype=weights, activation_dtype=activations)
    manifest.check_specs(path, model.specs)
    return model


def _arrays(leaf: Any) -> Any:
    """A leaf in plain containers, so that the files can be read without our types."""
    return leaf.arrays() if isinstance(leaf, CompressedTensor) else leaf


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """`{"layers.0.qkv": x}` as `{"layers": {"0": {"qkv": x}}}`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, last = path.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree


def _abstract_bytes(leaf: Any) -> int:
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(leaf))


def _groups(abstract: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Neighbouring leaves that together are no larger than the largest: a call costs 20 ms."""
    limit = max(map(_abstract_bytes, abstract.values()))
    group, size = {}, 0
    for name, leaf in abstract.items():
        if group and size + _abstract_bytes(leaf) > limit:
            yield group
            group, size = {}, 0
        group[name] = leaf
        size += _abstract_bytes(leaf)
    yield group


def _check_stored(path: Path, reader: orbax_arrays.Reader, *, abstract: dict[str, Any]) -> None:
    """The files hold exactly the arrays that the manifest lists."""
    expected = _rows(_nested({name: _arrays(leaf) for name, leaf in abstract.items()}))
    with naming_damage(f"{path / _LEAVES}: its table can't be read", _SAVE_AGAIN):
        stored = _rows(reader.table())
    faults = [
        f"{what} {sorted(names)[:8]}"
        for what, names in (
            ("missing", set(expected) - set(stored)),
            ("left over", set(stored) - set(expected)),
            ("different", {n for n in set(stored) & set(expected) if stored[n] != expected[n]}),
        )
        if names
    ]
    if faults:
        raise CheckpointError(
            f"{path / _LEAVES} doesn't fit {MANIFEST_NAME}: {'; '.join(faults)}; {_SAVE_AGAIN}"
        )


@contextmanager
def _naming_want_of_memory(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: out of memory: its leaves take {size / 2**30:.2f} GiB. Use a larger device, "
            "or several with mesh.model"
        ) from error


def _rows(tree: Any) -> dict[str, tuple]:
    """Shape and dtype by the names on the way to each array."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        ".".join(str(key.key) for key in keys): (tuple(x.shape), str(jax.numpy.dtype(x.dtype)))
        for keys, x in flat
    }


def _own_pieces(
    group: Iterable[str], model: Model, planned: dict[str, Any], placement: Placement
) -> dict[str, Any]:
    """Shardings of the arrays of those leaves of which each device can read its own piece."""
    found = {n: placement.shardings_of_pieces(model.specs[n], planned[n]) for n in group}
    return {name: shardings for name, shardings in found.items() if shardings is not None}


def _read(
    path: Path,
    reader: orbax_arrays.Reader,
    *,
    group: dict[str, Any],
    own: dict[str, Any],
    placement: Placement,
) -> dict[str, Any]:
    """The arrays of one group's leaves: each device's `own` pieces on it, all of the others on the
    first device, which cuts them for the rest.
    """
    first = SingleDeviceSharding(placement.first)

    def to(array: jax.ShapeDtypeStruct, place: Sharding = first) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

    wanted = {
        name: jax.tree.map(to, _arrays(leaf), *([own[name]] if name in own else []))
        for name, leaf in group.items()
    }
    with naming_damage(f"{path / _LEAVES}: can't read {', '.join(group)}", _SAVE_AGAIN):
        tree = reader.read(_nested(wanted), part=True)
    return {name: functools.reduce(operator.getitem, name.split("."), tree) for name in group}


def _filled(abstract: Any, arrays: Any) -> Any:
    """A leaf of these arrays."""
    if isinstance(abstract, CompressedTensor):
        return dataclasses.replace(abstract, **arrays)
    return arrays


def _copy_tokenizer(source: Path, folder: Path) -> str:
    """Copies the tokenizer; gives what to load it from, relative to the checkpoint."""
    folder.mkdir()
    source = Path(source)
    if source.suffix == ".gguf":
        metadata_only(source, folder / "tokenizer.gguf")
        return f"{_TOKENIZER}/tokenizer.gguf"
    base = source if source.is_dir() else source.parent
    for name in {*_TOKENIZER_FILES, *([] if source.is_dir() else [source.name])}:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    for template in (base / _TEMPLATES).glob("*.jinja"):
        (folder / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, folder / _TEMPLATES / template.name)
    return _TOKENIZER if source.is_dir() else f"{_TOKENIZER}/{source.name}"
