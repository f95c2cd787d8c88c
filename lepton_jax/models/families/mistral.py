"""Mistral: Llama with a sliding window in every layer (switched off in later releases).

Its GGUF files say "llama" and are read by that family.
"""

from __future__ import annotations

from lepton_jax.models.config import ModelConfig
from lepton_jax.models.families import llama
from lepton_jax.models.family import HF_ACTIVATIONS, Family, base_hf_fields
from lepton_jax.models.keymap import hf_base
from lepton_jax.models.reader import KeyReader
from lepton_jax.models.rope_keys import hf_rope


def hf_config(keys: KeyReader) -> ModelConfig:
    """config.json of model_type "mistral"."""
    fields = base_hf_fields(keys, {"num_key_value_heads": 8})
    window = keys.nullable("sliding_window", 4096) or 0
    return ModelConfig(
        family="mistral",
        activation=keys.choice("hidden_act", "silu", HF_ACTIVATIONS),
        ropes=(hf_rope(keys, fields),),
        layer_ropes=(0,) * fields["num_layers"],
        layer_windows=(window,) * fields["num_layers"],
        **fields,
    )


FAMILY = Family(
    name="mistral",
    hf_architectures=("MistralForCausalLM",),
    hf_types=("mistral",),
    gguf_architectures=(),
    hf_config=hf_config,
    gguf_config=None,
    hf_map=hf_base,
    gguf_map=llama.gguf_map,
)
