"""The mode rank: which candidates fit a query best.

    {"id": "a", "query": "light shoes for the mountains", "candidates": ["Trail runner", "Kettle"]}

By likelihood (`scoring.rank_by`): a candidate's score is the mean log-probability of its tokens
where `scoring.template` puts it, by default in the line after the query; with `scoring.normalize`
"sum" their sum. By similarity: the cosine of the candidate's and the query's embeddings.

An output row is {"id", "ranking": [indices of candidates, best first], "scores": [in the order of
the candidates], "prompt_tokens"}. Of equal candidates the earlier is first.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lepton_jax.config import ScoringSection
from lepton_jax.engine.scored import Scored
from lepton_jax.jobs.embed import embed_question, unit_vector
from lepton_jax.jobs.pairs import Questions, split_pair
from lepton_jax.jobs.scoring import Asked, ChoosingMode, margin, need_text, need_texts
from lepton_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class RankWork:
    """A checked row."""

    query: str
    candidates: tuple[str, ...]


class RankMode(ChoosingMode):
    """Rows as above."""

    fields = ("query", "candidates")

    def __init__(self, section: ScoringSection):
        """Raises ValueError where the template has no place for query and candidate."""
        self._section = section
        template = section.template or "{query}\n{candidate}"
        self._before, candidate, self._after = template.partition("{candidate}")
        if "{query}" not in self._before or not candidate:
            raise ValueError(
                f"scoring.template={template!r}: want {{query}}, and {{candidate}} after it"
            )

    def parse(self, values: Mapping[str, Any]) -> RankWork:
        return RankWork(need_text(values, "query"), need_texts(values, "candidates"))

    def ask(self, work: RankWork, tokenizer: Tokenizer) -> Asked:
        by = {"likelihood": self._by_likelihood, "similarity": self._by_similarity}
        return by[self._section.rank_by](work, tokenizer)

    def choose(self, answer: Mapping[str, Any]) -> tuple[int, float]:
        """The margin is one of scores."""
        return int(answer["ranking"][0]), margin(answer["scores"])

    def _by_likelihood(self, work: RankWork, tokenizer: Tokenizer) -> Asked:
        context = self._before.replace("{query}", work.query)
        after = self._after.replace("{query}", work.query)
        texts = [candidate + after for candidate in work.candidates]
        asked = Questions([split_pair(tokenizer, context, text) for text in texts])
        by_mean = self._section.normalize != "sum"

        def answer(results: list[Scored]) -> dict:
            found = asked.likelihoods(results)
            scores = [one.per_token if by_mean else one.logprob for one in found]
            return _ranked(np.array(scores), asked.tokens)

        return Asked(asked.questions, answer)

    def _by_similarity(self, work: RankWork, tokenizer: Tokenizer) -> Asked:
        texts = [work.query, *work.candidates]
        asked = self._section
        questions = [
            embed_question(tokenizer, text, asked.pooling, layer=asked.layer) for text in texts
        ]

        def answer(results: list[Scored]) -> dict:
            query, *candidates = (unit_vector(result) for result in results)
            tokens = sum(len(question.ids) for question in questions)
            return _ranked(np.stack(candidates) @ query, tokens)

        return Asked(tuple(questions), answer)


def _ranked(scores: np.ndarray, tokens: int) -> dict:
    ranking = np.argsort(-scores, kind="stable")
    return {"ranking": ranking, "scores": scores, "prompt_tokens": tokens}
