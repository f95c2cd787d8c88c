"""Continuations of contexts as questions to the engine, each thing computed once.

A pair is tokenized as lm-evaluation-harness does it (`TemplateLM._encode_pair`): spaces at the end
of the context move to the continuation, both together are encoded, and the ids beyond those of the
context alone are the continuation's. A context without text is one id: the beginning of text, or
the end of text where the model has no beginning.

The first ids of all continuations of one context are asked at once, at the context's last place;
what follows them is a question for each continuation, which finds the context in the prefix cache.
So a choice of one token costs nothing of its own.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lepton_jax.engine.scored import Scored, Scoring
from lepton_jax.jobs.rows import RowError, shown
from lepton_jax.jobs.scoring import Question, encode_text
from lepton_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Pair:
    """Ids of a context and of its continuation, both not empty; `bytes` of the continuation as it
    was given.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of a continuation: log-probabilities (natural) of its tokens; `greedy`: each is the likeliest
    in its place.
    """

    logprobs: np.ndarray
    greedy: bool
    bytes: int

    @property
    def logprob(self) -> float:
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def per_token(self) -> float:
        return self.logprob / len(self.logprobs)

    @property
    def per_byte(self) -> float:
        return self.logprob / self.bytes

    def row(self) -> dict:
        """As a part of an output row."""
        return {
            "logprob": self.logprob,
            "tokens": len(self.logprobs),
            "logprobs": self.logprobs,
            "bytes": self.bytes,
            "per_byte": self.per_byte,
            "greedy": self.greedy,
        }


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """What stands for an empty context. Raises RowError where the tokenizer has neither id."""
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = ids or list(tokenizer.eos_ids[:1])
    if not ids:
        message = "the tokenizer has no beginning or end of text to stand for an empty context"
        raise RowError("invalid_prompt", f"{message}: give a context")
    return ids


def text_pair(tokenizer: Tokenizer, text: str) -> Pair:
    """A text of which every token is scored, the first after the beginning of text."""
    ids = encode_text(tokenizer, text)
    start = prefix_ids(tokenizer)
    if ids[:1] == start:
        ids = ids[1:]
    return _checked(Pair(tuple(start), tuple(ids), len(text.encode())), text)


def split_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Ids of a context and its continuation. Raises RowError where one has no ids of its own."""
    size = len(continuation.encode())
    body = context.rstrip()
    moved = context[len(body) :] + continuation
    if not body:
        return dataclasses.replace(text_pair(tokenizer, moved), bytes=size)
    whole = encode_text(tokenizer, body + moved)
    count = len(encode_text(tokenizer, body))
    return _checked(Pair(tuple(whole[:count]), tuple(whole[count:]), size), continuation)


def chat_pair(tokenizer: Tokenizer, context: Sequence[int], continuation: str) -> Pair:
    """A continuation of ids that end where an answer begins, as a chat template leaves them."""
    try:
        ids = tokenizer.encode(continuation, add_special=False)
    except ValueError as error:
        raise RowError("invalid_prompt", str(error)) from error
    return _checked(Pair(tuple(context), tuple(ids), len(continuation.encode())), continuation)


def _checked(pair: Pair, continuation: str) -> Pair:
    if not pair.continuation or not pair.bytes:
        message = f"{shown(continuation)} has no tokens of its own to score: want a longer text"
        raise RowError("invalid_row", message)
    return pair


class Questions:
    """The questions that give the likelihoods of some pairs.

    One prompt is asked once: pairs that differ in their last id alone share a question.
    """

    def __init__(self, pairs: Sequence[Pair]):
        self._pairs = list(pairs)
        self._firsts: dict[tuple[int, ...], list[int]] = {}  # the first ids after each context
        for pair in self._pairs:
            ids = self._firsts.setdefault(pair.context, [])
            if pair.continuation[0] not in ids:
                ids.append(pair.continuation[0])
        self._heads: dict[tuple[int, ...], int] = {}  # question that has a context's last place
        self._tails: dict[tuple[int, tuple[int, ...]], int] = {}  # by context's length and prompt
        self._targets: list[list[list[int]]] = []  # of each question, by place
        prompts = [self._ask(pair) for pair in self._pairs]
        self.questions = tuple(
            Question(prompt, Scoring(tuple(map(tuple, targets))))
            for prompt, targets in zip(filter(None, prompts), self._targets, strict=True)
        )

    def likelihoods(self, results: Sequence[Scored]) -> list[Likelihood]:
        """In the order of the pairs."""
        return [self._likelihood(pair, results) for pair in self._pairs]

    @property
    def tokens(self) -> int:
        """Of all contexts and continuations, each counted once."""
        return sum(map(len, self._firsts)) + sum(len(pair.continuation) for pair in self._pairs)

    def _ask(self, pair: Pair) -> tuple[int, ...] | None:
        """The prompt of a new question for what those before leave open; None where they do not."""
        context, (*path, last) = pair.context, pair.continuation
        prompt = (*context, *path)
        is_head = context not in self._heads
        if not is_head and not path:
            return None
        key = len(context), prompt
        if key in self._tails:
            ids = self._targets[self._tails[key]][-1]
            ids += [last] * (last not in ids)
            return None
        self._tails[key] = len(self._targets)
        targets = [[token] for token in pair.continuation[1:]]
        if is_head:
            self._heads[context] = len(self._targets)
            targets.insert(0, self._firsts[context])
        self._targets.append(targets)
        return prompt

    def _likelihood(self, pair: Pair, results: Sequence[Scored]) -> Likelihood:
        first, *rest = pair.continuation
        column = self._firsts[pair.context].index(first)
        cells = [(results[self._heads[pair.context]], 0, column)]
        if rest:
            prompt = (*pair.context, *pair.continuation[:-1])
            number = self._tails[len(pair.context), prompt]
            columns = [*[0] * (len(rest) - 1), self._targets[number][-1].index(rest[-1])]
            cells += [(results[number], n - len(rest), c) for n, c in enumerate(columns)]
        logprobs = [result.logprobs[place, column] for result, place, column in cells]
        greedy = all(result.greedy[place, column] for result, place, column in cells)
        return Likelihood(np.array(logprobs, np.float32), bool(greedy), pair.bytes)
