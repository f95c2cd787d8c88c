"""Mixtral: Mistral with a mixture of experts in every layer.

The weights of a token's experts sum to one. Its GGUF files say "llama" and are read by that family.
"""

from __future__ import annotations

from lepton_jax.models.config import ModelConfig
from lepton_jax.models.families import llama
from lepton_jax.models.family import HF_ACTIVATIONS, Family, base_hf_fields
from lepton_jax.models.keymap import Mapping, hf_attention, hf_experts
from lepton_jax.models.reader import KeyReader
from lepton_jax.models.rope_keys import hf_rope


def hf_config(keys: KeyReader) -> ModelConfig:
    """config.json of model_type "mixtral"."""
    fields = base_hf_fields(keys, {"num_key_value_heads": 8, "rms_norm_eps": 1e-5})
    window = keys.get("sliding_window", 0)
    return ModelConfig(
        family="mixtral",
        activation=keys.choice("hidden_act", "silu", HF_ACTIVATIONS),
        num_experts=keys.number("num_local_experts", 8),
        experts_per_token=keys.number("num_experts_per_tok", 2),
        ropes=(hf_rope(keys, fields, theta=1_000_000.0),),
        layer_ropes=(0,) * fields["num_layers"],
        layer_windows=(window,) * fields["num_layers"],
        **fields,
    )


def hf_map(config: ModelConfig) -> list[Mapping]:
    """Hugging Face names; w1 is an expert's gate, w3 its up, w2 its down."""
    experts = hf_experts("model.layers.{i}.block_sparse_moe.", ("w1", "w3", "w2"))
    return hf_attention(config) + experts


FAMILY = Family(
    name="mixtral",
    hf_architectures=("MixtralForCausalLM",),
    hf_types=("mixtral",),
    gguf_architectures=(),
    hf_config=hf_config,
    gguf_config=None,
    hf_map=hf_map,
    gguf_map=llama.gguf_map,
)
