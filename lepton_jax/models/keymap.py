"""How arrays of a checkpoint become our parameters, as data.

A `Mapping` names one of our paths, the file's arrays that it is made of, and the numpy function
that combines them and undoes the file's quirks. The two base lists name the weights as Hugging Face
and as GGUF do; families edit them. Files are read by `lepton_jax/checkpoints`, which also raises on
missing, doubled and left-over names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from lepton_jax.models.config import ModelConfig


@dataclass(frozen=True)
class Mapping:
    """One parameter (per layer) and the arrays that it is made of.

    Attributes:
      target: our path; `{i}` stands for every layer.
      sources: names in the file; `{e}` stands for every expert.
      combine: `(config, *arrays) -> array`, arrays in the order of the expanded sources: each
        source with `{e}` gives its E experts in order before the next source begins.
    """

    target: str
    sources: tuple[str, ...]
    combine: Callable[..., np.ndarray]


def expand(mappings: Iterable[Mapping], config: ModelConfig) -> list[Mapping]:
    """The mappings with every layer and expert spelled out: no `{i}` or `{e}` is left."""
    result = []
    for mapping in mappings:
        layers = range(config.num_layers) if "{i}" in mapping.target else (0,)
        for i in layers:
            sources = tuple(
                source.replace("{i}", str(i)).replace("{e}", str(e))
                for source in mapping.sources
                for e in (range(config.num_experts) if "{e}" in source else (0,))
            )
            target = mapping.target.replace("{i}", str(i))
            result.append(dataclasses.replace(mapping, target=target, sources=sources))
    return result


def as_is(config: ModelConfig, array: np.ndarray) -> np.ndarray:
    """The array itself."""
    del config
    return array


def plus_one(config: ModelConfig, array: np.ndarray) -> np.ndarray:
    """A norm scale stored minus one; in float32, so that small weights keep their bits."""
    del config
    return array.astype(np.float32) + np.float32(1)


def join_qkv(config: ModelConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """q `[N*H, ...]`, k and v `[K*H, ...]` as `[K, J, H, ...]`: weights `[..., D]` or biases."""
    K, G, H, rest = config.num_kv_heads, config.group, config.head_dim, q.shape[1:]
    parts = [q.reshape(K, G, H, *rest), k.reshape(K, 1, H, *rest), v.reshape(K, 1, H, *rest)]
    return np.concatenate(parts, axis=1)


def join_interleaved_qkv(
    config: ModelConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """As `join_qkv`, for files whose q and k rows are ordered for RoPE on neighbouring pairs."""
    return join_qkv(config, _halves_first(config, q), _halves_first(config, k), v)


def split_qkv(config: ModelConfig, qkv: np.ndarray) -> np.ndarray:
    """One array of q, k and v below each other, `[(N+2K)*H, ...]`, as `[K, J, H, ...]`."""
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return join_qkv(config, *np.split(qkv, [q_rows, q_rows + kv_rows]))


def stack(config: ModelConfig, *arrays: np.ndarray) -> np.ndarray:
    """Arrays of one shape as a new leading axis: gate and up, or experts."""
    del config
    return np.stack(arrays)


def split_gate_up(config: ModelConfig, gate_up: np.ndarray) -> np.ndarray:
    """Gate above up, `[2F, D]`, as `[2, F, D]`."""
    return gate_up.reshape(2, config.ffn_size, -1)


def join_expert_gate_up(config: ModelConfig, *arrays: np.ndarray) -> np.ndarray:
    """E gates, then E ups, each `[F, D]`, as `[E, 2, F, D]`."""
    E = config.num_experts
    return np.stack(
        [half for pair in zip(arrays[:E], arrays[E:], strict=True) for half in pair]
    ).reshape(E, 2, *arrays[0].shape)


def join_stacked_gate_up(config: ModelConfig, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """All gates and all ups, each `[E, F, D]`, as `[E, 2, F, D]`."""
    del config
    return np.stack([gate, up], axis=1)


def _halves_first(config: ModelConfig, rows: np.ndarray) -> np.ndarray:
    """Rows of each head from (0, H/2, 1, H/2+1, ...) back to (0, 1, ..., H-1)."""
    pairs = rows.reshape(-1, config.head_dim // 2, 2, *rows.shape[1:])
    return np.swapaxes(pairs, 1, 2).reshape(rows.shape)


def hf_base(config: ModelConfig, norm: Callable[..., np.ndarray] = as_is) -> list[Mapping]:
    """The names of a Llama-like Hugging Face checkpoint; `norm` undoes how scales are stored."""
    return hf_attention(config, norm) + hf_ffn(config)


def hf_attention(config: ModelConfig, norm: Callable[..., np.ndarray] = as_is) -> list[Mapping]:
    """All but the ffn, with the optional parts that the config has."""
    attention, layer = "model.layers.{i}.self_attn.", "model.layers.{i}."

    def projections(kind: str) -> tuple[str, ...]:
        return tuple(f"{attention}{name}_proj.{kind}" for name in "qkv")

    maps = [
        Mapping("embed", ("model.embed_tokens.weight",), as_is),
        Mapping("layers.{i}.attn_norm", (layer + "input_layernorm.weight",), norm),
        Mapping("layers.{i}.qkv", projections("weight"), join_qkv),
        Mapping("layers.{i}.out", (attention + "o_proj.weight",), as_is),
        Mapping("layers.{i}.ffn_norm", (layer + "post_attention_layernorm.weight",), norm),
        Mapping("final_norm", ("model.norm.weight",), norm),
    ]
    if config.qkv_bias:
        maps.append(Mapping("layers.{i}.qkv_bias", projections("bias"), join_qkv))
    if config.out_bias:
        maps.append(Mapping("layers.{i}.out_bias", (attention + "o_proj.bias",), as_is))
    if config.qk_norm:
        maps += [
            Mapping(f"layers.{{i}}.{x}_norm", (f"{attention}{x}_norm.weight",), norm) for x in "qk"
        ]
    if config.head_path == "head":
        maps.append(Mapping("head", ("lm_head.weight",), as_is))
    return maps


def hf_ffn(config: ModelConfig) -> list[Mapping]:
    """The ffn of a Llama-like Hugging Face checkpoint: dense, or experts below `mlp`."""
    mlp, path = "model.layers.{i}.mlp.", "layers.{i}."
    if config.num_experts:
        return hf_experts(mlp, ("gate_proj", "up_proj", "down_proj"))
    pair = ("gate_proj", "up_proj")
    maps = [
        Mapping(path + "gate_up", tuple(f"{mlp}{name}.weight" for name in pair), stack),
        Mapping(path + "down", (mlp + "down_proj.weight",), as_is),
    ]
    if config.ffn_bias:
        maps += [
            Mapping(path + "gate_up_bias", tuple(f"{mlp}{name}.bias" for name in pair), stack),
            Mapping(path + "down_bias", (mlp + "down_proj.bias",), as_is),
        ]
    return maps


def hf_experts(block: str, names: tuple[str, str, str]) -> list[Mapping]:
    """Router and experts below `block`; names of an expert's gate, up and down."""
    gate, up, down = (f"{block}experts.{{e}}.{name}.weight" for name in names)
    return [
        Mapping("layers.{i}.router", (block + "gate.weight",), as_is),
        Mapping("layers.{i}.experts_gate_up", (gate, up), join_expert_gate_up),
        Mapping("layers.{i}.experts_down", (down,), stack),
    ]


