"""LeptonEngine as a notebook would use it: the real demo model's answers, and on a tiny one what is
refused, forgotten and given back.
"""

import dataclasses
import gc
import json
import re
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from compress_makers import model_folder

from lepton_jax import LeptonEngine, SamplingParams, api, compress
from lepton_jax.config import (
    CascadeSection,
    EngineSection,
    ModelSection,
    OptimizerSection,
    RunConfig,
    ScoringSection,
)
from lepton_jax.engine import loop
from lepton_jax.engine.programs import Programs
from lepton_jax.jobs.compress_inputs import load_tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def engine(smollm2_path):
    with LeptonEngine() as lepton:
        yield lepton.load_model(smollm2_path, compression="int8").start()


@pytest.mark.slow
def test_answers_come_in_the_order_of_the_prompts(engine):
    params = SamplingParams(max_tokens=12)
    ids = engine.tokenizer.encode("The sun is")
    first, second, third = engine.generate([QUESTION, "1 2 3 4 5", ids], params)
    assert first.text == "The capital of France is Paris." and first.finish_reason == "stop"
    assert second.text.startswith(" 6 7 8") and second.finish_reason == "length"
    assert third.prompt_tokens == len(ids) and len(third.token_ids) == 12
    assert engine.generate("1 2 3 4 5", params)[0].token_ids == second.token_ids
    assert engine.generate(QUESTION, params) == [first]
    assert engine.generate(ids, params)[0].token_ids == third.token_ids


@pytest.mark.slow
def test_streamed_pieces_add_up(engine):
    params = SamplingParams(max_tokens=20, n=2, temperature=0.8, seed=3)
    texts: dict[tuple[int, int], str] = {}
    done = {}
    for index, delta in engine.stream([QUESTION, "Once upon"], params):
        place = (index, delta.choice)
        texts[place] = texts.get(place, "") + delta.text
        if delta.completion:
            done[index] = delta.completion
    assert sorted(done) == [0, 1]
    for (index, choice), text in texts.items():
        assert text == done[index].choices[choice].text
    assert engine.generate("Once upon", params)[0] == done[1]


@pytest.mark.slow
def test_an_abandoned_stream_leaves_the_engine_free(engine):
    stream = engine.stream(["Once upon a time"], SamplingParams(max_tokens=400))
    next(stream)
    stream.close()
    assert not engine.engine.scheduler.has_work
    assert engine.generate("1 2 3", SamplingParams(max_tokens=3))[0].text == " 4 "


@pytest.mark.slow
def test_refused_prompts_name_the_limit(engine):
    with pytest.raises(ValueError, match="has no tokens"):
        engine.generate([[]])
    with pytest.raises(ValueError, match="engine.max_len"):
        engine.generate([[5] * 5000])
    assert not engine.engine.scheduler.has_work


def test_asking_before_loading_says_what_to_do():
    with pytest.raises(RuntimeError, match="call load_model"):
        LeptonEngine().generate("hello")


def test_unknown_presets_are_named_before_anything_is_read():
    with pytest.raises(ValueError, match="'int3' is unknown: allowed are none, int8, w8a8"):
        LeptonEngine().load_model("/nowhere", compression="int3")


def test_a_draft_changes_no_answer(folder, tmp_path):
    other = model_folder(tmp_path / "other", seed=1, layers=1)
    itself = DRAFTING | dict(draft_cost=0.01, num_pages=16)
    answers = []
    for fields in ({}, itself, itself | {"draft_model": str(other)}):
        with LeptonEngine() as lepton:
            section = dataclasses.replace(SECTION, **fields)
            lepton.load_model(folder, config=RunConfig(engine=section)).start()
            found = lepton.generate(["one two", "three"], LONG)
            answers.append([answer.token_ids for answer in found])
            assert (lepton.engine.stats()["proposed_tokens"] > 0) == bool(fields)
    assert answers[0] == answers[1] == answers[2]


def test_a_second_model_of_another_tokenizer_is_refused(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    draft = dataclasses.replace(SECTION, speculation="draft", draft_model=str(other))
    cascade = CascadeSection(agreement=0.5, model=str(other))
    for config, field in (
        (RunConfig(engine=draft), "engine.draft_model"),
        (RunConfig(engine=SECTION, cascade=cascade), "cascade.model"),
    ):
        with LeptonEngine() as lepton:
            with pytest.raises(ValueError, match=f"{field}='.*other' cuts text into other tokens"):
                lepton.load_model(folder, config=config, compression="int8").start()
            assert lepton.engine is None


SECTION = EngineSection(rows=2, max_len=64, prefill_chunk=32, page_size=16)
DRAFTING = dict(speculation="draft", draft_preset="int8", draft_tokens=2)
LONG = SamplingParams(max_tokens=30, ignore_eos=True)
LABELS = ("one", "three")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("tiny") / "model", layers=1)


