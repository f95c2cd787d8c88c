"""Hugging Face directories: which file says what about special tokens, end tokens and templates."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lepton_jax.text import load
from lepton_jax.text.pieces import TokenizerError

FIXTURES = Path(__file__).parent / "fixtures" / "text"
CUTS = json.loads((FIXTURES / "cuts.json").read_text())
USER = [{"role": "user", "content": "Hi"}]


def byte_level_json(*, bos: bool = False) -> tokenizers.Tokenizer:
    vocabulary = {token: i for i, token in enumerate(CUTS["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in CUTS["merges"]]
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens([tokenizers.AddedToken("<think>\u0120", special=False)])
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    return made


def sentencepiece_json(*, strip: bool) -> tokenizers.Tokenizer:
    """Like Gemma's (no space in front) or, with `strip`, like Llama 2's tokenizer.json."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += ["\u2581", "h", "i", "hi", "\u2581hi"]
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[("h", "i"), ("\u2581", "hi")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    steps = [normalizers.Prepend("\u2581")] if strip else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    ends = [decoders.Strip(" ", 1, 0)] if strip else []
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def directory(path: Path, made: tokenizers.Tokenizer | None = None, **files) -> Path:
    """A directory with `made` as tokenizer.json and `files` (name without .json -> content)."""
    if made:
        made.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_byte_level_directory(tmp_path):
    config = {
        "bos_token": {"content": "<|im_start|>"},
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    }
    made = byte_level_json()
    made.enable_truncation(2)
    tokenizer = load(directory(tmp_path, made, tokenizer_config=config))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert (
        tokenizer.encode("Hello world 12345") == byte_level_json().encode("Hello world 12345").ids
    )
    assert tokenizer.apply_chat(USER) == [1, *tokenizer.encode("Hi"), 2]
    assert tokenizer.vocab_size == len(CUTS["tokens"]) + 1
    assert tokenizer.id_to_bytes(tokenizer.vocab_size - 1) == "<think>\u0120".encode()
    assert load(tmp_path / "tokenizer.json").encode("hi") == tokenizer.encode("hi")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    made = byte_level_json()
    return load(directory(tmp_path_factory.mktemp("byte_level"), made)), made


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=50))
def test_decode_is_the_library_s_decode(byte_level, text):
    tokenizer, library = byte_level
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == library.decode(ids) == text


def test_bos_comes_from_the_post_processor_or_from_the_flags(tmp_path):
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    path = directory(tmp_path, byte_level_json(bos=True), tokenizer_config=config)
    assert load(path).encode("")[:1] == [1]
    flags = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": True}
    directory(path, tokenizer_config=config | flags)
    assert load(path).encode("") == [0, 2]
    directory(path, tokenizer_config=config | flags | {"add_bos_token": False})
    assert load(path).encode("") == [2]
    directory(path, tokenizer_config=config | {"add_bos_token": False})
    assert load(path).encode("") == [1]  # other classes leave it to the post-processor


def test_a_text_that_begins_with_bos_gets_no_second(tmp_path):
    config = {"bos_token": "<|endoftext|>", "tokenizer_class": "LlamaTokenizerFast"}
    config |= {"add_bos_token": True}
    tokenizer = load(directory(tmp_path, byte_level_json(), tokenizer_config=config))
    plain = tokenizer.encode("Hi", add_special=False)
    assert tokenizer.encode("Hi") == tokenizer.encode("<|endoftext|>Hi") == [0, *plain]
    assert tokenizer.encode("Hi<|endoftext|>") == [0, *plain, 0]


def test_end_tokens_are_those_of_generation_then_the_tokenizer_s(tmp_path):
    config = {"eos_token": "<|im_end|>"}
    path = directory(
        tmp_path, byte_level_json(), tokenizer_config=config, config={"eos_token_id": 5}
    )
    assert load(path).eos_ids == (5, 2)
    directory(path, generation_config={"eos_token_id": [7, 2]})
    assert load(path).eos_ids == (7, 2)
    directory(path, generation_config={"eos_token_id": 9})
    assert load(path).eos_ids == (9, 2)


def test_tools_need_a_template_that_offers_them(tmp_path):
    template = {"chat_template": "{{ messages[0].content }}"}
    tokenizer = load(directory(tmp_path, byte_level_json(), tokenizer_config=template))
    with pytest.raises(ValueError, match="has no place for tools: leave them out"):
        tokenizer.render_chat(USER, tools=[{"name": "f"}])
    assert tokenizer.render_chat(USER) == tokenizer.render_chat(USER, tools=[])


