"""Scales between two neighbouring weights of a layer, so that the second loses less to rounding.

What multiplies an input of a product may be divided out where that input is made: in the norm
before, in the rows of v, or in the up half of the ffn. The layer computes the same, at no cost, and
no bias, norm of q and k, or norm after a block stands between the two. Experts share the scales of
their norm, which their router undoes too, and each has its own between its two products. The scales
are SmoothQuant's (arXiv 2211.10438, from the largest activations) or AWQ's (arXiv 2306.00978, found
by a search). Which statistics of activations they need is `needs_of`; who gathers them:
`calibrate.py`.
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
_EXPONENTS = tuple(step / 20 for step in range(20))


class Pair(NamedTuple):
    """Parameters of one layer: inputs of `target` are made by `source`; `reader` has the same ones,
    and sees those of all experts together.
    """

    source: str
    target: str
    reader: str = ""

    @property
    def seen(self) -> str:
        """The parameter whose inputs are looked at."""
        return self.reader or self.target


PAIRS = (
    Pair("attn_norm", "qkv"),
    Pair("qkv", "out"),
    Pair("ffn_norm", "gate_up"),
    Pair("gate_up", "down"),
    Pair("ffn_norm", "experts_gate_up", "router"),
    Pair("experts_gate_up", "experts_down"),
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


def needs_of(method: str, pair: Pair) -> tuple[str, tuple[str, ...]]:
    """The parameter to look at for a pair's scales, and the statistics of its inputs.

    Of single experts the squares do instead of the Hessian: that of each would be too large, and of
    few tokens.
    """
    if method == "smoothquant":
        return pair.seen, ("largest",)
    return pair.seen, ("sizes", "squares" if pair.seen.startswith("experts_") else "hessian")


def smoothquant_scales(columns: jax.Array, largest: jax.Array, alpha: float) -> jax.Array:
    """What multiplies the inputs of a weight: float32 `[I]`.

    Args:
      columns: largest magnitude of the weights of each input, `[I]`, or `[E, I]` as the next and
        what is returned.
      largest: of the activations of each input, `[I]`.
      alpha: moves difficulty from the activations (1) to the weights (0).
    """
    scales = jnp.maximum(largest, 1e-5) ** alpha / jnp.maximum(columns, 1e-5) ** (1.0 - alpha)
    return jnp.where(largest > 0, jnp.maximum(scales, 1e-5), 1.0)


@functools.partial(jax.jit, static_argnames=("scheme",))
def awq_scales(
    weight: jax.Array, sizes: jax.Array, energy: jax.Array, scheme: Scheme
) -> tuple[jax.Array, jax.Array]:
    """What multiplies the inputs of a weight `[*out, I]`, float32 `[I]`, and the exponent found.

    Tries `sizes ** exponent` for 20 exponents from 0 and takes the one whose rounded weight changes
    the product least over the calibration tokens.

    Args:
      weight: any float dtype.
      sizes: mean magnitude of each input, `[I]`.
      energy: mean of x x^T, `[I, I]`, or its diagonal `[I]`.
      scheme: with which the scaled weight is rounded.
    """
    # One expert after the other, so that there are copies of one only.
    parts = weight.reshape(weight.shape[0] if weight.ndim > 2 else 1, -1, weight.shape[-1])
    live = sizes > 0

    def scales_of(exponent):
        scales = jnp.where(live, sizes, 1.0) ** exponent
        least = jnp.min(jnp.where(live, scales, jnp.inf))
        most = jnp.max(jnp.where(live, scales, 0.0))
        return jnp.where(live, scales / jnp.sqrt(least * most), 1.0)

    def loss(exponent):
        scales = scales_of(exponent)

        def of_part(part):
            part = part.astype(jnp.float32)
            change = quantize(part * scales, scheme).dense(jnp.float32) / scales - part
            if energy.ndim == 1:
                return jnp.sum(change**2 * energy)
            return jnp.sum(jnp.matmul(change, energy, precision="highest") * change)

        return jnp.sum(jax.lax.map(of_part, parts))

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
    """A layer that computes the same, and by target the exponent that its scales have, of experts
    the mean.

    Args:
      layer: its dense parameters by name.
      statistics: by parameter, as `needs_of` asks.
      schemes: of its parameters by name, where they have one.
      config: of the model.
      method: "smoothquant" or "awq".
      alpha: of SmoothQuant.
    """
    found = dict(layer)
    exponents = {}
    for pair in pairs_for(method, schemes):
        weight, seen = found[pair.target], statistics[pair.seen]
        if method == "smoothquant":
            lead = seen["largest"].ndim - 1  # 1 where each expert has scales of its own
            columns = jnp.max(jnp.abs(weight), axis=range(lead, weight.ndim - 1))
            columns, largest = (
                _shared(numbers.astype(jnp.float32), pair, config, jnp.max)
                for numbers in (columns, seen["largest"])
            )
            scales, exponent = smoothquant_scales(columns, largest, alpha), alpha
        else:
            sizes = seen["sizes"] / jnp.maximum(seen["count"], 1.0)[..., None]
            sizes = _shared(sizes, pair, config, jnp.mean)
            scheme = _plain(schemes[pair.target])
            if "hessian" in seen:
                scales, exponent = awq_scales(weight, sizes, mean_hessian(seen), scheme)
            else:
                each = weight, sizes, seen["squares"]
                scales, exponent = jax.lax.map(lambda one, s=scheme: awq_scales(*one, s), each)
        found |= folded(found, pair, scales, config)
        exponents[pair.target] = float(jnp.mean(exponent))
    return found, exponents


def folded(
    layer: Mapping[str, Any], pair: Pair, scales: jax.Array, config: ModelConfig
) -> dict[str, Any]:
    """The parameters that change when inputs of `pair.target` are multiplied by `scales [I]`, or
    those of each expert by its own `[E, I]`.

    The scales of `out` must be the same for all query heads of a kv head.
    """
    wide = scales[:, None] if scales.ndim > 1 else scales
    readers = [pair.target, pair.reader] if pair.reader else [pair.target]
    changed = {name: (layer[name] * wide).astype(layer[name].dtype) for name in readers}
    if pair.source.endswith("norm"):
        return changed | {pair.source: layer[pair.source] / scales}
    if pair.source == "qkv":
        group = config.group
        part = group + 1  # v of [K, J, H, D]
        inverse = 1.0 / scales.reshape(config.num_kv_heads, group, config.head_dim)[:, 0]
    else:
        part, inverse = 1, 1.0 / scales  # up of [2, F, D] or [E, 2, F, D]
    source, bias = layer[pair.source], f"{pair.source}_bias"
    columns = inverse[..., None].astype(source.dtype)
    changed[pair.source] = source.at[..., part, :, :].multiply(columns)
    if bias in layer:
        changed[bias] = layer[bias].at[..., part, :].multiply(inverse.astype(layer[bias].dtype))
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
