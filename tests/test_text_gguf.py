"""GGUF tokenizers against ids by other people's tokenizers (see scripts/make_text_fixtures.py)."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax.text import load
from lepton_jax.text.pieces import TokenizerError
from lepton_jax.text.pretokenizers import PRE_TOKENIZERS

FIXTURES = Path(__file__).parent / "fixtures" / "text"
CUTS = json.loads((FIXTURES / "cuts.json").read_text())
TINY = json.loads((FIXTURES / "tiny.json").read_text())
GROUPS = {name: group["ids"] for group in CUTS["groups"] for name in group["names"]}


def byte_level(pre="smollm", **changes):
    """GGUF metadata of the byte-level vocabulary, with `tokenizer.ggml.*` values changed."""
    values = {name: CUTS[name] for name in ("tokens", "token_type", "merges")}
    values |= {"model": "gpt2", "pre": pre, "bos_token_id": 1, "eos_token_id": 2} | changes
    return {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}


def sentencepiece(**changes):
    values = TINY["metadata"] | {"model": "llama"} | changes
    return {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}


def differing(tokenizer, rows, expected):
    pairs = zip(rows, expected, strict=True)
    return [t for t, ids in pairs if ids is not None and tokenizer.encode(t, False) != ids]


def test_every_accepted_cut_is_in_the_fixture():
    assert set(GROUPS) == set(PRE_TOKENIZERS)
    assert len(CUTS["groups"]) == 10  # the vocabulary tells the cuts apart


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_each_cut_gives_the_known_ids(pre):
    assert sum(ids is not None for ids in GROUPS[pre]) >= 150
    assert differing(load(byte_level(pre)), CUTS["rows"], GROUPS[pre]) == []


def test_digits_stand_alone_for_smollm_only():
    tokenizer = load(byte_level("smollm"))
    assert [tokenizer.id_to_text(i) for i in tokenizer.encode("a  12")] == ["a", "  ", "1", "2"]
    merged = load(byte_level("gpt-2"))
    assert [merged.id_to_text(i) for i in merged.encode("1234567890")] != list("1234567890")


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o"])
def test_words_end_at_a_change_of_case_and_keep_their_marks(pre):
    def words(text):
        return [text[a:b] for _, (a, b) in PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)]

    assert words("नमस्ते") == ["नमस्ते"]
    assert words("straßeÜBERé camelCase") == ["straße", "ÜBERé", " camel", "Case"]


def test_qwen_composes_and_ignore_merges_takes_whole_words():
    decomposed, composed = "cafe\u0301", "caf\u00e9"
    qwen, plain = load(byte_level("qwen2")), load(byte_level("gpt-2"))
    assert qwen.encode(decomposed) == qwen.encode(composed)
    assert plain.encode(decomposed) != plain.encode(composed)
    words = {"tokens": CUTS["tokens"] + ["zqz"], "token_type": CUTS["token_type"] + [1]}
    assert load(byte_level("llama-bpe", **words)).encode("zqz", False) == [len(CUTS["tokens"])]
    assert len(load(byte_level("smaug-bpe", **words)).encode("zqz", False)) == 3


def test_space_prefixed_sentencepiece_gives_the_known_ids():
    assert differing(load(sentencepiece()), TINY["rows"], TINY["gguf"]) == []
    phi3 = load(sentencepiece() | {"general.architecture": "phi3"})
    assert differing(phi3, TINY["rows"], TINY["phi3"]) == []
    assert TINY["gguf"] != TINY["phi3"]


def test_sentencepiece_without_space_prefix():
    tokenizer = load(sentencepiece(add_space_prefix=False))
    with_prefix = load(sentencepiece())
    assert tokenizer.encode(" the<|end|> the", False) == [
        *with_prefix.encode("the", False),
        *with_prefix.encode("<|end|>", False),
        *with_prefix.encode("the", False),
    ]
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_special_tokens_of_metadata():
    tokenizer = load(byte_level("llama-bpe"))
    assert tokenizer.encode("") == [1]  # this cut's files want bos unless they say otherwise
    assert load(byte_level("llama-bpe", add_bos_token=False)).encode("") == []
    assert load(byte_level("smollm", add_eos_token=True)).encode("") == [2]
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_ids == (2, 0)  # the named one, then <|endoftext|>, a control token
    assert load(byte_level(eot_token_id=7)).eos_ids == (2, 7, 0)
    assert tokenizer.encode("<|im_start|><|im_end|>", False) == [1, 2]
    assert tokenizer.decode([1, 2, *tokenizer.encode("hi", False)]) == "hi"
    assert load(sentencepiece()).encode("") == [1]
    assert tokenizer.vocab_size == len(CUTS["tokens"])


def test_ids_that_the_vocabulary_lacks_spell_nothing():
    tokenizer = load(byte_level())
    assert tokenizer.id_to_bytes(tokenizer.vocab_size + 5) == b""
    with pytest.raises(ValueError, match="-1 is negative"):
        tokenizer.id_to_bytes(-1)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level("nonesuch"), "pre is 'nonesuch'.*Known: a.x-4.0.*smollm"),
        (byte_level(None), "pre is missing"),
        (byte_level(model="bert"), "model is 'bert'; supported: gpt2, llama"),
        (byte_level(model=None), "model is missing"),
        (byte_level(merges=None), "merges is missing"),
        (byte_level(merges=["ab"]), "merges.0. is 'ab'"),
        (byte_level(merges=["q \u9999"]), "merges don't fit"),
        (byte_level(tokens=[]), "tokens is empty"),
        (byte_level(tokens=["a", "a"], token_type=None), "holds 1 duplicates"),
        (byte_level(token_type=[1]), "token_type has 1 values"),
        (byte_level(tokens=["a", 3]), "tokens.1. is 3; a str is needed"),
        (byte_level(merges=[3]), "merges.0. is 3; a str is needed"),
        (byte_level(tokens=["a"], token_type=[9]), "token_type.0. is 9; known types are 0 to 6"),
        (byte_level(tokens=["a"], token_type="x"), "token_type is a str; a list is needed"),
        (byte_level("") | {"tokenizer.ggml.pre": ["gpt-2"]}, r"pre is .'gpt-2'."),
        (byte_level(bos_token_id=10**6), "bos_token_id is 1000000; ids go from 0"),
        (byte_level(add_bos_token=True, bos_token_id=None), "add_bos_token is set, but"),
        (sentencepiece(scores=None), "scores is missing"),
        (sentencepiece(scores=[0.0]), "scores has 1 values"),
        (sentencepiece(unknown_token_id=-3), "unknown_token_id is -3"),
    ],
)
def test_bad_metadata_is_refused_by_name(metadata, message):
    with pytest.raises(TokenizerError, match=message):
        load(metadata)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_metadata_loads_or_is_refused(data):
    metadata = data.draw(st.sampled_from([sentencepiece(), byte_level()]))
    metadata = {key: list(v) if isinstance(v, list) else v for key, v in metadata.items()}
    odd = st.sampled_from([None, -1, 0, 2**40, 0.5, float("nan"), "", "\x00", " ", "a", [], ["x"]])
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=3)):
        value = metadata[key]
        if isinstance(value, list) and value and data.draw(st.booleans()):
            value[data.draw(st.integers(0, len(value) - 1))] = data.draw(odd)
        else:
            metadata[key] = data.draw(odd)
    try:
        tokenizer = load(metadata)
    except TokenizerError:
        return
    ids = tokenizer.encode("Hello 12\u00e9")
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert "\ufffd" not in tokenizer.decode(ids)


def test_text_that_is_no_text():
    tokenizer = load(byte_level())
    with pytest.raises(TokenizerError, match="character 1 is half of a surrogate pair"):
        tokenizer.encode("a\ud800")
    with pytest.raises(TypeError, match="text is a bytes"):
        tokenizer.encode(b"a")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models_give_the_known_ids(name, request):
    tokenizer = load(request.getfixturevalue(f"{name}_path"))
    rows = json.loads((FIXTURES / f"{name}.json").read_text())["rows"]
    assert len(rows) >= 200
    assert differing(tokenizer, *zip(*rows, strict=True)) == []
    for text, ids in rows:
        visible = [i for i in ids if i not in tokenizer.control_ids]
        if len(visible) == len(ids) and "\u2581" not in text:
            assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_real_models_special_tokens(smollm2_path, gemma3_path):
    smollm2, gemma3 = load(smollm2_path), load(gemma3_path)
    assert (smollm2.bos_id, smollm2.eos_ids, smollm2.encode("")) == (1, (2, 0), [])
    assert (gemma3.bos_id, gemma3.eos_ids, gemma3.encode("")) == (2, (1, 106), [2])
    ids = smollm2.apply_chat([{"role": "user", "content": "Hi"}])
    assert ids[0] == 1 and ids[-4:] == smollm2.encode("<|im_start|>assistant\n")
    with pytest.raises(ValueError, match="has no chat template"):
        gemma3.apply_chat([{"role": "user", "content": "Hi"}])
