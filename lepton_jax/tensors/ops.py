"""The operations that a model applies to its weights; each accepts any leaf type.

`einsum` contracts trailing input axes, `ragged_einsum` does so per group of rows (mixture of
experts) and `take` looks rows up (embedding). They only reshape and check; the products themselves
are in `matmul.py`.
"""

import math

import jax
import jax.numpy as jnp

from lepton_jax.tensors.leaves import QTensor
from lepton_jax.tensors.matmul import matmul, quantize_rows


def einsum(subscripts: str, x: jax.Array, w) -> jax.Array:
    """`x` times a weight `[*out, *in]`, e.g. `einsum("TD,KJHD->TKJH", x, qkv)`.

    The weight's contracted letters are its last ones and the last ones of x, in the same order; the
    result has the leading letters of x, then those of the weight. Result dtype: that of x. Raises
    ValueError on other patterns.
    """
    lead, outs, ins = _parse(subscripts)
    if x.ndim != len(lead) + len(ins) or len(w.shape) != len(outs) + len(ins):
        raise ValueError(f"einsum {subscripts!r} does not fit shapes {x.shape} and {w.shape}")
    width = math.prod(w.shape[len(outs) :])
    y = matmul(x.reshape(-1, width), _flat(w, width))
    return y.reshape(*x.shape[: len(lead)], *w.shape[: len(outs)])


def einsum_parts(subscripts: str, x: jax.Array, w) -> tuple[jax.Array, ...]:
    """One product cut along the weight's first axis: `einsum_parts("TD,CFD->CTF", x, w)` gives C
    results `[T, F]`.

    The parts are slices of the flat product: as an axis of its own, C would cost a TPU a copy to
    another tiling.
    """
    operands, _, result = subscripts.partition("->")
    x_axes, _, w_axes = operands.partition(",")
    lead, outs, ins = _parse(f"{x_axes},{w_axes[1:]}->{result[1:]}")
    if result[:1] != w_axes[:1] or x.ndim != len(lead) + len(ins):
        raise ValueError(
            f"einsum_parts {subscripts!r} does not fit shapes {x.shape} and {w.shape}, or weight "
            "and result do not begin with the same letter"
        )
    parts, out_shape = w.shape[0], w.shape[1 : 1 + len(outs)]
    width = math.prod(w.shape[1 + len(outs) :])
    flat = matmul(x.reshape(-1, width), _flat(w, width))
    columns = math.prod(out_shape)
    return tuple(
        flat[:, part * columns : (part + 1) * columns].reshape(*x.shape[: len(lead)], *out_shape)
        for part in range(parts)
    )


def ragged_einsum(subscripts: str, x: jax.Array, w, group_sizes: jax.Array) -> jax.Array:
    """Each group of consecutive rows of x times its own weight, e.g. `ragged_einsum("TD,EFD->TF",
    x, w, sizes)`.

    Args:
      subscripts: as in `einsum`; the weight's first letter is the group and is not in the result.
      x: `[T, *in]`, rows sorted by group.
      w: `[E, *out, *in]`.
      group_sizes: int32 `[E]`, summing to T.
    """
    lead, outs, _ = _parse(subscripts, grouped=True)
    if len(lead) != 1:
        raise ValueError(f"ragged_einsum {subscripts!r}: x has one row letter, found {lead!r}")
    groups, width = w.shape[0], math.prod(w.shape[1 + len(outs) :])
    rows = x.reshape(x.shape[0], width)
    out_shape = w.shape[1 : 1 + len(outs)]
    if isinstance(w, QTensor):
        y = _ragged_int8(rows, w, group_sizes, width)
    else:
        y = _ragged_dot(rows.astype(w.dtype), w.reshape(groups, -1, width), group_sizes)
    return y.astype(x.dtype).reshape(x.shape[0], *out_shape)


def take(table, ids: jax.Array, dtype) -> jax.Array:
    """Rows `ids [...]` of a table `[V, D]` as `[..., D]` of the given float dtype."""
    if isinstance(table, QTensor):
        rows = jnp.take(table.values, ids, axis=0, mode="clip").astype(jnp.float32)
        return (rows * jnp.take(table.scale, ids, axis=0, mode="clip")[..., None]).astype(dtype)
    return jnp.take(table, ids, axis=0, mode="clip").astype(dtype)


def _parse(subscripts: str, *, grouped: bool = False) -> tuple[str, str, str]:
    """Letters of (rows of x, weight outputs, contracted inputs)."""
    operands, _, result = subscripts.partition("->")
    x, _, w = operands.partition(",")
    if grouped:
        w = w[1:]
    n_in = next((n for n in range(min(len(x), len(w)), 0, -1) if x[-n:] == w[-n:]), 0)
    lead, outs, ins = x[: len(x) - n_in], w[: len(w) - n_in], x[len(x) - n_in :]
    if not ins or result != lead + outs:
        raise ValueError(
            f"einsum {subscripts!r}: want 'rows+in,out+in->rows+out' with the contracted letters "
            "last in both"
        )
    return lead, outs, ins


def _flat(w, width: int):
    """The weight as `[O, I]`, whatever the leaf."""
    if isinstance(w, QTensor):
        return QTensor(w.values.reshape(-1, width), w.scale.reshape(-1), w.act_bits)
    return w.reshape(-1, width)


def _ragged_dot(rows, w, group_sizes):
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return jax.lax.ragged_dot_general(
        rows, w, group_sizes, numbers, preferred_element_type=jnp.float32
    )


def _ragged_int8(rows, w: QTensor, group_sizes, width: int):
    values = w.values.reshape(w.shape[0], -1, width)
    scale = w.scale.reshape(w.shape[0], -1)
    of_row = jnp.repeat(scale, group_sizes, axis=0, total_repeat_length=rows.shape[0])
    if w.act_bits == 8:
        planes, row_scale = quantize_rows(rows)
        # int8 steps are exact in bf16, and products of them accumulate in float32
        y = _ragged_dot(planes.astype(jnp.bfloat16), values.astype(jnp.bfloat16), group_sizes)
        return y * row_scale * of_row
    dtype = jnp.float32 if rows.dtype == jnp.float32 else jnp.bfloat16
    return _ragged_dot(rows.astype(dtype), values.astype(dtype), group_sizes) * of_row
