"""Structured pruning: a smaller dense model of the same family, faster on every device.

    model, leaves, told = prune_structure(model, leaves, tokens, Structure(drop_layers=4))

Whole layers go by block influence (ShortGPT, Men et al., arXiv 2403.03853), kv heads with their
query heads and ffn channels by the energy that they add to the layer's output, experts by the
routing weight that they get. Every layer keeps equally many: `ModelConfig` has one size for all, so
that layers share their programs. The kept inputs of `out` and `down` make up for the removed ones
by least squares (`blocks.py`). Quantization comes after it: `calibrate.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.compression.blocks import block_energies, inputs_of, largest, refit
from lepton_jax.compression.layer_programs import LayerPrograms, embedded, layer_of
from lepton_jax.compression.statistics import mean_hessian
from lepton_jax.compression.structure import Structure, planned_model
from lepton_jax.models.build import Model, abstract_model
from lepton_jax.models.config import ModelConfig
from lepton_jax.models.moe import routing

Progress = Callable[[int, int, str], None]


def prune_structure(
    model: Model,
    leaves: Mapping[str, jax.Array],
    tokens: np.ndarray,
    structure: Structure,
    *,
    damp: float = 0.01,
    progress: Progress | None = None,
) -> tuple[Model, dict[str, jax.Array], dict[str, Any]]:
    """The smaller model, its leaves by path, and what was kept, in JSON types.

    Args:
      model: of the leaves, which are dense.
      leaves: by path of `model.specs`.
      tokens: int32 `[windows, T]` to measure on; each window starts afresh.
      structure: what is left.
      damp: of the least squares, share of the mean diagonal that is added.
      progress: called with (done, all, what) after each layer.

    What is told: "layers" kept, "influence" of each layer where layers were dropped, and for each
    kept layer "kv_heads", "experts" and the relative "errors" of its products. Raises ValueError
    where the structure doesn't fit the model.
    """
    structure.plan(model.config)
    widths = dataclasses.replace(structure, drop_layers=0)
    told: dict[str, Any] = {"layers": list(range(model.config.num_layers)), "influence": None}
    x, leaves = embedded(model, leaves["embed"], jnp.asarray(tokens, jnp.int32)), dict(leaves)
    if structure.drop_layers:
        told["influence"] = _influences(model, leaves, x, progress=progress)
        scores = jnp.asarray(told["influence"])
        told["layers"] = largest(scores, scores.size - structure.drop_layers).tolist()
        model, leaves = _keep_layers(model, leaves, told["layers"])
    if widths:
        narrow = planned_model(widths, model)
        leaves, rows = _narrowed(model, leaves, x, narrow=narrow, damp=damp, progress=progress)
        told |= {name: [row[name] for row in rows] for name in ("kv_heads", "experts", "errors")}
        model = narrow
    return model, leaves, told


def _influences(
    model: Model, leaves: Mapping[str, Any], x: jax.Array, *, progress: Progress | None
) -> list[float]:
    """1 - mean cosine of what each layer gets and gives, over the tokens of `x [windows, T, D]`."""
    programs, factors, found = LayerPrograms(model), leaves.get("rope_factors"), []
    for index in range(model.config.num_layers):
        y = programs.of(index, factors).outputs(layer_of(leaves, index), x)
        found.append(float(_influence(x, y)))
        x = y
        if progress is not None:
            progress(index + 1, model.config.num_layers, f"influence of layers.{index}")
    return found


@jax.jit
def _influence(x, y):
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    size = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return 1.0 - jnp.mean(jnp.sum(x * y, axis=-1) / jnp.maximum(size, 1e-30))


def _keep_layers(
    model: Model, leaves: Mapping[str, Any], kept: Sequence[int]
) -> tuple[Model, dict[str, Any]]:
    config = Structure(drop_layers=model.config.num_layers - len(kept)).plan(model.config, kept)
    smaller = abstract_model(config, model.dtype, model.activation_dtype)
    found = {path: leaf for path, leaf in leaves.items() if not path.startswith("layers.")}
    for new, old in enumerate(kept):
        layer = layer_of(leaves, old)
        found |= {f"layers.{new}.{name}": leaf for name, leaf in layer.items()}
    return smaller, {path: found[path] for path in smaller.specs}


def _narrowed(
    model: Model,
    leaves: dict[str, Any],
    x: jax.Array,
    *,
    narrow: Model,
    damp: float,
    progress: Progress | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The leaves of `narrow`, whose layers see what the narrow ones before them give, and a row to
    tell for each layer.
    """
    found, rows, factors = dict(leaves), [], leaves.get("rope_factors")
    before, after = LayerPrograms(model), LayerPrograms(narrow)
    for index in range(model.config.num_layers):
        layer = _Layer(layer_of(leaves, index), model.config, narrow.config, damp)
        rows.append(layer.prune(before.of(index, factors), x))
        x = after.of(index, factors).outputs(layer.leaves, x)
        found |= {f"layers.{index}.{name}": leaf for name, leaf in layer.leaves.items()}
        if progress is not None:
            progress(index + 1, model.config.num_layers, f"layers.{index}")
    return {path: found[path] for path in narrow.specs}, rows


