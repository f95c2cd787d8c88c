"""Pruning of one weight: which values are kept, and the leaf that holds them.

    mask = magnitude_mask(array, scheme)     # or mask_by_score of other scores (Wanda)
    leaf = store(array, mask, scheme)        # quantized and stored as the scheme says

A scheme's pattern says what is compared: all weights with each other, those of an output, the M
of a group, or the tiles of a row of tiles. Methods that choose and quantize together (SparseGPT)
end in `store_on_grid`. The leaf types are `lepton_jax/tensors/sparse.py`.
"""

import functools

import jax
import jax.numpy as jnp

from lepton_jax.compression.quantize import Grid, fit_grid, in_groups, make_leaf, round_to_grid
from lepton_jax.compression.scheme import Scheme
from lepton_jax.tensors import BitmaskTensor, BlockSparseTensor, NMTensor
from lepton_jax.tensors.leaves import CompressedTensor


def magnitude_mask(array: jax.Array, scheme: Scheme) -> jax.Array:
    """bool `[*out, I]`: the largest magnitudes, or the tiles of the largest norm, are kept.

    Source: Han et al. (arXiv 1506.02626); for tiles Narang et al. (arXiv 1711.02782).
    """
    return mask_by_score(jnp.abs(array.astype(jnp.float32)), scheme)


@functools.partial(jax.jit, static_argnames=("scheme", "per_output"))
def mask_by_score(scores: jax.Array, scheme: Scheme, *, per_output: bool = False) -> jax.Array:
    """bool as `scores [*out, I]`: true where a weight is kept.

    Args:
      scores: 0 or more; the largest are kept, and of equal ones the first. A tile's score is the
        norm of its weights' scores.
      scheme: its sparsity and pattern decide how many, exactly.
      per_output: an unstructured pattern compares the weights of one output instead of all (Wanda).

    Raises ValueError where the pattern doesn't fit the shape or would keep nothing.
    """
    scheme.require_pattern(scores.shape)
    if scheme.tile:
        return _tile_mask(scores, scheme)
    if scheme.n_of_m:
        n, m = scheme.n_of_m
        return _largest_of_few(scores.reshape(-1, m), n).reshape(scores.shape)
    compared = scores.reshape(-1, scores.shape[-1] if per_output else scores.size)
    return _largest(compared, scheme.kept_of(compared.shape[1])).reshape(scores.shape)


def store(array: jax.Array, mask: jax.Array, scheme: Scheme) -> CompressedTensor | jax.Array:
    """A weight with `mask` applied, both `[*out, I]`, as the scheme stores it.

    Int8 scales are those of the kept values. Not for use in jit: a bitmask's size depends on the
    mask.
    """
    if scheme.weights == "keep":
        return (
            _sparse(array, mask, None, scheme)
            if scheme.storage == "sparse"
            else _masked(array, mask)
        )
    return store_on_grid(*_rounded(array, mask, scheme), mask, scheme)


def store_on_grid(
    values: jax.Array, grid: Grid, mask: jax.Array, scheme: Scheme
) -> CompressedTensor:
    """As `store`, of values `[*out, X, I/X]` that are already on a grid and 0 where not kept."""
    if scheme.storage == "dense":
        return make_leaf(values, grid, scheme)
    values = values.reshape(mask.shape).astype(jnp.int8)
    return _sparse(values, mask, grid.scale[..., 0], scheme)


def _sparse(values, mask, scale, scheme: Scheme) -> CompressedTensor:
    if scheme.n_of_m:
        n, m = scheme.n_of_m
        return _of_groups(values, mask, scale, n=n, m=m)
    if scheme.tile:
        height, width = scheme.tile
        tiles = mask.reshape(-1, height, mask.shape[-1] // width, width)[:, 0, :, 0]
        return _of_tiles(values, tiles, scale, kept=scheme.kept_of(tiles.shape[1]))
    return _of_mask(values, mask, scale, kept=int(jnp.sum(mask)))


_of_mask = jax.jit(BitmaskTensor.of, static_argnames="kept")
_of_groups = jax.jit(NMTensor.of, static_argnames=("n", "m"))
_of_tiles = jax.jit(BlockSparseTensor.of, static_argnames="kept")


@jax.jit
def _masked(array, mask):
    return jnp.where(mask, array, jnp.zeros((), array.dtype))


@functools.partial(jax.jit, static_argnums=2)
def _rounded(array, mask, scheme: Scheme):
    parts = in_groups(jnp.where(mask, array, 0), scheme)
    grid = fit_grid(parts, scheme)
    return round_to_grid(parts, grid, scheme), grid


def _tile_mask(scores, scheme: Scheme):
    height, width = scheme.tile
    tiles = scores.reshape(-1, height, scores.shape[-1] // width, width)
    norms = jnp.sum(jnp.square(tiles.astype(jnp.float32)), axis=(1, 3))
    kept = _largest(norms, scheme.kept_of(norms.shape[1]))
    return jnp.broadcast_to(kept[:, None, :, None], tiles.shape).reshape(scores.shape)


def _largest(scores, count: int):
    """bool `[X, Y]`: the `count` largest of each row.

    Floats of 0 or more order like their bits, so the threshold is found bit by bit: 2.2 s for all
    of [49152, 576], where a sort takes 20 s (2-core CPU, jax 0.12.0.1, 2026-11-24).
    """
    keys = jax.lax.bitcast_convert_type(jnp.abs(scores.astype(jnp.float32)), jnp.int32)

    def settle(step, threshold):
        higher = threshold | (1 << (30 - step))
        enough = jnp.sum(keys >= higher, axis=1, keepdims=True, dtype=jnp.int32) >= count
        return jnp.where(enough, higher, threshold)

    threshold = jax.lax.fori_loop(0, 31, settle, jnp.zeros((keys.shape[0], 1), jnp.int32))
    above, equal = keys > threshold, keys == threshold
    left = count - jnp.sum(above, axis=1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, axis=1, dtype=jnp.int32) <= left))


def _largest_of_few(scores, count: int):
    """`_largest` for short rows `[X, M]`: each weight counts those that come before it."""
    columns = [scores[:, i] for i in range(scores.shape[1])]
    masks = []
    for i, mine in enumerate(columns):
        before = [(c >= mine) if j < i else (c > mine) for j, c in enumerate(columns) if j != i]
        masks.append(sum(b.astype(jnp.int8) for b in before) < count)
    return jnp.stack(masks, axis=1)
