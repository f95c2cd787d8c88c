"""Answers from a fake engine: text, ids, stop strings, several choices, refusals."""

import pytest
from jobs_fakes import EOS, ByteTokenizer, FakeEngine

from lepton_jax.config import SamplingParams
from lepton_jax.jobs.generate import GenerateMode
from lepton_jax.jobs.rows import RowError
from lepton_jax.jobs.session import Session


def answer(text, params, *, said, block=3):
    """The completion of one prompt by an engine that says `said`, and the deltas."""
    engine = FakeEngine(lambda _: said.encode(), block=block)
    session = Session(engine, ByteTokenizer())
    session.add("a", text, params)
    deltas = list(session.deltas())
    assert not engine.has_work
    return deltas[-1].completion, deltas


def test_an_answer_ends_with_the_eos_id_that_is_not_in_its_text():
    completion, deltas = answer("hi", SamplingParams(), said="yes é 北京")
    assert completion.text == "yes é 北京" == "".join(delta.text for delta in deltas)
    assert completion.token_ids == [*"yes é 北京".encode(), EOS]
    assert (completion.finish_reason, completion.prompt_tokens) == ("stop", 2)
    assert completion.logprobs is None


def test_a_stop_id_is_not_in_the_text_even_where_it_spells_something():
    params = SamplingParams(stop_token_ids=[ord("c")])
    completion, _ = answer("x", params, said="abcd")
    assert (completion.text, completion.token_ids) == ("ab", [*b"abc"])


class Controlled(ByteTokenizer):
    """Byte 1 is a control token."""

    control_ids = frozenset({EOS, 1})

    def encode(self, text, add_special=True):
        return list(text.replace("<end>", "\1").encode())


def test_a_stop_text_that_is_a_control_token_stops():
    engine = FakeEngine(lambda _: b"ab\1cd")
    session = Session(engine, Controlled())
    session.add("a", "x", SamplingParams(stop=["<end>", "d"]))
    completion = list(session.deltas())[-1].completion
    assert (completion.text, completion.finish_reason) == ("ab", "stop")
    ((_, params),) = engine.added
    assert (params.stop, params.stop_token_ids) == (("d",), (1,))
    mode = GenerateMode(SamplingParams(stop=["<end>"]))
    ((_, asked),) = mode.requests(mode.parse({"prompt": "x"}), Controlled())
    assert asked.stop_token_ids == (1,)


def test_length_and_a_character_cut_in_two():
    completion, _ = answer("x", SamplingParams(max_tokens=4), said="ab北")
    assert (completion.text, completion.finish_reason) == ("ab�", "length")
    assert completion.token_ids == [*"ab北".encode()[:4]]


@pytest.mark.parametrize("block", [1, 2, 3, 50])
def test_a_stop_string_across_beats_cuts_text_ids_and_logprobs(block):
    params = SamplingParams(stop=["END", "zz"], logprobs=0)
    completion, deltas = answer("x", params, said="on EN EaND é END tail", block=block)
    kept = "on EN EaND é "
    assert completion.text == kept == "".join(delta.text for delta in deltas)
    assert completion.finish_reason == "stop"
    assert completion.token_ids == [*kept.encode()]
    assert completion.logprobs == [(-float(t), []) for t in kept.encode()]


def test_text_that_only_begins_a_stop_string_comes_at_the_end():
    completion, _ = answer("x", SamplingParams(stop=["END"]), said="so EN")
    assert (completion.text, completion.token_ids[-1]) == ("so EN", EOS)


def test_an_answer_that_begins_with_its_stop_string_is_empty():
    completion, _ = answer("x", SamplingParams(stop=["no"]), said="no way")
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("", [], "stop")


def test_stop_strings_count_after_min_tokens():
    params = SamplingParams(stop=["a"], min_tokens=4)
    assert answer("x", params, said="abababab")[0].text == "abab"
    assert answer("x", params, said="aaa北北a")[0].text == "aaa北北"


def test_no_stop_string_over_the_edge_of_min_tokens():
    params = SamplingParams(stop=["cd"], min_tokens=3)
    assert answer("x", params, said="abcdecd")[0].text == "abcde"


