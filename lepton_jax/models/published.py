"""Sizes of released models, so that a plan needs no file: `hf_values("llama-3.1-8b")`.

Each entry is what its config.json says, less the keys that change nothing; instruction-tuned
releases have the sizes of their base models. Multimodal models are here by their text part. What a
config.json means is `registry.py`.
"""

from __future__ import annotations

import difflib
from typing import Any

_SIZES = (
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)
_TIED = {"tie_word_embeddings": True}
_WIDE = {"head_dim": 128}


def hf_values(name: str) -> dict[str, Any]:
    """The config.json of a released model. Raises ValueError with the nearest names."""
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, n=4, cutoff=0.5)
        hint = f"; near are {', '.join(near)}" if near else ""
        raise ValueError(
            f"published:{name} is not among the known sizes{hint} (all: {', '.join(PUBLISHED)}). "
            "Give the model's config.json instead"
        )
    return dict(PUBLISHED[name])


def _entry(kind: str, architecture: str, sizes: tuple[int, ...], **extra: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "architectures": [architecture],
        **dict(zip(_SIZES, sizes, strict=True)),
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **extra,
    }


def _llama(*sizes: int, positions: int, theta: float = 1e4, **extra: Any) -> dict[str, Any]:
    own = {"max_position_embeddings": positions, "rope_theta": theta, "hidden_act": "silu"}
    return _entry("llama", "LlamaForCausalLM", sizes, **(own | extra))


def _llama31(*sizes: int, factor: float = 8.0, **extra: Any) -> dict[str, Any]:
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    return _llama(*sizes, positions=131072, theta=5e5, rope_scaling=scaling, **extra)


def _mistral(*sizes: int, positions: int = 32768, theta: float = 1e6, **extra: Any):
    own = {"max_position_embeddings": positions, "rope_theta": theta, "sliding_window": None}
    return _entry("mistral", "MistralForCausalLM", sizes, hidden_act="silu", **(own | extra))


def _mixtral(*sizes: int, positions: int) -> dict[str, Any]:
    return _entry(
        "mixtral",
        "MixtralForCausalLM",
        sizes,
        max_position_embeddings=positions,
        rope_theta=1e6,
        hidden_act="silu",
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
    )


def _qwen(kind: str, *sizes: int, positions: int, **extra: Any) -> dict[str, Any]:
    own = {
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "sliding_window": None,
        "use_sliding_window": False,
    }
    names = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}
    return _entry(kind, f"{names[kind]}ForCausalLM", sizes, **(own | extra))


def _experts(width: int) -> dict[str, Any]:
    return {
        "moe_intermediate_size": width,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(kind: str, *sizes: int, head_dim: int, window: int, **extra: Any) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    own = {
        "head_dim": head_dim,
        "sliding_window": window,
        "query_pre_attn_scalar": head_dim,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        **_TIED,
    }
    if kind == "gemma2":
        own |= {"max_position_embeddings": 8192, "rope_theta": 1e4, **caps}
        return _entry(kind, "Gemma2ForCausalLM", sizes, **(own | extra))
    own |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    return _entry("gemma3_text", "Gemma3ForCausalLM", sizes, **(own | extra))


_STRETCHED = {
    "max_position_embeddings": 131072,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}


def _phi(*sizes: int, positions: int, **extra: Any) -> dict[str, Any]:
    own = {
        "max_position_embeddings": positions,
        "original_max_position_embeddings": positions,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "sliding_window": None,
        "hidden_act": "silu",
    }
    return _entry("phi3", "Phi3ForCausalLM", sizes, **(own | extra))


_PHI4_MINI_LONG = (
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845,
    5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158,
    11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105,
    25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71,
    32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
)  # fmt: skip
_PHI4_MINI = {
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 48,
        "long_factor": list(_PHI4_MINI_LONG),
    },
    "sliding_window": 262144,
    **_TIED,
}


