"""Tokenizers as Hugging Face directories hold them: `tokenizer.json`, or a sentencepiece `.model`,
and their side files.

Side files, each optional: `tokenizer_config.json` (special tokens, flags, chat template),
`special_tokens_map.json`, `added_tokens.json`, `chat_template.jinja`,
`additional_chat_templates/*.jinja`, `generation_config.json` and `config.json` (end tokens). No
Python from the directory is run. Read `tokenizer.py` next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from lepton_jax.text.pieces import SPACE, Pieces, SpecialTokens, TokenizerError, TokenizerParts
from lepton_jax.text.spm import Marker, SpmEncoder, adds_prefix

# Classes whose add_bos_token / add_eos_token flags overrule what tokenizer.json does around a text.
_FLAGGED_CLASSES = ("LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer", "CohereTokenizer")


def parts_from_json(path: Path) -> TokenizerParts:
    """The tokenizer in the `tokenizer.json` at `path`, with the side files of its folder."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for whatever it can't read
        raise TokenizerError(f"{path} can't be read as a tokenizer.json: {error}") from error
    tokenizer.no_truncation()  # some files carry the lengths of their training run
    tokenizer.no_padding()
    config = _side_file(path, "tokenizer_config.json")
    added = tokenizer.get_added_tokens_decoder()
    control = frozenset(i for i, token in added.items() if token.special)
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    spelling, leading_space = _spelling(tokenizer, path)
    names = _names(path, config)
    bos_id = _optional(tokenizer.token_to_id, names.get("bos_token"))
    eos_id = _optional(tokenizer.token_to_id, names.get("eos_token"))
    prefix, suffix = _affixes(tokenizer, config, bos_id=bos_id, eos_id=eos_id)
    return TokenizerParts(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        pieces=Pieces(
            size, tokenizer.id_to_token, spelling, control, frozenset(added), leading_space
        ),
        special=SpecialTokens(
            bos_id if bos_id is not None or not prefix else prefix[0],
            _eos_ids(path, eos_id),
            prefix,
            suffix,
            names,
        ),
        templates=_templates(path, config),
    )


def parts_from_model(path: Path) -> TokenizerParts:
    """The tokenizer in the sentencepiece model at `path`, with the side files of its folder."""
    model = path.read_bytes()
    prefix = adds_prefix(model)
    config = _side_file(path, "tokenizer_config.json")
    processor = SentencePieceProcessor(model_proto=model)
    own = range(processor.get_piece_size())
    control = {i for i in own if processor.is_control(i) or processor.is_unknown(i)}
    markers = {processor.id_to_piece(i): Marker(i) for i in sorted(control)}
    for text, token_id in _side_file(path, "added_tokens.json").items():
        markers[text] = Marker(token_id)
    for token_id, token in config.get("added_tokens_decoder", {}).items():
        marker = Marker(int(token_id), token.get("lstrip", False), token.get("rstrip", False))
        markers[token["content"]] = marker
        control |= {marker.id} if token.get("special") else set()
    texts = {marker.id: text for text, marker in markers.items()}
    names = _names(path, config)
    ids = {text: marker.id for text, marker in markers.items()}
    bos_id = _optional(ids.get, names.get("bos_token"), default=processor.bos_id())
    eos_id = _optional(ids.get, names.get("eos_token"), default=processor.eos_id())
    add_bos = config.get("add_bos_token", True) and bos_id is not None
    scheme = "never" if not prefix else "each" if config.get("legacy", True) else "first"
    return TokenizerParts(
        encode=SpmEncoder(model, markers, prefix=scheme),
        pieces=Pieces(
            max(len(own), 1 + max(texts, default=-1)),
            lambda i: texts.get(i) or (processor.id_to_piece(i) if i in own else None),
            "sentencepiece",
            frozenset(control),
            leading_space=prefix,
        ),
        special=SpecialTokens(
            bos_id,
            _eos_ids(path, eos_id),
            (bos_id,) if add_bos else (),
            (eos_id,) if config.get("add_eos_token") and eos_id is not None else (),
            names,
        ),
        templates=_templates(path, config),
    )


def _spelling(tokenizer: Tokenizer, path: Path) -> tuple[str, bool]:
    """How vocabulary entries spell bytes and whether decoding drops a leading space, from the
    JSON's decoder.
    """
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {"type": None}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return "byte_level", False
    if "Metaspace" in kinds:
        return "sentencepiece", steps[kinds.index("Metaspace")]["prepend_scheme"] != "never"
    if any(step["type"] == "Replace" and step["pattern"] == {"String": SPACE} for step in steps):
        return "sentencepiece", any(s["type"] == "Strip" and s["start"] > 0 for s in steps)
    raise TokenizerError(
        f"{path}: its decoder is {' + '.join(map(str, kinds))}; supported: ByteLevel, Metaspace, "
        f"and sequences that replace {SPACE!r} by a space"
    )


def _affixes(
    tokenizer: Tokenizer, config: Mapping, *, bos_id: int | None, eos_id: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that go before and after a text: what the post-processor does, or the config's
    flags.
    """
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    start = starts[0] if starts else 0
    prefix, suffix = tuple(full[:start]), tuple(full[start + len(bare) :])
    if str(config.get("tokenizer_class", "")).removesuffix("Fast") not in _FLAGGED_CLASSES:
        return prefix, suffix
    if "add_bos_token" in config:
        prefix = (bos_id,) if config["add_bos_token"] and bos_id is not None else ()
    if "add_eos_token" in config:
        suffix = (eos_id,) if config["add_eos_token"] and eos_id is not None else ()
    return prefix, suffix


def _names(path: Path, config: Mapping) -> dict[str, str]:
    """Special tokens by name; the config counts before the older special_tokens_map.json."""
    values = _side_file(path, "special_tokens_map.json") | {k: v for k, v in config.items() if v}
    texts = {
        name: value.get("content") if isinstance(value, Mapping) else value
        for name, value in values.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _eos_ids(path: Path, eos_id: int | None) -> tuple[int, ...]:
    """End tokens: those of generation_config.json (of config.json if it names none), and the
    tokenizer's own.
    """
    for name in ("generation_config.json", "config.json"):
        found = _side_file(path, name).get("eos_token_id")
        if found is not None:
            break
    listed = found if isinstance(found, list) else [found]
    return tuple(dict.fromkeys(i for i in [*listed, eos_id] if i is not None))


def _templates(path: Path, config: Mapping) -> dict[str, str]:
    """Chat templates by name: files count before the config's entry, as in transformers."""
    found = config.get("chat_template") or {}
    if isinstance(found, str):
        found = {"default": found}
    elif isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    files = {"default": path.parent / "chat_template.jinja"}
    extra = path.parent / "additional_chat_templates"
    files |= {file.stem: file for file in sorted(extra.glob("*.jinja"))}
    return found | {name: f.read_text("utf-8") for name, f in files.items() if f.is_file()}


def _side_file(path: Path, name: str) -> dict:
    """The JSON object `name` beside `path`; {} if there is no such file."""
    file = path.parent / name
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} holds a {type(content).__name__}; a JSON object is needed")
    return content


def _optional(lookup, text: str | None, *, default: int = -1) -> int | None:
    found = lookup(text) if text is not None else None
    found = default if found is None else found
    return found if found >= 0 else None
