"""Gemma 3, text only: local layers with a window and a RoPE of their own, and q/k norm.

Every sixth layer is global unless the config lists the layers. Multimodal checkpoints hold the same
model under `text_config`; their vision tower is left out.
"""

from __future__ import annotations

from typing import Any

from lepton_jax.models.config import ModelConfig, RopeConfig
from lepton_jax.models.families.gemma2 import hf_map
from lepton_jax.models.family import (
    HF_ACTIVATIONS,
    Family,
    base_gguf_fields,
    base_hf_fields,
    hf_windows,
)
from lepton_jax.models.keymap import gguf_base
from lepton_jax.models.reader import IGNORED_HF_KEYS, KeyReader
from lepton_jax.models.rope_keys import gguf_rope, rope_from_settings

GLOBAL, LOCAL = 0, 1
GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
LAYERS_27B = 62
# Released multimodal configs leave out what equals the 4B model.
DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}


def hf_config(keys: KeyReader) -> ModelConfig:
    """config.json of model_type "gemma3_text", or of "gemma3" with a `text_config` inside."""
    if keys.get("model_type") == "gemma3_text":
        return _text_config(keys)
    inner = keys.get("text_config", {})
    tied = keys.get("tie_word_embeddings", inner.get("tie_word_embeddings"))
    text = KeyReader(
        inner | {"tie_word_embeddings": tied},
        keys.family,
        source=f"{keys.source} text_config",
        ignored=IGNORED_HF_KEYS | set(FAMILY.hf_ignored),
    )
    text.refuse_quantized()
    config = _text_config(text)
    text.finish()
    return config


def _text_config(keys: KeyReader) -> ModelConfig:
    fields = base_hf_fields(keys, DEFAULTS)
    layers = fields["num_layers"]
    fields["attn_scale"] = keys.get("query_pre_attn_scalar", 256) ** -0.5
    keys.choice("use_bidirectional_attention", False, {False: False})
    period = keys.number("sliding_window_pattern", keys.number("_sliding_window_pattern", 6))
    windows = hf_windows(
        keys, layers, keys.number("sliding_window", 4096), local_layers(layers, period)
    )
    bias = bool(keys.get("attention_bias", False))
    return ModelConfig(
        family="gemma3",
        activation=keys.choice("hidden_activation", "gelu_pytorch_tanh", HF_ACTIVATIONS),
        embed_scale=fields["hidden_size"] ** 0.5,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        post_norms=True,
        attn_soft_cap=float(keys.get("attn_logit_softcapping", 0.0)),
        final_soft_cap=float(keys.get("final_logit_softcapping", 0.0)),
        ropes=_hf_ropes(keys, fields),
        layer_ropes=tuple(LOCAL if window else GLOBAL for window in windows),
        layer_windows=windows,
        **fields,
    )


def _hf_ropes(keys: KeyReader, fields: dict[str, Any]) -> tuple[RopeConfig, RopeConfig]:
    """Global and local; `rope_scaling` of older configs concerns the global one only."""
    nested = keys.get("rope_parameters", None) or {}
    unknown = sorted(set(nested) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(
            f"{keys.source}: rope_parameters for {', '.join(unknown)} are not supported; "
            "supported: full_attention, sliding_attention"
        )
    outer = {"rope_theta": keys.get("rope_theta", GLOBAL_THETA)}
    inner = {"rope_theta": keys.get("rope_local_base_freq", LOCAL_THETA)}
    outer |= keys.get("rope_scaling", None) or {}
    outer |= nested.get("full_attention") or {}
    inner |= nested.get("sliding_attention") or {}
    return (
        rope_from_settings(outer, fields, family=keys.family),
        rope_from_settings(inner, fields, family=keys.family),
    )


def local_layers(layers: int, period: int) -> tuple[bool, ...]:
    """False for every `period`-th layer, which is global."""
    return tuple((i + 1) % period != 0 for i in range(layers))


def gguf_config(keys: KeyReader, tensors: frozenset[str]) -> ModelConfig:
    """Metadata of architecture "gemma3"; its RoPE keys concern the global layers."""
    fields = base_gguf_fields(keys, tensors)
    layers = fields["num_layers"]
    if layers == LAYERS_27B:  # the one size whose scale isn't that of its head dim
        fields["attn_scale"] = (fields["hidden_size"] / fields["num_heads"]) ** -0.5
    window = keys.number("attention.sliding_window")
    local = local_layers(layers, keys.number("attention.sliding_window_pattern", 6))
    local_rope = RopeConfig(float(keys.get("rope.freq_base_swa", LOCAL_THETA)), fields["head_dim"])
    rope = gguf_rope(keys, fields, tensors)
    return ModelConfig(
        family="gemma3",
        activation="gelu_tanh",
        embed_scale=fields["hidden_size"] ** 0.5,
        qk_norm=True,
        post_norms=True,
        final_soft_cap=float(keys.get("final_logit_softcapping", 0.0)),
        layer_ropes=tuple(LOCAL if is_local else GLOBAL for is_local in local),
        layer_windows=tuple(window if is_local else 0 for is_local in local),
        **(rope | {"ropes": (*rope["ropes"], local_rope)}),
        **fields,
    )


FAMILY = Family(
    name="gemma3",
    hf_architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    hf_types=("gemma3_text", "gemma3"),
    gguf_architectures=("gemma3",),
    hf_config=hf_config,
    gguf_config=gguf_config,
    hf_map=hf_map,
    gguf_map=gguf_base,
    hf_ignored=(
        "boi_token_index",
        "eoi_token_index",
        "hidden_act",
        "image_token_index",
        "mm_tokens_per_image",
        "vision_config",
    ),
)
