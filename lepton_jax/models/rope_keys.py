"""RoPE settings as Hugging Face and GGUF spell them, as `RopeConfig`.

Hugging Face has had `rope_theta` with `rope_scaling` (its kind under `type` or `rope_type`) and,
from version 5, `rope_parameters` with everything inside, possibly one such dict per kind of layer.
Unknown kinds and unknown settings raise by name. The formulas are in `rope.py`.
"""

from __future__ import annotations

from typing import Any

from lepton_jax.models.config import ROPE_KINDS, ModelConfig, RopeConfig
from lepton_jax.models.reader import KeyReader
from lepton_jax.models.rope import longrope_attention_factor, yarn_attention_factor

HF_KINDS = tuple(kind for kind in ROPE_KINDS if kind != "tensor")


def hf_rope(
    keys: KeyReader,
    fields: dict[str, Any],
    *,
    theta: float = 10_000.0,
    renamed: dict[str, str] | None = None,
) -> RopeConfig:
    """The single RopeConfig of config.json.

    Args:
      keys: config.json.
      fields: ModelConfig fields so far; reads head_dim and max_position.
      theta: of this family where the config names none.
      renamed: old names of kinds in this family.
    """
    settings = dict(keys.get("rope_scaling", None) or {})
    settings |= keys.get("rope_parameters", None) or {}
    settings.setdefault("rope_theta", keys.get("rope_theta", theta))
    settings.setdefault("partial_rotary_factor", keys.get("partial_rotary_factor", 1.0))
    outer = keys.get("original_max_position_embeddings", None)
    if outer is not None:
        settings["original_max_position_embeddings"] = outer
    return rope_from_settings(settings, fields, family=keys.family, renamed=renamed)


def rope_from_settings(
    settings: dict[str, Any],
    fields: dict[str, Any],
    *,
    family: str,
    renamed: dict[str, str] | None = None,
) -> RopeConfig:
    """One `rope_parameters` dict as a RopeConfig; ValueError on unknown kinds and settings."""
    # Of no effect: what `type` repeats, and two leftovers of early YaRN configs.
    ignored = {"type", "rope_type", "finetuned"}
    keys = KeyReader(settings, family, source="rope settings", ignored=ignored)
    kind = settings.get("rope_type", settings.get("type", "default"))
    kind = (renamed or {}).get(kind, kind)
    if kind not in HF_KINDS:
        raise ValueError(
            f"{family} with rope type {kind!r} is not supported; supported: {', '.join(HF_KINDS)}"
        )
    max_position = fields["max_position"]
    values: dict[str, Any] = {
        "theta": float(keys.get("rope_theta", 10_000.0)),
        "dim": int(fields["head_dim"] * keys.get("partial_rotary_factor", 1.0)),
        "kind": kind,
    }
    if kind in ("llama3", "yarn", "longrope"):
        values["trained_len"] = int(keys.get("original_max_position_embeddings", max_position))
    elif kind == "dynamic":
        values["trained_len"] = max_position
    if kind in ("linear", "dynamic", "llama3"):
        values["factor"] = float(keys.get("factor"))
    if kind == "llama3":
        values["low_freq_factor"] = float(keys.get("low_freq_factor"))
        values["high_freq_factor"] = float(keys.get("high_freq_factor"))
    if kind == "yarn":
        values |= _yarn(keys, max_position / values["trained_len"])
    if kind == "longrope":
        values |= _longrope(keys, values["trained_len"], max_position)
    if kind != "longrope":
        # Phi-3 keeps it at the top level of configs that scale nothing
        keys.get("original_max_position_embeddings", None)
    keys.finish()
    return RopeConfig(**values)


def _yarn(keys: KeyReader, ratio: float) -> dict[str, Any]:
    factor = float(keys.get("factor", ratio))
    default = yarn_attention_factor(
        factor, keys.get("mscale", None), keys.get("mscale_all_dim", None)
    )
    # A factor on the default (DeepSeek-R1-0528-Qwen3-8B takes it back to 1), as vLLM and llama.cpp
    # read it; transformers leaves it out.
    default *= float(keys.get("attn_factor", 1.0))
    return {
        "factor": factor,
        "attention_factor": float(keys.get("attention_factor", default)),
        "beta_fast": float(keys.get("beta_fast", 32.0)),
        "beta_slow": float(keys.get("beta_slow", 1.0)),
        "truncate": bool(keys.get("truncate", True)),
    }


def _longrope(keys: KeyReader, trained_len: int, max_position: int) -> dict[str, Any]:
    factor = float(keys.get("factor", max_position / trained_len))
    default = longrope_attention_factor(factor, trained_len)
    return {
        "short_factors": tuple(map(float, keys.get("short_factor"))),
        "long_factors": tuple(map(float, keys.get("long_factor"))),
        "attention_factor": float(keys.get("attention_factor", default)),
    }


def gguf_rope(keys: KeyReader, fields: dict[str, Any], tensors: frozenset[str]) -> dict[str, Any]:
    """ModelConfig's `ropes` (one entry) and `rope_factor_sets` from GGUF metadata and tensor names.

    `rope_freqs.weight` holds llama3's divisors; `rope_factors_short.weight` and its long twin are
    longrope's.
    """
    theta = float(keys.get("rope.freq_base", 10_000.0))
    dim = keys.number("rope.dimension_count", fields["head_dim"])
    scaling = {"none": "default", "linear": "linear", "yarn": "yarn", "longrope": "tensor"}
    kind = keys.choice("rope.scaling.type", "none", scaling)
    factor = float(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0)))
    trained_len = int(keys.get("rope.scaling.original_context_length", fields["max_position"]))
    attention = float(keys.get("rope.scaling.attn_factor", 1.0))
    sets = 2 if "rope_factors_long.weight" in tensors else int("rope_freqs.weight" in tensors)
    if sets:
        if kind in ("linear", "yarn") or factor != 1.0:
            raise ValueError(
                f"{keys.source}: RoPE factor tensors together with rope.scaling.type {kind!r} and "
                f"factor {factor:g} are not supported: want the tensors alone"
            )
        rope = RopeConfig(theta, dim, "tensor", trained_len=trained_len, attention_factor=attention)
        return {"ropes": (rope,), "rope_factor_sets": sets}
    if kind == "tensor":
        raise ValueError(
            f"{keys.source}: rope.scaling.type 'longrope' without rope_factors tensors"
        )
    if kind == "default" and factor != 1.0:
        kind = "linear"
    betas = {}
    if kind == "yarn":
        attention *= float(keys.get("rope.scaling.yarn_attn_factor", 1.0))
        attention *= yarn_attention_factor(factor)
        betas["beta_fast"] = float(keys.get("rope.scaling.yarn_beta_fast", 32.0))
        betas["beta_slow"] = float(keys.get("rope.scaling.yarn_beta_slow", 1.0))
    values = dict(factor=factor, trained_len=trained_len, attention_factor=attention, **betas)
    rope = RopeConfig(theta, dim, kind, **values)
    return {"ropes": (rope,), "rope_factor_sets": 0}


def stretched_length(config: ModelConfig) -> int:
    """The longest context in tokens: `max_position`, or what YaRN or dynamic scaling makes of it.

    Their configs keep the trained length in `max_position_embeddings`; the other kinds' don't.
    """
    stretched = [
        int(rope.trained_len * rope.factor)
        for rope in config.ropes
        if rope.kind in ("yarn", "dynamic")
    ]
    return max([config.max_position, *stretched])
