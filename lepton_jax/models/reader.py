"""Reading a foreign config so that no key is overlooked.

A `KeyReader` hands out values one by one; `finish` raises if any key was neither read nor listed as
ignored, because a key that nobody looked at may change what the model computes. Keys that never do
are in the two lists below, each family adds its own. Read next: `families/llama.py` for the
plainest use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

REQUIRED = object()

# Hugging Face keys that say nothing about the forward pass: training, bookkeeping, generation.
IGNORED_HF_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout
    attn_implementation auto_map bos_token_id cache_implementation chunk_size_feed_forward
    do_sample dtype early_stopping embd_pdrop eos_token_id finetuning_task id2label
    initializer_range is_decoder is_encoder_decoder is_llama_config label2id max_length model_type
    num_return_sequences output_attentions output_hidden_states output_router_logits pad_token_id
    prefix pretraining_tp problem_type resid_pdrop return_dict router_aux_loss_coef
    router_jitter_noise task_specific_params temperature tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version
    use_bfloat16 use_cache
    """.split()
)

# GGUF keys below `<architecture>.` of the same kind, and its own name, which few families ask for.
# How embeddings are pooled is asked by `scoring.pooling`.
IGNORED_GGUF_KEYS = frozenset(
    {"architecture", "pooling_type", "rope.scaling.finetuned", "tensor_data_layout"}
)


class KeyReader:
    """Values of one config by key, with an account of what was read.

    Args:
      values: the config; not changed.
      family: named in errors.
      source: where the values come from, named in errors.
      ignored: keys that may stay unread.
    """

    def __init__(
        self, values: dict[str, Any], family: str, *, source: str, ignored: Iterable[str] = ()
    ):
        self.family, self.source = family, source
        self._values = dict(values)
        self._seen = set(ignored)

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        """The value of a key; absent or null gives the default, or ValueError without one."""
        self._seen.add(key)
        value = self._values.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(f"{self.source}: {self.family} needs {key!r}, which is missing")
        return default

    def refuse_quantized(self) -> None:
        """Raises ValueError where `quantization_config` says that the weights are in a foreign
        format.
        """
        quantized = self.get("quantization_config", None)
        if quantized:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise ValueError(
                f"{self.source}: quantization_config says that the weights are quantized already, "
                f"by {method!r}, which isn't read here: give the unquantized checkpoint and a "
                "compression.preset such as int8 or int4, or a .gguf file"
            )

    def nullable(self, key: str, absent: Any) -> Any:
        """The value of a key where null is not absence but a setting (a switched-off window)."""
        self._seen.add(key)
        return self._values.get(key, absent)

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """Like `get`, for a positive whole number; ValueError naming the key on anything else."""
        value = self.get(key, default)
        if isinstance(value, list | tuple) and len(set(value)) == 1:
            value = value[0]  # GGUF writes some sizes per layer
        if value is default and not isinstance(value, int):
            return value
        if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) <= 0:
            raise ValueError(
                f"{self.source}: {key} is {value!r}; it must be one positive whole number"
            )
        return int(value)

    def choice(self, key: str, default: Any, allowed: dict[Any, Any]) -> Any:
        """What `allowed` gives for the value; ValueError naming the supported values."""
        value = self.get(key, default)
        if isinstance(value, list | dict) or value not in allowed:
            raise ValueError(
                f"{self.source}: {self.family} with {key} = {value!r} is not supported; "
                f"supported: {', '.join(map(repr, allowed))}"
            )
        return allowed[value]

    def finish(self) -> None:
        """Raises ValueError if a key was neither read nor ignored."""
        left = sorted(set(self._values) - self._seen)
        if left:
            found = ", ".join(f"{key} = {self._values[key]!r:.60}" for key in left)
            raise ValueError(
                f"{self.source}: {self.family} has keys that nothing here handles: {found}. Handle "
                "them in lepton_jax/models/families, or list them as ignored there if they don't "
                "change the forward pass"
            )
