"""What one window of text says of a compressed model beside the dense one, differentiable.

Weights are decompressed inside each layer and computed again on the way back, like everything but
the products with weights: memory is the window's tokens times the outputs of the layers' products.
Logits exist for a slice of places at a time. Activations that would be quantized are not. Read
next: `training.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.compression.layer_programs import LayerPrograms, embedded, layer_of
from lepton_jax.compression.quality import logits_of
from lepton_jax.models.build import Model
from lepton_jax.models.decoder import rms_norm
from lepton_jax.tensors import CompressedTensor

_SLICE = 128  # places whose logits [128, V] are in memory at a time
_KEPT = jax.checkpoint_policies.dots_with_no_batch_dims_saveable  # products with weights


class WindowLoss:
    """The loss of `model` against the hidden states of `dense`."""

    def __init__(self, dense: Model, model: Model, *, hidden_weight: float):
        if (dense.config.vocab_size, dense.config.hidden_size) != (
            model.config.vocab_size,
            model.config.hidden_size,
        ):
            raise ValueError(
                f"the compressed model has V {model.config.vocab_size} and D "
                f"{model.config.hidden_size}, the dense one {dense.config.vocab_size} and "
                f"{dense.config.hidden_size}: recovery wants the model that it was made of"
            )
        self._dense, self._model, self._weight = dense, model, hidden_weight

    def __call__(
        self, leaves: Mapping[str, Any], head: Any, ids: jax.Array, hidden: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss `[]` of a window, and its parts "loss", "kl" and "hidden".

        Args:
          leaves: of the model, by path.
          head: the dense model's leaf that makes logits.
          ids: int32 `[T]`.
          hidden: the dense model's states after the final norm, `[T, D]`.
        """
        ours, hidden = self._hidden(leaves, ids), hidden.astype(jnp.float32)
        off = jnp.sum((ours - hidden) ** 2) / jnp.sum(hidden**2)
        our_head = self._as_dense(leaves[self._model.config.head_path])
        kl = self._divergence(our_head, head, ours, hidden)
        loss = kl + self._weight * off
        return loss, {"loss": loss, "kl": kl, "hidden": off}

    def _as_dense(self, leaf: Any) -> jax.Array:
        return leaf.dense(self._model.dtype) if isinstance(leaf, CompressedTensor) else leaf

    def _hidden(self, leaves: Mapping[str, Any], ids: jax.Array) -> jax.Array:
        """float32 `[T, D]` after the final norm."""
        model, programs = self._model, LayerPrograms(self._model)
        x = embedded(model, leaves["embed"], ids)
        for index in range(model.config.num_layers):
            window = programs.of(index, leaves.get("rope_factors")).window

            def run(layer, x, window=window):
                return window({name: self._as_dense(leaf) for name, leaf in layer.items()}, x)

            x = jax.checkpoint(run, policy=_KEPT)(layer_of(leaves, index), x)
        return rms_norm(x, leaves["final_norm"], model.config.norm_eps).astype(jnp.float32)

    def _divergence(self, ours, theirs, x: jax.Array, y: jax.Array) -> jax.Array:
        """Mean KL(dense || model) over places, from hidden states `x` and `y [T, D]`."""
        count = x.shape[0]
        parts = next(n for n in range(-(-count // _SLICE), count + 1) if count % n == 0)

        @jax.checkpoint
        def of_slice(total, states):
            q = jax.nn.log_softmax(logits_of(self._model, ours, states[0]))
            p = jax.nn.log_softmax(logits_of(self._dense, theirs, states[1]))
            return total + jnp.sum(jnp.exp(p) * (p - q)), None

        slices = tuple(a.reshape(parts, count // parts, -1) for a in (x, y))
        return jax.lax.scan(of_slice, jnp.zeros(()), slices)[0] / count
