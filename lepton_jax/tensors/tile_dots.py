"""The product with the kept tiles of a weight, which skips the others: gather, then batched dots.

Each row of tiles keeps equally many, so the dots are regular: at 50 % of 192x32 tiles it takes 0.4
to 0.6 of the dense float32 dot's time at 1, 8 and 32 rows ([3072, 576], 2-core AVX-512 CPU, jax
0.12.0.1, 2026-11-24), where a dot per tile and a segment sum takes up to 1.8 times as long. The
kernel for TPU is `tile_dots_tpu.py`; the leaf type is `block_sparse.py`.
"""

import jax
import jax.numpy as jnp

from lepton_jax.tensors import tile_dots_tpu

_BATCHED = (((2,), (2,)), ((0,), (0,)))


def tiled_dot(x: jax.Array, values: jax.Array, tiles: jax.Array) -> jax.Array:
    """`x [M, I]` times the transpose of a tiled weight `[O, I]`: float32 `[M, O]`.

    Args:
      x: `[M, I]`.
      values: float or int8 `[O, k*C]`, the k kept tiles of C inputs side by side.
      tiles: int32 `[O/R, k]`: which tiles of C inputs each R outputs keep.
    """
    branches = dict(cpu=_wide_dot, default=gathered_dot)
    if tile_dots_tpu.fits(values, tiles):
        branches["tpu"] = _kernel_dot
    return jax.lax.platform_dependent(x, values, tiles, **branches)


def gathered_dot(x: jax.Array, values: jax.Array, tiles: jax.Array) -> jax.Array:
    """`tiled_dot` for every platform; int8 values are multiplied as bfloat16."""
    outputs, kept = values.shape
    tile_rows, count = tiles.shape
    rows = x.shape[0]
    dtype = jnp.bfloat16 if values.dtype == jnp.int8 else values.dtype
    picked = x.astype(dtype).reshape(rows, -1, kept // count)[:, tiles]  # [M, O/R, k, C]
    picked = jnp.swapaxes(picked.reshape(rows, tile_rows, kept), 0, 1)
    y = jax.lax.dot_general(
        values.astype(dtype).reshape(tile_rows, -1, kept),
        picked,
        _BATCHED,
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return y.reshape(outputs, rows).T


def _wide_dot(x: jax.Array, values: jax.Array, tiles: jax.Array) -> jax.Array:
    """In float32: a CPU's batched int8 dots take 10 times as long as widening and multiplying."""
    return gathered_dot(x, values.astype(jnp.float32), tiles)


@jax.custom_vjp
def _kernel_dot(x: jax.Array, values: jax.Array, tiles: jax.Array) -> jax.Array:
    return tile_dots_tpu.kernel_dot(x, values, tiles)


def _forward(x, values, tiles):
    return _kernel_dot(x, values, tiles), (x, values, tiles)


def _backward(saved, slope):
    """The kernel has no gradient, so it takes that of `gathered_dot`."""
    x, values, tiles = saved
    if values.dtype == jnp.int8:
        return *jax.vjp(lambda x: gathered_dot(x, values, tiles), x)[1](slope), None, None
    return *jax.vjp(lambda x, v: gathered_dot(x, v, tiles), x, values)[1](slope), None


_kernel_dot.defvjp(_forward, _backward)