def test_variables_go_into_every_chat_of_a_template_that_reads_them(tmp_path):
    template = "{% if think is not defined %}{% set think = true %}{% endif %}"
    template += "{{ messages[0].content }}{% if think %}?{% endif %}"
    named = {"chat_template": [{"name": "default", "template": template}]}
    tokenizer = load(directory(tmp_path, byte_level_json(), tokenizer_config=named))
    assert tokenizer.render_chat(USER) == "Hi?"
    tokenizer.set_chat_variables({"think": False})
    assert tokenizer.render_chat(USER) == "Hi"
    assert tokenizer.apply_chat(USER) == tokenizer.encode("Hi")
    assert tokenizer.render_chat(USER, think=True) == "Hi?"
    with pytest.raises(ValueError, match=r"that reads 'thnk': .* \(read: messages, think\)"):
        tokenizer.set_chat_variables({"thnk": False})
    plain = load(directory(tmp_path, byte_level_json(), tokenizer_config={}))
    plain.set_chat_variables({})
    with pytest.raises(ValueError, match=r"no chat template that reads 'think': .*: nothing\)"):
        plain.set_chat_variables({"think": False})


def test_templates_by_name_and_from_files(tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    path = directory(tmp_path, byte_level_json(), tokenizer_config={"chat_template": named})
    tokenizer = load(path)
    assert tokenizer.chat_template == "D"
    assert tokenizer.render_chat(USER) == "D"
    assert tokenizer.render_chat(USER, tools=[{"name": "f"}]) == "T"
    (path / "chat_template.jinja").write_text("F")
    assert load(path).render_chat(USER) == "F"
    plain = directory(tmp_path, byte_level_json(), tokenizer_config={})
    (path / "chat_template.jinja").unlink()
    assert load(plain).chat_template is None
    with pytest.raises(ValueError, match="has no chat template"):
        load(plain).apply_chat(USER)


@pytest.mark.parametrize("strip", [False, True])
def test_sentencepiece_style_json(tmp_path, strip):
    made = sentencepiece_json(strip=strip)
    tokenizer = load(directory(tmp_path, made))
    assert tokenizer.leading_space is strip
    for text in ("hi", " hi", "hi hi", "h\u00e9 \u4f60\U0001f389", "<s>hi</s>"):
        ids = tokenizer.encode(text)
        assert ids == made.encode(text).ids
        assert tokenizer.decode(ids) == made.decode(ids)


def test_sentencepiece_model_directory(tmp_path):
    shutil.copy(FIXTURES / "tiny.model", tmp_path / "tokenizer.model")
    bare = load(tmp_path)
    assert (bare.bos_id, bare.eos_ids, bare.encode("")) == (1, (2,), [1])
    extra = {str(bare.vocab_size): {"content": "<|im_end|>", "special": True, "rstrip": True}}
    config = {"added_tokens_decoder": extra, "eos_token": "<|im_end|>", "add_bos_token": False}
    tokenizer = load(directory(tmp_path, tokenizer_config=config))
    new = bare.vocab_size
    assert (tokenizer.vocab_size, tokenizer.eos_ids) == (new + 1, (new,))
    word = bare.encode("Hello", False)
    assert tokenizer.encode("Hello<|im_end|>\n Hello") == [*word, new, *word]
    assert tokenizer.decode([*word, new]) == "Hello"
    # legacy: false puts the space only before the very first stretch
    later = load(directory(tmp_path, tokenizer_config=config | {"legacy": False}))
    assert later.encode("Hello<|im_end|> Hello") == [
        *word,
        new,
        *later.encode("<|im_end|>Hello")[1:],
    ]
    assert later.encode("<|im_end|>Hello")[1:] != word


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(TokenizerError, match="holds neither tokenizer.json nor tokenizer.model"):
        load(tmp_path)
    with pytest.raises(TokenizerError, match="doesn't exist"):
        load(tmp_path / "none.json")
    other = tmp_path / "vocab.txt"
    other.write_text("x")
    with pytest.raises(TokenizerError, match="no tokenizer by its name"):
        load(other)
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(TokenizerError, match="can't be"):
            load(tmp_path / name)
    made = byte_level_json()
    made.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="decoder is WordPiece; supported: ByteLevel"):
        load(directory(tmp_path, made))
    directory(tmp_path, byte_level_json(), tokenizer_config=[])
    with pytest.raises(TokenizerError, match="tokenizer_config.json holds a list"):
        load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match="tokenizer_config.json is not valid JSON"):
        load(tmp_path)
