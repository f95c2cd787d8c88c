"""Rotary position embeddings: every scaling kind, as cos and sin of given positions.

Pairs are (i, i + dim/2): halves rotate, as in Hugging Face checkpoints; loaders undo other orders.
All of it is float32. A token's rotation depends on its own position only, never on its neighbours
in the batch, so cached keys stay valid however a text is chunked, shared or resumed.
Sources: RoFormer (arXiv 2104.09864), YaRN (2309.00071), LongRoPE (2402.13753), Llama 3.1's release
for "llama3". Read next: `decoder.py`, which computes the tables once per call.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.models.config import RopeConfig


def rope_table(
    rope: RopeConfig,
    positions: jax.Array,
    *,
    context_len: int = 0,
    factors: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each float32 `[T, dim/2]`, for positions i32 `[T]`.

    Args:
      rope: which embedding.
      positions: place of each token in its text; padding may be negative.
      context_len: longest context that will be run; longrope chooses its factors by it (0 = the
        trained length).
      factors: float32 `[sets, dim/2]`, the divisors of kind "tensor".
    """
    place = positions.astype(jnp.float32)[:, None]
    if rope.kind == "dynamic":
        frequency = _dynamic_frequencies(rope, place)
    elif rope.kind == "tensor":
        if factors is None:
            raise ValueError("rope kind 'tensor' needs the parameter rope_factors")
        chosen = 1 if factors.shape[0] == 2 and context_len > rope.trained_len else 0
        frequency = jnp.asarray(_base_frequencies(rope)) / factors[chosen].astype(jnp.float32)
    else:
        frequency = jnp.asarray(frequencies(rope, context_len))
    angle = place * frequency
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the leading `dim` of H of x `[T, ..., H]`, passes the rest; keeps x's dtype."""
    half = table[0].shape[-1]
    spread = (slice(None),) + (None,) * (x.ndim - 2)
    cos, sin = table[0][spread], table[1][spread]
    a = x[..., :half].astype(jnp.float32)
    b = x[..., half : 2 * half].astype(jnp.float32)
    parts = [(a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype)]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return jnp.concatenate(parts, axis=-1)


def frequencies(rope: RopeConfig, context_len: int = 0) -> np.ndarray:
    """Angle per position of each pair, float32 `[dim/2]`, for kinds with fixed frequencies."""
    base = _base_frequencies(rope)
    if rope.kind == "default":
        return base
    if rope.kind == "linear":
        return base / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, base)
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, base)
    if rope.kind == "longrope":
        chosen = rope.long_factors if context_len > rope.trained_len else rope.short_factors
        return (base / np.asarray(chosen, np.float32)).astype(np.float32)
    raise ValueError(f"rope kind {rope.kind!r} has no fixed frequencies; use rope_table")


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """YaRN's default multiplier of cos and sin (equation 22, as a factor on both q and k)."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def longrope_attention_factor(factor: float, trained_len: int) -> float:
    """LongRoPE's default multiplier of cos and sin, for a context stretched by `factor`."""
    return math.sqrt(1 + math.log(factor) / math.log(trained_len)) if factor > 1 else 1.0


def _exponents(rope: RopeConfig) -> np.ndarray:
    return np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)


def _base_frequencies(rope: RopeConfig) -> np.ndarray:
    return (1.0 / np.float32(rope.theta) ** _exponents(rope)).astype(np.float32)


def _dynamic_frequencies(rope: RopeConfig, place: jax.Array) -> jax.Array:
    """NTK-aware base that grows with the position beyond the trained length: float32 `[T, dim/2]`.

    Equal to generating token by token with cached keys, where each key keeps the base of its own
    step.
    """
    length = jnp.maximum(place + 1.0, float(rope.trained_len))
    growth = rope.factor * length / rope.trained_len - (rope.factor - 1.0)
    theta = rope.theta * growth ** (rope.dim / (rope.dim - 2))
    return 1.0 / theta ** jnp.asarray(_exponents(rope))


def _llama3_frequencies(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Long waves are slowed by `factor`, short ones stay, those between are blended."""
    rotations = rope.trained_len * base / (2 * math.pi)
    blend = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * base / rope.factor + blend * base).astype(np.float32)


def _yarn_frequencies(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """A linear ramp between the dimensions that turn beta_fast and beta_slow times."""

    def dimension(rotations: float) -> float:
        turns = rope.trained_len / (rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (base / rope.factor * ramp + base * (1 - ramp)).astype(np.float32)
