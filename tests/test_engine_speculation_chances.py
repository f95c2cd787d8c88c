"""Sampling under speculation has the distribution of plain sampling: a chi-square test over all
texts of four tokens of a small alphabet, whose probabilities the model gives exactly.
"""

import itertools
from collections import Counter

import numpy as np
import pytest
from engine_reference import Reference
from test_engine_draft_model import SHALLOW
from test_engine_loop import EOS, LEAVES, MODEL, params, serve

from lepton_jax.config import EngineSection
from lepton_jax.engine.knobs import longest_draft
from lepton_jax.engine.loop import Engine

ALPHABET = (5, 6, 7)
PROMPT = [5, 6, 7, 5, 7, 6, 5, 6, 7]  # there is something to look up
COUNT, LENGTH = 1200, 4
WARM = 1.4  # of the distribution that must be told apart


@pytest.fixture(scope="module")
def chances():
    """`chances(temperature)`: the probability of each text."""
    reference = Reference(MODEL, LEAVES)
    logits = {
        tail: reference.logits([*PROMPT, *tail])[list(ALPHABET)].astype(np.float64)
        for count in range(LENGTH)
        for tail in itertools.product(ALPHABET, repeat=count)
    }

    def of(temperature: float) -> dict[tuple[int, ...], float]:
        found = {}
        for text in itertools.product(ALPHABET, repeat=LENGTH):
            found[text] = 1.0
            for place, token in enumerate(text):
                powers = np.exp(logits[text[:place]] / temperature)
                found[text] *= powers[ALPHABET.index(token)] / powers.sum()
        return found

    return of


def speculating(kind: str) -> Engine:
    section = EngineSection(
        rows=64, page_size=16, prefill_chunk=512, prefill_sizes=(512,), decode_block=1, max_len=16,
        speculation=kind, draft_tokens=3,
    )  # fmt: skip
    engine = Engine(MODEL, LEAVES, section=section, eos_ids=EOS)
    if kind == "draft":
        engine.draft_with(*SHALLOW)
    engine.scheduler.draft_policy = longest_draft
    engine.runner.rungs.decode[:], engine.runner.drafts = [64], [3]  # one program for all
    return engine


def chi_square(seen: Counter, chances: dict[tuple[int, ...], float]) -> tuple[float, int]:
    """The statistic and its degrees of freedom; texts expected fewer than 5 times count as one."""
    rare = [text for text, chance in chances.items() if chance * COUNT < 5]
    cells = [[text] for text in chances if text not in rare] + [rare] * bool(rare)
    total = 0.0
    for cell in cells:
        wanted = COUNT * sum(chances[text] for text in cell)
        total += (sum(seen[text] for text in cell) - wanted) ** 2 / wanted
    return total, len(cells) - 1


@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_texts_are_as_likely_as_the_model_says(chances, kind):
    engine, bias = speculating(kind), dict.fromkeys(ALPHABET, 100.0)
    draw = dict(temperature=1.0, logit_bias=bias, max_tokens=LENGTH)
    requests = {f"{seed}": (PROMPT, params(seed=seed, **draw)) for seed in range(COUNT)}
    texts = Counter(tuple(answer.token_ids) for answer in serve(engine, requests).values())
    stats = engine.stats()
    assert stats["verified_steps"] > stats["decode_steps"] / 2
    assert stats["proposed_tokens"] > stats["accepted_tokens"] > COUNT / 10
    found, freedom = chi_square(texts, chances(1.0))
    assert freedom > 20
    assert found < freedom + 3.5 * (2 * freedom) ** 0.5  # once in thousands by chance
    other, freedom = chi_square(texts, chances(WARM))
    assert other > freedom + 6 * (2 * freedom) ** 0.5
