"""Feedback on a real engine with a tiny model: knobs turn, answers stay, and all is told."""

import dataclasses
import json
import math

import pytest
from compress_makers import model_folder
from test_optimizer_controller import SIZES, TPU

from lepton_jax import LeptonEngine, SamplingParams
from lepton_jax.config import EngineSection, ModelSection, OptimizerSection, RunConfig
from lepton_jax.engine.draft_length import Promise
from lepton_jax.optimizer.decisions import Decision, explained
from lepton_jax.optimizer.feedback import Feedback
from lepton_jax.optimizer.simulated_engine import SimulatedEngine
from lepton_jax.optimizer.space import with_fields
from lepton_jax.telemetry import BeatStats

PROMPTS = [f"prompt {n}" for n in range(40)]
PARAMS = SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    model = model_folder(tmp_path_factory.mktemp("feedback") / "model")
    engine = EngineSection(rows=4, page_size=16, prefill_chunk=64, decode_block=8, max_len=64)
    return RunConfig(model=ModelSection(path=str(model)), engine=engine)


def answers(config: RunConfig, params=PARAMS) -> tuple[list, LeptonEngine]:
    lepton = LeptonEngine().load_model(config=config).start()
    return [answer.token_ids for answer in lepton.generate(PROMPTS, params)], lepton


def logged(log) -> list[Decision]:
    return [Decision(**json.loads(line)) for line in log.read_text().splitlines()]


def test_knobs_turn_and_answers_stay(config, tmp_path):
    expected, plain = answers(with_fields(config, {"optimizer.feedback": "off"}))
    assert plain.feedback is None and plain.config.optimizer.feedback == "off"
    log = tmp_path / "log.jsonl"
    got, lepton = answers(with_fields(config, {"optimizer.log": str(log)}))
    assert got == expected
    decisions = list(lepton.feedback.decisions)
    assert decisions and lepton.feedback.count == len(decisions)
    assert logged(log) == decisions
    turned = {decision.knob: decision.after for decision in decisions}
    knobs = vars(lepton.engine.scheduler.knobs)
    assert {name: knobs[name] for name in turned} == turned
    lepton.engine.forget()
    assert lepton.engine.scheduler.knobs == plain.engine.scheduler.knobs
    again = [answer.token_ids for answer in lepton.generate(PROMPTS, PARAMS)]
    assert again == expected
    both = decisions + [dataclasses.replace(decision, block=1) for decision in decisions]
    assert lepton.feedback.decisions == both
    lepton.start()  # as a job that goes on
    assert logged(log) == both


def test_replicas_have_one_log(config, tmp_path):
    log = tmp_path / "log.jsonl"
    _, lepton = answers(with_fields(config, {"optimizer.log": str(log), "mesh.data": 2}))
    lepton.engine.forget()  # as jobs do between blocks of rows
    lepton.generate(PROMPTS, PARAMS)
    decisions = lepton.feedback.decisions
    lepton.stop()
    assert {decision.block for decision in decisions} == {0, 1}
    assert {decision.replica for decision in decisions} == {0, 1}
    assert sorted(logged(log), key=repr) == sorted(decisions, key=repr)
    order = [(decision.block, decision.beat) for decision in decisions]
    assert order == sorted(order)
    words = explained(decisions)
    assert "of replica 0: " in words and "of replica 1: " in words


def test_a_log_of_nothing_is_refused():
    with pytest.raises(ValueError, match="log='log.jsonl' is not allowed: want '' with feedback="):
        OptimizerSection(feedback="off", log="log.jsonl")


def test_speculation_that_pays_is_told(config, tmp_path):
    log = tmp_path / "log.jsonl"
    fields = {"optimizer.log": str(log), "engine.draft_cost": 0.02, "engine.speculation": "lookup"}
    alike = SamplingParams(max_tokens=40, ignore_eos=True, logit_bias={70: 1e4})
    got, lepton = answers(with_fields(config, fields), alike)
    assert got == [[70] * 40] * len(PROMPTS) and lepton.engine.stats()["accepted_tokens"] > 0
    first, *others = [decision for decision in logged(log) if decision.knob == "draft"]
    assert (first.before, first.after) == (0, 7) and not others
    numbers = first.numbers
    assert 1 < 1.05 * numbers["step_cost"] < numbers["tokens_a_step"] <= 8
    assert lepton.feedback.knobs()["draft"] == 7
    assert "draft 0 -> 7: steps with proposals promise more tokens" in explained([first])


def test_of_speculation_only_lasting_switches_are_told():
    engine = SimulatedEngine(SIZES, TPU)
    feedback, rule = Feedback(engine, timed=False), engine.drafts

    def blocks(count: int, chosen: int, *promise: float) -> list[Decision]:
        rule.chosen, rule.promise = chosen, Promise(*promise)
        before = len(feedback.decisions)
        for _ in range(count):
            feedback.take(BeatStats(steps=8))
        return feedback.decisions[before:]

    assert blocks(3, 0, 1.1, 1.5) == []
    (on,) = blocks(3, 7, 3.0, 1.6)
    assert (on.beat, on.knob, on.before, on.after) == (4, "draft", 0, 7)
    assert on.numbers == {"tokens_a_step": 3.0, "step_cost": 1.6}
    assert blocks(3, 3, 2.5, 1.4) == []  # another length
    assert blocks(5, 0, 1.1, 1.5) + blocks(5, 7, 3.0, 1.6) == []  # back before long
    assert blocks(30, 0, 1.1, math.inf) == []  # to measure a plain block
    (off,) = blocks(30, 0, 1.1, 1.5)
    assert (off.before, off.after) == (7, 0) and "promise fewer tokens" in off.why
    feedback.forget()
    assert blocks(1, 7, 3.0, 1.6)[0].beat == 1


def test_the_clock_is_refused_where_several_hosts_decide(config, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    timed = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, feedback="on")
    )
    with pytest.raises(ValueError, match="set optimizer.feedback to deterministic or off"):
        LeptonEngine().load_model(config=timed).start()
