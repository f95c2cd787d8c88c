"""The mixture-of-experts ffn: each token visits its top experts, tokens sorted by expert.

Here: the routing and the sort. The grouped matrix product is `tensors.ragged_einsum`. Nothing is
dropped: there is no capacity factor, every token gets all of its experts. Where experts are spread
over devices, each device knows all tokens anyway: it works for those that visit its own experts,
and the sum that ends every ffn brings the parts together. The dense ffn is in `decoder.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lepton_jax.models.config import ModelConfig
from lepton_jax.sharding.axis import WHOLE, Axis
from lepton_jax.tensors import einsum, ragged_einsum


def experts_ffn(
    x: jax.Array,
    router,
    gate_up,
    down,
    *,
    config: ModelConfig,
    activation: Callable,
    axis: Axis = WHOLE,
) -> jax.Array:
    """The experts' weighted sum `[T, D]` for x `[T, D]`; where devices share them, what this device
    has of it.

    Args:
      x: normed activations.
      router: leaf `[E, D]`.
      gate_up: leaf `[E, 2, F, D]`.
      down: leaf `[E, D, F]`.
      config: reads num_experts, experts_per_token, norm_expert_weights.
      activation: applied to the gate.
      axis: the devices over which experts are spread.
    """
    visits, held = config.experts_per_token, gate_up.shape[0]
    weight, expert = routing(x, router, config)
    place = axis.local(expert.reshape(-1), held)
    group = jnp.where(place < 0, held, place)  # visits to other devices' experts come last
    order = jnp.argsort(group)
    group_sizes = jnp.bincount(group, length=held).astype(jnp.int32)
    hidden = ragged_einsum("TD,ECFD->TCF", x[order // visits], gate_up, group_sizes)
    hidden = activation(hidden[:, 0]) * hidden[:, 1]
    result = ragged_einsum("TF,EDF->TD", hidden, down, group_sizes)
    back = axis.own(result[jnp.argsort(order)], place).reshape(x.shape[0], visits, -1)
    return jnp.sum(back.astype(jnp.float32) * weight[..., None], axis=1).astype(x.dtype)


def routing(x: jax.Array, router, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """The weights and the indices of the experts that each token of x `[T, D]` visits, both
    `[T, experts_per_token]`.
    """
    probability = jax.nn.softmax(einsum("TD,ED->TE", x.astype(jnp.float32), router), axis=-1)
    weight, expert = jax.lax.top_k(probability, config.experts_per_token)
    if config.norm_expert_weights:
        weight = weight / weight.sum(-1, keepdims=True)
    return weight, expert
