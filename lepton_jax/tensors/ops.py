"""The operations that a model applies to its weights; each accepts any leaf type.

`einsum` contracts the trailing input axis, `ragged_einsum` does so per group of rows (mixture of
experts) and `take` looks rows up (embedding). They only reshape and check; the products themselves
are in `matmul.py` and the leaf types.
"""

import math

import jax
import jax.numpy as jnp

from lepton_jax.tensors.leaves import CompressedTensor, flat_of
from lepton_jax.tensors.matmul import matmul
from lepton_jax.tensors.ragged_dots import ragged_dot


def einsum(subscripts: str, x: jax.Array, w) -> jax.Array:
    """`x` times a weight `[*out, in]`, e.g. `einsum("TD,KJHD->TKJH", x, qkv)`.

    The contracted letter is the last of both; the result has the leading letters of x, then those
    of the weight. Result dtype: that of x. Raises ValueError on other patterns.
    """
    lead, outs = _parse(subscripts)
    if x.ndim != len(lead) + 1 or len(w.shape) != len(outs) + 1:
        raise ValueError(f"einsum {subscripts!r} does not fit shapes {x.shape} and {w.shape}")
    y = matmul(x.reshape(-1, x.shape[-1]), flat_of(w))
    return y.reshape(*x.shape[:-1], *w.shape[:-1])


def einsum_parts(subscripts: str, x: jax.Array, w) -> tuple[jax.Array, ...]:
    """One product cut along the weight's first axis: `einsum_parts("TD,CFD->CTF", x, w)` gives C
    results `[T, F]`.

    The parts are slices of the flat product: as an axis of its own, C would cost a TPU a copy to
    another tiling.
    """
    operands, _, result = subscripts.partition("->")
    x_axes, _, w_axes = operands.partition(",")
    lead, outs = _parse(f"{x_axes},{w_axes[1:]}->{result[1:]}")
    fits = x.ndim == len(lead) + 1 and len(w.shape) == len(outs) + 2
    if result[:1] != w_axes[:1] or not fits:
        raise ValueError(
            f"einsum_parts {subscripts!r} does not fit shapes {x.shape} and {w.shape}, or weight "
            "and result do not begin with the same letter"
        )
    parts, *out_shape, width = w.shape
    flat = matmul(x.reshape(-1, width), flat_of(w))
    columns = math.prod(out_shape)
    return tuple(
        flat[:, part * columns : (part + 1) * columns].reshape(*x.shape[:-1], *out_shape)
        for part in range(parts)
    )


def ragged_einsum(subscripts: str, x: jax.Array, w, group_sizes: jax.Array) -> jax.Array:
    """Each group of consecutive rows of x times its own weight, e.g. `ragged_einsum("TD,EFD->TF",
    x, w, sizes)`.

    Args:
      subscripts: as in `einsum`; the weight's first letter is the group and is not in the result.
      x: `[T, in]`, rows sorted by group.
      w: `[E, *out, in]`.
      group_sizes: int32 `[E]`, summing to T at most; what rows beyond give is undefined.
    """
    lead, outs = _parse(subscripts, grouped=True)
    if len(lead) != 1 or x.ndim != 2 or len(w.shape) != len(outs) + 2:
        raise ValueError(
            f"ragged_einsum {subscripts!r} does not fit shapes {x.shape} and {w.shape}, or x has "
            "not one row letter"
        )
    if isinstance(w, CompressedTensor):
        y = w.flat(keep=1).ragged_matmul(x, group_sizes)
    else:
        y = ragged_dot(x, w.reshape(w.shape[0], -1, w.shape[-1]), group_sizes)
    return y.astype(x.dtype).reshape(x.shape[0], *w.shape[1:-1])


def take(table, ids: jax.Array, dtype) -> jax.Array:
    """Rows `ids [...]` of a table `[V, D]` as `[..., D]` of the given float dtype."""
    if isinstance(table, CompressedTensor):
        return table.rows(ids).astype(dtype)
    return jnp.take(table, ids, axis=0, mode="clip").astype(dtype)


def _parse(subscripts: str, *, grouped: bool = False) -> tuple[str, str]:
    """Letters of (rows of x, weight outputs)."""
    operands, _, result = subscripts.partition("->")
    x, _, w = operands.partition(",")
    if grouped:
        w = w[1:]
    if not x or x[-1:] != w[-1:] or result != x[:-1] + w[:-1]:
        raise ValueError(
            f"einsum {subscripts!r}: want 'rows+in,out+in->rows+out' with the contracted letter "
            "last in both"
        )
    return x[:-1], w[:-1]
