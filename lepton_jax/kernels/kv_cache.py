"""What a key-value cache holds: plain arrays, or `QuantizedKV`, 8-bit values with a scale for each
token and kv head.

A backend's `cache_layer` gives one layer's cache as a tree of ParamSpecs, from which the engine
plans memory, shards and allocates. `encode` turns keys and values into what a cache stores and
`decode` back; between them `attention_xla.py` moves lines about leaf by leaf (`jax.tree.map`), so
one code serves both kinds. On TPU a quantized cache lies in another way: `attention_tpu_int8.py`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.tensors import ParamSpec

# dtype name -> largest magnitude that its values use
QUANTIZED = {"int8": 127.0, "float8_e4m3fn": 448.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKV:
    """Keys or values `[..., H]` as values * scale.

    Attributes:
      values: int8 or float8_e4m3fn `[..., H]`.
      scale: bfloat16 `[...]`; one for each head of a token's key, and of its value. On TPU float32,
        in a shape of its own.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """Of what it stands for, and of the products with it."""
        return jnp.dtype(jnp.bfloat16)


KV = jax.Array | QuantizedKV  # what a cache, or some lines of one, is


def planned(shape: tuple[int, ...], axes: tuple[str, ...], dtype: Any) -> ParamSpec | QuantizedKV:
    """A cache `[..., H]` of ParamSpecs, quantized where its dtype is one of QUANTIZED."""
    values = ParamSpec(shape, jnp.dtype(dtype), axes)
    if values.dtype.name not in QUANTIZED:
        return values
    return QuantizedKV(values, ParamSpec(shape[:-1], jnp.dtype(jnp.bfloat16), axes[:-1]))


def encode(x: jax.Array, like: KV) -> KV:
    """Keys or values `[..., H]` as a cache of the kind of `like` stores them."""
    if not isinstance(like, QuantizedKV):
        return x.astype(like.dtype)
    most = QUANTIZED[like.values.dtype.name]
    wide = x.astype(jnp.float32)
    scale = (jnp.abs(wide).max(-1) / most).astype(jnp.bfloat16)
    steps = wide / jnp.maximum(scale.astype(jnp.float32), jnp.finfo(jnp.float32).tiny)[..., None]
    steps = jnp.clip(steps, -most, most)  # a scale rounded down leaves the largest just outside
    if like.values.dtype == jnp.int8:
        steps = jnp.round(steps)
    return QuantizedKV(steps.astype(like.values.dtype), scale)


def decode(kv: KV) -> jax.Array:
    """What a cache's lines stand for: `[..., H]` in `kv.dtype`."""
    if not isinstance(kv, QuantizedKV):
        return kv
    wide = kv.values.astype(jnp.float32) * kv.scale.astype(jnp.float32)[..., None]
    return wide.astype(kv.dtype)
