"""`tile_dots.tiled_dot` on TPU, in Pallas: x stays in vector memory and kept tiles stream past it.

One grid step is one row of tiles. The indices of its tiles come ahead as scalars; the step copies
these tiles of x side by side and multiplies once, so the matrix unit sees k*C inputs. The same in a
few lines of jnp: `tile_dots.gathered_dot`.
"""

import functools

import jax
import jax.numpy as jnp

from lepton_jax.tensors import vector_memory

MOST_ROWS = 256  # of x in vector memory at a time
MOST_TILES = 128  # of a row of tiles: copying them is unrolled
MOST_INDICES = 2**16  # scalars: 256 KiB


def fits(values: jax.Array, tiles: jax.Array) -> bool:
    """Whether the kernel takes a weight of `values [O, k*C]` and `tiles [O/R, k]`."""
    tile_rows, count = tiles.shape
    whole_registers = (values.shape[0] // tile_rows) % 32 == 0
    return whole_registers and count <= MOST_TILES and tiles.size <= MOST_INDICES


@functools.partial(jax.jit, static_argnames="interpret")
def kernel_dot(
    x: jax.Array, values: jax.Array, tiles: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`x [M, I]` times the transpose of `values [O, k*C]` in their `tiles [O/R, k]`: `[M, O]`.

    It has no gradient of its own. `interpret` runs it on any platform, slowly.
    """
    from jax.experimental import pallas as pl  # takes a second
    from jax.experimental.pallas import tpu as pltpu

    (rows, inputs), (outputs, kept), (tile_rows, count) = x.shape, values.shape, tiles.shape
    size, height = kept // count, outputs // tile_rows
    dtype = jnp.bfloat16 if values.dtype == jnp.int8 else values.dtype
    block = min(-(-rows // 16) * 16, MOST_ROWS)
    padded = -(-rows // block) * block
    x = jnp.pad(x.astype(dtype), ((0, padded - rows), (0, 0)))
    x = jnp.swapaxes(x.reshape(padded, inputs // size, size), 0, 1)

    def tile_row(tiles, x, values, y, picked):
        """References: int32 `[O/R * k]`, `[I/C, M, C]`, `[1, R, k*C]`, `[1, M, R]`, `[M, k*C]`."""
        first = pl.program_id(1) * count
        for place in range(count):
            picked[:, place * size : (place + 1) * size] = x[tiles[first + place]]
        y[0] = jax.lax.dot_general(
            picked[...],
            values[0].astype(dtype),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    y = pl.pallas_call(
        tile_row,
        out_shape=jax.ShapeDtypeStruct((tile_rows, padded, height), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(padded // block, tile_rows),
            in_specs=[
                pl.BlockSpec((inputs // size, block, size), lambda i, q, _: (0, i, 0)),
                pl.BlockSpec((1, height, kept), lambda i, q, _: (q, 0, 0)),
            ],
            out_specs=pl.BlockSpec((1, block, height), lambda i, q, _: (q, i, 0)),
            scratch_shapes=[pltpu.VMEM((block, kept), dtype)],
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vector_memory.claim()),
        interpret=interpret,
        name="tiled_dot",
    )(tiles.reshape(-1), x, values.reshape(tile_rows, height, kept))
    return jnp.swapaxes(y, 0, 1).reshape(padded, outputs)[:rows]
