"""Qwen2 and Qwen2.5: Llama with biases on q, k and v.

The upper layers may have a window; released models have it switched off.
"""

from __future__ import annotations

from typing import Any

from lepton_jax.models.config import ModelConfig
from lepton_jax.models.family import (
    HF_ACTIVATIONS,
    Family,
    base_gguf_fields,
    base_hf_fields,
    hf_windows,
)
from lepton_jax.models.keymap import gguf_base, hf_base
from lepton_jax.models.reader import KeyReader
from lepton_jax.models.rope_keys import gguf_rope, hf_rope


def hf_config(keys: KeyReader) -> ModelConfig:
    """config.json of model_type "qwen2"."""
    fields = base_hf_fields(keys)
    keys.choice("use_mrope", False, {False: False})
    return ModelConfig(
        family="qwen2",
        activation=keys.choice("hidden_act", "silu", HF_ACTIVATIONS),
        qkv_bias=True,
        ropes=(hf_rope(keys, fields),),
        layer_ropes=(0,) * fields["num_layers"],
        layer_windows=upper_windows(keys, fields),
        **fields,
    )


def upper_windows(keys: KeyReader, fields: dict[str, Any]) -> tuple[int, ...]:
    """Window per layer: none below `max_window_layers`, and none at all unless switched on."""
    window = keys.nullable("sliding_window", 4096) or 0
    window = window if keys.get("use_sliding_window", False) else 0
    first, layers = keys.get("max_window_layers", 28), fields["num_layers"]
    return hf_windows(keys, layers, window, tuple(i >= first for i in range(layers)))


def gguf_config(keys: KeyReader, tensors: frozenset[str]) -> ModelConfig:
    """Metadata of architecture "qwen2"."""
    fields = base_gguf_fields(keys, tensors)
    return ModelConfig(
        family="qwen2",
        qkv_bias=True,
        layer_ropes=(0,) * fields["num_layers"],
        layer_windows=(0,) * fields["num_layers"],
        **gguf_rope(keys, fields, tensors),
        **fields,
    )


FAMILY = Family(
    name="qwen2",
    hf_architectures=("Qwen2ForCausalLM",),
    hf_types=("qwen2",),
    gguf_architectures=("qwen2",),
    hf_config=hf_config,
    gguf_config=gguf_config,
    hf_map=hf_base,
    gguf_map=gguf_base,
)
