"""The matrix product of activations and one weight leaf: `[M, I] x [O, I] -> [M, O]`.

This is the one dispatch point for matrix products: a native kernel for a platform slots in here and
nowhere else. Three ways, by leaf: float weights, int8 weights with int8 activations (W8A8), int8
weights with activations of float precision. Shapes above two dimensions are `ops.py`'s business.

Figures (2-core AVX-512 CPU, jax 0.12.0.1, `[M, 2048] x [8192, 2048]`, 2026-11-24): a one-row int8
or bf16 dot takes 14.7 ms where two rows take 0.3 ms, so a single row is padded. Upcasting int8
weights in the program takes ~19 ms at any M; two int8 planes of the activations take 0.64 / 0.61 /
1.48 ms at M = 1 / 8 / 32 (W8A8: 0.38 /
0.44 / 0.93).
"""

import jax
import jax.numpy as jnp

from lepton_jax.tensors.leaves import QTensor

_CONTRACT_LAST = (((1,), (1,)), ((), ()))


def matmul(x: jax.Array, w) -> jax.Array:
    """`x [M, I]` times the transpose of `w [O, I]`, an array or QTensor: `[M, O]` like x."""
    if not isinstance(w, QTensor):
        return _float_dot(x, w).astype(x.dtype)
    if w.act_bits == 8:
        y = _int8_dot(x, w.values)
    else:
        y = jax.lax.platform_dependent(x, w.values, cpu=_two_plane_dot, default=_upcast_dot)
    return (y * w.scale).astype(x.dtype)


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x [M, I]` as int8 and float32 scales `[M, 1]`: symmetric, absolute maximum per row."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / 127.0
    return jnp.round(x / scale).astype(jnp.int8), scale


def _float_dot(x, w):
    precision = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    return _dot(x.astype(w.dtype), w, jnp.float32, precision=precision)


def _int8_dot(x, values):
    planes, scale = quantize_rows(x)
    return _dot(planes, values, jnp.int32).astype(jnp.float32) * scale


def _two_plane_dot(x, values):
    """Float-precision activations through int8 dots: `x = scale * (127 * high + low)`, about 15
    bits a row.
    """
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / (127.0 * 127.0)
    steps = jnp.round(x / scale)
    high = jnp.round(steps / 127.0)
    low = steps - 127.0 * high
    y = _dot(jnp.concatenate([high, low]).astype(jnp.int8), values, jnp.int32).astype(jnp.float32)
    rows = x.shape[0]
    return (127.0 * y[:rows] + y[rows:]) * scale


def _upcast_dot(x, values):
    """Where the compiler fuses the conversion into the dot (TPU, GPU), int8 weights are read as
    they are.
    """
    dtype = x.dtype if x.dtype != jnp.float32 else jnp.bfloat16
    return _dot(x.astype(dtype), values.astype(dtype), jnp.float32)


def _dot(x, w, accumulate, *, precision=None):
    rows = x.shape[0]
    if rows == 1 and x.dtype != jnp.float32:  # the one-row cliff of CPU dots; free elsewhere
        x = jnp.pad(x, ((0, 1), (0, 0)))
    y = jax.lax.dot_general(
        x, w, _CONTRACT_LAST, precision=precision, preferred_element_type=accumulate
    )
    return y[:rows]
