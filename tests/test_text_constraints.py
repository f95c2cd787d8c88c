"""Schemas with words that are no keywords, and constraints of a whole run, are refused by name;
guides over sentencepiece's vocabularies, whose pieces carry their spaces.
"""

import json
import random
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from jobs_fakes import ByteTokenizer
from test_text_gguf import sentencepiece

from lepton_jax.config import SamplingParams
from lepton_jax.jobs.generate import GenerateMode
from lepton_jax.text import Detokenizer, load
from lepton_jax.text.constraints import ConstraintError, Grammar
from lepton_jax.text.schema_keywords import unknown_keyword


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"propertes": {}}, "json_schema: 'propertes' is no .*did you mean 'properties'"),
        ({"type": "object", "properties": {"a": {"typ": 1}}}, "json_schema.properties.a: 'typ'"),
        ({"anyOf": [{}, {"items": [{"requird": []}]}]}, r"anyOf\[1\].items\[0\]: 'requird'"),
        ({"$defs": {"x": {"nullable": True}}, "$ref": "#/$defs/x"}, r"\$defs.x: 'nullable'"),
        ({"additionalProperties": {"x-guidance": {"lenient": True}}, "not": {}}, "'x-guidance'"),
    ],
)
def test_words_that_are_no_keywords(schema, message):
    with pytest.raises(ConstraintError, match=message):
        Grammar.of(SamplingParams(json_schema=schema))


def test_names_of_properties_and_values_are_no_keywords():
    schema = {
        "title": "t",
        "type": "object",
        "properties": {"propertes": {"const": {"typ": 1}}, "x": True},
        "patternProperties": {"^z": {"default": {"a": 1}, "enum": [{"b": 2}]}},
        "additionalProperties": False,
    }
    assert unknown_keyword(schema) == ""
    assert Grammar.of(SamplingParams(json_schema=schema))


def test_a_schema_of_the_whole_run_is_refused_at_once():
    with pytest.raises(ValueError, match="uniqueItems"):
        GenerateMode(SamplingParams(json_schema={"type": "array", "uniqueItems": True}))


def test_the_mask_has_the_ids_that_may_come():
    class Bytes(ByteTokenizer):
        source, vocab_size, bos_id = "bytes", 257, None

    guide = Grammar.of(SamplingParams(choices=("a/b", "a\\b", 'a"'))).guide(Bytes())

    def allowed():
        return [i for i in range(257) if guide.mask()[i // 32] >> i % 32 & 1]

    assert allowed() == [ord("a")]
    guide.accept(ord("a"), force=False)
    assert allowed() == sorted(map(ord, '/\\"')) and not guide.done
    guide.accept(ord('"'), force=False)
    assert guide.done and not guide.error


PREFIXED = load(Path(__file__).parent / "fixtures" / "text" / "tiny.model")  # as Llama 2's
UNPREFIXED = load(sentencepiece(add_space_prefix=False, eos_token_id=2))  # as Gemma's
CARD = {
    "type": "object",
    "properties": {
        "full name": {"type": "string", "minLength": 1, "maxLength": 8},
        "role": {"enum": ["head nurse", " baker", "日本語"]},
        "age": {"type": "integer", "minimum": -5, "maximum": 99},
    },
    "required": ["full name", "role", "age"],
    "additionalProperties": False,
}
CHOICES = (" the user", "the user", "the users", " 12")
PATTERN = r" ?[a-c]{2} \d{1,3}(, sir)?"


def drawn(tokenizer, rng, **form):
    """The text of an answer whose ids are drawn from the allowed ones."""
    guide, ids = Grammar.of(SamplingParams(**form)).guide(tokenizer), []
    while not guide.done:
        bits = np.unpackbits(guide.mask().view(np.uint8), bitorder="little")
        token_id = rng.choice(np.flatnonzero(bits).tolist())
        if token_id in tokenizer.eos_ids:
            break
        ids += [token_id, *guide.accept(token_id, force=rng.random() < 0.5)]
        assert not guide.error and len(ids) < 200
    text = Detokenizer(tokenizer, continues=True)
    return text.add(ids)[0] + text.finish()


@pytest.mark.parametrize("tokenizer", [PREFIXED, UNPREFIXED], ids=["prefixed", "unprefixed"])
def test_answers_in_pieces_that_carry_their_spaces_have_their_form(tokenizer):
    assert tokenizer.leading_space == (tokenizer is PREFIXED)
    rng, chosen = random.Random(3), set()
    for _ in range(25):
        jsonschema.validate(json.loads(drawn(tokenizer, rng, json_schema=CARD)), CARD)
        assert re.fullmatch(PATTERN, drawn(tokenizer, rng, regex=PATTERN))
        chosen.add(drawn(tokenizer, rng, choices=CHOICES))
    assert len(chosen) > 1 and chosen <= set(CHOICES)
