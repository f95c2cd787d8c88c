"""Configs of released models are understood, and nothing in a config is passed over."""

import ast
import dataclasses
import inspect
import pathlib

import pytest
import tiny_models
from published_configs import PUBLISHED

import lepton_jax.models.config as config_module
from lepton_jax.models.config import NO_ROPE, ModelConfig, RopeConfig
from lepton_jax.models.registry import (
    canonical_name,
    config_from_gguf,
    config_from_hf,
    key_map,
)

LOCAL_1024 = tuple(0 if (i + 1) % 6 == 0 else 1024 for i in range(34))
EXPECTED = {
    "llama-2-7b": {"head_dim": 128, "num_kv_heads": 32, "max_position": 4096},
    "llama-3.1-8b-instruct": {
        "num_kv_heads": 8,
        "tie_embeddings": False,
        "ropes": (RopeConfig(500000.0, 128, "llama3", factor=8.0, trained_len=8192),),
    },
    "smollm2-135m-instruct": {
        "head_dim": 64,
        "tie_embeddings": True,
        "ropes": (RopeConfig(100000.0, 64),),
    },
    "smollm3-3b": {
        "tie_embeddings": True,
        "layer_ropes": (0, 0, 0, NO_ROPE) * 9,
        "layer_windows": (0,) * 36,
    },
    "mistral-7b-v0.1": {"layer_windows": (4096,) * 32},
    "mistral-7b-v0.3": {"layer_windows": (0,) * 32, "ropes": (RopeConfig(1e6, 128),)},
    "mixtral-8x7b": {"num_experts": 8, "experts_per_token": 2, "norm_expert_weights": True},
    "qwen2.5-7b-instruct": {
        "qkv_bias": True,
        "out_bias": False,
        "layer_windows": (0,) * 28,
        "max_position": 131072,
    },
    "qwen3-0.6b": {"qk_norm": True, "qkv_bias": False, "head_dim": 128, "tie_embeddings": True},
    "qwen3-coder-30b-a3b": {"ffn_size": 768, "qk_norm": True, "max_position": 262144},
    "qwen3-30b-a3b": {"ffn_size": 768, "num_experts": 128, "norm_expert_weights": True},
    "gemma-2-9b": {
        "attn_soft_cap": 50.0,
        "final_soft_cap": 30.0,
        "activation": "gelu_tanh",
        "tie_embeddings": True,
        "attn_scale": 1 / 16,
        "layer_windows": (4096, 0) * 21,
    },
    "gemma-3-1b": {
        "ropes": (RopeConfig(1e6, 256), RopeConfig(1e4, 256)),
        "attn_soft_cap": 0.0,
        "layer_ropes": (1, 1, 1, 1, 1, 0) * 4 + (1, 1),
    },
    "gemma-3-4b": {
        "vocab_size": 262208,
        "num_heads": 8,
        "num_kv_heads": 4,
        "max_position": 131072,
        "layer_windows": LOCAL_1024,
        "ropes": (RopeConfig(1e6, 256, "linear", factor=8.0), RopeConfig(1e4, 256)),
    },
    "phi-3-mini-4k": {"layer_windows": (2047,) * 32, "ropes": (RopeConfig(1e4, 96),)},
    "phi-4-mini": {"tie_embeddings": True, "layer_windows": (0,) * 32, "max_position": 131072},
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configs(name):
    config = config_from_hf(PUBLISHED[name])
    found = {field: getattr(config, field) for field in EXPECTED[name]}
    assert found == EXPECTED[name]


def test_keys_that_older_and_odd_configs_have():
    old = PUBLISHED["llama-2-7b"] | {"max_sequence_length": 2048}
    assert config_from_hf(old).max_position == 4096
    del old["max_position_embeddings"]
    assert config_from_hf(old).max_position == 2048
    assert config_from_hf(PUBLISHED["qwen3-0.6b"] | {"quantization_config": None})
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    scaling["attn_factor"] = 0.8782488562869419  # of DeepSeek-R1-0528-Qwen3-8B
    (rope,) = config_from_hf(PUBLISHED["qwen3-0.6b"] | {"rope_scaling": scaling}).ropes
    assert rope.attention_factor == pytest.approx(1.0)


def test_longrope_of_a_published_config():
    (rope,) = config_from_hf(PUBLISHED["phi-4-mini"]).ropes
    assert (rope.dim, rope.kind, rope.trained_len) == (96, "longrope", 4096)
    assert rope.attention_factor == pytest.approx(1.1902380714238083)
    assert rope.long_factors[2] == 1.250641126


def test_every_family_has_a_published_config_and_a_fixture():
    published = {config_from_hf(values).family for values in PUBLISHED.values()}
    tiny = {tiny_models.read_config(case).family for case in tiny_models.CASES}
    folder = pathlib.Path(config_module.__file__).parent / "families"
    families = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert published == tiny == families


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_unknown_keys_raise_with_their_names(name):
    values = PUBLISHED[name] | {"new_attention_trick": 3, "use_other_norm": True}
    with pytest.raises(ValueError, match="new_attention_trick = 3, use_other_norm = True"):
        config_from_hf(values)


def test_unknown_keys_of_a_text_config_raise():
    values = PUBLISHED["gemma-3-4b"]
    values = values | {"text_config": values["text_config"] | {"new_trick": 1}}
    with pytest.raises(ValueError, match="text_config.*new_trick"):
        config_from_hf(values)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama-2-7b", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported.*'silu'"),
        ("llama-2-7b", {"rope_scaling": {"type": "mrope"}}, "'mrope' is not supported.*llama3"),
        ("llama-2-7b", {"rope_scaling": {"type": "linear"}}, "needs 'factor'"),
        (
            "llama-2-7b",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "shape": "x"}},
            "rope settings.*shape = 'x'",
        ),
        (
            "qwen3-0.6b",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantized already, by 'gptq', .*: give the unquantized checkpoint",
        ),
        (
            "gemma-3-4b",
            {
                "text_config": PUBLISHED["gemma-3-4b"]["text_config"]
                | {"quantization_config": {1: 2}}
            },
            "text_config: quantization_config says that the weights are quantized already",
        ),
        ("qwen3-coder-30b-a3b", {"use_qk_norm": False}, "use_qk_norm = False is not supported"),
        ("qwen3-coder-30b-a3b", {"qkv_bias": True}, "qkv_bias = True is not supported"),
        (
            "qwen3-coder-30b-a3b",
            {"shared_expert_intermediate_size": 512},
            "shared_expert_intermediate_size = 512 is not supported",
        ),
        ("llama-2-7b", {"hidden_size": None}, "needs 'hidden_size'"),
        ("llama-2-7b", {"num_key_value_heads": 5}, "32 is not a multiple of num_kv_heads 5"),
        ("llama-2-7b", {"vocab_size": "many"}, "vocab_size is 'many'"),
        ("smollm2-135m-instruct", {"rope_interleaved": True}, "rope_interleaved = True"),
        ("smollm3-3b", {"no_rope_layers": [1, 0]}, "no_rope_layers.*must be 36"),
        ("qwen3-30b-a3b", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("gemma-3-1b", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma-3-1b", {"layer_types": ["chunked_attention"] * 26}, "chunked_attention"),
        ("phi-4-mini", {"lm_head_bias": True}, "lm_head_bias = True"),
        ("phi-4-mini", {"partial_rotary_factor": 0.5}, "short_factors has 48 values"),
    ],
)
def test_unsupported_values_raise_by_name(name, change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(PUBLISHED[name] | change)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"model_type": None},
    ],
)
def test_unknown_architectures_raise_with_the_known_ones(change):
    with pytest.raises(ValueError, match="not supported; supported: .*LlamaForCausalLM.*Qwen3"):
        config_from_hf(PUBLISHED["llama-2-7b"] | change)


