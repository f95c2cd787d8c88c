"""One layer of a model at a time, as jitted programs that take its parameters as arguments.

Layers with the same window and RoPE share their programs. The windows of tokens are mapped one
after another, so that attention scores exist for one only. Read next: `calibrate.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.compression.statistics import Statistics, measure, merge, zeros
from lepton_jax.kernels.attention_reference import causal_attend
from lepton_jax.models.build import Model, abstract_model
from lepton_jax.models.config import NO_ROPE
from lepton_jax.models.decoder import rms_norm
from lepton_jax.models.rope import rope_table
from lepton_jax.tensors import take
from lepton_jax.tensors.observed import Observed

Needs = tuple[tuple[str, tuple[str, ...]], ...]  # parameter of the layer, kinds of statistics


class LayerPrograms:
    """The programs of all layers of a model."""

    def __init__(self, model: Model):
        self._model = model
        self._made: dict[tuple, _Programs] = {}

    def of(self, index: int, factors: jax.Array | None) -> _Programs:
        """Those of layer `index`; `factors` is the parameter rope_factors, where there is one."""
        config = self._model.config
        key = config.layer_windows[index], config.layer_ropes[index]
        if key not in self._made:
            single = dataclasses.replace(
                config, num_layers=1, layer_windows=key[:1], layer_ropes=key[1:]
            )
            model = abstract_model(single, self._model.dtype, self._model.activation_dtype)
            self._made[key] = _Programs(model, factors)
        return self._made[key]


class _Programs:
    """What can be run of one layer; `model` is one of that layer only."""

    def __init__(self, model: Model, factors: jax.Array | None):
        self._model, self._factors = model, factors
        self._outputs = jax.jit(self._map_outputs)
        self._pulled = jax.jit(self._map_pulled)
        self._statistics = jax.jit(self._map_statistics, static_argnums=3)
        self._inputs = jax.jit(self._map_inputs, static_argnums=3)

    def outputs(self, layer: Mapping[str, Any], x: jax.Array) -> jax.Array:
        """What the layer makes of `x [windows, T, D]`: the same shape."""
        return self._outputs(dict(layer), self._factors, x)

    def window(self, layer: Mapping[str, Any], x: jax.Array) -> jax.Array:
        """What the layer makes of one window `x [T, D]`, to be used inside a program."""
        return self._of_window(layer, self._factors, x)

    def pulled(self, layer: Mapping[str, Any], x: jax.Array, gradients: jax.Array) -> jax.Array:
        """Gradients by `x [windows, T, D]` from those by the layer's outputs, several of each
        window: both `[windows, draws, T, D]`.
        """
        return self._pulled(dict(layer), self._factors, x, gradients)

    def statistics(
        self, layer: Mapping[str, Any], x: jax.Array, needs: Needs
    ) -> dict[str, Statistics]:
        """Of the inputs of the needed parameters, over all tokens of `x [windows, T, D]`."""
        return self._statistics(dict(layer), self._factors, x, needs)

    def inputs(self, layer: Mapping[str, Any], x: jax.Array, name: str) -> jax.Array:
        """What the parameter `name` [O, I] is multiplied with: `[windows, T, I]`."""
        return self._inputs(dict(layer), self._factors, x, name)

    def _map_outputs(self, layer, factors, x):
        return jax.lax.map(functools.partial(self._of_window, layer, factors), x)

    def _map_pulled(self, layer, factors, x, gradients):
        def window(operands):
            _, pull = jax.vjp(functools.partial(self._of_window, layer, factors), operands[0])
            # One draw after the other: products of experts can't be mapped side by side.
            return jax.lax.map(lambda gradient: pull(gradient)[0], operands[1])

        return jax.lax.map(window, (x, gradients))

    def _map_inputs(self, layer, factors, x, name: str):
        def look(window):
            seen = []
            observed = Observed(layer[name], lambda inputs, group_sizes: seen.append(inputs))
            self._of_window({**layer, name: observed}, factors, window)
            return seen[0]

        return jax.lax.map(look, x)

    def _map_statistics(self, layer, factors, x, needs: Needs):
        def look(before, window):
            seen: dict[str, Statistics] = {}

            def watched(name, kinds):
                def record(inputs, group_sizes):
                    seen[name] = measure(inputs, kinds, group_sizes)

                return Observed(layer[name], record)

            observed = {name: watched(name, kinds) for name, kinds in needs}
            self._of_window({**layer, **observed}, factors, window)
            return {name: merge(before[name], seen[name]) for name in seen}, None

        start = {}
        for name, kinds in needs:
            shape = layer[name].shape
            start[name] = zeros(kinds, shape[-1], shape[0] if name.startswith("experts_") else 0)
        return jax.lax.scan(look, start, x)[0]

    def _of_window(self, layer, factors, x):
        config, nothing = self._model.config, jnp.zeros(())
        named = {f"layers.0.{name}": leaf for name, leaf in layer.items()}
        decoder = self._model.bind([named.get(path, nothing) for path in self._model.specs])
        table = None
        if config.layer_ropes[0] != NO_ROPE:
            rope, places = config.ropes[config.layer_ropes[0]], jnp.arange(x.shape[0])
            table = rope_table(rope, places, context_len=config.context_len, factors=factors)
        how = dict(cache=None, attend=causal_attend, window=config.layer_windows[0])
        return decoder.layers[0](x, table, **how)[0]


def layer_of(leaves: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The parameters of layer `index` by name, of leaves by path."""
    prefix = f"layers.{index}."
    return {p.removeprefix(prefix): leaf for p, leaf in leaves.items() if p.startswith(prefix)}


def embedded(model: Model, table: Any, tokens: jax.Array) -> jax.Array:
    """What the first layer gets for tokens `[windows, T]`: `[windows, T, D]`."""
    x = take(table, tokens, model.activation_dtype)
    scale = model.config.embed_scale
    return x * jnp.asarray(scale, x.dtype) if scale != 1.0 else x


@functools.partial(jax.jit, static_argnums=(0, 3))
def final_inputs(model: Model, x: jax.Array, norm: jax.Array, kinds: tuple[str, ...]) -> Statistics:
    """Statistics of what the head gets, from the last layer's outputs `x [windows, T, D]`."""

    def look(before, window):
        inputs = rms_norm(window, norm, model.config.norm_eps)
        return merge(before, measure(inputs, kinds, None)), None

    return jax.lax.scan(look, zeros(kinds, x.shape[-1]), x)[0]
