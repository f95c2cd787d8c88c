"""Llama 1 to 3.x and what shares its code: SmolLM2, TinyLlama, SmolLM3 (layers without RoPE).

GGUF's "llama" architecture also holds Mistral and Mixtral; its q and k rows are ordered for RoPE on
neighbouring pairs, which the key map undoes. The plainest family: start here when you add one.
"""

from __future__ import annotations

from typing import Any

from lepton_jax.models.config import NO_ROPE, ModelConfig
from lepton_jax.models.family import (
    HF_ACTIVATIONS,
    Family,
    base_gguf_fields,
    base_hf_fields,
    hf_windows,
)
from lepton_jax.models.keymap import Mapping, gguf_base, hf_base, join_interleaved_qkv
from lepton_jax.models.reader import KeyReader
from lepton_jax.models.rope_keys import gguf_rope, hf_rope

SMOLLM3_THETA = 2_000_000.0
SMOLLM3_ROPE_INTERVAL = 4  # the last of so many layers has no RoPE


def hf_config(keys: KeyReader) -> ModelConfig:
    """config.json of model_type "llama" and "smollm3"."""
    smollm3 = keys.get("model_type") == "smollm3"
    defaults = {"tie_word_embeddings": smollm3}
    older = keys.get("max_sequence_length", None)  # of Llama 1
    if older is not None:
        defaults["max_position_embeddings"] = older
    fields = base_hf_fields(keys, defaults)
    bias = bool(keys.get("attention_bias", False))
    keys.choice("rope_interleaved", False, {False: False})
    rope = hf_rope(keys, fields, theta=SMOLLM3_THETA if smollm3 else 10_000.0)
    layers = (0,) * fields["num_layers"]
    per_layer = {"layer_ropes": layers, "layer_windows": layers}
    return ModelConfig(
        family="llama",
        activation=keys.choice("hidden_act", "silu", HF_ACTIVATIONS),
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=bool(keys.get("mlp_bias", False)),
        ropes=(rope,),
        **(_smollm3_layers(keys, fields) if smollm3 else per_layer),
        **fields,
    )


def _smollm3_layers(keys: KeyReader, fields: dict[str, Any]) -> dict[str, Any]:
    """Every fourth layer has no RoPE; where a window is used, those are the windowed ones."""
    layers = fields["num_layers"]
    interval = keys.number("no_rope_layer_interval", SMOLLM3_ROPE_INTERVAL)
    default = [int((i + 1) % interval != 0) for i in range(layers)]
    turns = keys.get("no_rope_layers", default)
    if len(turns) != layers or any(turn not in (0, 1) for turn in turns):
        raise ValueError(
            f"{keys.source}: no_rope_layers {turns} must be {layers} of 0 (no RoPE) and 1 (RoPE)"
        )
    window = keys.number("sliding_window", None) or 0
    window = window if keys.get("use_sliding_window", False) else 0
    keys.get("max_window_layers", None)  # written by the release, read by nobody
    windowed = tuple(not turn for turn in turns)
    return {
        "layer_ropes": tuple(0 if turn else NO_ROPE for turn in turns),
        "layer_windows": hf_windows(keys, layers, window, windowed),
    }


def gguf_config(keys: KeyReader, tensors: frozenset[str]) -> ModelConfig:
    """Metadata of the architectures "llama" (Llama, Mistral, Mixtral) and "smollm3".

    For SmolLM3 GGUF has no key that says which layers have no RoPE: readers know that it is every
    fourth.
    """
    fields = base_gguf_fields(keys, tensors)
    window = keys.number("attention.sliding_window", None) or 0
    experts = keys.get("expert_count", 0)
    fields["ffn_size"] = keys.number("expert_feed_forward_length", fields["ffn_size"])
    return ModelConfig(
        family="llama",
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        ffn_bias="blk.0.ffn_gate.bias" in tensors,
        num_experts=experts,
        experts_per_token=keys.get("expert_used_count", 0),
        layer_ropes=_gguf_ropes(keys, fields["num_layers"]),
        layer_windows=(window,) * fields["num_layers"],
        **gguf_rope(keys, fields, tensors),
        **fields,
    )


def _gguf_ropes(keys: KeyReader, layers: int) -> tuple[int, ...]:
    every = SMOLLM3_ROPE_INTERVAL if keys.get("architecture") == "smollm3" else layers + 1
    return tuple(NO_ROPE if (i + 1) % every == 0 else 0 for i in range(layers))


def gguf_map(config: ModelConfig) -> list[Mapping]:
    """GGUF names, q and k rows put back in order."""
    return gguf_base(config, qkv=join_interleaved_qkv)


FAMILY = Family(
    name="llama",
    hf_architectures=("LlamaForCausalLM", "SmolLM3ForCausalLM"),
    hf_types=("llama", "smollm3"),
    gguf_architectures=("llama", "smollm3"),
    hf_config=hf_config,
    gguf_config=gguf_config,
    hf_map=hf_base,
    gguf_map=gguf_map,
)
