"""Candidates of close times take turns: which do, in what order, and what that changes."""

import dataclasses
import math
from pathlib import Path

import pytest
from compress_makers import model_folder

from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.config import (
    EngineSection,
    ModelSection,
    OptimizerSection,
    RunConfig,
    SamplingParams,
)
from lepton_jax.optimizer import search as searching
from lepton_jax.optimizer import turns
from lepton_jax.optimizer.accuracy import Accuracy
from lepton_jax.optimizer.costs import UNIT
from lepton_jax.optimizer.found import Tried
from lepton_jax.optimizer.predict import Outlook
from lepton_jax.optimizer.sample import SampledRequest
from lepton_jax.optimizer.search import Search
from lepton_jax.optimizer.space import Candidate
from lepton_jax.optimizer.trial import Trial, try_out
from lepton_jax.optimizer.turns import close_ones
from lepton_jax.text import tokenizer as tokenizers

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
REQUESTS = [SampledRequest(tuple(b"a row of text"), PARAMS)] * 5
GIVEN = (
    "engine.page_size", "engine.prefill_chunk", "engine.decode_block", "mesh.data", "mesh.model",
    "engine.prefill_sizes", "engine.speculation",
)  # fmt: skip


def tried(rows: int, seconds: float) -> Tried:
    trial = Trial(seconds, 0.1, 0.5, (), 2.0, 3, (), {})
    return Tried(Candidate.of({"engine.rows": rows}), 1.0, trial, UNIT, seconds, True)


def chosen(seconds: list[float], memory: list[int], **options) -> list[float]:
    ones = [tried(rows, each) for rows, each in enumerate(seconds)]
    outlooks = {
        one.candidate: Outlook(1.0, 0.1, 0.5, nbytes)
        for one, nbytes in zip(ones, memory, strict=True)
    }
    return [one.score for one in close_ones(ones, outlooks, **options)]


@pytest.mark.parametrize(
    ("seconds", "memory", "close"),
    [
        ([2.0, 1.0, 1.29, 1.31], [1, 1, 1, 1], [1.0, 1.29]),
        ([1.0, 1.0, 1.0, 1.0], [1, 1, 1, 1], [1.0, 1.0, 1.0]),
        ([1.0, 1.05, 1.1], [6, 5, 4], [1.0, 1.1]),  # the second has no room beside the first
        ([1.0], [1], [1.0]),
        ([], [], []),
    ],
)
def test_the_best_and_what_is_close_to_it_as_far_as_there_is_room(seconds, memory, close):
    assert chosen(seconds, memory, room=10) == close


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """Makes searches over the rows of a tiny model."""
    path = str(model_folder(tmp_path_factory.mktemp("turns") / "model", layers=1))
    tokenizer = tokenizers.load(checkpoints.tokenizer_source(path))
    config = RunConfig(
        model=ModelSection(path=path),
        engine=EngineSection(rows=2, page_size=16, prefill_chunk=64, decode_block=2),
        optimizer=OptimizerSection(trials=2, repeats=1),
    )

    def make(asked=config.optimizer, **options) -> Search:
        accuracy = Accuracy(tokenizer, Path("none"), "none")
        shared = dict(accuracy=accuracy, given=GIVEN, margin=math.inf)
        goal = dataclasses.replace(config, optimizer=asked)
        return Search(goal, REQUESTS, tokenizer, **(shared | options))

    return make


@pytest.fixture(scope="module")
def trials() -> dict[str, Trial]:
    return {}


@pytest.fixture(autouse=True)
def each_is_tried_once(trials, monkeypatch):
    """Searches here differ in what follows the trials."""

    def known(models, config, *rest, **options):
        key = repr(config)
        if key not in trials:
            trials[key] = try_out(models, config, *rest, **options)
        return trials[key]

    monkeypatch.setattr(searching, "try_out", known)


@pytest.fixture
def all_are_close(monkeypatch):
    monkeypatch.setattr(turns, "_CLOSE", math.inf)


def test_they_run_one_after_the_other_and_those_runs_count(search, all_are_close, monkeypatch):
    taken, seen = [], []
    real = turns.take_turns

    def take(finalists, *arguments, **options):
        taken.extend([finalists, real(finalists, *arguments, **options)])
        return taken[1]

    monkeypatch.setattr(searching, "take_turns", take)
    found = search(progress=lambda *said: seen.append(said)).run()
    finalists, trials = taken
    names = [said[3] for said in seen if said[0] == "turns"]
    assert names == [names[0], names[1]] * 2 and names[0] != names[1]
    assert [said[1:3] for said in seen if said[0] == "turns"] == [(n, 4) for n in range(4)]
    for finalist, trial in zip(finalists, trials, strict=True):
        (one,) = [t for t in found.tried if t.trial.seconds == trial.seconds]
        assert one.score == trial.seconds and one.candidate.applied(finalist.config) == (
            finalist.config
        )
        compiled = {
            name: getattr(trial, name) + getattr(finalist.trial, name)
            for name in ("compile_seconds", "programs")
        }
        assert one.trial == dataclasses.replace(trial, **compiled)
        assert trial.outputs == finalist.trial.outputs
        assert sum(beat.tokens for beat in trial.beats) == 2 * sum(
            beat.tokens for beat in finalist.trial.beats
        )


def test_they_may_turn_the_order_round(search, all_are_close, monkeypatch):
    before = []

    def take(finalists, *_, **__):
        before.extend(one.config.engine.rows for one in finalists)
        seconds = range(len(finalists), 0, -1)
        return [
            dataclasses.replace(one.trial, seconds=float(each))
            for one, each in zip(finalists, seconds, strict=True)
        ]

    monkeypatch.setattr(searching, "take_turns", take)
    best = search().run().best
    assert dict(best.candidate.fields)["engine.rows"] == before[-1] != before[0]
    assert best.score == best.trial.seconds == 1.0


def test_what_took_no_turns_does_not_win_by_its_old_time(search, all_are_close, monkeypatch):
    def take(finalists, *_, **__):
        return [dataclasses.replace(one.trial, seconds=1e6) for one in finalists]

    monkeypatch.setattr(turns, "_MOST", 2)
    monkeypatch.setattr(searching, "take_turns", take)
    found = search(OptimizerSection(trials=3, repeats=1)).run()
    assert len(found.tried) == 3 and found.best.score == 1e6


def test_what_is_far_from_the_best_takes_none(search, monkeypatch):
    monkeypatch.setattr(searching, "take_turns", None)
    monkeypatch.setattr(turns, "_CLOSE", 0.0)
    assert len(search().run().tried) == 2
