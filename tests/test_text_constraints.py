"""Schemas with words that are no keywords, and constraints of a whole run, are refused by name."""

import pytest
from jobs_fakes import ByteTokenizer

from lepton_jax.config import SamplingParams
from lepton_jax.jobs.generate import GenerateMode
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