@pytest.fixture(scope="module")
def tiny(folder):
    scoring = ScoringSection(labels=LABELS, normalize="mean", layer=1, rank_by="similarity")
    with LeptonEngine() as lepton:
        yield lepton.load_model(folder, config=RunConfig(engine=SECTION, scoring=scoring))


def test_nothing_is_asked_beside_an_open_stream(tiny):
    (expected,) = tiny.generate("one two", LONG)
    stream = tiny.stream(["one two"], LONG)
    deltas = [next(stream)]
    for ask in (
        lambda: tiny.generate("three"),
        lambda: next(tiny.stream("three")),
        lambda: tiny.score("three"),
        lambda: tiny.predict("three"),
        lambda: tiny.embed("three"),
        lambda: tiny.rank("three", ["four", "five"]),
        lambda: tiny.perplexity("three four five"),
        lambda: tiny.start(),
    ):
        with pytest.raises(RuntimeError, match="a stream is open: exhaust or close it first"):
            ask()
    deltas += stream
    assert "".join(delta.text for _, delta in deltas) == expected.text
    assert deltas[-1][1].completion == expected
    stream = tiny.stream(["one two"], LONG)
    next(stream)
    stream.close()
    assert tiny.generate("one two", LONG) == [expected]


def test_a_second_thread_is_refused_and_takes_nothing(tiny, monkeypatch):
    (expected,) = tiny.generate("one two", LONG)
    began, go_on, step = threading.Event(), threading.Event(), tiny.engine.step

    def held():
        began.set()
        assert go_on.wait(60)
        return step()

    monkeypatch.setattr(tiny.engine, "step", held)
    with ThreadPoolExecutor(1) as other:
        answer = other.submit(tiny.generate, "one two", LONG)
        assert began.wait(60)
        for ask in (
            lambda: tiny.generate("three"),
            lambda: next(tiny.stream("three")),
            lambda: tiny.embed("three"),
        ):
            with pytest.raises(RuntimeError, match="another thread is asking this engine: wait"):
                ask()
        go_on.set()
        assert answer.result(60) == [expected]
    assert tiny.generate("one two", LONG) == [expected]


def test_a_pair_may_be_scored_alone(tiny):
    (alone,), (listed,) = tiny.score(("one", " two")), tiny.score([("one", " two")])
    (other,) = tiny.score([("two", " one")])
    assert alone["logprob"] == listed["logprob"] != other["logprob"]
    with pytest.raises(ValueError, match=r"\('a', 'b', 'c'\) can't be scored: want a text, \(con"):
        tiny.score([("a", "b", "c")])


def test_each_prompt_may_have_params_of_its_own(tiny):
    short, biased = SamplingParams(max_tokens=2), dataclasses.replace(LONG, logit_bias={7: 99.0})
    answers = tiny.generate(["one", "two"], [dataclasses.replace(LONG, max_tokens=3), biased])
    assert [len(answer.token_ids) for answer in answers] == [3, 30]
    assert set(answers[1].token_ids) == {7} != set(answers[0].token_ids)
    assert tiny.generate("two", [biased]) == answers[1:]
    stream = tiny.stream(["one", "two"], [biased, short])
    assert [index for index, delta in stream if delta.completion] == [1, 0]
    for given in ([], [short], [short] * 3):
        with pytest.raises(ValueError, match=f"2 prompts and {len(given)} SamplingParams"):
            tiny.generate(["one", "two"], given)


def test_tools_go_with_messages(tiny, monkeypatch):
    template = "{% for t in tools or [] %}{{ t.name }}!{% endfor %}{{ messages[0].content }}"
    monkeypatch.setitem(tiny.tokenizer._parts.templates, "default", template)
    chat, tools = [{"role": "user", "content": "hi"}], [{"name": "clock"}]
    for options, text in (({}, "hi"), ({"tools": tools}, "clock!hi")):
        (answer,) = tiny.generate([chat], LONG, **options)
        assert answer.prompt_tokens == len(text)
        *_, (_, delta) = tiny.stream(chat, LONG, **options)
        assert delta.completion == answer
    with pytest.raises(ValueError, match="tools go with messages, not with 'hi'"):
        tiny.generate(["hi"], tools=tools)


def test_chats_are_classified_as_their_rows_would_be(tiny, monkeypatch):
    template = "{{ messages[0].content }}"
    monkeypatch.setitem(tiny.tokenizer._parts.templates, "default", template)
    chat = [{"role": "user", "content": "hi"}]
    found = tiny.predict([chat, chat], chat=True)
    assert found.shape == (2, 2)
    np.testing.assert_array_equal(tiny.predict(chat, chat=True)[0], found[0])
    for one in (chat, chat[0]):
        with pytest.raises(ValueError, match="the row has messages, which want scoring.chat=true"):
            tiny.predict(one)


