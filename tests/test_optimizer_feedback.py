"""Feedback on a real engine with a tiny model: knobs turn, answers stay."""

import dataclasses
import json

import pytest
from compress_makers import model_folder

from lepton_jax import LeptonEngine, SamplingParams
from lepton_jax.config import EngineSection, ModelSection, RunConfig
from lepton_jax.optimizer.space import with_fields

PROMPTS = [f"prompt {n}" for n in range(40)]
PARAMS = SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    model = model_folder(tmp_path_factory.mktemp("feedback") / "model")
    engine = EngineSection(rows=4, page_size=16, prefill_chunk=64, decode_block=8, max_len=64)
    return RunConfig(model=ModelSection(path=str(model)), engine=engine)


def answers(config: RunConfig) -> tuple[list, LeptonEngine]:
    lepton = LeptonEngine().load_model(config=config).start()
    return [answer.token_ids for answer in lepton.generate(PROMPTS, PARAMS)], lepton


def test_knobs_turn_and_answers_stay(config, tmp_path):
    expected, plain = answers(with_fields(config, {"optimizer.feedback": "off"}))
    assert plain.feedback is None and plain.config.optimizer.feedback == "off"
    log = tmp_path / "log.jsonl"
    got, lepton = answers(with_fields(config, {"optimizer.log": str(log)}))
    assert got == expected
    decisions = list(lepton.feedback.decisions)
    assert decisions and lepton.feedback.count == len(decisions)
    assert [json.loads(line)["knob"] for line in log.read_text().splitlines()] == [
        decision.knob for decision in decisions
    ]
    turned = {decision.knob: decision.after for decision in decisions}
    knobs = vars(lepton.engine.scheduler.knobs)
    assert {name: knobs[name] for name in turned} == turned
    lepton.engine.forget()
    assert lepton.engine.scheduler.knobs == plain.engine.scheduler.knobs
    again = [answer.token_ids for answer in lepton.generate(PROMPTS, PARAMS)]
    assert again == expected and lepton.feedback.decisions[len(decisions) :] == decisions


def test_the_clock_is_refused_where_several_hosts_decide(config, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    timed = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, feedback="on")
    )
    with pytest.raises(ValueError, match="set optimizer.feedback to deterministic or off"):
        LeptonEngine().load_model(config=timed).start()
