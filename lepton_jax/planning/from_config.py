"""From a run's config to what is planned: the model without weights, devices, sizes.

Of the model only config.json is needed, or a name with `published:`; other checkpoints are
described from their headers. Read next: `plan.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.checkpoints.errors import CheckpointError
from lepton_jax.checkpoints.json_files import read_json
from lepton_jax.checkpoints.load import describe
from lepton_jax.checkpoints.loaded import float_dtype, weight_dtype
from lepton_jax.checkpoints.locate import MANIFEST_NAME, hub_config, local_path
from lepton_jax.checkpoints.manifest import Manifest
from lepton_jax.compression.presets import compress_specs
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import RunConfig
from lepton_jax.engine.sizing import kv_dtype_of
from lepton_jax.kernels.attention import backend_for
from lepton_jax.models.build import Model, abstract_model
from lepton_jax.models.published import hf_values
from lepton_jax.models.registry import config_from_hf
from lepton_jax.planning.chips import TPUS, Chip, chip_here, shared
from lepton_jax.planning.served import Served
from lepton_jax.planning.topology import (
    can_start,
    chips_of,
    hosts_of,
    split_name,
    topology_devices,
)
from lepton_jax.sharding.partition import check_experts
from lepton_jax.tensors import CompressedTensor


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a model shall run: so many devices of a kind, on `hosts` machines; `name` says it in
    reports.
    """

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]
    chips: int
    hosts: int = 1


def target_of(config: RunConfig) -> Target:
    """The slice that `plan.topology` names, or the devices at hand; those of a CPU share it.

    Raises ValueError where there is none such, where it has fewer devices than `mesh.model`, and
    where its hosts can't share them so.
    """
    topology, shards, replicas = config.plan.topology, config.mesh.model, config.mesh.data
    if topology:
        kind, size = split_name(topology)
        devices = tuple(topology_devices(topology))
        target = Target(topology, TPUS[kind], devices, chips_of(size), hosts_of(kind, size))
    else:
        devices = tuple(jax.local_devices())
        chip = chip_here()
        if chip.platform == "cpu":
            working = replicas * shards if replicas > 1 else len(devices)
            chip = dataclasses.replace(shared(chip, working), memory=chip.memory // len(devices))
        target = Target(devices[0].platform, chip, devices, len(devices))
    if len(devices) % shards:
        raise ValueError(
            f"mesh.model={shards} does not divide the {len(devices)} devices of {target.name}: "
            f"want one of {[n for n in range(1, len(devices) + 1) if len(devices) % n == 0]}, or "
            "another plan.topology"
        )
    if not can_start(shards, len(devices), target.hosts):
        raise ValueError(
            f"mesh.model={shards} can't be started on {target.name}: its {target.hosts} hosts of "
            f"{len(devices) // target.hosts} devices make one mesh, mesh.model={len(devices)}, or "
            f"replicas by pool.ray, mesh.model={len(devices) // target.hosts} at most; set one of "
            "these, or another plan.topology"
        )
    if replicas * shards > len(devices):
        raise ValueError(
            f"mesh.data={replicas} x mesh.model={shards} needs {replicas * shards} devices, and "
            f"{target.name} has {len(devices)}: lower one of them, or take another plan.topology"
        )
    return target


def served_of(config: RunConfig, chip: Chip) -> Served:
    """The model of a config as a device of this kind will hold it.

    Raises ValueError (CheckpointError) on a model, preset or dtype that can't be, and on a model
    that can't generate.
    """
    path, recipe = config.model.path, Recipe.from_config(config.compression)
    recipe.require_no_calibration(path)
    manifest = _manifest(path)
    model = _model(config, chip.platform)
    model.config.require_head(path)
    held = manifest.compressed() if manifest else []
    if held and recipe.rules:
        raise ValueError(
            f"{path} holds compressed leaves ({held[0]} and others): plan it with "
            "compression.preset=none and no rules, or plan the original checkpoint"
        )
    leaves = stored_leaves(path, model) if held else compress_specs(recipe.rules, model.specs)
    compressed = any(isinstance(leaf, CompressedTensor) for leaf in leaves.values())
    kv_dtype = kv_dtype_of(config.engine, model.specs["embed"].dtype, compressed=compressed)
    backend = backend_for(chip.platform, config.engine.attention_block)
    mesh, page = config.mesh, config.engine.page_size
    served = Served(model, leaves, backend, kv_dtype, mesh.model, mesh.expert, page)
    check_experts(served.config.num_experts, served.axis)
    return served


def presets_of(path: str, presets: Sequence[str]) -> Sequence[str]:
    """Those of some presets that a model can take: "none" alone where it is compressed already."""
    manifest = _manifest(path)
    if manifest is None or not manifest.compressed():
        return presets
    return [preset for preset in presets if preset == "none"]


def require_plannable(config: RunConfig) -> None:
    """Raises ValueError, naming the field, on what a plan doesn't know."""
    if config.pool.ray or config.hosts.coordinator:
        raise ValueError(
            "a plan is of devices, whatever processes use them: leave out pool.ray and "
            "hosts.coordinator; mesh.data says how many replicas"
        )
    engine = config.engine
    if engine.cache_share != 1:
        raise ValueError(
            f"engine.cache_share={engine.cache_share:g}: a plan is of devices that an engine has to"
            " itself; leave it out"
        )
    if engine.speculation == "draft":
        raise ValueError(
            "engine.speculation='draft': a plan is of one model, without a draft's weights and "
            "cache; leave it out, and plan engine.draft_model by itself"
        )


def _model(config: RunConfig, platform: str) -> Model:
    path, asked = config.model.path, config.model.dtype
    activations = "float32" if platform == "cpu" else None
    values = _hf_values(path)
    if values is None:
        return describe(path, dtype=asked, activation_dtype=activations, platform=platform)
    own = values.get("dtype") or values.get("torch_dtype") or "bfloat16"
    dtype = weight_dtype(asked, float_dtype(own, "torch_dtype"), platform=platform)
    return abstract_model(config_from_hf(values), dtype, jnp.dtype(activations or dtype))


def _manifest(path: str) -> Manifest | None:
    """Of a directory that we saved; None where the model is something else."""
    file = local_path(path) / MANIFEST_NAME
    return Manifest.read(file) if path and file.is_file() else None


def stored_leaves(path: str, model: Model) -> dict | None:
    """What a directory that we saved holds; None where the model is something else."""
    manifest = _manifest(path)
    if manifest is None:
        return None
    stored = manifest.planned_leaves(local_path(path), model.specs)
    return {name: leaf.astype(model.specs[name].dtype) for name, leaf in stored.items()}


def _hf_values(path: str) -> dict[str, Any] | None:
    """The values of a config.json; None where the model is something else."""
    if path.startswith("published:"):
        return hf_values(path.removeprefix("published:"))
    if path.startswith("hf:") and not path.endswith(".gguf"):
        return read_json(hub_config(path))
    if path.startswith(("demo:", "hf:")) or not path:
        return None
    place = local_path(path)
    if place.suffix == ".json":
        if not place.is_file():
            raise CheckpointError(f"model.path={path!r}: there is no such file")
        return read_json(place)
    hf = place.is_dir() and not (place / MANIFEST_NAME).is_file()
    return read_json(place / "config.json") if hf and (place / "config.json").is_file() else None