def test_unknown_gguf_architectures_raise_with_the_known_ones():
    with pytest.raises(ValueError, match="'mamba' is not supported; supported: .*llama.*qwen3moe"):
        config_from_gguf({"general.architecture": "mamba"})


@pytest.mark.parametrize(
    ("case", "name", "canonical"),
    [
        ("llama", "lm_head.weight", "lm_head.weight"),
        ("llama_bias", "lm_head.weight", None),  # tied: a copy of the embedding
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("gemma3", "model.language_model.norm.weight", "model.norm.weight"),
        ("gemma3", "language_model.model.norm.weight", "model.norm.weight"),
        ("gemma3", "model.vision_tower.post_layernorm.weight", None),
        ("gemma3", "multi_modal_projector.mm_soft_emb_norm.weight", None),
        ("llama", "model.layers.0.novelty.weight", "model.layers.0.novelty.weight"),
        ("qwen3", "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("qwen3", "embed_tokens.weight", "model.embed_tokens.weight"),
        ("qwen3", "norm.weight", "model.norm.weight"),
    ],
)
def test_names_of_tensors_in_hugging_face_files(case, name, canonical):
    assert canonical_name(tiny_models.read_config(case), "hf", name) == canonical


def test_unknown_sources_of_weights_raise():
    with pytest.raises(ValueError, match="'onnx' is unknown; known: 'hf', 'gguf'"):
        key_map(tiny_models.read_config("llama"), "onnx")


def test_context_is_bounded_by_what_the_model_claims():
    config = config_from_hf(PUBLISHED["llama-2-7b"])
    assert config.with_context(4096).context_len == 4096
    for length in (0, 4097):
        with pytest.raises(ValueError, match=f"context length {length} must be 1..4096"):
            config.with_context(length)


def attribute_reads(*, skip: tuple[str, ...]) -> set[str]:
    """Names read as attributes anywhere in the package, but not in the given files of models/ or in
    a constructor's checks.
    """
    package = pathlib.Path(config_module.__file__).parent.parent
    names = set()
    for path in package.rglob("*.py"):
        if path.relative_to(package).as_posix().startswith(skip):
            continue
        tree = ast.parse(path.read_text())
        checks = [n for n in ast.walk(tree) if getattr(n, "name", "") == "__post_init__"]
        checked = {id(node) for check in checks for node in ast.walk(check)}
        names |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load)
            and id(node) not in checked
        }
    return names


def test_every_config_field_is_read():
    reads = attribute_reads(skip=("models/families/", "models/family.py", "models/reader.py"))
    for kind in (ModelConfig, RopeConfig):
        unread = [f.name for f in dataclasses.fields(kind) if f.name not in reads]
        assert not unread, f"{kind.__name__} has fields that nothing reads: {unread}"


def test_every_config_field_is_documented():
    for kind in (ModelConfig, RopeConfig):
        names = [field.name for field in dataclasses.fields(kind)]
        text = inspect.getdoc(kind)
        assert [name for name in names if f"\n  {name}: " in text] == names
