"""Real models under constraints: every answer of its form, with SmolLM2's byte-level tokenizer and
with Gemma's, whose pieces carry their spaces.
"""

import json
import re

import jsonschema
import pytest

from lepton_jax import LeptonEngine
from lepton_jax.config import EngineSection, ModelSection, RunConfig, SamplingParams

pytestmark = pytest.mark.slow

CARD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "role": {"enum": ["teacher", "nurse", "baker"]},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
        "languages": {"type": "array", "items": {"enum": ["en", "fr", "日本語"]}, "maxItems": 3},
    },
    "required": ["name", "role", "age"],
    "additionalProperties": False,
}


SECTION = EngineSection(rows=4, page_size=16, prefill_chunk=128, max_len=192)
CONFIG = RunConfig(model=ModelSection(dtype="float32"), engine=SECTION)


@pytest.fixture(scope="module")
def engine(smollm2_path):
    with LeptonEngine() as lepton:
        yield lepton.load_model(smollm2_path, config=CONFIG)


def ask(engine, text, **fields):
    messages = [{"role": "user", "content": text}]
    (answer,) = engine.generate([messages], SamplingParams(**{"max_tokens": 96, **fields}))
    assert answer.finish_reason == "stop"
    return answer


def test_json(engine):
    for seed in range(2):
        drawn = {"temperature": 0.8 * seed, "seed": seed}
        answer = ask(engine, "Marie bakes bread. She is 41.", json_schema=CARD, **drawn)
        card = json.loads(answer.text)
        jsonschema.validate(card, CARD)
        assert set(CARD["required"]) <= set(card)


def test_choices(engine):
    answer = ask(engine, "Is ice cold? Answer yes or no.", choices=("yes", "no", "perhaps"))
    assert answer.text in ("yes", "no", "perhaps")
    assert answer.token_ids[-1] not in engine.tokenizer.eos_ids  # decided: no end is waited for


def test_regular_expressions(engine):
    pattern = r"[12][0-9]{3}-[0-9]{2}-[0-9]{2}"
    assert re.fullmatch(pattern, ask(engine, "When was the moon landing?", regex=pattern).text)


def test_json_by_gemma(gemma3_path):
    with LeptonEngine() as gemma:
        gemma.load_model(gemma3_path, config=CONFIG)
        params = SamplingParams(json_schema=CARD, max_tokens=120)
        (answer,) = gemma.generate(["Marie bakes bread. She is 41. In JSON:\n"], params)
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), CARD)
