"""GGUF metadata and names give the same models as the Hugging Face files they were converted from.

The tiny fixtures are converted here as llama.cpp's converter does it: names by the gguf package's
own table, q and k rows reordered for the llama architecture, Gemma's norms plus one, experts
stacked.
"""

import dataclasses
import re

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from lepton_jax.models.build import abstract_model
from lepton_jax.models.keymap import expand
from lepton_jax.models.registry import config_from_gguf, key_map
from lepton_jax.models.rope import frequencies, rope_table

ARCHITECTURES = {
    "llama": "llama",
    "llama_llama3": "llama",
    "llama_linear": "llama",
    "llama_yarn": "llama",
    "smollm3": "smollm3",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "phi3_long": "phi3",
}
# What GGUF can't say or what the fixtures choose differently from every released model.
RESTORED = {
    "smollm3": ("layer_windows",),
    "qwen2": ("layer_windows",),
    "qwen3_moe": ("norm_expert_weights",),
    "gemma2": ("attn_scale",),
    "gemma3": ("attn_scale",),
}


def gguf_arrays(case, config, architecture):
    """The case's weights under their GGUF names."""
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, config.num_layers)
    arrays, experts = {}, {}
    for name, array in tiny_models.hf_arrays(case, config).items():
        if architecture in ("llama", "smollm3") and re.search(r"[qk]_proj", name):
            array = interleaved(array, config.head_dim)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if expert:
            merged = f"{expert[1]}.{expert[3]}.weight"
            experts.setdefault(merged, {})[int(expert[2])] = array
        else:
            arrays[table.get_name(name, (".weight", ".bias"))] = array
    for name, parts in experts.items():
        stacked = np.stack([parts[e] for e in range(len(parts))])
        arrays[table.get_name(name, (".weight",))] = stacked
    return arrays | rope_tensors(case, config)


def interleaved(array, head_dim):
    """Rows of each head from halves to neighbouring pairs, as converters of Llama models do."""
    heads = array.shape[0] // head_dim
    return array.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)


def rope_tensors(case, config):
    rope = config.ropes[0]
    if rope.kind == "llama3":
        plain = rope.theta ** -(np.arange(0, rope.dim, 2) / rope.dim)
        return {"rope_freqs.weight": (plain / frequencies(rope)).astype(np.float32)}
    if rope.kind == "longrope":
        return {
            "rope_factors_short.weight": np.asarray(rope.short_factors, np.float32),
            "rope_factors_long.weight": np.asarray(rope.long_factors, np.float32),
        }
    return {}


def metadata(case, config, architecture):
    """The case's key-value pairs, as the converters write them."""
    rope = config.ropes[0]
    own = {
        gguf.Keys.LLM.BLOCK_COUNT: config.num_layers,
        gguf.Keys.LLM.CONTEXT_LENGTH: config.max_position,
        gguf.Keys.LLM.EMBEDDING_LENGTH: config.hidden_size,
        gguf.Keys.LLM.FEED_FORWARD_LENGTH: config.ffn_size,
        gguf.Keys.Attention.HEAD_COUNT: config.num_heads,
        gguf.Keys.Attention.HEAD_COUNT_KV: config.num_kv_heads,
        gguf.Keys.Attention.LAYERNORM_RMS_EPS: config.norm_eps,
        gguf.Keys.Attention.KEY_LENGTH: config.head_dim,
        gguf.Keys.Attention.VALUE_LENGTH: config.head_dim,
        gguf.Keys.Rope.FREQ_BASE: rope.theta,
        gguf.Keys.Rope.DIMENSION_COUNT: rope.dim,
    }
    window = max(config.layer_windows)
    if window and architecture not in ("qwen2", "smollm3"):
        own[gguf.Keys.Attention.SLIDING_WINDOW] = window
    if architecture == "gemma3":
        own[gguf.Keys.Attention.SLIDING_WINDOW_PATTERN] = 2
    if config.attn_soft_cap:
        own[gguf.Keys.LLM.ATTN_LOGIT_SOFTCAPPING] = config.attn_soft_cap
        own[gguf.Keys.LLM.FINAL_LOGIT_SOFTCAPPING] = config.final_soft_cap
    if config.num_experts:
        own[gguf.Keys.LLM.EXPERT_COUNT] = config.num_experts
        own[gguf.Keys.LLM.EXPERT_USED_COUNT] = config.experts_per_token
    if architecture == "qwen3moe":
        own[gguf.Keys.LLM.FEED_FORWARD_LENGTH] = 7 * config.ffn_size
        own[gguf.Keys.LLM.EXPERT_FEED_FORWARD_LENGTH] = config.ffn_size
    if rope.kind in ("linear", "yarn"):
        own[gguf.Keys.Rope.SCALING_TYPE] = rope.kind
        own[gguf.Keys.Rope.SCALING_FACTOR] = rope.factor
    if rope.kind in ("yarn", "longrope"):
        own[gguf.Keys.Rope.SCALING_ORIG_CTX_LEN] = rope.trained_len
    if rope.kind == "longrope":
        own[gguf.Keys.Rope.SCALING_ATTN_FACTOR] = rope.attention_factor
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(config.vocab_size)],
        **{key.format(arch=architecture): value for key, value in own.items()},
    }


def converted(case):
    """(fixture, config from the metadata, arrays)."""
    tiny, architecture = tiny_models.load(case), ARCHITECTURES[case]
    arrays = gguf_arrays(case, tiny.config, architecture)
    config = config_from_gguf(metadata(case, tiny.config, architecture), arrays)
    if tiny.config.context_len:
        config = config.with_context(tiny.config.context_len)
    return tiny, config, arrays


