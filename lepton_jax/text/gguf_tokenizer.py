"""A tokenizer rebuilt from GGUF metadata, given as a dict of plain Python values.

Two kinds of vocabulary are known: byte-level BPE (`tokenizer.ggml.model = gpt2`), rebuilt with the
`tokenizers` library, and sentencepiece (`llama`: Llama 1 and 2, Mistral 7B, Gemma, Phi-3), rebuilt
with the sentencepiece library. Others are refused by name. `gguf_metadata.py` reads the dict from a
file; `pretokenizers.py` holds the cuts. Keys:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from lepton_jax.text.pieces import Pieces, SpecialTokens, TokenizerError, TokenizerParts
from lepton_jax.text.pretokenizers import pre_tokenizer
from lepton_jax.text.spm import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Marker,
    SpmEncoder,
    escape_spaces,
    model_from_pieces,
)

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# Files name one end token, yet chat models may end a turn with another; these texts say so wherever
# they are control tokens. llama.cpp goes by such a list too.
_END_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
_PHI3_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")


def parts_from_metadata(metadata: Mapping[str, object]) -> TokenizerParts:
    """The tokenizer described by `metadata`; raises `TokenizerError` naming the key that is missing
    or unknown.
    """
    kind = _get(metadata, "model", str)
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece}
    if kind not in builders:
        raise TokenizerError(
            f"{_PREFIX}model is {kind!r}; supported: {', '.join(sorted(builders))}"
        )
    tokens, types = _vocabulary(metadata)
    return builders[kind](metadata, tokens, types)


def _byte_level_bpe(metadata: Mapping, tokens: list[str], types: list[int]) -> TokenizerParts:
    cut = pre_tokenizer(metadata.get(_PREFIX + "pre"))
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [_pair(merge, i) for i, merge in enumerate(_list(metadata, "merges", str))]
    try:
        model = BPE(vocab=vocabulary, merges=merges, ignore_merges=cut.ignore_merges)
    except (
        Exception
    ) as error:  # the library raises a bare Exception for a merge outside the vocabulary
        raise TokenizerError(f"{_PREFIX}merges don't fit {_PREFIX}tokens: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = cut.build()
    if cut.nfc:
        tokenizer.normalizer = cut.normalizer()
    control = _of_type(types, CONTROL, UNKNOWN)
    added = _of_type(types, USER_DEFINED)
    tokenizer.add_special_tokens([_added(tokens[i], special=True) for i in sorted(control)])
    tokenizer.add_tokens([_added(tokens[i], special=False) for i in sorted(added)])
    return TokenizerParts(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        pieces=Pieces(len(tokens), tokens.__getitem__, "byte_level", control, control | added),
        special=_special_tokens(metadata, tokens, control, add_bos=cut.add_bos),
        templates=_templates(metadata),
    )


def _sentencepiece(metadata: Mapping, tokens: list[str], types: list[int]) -> TokenizerParts:
    scores = _list(metadata, "scores", (int, float))
    if len(scores) != len(tokens):
        raise TokenizerError(f"{_PREFIX}scores has {len(scores)} values for {len(tokens)} tokens")
    prefix = bool(metadata.get(_PREFIX + "add_space_prefix", True))
    unknown_id = metadata.get(_PREFIX + "unknown_token_id", 0)
    spelled = escape_spaces(tokens, types)
    model = model_from_pieces(spelled, scores, types, prefix=prefix, unknown_id=unknown_id)
    control = _of_type(types, CONTROL, UNKNOWN) | {unknown_id}
    # With a space prefix each stretch between special tokens gets its own, so user-defined ones cut
    # too; without one the library finds them itself.
    cutting = control | _of_type(types, USER_DEFINED) if prefix else control
    strips = metadata.get("general.architecture") == "phi3"
    markers = {
        tokens[i]: Marker(i, rstrip=strips and tokens[i] not in _PHI3_KEEPS_SPACE) for i in cutting
    }
    return TokenizerParts(
        encode=SpmEncoder(model, markers, prefix="each" if prefix else "never"),
        pieces=Pieces(
            len(tokens), tokens.__getitem__, "sentencepiece", control, leading_space=prefix
        ),
        special=_special_tokens(
            {_PREFIX + "bos_token_id": 1, _PREFIX + "eos_token_id": 2, **metadata},
            tokens,
            control,
            add_bos=True,
        ),
        templates=_templates(metadata),
    )


def _vocabulary(metadata: Mapping) -> tuple[list[str], list[int]]:
    """Tokens and their types; an empty token, which no text can produce, gets a unique
    placeholder.
    """
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(_list(metadata, "tokens", str))]
    if not tokens:
        raise TokenizerError(f"{_PREFIX}tokens is empty: the file holds no vocabulary")
    if len(set(tokens)) != len(tokens):
        raise TokenizerError(f"{_PREFIX}tokens holds {len(tokens) - len(set(tokens))} duplicates")
    if metadata.get(_PREFIX + "token_type") is None:
        return tokens, [NORMAL] * len(tokens)
    types = [kind or NORMAL for kind in _list(metadata, "token_type", int)]  # 0: undefined
    if len(types) != len(tokens):
        raise TokenizerError(
            f"{_PREFIX}token_type has {len(types)} values for {len(tokens)} tokens"
        )
    odd = next((i for i, kind in enumerate(types) if not NORMAL <= kind <= BYTE), None)
    if odd is not None:
        raise TokenizerError(
            f"{_PREFIX}token_type[{odd}] is {types[odd]}; known types are 0 to {BYTE}"
        )
    return tokens, types


def _special_tokens(
    metadata: Mapping, tokens: list[str], control: frozenset[int], *, add_bos: bool
) -> SpecialTokens:
    ids = {name: _token_id(metadata, name, len(tokens)) for name in ("bos", "eos", "eot", "eom")}
    named = [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]
    ends = [i for i in sorted(control) if tokens[i] in _END_TEXTS]
    prefix = _affix(metadata, "add_bos_token", ids["bos"], default=add_bos)
    suffix = _affix(metadata, "add_eos_token", ids["eos"], default=False)
    names = {"bos_token": ids["bos"], "eos_token": ids["eos"]}
    names["unk_token"] = _token_id(metadata, "unknown", len(tokens))
    names["pad_token"] = _token_id(metadata, "padding", len(tokens))
    return SpecialTokens(
        bos_id=ids["bos"],
        eos_ids=tuple(dict.fromkeys(named + ends)),
        prefix=prefix,
        suffix=suffix,
        names={name: tokens[i] for name, i in names.items() if i is not None},
    )


def _affix(metadata: Mapping, flag: str, token_id: int | None, *, default: bool) -> tuple[int, ...]:
    if not metadata.get(_PREFIX + flag, default):
        return ()
    if token_id is None:
        raise TokenizerError(
            f"{_PREFIX}{flag} is set, but the file doesn't say which token that is"
        )
    return (token_id,)


def _token_id(metadata: Mapping, name: str, size: int) -> int | None:
    key = f"{_PREFIX}{name}_token_id"
    token_id = metadata.get(key)
    if token_id is not None and not (isinstance(token_id, int) and 0 <= token_id < size):
        raise TokenizerError(f"{key} is {token_id!r}; ids go from 0 to {size - 1}")
    return token_id


def _templates(metadata: Mapping) -> dict[str, str]:
    named = {
        key.removeprefix(_TEMPLATE + "."): value
        for key, value in metadata.items()
        if key.startswith(_TEMPLATE + ".") and isinstance(value, str)
    }
    default = metadata.get(_TEMPLATE)
    return named | ({"default": default} if isinstance(default, str) else {})


def _get(metadata: Mapping, name: str, kind: type):
    value = metadata.get(_PREFIX + name)
    if not isinstance(value, kind):
        found = "is missing" if value is None else f"is a {type(value).__name__}"
        raise TokenizerError(f"{_PREFIX}{name} {found}; a {kind.__name__} is needed")
    return value


def _list(metadata: Mapping, name: str, kind: type | tuple[type, ...]) -> list:
    values = _get(metadata, name, list)
    odd = next((i for i, value in enumerate(values) if not isinstance(value, kind)), None)
    if odd is not None:
        needed = kind.__name__ if isinstance(kind, type) else "number"
        raise TokenizerError(f"{_PREFIX}{name}[{odd}] is {values[odd]!r}; a {needed} is needed")
    return values


def _pair(merge: str, place: int) -> tuple[str, str]:
    # The left half is never empty, and may itself begin with the space that parts the halves.
    cut = merge.find(" ", 1)
    if cut < 0:
        raise TokenizerError(
            f"{_PREFIX}merges[{place}] is {merge!r}; two parts with a space are needed"
        )
    return merge[:cut], merge[cut + 1 :]


def _of_type(types: list[int], *kinds: int) -> frozenset[int]:
    return frozenset(i for i, kind in enumerate(types) if kind in kinds)


def _added(text: str, *, special: bool) -> AddedToken:
    return AddedToken(text, special=special, normalized=False)
