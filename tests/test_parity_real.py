"""The engine on both demo models against transformers in float32: same tokens, same logprobs.

`fixtures/parity/*.json` hold 16 prompts for each model, 48 greedy tokens and their likeliest
alternatives; `scripts/make_parity_fixtures.py` wrote them. Each model is loaded once and served
under several sizes: everything at once; few rows, small chunks, shared prefixes and too few pages
together. Programs are compiled when they are needed: each takes seconds, and that a warm-up
foresees them is tested with tiny models (`test_engine_loop.py`). Families other than Llama and
Gemma 3 are `test_models_parity.py`'s, with tiny models.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from lepton_jax.checkpoints.load import Loaded, load
from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine.loop import Engine

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parent / "fixtures" / "parity"
NEW_TOKENS = 48
TOP = 3
LOGPROB_ERROR = 1e-3
NEAR_TIE = 1e-4  # closer than this, two float32 programs may rightly choose differently
PARAMS = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
WITH_LOGPROBS = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=TOP)
AT_ONCE = EngineSection(rows=16, kv_dtype="float32")
CRAMPED = EngineSection(
    rows=4, page_size=16, num_pages=48, prefill_chunk=64, decode_block=5, kv_dtype="float32"
)
ALONE = EngineSection(
    rows=1, page_size=32, prefill_chunk=128, kv_dtype="float32", prefix_cache=False
)


class Case(NamedTuple):
    """A model in float32 and transformers' rows for it, by name."""

    loaded: Loaded
    rows: dict[str, dict]


class Answer(NamedTuple):
    """What the engine gave for a request; `logprobs` as in StepOutput."""

    tokens: list[int]
    logprobs: list


def _case(path, name: str) -> Case:
    rows = json.loads((FIXTURES / f"{name}.json").read_text())["rows"]
    return Case(load(path, dtype="float32"), {row["name"]: row for row in rows})


@pytest.fixture(scope="module")
def smollm2(smollm2_path) -> Case:
    return _case(smollm2_path, "smollm2")


@pytest.fixture(scope="module")
def gemma3(gemma3_path) -> Case:
    return _case(gemma3_path, "gemma3")


def serve(case: Case, section: EngineSection, rounds, params=PARAMS):
    """Answers by name for each round (prompts by name), one engine for all, and its counts."""
    workload = [(len(ids), params) for prompts in rounds for ids in prompts.values()]
    model, leaves = case.loaded.model, case.loaded.leaves
    engine = Engine(model, leaves, section=section, workload=workload)
    answers = []
    for prompts in rounds:
        answers.append({name: Answer([], []) for name in prompts})
        for name, ids in prompts.items():
            engine.add_request(name, ids, params)
        while engine.has_work:
            for output in engine.step():
                answers[-1][output.request_id].tokens.extend(output.token_ids)
                answers[-1][output.request_id].logprobs.extend(output.logprobs or ())
    return answers, engine.stats()


def prompts_of(case: Case, *names: str) -> dict[str, list[int]]:
    return {name: case.rows[name]["prompt"] for name in names or case.rows}


def assert_same_tokens(answers: dict[str, Answer], case: Case):
    for name, answer in answers.items():
        assert answer.tokens == case.rows[name]["tokens"], name


def assert_as_transformers(answers: dict[str, Answer], case: Case):
    """Equal tokens; log-probabilities of them and of the likeliest within LOGPROB_ERROR."""
    assert_same_tokens(answers, case)
    worst = 0.0
    for name, answer in answers.items():
        row = case.rows[name]
        ours = np.array([value for value, _ in answer.logprobs])
        tops = np.array([[value for _, value in top] for _, top in answer.logprobs])
        theirs = np.array([[value for _, value in top] for top in row["top"]])
        error = max(np.abs(ours - row["logprobs"]).max(), np.abs(tops - theirs).max())
        assert error <= LOGPROB_ERROR, f"{name}: log-probabilities differ by {error:.2e}"
        assert [top[0][0] for _, top in answer.logprobs] == row["tokens"], name
        worst = max(worst, error)
    print(f"{len(answers)} prompts, largest difference of a log-probability {worst:.1e}")


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_fixtures_say_enough(name):
    """No near ties, so tokens must agree everywhere; enough prompts, one beyond Gemma's window."""
    rows = json.loads((FIXTURES / f"{name}.json").read_text())["rows"]
    assert len(rows) >= 12
    assert max(len(row["prompt"]) for row in rows) > 560
    assert all(len(row["tokens"]) == NEW_TOKENS for row in rows)
    gaps = [first[1] - second[1] for row in rows for first, second, _ in row["top"]]
    assert min(gaps) >= NEAR_TIE


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_all_prompts_at_once(name, request):
    case = request.getfixturevalue(name)
    (answers,), _ = serve(case, AT_ONCE, [prompts_of(case)], WITH_LOGPROBS)
    assert_as_transformers(answers, case)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_small_chunks_few_pages_and_shared_prefixes(name, request):
    """Prompts that come again find their pages; the longest one leaves too few for the others."""
    case = request.getfixturevalue(name)
    first = prompts_of(case, "past_window", "long", "chinese", "table", "mixed", "one")
    again = prompts_of(case, "past_window", "long", "one")
    answers, stats = serve(case, CRAMPED, [first, again])
    for one_round in answers:
        assert_same_tokens(one_round, case)
    assert stats["preemptions"] > 0
    assert stats["prefix_hit_tokens"] >= 12 * CRAMPED.page_size


def test_one_by_one(smollm2):
    names = "table", "one", "long"
    rounds = [prompts_of(smollm2, name) for name in names]
    answers, _ = serve(smollm2, ALONE, rounds)
    for answer in answers:
        assert_same_tokens(answer, smollm2)
