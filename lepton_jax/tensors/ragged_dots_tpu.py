"""`ragged_dots.ragged_dot` on TPU, in Pallas: rows stay in vector memory, experts stream past them.

One grid step is one expert that has rows, and a block of its outputs. The indices of the experts
come ahead as scalars, so an expert without rows is never fetched; what is fetched is the weight as
it is stored, widened in vector memory. The same in a few lines of jnp: `ragged_dots.by_expert`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.tensors import vector_memory

LANES = 128  # of a vector register
LEAST_TILE, MOST_TILE = 16, 256  # rows multiplied at a time; 16 fill a bfloat16 register
BLOCK_BYTES = 2 * 2**20  # of an expert's weight in a grid step
ROWS_BYTES = 4 * 2**20  # of the rows that stay, and of their results


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A product as the kernel computes it: rows times stored values, times both scales.

    Attributes:
      rows: `[M, I]`, rounded as the product wants them.
      values: `[E, O, I]`, or uint8 `[E, O, I/2]`: two of 4 bits, plus 8; the low ones meet the
        first half of a row, the high ones the second.
      scale: float32 `[E, O]`, or None.
      row_scale: float32 `[M, 1]` or `[]`, or None.
      group_scale: `[E, O, X]`, by which X groups of consecutive values are multiplied, or None.
      offset: `[E, O, X]`, added to them, or None.
    """

    rows: jax.Array
    values: jax.Array
    scale: jax.Array | None = None
    row_scale: jax.Array | None = None
    group_scale: jax.Array | None = None
    offset: jax.Array | None = None

    @property
    def stored(self) -> list[jax.Array]:
        """Its arrays `[E, O, ...]`."""
        arrays = (self.values, self.group_scale, self.offset)
        return [array for array in arrays if array is not None]


def takes(w: Any) -> bool:
    """Whether the kernel reads a weight `[E, O, I]`, an array or a leaf, as it lies."""
    _, outputs, inputs = w.shape
    whole_registers = inputs % LANES == 0 or (outputs % LANES == 0 and inputs % 32 == 0)
    return whole_registers and (isinstance(w, jax.Array) or w.streams)