def test_one_text_is_one_row_and_no_texts_are_none(tiny):
    assert tiny.predict("Lovely soup!").shape == (1, 2) and tiny.predict([]).shape == (0, 2)
    assert tiny.embed("Lovely soup!").shape == (1, 32) and tiny.embed([]).shape == (0, 32)
    assert tiny.embed([]).dtype == np.float32
    (row,) = tiny.score({"context": "Lovely", "choices": [" soup!", " kettle!"]})
    assert len(row["choices"]) == 2 and tiny.score([]) == []
    for ask in (
        lambda: tiny.predict("soup", "good"),
        lambda: tiny.rank("soup", "good"),
        lambda: tiny.perplexity(["soup"]),
    ):
        with pytest.raises(ValueError, match=r"want (a list of )?(two or more|a text)"):
            ask()


def test_progress_is_a_bar_of_rows(tiny, capsys):
    texts, pairs = ["soup", "kettle"], [("soup", " bowl"), ("kettle", " lid")]
    for ask, what in (
        (tiny.generate, texts),
        (tiny.score, pairs),
        (tiny.predict, texts),
        (tiny.embed, texts),
    ):
        assert len(ask(what)) == 2
        assert capsys.readouterr().err == ""
        assert len(ask(what, progress=True)) == 2
        assert re.search(r"2/2 .*row.*\d tokens/s, 0 errors\]", capsys.readouterr().err)


def test_what_is_given_counts_even_where_it_is_nothing(tiny):
    by_sum = tiny.predict("soup", normalize="sum")
    np.testing.assert_array_equal(tiny.predict("soup", normalize=""), by_sum)
    assert (tiny.predict("soup") != by_sum).any()
    texts = ["soup", "kettle"]
    query, *candidates = tiny.embed(["meal", *texts], layer=0)
    scores = dict(tiny.rank("meal", texts, layer=0))
    np.testing.assert_allclose([scores[0], scores[1]], candidates @ query, rtol=1e-5)
    assert scores != dict(tiny.rank("meal", texts))
    for ask in (
        lambda: tiny.predict("soup", alert="one>=0.5"),
        lambda: tiny.predict("soup", layer=3),
        lambda: tiny.rank("meal", texts, calibrate=True),
        lambda: tiny.rank("meal", texts, labels=["a", "b"]),
    ):
        with pytest.raises(TypeError, match="alert|layer|calibrate|labels"):
            ask()
    with pytest.raises(ValueError, match="system='Be brief' is read with scoring.chat=True"):
        tiny.predict("soup", system="Be brief")
    with pytest.raises(ValueError, match="scoring.normalize='sum' is read with .*likelihood only"):
        tiny.rank("meal", texts, rank_by="similarity", normalize="sum")


def arrays(lepton):
    """Weak references to what an engine keeps on its device, but for the model's weights."""
    runner = lepton.engine.runner
    held = runner._caches, runner._state, runner._drafting, runner._draft_leaves
    return [weakref.ref(array) for array in jax.tree.leaves(held)]


def test_stopping_and_starting_again_give_memory_back(folder):
    section = dataclasses.replace(SECTION, **DRAFTING, num_pages=16)
    lepton = LeptonEngine().load_model(folder, config=RunConfig(engine=section))
    gc.disable()
    try:
        for give_back in (lepton.start, lepton.stop):
            lepton.start(workload=[(3, LONG)])
            stream = lepton.stream("one two", LONG)
            next(stream)
            held = arrays(lepton)
            assert len(held) > 10
            if give_back == lepton.start:
                stream.close()
            else:
                held += [weakref.ref(array) for array in jax.tree.leaves(lepton.loaded.leaves)]
            give_back()
            assert not [ref for ref in held if ref() is not None]
            assert list(stream) == []
    finally:
        gc.enable()


def test_strict_wants_a_workload(tiny):
    with pytest.raises(ValueError, match="strict=True refuses what a workload can't reach"):
        tiny.start(strict=True)


def told(monkeypatch, name, owner, events):
    """Notes the calls of a function."""
    function = getattr(owner, name)

    def noted(*args, **options):
        events.append(name)
        return function(*args, **options)

    monkeypatch.setattr(owner, name, noted)


