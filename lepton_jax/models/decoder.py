"""The one decoder: every family is this module with another `ModelConfig`.

The alphabet, used in every einsum and shape comment of the repository: B rows, T query tokens, S
cached tokens, N query heads, K kv heads, G = N/K, J = G+2 (a kv head's packed q..q, k, v), H head
dim, D model dim, F ffn dim, V vocab, E experts, P pages, Z page size, L layers.

Flax NNX describes the parameters here and `build.py` takes them apart; at run time the methods are
plain functions of arrays. Layers are unrolled, or a loop over runs of them (`runs.py`). Attention
and its cache belong to the caller, who passes `attend`. Where devices share a model, each holds a
part of every K, F and V, and `axis` adds up what they have. Read next: `build.py`,
`lepton_jax/kernels/attention.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.config import ModelConfig
from lepton_jax.models.moe import experts_ffn
from lepton_jax.models.rope import rope_table, rotate
from lepton_jax.models.runs import Run, Tap
from lepton_jax.sharding.axis import WHOLE, Axis
from lepton_jax.tensors import einsum, einsum_parts, take

ACTIVATION_FUNCTIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def param(shape: tuple[int, ...], axes: tuple[str, ...], dtype: Any, inputs: int = 0) -> nnx.Param:
    """A parameter that carries the metadata of its ParamSpec."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes, inputs=inputs)


def norm_param(size: int, axis: str) -> nnx.Param:
    """Norm scales stay float32: they cost nothing, and Gemma's 1 + w would lose bits else."""
    return param((size,), (axis,), jnp.float32)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in float32; keeps x's dtype."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap); a cap of 0 leaves x as it is."""
    return cap * jnp.tanh(x / cap) if cap else x


class Layer(nnx.Module):
    """Attention and ffn of one layer; its parameters are the paths below `layers.{i}.`"""

    def __init__(self, config: ModelConfig, index: int, dtype: Any, axis: Axis = WHOLE):
        c = config
        self.config, self.index, self.axis = config, index, axis
        K, G, H, D = c.num_kv_heads, c.group, c.head_dim, c.hidden_size
        self.attn_norm = norm_param(D, "embed")
        self.qkv = param(
            (K, G + 2, H, D), ("kv_heads", "qkv", "head_dim", "embed"), dtype, inputs=1
        )
        self.out = param((D, K * G * H), ("embed", "heads"), dtype, inputs=1)  # kv heads outermost
        self.ffn_norm = norm_param(D, "embed")
        if c.qkv_bias:
            self.qkv_bias = param((K, G + 2, H), ("kv_heads", "qkv", "head_dim"), dtype)
        if c.out_bias:
            self.out_bias = param((D,), ("embed",), dtype)
        if c.qk_norm:
            self.q_norm = norm_param(H, "head_dim")
            self.k_norm = norm_param(H, "head_dim")
        if c.post_norms:
            self.attn_post_norm = norm_param(D, "embed")
            self.ffn_post_norm = norm_param(D, "embed")
        self._make_ffn(dtype)

    def _make_ffn(self, dtype: Any):
        c = self.config
        F, D, E = c.ffn_size, c.hidden_size, c.num_experts
        if E:
            axes = ("experts", "gate_up", "expert_ffn", "embed")
            self.router = param((E, D), ("routes", "embed"), dtype, inputs=1)
            self.experts_gate_up = param((E, 2, F, D), axes, dtype, inputs=1)
            axes = ("experts", "embed", "expert_ffn")
            self.experts_down = param((E, D, F), axes, dtype, inputs=1)
            return
        self.gate_up = param((2, F, D), ("gate_up", "ffn", "embed"), dtype, inputs=1)
        self.down = param((D, F), ("embed", "ffn"), dtype, inputs=1)
        if c.ffn_bias:
            self.gate_up_bias = param((2, F), ("gate_up", "ffn"), dtype)
            self.down_bias = param((D,), ("embed",), dtype)

    def __call__(
        self, x: jax.Array, table, *, cache: Any, attend: Callable, window: Any
    ) -> tuple[jax.Array, Any]:
        """x `[T, D]`; table: this layer's cos and sin, or None where it has no RoPE; window: how
        many tokens a query sees, 0: all.
        """
        eps, attend = self.config.norm_eps, functools.partial(attend, window=window)
        attention, cache = self.attention(
            self._norm(x, "attn_norm"), table, cache=cache, attend=attend
        )
        if self.config.post_norms:
            attention = rms_norm(attention, self.attn_post_norm.get_value(), eps)
        x = x + attention
        ffn = self.ffn(self._norm(x, "ffn_norm"))
        if self.config.post_norms:
            ffn = rms_norm(ffn, self.ffn_post_norm.get_value(), eps)
        return x + ffn, cache

    def attention(
        self, x: jax.Array, table, *, cache: Any, attend: Callable
    ) -> tuple[jax.Array, Any]:
        """Projections, q/k norms, RoPE, the caller's attention: `[T, D]` and the new cache."""
        c, G = self.config, self.config.group
        qkv = einsum("TD,KJHD->TKJH", x, self.qkv.get_value())
        if c.qkv_bias:
            qkv = qkv + self.qkv_bias.get_value().astype(qkv.dtype)
        q, k, v = qkv[:, :, :G], qkv[:, :, G], qkv[:, :, G + 1]
        if c.qk_norm:
            q, k = self._norm(q, "q_norm"), self._norm(k, "k_norm")
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        out, cache = attend(q, k, v, cache, scale=c.attn_scale, soft_cap=c.attn_soft_cap)
        heads = out.astype(x.dtype).reshape(x.shape[0], -1)
        y = self.axis.sum(einsum("TI,DI->TD", heads, self.out.get_value()))
        return (y + self.out_bias.get_value().astype(y.dtype) if c.out_bias else y), cache

    def ffn(self, x: jax.Array) -> jax.Array:
        """The gated ffn, dense or of experts: `[T, D]` to `[T, D]`."""
        c, activation = self.config, ACTIVATION_FUNCTIONS[self.config.activation]
        if c.num_experts:
            leaves = (self.router, self.experts_gate_up, self.experts_down)
            leaves = tuple(leaf.get_value() for leaf in leaves)
            experts = self.axis.experts
            y = experts_ffn(x, *leaves, config=c, activation=activation, axis=experts)
            return self.axis.sum(y)
        gate, up = einsum_parts("TD,CFD->CTF", x, self.gate_up.get_value())
        if c.ffn_bias:
            gate_bias, up_bias = self.gate_up_bias.get_value().astype(x.dtype)
            gate, up = gate + gate_bias, up + up_bias
        y = self.axis.sum(einsum("TF,DF->TD", activation(gate) * up, self.down.get_value()))
        return y + self.down_bias.get_value().astype(y.dtype) if c.ffn_bias else y

    def _norm(self, x: jax.Array, name: str) -> jax.Array:
        return rms_norm(x, getattr(self, name).get_value(), self.config.norm_eps)


