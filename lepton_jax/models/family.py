"""What a family file provides, and the sizes that all families spell alike.

A family turns a foreign config into a `ModelConfig` and names the weights. Most differ from Llama
by a few keys, so `base_hf_fields` and `base_gguf_fields` read the shared ones and a family adds its
own on top. How arrays of a file become our parameters is `keymap.py`; RoPE keys are `rope_keys.py`.
Read next: `families/llama.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lepton_jax.models.config import ModelConfig
from lepton_jax.models.keymap import Mapping
from lepton_jax.models.reader import REQUIRED, KeyReader

HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
      name: of its file in `families/`.
      hf_architectures: class names in config.json's `architectures`.
      hf_types: values of config.json's `model_type`.
      gguf_architectures: values of GGUF's `general.architecture`.
      hf_config: reads config.json.
      gguf_config: reads the `<architecture>.` metadata; also gets the names of the file's tensors.
      hf_map: weights of a safetensors checkpoint.
      gguf_map: weights of a GGUF file.
      hf_ignored: keys of config.json that this family leaves unread.
    """

    name: str
    hf_architectures: tuple[str, ...]
    hf_types: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    hf_config: Callable[[KeyReader], ModelConfig]
    gguf_config: Callable[[KeyReader, frozenset[str]], ModelConfig] | None
    hf_map: Callable[[ModelConfig], list[Mapping]]
    gguf_map: Callable[[ModelConfig], list[Mapping]]
    hf_ignored: tuple[str, ...] = ()


def base_hf_fields(keys: KeyReader, defaults: dict[str, Any] | None = None) -> dict[str, Any]:
    """The ModelConfig fields that every Hugging Face config of our families spells alike.

    Args:
      keys: config.json.
      defaults: what absent keys mean in this family, where configs rely on that; other keys that
        have no general default must be there.
    """
    absent = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "head_dim": None}
    absent |= defaults or {}

    def number(key: str) -> Any:
        return keys.number(key, absent.get(key, REQUIRED))

    heads, size, head_dim = number("num_attention_heads"), number("hidden_size"), number("head_dim")
    if head_dim is None:
        if size % heads:
            raise ValueError(
                f"{keys.source}: hidden_size {size} is not a multiple of num_attention_heads "
                f"{heads} and there is no head_dim"
            )
        head_dim = size // heads
    return {
        "vocab_size": number("vocab_size"),
        "num_layers": number("num_hidden_layers"),
        "hidden_size": size,
        "ffn_size": number("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": keys.number(
            "num_key_value_heads", absent.get("num_key_value_heads", heads)
        ),
        "head_dim": head_dim,
        "max_position": number("max_position_embeddings"),
        "norm_eps": float(keys.get("rms_norm_eps", absent["rms_norm_eps"])),
        "tie_embeddings": bool(keys.get("tie_word_embeddings", absent["tie_word_embeddings"])),
        "attn_scale": head_dim**-0.5,
    }


def hf_windows(
    keys: KeyReader, layers: int, window: int, default: tuple[bool, ...]
) -> tuple[int, ...]:
    """Window per layer from `layer_types`, or where absent from `default` (True = windowed)."""
    kinds = keys.get("layer_types", None)
    if kinds is None:
        return tuple(window if windowed else 0 for windowed in default)
    allowed = {"sliding_attention": window, "full_attention": 0}
    if len(kinds) != layers or any(kind not in allowed for kind in kinds):
        raise ValueError(
            f"{keys.source}: layer_types {kinds} must be {layers} of "
            f"{', '.join(map(repr, allowed))}"
        )
    if "sliding_attention" in kinds and window <= 0:
        raise ValueError(
            f"{keys.source}: layer_types has sliding_attention but sliding_window is absent"
        )
    return tuple(allowed[kind] for kind in kinds)


def base_gguf_fields(keys: KeyReader, tensors: frozenset[str]) -> dict[str, Any]:
    """The ModelConfig fields that every GGUF architecture of our families spells alike.

    Args:
      keys: the metadata below `<architecture>.`; the registry adds vocab_size.
      tensors: names in the file; `output.weight` among them means an untied head.
    """
    heads, size = keys.number("attention.head_count"), keys.number("embedding_length")
    head_dim = keys.number("attention.key_length", size // heads)
    value_dim = keys.number("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise ValueError(
            f"{keys.source}: attention.value_length {value_dim} differs from key_length "
            f"{head_dim}, which is not supported"
        )
    return {
        "vocab_size": keys.number("vocab_size"),
        "num_layers": keys.number("block_count"),
        "hidden_size": size,
        "ffn_size": keys.number("feed_forward_length"),
        "num_heads": heads,
        "num_kv_heads": keys.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position": keys.number("context_length"),
        "norm_eps": float(keys.get("attention.layer_norm_rms_epsilon")),
        "tie_embeddings": "output.weight" not in tensors,
        "attn_scale": head_dim**-0.5,
    }
