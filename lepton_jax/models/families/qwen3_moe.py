"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer.

Models that keep some layers dense (`mlp_only_layers`, `decoder_sparse_step`) are refused: none was
released.
"""

from __future__ import annotations

from lepton_jax.models.config import ModelConfig
from lepton_jax.models.family import HF_ACTIVATIONS, Family, base_gguf_fields, base_hf_fields
from lepton_jax.models.keymap import gguf_base, hf_base
from lepton_jax.models.reader import KeyReader
from lepton_jax.models.rope_keys import gguf_rope, hf_rope


def hf_config(keys: KeyReader) -> ModelConfig:
    """config.json of model_type "qwen3_moe"."""
    fields = base_hf_fields(keys)
    fields["ffn_size"] = keys.number("moe_intermediate_size", 768)
    if keys.get("mlp_only_layers", []):
        raise ValueError(
            f"{keys.source}: qwen3_moe with mlp_only_layers = {keys.get('mlp_only_layers')} is not "
            "supported; supported: []"
        )
    keys.choice("decoder_sparse_step", 1, {1: 1})
    for key, only in (("use_qk_norm", True), ("qkv_bias", False)):  # Qwen3-Coder names them
        keys.choice(key, only, {only: only})
    keys.choice("shared_expert_intermediate_size", 0, {0: 0})
    window = keys.nullable("sliding_window", 4096) or 0
    window = window if keys.get("use_sliding_window", False) else 0
    bias = bool(keys.get("attention_bias", False))
    return ModelConfig(
        family="qwen3_moe",
        activation=keys.choice("hidden_act", "silu", HF_ACTIVATIONS),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        num_experts=keys.number("num_experts", keys.number("num_local_experts", 128)),
        experts_per_token=keys.number("num_experts_per_tok", 8),
        norm_expert_weights=bool(keys.get("norm_topk_prob", False)),
        ropes=(hf_rope(keys, fields),),
        layer_ropes=(0,) * fields["num_layers"],
        layer_windows=(window,) * fields["num_layers"],
        **fields,
    )


def gguf_config(keys: KeyReader, tensors: frozenset[str]) -> ModelConfig:
    """Metadata of architecture "qwen3moe", which always divides by the sum of the weights."""
    fields = base_gguf_fields(keys, tensors)
    fields["ffn_size"] = keys.number("expert_feed_forward_length")
    keys.choice("expert_shared_feed_forward_length", 0, {0: 0})
    return ModelConfig(
        family="qwen3_moe",
        qk_norm=True,
        num_experts=keys.number("expert_count"),
        experts_per_token=keys.number("expert_used_count"),
        layer_ropes=(0,) * fields["num_layers"],
        layer_windows=(0,) * fields["num_layers"],
        **gguf_rope(keys, fields, tensors),
        **fields,
    )


FAMILY = Family(
    name="qwen3_moe",
    hf_architectures=("Qwen3MoeForCausalLM",),
    hf_types=("qwen3_moe",),
    gguf_architectures=("qwen3moe",),
    hf_config=hf_config,
    gguf_config=gguf_config,
    hf_map=hf_base,
    gguf_map=gguf_base,
    hf_ignored=("max_window_layers",),
)
