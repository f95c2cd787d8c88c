"""Phi-3 and Phi-4-mini: fused projections, longrope, partly rotating heads.

Both file formats keep q, k and v below each other in one array, and gate above up in another.
"""

from __future__ import annotations

from lepton_jax.models.config import ModelConfig
from lepton_jax.models.family import HF_ACTIVATIONS, Family, base_gguf_fields, base_hf_fields
from lepton_jax.models.keymap import (
    Mapping,
    gguf_base,
    hf_base,
    split_gate_up,
    split_qkv,
)
from lepton_jax.models.reader import KeyReader
from lepton_jax.models.rope_keys import gguf_rope, hf_rope

# Early releases called longrope by these names.
LONGROPE_NAMES = {"su": "longrope", "yarn": "longrope"}


def hf_config(keys: KeyReader) -> ModelConfig:
    """config.json of model_type "phi3"."""
    fields = base_hf_fields(keys, {"rms_norm_eps": 1e-5})
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        keys.choice(key, False, {False: False})
    for key in ("full_attn_mod", "interpolate_factor"):
        keys.choice(key, 1, {1: 1})
    window = keys.get("sliding_window", 0)
    return ModelConfig(
        family="phi3",
        activation=keys.choice("hidden_act", "silu", HF_ACTIVATIONS),
        ropes=(hf_rope(keys, fields, renamed=LONGROPE_NAMES),),
        layer_ropes=(0,) * fields["num_layers"],
        layer_windows=(window,) * fields["num_layers"],
        **fields,
    )


def hf_map(config: ModelConfig) -> list[Mapping]:
    """Hugging Face names."""
    layer = "model.layers.{i}."
    fused = (layer + "self_attn.qkv_proj.weight", layer + "mlp.gate_up_proj.weight")
    return _with_fused(hf_base(config), *fused)


def gguf_map(config: ModelConfig) -> list[Mapping]:
    """GGUF names; `ffn_up` holds gate and up."""
    return _with_fused(gguf_base(config), "blk.{i}.attn_qkv.weight", "blk.{i}.ffn_up.weight")


def _with_fused(base: list[Mapping], qkv: str, gate_up: str) -> list[Mapping]:
    fused = [
        Mapping("layers.{i}.qkv", (qkv,), split_qkv),
        Mapping("layers.{i}.gate_up", (gate_up,), split_gate_up),
    ]
    replaced = {mapping.target for mapping in fused}
    return [mapping for mapping in base if mapping.target not in replaced] + fused


def gguf_config(keys: KeyReader, tensors: frozenset[str]) -> ModelConfig:
    """Metadata of architecture "phi3"."""
    fields = base_gguf_fields(keys, tensors)
    window = int(keys.get("attention.sliding_window", 0))
    return ModelConfig(
        family="phi3",
        layer_ropes=(0,) * fields["num_layers"],
        layer_windows=(window,) * fields["num_layers"],
        **gguf_rope(keys, fields, tensors),
        **fields,
    )


FAMILY = Family(
    name="phi3",
    hf_architectures=("Phi3ForCausalLM",),
    hf_types=("phi3",),
    gguf_architectures=("phi3",),
    hf_config=hf_config,
    gguf_config=gguf_config,
    hf_map=hf_map,
    gguf_map=gguf_map,
)