def gguf_base(config: ModelConfig, qkv: Callable[..., np.ndarray] = join_qkv) -> list[Mapping]:
    """The names of a GGUF file; `qkv` joins the projections."""
    block, path = "blk.{i}.", "layers.{i}."

    def projections(kind: str) -> tuple[str, ...]:
        return tuple(f"{block}attn_{name}.{kind}" for name in "qkv")

    maps = [
        Mapping("embed", ("token_embd.weight",), as_is),
        Mapping(path + "attn_norm", (block + "attn_norm.weight",), as_is),
        Mapping(path + "qkv", projections("weight"), qkv),
        Mapping(path + "out", (block + "attn_output.weight",), as_is),
        Mapping(path + "ffn_norm", (block + "ffn_norm.weight",), as_is),
        Mapping("final_norm", ("output_norm.weight",), as_is),
    ]
    if config.qkv_bias:
        maps.append(Mapping(path + "qkv_bias", projections("bias"), qkv))
    if config.out_bias:
        maps.append(Mapping(path + "out_bias", (block + "attn_output.bias",), as_is))
    if config.qk_norm:
        maps += [Mapping(f"{path}{x}_norm", (f"{block}attn_{x}_norm.weight",), as_is) for x in "qk"]
    if config.post_norms:
        names = {"attn_post_norm": "post_attention_norm", "ffn_post_norm": "post_ffw_norm"}
        maps += [
            Mapping(path + ours, (f"{block}{name}.weight",), as_is) for ours, name in names.items()
        ]
    if config.head_path == "head":
        maps.append(Mapping("head", ("output.weight",), as_is))
    return maps + gguf_rope_factors(config) + gguf_ffn(config)


def gguf_rope_factors(config: ModelConfig) -> list[Mapping]:
    """The RoPE divisors that some GGUF files carry as tensors."""
    if config.rope_factor_sets == 2:
        names = ("rope_factors_short.weight", "rope_factors_long.weight")
        return [Mapping("rope_factors", names, stack)]
    if config.rope_factor_sets == 1:
        return [Mapping("rope_factors", ("rope_freqs.weight",), stack)]
    return []


def gguf_ffn(config: ModelConfig) -> list[Mapping]:
    """The ffn of a GGUF file: dense, or experts stacked in one tensor each."""
    block, path = "blk.{i}.ffn_", "layers.{i}."
    if config.num_experts:
        pair = (block + "gate_exps.weight", block + "up_exps.weight")
        return [
            Mapping(path + "router", (block + "gate_inp.weight",), as_is),
            Mapping(path + "experts_gate_up", pair, join_stacked_gate_up),
            Mapping(path + "experts_down", (block + "down_exps.weight",), as_is),
        ]
    maps = [
        Mapping(path + "gate_up", (block + "gate.weight", block + "up.weight"), stack),
        Mapping(path + "down", (block + "down.weight",), as_is),
    ]
    if config.ffn_bias:
        maps += [
            Mapping(path + "gate_up_bias", (block + "gate.bias", block + "up.bias"), stack),
            Mapping(path + "down_bias", (block + "down.bias",), as_is),
        ]
    return maps
