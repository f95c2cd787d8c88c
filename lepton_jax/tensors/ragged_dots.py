"""The product of a mixture of experts: consecutive groups of rows, each times a weight of its own.

One expert and one tile of its rows at a time, so that no platform holds a decompressed copy of all
experts, and those that no row visits are not read. The kernel for TPU is `ragged_dots_tpu.py`; the
same in a few lines of jnp, for every leaf type and every platform, is `by_expert`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.tensors import ragged_dots_tpu
from lepton_jax.tensors.dots import float_dot

TILE = 64  # rows of a visit

_RAGGED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


@jax.custom_vjp
def ragged_dot(x: jax.Array, w: Any, group_sizes: jax.Array) -> jax.Array:
    """Groups of rows of `x [M, I]` times their own of `w [E, O, I]`: float32 `[M, O]`.

    Args:
      x: rows sorted by group.
      w: an array or a CompressedTensor.
      group_sizes: int32 `[E]`, summing to M at most; rows beyond give anything finite.
    """
    branches = dict(cpu=_by_small_tiles, default=by_expert)
    if ragged_dots_tpu.takes(w):
        branches["tpu"] = ragged_dots_tpu.kernel_dot
    return jax.lax.platform_dependent(x, w, group_sizes, **branches)


def by_expert(
    x: jax.Array, w: Any, group_sizes: jax.Array, *, tile: int = TILE, counted: bool = False
) -> jax.Array:
    """`ragged_dot` as a loop of the weights' own products.

    A visit computes a whole tile from its first row on. What it computes beyond its group the next
    visits write over, because they go up the rows.

    Args:
      x, w, group_sizes: as in `ragged_dot`.
      tile: rows of a visit.
      counted: make only the visits that there are, which an accelerator would have to ask its host
        for, instead of the most that there can be.
    """
    (rows, inputs), (experts, outputs, _) = x.shape, w.shape
    visits = -(-group_sizes // tile)
    ends = jnp.cumsum(visits)
    begins = jnp.cumsum(group_sizes) - group_sizes
    x = jnp.pad(x, ((0, tile), (0, 0)))

    def visit(i: jax.Array, y: jax.Array) -> jax.Array:
        expert = jnp.sum(ends <= i)
        first = begins[expert] + (i - ends[expert] + visits[expert]) * tile
        part = jax.lax.dynamic_slice(x, (first, 0), (tile, inputs))
        return jax.lax.dynamic_update_slice(y, _product(part, w, expert), (first, 0))

    y = jnp.zeros((rows + tile, outputs), jnp.float32)
    most = min(rows, rows // tile + experts)
    return jax.lax.fori_loop(0, ends[-1] if counted else most, visit, y)[:rows]


def _by_small_tiles(x: jax.Array, w: Any, group_sizes: jax.Array) -> jax.Array:
    """For a CPU, which pays for every row of a tile; alone a row would fall off its cliff."""
    mean = -(-x.shape[0] // w.shape[0])
    tile = max(2, min(TILE, 1 << (mean - 1).bit_length()))
    return by_expert(x, w, group_sizes, tile=tile, counted=True)


def _product(x: jax.Array, w: Any, expert: jax.Array) -> jax.Array:
    return float_dot(x, w[expert]) if isinstance(w, jax.Array) else w.taken(expert).matmul(x)


def _dense_dot(x: jax.Array, w: Any, group_sizes: jax.Array) -> jax.Array:
    """By XLA's own ragged product, of decompressed weights."""
    if not isinstance(w, jax.Array):
        w = w.dense(jnp.float32 if x.dtype == jnp.float32 else jnp.bfloat16)
    return jax.lax.ragged_dot_general(
        x.astype(w.dtype), w, group_sizes, _RAGGED, preferred_element_type=jnp.float32
    )


def _forward(x, w, group_sizes):
    return ragged_dot(x, w, group_sizes), (x, w, group_sizes)


def _backward(saved, slope):
    """A loop of unknown length has no gradient, so it takes that of `_dense_dot`."""
    return jax.vjp(_dense_dot, *saved)[1](slope)


ragged_dot.defvjp(_forward, _backward)
