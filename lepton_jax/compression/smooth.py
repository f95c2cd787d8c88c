"""Scales between two neighbouring weights of a layer, so that the second loses less to rounding.

What multiplies an input of a product may be divided out where that input is made: in the norm
before, in the rows of v, or in the up half of the ffn. The layer computes the same, at no cost, and
no bias, norm of q and k, or norm after a block stands between the two. Experts are left as they
are: their router reads the same norm. The scales are
SmoothQuant's (arXiv 2211.10438, from the largest activations) or AWQ's (arXiv 2306.00978, found by
a search). Which statistics of activations they need is `NEEDS`; who gathers them: `calibrate.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.compression.quantize import quantize
from lepton_jax.compression.scheme import Scheme
from lepton_jax.compression.statistics import Statistics, mean_hessian
from lepton_jax.models.config import ModelConfig

SMOOTHING = ("none", "smoothquant", "awq")
NEEDS = {"smoothquant": ("largest",), "awq": ("sizes", "hessian")}
_EXPONENTS = tuple(step / 20 for step in range(20))


class Pair(NamedTuple):
    """Parameters of one layer: inputs of `target` are made by `source`."""

    source: str
    target: str


PAIRS = (
    Pair("attn_norm", "qkv"),
    Pair("qkv", "out"),
    Pair("ffn_norm", "gate_up"),
    Pair("gate_up", "down"),
)


def pairs_for(method: str, schemes: Mapping[str, Scheme]) -> list[Pair]:
    """The pairs of a layer that gain by a method, from the schemes of its parameters by name.

    SmoothQuant is for products with quantized activations, AWQ for quantized weights.
    """

    def gains(scheme: Scheme | None) -> bool:
        if scheme is None or scheme.weights == "keep":
            return False
        return method == "awq" or scheme.activations != "float"

    return [pair for pair in PAIRS if gains(schemes.get(pair.target))]


def smoothquant_scales(columns: jax.Array, largest: jax.Array, alpha: float) -> jax.Array:
    """What multiplies the inputs of a weight: float32 `[I]`.

    Args:
      columns: largest magnitude of the weights of each input, `[I]`.
      largest: of the activations of each input, `[I]`.
      alpha: moves difficulty from the activations (1) to the weights (0).
    """
    scales = jnp.maximum(largest, 1e-5) ** alpha / jnp.maximum(columns, 1e-5) ** (1.0 - alpha)
    return jnp.where(largest > 0, jnp.maximum(scales, 1e-5), 1.0)


@functools.partial(jax.jit, static_argnames=("scheme",))
def awq_scales(
    weight: jax.Array, sizes: jax.Array, hessian: jax.Array, scheme: Scheme
) -> tuple[jax.Array, jax.Array]:
    """What multiplies the inputs of a weight `[*out, I]`, float32 `[I]`, and the exponent found.

    Tries `sizes ** exponent` for 20 exponents from 0 and takes the one whose rounded weight changes
    the product least over the calibration tokens.

    Args:
      weight: any float dtype.
      sizes: mean magnitude of each input, `[I]`.
      hessian: mean of x x^T, `[I, I]`.
      scheme: with which the scaled weight is rounded.
    """
    flat = weight.astype(jnp.float32).reshape(-1, weight.shape[-1])
    live = sizes > 0

    def scales_of(exponent):
        scales = jnp.where(live, sizes, 1.0) ** exponent
        least = jnp.min(jnp.where(live, scales, jnp.inf))
        most = jnp.max(jnp.where(live, scales, 0.0))
        return jnp.where(live, scales / jnp.sqrt(least * most), 1.0)

    def loss(exponent):
        scales = scales_of(exponent)
        change = quantize(flat * scales, scheme).dense(jnp.float32) / scales - flat
        return jnp.sum(jnp.matmul(change, hessian, precision="highest") * change)

    exponents = jnp.asarray(_EXPONENTS, jnp.float32)
    best = exponents[jnp.argmin(jax.lax.map(loss, exponents))]
    return jnp.where(jnp.any(live), scales_of(best), jnp.ones_like(sizes)), best


def smoothed(
    layer: Mapping[str, Any],
    statistics: Mapping[str, Statistics],
    schemes: Mapping[str, Scheme],
    *,
    config: ModelConfig,
    method: str,
    alpha: float,
) -> tuple[dict[str, Any], dict[str, float]]:
    """A layer that computes the same, and by target the exponent that its scales have.

    Args:
      layer: its dense parameters by name.
      statistics: of the inputs of each target, as NEEDS asks.
      schemes: of its parameters by name, where they have one.
      config: of the model.
      method: "smoothquant" or "awq".
      alpha: of SmoothQuant.
    """
    found = dict(layer)
    exponents = {}
    for pair in pairs_for(method, schemes):
        weight, seen = found[pair.target], statistics[pair.target]
        if method == "smoothquant":
            columns = jnp.max(jnp.abs(weight), axis=range(weight.ndim - 1)).astype(jnp.float32)
            columns, largest = (
                _shared(numbers, pair, config, jnp.max) for numbers in (columns, seen["largest"])
            )
            scales, exponent = smoothquant_scales(columns, largest, alpha), alpha
        else:
            sizes = seen["sizes"] / jnp.maximum(seen["count"], 1.0)
            sizes = _shared(sizes, pair, config, jnp.mean)
            scheme = schemes[pair.target]
            scales, exponent = awq_scales(weight, sizes, mean_hessian(seen), _plain(scheme))
        found |= folded(found, pair, scales, config)
        exponents[pair.target] = float(exponent)
    return found, exponents


def folded(
    layer: Mapping[str, Any], pair: Pair, scales: jax.Array, config: ModelConfig
) -> dict[str, Any]:
    """The parameters that change when inputs of `pair.target` are multiplied by `scales [I]`.

    The scales of `out` must be the same for all query heads of a kv head.
    """
    target = (layer[pair.target] * scales).astype(layer[pair.target].dtype)
    if pair.source.endswith("norm"):
        return {pair.target: target, pair.source: layer[pair.source] / scales}
    if pair.source == "qkv":
        group = config.group
        part = (slice(None), group + 1)  # v of [K, J, ...]
        inverse = 1.0 / scales.reshape(config.num_kv_heads, group, config.head_dim)[:, 0]
    else:
        part, inverse = (1,), 1.0 / scales  # up of [2, F, ...]
    source, bias = layer[pair.source], f"{pair.source}_bias"
    changed = {
        pair.target: target,
        pair.source: source.at[part].multiply(inverse[..., None].astype(source.dtype)),
    }
    if bias in layer:
        changed[bias] = layer[bias].at[part].multiply(inverse.astype(layer[bias].dtype))
    return changed


def _shared(numbers: jax.Array, pair: Pair, config: ModelConfig, reduce) -> jax.Array:
    """`[I]` where inputs that share their source share their number too (heads of one v)."""
    if pair.target != "out":
        return numbers
    heads = numbers.reshape(config.num_kv_heads, config.group, config.head_dim)
    return jnp.broadcast_to(reduce(heads, axis=1, keepdims=True), heads.shape).reshape(-1)


def _plain(scheme: Scheme) -> Scheme:
    """The scheme of the search: the same grid, rounded to the nearest, nothing pruned."""
    return Scheme(scheme.weights, group=scheme.group, asymmetric=scheme.asymmetric)
