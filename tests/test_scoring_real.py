"""SmolLM2 in float32 against transformers: log-probabilities of texts and choices, hidden states.

`fixtures/scoring/smollm2.json` holds 64 texts of 20 to 200 tokens, questions with choices, and
pooled hidden states; `scripts/make_scoring_fixtures.py` wrote it.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from lepton_jax import LeptonEngine
from lepton_jax.config import EngineSection, ModelSection, RunConfig

pytestmark = pytest.mark.slow

FIXTURE = Path(__file__).parent / "fixtures" / "scoring" / "smollm2.json"
LOGPROB_ERROR = 1e-3
COSINE = 0.9999


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads(FIXTURE.read_text())


@pytest.fixture(scope="module")
def engine(smollm2_path):
    section = EngineSection(page_size=16, prefill_chunk=256, prefill_sizes=(256,), max_len=256)
    config = RunConfig(model=ModelSection(dtype="float32"), engine=section)
    with LeptonEngine() as lepton:
        yield lepton.load_model(smollm2_path, config=config)


def test_the_fixture_says_enough(expected):
    counts = [len(row["logprobs"]) for row in expected["texts"]]
    assert len(counts) >= 64 and min(counts) >= 20 and 150 < max(counts) <= 200


def test_texts(engine, expected):
    rows = engine.score([row["text"] for row in expected["texts"]])
    worst = 0.0
    for got, want in zip(rows, expected["texts"], strict=True):
        assert got["tokens"] == len(want["logprobs"])
        worst = max(worst, np.abs(got["logprobs"] - want["logprobs"]).max())
    print(f"{len(rows)} texts, largest difference of a log-probability {worst:.1e}")
    assert worst <= LOGPROB_ERROR


def test_choices(engine, expected):
    before = engine.engine.stats()
    asked = [{name: row[name] for name in ("context", "choices")} for row in expected["choices"]]
    for got, want in zip(engine.score(asked), expected["choices"], strict=True):
        for one, logprobs in zip(got["choices"], want["logprobs"], strict=True):
            assert one["logprobs"] == pytest.approx(logprobs, abs=LOGPROB_ERROR)
        assert got["best"] == np.argmax([sum(values) for values in want["logprobs"]])
    after = engine.engine.stats()
    asked = sum(len(values) for row in expected["choices"] for values in row["logprobs"])
    # One prompt for all choices of one token, and one for each that is longer.
    assert after["scored_tokens"] - before["scored_tokens"] < asked


def test_hidden_states_between_layers(engine, expected):
    texts = [row["text"] for row in expected["layers"]]
    for layer in (0, 15):
        vectors = engine.embed(texts, pooling="last", layer=layer)
        want = np.array([row[str(layer)] for row in expected["layers"]])
        want /= np.linalg.norm(want, axis=-1, keepdims=True)
        assert np.sum(vectors * want, axis=-1).min() >= COSINE


def test_hidden_states(engine, expected):
    texts = [row["text"] for row in expected["hidden"]]
    for pooling in ("last", "mean"):
        vectors = engine.embed(texts, pooling=pooling)
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(texts)), abs=1e-5)
        want = np.array([row[pooling] for row in expected["hidden"]])
        cosines = (vectors * want).sum(1) / np.linalg.norm(want, axis=1)
        print(f"{pooling}: least cosine {cosines.min():.7f}")
        assert cosines.min() >= COSINE


def test_probabilities_of_labels(engine):
    texts = ["I love this place, the food was wonderful.", "Terrible. I want my money back."]
    template = "Review: {text}\nSentiment (positive or negative): {label}"
    plain = engine.predict(texts, ["positive", "negative"], template=template)
    calibrated = engine.predict(texts, ["positive", "negative"], template=template, calibrate=True)
    for chances in (plain, calibrated):
        assert chances.shape == (2, 2) and chances.sum(1) == pytest.approx(np.ones(2), abs=1e-12)
        assert chances[0, 0] > chances[1, 0]
    assert np.abs(plain - calibrated).max() > 1e-3


def test_rank_and_perplexity(engine, expected):
    (first, _), *_ = engine.rank(
        "The capital of France is", ["Berlin", "Paris"], template="{query} {candidate}"
    )
    assert first == 1
    (first, _), *_ = engine.rank(
        "How do I bake bread?",
        ["Stock markets fell on Monday.", "How can I make a loaf of bread?"],
        rank_by="similarity",
        pooling="mean",
    )
    assert first == 1
    text, logprobs = expected["texts"][0]["text"], expected["texts"][0]["logprobs"]
    whole = engine.perplexity(text, window=250, stride=250)
    assert whole == pytest.approx(np.exp(-np.mean(logprobs)), rel=1e-3)
    assert engine.perplexity(text, window=10, stride=10) > whole
