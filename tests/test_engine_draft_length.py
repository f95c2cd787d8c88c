"""The rule for the draft length, by hand: what lookup would gain, what steps cost, the choice."""

import types

import pytest

from lepton_jax.engine.draft_length import DraftModelRule, DraftRule, Shadow
from lepton_jax.engine.request import Drafted, StepOutput
from lepton_jax.telemetry import BeatStats


def row_of(name: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(request=types.SimpleNamespace(id=name))


ROW, OTHER = row_of("a"), row_of("b")
COPY = [1, 2, 3, 4, 5, 6, 7, 8]
NEW = list(range(100, 200))


def rule(**fields) -> DraftRule:
    made = DraftRule([3, 7], [1, 4], **fields)
    made.add("a", COPY)
    return made


def give(made: DraftRule, tokens: list[int], name: str = "a", end: str | None = None) -> None:
    made.read([StepOutput(name, tokens, finish_reason=end)])


def test_a_shadow_plays_the_rounds_of_lookup():
    shadow = Shadow([1, 2, 3, 4, 9, 1, 2], [2, 4])
    # 3: nothing was proposed before the first output. Then 4, 9 | 1, 2 ... are proposed
    assert shadow.add(3) == [2, 4]
    assert shadow.add(4) == []  # proposed by both: 4 9 and 4 9 1 2
    assert shadow.add(9) == []
    assert shadow.add(7) == [2, 4]  # the token after two whole copies; not 1, as 4 proposed
    assert shadow.add(7) == [2, 4]  # 7 was new: nothing was proposed
    assert shadow.add(7) == []  # the last 7 was followed by one
    assert shadow.add(7) == []
    assert shadow.add(7) == [2]  # 2 copies and the one after
    assert shadow.rounds[2] > shadow.rounds[4]


def test_copies_are_worth_longer_drafts():
    made = rule(cost=0.1)
    assert made.choose([ROW], 7) == 0
    give(made, [1, *COPY[1:], *COPY, *COPY])
    assert made.tokens_a_step("a", 7) > made.tokens_a_step("a", 3) > 2
    assert made.choose([ROW], 7) == 7  # 1.7 steps of one row against 1.3 for 3 and 1 for none
    assert made.choose([ROW], 6) == 3 and made.choose([ROW], 0) == 0
    give(made, NEW)
    assert made.tokens_a_step("a", 7) < 1.2
    assert made.choose([ROW], 7) == 0


def test_rows_count_for_what_each_gains_and_cost_as_many():
    made = rule(cost=0.3)
    give(made, COPY * 4)
    assert made.choose([ROW], 7) > 0
    made.add("b", COPY)
    give(made, NEW, "b")
    assert made.choose([ROW, OTHER], 7) == 0  # 4 rows: 1.9 against 4.3 steps for 3, 10.3 for 7


def test_a_new_row_is_taken_for_one_like_the_others():
    made = rule(cost=0.1)
    give(made, COPY * 20, end="stop")
    assert not made._shadows and not made._prompts
    made.add("b", [1])
    assert made.choose([OTHER], 7) > 0
    made.forget()
    made.add("b", [1])
    assert made.choose([OTHER], 7) == 0


def beat(draft: int, seconds: float, steps: int = 8, tokens: int = 0) -> BeatStats:
    return BeatStats(
        row_places=1,
        draft=draft,
        steps=steps,
        decode_seconds=seconds * steps,
        rounds=steps,
        decode_tokens=tokens or steps,
    )


def test_measured_steps_decide_where_no_cost_is_given():
    made = rule()
    give(made, COPY * 4)
    assert made.choose([ROW], 7) == 0  # nothing is measured: plain blocks first
    for seconds in (9.0, 0.01):  # the first one held a compilation
        made.take(beat(0, seconds))
    assert made.choose([ROW], 7) == 7  # by the assumed cost
    for seconds in (9.0, 0.09):  # 9 times a plain step: it never pays
        made.take(beat(7, seconds))
    assert made.choose([ROW], 7) == 3
    for seconds in (9.0, 0.011):
        made.take(beat(3, seconds))
    assert made.choose([ROW], 7) == 3
    for _ in range(8):
        made.take(beat(3, 0.05))
    assert made.choose([ROW], 7) == 0
    made.take(beat(0, 0.0, steps=0))  # a block that did not run says nothing
    assert made.choose([ROW], 7) == 0


def test_a_change_must_be_worth_it():
    made = rule()
    give(made, COPY * 12)
    gain = made.tokens_a_step("a", 3)
    for draft, seconds in ((0, 1.0), (3, gain / 1.03), (7, 1e9)):
        for _ in range(2):
            made.take(beat(draft, seconds))
    assert made.choose([ROW], 7) == 0  # 3 % more
    for _ in range(8):
        made.take(beat(0, 1.1))
    assert made.choose([ROW], 7) == 3
    for _ in range(8):
        made.take(beat(0, 0.99))
    assert made.choose([ROW], 7) == 3


@pytest.mark.parametrize("drafts", [[], [1]])
def test_without_programs_nothing_is_kept(drafts):
    made = DraftRule(drafts, [4])
    made.add("a", COPY)
    give(made, COPY)
    assert bool(made._prompts) == bool(drafts)
    assert made.choose([ROW], 7) == 0
    made.drop("a")
    assert not made._prompts and not made._shadows


def test_a_draft_model_is_judged_by_what_was_accepted():
    made = DraftModelRule([3, 7], [1], cost=0.05, share=0.1)
    assert made.choose([ROW], 7) > 0  # hoped: 0.8 of each; 2.95 tokens for 1.15 + 0.4 steps
    for _ in range(60):
        made.take(beat(3, 1.0, tokens=8))  # nothing accepted
    assert made.tokens_a_step("a", 7) < 1.01 and made.choose([ROW], 7) == 0
    for _ in range(60):
        made.take(beat(3, 1.0, tokens=8 * 4))
    assert made.tokens_a_step("a", 7) > 7.5 and made.choose([ROW], 7) == 7
    made.forget()
    assert made.tokens_a_step("a", 3) == pytest.approx(1 + 0.8 + 0.64 + 0.512)


def test_acceptance_is_told_from_any_draft_length():
    made = DraftModelRule([3, 7], [1], cost=0.05, share=0.1)
    for _ in range(100):
        made.take(beat(3, 1.0, tokens=8 + 7))  # 7/8 a round: 1/2 + 1/4 + 1/8
    assert made.tokens_a_step("a", 7) == pytest.approx(2 - 2**-7, abs=0.01)


def test_drafts_follow_the_rows_that_run():
    """Beside rows that a draft model knows and rows that it doesn't, a new one is like both."""
    made = DraftModelRule([3, 7], [1, 2, 4], cost=0.05, share=0.1)
    for name, accepted in (("known", 7), ("foreign", 0), ("known", 7), ("foreign", 0)):
        made.add(name, [1])
        drafted = Drafted(rounds=8, accepted=8 * accepted, draft=7)
        made.take(beat(7, 1.0, tokens=8 * (1 + accepted)))
        made.read([StepOutput(name, [1], drafted=drafted)])
    known, foreign, new = (row_of(name) for name in ("known", "foreign", "new"))
    tokens = [made.tokens_a_step(name, 7) for name in ("foreign", "new", "known")]
    assert tokens == sorted(tokens) and tokens[0] < 1.2 and tokens[2] > 6
    assert made.choose([known, known], 7) == 7
    assert made.choose([foreign, foreign], 7) == 0
    assert made.choose([known, new], 7) > 0
    made.read([StepOutput("known", [1], finish_reason="stop")])
    assert made.tokens_a_step("known", 7) == made.tokens_a_step("new", 7)
    made.read([StepOutput("foreign", [1])])  # of a plain block: nothing is learned
    assert made.tokens_a_step("foreign", 7) == tokens[0]


def test_a_large_draft_model_never_pays_and_is_tried_again_ever_more_rarely():
    made = DraftModelRule([3, 7], [1], cost=0.05, share=1.0)
    tried = []
    for block in range(2000):
        draft = made.choose([ROW], 7)
        if draft:
            tried.append(block)
        made.take(beat(draft, 1.0, tokens=8 * 3 if draft else 8))
    assert tried == [64, 193, 450, 963, 1988]
    assert made.choose([ROW], 2) == 0


def test_a_trial_waits_for_a_block():
    made = DraftModelRule([3, 7], [1], cost=0.05, share=1.0)
    for _ in range(64):
        made.choose([ROW], 7)
        made.take(beat(0, 1.0, tokens=8))
    assert [made.choose([ROW], 7) for _ in range(3)] == [3, 3, 3]  # beats that only prefill
    made.take(beat(3, 1.0, tokens=8))
    assert made.choose([ROW], 7) == 0
    made.take(beat(3, 1.0, tokens=8))  # of a block that was in flight
    for block in range(128):
        assert made.choose([ROW], 7) == 0, block
        made.take(beat(0, 1.0, tokens=8))
    assert made.choose([ROW], 7) == 3
