"""Makes tiny checkpoints of one random Llama in every format, for tests of `checkpoints/`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import gguf
import ml_dtypes
import numpy as np

V, L, D, F, N, K, H = 48, 2, 32, 64, 4, 2, 8


def _hf_sizes() -> dict[str, int]:
    return {
        "vocab_size": V,
        "num_hidden_layers": L,
        "hidden_size": D,
        "intermediate_size": F,
        "num_attention_heads": N,
        "num_key_value_heads": K,
    }


HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **_hf_sizes(),
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_KINDS = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.int64): "I64"}
_KINDS[np.dtype(ml_dtypes.bfloat16)] = "BF16"


def hf_arrays(dtype=np.float32) -> dict[str, np.ndarray]:
    """The weights under their Hugging Face names; all values are exact in bfloat16."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    shapes["lm_head.weight"] = (V, D)
    for i in range(L):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (D,),
            layer + "post_attention_layernorm.weight": (D,),
            layer + "self_attn.q_proj.weight": (N * H, D),
            layer + "self_attn.k_proj.weight": (K * H, D),
            layer + "self_attn.v_proj.weight": (K * H, D),
            layer + "self_attn.o_proj.weight": (D, N * H),
            layer + "mlp.gate_proj.weight": (F, D),
            layer + "mlp.up_proj.weight": (F, D),
            layer + "mlp.down_proj.weight": (D, F),
        }
    return {
        name: (rng.integers(-127, 128, shape) / 128).astype(dtype) for name, shape in shapes.items()
    }


@contextlib.contextmanager
def medium_sized() -> Iterator[dict[str, int]]:
    """Meanwhile `hf_arrays` gives 72 million weights; the keys that HF_CONFIG needs for them."""
    medium = {"V": 32000, "L": 10, "D": 512, "F": 2048, "N": 8, "K": 4, "H": 64}
    with mock.patch.dict(globals(), medium):
        yield _hf_sizes()


def safetensors_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """A safetensors file, written by hand."""
    header, end = {}, 0
    for name, array in arrays.items():
        offsets = [end, end + array.nbytes]
        header[name] = {
            "dtype": _KINDS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": offsets,
        }
        end += array.nbytes
    return with_header(header, b"".join(array.tobytes() for array in arrays.values()))


def with_header(header, data: bytes) -> bytes:
    """A safetensors file of a header (JSON value or bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def hf_folder(folder: Path, arrays: dict[str, np.ndarray] | None = None, **config) -> Path:
    """A Hugging Face directory; `config` changes keys of HF_CONFIG."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | config))
    arrays = hf_arrays() if arrays is None else arrays
    (folder / "model.safetensors").write_bytes(safetensors_bytes(arrays))
    (folder / "tokenizer.json").write_text('{"kept": true}')
    return folder


def sharded_folder(folder: Path, arrays: dict[str, np.ndarray], shards: int = 2, **config) -> Path:
    """The same with the weights in several files and their index."""
    hf_folder(folder, arrays, **config)
    (folder / "model.safetensors").unlink()
    names, weight_map = list(arrays), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: arrays[name] for name in names[i::shards]}
        (folder / file).write_bytes(safetensors_bytes(part))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _interleaved(rows: np.ndarray) -> np.ndarray:
    """Rows of q and k as GGUF's llama stores them: halves of a head become neighbours."""
    heads = rows.reshape(-1, 2, H // 2, *rows.shape[1:])
    return np.swapaxes(heads, 1, 2).reshape(rows.shape)


def gguf_file(path: Path, kind: str = "F32", **metadata: int) -> Path:
    """The same model as GGUF, its matrices as `kind`; `metadata` adds numbers by key."""
    short = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    short |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    short |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outer = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    outer["model.norm.weight"] = "output_norm.weight"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(L)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(V)])
    writer.add_eos_token_id(2)
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, array in hf_arrays().items():
        parts = name.split(".")
        ours = outer.get(name) or f"blk.{parts[2]}.{short[parts[-2]]}.weight"
        if "attn_q" in ours or "attn_k" in ours:
            array = _interleaved(array)
        kind_id = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        data = gguf.quantize(array, kind_id)
        raw = None if kind_id in (0, 1) else kind_id
        writer.add_tensor(ours, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