@pytest.mark.parametrize("kind", ["draft", "cascade"])
def test_all_weights_are_read_and_all_engines_planned_before_a_cache_is_there(
    folder, monkeypatch, kind
):
    events, config = [], RunConfig(engine=SECTION)
    if kind == "draft":
        section = dataclasses.replace(SECTION, **DRAFTING)
        config = dataclasses.replace(config, engine=section)
    else:
        config = dataclasses.replace(config, cascade=CascadeSection(agreement=0.5))
    for name, owner in (
        ("load_compressed", api),
        ("cache_budget", loop),
        ("warm_up", loop.Engine),
    ):
        told(monkeypatch, name, owner, events)
    monkeypatch.setattr(Programs, "warm_up", lambda *_, **__: None)  # nothing runs here
    with LeptonEngine() as lepton:
        lepton.load_model(folder, config=config, compression="int8")
        lepton.start(workload=[(3, LONG)])
    engines = 1 if kind == "draft" else 2
    assert events == [
        *["load_compressed"] * 2,
        *["cache_budget"] * engines,
        *["warm_up"] * engines,
    ]


def test_a_model_is_asked_with_the_variables_of_its_config(tmp_path):
    folder = model_folder(tmp_path / "model", layers=1)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}{{ mood }}")
    model = ModelSection(chat_variables={"mood": " gladly"})
    config = RunConfig(engine=SECTION, model=model, cascade=CascadeSection(agreement=0.5))
    asked = [{"role": "user", "content": "one"}]
    with LeptonEngine() as lepton:
        lepton.load_model(folder, config=config, compression="int8")
        ids = lepton.tokenizer.encode("one gladly", add_special=False)
        assert lepton.tokenizer.apply_chat(asked) == ids
        assert load_tokenizer(lepton.config).apply_chat(asked) == ids
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ValueError, match="no chat template that reads 'mood'"):
        lepton.load_model(folder, config=config, compression="int8")
    assert lepton.loaded is None


def test_a_failed_load_or_start_leaves_nothing_half_done(folder, tmp_path, monkeypatch):
    missing = ModelSection(tokenizer=str(tmp_path / "nowhere"))
    lepton = LeptonEngine()
    with pytest.raises(ValueError, match="nowhere"):
        lepton.load_model(folder, config=RunConfig(engine=SECTION, model=missing))
    assert lepton.loaded is lepton.tokenizer is None
    cascade = CascadeSection(agreement=0.5, model=str(tmp_path / "nowhere"))
    config = RunConfig(engine=SECTION, cascade=cascade)
    with pytest.raises(ValueError, match="nowhere"):
        lepton.load_model(folder, config=config, compression="int8")
    with pytest.raises(RuntimeError, match="call load_model"):
        lepton.predict("soup", LABELS)
    config = RunConfig(engine=SECTION, cascade=CascadeSection(agreement=0.5))
    with LeptonEngine() as lepton:
        lepton.load_model(folder, config=config, compression="int8")
        monkeypatch.setattr(lepton._dense, "_plan", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lepton.start()
        assert lepton.engine is lepton.feedback is None


def test_a_cascade_keeps_what_it_has_learned(folder):
    config = RunConfig(
        engine=SECTION,
        cascade=CascadeSection(agreement=0.5, calibration=6, audit=0.1),
        optimizer=OptimizerSection(feedback="off"),
    )
    with LeptonEngine() as lepton:
        lepton.load_model(folder, config=config, compression="int8")
        for number in range(9):
            lepton.rank(f"meal {number}", ["soup", "kettle"])
        ranked = lepton.promise
        assert ranked.account()["rows"]["calibration"] == 6
        assert sum(ranked.account()["rows"].values()) == 9
        lepton.rank("meal", ["soup", "kettle"], normalize="sum")
        assert sum(lepton.promise.account()["rows"].values()) == 1
        lepton.rank("meal", ["soup", "kettle"])
        assert lepton.promise is ranked
        lepton.stop()
        assert lepton.promise is None and not lepton._modes


def test_a_profile_that_a_config_names_is_not_left_unread(folder):
    config = RunConfig(engine=SECTION, optimizer=OptimizerSection(profile="p.json"))
    with LeptonEngine() as lepton:
        lepton.load_model(folder, config=config)
        with pytest.raises(ValueError, match="optimizer.profile='p.json' names a file, which sta"):
            lepton.start()
        assert lepton.engine is None


def test_a_single_rule_is_a_rule(monkeypatch, tmp_path):
    asked = []

    class Job:
        def __init__(self, config):
            asked.append(config.compression.rules)

        def run(self):
            return {}

    monkeypatch.setattr(api, "CompressJob", Job)
    rule = "embed|head -> weights=int8"
    compress("/model", tmp_path / "small", rules=rule)
    compress("/model", tmp_path / "small", rules=[rule])
    assert asked == [(rule,), (rule,)]
