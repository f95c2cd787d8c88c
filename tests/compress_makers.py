"""A tiny random Llama with a tokenizer of bytes, and settings that compress it in seconds."""

import json
from collections.abc import Callable
from pathlib import Path

import checkpoint_makers as make
import numpy as np

from lepton_jax.compression import receipt as receipts
from lepton_jax.jobs.compress import write_receipt

VOCAB = 260
PROSE = Path(__file__).parent / "fixtures" / "parity" / "prose.txt"
RECEIPT = {"windows": 4, "window_tokens": 32, "prompts": 2, "new_tokens": 6, "repeats": 0}
CANDIDATES = ("weights=int8", "weights=int4 group=8")


def byte_alphabet() -> list[str]:
    """How GPT-2 spells each byte: the printable ones as they are, the others above 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in plain else next(others)) for b in range(256)]


def model_folder(
    folder: Path, *, seed: int = 0, layers: int = make.L, **changes: np.ndarray
) -> Path:
    """A Hugging Face directory; `changes` replaces arrays by the last parts of their names."""
    rng = np.random.default_rng(seed)
    arrays = {
        name: (rng.normal(size=a.shape) * 0.3).astype(np.float32)
        for name, a in make.hf_arrays().items()
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        arrays[name] = rng.normal(size=(VOCAB, make.D)).astype(np.float32)
    for name in arrays:
        if name.endswith("norm.weight"):
            arrays[name] = np.ones(make.D, np.float32)
    for ending, array in changes.items():
        name = next(n for n in arrays if n.replace(".", "_").endswith(f"{ending}_weight"))
        arrays[name] = array
    gone = tuple(f"model.layers.{number}." for number in range(layers, make.L))
    arrays = {name: array for name, array in arrays.items() if not name.startswith(gone)}
    make.hf_folder(folder, arrays, vocab_size=VOCAB, num_hidden_layers=layers)
    vocab = {character: number for number, character in enumerate(byte_alphabet())}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": False},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def edit_receipt(place: Path, change: Callable[[dict], object]) -> None:
    """Changes a receipt; its digest and its page follow, so that only numbers give it away."""
    receipt = receipts.read(place)
    change(receipt)
    write_receipt(place, receipt | {"digest": receipts.digest_line(receipt)})


def config_file(path: Path, **sections) -> Path:
    """A config for the driver, with quick measurements."""
    settings = {"receipt": RECEIPT, "engine": {"rows": 2, "page_size": 16}} | sections
    path.write_text(f"def get_config(arg=None):\n    return {settings!r}\n")
    return path
