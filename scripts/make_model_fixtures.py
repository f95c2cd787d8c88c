"""Makes the tiny random models against which `tests/test_models_parity.py` checks every family.

It needs torch and transformers, which the package itself does not: run it in an environment of its
own, from the checkout's root, and commit what changes below tests/fixtures/models:

    python3.11 -m venv /tmp/peer && /tmp/peer/bin/pip install torch transformers==5.23.0 safetensors
    /tmp/peer/bin/python scripts/make_model_fixtures.py            # or with names of cases

Each case is a folder with config.json and model.safetensors as transformers writes them (float16)
and expected.safetensors: token ids and transformers' float32 logits for the same rounded weights.
Cases that only rescale RoPE borrow the weights of another (`cases.json`). Weights are scaled so
that logits spread by about one and every feature of a family shows in them.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "models"
TOKENS = 40
BASE = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
ROPE_CASES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 2.0,
        "beta_slow": 0.2,
        "original_max_position_embeddings": 32,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
        "original_max_position_embeddings": 32,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [1.0 + 0.8 * i for i in range(8)],
        "original_max_position_embeddings": 32,
    },
}
PHI3_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [1.0 + 0.8 * i for i in range(6)],
    "partial_rotary_factor": 0.75,
}
PHI3 = {"hidden_size": 64}  # its head dim is hidden size over heads, whatever head_dim says
EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 24, "num_hidden_layers": 2}
GEMMA = {"sliding_window": 8, "query_pre_attn_scalar": 24, "hidden_activation": "gelu_pytorch_tanh"}


def families() -> dict[str, tuple]:
    """Case name to model class, config class and what differs from BASE."""
    c = transformers
    return {
        "llama": (c.LlamaForCausalLM, c.LlamaConfig, {}),
        "llama_bias": (
            c.LlamaForCausalLM,
            c.LlamaConfig,
            {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        ),
        "smollm3": (
            c.SmolLM3ForCausalLM,
            c.SmolLM3Config,
            {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8},
        ),
        "mistral": (c.MistralForCausalLM, c.MistralConfig, {"sliding_window": 8}),
        "mixtral": (c.MixtralForCausalLM, c.MixtralConfig, EXPERTS | {"num_local_experts": 4}),
        "qwen2": (
            c.Qwen2ForCausalLM,
            c.Qwen2Config,
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
                "tie_word_embeddings": True,
            },
        ),
        "qwen3": (c.Qwen3ForCausalLM, c.Qwen3Config, {}),
        "qwen3_moe": (
            c.Qwen3MoeForCausalLM,
            c.Qwen3MoeConfig,
            EXPERTS | {"num_experts": 5, "moe_intermediate_size": 24},
        ),
        "gemma2": (
            c.Gemma2ForCausalLM,
            c.Gemma2Config,
            GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
        ),
        "gemma3": (c.Gemma3ForCausalLM, c.Gemma3TextConfig, gemma3_text()),
        "phi3": (
            c.Phi3ForCausalLM,
            c.Phi3Config,
            PHI3
            | {
                "original_max_position_embeddings": 48,
                "sliding_window": 12,
                "rope_parameters": dict(PHI3_LONGROPE),
            },
        ),
    }


def cases() -> dict[str, dict]:
    """Case name to model, config, and where needed `weights`, `context`, `stepwise`."""
    c = transformers
    result = {
        name: {"model": model, "config": config(**(BASE | extra))}
        for name, (model, config, extra) in families().items()
    }
    result["gemma3_multimodal"] = {
        "model": c.Gemma3ForConditionalGeneration,
        "config": gemma3_multimodal(),
    }
    for name, rope in ROPE_CASES.items():
        # dynamic scaling starts at the trained length, which is max_position_embeddings there
        extra = {"max_position_embeddings": 24} if name == "dynamic" else {}
        config = c.LlamaConfig(**(BASE | extra | {"rope_parameters": dict(rope)}))
        result[f"llama_{name}"] = {
            "model": c.LlamaForCausalLM,
            "config": config,
            "weights": "llama",
            "stepwise": name == "dynamic",
            "context": TOKENS if name == "longrope" else 0,
        }
    long = phi3_long()
    result["phi3_long"] = {
        "model": c.Phi3ForCausalLM,
        "config": long,
        "weights": "phi3",
        "context": TOKENS,
    }
    return result


def gemma3_text() -> dict:
    """Two local layers and a global one, with scaled RoPE on the global one only."""
    return GEMMA | {
        "layer_types": [LOCAL, GLOBAL, LOCAL],
        "rope_parameters": {
            GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            LOCAL: {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }


def gemma3_multimodal() -> transformers.Gemma3Config:
    """A text model in the shell of a multimodal one, with the smallest vision tower there is."""
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    text = BASE | gemma3_text() | {"num_hidden_layers": 3}
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=69,
        eoi_token_index=70,
        image_token_index=71,
    )


def phi3_long() -> transformers.Phi3Config:
    """As "phi3", but the text is longer than the trained length: long factors."""
    extra = {
        "original_max_position_embeddings": 32,
        "sliding_window": None,
        "rope_parameters": dict(PHI3_LONGROPE),
    }
    return transformers.Phi3Config(**(BASE | PHI3 | extra))


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights with activations near one, peaked attention, norms and biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 1:
            centre = 1.0 if "norm" in name and abs(value.mean().item() - 1) < 0.5 else 0.0
            new = centre + 0.25 * noise
        elif name.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight")):
            new = 1.5 * noise / value.shape[-1] ** 0.5
        else:
            new = noise / value.shape[-1] ** 0.5
        value.copy_(new.half().float())


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor, stepwise: bool) -> np.ndarray:
    """float32 `[T, V]`; stepwise feeds one token at a time with cached keys."""
    if not stepwise:
        return model(input_ids=ids[None]).logits[0].float().numpy()
    cache, rows = transformers.DynamicCache(config=model.config), []
    for position in range(ids.shape[0]):
        out = model(
            input_ids=ids[None, position : position + 1], past_key_values=cache, use_cache=True
        )
        rows.append(out.logits[0, 0].float().numpy())
    return np.stack(rows)


def make(name: str, case: dict, seed: int) -> None:
    """Writes one case's folder."""
    folder = ROOT / name
    shutil.rmtree(folder, ignore_errors=True)
    config = case["config"]
    config._attn_implementation = "eager"
    model = case["model"](config).float().eval()
    randomize(model, seed)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(3, 69, TOKENS))
    expected = logits(model, ids, case.get("stepwise", False))
    folder.mkdir(parents=True)
    if case.get("weights"):
        config.save_pretrained(folder)
    else:
        model.half().save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
    save_file(
        {"ids": ids.numpy().astype(np.int32), "logits": expected}, folder / "expected.safetensors"
    )
    print(f"{name:20} logits std {expected.std():.2f}")


def main() -> None:
    """Makes the cases named on the command line, or all."""
    known = cases()
    seeds = {name: 1 + i for i, name in enumerate(n for n in known if not known[n].get("weights"))}
    for name in sys.argv[1:] or known:
        make(name, known[name], seeds[known[name].get("weights") or name])
    listing = {
        name: {"weights": case.get("weights") or name, "context": case.get("context", 0)}
        for name, case in sorted(known.items())
    }
    (ROOT / "cases.json").write_text(json.dumps(listing, indent=1) + "\n")


if __name__ == "__main__":
    main()
