"""Quantization of one weight: a grid for its values, and the values on it.

    grid = fit_grid(parts, scheme)           # scales (and offsets) per output or group of inputs
    values = round_to_grid(parts, grid, scheme)
    leaf = make_leaf(values, grid, scheme)   # a QTensor

`quantize` does all three in one jitted call. Methods that choose values otherwise (GPTQ) use the
same grid and `make_leaf`. Values and scales keep the logical axes of the weight (`Scheme.plan`), so
shardings and memory plans of a quantized model are derived.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.compression.scheme import Scheme
from lepton_jax.tensors import QTensor
from lepton_jax.tensors.qtensor import pack_int4

_TOP = {"int8": 127.0, "int4": 7.0, "float8": 448.0}
_BOTTOM = {"int8": -127.0, "int4": -8.0, "float8": -448.0}
_LEAST = 1e-30  # a scale is never 0
_CLIPS = tuple(1.0 - 0.02 * i for i in range(20))  # shares of the full range that "mse" tries


class Grid(NamedTuple):
    """float32 `[*out, X]`, in values that the stored dtype holds: weight = values * scale + offset.

    `offset` is None where the scheme is symmetric.
    """

    scale: jax.Array
    offset: jax.Array | None


@functools.partial(jax.jit, static_argnums=1)
def quantize(array: jax.Array, scheme: Scheme) -> QTensor:
    """A weight `[*out, I]` as a QTensor on its device, by a scheme that needs no calibration."""
    parts = in_groups(array, scheme)
    grid = fit_grid(parts, scheme)
    return make_leaf(round_to_grid(parts, grid, scheme), grid, scheme)


def in_groups(array: jax.Array, scheme: Scheme) -> jax.Array:
    """A weight `[*out, I]` as float32 `[*out, X, I/X]`; one group where scales are per output."""
    inputs = array.shape[-1]
    size = scheme.group_of(inputs) or inputs
    return array.astype(jnp.float32).reshape(*array.shape[:-1], inputs // size, size)


def fit_grid(parts: jax.Array, scheme: Scheme, importance: jax.Array | None = None) -> Grid:
    """The grid of `[*out, X, I/X]` by the scheme's rounding ("gptq" takes that of "mse").

    `importance [X, I/X]` weighs the squared errors of the inputs; 0 or more, by default all alike.
    """
    full = _grid(parts, scheme, clip=1.0)
    if scheme.rounding == "nearest":
        return full

    def try_clip(found, clip):
        best, least = found
        grid = _grid(parts, scheme, clip=clip)
        error = _squared_error(parts, grid, scheme, importance)
        best = jax.tree.map(lambda a, b: jnp.where(error < least, a, b), grid, best)
        return (best, jnp.minimum(error, least)), None

    start = full, _squared_error(parts, full, scheme, importance)
    (best, _), _ = jax.lax.scan(try_clip, start, jnp.asarray(_CLIPS[1:], jnp.float32))
    return best


def round_to_grid(parts: jax.Array, grid: Grid, scheme: Scheme) -> jax.Array:
    """The nearest values of the grid, as float32 `[*out, X, I/X]`."""
    shifted = parts if grid.offset is None else parts - grid.offset[..., None]
    steps = shifted / grid.scale[..., None]
    steps = jnp.clip(steps, _BOTTOM[scheme.weights], _TOP[scheme.weights])
    if scheme.weights == "float8":
        return steps.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return jnp.round(steps)


def on_grid(values: jax.Array, grid: Grid) -> jax.Array:
    """The weights that values stand for, both `[*out, X, I/X]`."""
    weights = values * grid.scale[..., None]
    return weights if grid.offset is None else weights + grid.offset[..., None]


def make_leaf(
    values: jax.Array, grid: Grid, scheme: Scheme, act_scale: jax.Array | None = None
) -> QTensor:
    """A QTensor of values `[*out, X, I/X]`; `act_scale` is that of static activations."""
    *outs, groups, size = values.shape
    flat = values.reshape(*outs, groups * size)
    if scheme.weights == "float8":
        stored = flat.astype(jnp.float8_e4m3fn)
    else:
        stored = flat.astype(jnp.int8)
        stored = pack_int4(stored, groups) if scheme.weights == "int4" else stored
    return QTensor(
        values=stored,
        scale=grid.scale.astype(jnp.bfloat16) if scheme.group else grid.scale[..., 0],
        act_bits=16 if scheme.activations == "float" else 8,
        offset=None if grid.offset is None else grid.offset.astype(jnp.bfloat16),
        act_scale=act_scale,
    )


def _grid(parts, scheme: Scheme, *, clip: jax.Array | float) -> Grid:
    top, bottom = _TOP[scheme.weights], _BOTTOM[scheme.weights]
    if not scheme.asymmetric:
        largest = clip * jnp.max(jnp.abs(parts), axis=-1)
        return Grid(_stored(jnp.maximum(largest, _LEAST) / top, scheme), None)
    high, low = clip * jnp.max(parts, axis=-1), clip * jnp.min(parts, axis=-1)
    scale = _stored(jnp.maximum(high - low, _LEAST) / (top - bottom), scheme)
    return Grid(scale, _stored(low - bottom * scale, scheme))


def _stored(numbers, scheme: Scheme):
    """Numbers as the leaf will hold them: bfloat16 where there are many."""
    return numbers.astype(jnp.bfloat16).astype(jnp.float32) if scheme.group else numbers


def _squared_error(parts, grid: Grid, scheme: Scheme, importance):
    errors = (on_grid(round_to_grid(parts, grid, scheme), grid) - parts) ** 2
    return jnp.sum(errors if importance is None else errors * importance, axis=-1)
