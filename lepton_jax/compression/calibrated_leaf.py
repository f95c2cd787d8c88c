"""One weight and the statistics of its inputs: which are needed, and what leaf comes of them.

The methods are `gptq.py`, `sparsegpt.py` and `wanda.py`; who gathers statistics and goes through
the layers is `calibrate.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.compression.gptq import Settled, gptq
from lepton_jax.compression.leaf import relative_error
from lepton_jax.compression.prune import (
    magnitude_mask,
    mask_by_score,
    store,
    store_on_grid,
)
from lepton_jax.compression.quantize import (
    fit_grid,
    in_groups,
    make_leaf,
    on_grid,
    round_to_grid,
)
from lepton_jax.compression.scheme import Scheme
from lepton_jax.compression.smooth import SMOOTHING
from lepton_jax.compression.sparsegpt import sparsegpt
from lepton_jax.compression.statistics import RANGES, Statistics, act_range, mean_hessian
from lepton_jax.compression.wanda import wanda_scores
from lepton_jax.models.build import Model
from lepton_jax.tensors.leaves import dense_of

MOST_HESSIANS = 2**31  # bytes of those of one weight's experts


@dataclasses.dataclass(frozen=True)
class Options:
    """What holds for all weights of a calibrated compression.

    Attributes:
      smooth: "smoothquant" scales difficulty from quantized activations to weights, "awq" searches
        scales that protect what large activations meet (and with rounding="mse" ranges that suit
        them), "none" leaves both.
      alpha: of SmoothQuant: 1 moves all difficulty to the weights, 0 none.
      ranges: of static activations: "absmax" holds the largest that came, "percentile" all but the
        largest few, "mse" gives the least squared error.
      percentile: of `ranges="percentile"`.
      damp: of GPTQ and SparseGPT: share of the Hessian's mean diagonal added to its diagonal.
      act_order: GPTQ takes inputs with large activations first.
    """

    smooth: str = "none"
    alpha: float = 0.5
    ranges: str = "absmax"
    percentile: float = 99.9
    damp: float = 0.01
    act_order: bool = False

    def __post_init__(self):
        for name, allowed in (("smooth", SMOOTHING), ("ranges", RANGES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"compression.{name}={value!r}: allowed are {', '.join(allowed)}")
        for name, least, most in (("alpha", 0, 1), ("percentile", 50, 100), ("damp", 1e-6, 1)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"compression.{name}={value}: want {least} to {most}")


def unsuited(model: Model, path: str, scheme: Scheme, options: Options) -> str:
    """Why a method can't be had for a weight of the model, and what to do; "" where it can."""
    kinds, shape = kinds_for(scheme, options), model.specs[path].shape
    if path == "embed" and model.config.head_path != path and kinds:
        return (
            "the embedding is looked up, never multiplied, so nothing calibrates it; give it a "
            "rule of its own without calibration"
        )
    if ".experts_" not in path:
        return ""
    if scheme.activations == "static":
        return f"{path} of experts has no static activations; take activations=dynamic"
    size = 4 * shape[0] * shape[-1] ** 2
    if "hessian" in kinds and size > MOST_HESSIANS:
        return (
            f"{path} needs the Hessians of {shape[0]} experts, {size / 2**30:.1f} GiB, and "
            f"{MOST_HESSIANS / 2**30:.1f} GiB are allowed; take a method without them (wanda, "
            "magnitude, rounding=mse)"
        )
    return ""


def kinds_for(scheme: Scheme, options: Options) -> tuple[str, ...]:
    """The statistics that a scheme needs; none where it needs no calibration."""
    kinds = []
    if scheme.rounding == "gptq" or scheme.prune == "sparsegpt":
        kinds.append("hessian")
    if scheme.prune == "wanda" or clips(scheme, options):
        kinds.append("squares")
    if scheme.activations == "static":
        kinds += ["largest"] if options.ranges == "absmax" else ["largest", "histogram"]
    return tuple(kinds)


def clips(scheme: Scheme, options: Options) -> bool:
    """Whether ranges are cut to suit the products, as AWQ does besides its scales."""
    return options.smooth == "awq" and scheme.rounding == "mse"


