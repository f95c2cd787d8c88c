"""Sentencepiece vocabularies: from a `.model` file, or assembled from the pieces that GGUF metadata
carries.

The sentencepiece library does the segmentation in both cases (for GGUF a model file is written in
memory), so scores, byte fallback, user-defined and unused pieces behave as in the original. What it
doesn't do is recognise control tokens inside a text; `SpmEncoder` cuts the text at those first.
Model format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor

from lepton_jax.text.pieces import SPACE, TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # piece types, also GGUF's
_NO_PREFIX = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }: a later field wins
_BLANKS = re.compile(r"\s*")


class Marker(NamedTuple):
    """A token that is recognised by its text; `lstrip`/`rstrip` swallow the white space on that
    side of it.
    """

    id: int
    lstrip: bool = False
    rstrip: bool = False


class SpmEncoder:
    """Text to ids, with `markers` (text -> Marker) recognised wherever they stand, the longest
    first.

    `prefix` says where the space goes that such tokenizers put before a text: "each" stretch
    between markers (what Llama-2's original does and its GGUF files expect), only the "first", or
    "never" (Gemma).
    """

    def __init__(self, model: bytes, markers: Mapping[str, Marker], *, prefix: str):
        self._plain = _processor(model + _NO_PREFIX)
        self._prefixed = self._plain if prefix == "never" else _processor(model)
        self._prefix_all = prefix == "each"
        self._markers = dict(markers)
        self._cut = re.compile(alternation(self._markers)) if self._markers else None

    def __call__(self, text: str) -> list[int]:
        if self._cut is None:
            return self._segment(text, at_start=True)
        ids: list[int] = []
        position = 0
        for match in self._cut.finditer(text):
            if match.start() < position:
                continue  # swallowed by the rstrip of the marker before
            marker = self._markers[match[0]]
            before = text[position : match.start()]
            ids += self._segment(before.rstrip() if marker.lstrip else before, at_start=not ids)
            ids.append(marker.id)
            position = match.end()
            if marker.rstrip:
                position = _BLANKS.match(text, position).end()
        return ids + self._segment(text[position:], at_start=not ids)

    def _segment(self, text: str, *, at_start: bool) -> list[int]:
        if not text:
            return []
        return (self._prefixed if at_start or self._prefix_all else self._plain).encode(text)


def alternation(words: Iterable[str]) -> str:
    """A regular expression for any of `words`, the longest at each place, shaped as a trie so that
    it stays fast.
    """
    trie: dict = {}
    for word in words:
        node = trie
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}
    return _trie_pattern(trie)


def _trie_pattern(node: dict) -> str:
    branches = [re.escape(c) + _trie_pattern(child) for c, child in node.items() if c]
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
    return joined + ("?" if "" in node else "")


def model_from_pieces(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    prefix: bool,
    unknown_id: int,
) -> bytes:
    """A sentencepiece BPE model file, as bytes, over `pieces` (spaces written as `▁`); ids are
    positions.

    Exactly the piece at `unknown_id` gets the type UNKNOWN, as the library demands. Raises
    `TokenizerError` for duplicate pieces or an unknown id that isn't there.
    """
    if not 0 <= unknown_id < len(pieces):
        raise TokenizerError(
            f"unknown_token_id is {unknown_id}; the vocabulary has {len(pieces)} pieces"
        )
    seen: dict[str, int] = {}
    out = []
    for position, (piece, score, kind) in enumerate(zip(pieces, scores, types, strict=True)):
        if seen.setdefault(piece, position) != position:
            raise TokenizerError(
                f"pieces {seen[piece]} and {position} are both {piece!r}; each must be unique"
            )
        if position == unknown_id:
            kind = UNKNOWN
        elif kind == UNKNOWN:
            kind = CONTROL
        text = piece.encode()
        body = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", score)
        body += b"\x18" + _varint(kind)
        out.append(b"\x0a" + _varint(len(body)) + body)
    has_bytes = sum(kind == BYTE for kind in types) == 256
    trainer = b"\x18\x02" + b"\x98\x02" + _varint(has_bytes)  # model_type: BPE, byte_fallback
    normalizer = b"\x0a\x08identity" + b"\x18" + _varint(prefix) + b"\x20\x00\x28\x01"
    out.append(b"\x12" + _varint(len(trainer)) + trainer)
    out.append(b"\x1a" + _varint(len(normalizer)) + normalizer)
    return b"".join(out)


def escape_spaces(pieces: Sequence[str], types: Sequence[int]) -> list[str]:
    """Pieces as the library matches them: GGUF files hold user-defined runs of spaces as spaces, it
    wants `▁`.
    """
    taken = set(pieces)
    spelled = []
    for piece, kind in zip(pieces, types, strict=True):
        if kind == USER_DEFINED and " " in piece:
            escaped = piece.replace(" ", SPACE)
            piece = piece if escaped in taken else escaped
        spelled.append(piece)
    return spelled


def adds_prefix(model: bytes) -> bool:
    """Whether a model file asks for a space before the text."""
    return _processor(model).encode("a", out_type=str)[0].startswith(SPACE)


def _processor(model: bytes) -> SentencePieceProcessor:
    try:
        return SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise TokenizerError(f"the sentencepiece model can't be used: {error}") from error


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
