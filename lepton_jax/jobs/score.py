"""The mode score: how likely a model finds given text.

    {"id": "a", "text": "The sun rises in the east."}
    {"id": "b", "context": "The capital of France is", "continuation": " Paris."}
    {"id": "c", "context": "2 + 2 =", "choices": [" 3", " 4", " 5"]}

An output row is {"id", "logprob" (the sum), "tokens", "logprobs" (of each token), "bytes",
"per_byte", "greedy" (each token is the likeliest in its place), "prompt_tokens"}; with choices it
is {"id", "choices": [such objects], "best", "best_per_byte" (indices), "prompt_tokens"}. Logarithms
are natural. How texts become ids: `pairs.py`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lepton_jax.engine.scored import Scored
from lepton_jax.jobs.pairs import Questions, split_pair, text_pair
from lepton_jax.jobs.rows import RowError, shown
from lepton_jax.jobs.scoring import Asked, ChoosingMode, margin, need_text, need_texts
from lepton_jax.text.tokenizer import Tokenizer

_FORMS = ({"text"}, {"context", "continuation"}, {"context", "choices"})


class ScoreMode(ChoosingMode):
    """Rows as above, or with `choices_only` of the last kind."""

    fields = ("text", "context", "continuation", "choices")

    def __init__(self, *, choices_only: bool = False):
        self._choices_only = choices_only

    def parse(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields, checked. Raises RowError (invalid_row)."""
        if set(values) not in _FORMS:
            found = " and ".join(sorted(values)) or "nothing"
            wanted = "text, or context and continuation, or context and choices"
            raise RowError("invalid_row", f"the row has {found}: want {wanted}")
        if self._choices_only and "choices" not in values:
            message = "cascade.agreement is about choices, and the row has none: give some"
            raise RowError("invalid_row", message)
        readers = {name: need_text for name in ("text", "continuation")}
        readers |= {"choices": need_texts, "context": _need_context}
        return {name: readers[name](values, name) for name in values}

    def choose(self, answer: Mapping[str, Any]) -> tuple[int, float]:
        """The choice is "best", the margin one of log-probabilities."""
        return answer["best"], margin([choice["logprob"] for choice in answer["choices"]])

    def ask(self, work: dict[str, Any], tokenizer: Tokenizer) -> Asked:
        context = work.get("context", "")
        if "text" in work:
            pairs = [text_pair(tokenizer, work["text"])]
        else:
            texts = work.get("choices") or [work["continuation"]]
            pairs = [split_pair(tokenizer, context, text) for text in texts]
        asked = Questions(pairs)

        def answer(results: list[Scored]) -> dict:
            found = asked.likelihoods(results)
            count = {"prompt_tokens": asked.tokens}
            if "choices" not in work:
                return found[0].row() | count
            return {
                "choices": [one.row() for one in found],
                "best": int(np.argmax([one.logprob for one in found])),
                "best_per_byte": int(np.argmax([one.per_byte for one in found])),
            } | count

        return Asked(asked.questions, answer)


def score_fields(item: str | tuple[str, str] | Mapping[str, Any]) -> dict[str, Any]:
    """The row without its id of a text, of (context, continuation), or of a row's fields. Raises
    RowError on anything else.
    """
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, Mapping):
        return dict(item)
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        wanted = "a text, (context, continuation), or a mapping of a row's fields"
        raise RowError("invalid_row", f"{shown(item)} can't be scored: want {wanted}")
    return {"context": item[0], "continuation": item[1]}


def _need_context(values: Mapping[str, Any], name: str) -> str:
    return need_text(values, name, empty=True)
