"""The mode embed: a vector for each text, of length 1.

    {"id": "a", "text": "Where is my parcel?"}

An output row is {"id", "embedding": [D numbers], "prompt_tokens"}. The vector is the hidden state
after the final norm, or after another layer (`scoring.layer`), of the last token or the mean over
all tokens (`scoring.pooling`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lepton_jax.engine.scored import Scored, Scoring
from lepton_jax.jobs.rows import RowError
from lepton_jax.jobs.scoring import Asked, Question, ScoringMode, need_text
from lepton_jax.jobs.session import encode
from lepton_jax.text.tokenizer import Tokenizer


class EmbedMode(ScoringMode):
    """Rows as above. A work is a text, or token ids, which batch requests may have instead."""

    fields = ("text",)

    def __init__(self, pooling: str, layer: int = -1):
        self._pooling, self._layer = pooling, layer

    def parse(self, values: Mapping[str, Any]) -> str:
        return need_text(values, "text")

    def ask(self, work: str | list[int], tokenizer: Tokenizer) -> Asked:
        question = embed_question(tokenizer, work, self._pooling, layer=self._layer)
        return Asked(
            (question,),
            lambda results: {
                "embedding": unit_vector(results[0]),
                "prompt_tokens": len(question.ids),
            },
        )


def embed_question(
    tokenizer: Tokenizer, text: str | list[int], pooling: str, *, layer: int
) -> Question:
    """Asks for the hidden state of a text or of ids. Raises RowError (invalid_row) where there are
    no tokens.
    """
    ids = encode(tokenizer, text)
    if not ids:
        raise RowError("invalid_row", "the text has no tokens: want a longer one")
    return Question(tuple(ids), Scoring(pool=pooling, layer=layer))


def unit_vector(result: Scored) -> np.ndarray:
    """float32 `[D]` of length 1; zeros stay zeros."""
    vector = result.pooled.astype(np.float64)
    return (vector / max(float(np.linalg.norm(vector)), 1e-30)).astype(np.float32)