@functools.partial(jax.jit, static_argnames="interpret")
def kernel_dot(
    x: jax.Array, w: Any, group_sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`ragged_dot` of a weight that it `takes`; it has no gradient of its own.

    `interpret` runs it on any platform, slowly.
    """
    parts = Streamed(x, w) if isinstance(w, jax.Array) else w.streamed(x)
    y = _streamed_dot(parts, group_sizes, interpret=interpret)
    return y if parts.row_scale is None else y * parts.row_scale


def _streamed_dot(parts: Streamed, group_sizes: jax.Array, *, interpret: bool) -> jax.Array:
    from jax.experimental import pallas as pl  # takes a second
    from jax.experimental.pallas import tpu as pltpu

    x, stored, scale = parts.rows, parts.stored, parts.scale
    (rows, inputs), (experts, outputs, _) = x.shape, parts.values.shape
    dtype = jnp.float32 if parts.values.dtype == jnp.float32 else jnp.bfloat16
    scale = jnp.ones((experts, outputs), jnp.float32) if scale is None else scale
    tile, chunk, block = _sizes(parts)
    padded = -(-rows // chunk) * chunk
    x = jnp.pad(x.astype(dtype), ((0, padded - rows), (0, 0)))
    visits, schedule = _schedule(group_sizes, padded, chunk)
    turned = [_turned(array) for array in stored]

    def part(array, turn):
        def place(chunk, out, visit, expert, *_):
            index = expert[chunk * visits + visit]
            return (index, 0, out) if turn else (index, out, 0)

        width = array.shape[2]
        return pl.BlockSpec((1, width, block) if turn else (1, block, width), place)

    y = pl.pallas_call(
        functools.partial(_visit, visits=visits, tile=tile, turned=turned),
        out_shape=jax.ShapeDtypeStruct((padded, outputs), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(schedule),
            grid=(padded // chunk, outputs // block, visits),
            in_specs=[
                pl.BlockSpec((chunk, inputs), lambda chunk, out, visit, *_: (chunk, 0)),
                pl.BlockSpec((experts, block), lambda chunk, out, visit, *_: (0, out)),
                *map(part, stored, turned),
            ],
            out_specs=pl.BlockSpec((chunk, block), lambda chunk, out, visit, *_: (chunk, out)),
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vector_memory.claim()),
        interpret=interpret,
        name="ragged_dot",
    )(*schedule, x, scale, *map(_as_it_lies, stored))
    return y[:rows]


def _visit(*references, visits: int, tile: int, turned: list):
    """One grid step.

    References: int32 `[C*V]` thrice, for C chunks of rows and V visits of each; rows `[chunk, I]`;
    scale `[E, block]`; what is stored of one expert `[1, block, ...]`;
    results `[chunk, block]`.
    """
    from jax.experimental import pallas as pl

    expert, begin, end, x, scale, *stored, y = references
    place = pl.program_id(0) * visits + pl.program_id(2)
    first, last = begin[place], end[place]

    @pl.when(pl.program_id(2) == 0)
    def _():
        y[...] = jnp.zeros_like(y)

    @pl.when(first < last)
    def _():
        wide = _widened(*(array[0] for array in stored), turned=turned, dtype=x.dtype)
        by_output = scale[pl.ds(expert[place], 1), :]

        def multiply(i, carry):
            at = pl.ds(pl.multiple_of(i * tile, tile), tile)
            product = jax.lax.dot_general(
                x[at, :],
                wide,
                (((1,), (0 if turned[0] else 1,)), ((), ())),
                precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
                preferred_element_type=jnp.float32,
            )
            line = i * tile + jax.lax.broadcasted_iota(jnp.int32, product.shape, 0)
            mine = (line >= first) & (line < last)
            y[at, :] = jnp.where(mine, product * by_output, y[at, :])
            return carry

        jax.lax.fori_loop(first // tile, pl.cdiv(last, tile), multiply, 0)


def _widened(values, group_scale=None, offset=None, *, turned: list, dtype) -> jax.Array:
    """Stored values `[block, ...]` as they are multiplied."""
    if group_scale is None:
        return values.astype(dtype)
    halves = [values.astype(jnp.int32)]
    if values.dtype == jnp.uint8:
        halves = [(halves[0] & 15) - 8, (halves[0] >> 4) - 8]
    group_scale = _spread(group_scale, turned[1], values.shape[1])
    wide = [half.astype(jnp.float32) * group_scale for half in halves]
    if offset is not None:
        offset = _spread(offset, turned[2], values.shape[1])
        wide = [half + offset for half in wide]
    return jnp.concatenate([half.astype(dtype) for half in wide], axis=1)


def _spread(by_group: jax.Array, turned: bool, columns: int) -> jax.Array:
    """`[block, X]`, or turned, as float32 `[block, columns]`, each for its group: a product with
    ones and zeros, since registers aren't cut along their lanes.
    """
    axis = 0 if turned else 1
    shape = (by_group.shape[axis], columns)
    group = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    size = columns // shape[0]
    inside = (column >= group * size) & (column < (group + 1) * size)
    return jax.lax.dot_general(
        by_group,
        inside.astype(by_group.dtype),
        (((axis,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _sizes(parts: Streamed) -> tuple[int, int, int]:
    """Rows of a tile, rows that stay in vector memory, outputs of a block."""
    (rows, inputs), (experts, outputs, _) = parts.rows.shape, parts.values.shape
    tile = max(LEAST_TILE, min(MOST_TILE, 1 << (-(-rows // experts) - 1).bit_length()))
    widest = 4 if parts.group_scale is not None else parts.values.dtype.itemsize
    most = max(LANES, BLOCK_BYTES // (inputs * widest))
    sizes = range(min(most, outputs) // LANES * LANES, 0, -LANES)
    block = next((size for size in sizes if outputs % size == 0), outputs)
    most = ROWS_BYTES // max(2 * inputs, 4 * block) // tile * tile
    return tile, max(tile, min(most, -(-rows // tile) * tile)), block


def _turned(array: jax.Array) -> bool:
    """Whether XLA stores `[E, O, width]` with outputs along the registers: where the width would
    not fill them.
    """
    return array.shape[2] % LANES != 0


def _as_it_lies(array: jax.Array) -> jax.Array:
    return jnp.swapaxes(array, 1, 2) if _turned(array) else array


def _schedule(group_sizes: jax.Array, rows: int, chunk: int) -> tuple[int, tuple[jax.Array, ...]]:
    """V, the visits of a chunk of rows, and of each visit, int32 `[rows/chunk * V]`: the expert,
    its first row in the chunk, and the row after its last.

    Chunks with fewer visits repeat their last one, without rows: what is there isn't fetched again.
    """
    visits = min(group_sizes.shape[0], chunk)
    starts = jnp.arange(0, rows, chunk)[:, None]
    ends = jnp.cumsum(group_sizes)
    begin = jnp.clip(ends - group_sizes - starts, 0, chunk)
    end = jnp.clip(ends - starts, 0, chunk)
    order = jnp.argsort(begin == end, axis=1, stable=True)[:, :visits]  # those with rows first
    last = jnp.maximum(jnp.sum(begin < end, axis=1, keepdims=True) - 1, 0)
    place = jnp.arange(visits)
    expert = jnp.take_along_axis(order, jnp.minimum(place, last), axis=1)
    begin, end = (jnp.take_along_axis(lines, expert, axis=1) for lines in (begin, end))
    end = jnp.where(place <= last, end, begin)
    schedule = tuple(a.astype(jnp.int32).reshape(-1) for a in (expert, begin, end))
    return visits, schedule
