"""The door through which weights come in.

    loaded = load("demo:smollm2", compress=compressor(rules, paths))

Every accepted form of path ends in the same `Loaded`. Finding the files is `locate.py`, foreign
weights are streamed in `stream.py`, our own directories are restored by `orbax_store.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from lepton_jax.checkpoints import orbax_store
from lepton_jax.checkpoints.loaded import (
    Loaded,
    build_model,
    dtypes_here,
    fingerprint,
    leaf_bytes,
    weight_dtype,
)
from lepton_jax.checkpoints.locate import MANIFEST_NAME, locate
from lepton_jax.checkpoints.manifest import Manifest
from lepton_jax.checkpoints.stream import Compress, Progress, match, open_foreign, stream
from lepton_jax.models.build import Model
from lepton_jax.sharding import Devices, Placement
from lepton_jax.sharding.partition import check_experts

__all__ = ["Loaded", "describe", "dtypes_here", "identify", "load", "tokenizer_source"]


def load(
    path: str | os.PathLike,
    *,
    dtype: Any = "auto",
    activation_dtype: Any = None,
    compress: Compress | None = None,
    progress: Progress | None = None,
    devices: Devices | None = None,
) -> Loaded:
    """Loads a model onto its devices, one parameter at a time.

    Args:
      path: a Hugging Face directory, a `.gguf` file, a directory saved by `orbax_store.save`,
        `hf:org/name`, `hf:org/name/file.gguf`, or `demo:NAME` for a key of `demo.DEMO_MODELS`.
      dtype: of the weights: "float32", "bfloat16", "float16" (not on a TPU) or "auto": float32 on
        a CPU, else the checkpoint's own, which is bfloat16 for quantized GGUF; a saved directory's
        own on a CPU too. Norm scales and RoPE factors are always float32, and of compressed
        weights it is the dtype of kept float values only.
      activation_dtype: of the residual stream; by default that of the weights.
      compress: `(path, spec, array) -> leaf` of each parameter, or region (`stream.Compress`).
      progress: called with `(done_bytes, total_bytes, parameter)` after each.
      devices: that share the model, each with its part of every weight, as `Placement` takes them;
        by default the first one.

    On the host, loading holds the sources of one parameter and their combination at a time. One of
    several hosts reads the rows that its devices have a part of.
    Raises CheckpointError naming the file and what is wrong with it.
    """
    kind, place = locate(path)
    if kind == "store":
        return orbax_store.restore(
            place,
            dtype=dtype,
            activation_dtype=activation_dtype,
            compress=compress,
            progress=progress,
            devices=devices,
        )
    config, files = open_foreign(kind, place)
    weights = weight_dtype(dtype, files.weights_dtype())
    model = build_model(place, config, dtype=weights, activation_dtype=activation_dtype)
    mappings = match(model, files, kind=kind)
    placement = Placement(jax.local_devices()[:1] if devices is None else devices, model.heads)
    check_experts(config.num_experts, placement.axis)
    leaves = stream(
        model,
        files,
        mappings=mappings,
        compress=compress,
        progress=progress,
        placement=placement,
    )
    return Loaded(
        config=config,
        model=model,
        leaves=leaves,
        tokenizer_source=place,
        fingerprint=fingerprint(config, files),
        bytes=sum(map(leaf_bytes, leaves)),
    )


def describe(
    path: str | os.PathLike,
    *,
    dtype: Any = "auto",
    activation_dtype: Any = None,
    platform: str | None = None,
) -> Model:
    """The model that `load` would give, without its weights: only headers are read.

    For what must be known before loading: parameter paths for compression rules, memory plans.
    `platform` is that of the devices that shall load it; None: this machine's.
    """
    kind, place = locate(path)
    if kind == "store":
        return orbax_store.model_of(
            place,
            Manifest.read(place / MANIFEST_NAME),
            dtype=dtype,
            activation_dtype=activation_dtype,
            platform=platform,
        )
    config, files = open_foreign(kind, place)
    weights = weight_dtype(dtype, files.weights_dtype(), platform=platform)
    model = build_model(place, config, dtype=weights, activation_dtype=activation_dtype)
    match(model, files, kind=kind)
    return model


def identify(path: str | os.PathLike) -> str:
    """The fingerprint that `load` would give, without reading the weights."""
    kind, place = locate(path)
    if kind == "store":
        return Manifest.read(place / MANIFEST_NAME).fingerprint
    return fingerprint(*open_foreign(kind, place))


def tokenizer_source(path: str | os.PathLike) -> Path:
    """What `lepton_jax.text.tokenizer.load` takes, without reading the weights."""
    kind, place = locate(path)
    if kind == "store":
        return place / Manifest.read(place / MANIFEST_NAME).tokenizer
    return place
