"""What a tokenizer source hands to `Tokenizer`: how ids spell bytes, which ids are special, how
text becomes ids.

Sources differ in how a vocabulary entry is written down: byte-level BPE maps each byte to a
printable character (`Ġ` is a space), sentencepiece writes a space as `▁` and rare bytes as
`<0xNN>`. Here both become plain bytes, so that decoding, whole or incremental, is one concatenation
and one UTF-8 decode. No file is read here. Read `hf_tokenizer.py`, `gguf_tokenizer.py` and `spm.py`
for the three sources.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

SPACE = "\u2581"  # sentencepiece's visible space
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(ValueError):
    """A tokenizer source that can't be used: the message names the file or key, the value and what
    is accepted.
    """


def _byte_characters() -> dict[int, int]:
    """GPT-2's table, printable character -> byte: printable bytes stand for themselves, the others
    follow U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in table)
    return table | {0x100 + place: byte for place, byte in enumerate(hidden)}


_TO_BYTE = _byte_characters()


@dataclass(frozen=True)
class Pieces:
    """The vocabulary: `size` ids, each spelling some bytes.

    `text_of(id)` is the entry as its source writes it (None for a hole). `verbatim` ids (added and
    control tokens) spell their own text and are exempt from the byte-level table. `leading_space`:
    the tokenizer puts a space before a text that the text doesn't have, so decoding drops one at
    the very start.
    """

    size: int
    text_of: Callable[[int], str | None]
    spelling: Literal["byte_level", "sentencepiece"]
    control: frozenset[int] = frozenset()
    verbatim: frozenset[int] = frozenset()
    leading_space: bool = False
    _known: dict[int, bytes] = field(default_factory=dict, repr=False)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that `token_id` spells; b"" for a hole or an id past `size` (models pad their
        vocabularies).
        """
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative; ids go from 0 to {self.size - 1}")
        text = self.text_of(token_id) if token_id < self.size else None
        if text is None:
            return b""
        if self.spelling == "sentencepiece":
            byte = _BYTE_PIECE.fullmatch(text)
            return bytes([int(byte[1], 16)]) if byte else text.replace(SPACE, " ").encode()
        if token_id in self.verbatim or token_id in self.control:
            return text.encode()
        bytes_text = text.translate(_TO_BYTE)
        # A character outside the table means an entry that was added as plain text.
        return (
            bytes_text.encode("latin-1") if all(ord(c) in _TO_BYTE for c in text) else text.encode()
        )


@dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning. `prefix` and `suffix` go around a text that asks for its special tokens;
    `names` are the names under which templates ask for a token's text (`bos_token`, `eos_token`,
    ...).
    """

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerParts:
    """One source, read: `encode` gives ids of plain text, without bos and eos but with special
    tokens recognised.

    `templates` maps a template's name ("default", "tool_use", ...) to its jinja source.
    """

    encode: Callable[[str], list[int]]
    pieces: Pieces
    special: SpecialTokens
    templates: Mapping[str, str] = field(default_factory=dict)
