"""Answers of a prescribed form: choices, a regular expression or a JSON schema.

`Grammar.of(params)` checks what a row asks for; with a tokenizer it makes a `Guide`, which says
before each token what may come and after it what must. The grammars themselves are llguidance's,
which refuses the JSON schema keywords it can't hold, by name. What the engine does with a guide:
`engine/request.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from types import ModuleType

import numpy as np

from lepton_jax.config import SamplingParams
from lepton_jax.text.schema_keywords import unknown_keyword
from lepton_jax.text.tokenizer import Tokenizer

# JSON as json.dumps writes it: free white space would let a model fill its answer with it.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_CONTROL = "\x02"  # begins texts for tokenizers that would put a space before the first word
_BITS = 32


class ConstraintError(ValueError):
    """A constraint that can't be held; the message names it and says why."""


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer may be; `source` is llguidance's own form of it."""

    source: str

    @classmethod
    def of(cls, params: SamplingParams) -> Grammar | None:
        """The grammar that a row asks for; None where it asks for none.

        Raises ConstraintError on one that is not well-formed or not supported.
        """
        if not params.guided:
            return None
        matcher = _llguidance().LLMatcher
        name = params.guided
        unknown = unknown_keyword(params.json_schema)
        if unknown:
            raise ConstraintError(f"sampling.{unknown}")
        try:
            if name == "choices":
                texts = " | ".join(json.dumps(text) for text in params.choices)
                source = matcher.grammar_from_lark(f"start: {texts}")
            elif name == "regex":
                source = matcher.grammar_from_regex(params.regex)
            else:
                source = matcher.grammar_from_json_schema(params.json_schema, overrides=_JSON)
        except ValueError as error:
            raise ConstraintError(f"sampling.{name} is not allowed: {error}") from error
        problem = _problem(source)
        if problem:
            raise ConstraintError(f"sampling.{name} is not allowed: {problem}")
        return cls(source)

    def guide(self, tokenizer: Tokenizer) -> Guide:
        """A guide of one answer. Raises ConstraintError where the tokenizer can't spell it."""
        return Guide(_matcher(tokenizer, self.source).deep_copy())


def guide_for(tokenizer: Tokenizer, params: SamplingParams) -> Guide:
    """A guide of an answer to `params`, which prescribe one. Raises ConstraintError as above."""
    return Grammar.of(params).guide(tokenizer)


class Guide:
    """The state of one answer."""

    def __init__(self, matcher):
        self._matcher = matcher

    @property
    def error(self) -> str:
        """Why no token can be said to be allowed; "" as long as one can."""
        return self._matcher.get_error()

    @property
    def done(self) -> bool:
        """Whether the answer is whole and nothing but its end may follow."""
        return self._matcher.is_stopped()

    def mask(self) -> np.ndarray:
        """Which ids may come next: bit i % 32 of word i // 32, int32."""
        return np.frombuffer(self._matcher.compute_bitmask(), np.int32)

    def accept(self, token_id: int, *, force: bool) -> list[int]:
        """Takes the id that came.

        Args:
          token_id: one that the mask allowed.
          force: gives the ids that must follow it, already taken too, where there is no other way.
        """
        self._matcher.consume_token(token_id)
        forced = self._matcher.compute_ff_tokens() if force and not self.done else []
        if forced:
            self._matcher.consume_tokens(forced)
        return forced


@functools.lru_cache(maxsize=256)
def _problem(source: str) -> str:
    """What is wrong with a grammar; "" where nothing is."""
    failed, messages = _llguidance().LLMatcher.validate_grammar_with_warnings(source)
    return messages[0] if failed else ""


@functools.lru_cache(maxsize=64)
def _matcher(tokenizer: Tokenizer, source: str):
    """llguidance's state of an answer that has not begun: guides are copies of it, because making
    one takes longer.
    """
    matcher = _llguidance().LLMatcher(_vocabulary(tokenizer), source)
    if matcher.get_error():
        raise ConstraintError(f"the constraint can't be held: {matcher.get_error()}")
    return matcher


@functools.lru_cache(maxsize=8)
def _vocabulary(tokenizer: Tokenizer):
    """llguidance's view of a tokenizer: every id's bytes, and which ids are none of a text."""
    if not tokenizer.eos_ids:
        raise ConstraintError(
            f"the tokenizer of {tokenizer.source} has no end-of-text id, with which a constrained "
            "answer ends: take another with model.tokenizer"
        )
    package = _llguidance()
    return package.LLTokenizer(
        package.TokenizerWrapper(_Spelling(tokenizer)), eos_token=list(tokenizer.eos_ids)
    )


class _Spelling:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_ids[0], tokenizer.bos_id
        self.tokens = [tokenizer.id_to_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.control_ids)
        self._before = tokenizer.encode(_CONTROL, add_special=False)

    def __call__(self, text: str) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("want a text")
        ids = self._tokenizer.encode(_CONTROL + text, add_special=False)
        count = len(self._before)
        if ids[:count] == self._before:
            return ids[count:]
        return self._tokenizer.encode(text, add_special=False)


def _llguidance() -> ModuleType:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise ConstraintError(
            "choices, regex and json_schema need llguidance: pip install llguidance, or "
            'pip install "lepton_jax[guided]"'
        ) from error
