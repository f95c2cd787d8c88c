"""Ids of one answer back into text as they come: whole characters only, cut at the first stop
string.

Bytes go through an incremental UTF-8 decoder, so a character spread over several tokens appears
once it is whole, and the deltas, joined, equal `tokenizer.decode` of all ids. Text that may be the
beginning of a stop string is held back; everything from a stop string on is dropped. Each byte and
character is looked at once per stop string: linear time. Read `pieces.py` for how an id spells its
bytes.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol


class Spelling(Protocol):
    """What the detokenizer needs of a tokenizer."""

    control_ids: frozenset[int]  # spell nothing in an answer
    leading_space: bool  # a space at the very start belongs to the tokenizer, not to the text

    def id_to_bytes(self, token_id: int) -> bytes: ...


class Detokenizer:
    """Text of one growing answer.

    `num_ids` counts the ids taken in; once stopped it stays at the id that completed the stop
    string. A stop string is matched against the text, so one that is a control token's own name
    never matches: use its id instead.
    """

    def __init__(self, tokenizer: Spelling, stop: Sequence[str] = (), *, continues: bool = False):
        """`continues`: the ids go on with a text, so a space at their start is the text's own."""
        if isinstance(stop, str):
            raise TypeError(f"stop is the string {stop!r}; give a list of strings")
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = [_StopMatcher(string) for string in stop]
        self._drop_space = tokenizer.leading_space and not continues
        self._held = ""
        self._delivered: list[str] = []
        self.num_ids = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """What was delivered so far: all deltas joined."""
        return "".join(self._delivered)

    def add(self, ids: Iterable[int]) -> tuple[str, bool]:
        """Takes the next ids; returns the text that is now certain, and whether a stop string has
        been met.

        Ids after a stop string are ignored, in this call and in later ones.
        """
        deltas = []
        for token_id in ids:
            if self.stopped:
                break
            self.num_ids += 1
            if token_id not in self._tokenizer.control_ids:
                deltas.append(self._scan(self._decode(self._tokenizer.id_to_bytes(token_id))))
        return self._deliver("".join(deltas)), self.stopped

    def finish(self) -> str:
        """The rest, once no more ids come: what was held back, and U+FFFD for a character that
        stays incomplete.
        """
        if self.stopped:
            return ""
        delta = self._scan(self._decode(b"", final=True))
        if not self.stopped:
            delta, self._held = delta + self._held, ""
        return self._deliver(delta)

    def _decode(self, data: bytes, *, final: bool = False) -> str:
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data, final)

    def _scan(self, fresh: str) -> str:
        """Appends `fresh` to the held text and returns the part of it that no stop string can reach
        any more.
        """
        if not self._matchers:
            return fresh
        text = self._held + fresh
        ends = [(matcher.feed(fresh), -len(matcher.string)) for matcher in self._matchers]
        found = [(end, minus_length) for end, minus_length in ends if end]
        if found:
            # The stop string that is complete first counts, whatever the split into tokens.
            end, minus_length = min(found)
            self.stopped, self._held = True, ""
            return text[: len(text) - len(fresh) + end + minus_length]
        cut = len(text) - max(matcher.matched for matcher in self._matchers)
        self._held = text[cut:]
        return text[:cut]

    def _deliver(self, delta: str) -> str:
        if delta:
            self._delivered.append(delta)
        return delta


class _StopMatcher:
    """Knuth-Morris-Pratt over a stream: `matched` characters at its end begin `string`."""

    def __init__(self, string: str):
        if not string:
            raise ValueError("a stop string is empty; leave it out")
        self.string = string
        self.matched = 0
        self._fallback = [0] * len(string)
        length = 0
        for place in range(1, len(string)):
            while length and string[place] != string[length]:
                length = self._fallback[length - 1]
            length += string[place] == string[length]
            self._fallback[place] = length

    def feed(self, fresh: str) -> int:
        """Goes on through `fresh`; returns how many of its characters complete the string, 0 if
        they don't.
        """
        string, fallback, matched = self.string, self._fallback, self.matched
        for place, character in enumerate(fresh, start=1):
            while matched and character != string[matched]:
                matched = fallback[matched - 1]
            if character == string[matched]:
                matched += 1
                if matched == len(string):
                    return place
        self.matched = matched
        return 0
