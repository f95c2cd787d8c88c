"""Loads the tiny models of tests/fixtures/models (made by scripts/make_model_fixtures.py).

`load(case)` reads config.json and model.safetensors through the key map, the plain way: whole file,
numpy, float32. The package's own loader is tested elsewhere; here the maps are.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from lepton_jax.kernels.attention_reference import causal_attend
from lepton_jax.models.build import Model, abstract_model
from lepton_jax.models.config import ModelConfig
from lepton_jax.models.keymap import expand
from lepton_jax.models.registry import canonical_name, config_from_hf, key_map

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "models"
CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A fixture: the config, leaves by path, token ids `[T]` and transformers' logits `[T, V]`."""

    config: ModelConfig
    leaves: dict[str, np.ndarray]
    ids: np.ndarray
    expected: np.ndarray


def hf_arrays(case: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """The case's checkpoint by canonical name, in float32."""
    arrays = load_file(FOLDER / CASES[case]["weights"] / "model.safetensors")
    names = {name: canonical_name(config, "hf", name) for name in arrays}
    return {ours: arrays[name].astype(np.float32) for name, ours in names.items() if ours}


def combine(config: ModelConfig, source: str, arrays: dict[str, np.ndarray]) -> dict:
    """Leaves by path; every array must be used once and every parameter made once."""
    mappings = expand(key_map(config, source), config)
    used = [name for mapping in mappings for name in mapping.sources]
    assert sorted(used) == sorted(arrays)
    leaves = {m.target: m.combine(config, *(arrays[name] for name in m.sources)) for m in mappings}
    assert len(leaves) == len(mappings)
    return leaves


def read_config(case: str) -> ModelConfig:
    """The case's config.json, run with the context that the case asks for."""
    config = config_from_hf(json.loads((FOLDER / case / "config.json").read_text()))
    context = CASES[case]["context"]
    return config.with_context(context) if context else config


def load(case: str) -> TinyModel:
    """One fixture."""
    config, expected = read_config(case), load_file(FOLDER / case / "expected.safetensors")
    leaves = combine(config, "hf", hf_arrays(case, config))
    return TinyModel(config, leaves, expected["ids"], expected["logits"])


def in_order(model: Model, leaves: dict[str, Any]) -> tuple:
    """Leaves as `Model.bind` takes them, checked against the specs."""
    for path, spec in model.specs.items():
        assert leaves[path].shape == spec.shape, path
    return tuple(jnp.asarray(leaves[path], spec.dtype) for path, spec in model.specs.items())


def run(config: ModelConfig, leaves: dict[str, Any], ids: np.ndarray) -> np.ndarray:
    """Logits float32 `[T, V]` of one text, with the reference attention; extra leaves are left.

    Op by op, not under jit: variants of a model share their small programs, so a run takes 20 ms.
    """
    model = abstract_model(config, jnp.float32, jnp.float32)
    return np.asarray(forward(model, in_order(model, leaves), jnp.asarray(ids)))


def forward(model: Model, leaves: tuple, ids: jax.Array) -> jax.Array:
    """Logits float32 `[T, V]` of one text from bound leaves; may run inside jit."""
    decoder, caches = model.bind(leaves), (None,) * model.config.num_layers
    here = model.axis.holds(jnp.ones(1, jnp.int32))  # the text is in the second bank

    def attend(*operands, **options):
        out, cache = causal_attend(*operands, **options)
        return jnp.where(here, out, 0), cache

    hidden, _ = decoder(ids, jnp.arange(ids.shape[0]), caches, attend)
    return decoder.logits(hidden)


@functools.cache
def with_tokens(case):
    """(model in float32, its leaves by path, tokens `[3, T]`) of a case; not to be changed."""
    loaded = load(case)
    model = abstract_model(loaded.config, jnp.float32, jnp.float32)
    ordered = in_order(model, loaded.leaves)
    tokens = np.stack([loaded.ids, loaded.ids[::-1], np.roll(loaded.ids, 5)])
    return model, dict(zip(model.specs, ordered, strict=True)), tokens
