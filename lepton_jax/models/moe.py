"""The mixture-of-experts ffn: each token visits its top experts, tokens sorted by expert.

Here: the routing and the sort. The grouped matrix product is `tensors.ragged_einsum`. Nothing is
dropped: there is no capacity factor, every token gets all of its experts. The dense ffn is in
`decoder.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lepton_jax.models.config import ModelConfig
from lepton_jax.tensors import einsum, ragged_einsum


def experts_ffn(
    x: jax.Array, router, gate_up, down, *, config: ModelConfig, activation: Callable
) -> jax.Array:
    """The experts' weighted sum `[T, D]` for x `[T, D]`.

    Args:
      x: normed activations.
      router: leaf `[E, D]`.
      gate_up: leaf `[E, 2, F, D]`.
      down: leaf `[E, D, F]`.
      config: reads num_experts, experts_per_token, norm_expert_weights.
      activation: applied to the gate.
    """
    visits = config.experts_per_token
    weight, expert = routing(x, router, config)
    flat = expert.reshape(-1)
    order = jnp.argsort(flat)
    group_sizes = jnp.bincount(flat, length=config.num_experts).astype(jnp.int32)
    hidden = ragged_einsum("TD,ECFD->TCF", x[order // visits], gate_up, group_sizes)
    hidden = activation(hidden[:, 0]) * hidden[:, 1]
    result = ragged_einsum("TF,EDF->TD", hidden, down, group_sizes)
    back = result[jnp.argsort(order)].reshape(x.shape[0], visits, -1)
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