def test_the_request_is_aborted_at_its_stop_string_and_others_go_on():
    engine = FakeEngine(block=1, rows=2)
    session = Session(engine, ByteTokenizer())
    session.add("long", "aXbbbbbbbb", SamplingParams(stop=["X"]))
    session.add("other", "cccc", SamplingParams())
    done = {delta.key: delta.completion.text for delta in session.deltas() if delta.completion}
    assert done == {"long": "a", "other": "cccc"}
    assert engine.aborted == ["long/0"]
    assert engine.steps == 5


def test_several_choices_are_one_completion_and_seeds_count_up():
    engine = FakeEngine(rows=1)
    session = Session(engine, ByteTokenizer())
    session.add("a", "hello", SamplingParams(n=3, seed=5, temperature=1))
    session.add("a/0", "other", SamplingParams())
    assert len(session) == 4
    deltas = list(session.deltas())
    completions = {delta.key: delta.completion for delta in deltas if delta.completion}
    assert [choice.text for choice in completions["a"].choices] == ["hello"] * 3
    assert len(completions["a/0"].choices) == 1
    assert [params.seed for _, params in engine.added] == [5, 6, 7, None]
    assert [name for name, _ in engine.added] == ["a/0", "a/1", "a/2", "a/0/0"]


def test_messages_and_ids_as_prompts():
    engine = FakeEngine()
    session = Session(engine, ByteTokenizer())
    session.add("chat", [{"role": "user", "content": "hi"}], SamplingParams())
    session.add("ids", [*b"raw"], SamplingParams())
    texts = {delta.key: delta.completion.text for delta in session.deltas() if delta.completion}
    assert texts == {"chat": "u:hi;", "ids": "raw"}


def test_a_text_goes_on_with_its_space_and_a_message_begins_without_the_tokenizers():
    class Sentencepiece(ByteTokenizer):
        leading_space = True  # of encoding: its ids begin with a space that the text has not
        source, vocab_size, bos_id = "bytes", 257, None

    engine = FakeEngine(lambda _: b" c d")
    session = Session(engine, Sentencepiece())
    session.add("text", "a b", SamplingParams())
    session.add("ids", [*b" a b"], SamplingParams())
    session.add("chat", [{"role": "user", "content": "a b"}], SamplingParams())
    texts = {delta.key: delta.completion.text for delta in session.deltas() if delta.completion}
    assert texts == {"text": " c d", "ids": " c d", "chat": "c d"}
    session.add("form", [{"role": "user", "content": "a"}], SamplingParams(choices=(" c d", "e")))
    assert [*session.deltas()][-1].completion.text == " c d"  # one of the choices as it stands


def test_refusals_queue_nothing():
    engine = FakeEngine(max_len=5)
    session = Session(engine, ByteTokenizer())
    with pytest.raises(RowError, match="over max_len=5") as refused:
        session.add("a", "too long", SamplingParams(n=2))
    assert refused.value.kind == "refused"
    with pytest.raises(RowError, match="'bad'") as invalid:
        session.add("b", [{"role": "bad", "content": "x"}], SamplingParams())
    assert invalid.value.kind == "invalid_prompt"
    session.add("c", "x", SamplingParams())
    with pytest.raises(RowError, match="'c' is already"):
        session.add("c", "x", SamplingParams())
    assert len(session) == 1


def test_logits_that_are_not_finite_end_the_choice_as_an_error():
    engine = FakeEngine()
    engine.fails = {"a/0"}
    session = Session(engine, ByteTokenizer())
    session.add("a", "x", SamplingParams())
    (delta,) = session.deltas()
    assert delta.completion.finish_reason == "error"


def test_close_drops_what_is_open():
    engine = FakeEngine()
    session = Session(engine, ByteTokenizer())
    session.add("a", "x", SamplingParams(n=2))
    session.close()
    assert not session.has_work
    assert engine.aborted == ["a/0", "a/1"]


def test_an_idle_engine_with_open_prompts_is_an_error_not_a_hang():
    engine = FakeEngine()
    session = Session(engine, ByteTokenizer())
    session.add("a", "x", SamplingParams())
    engine.abort("a/0")
    with pytest.raises(RuntimeError, match="1 requests unanswered"):
        list(session.deltas())
