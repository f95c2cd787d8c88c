"""How a product that needs the decompressed weight avoids holding it: when, and how much at a time.

Used by leaf types whose storage no dot reads as it is. Read next: `qtensor.py`, `sparse.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

# Values of a decompressed block. As bfloat16 a TPU keeps them in its vector memory (128 MiB on v5e
# and v6e). On a CPU, where they are float32, more are fresh pages in every step: a table of
# [49152, 576] in int8 groups took 68 / 136 / 148 ms at 1 / 8 / 32 rows as a whole and 7.2 / 11 / 24
# in blocks of 1,536 outputs (2 cores with AVX2, jax 0.12.0.1, 2026-11-28).
BLOCK = 2**21


def in_order(x: jax.Array, leaf: Any) -> tuple[jax.Array, Any]:
    """Both as they are, but a program decompresses the leaf no sooner than it has x.

    Without it XLA may decompress all layers first and hold them: 30 layers of [3072, 576] took 203
    MiB of temporaries and twice the time, 9 MiB with it (2-core CPU, jax 0.12.0.1, 2026-11-24).
    """
    return jax.lax.optimization_barrier((x, leaf))


def by_outputs(x: jax.Array, arrays: Any, *, product: Callable) -> jax.Array:
    """`product(x, arrays)` `[M, O]` of activations `[M, I]` and a tree of arrays that begin with O,
    or are `[A, L, X]` with O = A * L, but the first: at most some outputs at a time, so that what
    is decompressed stays near: in a TPU's vector memory and not in its HBM, in a CPU's cache.
    """
    leaves, tree = jax.tree.flatten(arrays)
    outputs = leaves[0].shape[0]
    most = max(BLOCK // x.shape[1], 128)
    if outputs <= most:
        return product(x, arrays)
    lasts = {a.shape[1] for a in leaves if a.shape[0] != outputs}
    sizes = [
        size
        for size in range(most // 128 * 128, 0, -128)
        if outputs % size == 0 and all(size % last == 0 or last % size == 0 for last in lasts)
    ]
    size = next(iter(sizes), outputs)
    # A TPU would copy an array that is sliced like the others into another order of dims, whole.
    blocks = [a.reshape(-1, size, *a.shape[1:]) if a.shape[0] == outputs else None for a in leaves]

    def one_block(operands):
        start, parts = operands
        pairs = zip(leaves, parts, strict=True)
        lines = [_outputs(a, start, size) if part is None else part for a, part in pairs]
        return product(x, jax.tree.unflatten(tree, lines))

    starts = size * jnp.arange(outputs // size)
    y = jax.lax.map(one_block, (starts, blocks))  # [O/size, M, size]
    return jnp.swapaxes(y, 0, 1).reshape(x.shape[0], outputs)


def _outputs(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """The `size` outputs from `start` on of an array `[A, L, X]`: `[size, X]`.

    They keep the order of dims that a TPU gives the whole, which it would else copy once more; on a
    CPU that order would take 1.4 times as long.
    """
    last = array.shape[1]
    lines = jax.lax.dynamic_slice_in_dim(array, start // last, max(1, size // last))
    if size < last:
        lines = jax.lax.dynamic_slice_in_dim(lines, start % last, size, axis=1)
    order = Layout(major_to_minor=(0, 2, 1))
    lines = jax.lax.platform_dependent(
        lines,
        tpu=lambda lines: with_layout_constraint(lines, order),
        default=lambda lines: lines,
    )
    return lines.reshape(size, array.shape[2])