def matched(tiny, config, case):
    """The GGUF config with the fixture's settings where RESTORED says so."""
    names = RESTORED.get(case, ())
    return dataclasses.replace(config, **{name: getattr(tiny.config, name) for name in names})


@pytest.mark.parametrize("case", sorted(set(ARCHITECTURES) - {"llama_yarn"}))
def test_gguf_gives_the_logits_of_transformers(case):
    tiny, config, arrays = converted(case)
    config = matched(tiny, config, case)
    leaves = tiny_models.combine(config, "gguf", arrays)
    found = tiny_models.run(config, leaves, tiny.ids)
    np.testing.assert_allclose(found, tiny.expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("case", sorted(ARCHITECTURES))
def test_gguf_leaves_and_config_equal_those_of_hugging_face(case):
    tiny, config, arrays = converted(case)
    leaves = tiny_models.combine(config, "gguf", arrays)
    assert set(leaves) - set(tiny.leaves) <= {"rope_factors"}
    for path, leaf in tiny.leaves.items():
        np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)
    found = matched(tiny, config, case)
    for field in dataclasses.fields(found):
        if field.name not in ("family", "ropes", "rope_factor_sets"):
            assert getattr(found, field.name) == getattr(tiny.config, field.name), field.name


def test_yarn_of_gguf_is_yarn_with_default_betas():
    tiny, config, _ = converted("llama_yarn")
    (rope,) = tiny.config.ropes
    assert config.ropes == (dataclasses.replace(rope, beta_fast=32.0, beta_slow=1.0),)
    assert config.max_position == 128
    values = metadata("llama_yarn", tiny.config, "llama")
    own = {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "attn_factor": 0.5}
    values |= {f"llama.rope.scaling.yarn_{name}": value for name, value in own.items()}
    (found,) = config_from_gguf(values, ["output.weight"]).ropes
    assert found == dataclasses.replace(rope, attention_factor=0.5 * rope.attention_factor)


def test_what_embedding_and_coder_models_say_is_read():
    values = metadata("qwen3", tiny_models.read_config("qwen3"), "qwen3") | {
        "qwen3.pooling_type": 3
    }
    assert config_from_gguf(values).family == "qwen3"
    values = metadata("qwen3_moe", tiny_models.read_config("qwen3_moe"), "qwen3moe")
    name = "qwen3moe.expert_shared_feed_forward_length"
    assert config_from_gguf(values | {name: 0}).num_experts
    with pytest.raises(ValueError, match="expert_shared_feed_forward_length = 512 is not"):
        config_from_gguf(values | {name: 512})


def test_rope_factor_tensors_equal_the_formula():
    tiny, config, arrays = converted("llama_llama3")
    positions = jnp.arange(40)
    leaves = tiny_models.combine(config, "gguf", arrays)
    found = rope_table(config.ropes[0], positions, factors=jnp.asarray(leaves["rope_factors"]))
    np.testing.assert_allclose(found, rope_table(tiny.config.ropes[0], positions), atol=2e-5)


def test_unknown_metadata_raises_by_name():
    config = tiny_models.read_config("llama")
    values = metadata("llama", config, "llama") | {"llama.new_trick": 2}
    with pytest.raises(ValueError, match="GGUF llama.*new_trick = 2"):
        config_from_gguf(values, ["output.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.rope.scaling.type": "su"}, "rope.scaling.type = 'su' is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "without rope_factors tensors"),
        ({"llama.attention.value_length": 4}, "value_length 4 differs from key_length 16"),
        ({"llama.attention.head_count_kv": [2, 1, 2]}, "must be one positive whole number"),
        ({"llama.block_count": None}, "needs 'block_count'"),
    ],
)
def test_unsupported_metadata_raises_by_name(change, message):
    values = metadata("llama", tiny_models.read_config("llama"), "llama") | change
    with pytest.raises(ValueError, match=message):
        config_from_gguf(values, ["output.weight"])


@pytest.mark.parametrize("change", [{"scaling.factor": 4.0}, {"scaling.type": "yarn"}])
def test_rope_factor_tensors_leave_nothing_else_to_scale(change):
    values = metadata("llama", tiny_models.read_config("llama"), "llama")
    assert config_from_gguf(values, ["rope_freqs.weight"]).rope_factor_sets == 1
    values |= {f"llama.rope.{name}": value for name, value in change.items()}
    with pytest.raises(ValueError, match="RoPE factor tensors together with rope.scaling.type"):
        config_from_gguf(values, ["rope_freqs.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["smollm2_path", "gemma3_path"])
def test_real_files_resolve_every_name_and_shape(fixture, request):
    reader = gguf.GGUFReader(request.getfixturevalue(fixture))
    sizes = {tensor.name: tuple(map(int, tensor.shape[::-1])) for tensor in reader.tensors}
    values = {name: field.contents() for name, field in reader.fields.items()}
    config = config_from_gguf(values, sizes)
    model = abstract_model(config, jnp.bfloat16, jnp.bfloat16)
    mappings = expand(key_map(config, "gguf"), config)
    assert sorted(mapping.target for mapping in mappings) == sorted(model.specs)
    assert sorted(name for m in mappings for name in m.sources) == sorted(sizes)
    for mapping in mappings:
        arrays = (np.zeros(sizes[name], np.int8) for name in mapping.sources)
        assert mapping.combine(config, *arrays).shape == model.specs[mapping.target].shape
