"""LeptonEngine on the real demo model, as a notebook would use it."""

import pytest
from compress_makers import model_folder

from lepton_jax import LeptonEngine, SamplingParams
from lepton_jax.config import EngineSection, RunConfig

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


def test_a_draft_of_the_model_itself_changes_no_answer(tmp_path):
    folder = model_folder(tmp_path / "model")
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    answers = {}
    for speculation in ("off", "draft"):
        section = EngineSection(
            rows=2,
            max_len=64,
            prefill_chunk=32,
            speculation=speculation,
            draft_preset="int8",
            draft_cost=0.1,
        )
        with LeptonEngine() as lepton:
            lepton.load_model(folder, config=RunConfig(engine=section)).start()
            found = lepton.generate(["one two", "three"], params)
            answers[speculation] = [answer.token_ids for answer in found]
            proposed = lepton.engine.stats()["proposed_tokens"]
            assert (proposed > 0) == (speculation == "draft")
    assert answers["draft"] == answers["off"]