class Decoder(nnx.Module):
    """Tokens to hidden states to logits."""

    runs: tuple[Run, ...]  # its layers, as `Model.bind` groups them

    def __init__(self, config: ModelConfig, dtype: Any, activation_dtype: Any, axis: Axis = WHOLE):
        self.config, self.activation_dtype, self.axis = config, activation_dtype, axis
        V, D = config.vocab_size, config.hidden_size
        self.embed = param((V, D), ("vocab", "embed"), dtype, inputs=1)
        self.layers = nnx.List([Layer(config, i, dtype, axis) for i in range(config.num_layers)])
        self.final_norm = norm_param(D, "embed")
        if config.head_path == "head":
            self.head = param((V, D), ("vocab", "embed"), dtype, inputs=1)
        if config.rope_factor_sets:
            shape = (config.rope_factor_sets, config.ropes[0].dim // 2)
            self.rope_factors = param(shape, ("rope_sets", "rope_pairs"), jnp.float32)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        caches: tuple,
        attend: Callable,
        *,
        tap: Tap | None = None,
    ) -> tuple[jax.Array, ...]:
        """Runs every layer over a flat batch of tokens.

        Args:
          tokens: i32 `[T]`.
          positions: i32 `[T]`, place of each token in its own text; -1 for padding.
          caches: one opaque cache per run of layers, which is one layer where they are unrolled.
          attend: `attend(q [T,K,G,H], k [T,K,H], v [T,K,H], cache, *, scale, window, soft_cap)`
            returns (out `[T,K,G,H]`, the new cache); window and soft_cap are 0 where there is none.
            Layers of a run also pass `layer`, a `LayerOf`, and may pass a window as an array.
          tap: `tap(kept, layers so far, hidden states)` returns what it keeps, all `[T, D]`, zeros
            at first. It sees the states between layers, the embeddings first, but not those after
            the last layer.

        Returns:
          Hidden states `[T, D]` after the final norm, the new caches, and what a tap kept.
        """
        c = self.config
        if len(caches) != len(self.runs):
            raise ValueError(
                f"{len(caches)} caches for {len(self.runs)} layers: pass one per layer"
            )
        table, dtype = self.embed.get_value(), self.activation_dtype
        x = self.axis.lookup(lambda ids: take(table, ids, dtype), tokens, table.shape[0])
        if c.embed_scale != 1.0:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        factors = self.rope_factors.get_value() if c.rope_factor_sets else None
        tables = [
            rope_table(rope, positions, context_len=c.context_len, factors=factors)
            for rope in c.ropes
        ]
        new_caches, kept = [], None if tap is None else jnp.zeros_like(x)
        for run, cache in zip(self.runs, caches, strict=True):
            x, cache, kept = run((x, cache, kept), tables, attend, tap=tap)
            new_caches.append(cache)
        hidden = rms_norm(x, self.final_norm.get_value(), c.norm_eps)
        return (hidden, tuple(new_caches)) if tap is None else (hidden, tuple(new_caches), kept)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits f32 `[R, V]` of hidden states `[R, D]`, which are already normed; this device's
        share of V, -inf where it is padding.
        """
        table = getattr(self, self.config.head_path)
        scores = einsum("RD,VD->RV", hidden.astype(jnp.float32), table.get_value())
        scores = soft_cap(scores, self.config.final_soft_cap)
        return self.axis.within(scores, self.config.vocab_size)
