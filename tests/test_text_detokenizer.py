"""Incremental text: the deltas are the whole whatever the split; stops are found exactly."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from lepton_jax.text import Detokenizer, load

FIXTURES = Path(__file__).parent / "fixtures" / "text"
CUTS = json.loads((FIXTURES / "cuts.json").read_text())
BYTE_LEVEL = load(
    {f"tokenizer.ggml.{name}": CUTS[name] for name in ("tokens", "token_type", "merges")}
    | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
)
SPM = load(FIXTURES / "tiny.model")


class Alphabet:
    """A toy vocabulary that makes stop strings and broken characters likely."""

    pieces = [b"a", b"b", b"ab", b"ba", b"aab", b"\xc3", b"\xa9", "\u00e9".encode(), b"<end>", b""]
    control_ids = frozenset({8})
    leading_space = False

    def id_to_bytes(self, token_id):
        return self.pieces[token_id]


def split(ids, cuts):
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


def run(tokenizer, parts, stop=()):
    detokenizer = Detokenizer(tokenizer, stop)
    deltas = [detokenizer.add(part)[0] for part in parts]
    return [*deltas, detokenizer.finish()], detokenizer


def plain_decode(tokenizer, ids):
    data = b"".join(tokenizer.id_to_bytes(i) for i in ids if i not in tokenizer.control_ids)
    data = data.removeprefix(b" ") if tokenizer.leading_space else data
    return data.decode("utf-8", "replace")


def id_lists(tokenizer):
    return st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=40)


splits = st.lists(st.integers(0, 1000), max_size=8)


@settings(max_examples=300, deadline=None)
@given(ids=id_lists(BYTE_LEVEL), cuts=splits)
def test_byte_level_deltas_are_the_whole(ids, cuts):
    deltas, detokenizer = run(BYTE_LEVEL, split(ids, cuts))
    assert "".join(deltas) == detokenizer.text == BYTE_LEVEL.decode(ids)
    assert detokenizer.text == plain_decode(BYTE_LEVEL, ids)
    assert detokenizer.num_ids == len(ids)


@settings(max_examples=300, deadline=None)
@given(ids=id_lists(SPM), cuts=splits)
def test_sentencepiece_deltas_are_the_whole(ids, cuts):
    deltas, detokenizer = run(SPM, split(ids, cuts))
    assert "".join(deltas) == detokenizer.text == SPM.decode(ids) == plain_decode(SPM, ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_round_trip_of_any_text_and_no_broken_character_on_the_way(text):
    ids = BYTE_LEVEL.encode(text, add_special=False)
    assume(not BYTE_LEVEL.control_ids & set(ids))  # such as <|endoftext|>, written out
    deltas, _ = run(BYTE_LEVEL, [[i] for i in ids])
    assert "".join(deltas) == text
    assert deltas[-1] == ""
    first, *others = ids = SPM.encode(text)
    assert first == SPM.bos_id
    assume(not SPM.control_ids & set(others))  # such as <unk>
    spaces = text.replace("\u2581", " ")
    deltas, _ = run(SPM, [[i] for i in ids])
    assert "".join(deltas) == spaces
    # A prefix of the text at every step: never a half character, never one taken back.
    assert all(spaces.startswith("".join(deltas[:n])) for n in range(len(deltas)))


def test_decode_agrees_with_the_libraries():
    library = SentencePieceProcessor(model_file=str(FIXTURES / "tiny.model"))
    for text in CUTS["rows"]:
        ids = library.encode(text)
        assert SPM.decode(ids) == library.decode(ids)


def first_stop(text, stops):
    """(start, end) of the stop string that is complete first, the longest of several; or None."""
    found = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not found:
        return None
    end, minus_length = min(found)
    return end + minus_length, end


stop_lists = st.lists(st.text("ab\u00e9<", min_size=1, max_size=4), max_size=3)


@settings(max_examples=1000, deadline=None)
@given(ids=st.lists(st.integers(0, 9), max_size=30), cuts=splits, stops=stop_lists)
def test_stop_strings_are_found_exactly(ids, cuts, stops):
    tokenizer = Alphabet()
    whole = plain_decode(tokenizer, ids)
    where = first_stop(whole, stops)
    deltas, detokenizer = run(tokenizer, split(ids, cuts), stops)
    assert "".join(deltas) == (whole if where is None else whole[: where[0]])
    assert detokenizer.stopped == (where is not None)


@settings(max_examples=500, deadline=None)
@given(ids=st.lists(st.sampled_from([0, 1, 2, 3, 4, 7]), max_size=20), stops=stop_lists)
def test_only_the_longest_possible_beginning_is_held_back(ids, stops):
    tokenizer = Alphabet()
    detokenizer = Detokenizer(tokenizer, stops)
    for count, token_id in enumerate(ids, start=1):
        _, stopped = detokenizer.add([token_id])
        sofar = plain_decode(tokenizer, ids[:count])
        if stopped:
            assert detokenizer.num_ids == count
            break
        beginnings = {stop[:n] for stop in stops for n in range(len(stop))} | {""}
        held = max(len(b) for b in beginnings if sofar.endswith(b))
        assert detokenizer.text == sofar[: len(sofar) - held]


def test_ids_after_a_stop_string_are_not_taken_in():
    detokenizer = Detokenizer(Alphabet(), ["aba"])
    assert detokenizer.add([1, 2, 0, 1, 1]) == ("b", True)
    assert (detokenizer.num_ids, detokenizer.text) == (3, "b")
    assert detokenizer.add([1]) == ("", True)
    assert detokenizer.finish() == ""


def test_an_incomplete_last_character_ends_as_replacement():
    detokenizer = Detokenizer(Alphabet())
    assert detokenizer.add([0, 5]) == ("a", False)
    assert detokenizer.finish() == "\ufffd"


def test_stop_strings_that_are_none():
    with pytest.raises(TypeError, match="give a list of strings"):
        Detokenizer(Alphabet(), "ab")
    with pytest.raises(ValueError, match="stop string is empty"):
        Detokenizer(Alphabet(), [""])
