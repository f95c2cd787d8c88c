"""From a run's config to what is planned: the model without weights, devices, sizes.

Of the model only config.json is needed, or a name with `published:`; other checkpoints are
described from their headers. Read next: `plan.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.checkpoints.errors import CheckpointError
from lepton_jax.checkpoints.json_files import read_json
from lepton_jax.checkpoints.load import describe
from lepton_jax.checkpoints.locate import MANIFEST_NAME
from lepton_jax.checkpoints.manifest import Manifest
from lepton_jax.compression.presets import compress_specs
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import RunConfig
from lepton_jax.engine.sizing import kv_dtype_of
from lepton_jax.kernels.attention import backend_for
from lepton_jax.models.build import Model, abstract_model
from lepton_jax.models.published import hf_values
from lepton_jax.models.registry import config_from_hf
from lepton_jax.planning.chips import TPUS, Chip, chip_here
from lepton_jax.planning.served import Served
from lepton_jax.planning.topology import split_name, topology_devices
from lepton_jax.sharding.partition import check_experts
from lepton_jax.tensors import CompressedTensor
from lepton_jax.tensors.leaves import LEAF_TYPES


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a model shall run: so many devices of a kind; `name` says it in reports."""

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]
    chips: int


def target_of(config: RunConfig) -> Target:
    """The slice that `plan.topology` names, or the devices at hand.

    Raises ValueError where there is none such, or fewer devices than `mesh.model`.
    """
    if config.pool.ray or config.hosts.coordinator:
        raise ValueError(
            "a plan is of devices, whatever processes use them: leave out pool.ray and "
            "hosts.coordinator; mesh.data says how many replicas"
        )
    topology = config.plan.topology
    if topology:
        kind, size = split_name(topology)
        devices = tuple(topology_devices(topology))
        target = Target(topology, TPUS[kind], devices, chips_of(size))
    else:
        devices = tuple(jax.local_devices())
        target = Target(devices[0].platform, chip_here(), devices, len(devices))
    shards = config.mesh.model
    if len(devices) % shards:
        raise ValueError(
            f"mesh.model={shards} does not divide the {len(devices)} devices of {target.name}: "
            f"want one of {[n for n in range(1, len(devices) + 1) if len(devices) % n == 0]}, or "
            "another plan.topology"
        )
    replicas = config.mesh.data
    if replicas * shards > len(devices):
        raise ValueError(
            f"mesh.data={replicas} x mesh.model={shards} needs {replicas * shards} devices, and "
            f"{target.name} has {len(devices)}: lower one of them, or take another plan.topology"
        )
    return target


def chips_of(size: str) -> int:
    """Of a slice such as "2x4"."""
    count = 1
    for part in size.split("x"):
        count *= int(part)
    return count


def served_of(config: RunConfig, chip: Chip) -> Served:
    """The model of a config as a device of this kind will hold it.

    Raises ValueError (CheckpointError) on a model, preset or dtype that can't be.
    """
    model = _model(config, chip.platform)
    recipe = Recipe.from_config(config.compression)
    leaves = _stored_leaves(config.model.path, model)
    if leaves is None:
        leaves = compress_specs(recipe.rules, model.specs)
    compressed = any(isinstance(leaf, CompressedTensor) for leaf in leaves.values())
    kv_dtype = kv_dtype_of(config.engine, model.specs["embed"].dtype, compressed=compressed)
    backend = backend_for(chip.platform)
    if config.engine.cache_share != 1:
        raise ValueError(
            f"engine.cache_share={config.engine.cache_share:g}: a plan is of devices that an engine"
            " has to itself; leave it out"
        )
    mesh = config.mesh
    served = Served(model, leaves, backend, kv_dtype, mesh.model, mesh.expert)
    check_experts(served.config.num_experts, served.axis)
    return served


def _model(config: RunConfig, platform: str) -> Model:
    path, asked = config.model.path, config.model.dtype
    values = _hf_values(path)
    if values is None:
        described = describe(path)
        own, found = described.dtype, described.config
    else:
        own, found = values.get("dtype") or values.get("torch_dtype"), config_from_hf(values)
    if asked == "auto":
        asked = "float32" if platform == "cpu" else own or "bfloat16"
    dtype = jnp.dtype(asked)
    if platform == "tpu" and dtype == jnp.float16:  # a TPU has none
        dtype = jnp.dtype(jnp.bfloat16)
    return abstract_model(found, dtype, jnp.float32 if platform == "cpu" else dtype)


def _stored_leaves(path: str, model: Model) -> dict | None:
    """What a directory that we saved holds; None where the model is something else."""
    place = Path(path).expanduser()
    if not path or not (place / MANIFEST_NAME).is_file():
        return None
    rows = Manifest.read(place / MANIFEST_NAME).leaves
    return {
        name: spec
        if rows[name]["type"] == "array"
        else LEAF_TYPES[rows[name]["type"]].planned(spec, **rows[name]["static"])
        for name, spec in model.specs.items()
    }


def _hf_values(path: str) -> dict[str, Any] | None:
    """The values of a config.json; None where the model is something else."""
    if path.startswith("published:"):
        return hf_values(path.removeprefix("published:"))
    if path.startswith(("demo:", "hf:")) or not path:
        return None
    place = Path(path).expanduser()
    if place.suffix == ".json":
        if not place.is_file():
            raise CheckpointError(f"model.path={path!r}: there is no such file")
        return read_json(place)
    hf = place.is_dir() and not (place / MANIFEST_NAME).is_file()
    return read_json(place / "config.json") if hf and (place / "config.json").is_file() else None
