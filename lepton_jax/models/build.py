"""From a config to a model without values, and from values to a callable decoder.

`abstract_model` runs the NNX constructors on shapes only and keeps two things: the specs by path,
for loaders and planners, and the graph. `Model.bind` puts leaves back, in the order of the specs;
call it inside jit, where it costs tracing time and nothing else. A leaf may be any type of
`lepton_jax.tensors`. No weights are read here: `lepton_jax/checkpoints`. Read next: `decoder.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from flax import nnx

from lepton_jax.models.config import ModelConfig
from lepton_jax.models.decoder import Decoder
from lepton_jax.models.runs import Run, runs_of
from lepton_jax.sharding.axis import WHOLE, Axis
from lepton_jax.sharding.heads import Heads
from lepton_jax.tensors import ParamSpec


class Model:
    """A decoder's parameter specs and the way back from leaves to the decoder.

    Attributes:
      config: what the decoder is.
      specs: ParamSpec by path such as "layers.0.qkv", in the order in which `bind` takes leaves.
      dtype: storage dtype of weights and biases.
      activation_dtype: dtype of the residual stream and of q, k, v.
      axis: the devices that share it. The specs are those of the whole model; `bind` then takes one
        device's part of each leaf, inside a program over all of them.
      runs: how many consecutive layers each loop of a program goes through; 1: unrolled.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: Any,
        activation_dtype: Any,
        axis: Axis = WHOLE,
        *,
        runs: tuple[int, ...] = (),
    ):
        self.config, self.dtype, self.activation_dtype = config, dtype, activation_dtype
        self.axis, self.runs = axis, runs or (1,) * config.num_layers
        self._graph, self._variables = _split(config, dtype, activation_dtype, axis)
        self.specs: dict[str, ParamSpec] = {
            ".".join(map(str, path)): ParamSpec(
                shape=tuple(variable.get_value().shape),
                dtype=variable.get_value().dtype,
                axes=variable.get_metadata("axes"),
                inputs=variable.get_metadata("inputs"),
            )
            for path, variable in self._variables.items()
        }

    def bind(self, leaves: Sequence[Any]) -> Decoder:
        """The decoder holding `leaves`: one per spec, in their order, or ValueError."""
        if len(leaves) != len(self._variables):
            raise ValueError(
                f"{len(leaves)} leaves for {len(self._variables)} parameters: pass one per spec"
            )
        bound = {
            path: variable.replace(leaf)
            for (path, variable), leaf in zip(self._variables.items(), leaves, strict=True)
        }
        decoder = nnx.merge(self._graph, nnx.from_flat_state(bound.items()))
        layers = iter(decoder.layers)
        decoder.runs = tuple(
            Run(tuple(itertools.islice(layers, count)), self.config) for count in self.runs
        )
        return decoder

    def with_context(self, length: int) -> Model:
        """The same model for contexts of at most `length` tokens; takes the same leaves.

        Only longrope models compute something else then. Raises ValueError where `length` is more
        than the model claims.
        """
        config = self.config.with_context(length)
        return Model(config, self.dtype, self.activation_dtype, self.axis, runs=self.runs)

    def on(self, axis: Axis) -> Model:
        """The same model, shared by the devices of an axis."""
        if axis == self.axis:
            return self
        return Model(self.config, self.dtype, self.activation_dtype, axis, runs=self.runs)

    def in_loops(self, leaves: Sequence[Any], *, platform: str = "cpu") -> Model:
        """The same model, whose programs go through like layers in loops where their platform gains
        by it; for these leaves.
        """
        if platform != "cpu":
            return self
        runs = runs_of(self.config, tuple(self.specs), leaves)
        return Model(self.config, self.dtype, self.activation_dtype, self.axis, runs=runs)

    @property
    def described(self) -> str:
        """All that its programs depend on besides the leaves: the same text, the same programs."""
        return repr((self.config, self.dtype, self.activation_dtype, self.axis, self.runs))

    @property
    def heads(self) -> Heads:
        """Of its attention: devices that share the model lay these out together."""
        return Heads(self.config.num_kv_heads, self.config.group, self.config.head_dim)


@functools.lru_cache(maxsize=16)
def _split(config: ModelConfig, dtype: Any, activation_dtype: Any, axis: Axis) -> tuple:
    """A decoder's graph and its variables by path, without values: nothing writes to either."""
    decoder = nnx.eval_shape(lambda: Decoder(config, dtype, activation_dtype, axis))
    graph, state = nnx.split(decoder)
    variables = dict(nnx.to_flat_state(state))
    order = sorted(variables, key=lambda path: (path[0] != "embed", path[0] != "layers", path))
    return graph, {path: variables[path] for path in order}


def abstract_model(config: ModelConfig, dtype: Any, activation_dtype: Any) -> Model:
    """The model of a config, without values.

    Args:
      config: sizes and quirks.
      dtype: storage dtype of weights and biases; norm scales and RoPE factors are float32.
      activation_dtype: dtype of the residual stream and of q, k, v.
    """
    return Model(config, dtype, activation_dtype)