def compress_calibrated(
    array: jax.Array, scheme: Scheme, statistics: Statistics, options: Options
) -> Any:
    """The leaf that a weight `[*out, I]` becomes, with the statistics that `kinds_for` asks for.

    With experts, statistics have a leading `[E]`, and so has the weight.
    """
    settled, mask, act_scale = _settle(array, statistics, scheme, options)
    if scheme.weights == "keep":
        return store(settled.weights.astype(array.dtype), mask, scheme)
    if scheme.storage == "sparse":
        return store_on_grid(settled.values, settled.grid, mask, scheme)
    return make_leaf(settled.values, settled.grid, scheme, act_scale)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _settle(
    array: jax.Array, statistics: Statistics, scheme: Scheme, options: Options
) -> tuple[Settled, jax.Array | None, jax.Array | None]:
    """Values, mask and scale of static activations, in the shape of the weight."""
    lead = statistics["count"].shape

    def settle(one):
        return _settle_flat(*one, scheme=scheme, options=options)

    of_inputs = {kind: s for kind, s in statistics.items() if kind not in ("largest", "histogram")}
    flat = array.reshape(*lead, -1, array.shape[-1]), of_inputs
    found = jax.lax.map(settle, flat) if lead else settle(flat)
    outs = array.shape[:-1]
    settled, mask = jax.tree.map(lambda a: a.reshape(*outs, *a.shape[len(lead) + 1 :]), found)
    act_scale = None
    if scheme.activations == "static":
        act_scale = act_range(statistics, options.ranges, options.percentile) / 127.0
    return settled, mask, act_scale


def _settle_flat(
    weight: jax.Array, statistics: Statistics, *, scheme: Scheme, options: Options
) -> tuple[Settled, jax.Array | None]:
    """A weight `[O, I]` with its values decided; bool `[O, I]` what is kept where it is pruned."""
    if scheme.prune == "sparsegpt":
        return sparsegpt(weight, mean_hessian(statistics), scheme, damp=options.damp)
    mask = None
    if scheme.prune == "wanda":
        scores = wanda_scores(weight, statistics["squares"])
        mask = mask_by_score(scores, scheme, per_output=True)
    elif scheme.prune == "magnitude":
        mask = magnitude_mask(weight, scheme)
    if scheme.rounding == "gptq":
        hessian = mean_hessian(statistics)
        return gptq(
            weight, hessian, scheme, damp=options.damp, act_order=options.act_order, mask=mask
        ), mask
    weight = weight.astype(jnp.float32)
    weight = weight if mask is None else jnp.where(mask, weight, 0.0)
    importance = statistics["squares"] if clips(scheme, options) else None
    return _rounded(weight, scheme, importance), mask


def _rounded(weight: jax.Array, scheme: Scheme, importance: jax.Array | None) -> Settled:
    """A weight `[O, I]` rounded to the nearest; `importance [I]` of its inputs, or all alike."""
    if scheme.weights == "keep":
        return Settled(weight, None, None)
    parts = in_groups(weight, scheme)
    if importance is not None:
        importance = importance.reshape(parts.shape[1:])
    grid = fit_grid(parts, scheme, importance)
    values = round_to_grid(parts, grid, scheme)
    return Settled(on_grid(values, grid).reshape(weight.shape), values, grid)


@jax.jit
def relative_errors(
    array: jax.Array, leaf: Any, statistics: Statistics | None
) -> dict[str, jax.Array]:
    """By how much a leaf differs from the weight `[*out, I]` that it stands for.

    "weight": `relative_error`. "product": the same of the products
    with the calibration inputs, where their Hessian is known.
    """
    errors = {"weight": relative_error(array, leaf)}
    if statistics is not None and "hessian" in statistics:
        lead = statistics["count"].shape
        hessian, weight = mean_hessian(statistics), array.astype(jnp.float32)
        change = dense_of(leaf, jnp.float32) - weight

        def energy(w):
            w = w.reshape(*lead, -1, w.shape[-1])
            return jnp.sum(jnp.matmul(w, hessian, precision="highest") * w)

        ratio = energy(change) / jnp.maximum(energy(weight), 1e-30)
        errors["product"] = jnp.sqrt(jnp.maximum(ratio, 0.0))
    return errors
