"""Runs of like layers: what a CPU's programs compute in a loop instead of one after the other.

XLA compiles every layer of an unrolled program anew: 30 layers took a CPU ten seconds a program.
In a run there is one layer to compile; its weights are chosen where they lie (`tensors/chosen.py`),
and its layers share a cache, one behind the other. An accelerator's programs stay unrolled: there
a branch is a question to the host or a copy of what it chooses from. Read next: `decoder.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lepton_jax.models.config import NO_ROPE, ModelConfig
from lepton_jax.tensors import ParamSpec
from lepton_jax.tensors.chosen import chooser

Tap = Callable[[Any, Any, jax.Array], Any]  # (what was kept, layers so far, states) -> what is kept
UNLIMITED = 1 << 30  # a window that no text fills, where a run has layers with and without one


class LayerOf(NamedTuple):
    """A layer of those that share a cache: its place i32 `[]` and how many they are."""

    index: Any
    count: int


def runs_of(config: ModelConfig, paths: Sequence[str], leaves: Sequence[Any]) -> tuple[int, ...]:
    """How many consecutive layers there are of each kind: with weights of the same shapes, and all
    with RoPE or none.

    `paths` are those of the parameters, and `leaves` theirs in the same order, or abstract.
    """
    kinds: list[dict] = [{} for _ in range(config.num_layers)]
    for path, leaf in zip(paths, leaves, strict=True):
        first, *rest = path.split(".")
        if first == "layers":
            kinds[int(rest[0])][rest[1]] = tuple(leaf.shape)
    for kind, rope in zip(kinds, config.layer_ropes, strict=True):
        kind["rotating"] = 0 if rope == NO_ROPE else config.ropes[rope].dim
    return tuple(len(list(like)) for _, like in itertools.groupby(kinds))


class Run:
    """Consecutive layers of one kind, bound. Made where their weights come from, outside of loops.

    Args:
      layers: NNX modules `Layer`.
      config: of the model.
    """

    def __init__(self, layers: Sequence[nnx.Module], config: ModelConfig):
        self.layers, self._config = tuple(layers), config
        if len(self.layers) == 1:
            return
        self._graph, state = nnx.split(self.layers[0])
        self._variables = dict(nnx.to_flat_state(state))
        others = [dict(nnx.to_flat_state(nnx.state(layer))) for layer in self.layers]
        self._choosers = {
            path: chooser(_spec(variable), [other[path].get_value() for other in others])
            for path, variable in self._variables.items()
        }

    def __call__(
        self,
        carry: tuple[jax.Array, Any, Any],
        tables: Sequence[tuple],
        attend: Callable,
        *,
        tap: Tap | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        """All layers of `carry`: x `[T, D]`, the cache that they share, and what a tap kept.

        `tables`: cos and sin of each of the model's ropes; `attend` and `tap` as the decoder's.
        """
        windows = [self._config.layer_windows[layer.index] for layer in self.layers]
        ropes = [self._config.layer_ropes[layer.index] for layer in self.layers]
        window_of, table_of = _windows(windows), _tables(tables, ropes)
        first, count = self.layers[0].index, len(self.layers)

        def through(layer, index, carry):
            x, cache, kept = carry
            if tap is not None:
                kept = tap(kept, first + index, x)
            here = attend if count == 1 else partial(attend, layer=LayerOf(index, count))
            window, table = window_of(index), table_of(index)
            return *layer(x, table, cache=cache, attend=here, window=window), kept

        if count == 1:
            return through(self.layers[0], 0, carry)
        return jax.lax.fori_loop(
            0, count, lambda index, carry: through(self._at(index), index, carry), carry
        )

    def _at(self, index: jax.Array) -> nnx.Module:
        chosen = {
            path: variable.replace(self._choosers[path](index))
            for path, variable in self._variables.items()
        }
        return nnx.merge(self._graph, nnx.from_flat_state(chosen.items()))


def _spec(variable: nnx.Variable) -> ParamSpec:
    value = variable.get_value()
    axes, inputs = variable.get_metadata("axes"), variable.get_metadata("inputs")
    return ParamSpec(tuple(value.shape), None, axes, inputs)


def _windows(windows: Sequence[int]) -> Callable[[jax.Array], Any]:
    if len(set(windows)) == 1:
        return lambda index: windows[0]
    sizes = np.array([window or UNLIMITED for window in windows], np.int32)
    return lambda index: jnp.asarray(sizes)[index]


def _tables(tables: Sequence[tuple], ropes: Sequence[int]) -> Callable[[jax.Array], Any]:
    if len(set(ropes)) == 1:
        return lambda index: None if ropes[0] == NO_ROPE else tables[ropes[0]]
    used = sorted(set(ropes))
    stacked = jax.tree.map(lambda *sides: jnp.stack(sides), *[tables[rope] for rope in used])
    places = np.array([used.index(rope) for rope in ropes], np.int32)
    return lambda index: jax.tree.map(lambda a: a[jnp.asarray(places)[index]], stacked)
