"""Which family a model belongs to: config.json or GGUF metadata to ModelConfig and key map.

A new family is one file in `families/` and one line in FAMILIES. Unknown architectures raise with
the known ones; unhandled config keys raise with their list (`reader.py`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from lepton_jax.models.config import ModelConfig
from lepton_jax.models.families import (
    gemma2,
    gemma3,
    llama,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)
from lepton_jax.models.family import Family
from lepton_jax.models.keymap import Mapping
from lepton_jax.models.reader import IGNORED_GGUF_KEYS, IGNORED_HF_KEYS, KeyReader
from lepton_jax.models.rope_keys import stretched_length

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (gemma2, gemma3, llama, mistral, mixtral, phi3, qwen2, qwen3, qwen3_moe)
}

# Buffers that old checkpoints carry and the towers of multimodal ones, which a text model leaves
# out.
_IGNORED_TENSORS = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector)\..*"
)


def config_from_hf(values: dict[str, Any], tensor_names: Iterable[str] = ()) -> ModelConfig:
    """The ModelConfig of a Hugging Face checkpoint.

    Args:
      values: of config.json.
      tensor_names: names of its tensors. Only by them is it told that an untied model has no head;
        without them it is taken to have one.

    Raises ValueError on unknown architectures, keys and values.
    """
    kind = values.get("model_type")
    family = next((f for f in FAMILIES.values() if kind in f.hf_types), None)
    known = sorted(name for f in FAMILIES.values() for name in f.hf_architectures)
    headless = [name.replace("ForCausalLM", "Model") for name in known]
    found = values.get("architectures") or ()
    unknown = [name for name in found if name not in known and name not in headless]
    if family is None or unknown:
        raise ValueError(
            f"config.json: architecture {values.get('architectures')} (model_type {kind!r}) is not "
            f"supported; supported: {', '.join(known)}"
        )
    ignored = IGNORED_HF_KEYS | set(family.hf_ignored)
    keys = KeyReader(values, family.name, source="config.json", ignored=ignored)
    keys.refuse_quantized()
    config = family.hf_config(keys)
    keys.finish()
    names = {canonical_name(config, "hf", name) for name in tensor_names}
    has_head = not names or config.tie_embeddings or "lm_head.weight" in names
    return _settled(dataclasses.replace(config, has_head=has_head))


def config_from_gguf(metadata: dict[str, Any], tensor_names: Iterable[str] = ()) -> ModelConfig:
    """The ModelConfig of a GGUF file.

    Args:
      metadata: all of the file's key-value pairs.
      tensor_names: names of its tensors. GGUF tells by their presence whether the head is tied,
        whether there are biases and whether RoPE has factors; without them a file that has such
        tensors is refused by the loader.

    Raises ValueError on unknown architectures, keys below `<architecture>.`, and values.
    """
    architecture = metadata.get("general.architecture")
    family = next((f for f in FAMILIES.values() if architecture in f.gguf_architectures), None)
    if family is None:
        known = sorted(name for f in FAMILIES.values() for name in f.gguf_architectures)
        raise ValueError(
            f"GGUF architecture {architecture!r} is not supported; supported: {', '.join(known)}"
        )
    prefix = f"{architecture}."
    own = {key[len(prefix) :]: value for key, value in metadata.items() if key.startswith(prefix)}
    own["architecture"] = architecture
    tokens = metadata.get("tokenizer.ggml.tokens")
    if "vocab_size" not in own and tokens is not None:
        own["vocab_size"] = len(tokens)
    keys = KeyReader(own, family.name, source=f"GGUF {prefix}*", ignored=IGNORED_GGUF_KEYS)
    config = family.gguf_config(keys, frozenset(tensor_names))
    keys.finish()
    return _settled(config)


def key_map(config: ModelConfig, source: str) -> list[Mapping]:
    """How a file's weights become parameters; `keymap.expand` spells layers and experts out.

    Args:
      config: from `config_from_hf` or `config_from_gguf`.
      source: "hf" or "gguf".
    """
    family = FAMILIES[config.family]
    if source == "hf":
        return family.hf_map(config)
    if source == "gguf":
        return family.gguf_map(config)
    raise ValueError(f"key map source {source!r} is unknown; known: 'hf', 'gguf'")


def canonical_name(config: ModelConfig, source: str, name: str) -> str | None:
    """A tensor's name as `key_map` spells it, or None for a tensor that the model leaves out.

    Multimodal Hugging Face checkpoints keep the language model under another prefix, those without
    a head (embedding models) have none, and some tied ones repeat the embedding as a head.
    """
    if source != "hf":
        return name
    if _IGNORED_TENSORS.fullmatch(name):
        return None
    name = re.sub(r"^(model\.language_model|language_model\.model)\.", "model.", name)
    name = name.removeprefix("language_model.")
    name = re.sub(r"^(embed_tokens|layers|norm)\.", r"model.\1.", name)
    return None if config.tie_embeddings and name == "lm_head.weight" else name


def _settled(config: ModelConfig) -> ModelConfig:
    """What holds for every family: stretched contexts, and no windows that are never left."""
    longest = stretched_length(config)
    windows = tuple(0 if window >= longest else window for window in config.layer_windows)
    return dataclasses.replace(config, max_position=longest, layer_windows=windows)
