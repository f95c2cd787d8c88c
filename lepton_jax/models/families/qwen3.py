"""Qwen3: Qwen2 with RMSNorm on q and k in place of the biases.

The head dim is its own number, not hidden size over heads. Windows are as in `qwen2.py`.
"""

from __future__ import annotations

from lepton_jax.models.config import ModelConfig
from lepton_jax.models.families.qwen2 import upper_windows
from lepton_jax.models.family import HF_ACTIVATIONS, Family, base_gguf_fields, base_hf_fields
from lepton_jax.models.keymap import gguf_base, hf_base
from lepton_jax.models.reader import KeyReader
from lepton_jax.models.rope_keys import gguf_rope, hf_rope


def hf_config(keys: KeyReader) -> ModelConfig:
    """config.json of model_type "qwen3"."""
    fields = base_hf_fields(keys, {"head_dim": 128})
    bias = bool(keys.get("attention_bias", False))
    return ModelConfig(
        family="qwen3",
        activation=keys.choice("hidden_act", "silu", HF_ACTIVATIONS),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        ropes=(hf_rope(keys, fields),),
        layer_ropes=(0,) * fields["num_layers"],
        layer_windows=upper_windows(keys, fields),
        **fields,
    )


def gguf_config(keys: KeyReader, tensors: frozenset[str]) -> ModelConfig:
    """Metadata of architecture "qwen3"."""
    fields = base_gguf_fields(keys, tensors)
    return ModelConfig(
        family="qwen3",
        qk_norm=True,
        layer_ropes=(0,) * fields["num_layers"],
        layer_windows=(0,) * fields["num_layers"],
        **gguf_rope(keys, fields, tensors),
        **fields,
    )


FAMILY = Family(
    name="qwen3",
    hf_architectures=("Qwen3ForCausalLM",),
    hf_types=("qwen3",),
    gguf_architectures=("qwen3",),
    hf_config=hf_config,
    gguf_config=gguf_config,
    hf_map=hf_base,
    gguf_map=gguf_base,
)
