"""The mode perplexity: how well a model foresees a text of any length.

    {"id": "a", "text": "..."}

A window of `scoring.window` tokens moves over the text by `scoring.stride`; each token is scored
once, by the first window that reaches it, so with all that this window has of the text before it. A
smaller stride costs more and gives each token more context; stride = window is the quickest. The
first token comes after the beginning of text (`pairs.prefix_ids`).

An output row is {"id", "perplexity" (exp of the mean loss a token), "logprob", "tokens", "bytes",
"per_byte", "bits_per_byte", "windows", "prompt_tokens"}.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lepton_jax.engine.scored import Scored, Scoring
from lepton_jax.jobs.pairs import text_pair
from lepton_jax.jobs.scoring import Asked, Question, ScoringMode, need_text
from lepton_jax.text.tokenizer import Tokenizer


class PerplexityMode(ScoringMode):
    """Rows as above."""

    fields = ("text",)

    def __init__(self, window: int, stride: int):
        """`stride`: 1 to `window`, else ValueError."""
        if not 1 <= stride <= window:
            raise ValueError(f"scoring.stride={stride}: want 1 to scoring.window={window}")
        self._window, self._stride = window, stride

    def parse(self, values: Mapping[str, Any]) -> str:
        return need_text(values, "text")

    def ask(self, work: str, tokenizer: Tokenizer) -> Asked:
        pair = text_pair(tokenizer, work)
        questions = windows(
            (*pair.context, *pair.continuation), window=self._window, stride=self._stride
        )

        def answer(results: list[Scored]) -> dict:
            total = sum(float(result.logprobs.sum(dtype="float64")) for result in results)
            tokens = len(pair.continuation)
            return {
                "perplexity": perplexity_of(total, tokens),
                "logprob": total,
                "tokens": tokens,
                "bytes": pair.bytes,
                "per_byte": total / pair.bytes,
                "bits_per_byte": bits_per_byte(total, pair.bytes),
                "windows": len(questions),
                "prompt_tokens": len(pair.context) + tokens,
            }

        return Asked(tuple(questions), answer)


def perplexity_of(logprob: float, tokens: int) -> float:
    """exp of the mean loss a token, as far as that is a float."""
    return math.exp(min(-logprob / tokens, 700.0))


def bits_per_byte(logprob: float, count: int) -> float:
    """The mean loss of so many bytes."""
    return -logprob / count / math.log(2)


def windows(ids: Sequence[int], *, window: int, stride: int) -> list[Question]:
    """Questions that score every id but the first, once each.

    A window holds `window` ids besides the one before them, which it needs but doesn't score.
    """
    questions, scored, begin = [], 1, 0
    while scored < len(ids):
        end = min(begin + window + 1, len(ids))
        targets = tuple((token,) for token in ids[scored:end])
        questions.append(Question(tuple(ids[begin : end - 1]), Scoring(targets)))
        scored, begin = end, begin + stride
    return questions
