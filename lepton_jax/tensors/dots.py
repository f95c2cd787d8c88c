"""Matrix products of plain arrays, `[M, I] x [O, I] -> [M, O]`, from which leaf types build theirs.

Figures (2-core AVX-512 CPU, jax 0.12.0.1, `[M, 2048] x [8192, 2048]`, 2026-11-24): a one-row int8
or bf16 dot takes 14.7 ms where two rows take 0.3 ms, so a single row is padded. Upcasting int8
weights in the program takes ~19 ms at any M; two int8 planes of the activations take 0.64 / 0.61 /
1.48 ms at M = 1 / 8 / 32, int8 activations 0.38 / 0.44 / 0.93.

A CPU without instructions for int8 products makes a float32 one as fast (2-core AVX2 CPU, the same
jax, `[M, 576] x [3072, 576]`, 2026-11-29): int8 activations 1.9 / 5.0 ms at M = 64 / 256, two
planes 3.0 / 11.2, upcasting by blocks 2.0 / 6.4, float32 weights 3.2 / 5.9.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.tensors.decompress import by_outputs, in_order

MANY_ROWS = 64  # from which on upcasting or copying the weights is a small part of their product
_CONTRACT_LAST = (((1,), (1,)), ((), ()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """One of several arrays of one shape and dtype, by `index` i32 `[]`: see `chosen.py`."""

    arrays: tuple
    index: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.arrays[0].shape

    @property
    def dtype(self) -> Any:
        return self.arrays[0].dtype

    def reshape(self, *shape: int) -> "Chosen":
        return Chosen(tuple(array.reshape(*shape) for array in self.arrays), self.index)

    def astype(self, dtype: Any) -> jax.Array:
        return self.copy().astype(dtype)

    def copy(self) -> jax.Array:
        """The array itself."""
        return branch(self.index, lambda _, array: array, (), self.arrays)


def branch(index: jax.Array | int, function: Callable, x: Any, weights: Sequence[Any]) -> Any:
    """`function(x, weights[index])`, each weight in a branch of its own."""
    if isinstance(index, int):
        return function(x, weights[index])
    return jax.lax.switch(index, [lambda x, w=w: function(x, w) for w in weights], x)


def float_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """In the weights' dtype, exact where that is float32; the result is float32."""
    precision = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    return dot(x.astype(w.dtype), w, jnp.float32, precision=precision)


def int8_dot(x: jax.Array, values: jax.Array) -> jax.Array:
    """Activations as int8 with a scale per row (W8A8) times int8 weights without their scale."""
    planes, scale = quantize_rows(x)
    return dot(planes, values, jnp.int32).astype(jnp.float32) * scale


def precise_int8_dot(x: jax.Array, values: jax.Array) -> jax.Array:
    """Activations of float precision times int8 weights without their scale."""
    on_cpu = _two_plane_dot if in_two_planes(x.shape[0]) else _float_blocks_dot
    return jax.lax.platform_dependent(x, values, cpu=on_cpu, default=upcast_dot)


def in_two_planes(rows: int) -> bool:
    """Whether this CPU multiplies so many rows with int8 weights in int8, and not in float32."""
    return rows < MANY_ROWS or multiplies_int8()


@functools.cache
def multiplies_int8() -> bool:
    """Whether this CPU has instructions for int8 products (VNNI, AMX, Arm's dot); where no one
    tells, it has.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return True
    instructions = r"\b(avx512_vnni|avx_vnni|amx_int8|asimddp)\b"
    return re.search(instructions, cpuinfo.read_text()) is not None


def static_int8_dot(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """As `int8_dot`, with one calibrated scale `[]` for all activations; larger ones saturate."""
    return dot(int8_steps(x, scale), values, jnp.int32).astype(jnp.float32) * scale


def int8_steps(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x / scale` as int8; what is larger saturates."""
    return jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -127, 127).astype(jnp.int8)


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x [M, I]` as int8 and float32 scales `[M, 1]`: symmetric, absolute maximum per row."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / 127.0
    return jnp.round(x / scale).astype(jnp.int8), scale


def float8_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x [M, I]` as float8_e4m3fn and float32 scales `[M, 1]`: absolute maximum per row."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / 448.0
    return (x / scale).astype(jnp.float8_e4m3fn), scale


def float8_dot(x: jax.Array, values: jax.Array) -> jax.Array:
    """Both float8; a CPU has no such product, and bfloat16 holds every float8 exactly."""
    return jax.lax.platform_dependent(
        x, values, cpu=upcast_dot, default=lambda x, w: dot(x, w, jnp.float32)
    )


def upcast_dot(x: jax.Array, values: jax.Array) -> jax.Array:
    """Where the compiler fuses the conversion into the dot (TPU, GPU), int8 weights are read as
    they are.
    """
    dtype = jnp.bfloat16 if x.dtype in (jnp.float32, jnp.float8_e4m3fn) else x.dtype
    return dot(x.astype(dtype), values.astype(dtype), jnp.float32)


def dot(x: jax.Array, w: jax.Array | Chosen, accumulate, *, precision=None) -> jax.Array:
    """The product that the others end in; results in dtype `accumulate`."""
    if isinstance(w, Chosen):
        one = functools.partial(dot, accumulate=accumulate, precision=precision)
        return branch(w.index, one, x, w.arrays)
    rows = x.shape[0]
    if rows == 1 and x.dtype != jnp.float32:  # the one-row cliff of CPU dots; free elsewhere
        x = jnp.pad(x, ((0, 1), (0, 0)))
    y = jax.lax.dot_general(
        x, w, _CONTRACT_LAST, precision=precision, preferred_element_type=accumulate
    )
    return y[:rows]


def _float_blocks_dot(x, values):
    if isinstance(values, Chosen):
        values = values.copy()
    x, values = in_order(x, values)
    return by_outputs(x, values, product=lambda x, w: float_dot(x, w.astype(jnp.float32)))


def _two_plane_dot(x, values):
    """Float-precision activations through int8 dots: `x = scale * (127 * high + low)`, about 15
    bits a row.
    """
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / (127.0 * 127.0)
    steps = jnp.round(x / scale)
    high = jnp.round(steps / 127.0)
    low = steps - 127.0 * high
    y = dot(jnp.concatenate([high, low]).astype(jnp.int8), values, jnp.int32).astype(jnp.float32)
    rows = x.shape[0]
    return (127.0 * y[:rows] + y[rows:]) * scale