# Sizes are V, L, D, F, N, K.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(32000, 32, 4096, 11008, 32, 32, positions=4096),
    "llama-2-13b": _llama(32000, 40, 5120, 13824, 40, 40, positions=4096),
    "llama-2-70b": _llama(32000, 80, 8192, 28672, 64, 8, positions=4096),
    "llama-3-8b": _llama(128256, 32, 4096, 14336, 32, 8, positions=8192, theta=5e5),
    "llama-3-70b": _llama(128256, 80, 8192, 28672, 64, 8, positions=8192, theta=5e5),
    "llama-3.1-8b": _llama31(128256, 32, 4096, 14336, 32, 8),
    "llama-3.1-70b": _llama31(128256, 80, 8192, 28672, 64, 8),
    "llama-3.1-405b": _llama31(128256, 126, 16384, 53248, 128, 8),
    "llama-3.2-1b": _llama31(128256, 16, 2048, 8192, 32, 8, factor=32.0, head_dim=64, **_TIED),
    "llama-3.2-3b": _llama31(128256, 28, 3072, 8192, 24, 8, factor=32.0, **_WIDE, **_TIED),
    "llama-3.3-70b": _llama31(128256, 80, 8192, 28672, 64, 8),
    "tinyllama-1.1b": _llama(32000, 22, 2048, 5632, 32, 4, positions=2048),
    "smollm2-135m": _llama(49152, 30, 576, 1536, 9, 3, positions=8192, theta=1e5, **_TIED),
    "smollm2-360m": _llama(49152, 32, 960, 2560, 15, 5, positions=8192, theta=1e5, **_TIED),
    "smollm2-1.7b": _llama(49152, 24, 2048, 8192, 32, 32, positions=8192, theta=1.3e5, **_TIED),
    "smollm3-3b": _entry(
        "smollm3", "SmolLM3ForCausalLM", (128256, 36, 2048, 11008, 16, 4), hidden_act="silu",
        max_position_embeddings=65536, rms_norm_eps=1e-6, rope_theta=5e6, **_TIED,
    ),
    "mistral-7b": _mistral(32768, 32, 4096, 14336, 32, 8),
    "mistral-nemo-12b": _mistral(131072, 40, 5120, 14336, 32, 8, positions=131072, **_WIDE),
    "mistral-small-24b": _mistral(131072, 40, 5120, 32768, 32, 8, theta=1e8, **_WIDE),
    "mixtral-8x7b": _mixtral(32000, 32, 4096, 14336, 32, 8, positions=32768),
    "mixtral-8x22b": _mixtral(32768, 56, 6144, 16384, 48, 8, positions=65536),
    "qwen2.5-0.5b": _qwen("qwen2", 151936, 24, 896, 4864, 14, 2, positions=32768, **_TIED),
    "qwen2.5-1.5b": _qwen("qwen2", 151936, 28, 1536, 8960, 12, 2, positions=32768, **_TIED),
    "qwen2.5-3b": _qwen("qwen2", 151936, 36, 2048, 11008, 16, 2, positions=32768, **_TIED),
    "qwen2.5-7b": _qwen("qwen2", 152064, 28, 3584, 18944, 28, 4, positions=32768),
    "qwen2.5-14b": _qwen("qwen2", 152064, 48, 5120, 13824, 40, 8, positions=32768),
    "qwen2.5-32b": _qwen("qwen2", 152064, 64, 5120, 27648, 40, 8, positions=32768),
    "qwen2.5-72b": _qwen("qwen2", 152064, 80, 8192, 29568, 64, 8, positions=32768),
    "qwen3-0.6b": _qwen("qwen3", 151936, 28, 1024, 3072, 16, 8, positions=40960, **_WIDE, **_TIED),
    "qwen3-1.7b": _qwen("qwen3", 151936, 28, 2048, 6144, 16, 8, positions=40960, **_WIDE, **_TIED),
    "qwen3-4b": _qwen("qwen3", 151936, 36, 2560, 9728, 32, 8, positions=40960, **_WIDE, **_TIED),
    "qwen3-8b": _qwen("qwen3", 151936, 36, 4096, 12288, 32, 8, positions=40960, **_WIDE),
    "qwen3-14b": _qwen("qwen3", 151936, 40, 5120, 17408, 40, 8, positions=40960, **_WIDE),
    "qwen3-32b": _qwen("qwen3", 151936, 64, 5120, 25600, 64, 8, positions=40960, **_WIDE),
    "qwen3-30b-a3b": _qwen(
        "qwen3_moe", 151936, 48, 2048, 6144, 32, 4, positions=40960, **_WIDE, **_experts(768)
    ),
    "qwen3-235b-a22b": _qwen(
        "qwen3_moe", 151936, 94, 4096, 12288, 64, 4, positions=40960, **_WIDE, **_experts(1536)
    ),
    "gemma-2-2b": _gemma("gemma2", 256000, 26, 2304, 9216, 8, 4, head_dim=256, window=4096),
    "gemma-2-9b": _gemma("gemma2", 256000, 42, 3584, 14336, 16, 8, head_dim=256, window=4096),
    "gemma-2-27b": _gemma(
        "gemma2", 256000, 46, 4608, 36864, 32, 16, head_dim=128, window=4096,
        query_pre_attn_scalar=144,
    ),
    "gemma-3-270m": _gemma(
        "gemma3", 262144, 18, 640, 2048, 4, 1, head_dim=256, window=512,
        max_position_embeddings=32768,
    ),
    "gemma-3-1b": _gemma(
        "gemma3", 262144, 26, 1152, 6912, 4, 1, head_dim=256, window=512,
        max_position_embeddings=32768,
    ),
    "gemma-3-4b": _gemma(
        "gemma3", 262208, 34, 2560, 10240, 8, 4, head_dim=256, window=1024, **_STRETCHED
    ),
    "gemma-3-12b": _gemma(
        "gemma3", 262208, 48, 3840, 15360, 16, 8, head_dim=256, window=1024, **_STRETCHED
    ),
    "gemma-3-27b": _gemma(
        "gemma3", 262208, 62, 5376, 21504, 32, 16, head_dim=128, window=1024,
        query_pre_attn_scalar=168, **_STRETCHED,
    ),
    "phi-3-mini": _phi(32064, 32, 3072, 8192, 32, 32, positions=4096, sliding_window=2047),
    "phi-3-medium": _phi(32064, 40, 5120, 17920, 40, 10, positions=4096, sliding_window=2047),
    "phi-4-mini": _phi(200064, 32, 3072, 8192, 24, 8, positions=131072, **_PHI4_MINI),
    "phi-4": _phi(100352, 40, 5120, 17920, 40, 10, positions=16384, rope_theta=2.5e5),
}  # fmt: skip