class _Layer:
    """One layer's parameters by name, on their way from a wide config to a narrow one."""

    def __init__(self, leaves: dict[str, Any], wide: ModelConfig, narrow: ModelConfig, damp: float):
        self.leaves, self.wide, self.narrow, self.damp = dict(leaves), wide, narrow, damp
        self.errors: dict[str, float] = {}

    def prune(self, programs, x: jax.Array) -> dict[str, Any]:
        """Makes the layer narrow; what to tell of it. `x [windows, T, D]` is its input."""
        wide, narrow = self.wide, self.narrow
        heads, experts = list(range(wide.num_kv_heads)), list(range(wide.num_experts))
        changed = {
            "out": narrow.num_kv_heads < wide.num_kv_heads,
            "down": narrow.ffn_size < wide.ffn_size,
        }
        needs = tuple((name, ("hessian",)) for name, changes in changed.items() if changes)
        seen = programs.statistics(self.leaves, x, needs) if needs else {}
        if narrow.num_experts < wide.num_experts:
            mass = _routed_mass(
                self.leaves["router"], programs.inputs(self.leaves, x, "router"), wide
            )
            kept = largest(mass, narrow.num_experts)
            self._take(kept, {"router": 0, "experts_gate_up": 0, "experts_down": 0})
            experts = kept.tolist()
        if changed["out"]:
            kept = self._cut("out", seen, blocks=wide.num_kv_heads, keep=narrow.num_kv_heads)
            self._take(kept, {"qkv": 0, "qkv_bias": 0})
            heads = kept.tolist()
        if changed["down"]:
            kept = self._cut("down", seen, blocks=wide.ffn_size, keep=narrow.ffn_size)
            self._take(kept, {"gate_up": 1, "gate_up_bias": 1})
        return {"kv_heads": heads, "experts": experts, "errors": self.errors}

    def _cut(self, name: str, seen: Mapping[str, Any], *, blocks: int, keep: int) -> jax.Array:
        """The weight on its best blocks of inputs; their indices."""
        weight, hessian = self.leaves[name], mean_hessian(seen[name])
        kept = largest(block_energies(weight, hessian, blocks=blocks), keep)
        inputs = inputs_of(kept, weight.shape[1] // blocks)
        self.leaves[name], error = refit(weight, hessian, inputs, jnp.asarray(self.damp))
        self.errors[name] = float(error)
        if not np.isfinite(self.errors[name]):
            raise ValueError(
                f"{name}: its products are not finite: the weights, or the activations before "
                "it, hold NaN or infinity"
            )
        return kept

    def _take(self, kept: jax.Array, axes: Mapping[str, int]) -> None:
        for name, axis in axes.items():
            if name in self.leaves:
                self.leaves[name] = jnp.take(self.leaves[name], kept, axis=axis)


@functools.partial(jax.jit, static_argnums=2)
def _routed_mass(router: jax.Array, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Sum of the weights with which tokens `x [windows, T, D]` visit each expert: `[E]`."""

    def of_window(tokens):
        weight, expert = routing(tokens, router, config)
        return jnp.zeros(config.num_experts).at[expert].add(weight)

    return jnp.sum(jax.lax.map(of_window, x), axis=0)
