"""Gemma 2: soft caps, norms before and after each block, every other layer windowed.

Scores and logits are both capped; the attention scale is a key of its own. Hugging Face stores its
norm scales minus one; GGUF stores them whole.
"""

from __future__ import annotations

from lepton_jax.models.config import ModelConfig
from lepton_jax.models.family import (
    HF_ACTIVATIONS,
    Family,
    base_gguf_fields,
    base_hf_fields,
    hf_windows,
)
from lepton_jax.models.keymap import Mapping, gguf_base, hf_base, plus_one
from lepton_jax.models.reader import KeyReader
from lepton_jax.models.rope_keys import gguf_rope, hf_rope

DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True}
LAYERS_27B = 46


def hf_config(keys: KeyReader) -> ModelConfig:
    """config.json of model_type "gemma2"."""
    fields = base_hf_fields(keys, DEFAULTS)
    layers = fields["num_layers"]
    fields["attn_scale"] = keys.get("query_pre_attn_scalar", 256) ** -0.5
    window = keys.nullable("sliding_window", 4096) or 0
    keys.choice("use_bidirectional_attention", False, {False: False})
    bias = bool(keys.get("attention_bias", False))
    return ModelConfig(
        family="gemma2",
        activation=keys.choice("hidden_activation", "gelu_pytorch_tanh", HF_ACTIVATIONS),
        embed_scale=fields["hidden_size"] ** 0.5,
        qkv_bias=bias,
        out_bias=bias,
        post_norms=True,
        attn_soft_cap=float(keys.nullable("attn_logit_softcapping", 50.0) or 0),
        final_soft_cap=float(keys.nullable("final_logit_softcapping", 30.0) or 0),
        ropes=(hf_rope(keys, fields),),
        layer_ropes=(0,) * layers,
        layer_windows=hf_windows(keys, layers, window, even_layers(layers)),
        **fields,
    )


def even_layers(layers: int) -> tuple[bool, ...]:
    """True for layers 0, 2, 4, ..."""
    return tuple(i % 2 == 0 for i in range(layers))


def hf_map(config: ModelConfig) -> list[Mapping]:
    """Hugging Face names of Gemma 2 and 3: four norms a layer, all stored minus one."""
    layer = "model.layers.{i}."
    norms = {
        "layers.{i}.ffn_norm": "pre_feedforward_layernorm",
        "layers.{i}.attn_post_norm": "post_attention_layernorm",
        "layers.{i}.ffn_post_norm": "post_feedforward_layernorm",
    }
    base = [m for m in hf_base(config, norm=plus_one) if m.target not in norms]
    return base + [
        Mapping(target, (f"{layer}{name}.weight",), plus_one) for target, name in norms.items()
    ]


def gguf_config(keys: KeyReader, tensors: frozenset[str]) -> ModelConfig:
    """Metadata of architecture "gemma2"."""
    fields = base_gguf_fields(keys, tensors)
    layers = fields["num_layers"]
    if layers == LAYERS_27B:  # the one size whose scale isn't that of its head dim
        fields["attn_scale"] = (fields["hidden_size"] / fields["num_heads"]) ** -0.5
    window = keys.number("attention.sliding_window", 4096)
    return ModelConfig(
        family="gemma2",
        activation="gelu_tanh",
        embed_scale=fields["hidden_size"] ** 0.5,
        post_norms=True,
        attn_soft_cap=float(keys.get("attn_logit_softcapping", 50.0)),
        final_soft_cap=float(keys.get("final_logit_softcapping", 30.0)),
        layer_ropes=(0,) * layers,
        layer_windows=tuple(window if even else 0 for even in even_layers(layers)),
        **gguf_rope(keys, fields, tensors),
        **fields,
    )


FAMILY = Family(
    name="gemma2",
    hf_architectures=("Gemma2ForCausalLM",),
    hf_types=("gemma2",),
    gguf_architectures=("gemma2",),
    hf_config=hf_config,
    gguf_config=gguf_config,
    hf_map=hf_map,
    gguf_map=gguf_base,
    hf_ignored=("hidden_act", "sliding_window_size"),  # repeat hidden_activation, sliding_window
)
