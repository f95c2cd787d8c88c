"""Quantization as transforms of one leaf: of an array (jitted, on its device) and of its spec.

int8, symmetric, one scale per output channel, the channel's largest magnitude at 127 (round to
nearest). Values and scales keep the logical axes of the weight, so shardings and memory plans of a
quantized model are derived.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lepton_jax.tensors import ParamSpec, QTensor


@dataclasses.dataclass(frozen=True)
class Int8:
    """int8 weights, multiplied with float activations (`act_bits` 16) or int8 ones (8, W8A8)."""

    act_bits: int = 16

    def __post_init__(self):
        if self.act_bits not in (8, 16):
            raise ValueError(
                f"Int8 act_bits={self.act_bits}: allowed are 8 (W8A8) and 16 (weight-only)"
            )


def quantize(array: jax.Array, inputs: int, scheme: Int8) -> QTensor:
    """A weight `[*out, *in]` with `inputs` contracted dimensions as a QTensor on its device."""
    values, scale = _to_int8(array, inputs)
    return QTensor(values, scale, scheme.act_bits)


def quantize_spec(spec: ParamSpec, scheme: Int8) -> QTensor:
    """What `quantize` makes of such a parameter: a QTensor of ParamSpecs."""
    outs = len(spec.shape) - spec.inputs
    return QTensor(
        ParamSpec(spec.shape, jnp.int8, spec.axes, spec.inputs),
        ParamSpec(spec.shape[:outs], jnp.float32, spec.axes[:outs]),
        scheme.act_bits,
    )


@functools.partial(jax.jit, static_argnums=1)
def _to_int8(array, inputs):
    axes = tuple(range(array.ndim - inputs, array.ndim))
    wide = array.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=axes, keepdims=True), 1e-30) / 127.0
    values = jnp.round(wide / scale).astype(jnp.int8)
    return values, jnp.squeeze(scale, axes)
