"""What a beat does, by arithmetic done by hand over a fake device. Random runs: the file beside."""

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from fake_device import FakeEngine, expected_tokens, request

import lepton_jax.engine.scheduler as scheduler_module
from lepton_jax.engine.knobs import Knobs, best_steps
from lepton_jax.engine.request import BlockResult, Chunk, Plan, Row, is_long_prompt
from lepton_jax.engine.scheduler import Scheduler

NEVER = dict(stop_token_ids=())  # such a row runs to its limit


def engine(**sizes) -> FakeEngine:
    plain = dict(rows=2, page_size=4, num_pages=33, prefill_chunk=8, decode_block=4, max_len=64)
    return FakeEngine(**plain | sizes)


def names(plan: Plan) -> tuple[str, str]:
    """Ids in the prefill and in the block."""
    chunks = "".join(chunk.row.request.id for chunk in plan.chunks)
    return chunks, "".join(entry.row.request.id for entry in plan.rows)


def finished_as_alone(e: FakeEngine, *requests) -> None:
    for r in requests:
        assert (e.outputs[r.id], e.reasons[r.id]) == expected_tokens(r, e.max_len), r.id


def test_new_rows_go_first_and_decode_together():
    e = engine()
    a, b, c = (request(n, [i] * 8, max_tokens=5, **NEVER) for i, n in enumerate("abc", 1))
    e.add(a, b, c)
    plan = e.beat()
    assert names(plan) == ("a", "") and plan.steps == 0  # a fills the program; a slot is free yet
    plan = e.beat()
    assert names(plan) == ("b", "ab") and plan.steps == 4  # 1 by the prefill + 4 = max_tokens
    plan = e.beat()  # a and b have left, unread
    assert names(plan) == ("c", "c") and plan.chunks[0].slot == 0
    assert e.outputs == {"a": e.outputs["a"], "b": e.outputs["b"], "c": []}
    assert [len(e.outputs[n]) for n in "ab"] == [5, 5]
    e.run()
    finished_as_alone(e, a, b, c)
    assert e.scheduler.counters.generated_tokens == 15
    assert e.scheduler.counters.prompt_tokens == 24


def test_first_tokens_come_with_the_prefill_where_the_block_comes_later():
    e = engine(rows=3)
    a, b, c = (request(n, [i] * 8, max_tokens=5, **NEVER) for i, n in enumerate("abc", 1))
    e.add(a, b, c)
    seen = []
    while e.has_work:
        e.beat()
        seen.append([len(e.outputs[n]) for n in "abc"])
    # Prefills of a, of b, of c with the block of all, and its tokens: those of c with its first.
    assert seen == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [5, 5, 5]]
    finished_as_alone(e, a, b, c)


def test_a_row_that_its_first_token_ends_is_over_before_its_block_is_read():
    e = engine(rows=3)
    a = request("a", [1] * 8, max_tokens=9)
    first = expected_tokens(a, e.max_len)[0][0]
    a = request("a", [1] * 8, max_tokens=9, stop_token_ids=(first,), logprobs=1)
    b, c = (request(n, [i] * 8, max_tokens=5, **NEVER) for i, n in enumerate("bc", 2))
    e.add(a, b, c)
    e.beat()
    e.beat()
    assert (e.outputs["a"], e.reasons) == ([first], {"a": "stop"})
    assert names(e.beat()) == ("c", "bc")
    e.run()
    finished_as_alone(e, a, b, c)


def test_outputs_come_one_beat_late_and_the_entry_token_once():
    e = engine(rows=1)
    a = request("a", [1], max_tokens=9, **NEVER)
    e.add(a)
    seen = []
    while e.has_work:
        e.beat()
        seen.append(len(e.outputs["a"]))
    assert seen == [0, 5, 9]  # entry + 4, then 4
    finished_as_alone(e, a)


@pytest.mark.parametrize(("count", "steps"), [(1, 0), (2, 1), (5, 4), (6, 4)])
def test_a_block_is_no_longer_than_its_rows_can_use(count, steps):
    e = engine()
    e.add(request("a", [1, 2], max_tokens=count, **NEVER))
    plan = e.beat()
    assert names(plan) == ("a", "a") and plan.steps == steps
    e.run()
    assert len(e.outputs["a"]) == count


def test_max_len_limits_the_outputs():
    e = engine(max_len=10)
    a = request("a", [3] * 7, max_tokens=100, **NEVER)
    e.add(a)
    e.run()
    assert len(e.outputs["a"]) == 3 and e.reasons["a"] == "length"


def test_a_row_gets_pages_for_all_that_a_block_may_cache():
    e = engine(decode_block=4)
    e.add(request("a", [1, 2, 3], max_tokens=20, **NEVER))
    assert len(e.beat().rows[0].pages) == 2  # 3 + 1 + 4 tokens, the last not cached: 7
    assert len(e.beat().rows[0].pages) == 3  # 11
    e = engine(decode_block=4)
    e.add(request("a", [1, 2, 3], max_tokens=2, **NEVER))
    assert len(e.beat().rows[0].pages) == 1  # 3 + 2 - 1


def test_chunks_are_packed_in_tiles():
    e = engine(rows=3, prefill_chunk=8, q_tile=4)
    a, b, c = request("a", [1] * 3), request("b", [2] * 9), request("c", [3] * 2)
    e.add(a, b, c)
    plans = [e.beat(), e.beat(), e.beat()]
    sizes = [[(c.start, len(c.tokens), c.final) for c in plan.chunks] for plan in plans]
    assert sizes[0] == [(0, 3, True), (0, 4, False)]  # one tile each
    assert sizes[1] == [(4, 5, True)]  # two tiles
    assert sizes[2] == [(0, 2, True)]
    assert [names(plan)[1] for plan in plans] == ["", "", "abc"]
    e.run()
    finished_as_alone(e, a, b, c)


def test_a_program_is_never_smaller_than_a_tile():
    e = engine(prefill_chunk=3, q_tile=4)
    a = request("a", [1] * 6)
    e.add(a)
    assert [len(chunk.tokens) for chunk in e.beat().chunks] == [4]
    e.run(40)
    finished_as_alone(e, a)


@pytest.mark.parametrize(
    ("beats", "plans"),
    [
        (0, [("b", "a"), ("b", "a"), ("b", "a"), ("bc", "abc")]),
        (1, [("b", ""), ("b", "a"), ("b", ""), ("bc", "abc")]),
        (2, [("b", ""), ("b", ""), ("b", "a"), ("bc", "abc")]),
        (4, [("b", ""), ("b", ""), ("b", ""), ("bc", "abc")]),
    ],
)
def test_ready_rows_decode_after_so_many_beats_of_a_long_prompt(beats, plans):
    e = engine(rows=3, prefill_chunk=8)
    e.scheduler.knobs = knobs_of(e, prefill_beats=beats)
    a, b, c = request("a", [1] * 8, **NEVER), request("b", [2] * 28), request("c", [3] * 4)
    e.add(a)
    e.beat()
    e.add(b, c)
    assert [names(e.beat()) for _ in plans] == plans  # then no waiting request is left
    e.run()
    finished_as_alone(e, a, b, c)


def test_a_prompt_is_long_also_beside_what_a_guide_adds():
    def chunk(prompt, start, count, *, final):
        row = Row(request("a", [1] * prompt), 9)
        return Chunk(row, 0, (), start, (1,) * count, final)

    long = chunk(100, 8, 8, final=False)
    assert is_long_prompt([long])
    assert is_long_prompt([chunk(5, 7, 2, final=True), long])
    assert is_long_prompt([chunk(5, 8, 8, final=False)])  # outputs of a preempted row
    assert not is_long_prompt([chunk(5, 0, 5, final=True), long])
    assert not is_long_prompt([chunk(100, 96, 4, final=True)])


def test_nobody_waits_for_a_long_prompt_in_the_last_slot():
    e = engine(rows=2, prefill_chunk=8)
    e.add(request("a", [1] * 8, **NEVER))
    e.beat()
    e.add(request("b", [2] * 20), request("c", [3] * 8))
    assert names(e.beat()) == ("b", "a")


def test_a_shared_beginning_is_computed_once_even_within_one_program():
    e = engine(prefill_chunk=16)
    a, b = request("a", [1, 2, 3, 4, 5, 6]), request("b", [1, 2, 3, 4, 9])
    e.add(a, b)
    plan = e.beat()
    assert [(c.start, len(c.tokens)) for c in plan.chunks] == [(0, 6), (4, 1)]
    assert plan.chunks[0].pages[0] == plan.chunks[1].pages[0]
    assert plan.chunks[0].pages[1] != plan.chunks[1].pages[1]
    e.run()
    finished_as_alone(e, a, b)
    assert e.scheduler.counters.prefix_hit_tokens == 4


def test_the_last_token_is_always_computed():
    e = engine(prefill_chunk=16)
    e.add(request("a", range(1, 9)), request("b", range(1, 9)))
    assert [c.start for c in e.beat().chunks] == [0, 4]  # not 8


def test_no_sharing_without_prefix_cache_or_with_penalties():
    for sizes, params in [
        (dict(prefix_cache=False), {}),
        ({}, dict(repetition_penalty=1.2)),
        ({}, dict(presence_penalty=0.5)),
        ({}, dict(frequency_penalty=0.5)),
    ]:
        e = engine(prefill_chunk=16, **sizes)
        e.add(request("a", range(1, 9)), request("b", range(1, 9), **params))
        assert [c.start for c in e.beat().chunks] == [0, 0]
        e.run()


def test_best_steps_weighs_idle_rows_against_another_beat():
    assert best_steps([8] * 4, 8) == 8  # nobody ends: 32/9 tokens per step's time, 28/8 at 7
    assert best_steps([3] * 4, 8) == 3  # all end together
    assert best_steps([1] + [8] * 31, 8) == 8  # 249/9 = 27.7 against 32/2 = 16
    assert best_steps([1] * 20 + [8] * 12, 8) == 1  # 32/2 = 16 against 116/9 = 12.9
    assert best_steps([2, 8, 8, 8], 8) == 8  # 26/9 = 2.89 against 8/3 = 2.67
    assert best_steps([0, 0, 5], 8) == 5  # rows that only enter have no say
    assert best_steps([0, 0], 8) == 0
    assert best_steps([1, 3], 8) == 3  # 2/2, 3/3 and 4/4 are equal: the largest


def test_a_block_is_cut_only_while_requests_wait():
    for waiting, steps in [([], 4), ([request("d", [4])], 1)]:
        e = engine(rows=3)
        e.add(*(request(n, [1], max_tokens=m, **NEVER) for n, m in [("a", 2), ("b", 2), ("c", 9)]))
        e.add(*waiting)
        assert e.beat().steps == steps  # 3/2 tokens per step's time at 1, 6/5 at 4


def test_requests_that_can_never_run_are_refused_with_the_numbers():
    scheduler = engine(num_pages=4, max_len=16).scheduler
    with pytest.raises(ValueError, match="no tokens"):
        scheduler.add(request("a", []))
    with pytest.raises(ValueError, match=r"16 tokens.*max_len=16 leaves room for 15"):
        scheduler.add(request("a", [1] * 16))
    with pytest.raises(ValueError, match=r"10 tokens and 4 outputs need 4 pages of 4.*are 3:"):
        scheduler.add(request("a", [1] * 10, max_tokens=4))
    assert not scheduler.has_work
    scheduler.add(request("a", [1] * 10, max_tokens=3))
    with pytest.raises(ValueError, match="'a' is already running"):
        scheduler.add(request("a", [1]))


def test_a_beat_decodes_where_the_next_request_finds_no_pages():
    e = engine(rows=2, num_pages=4, prefill_chunk=16)  # 3 pages of 4
    a, b = request("a", [1] * 5, max_tokens=5, **NEVER), request("b", [2] * 8, max_tokens=5)
    e.add(a, b)
    plan = e.beat()  # b finds a slot, but wants 3 pages where a has 2 and will need the third
    assert names(plan) == ("a", "a") and len(plan.rows[0].pages) == 3
    assert names(e.beat()) == ("b", "b")  # a gave its own up
    e.run()
    finished_as_alone(e, a, b)


def test_the_youngest_row_is_preempted_and_goes_on_where_it_was():
    e = engine(num_pages=6, prefill_chunk=16)  # 5 pages of 4
    a = request("a", [1, 2, 3], max_tokens=14, **NEVER)
    b = request("b", [4, 5, 6], max_tokens=10, **NEVER)
    e.add(a, b)
    plan = e.beat()
    assert names(plan) == ("ab", "ab") and [len(r.pages) for r in plan.rows] == [2, 2]  # 7 tokens
    assert e.beat() is None  # 3 pages each: 6 > 5. First see whether somebody ended
    assert len(e.outputs["a"]) == len(e.outputs["b"]) == 5
    plan = e.beat()
    assert names(plan) == ("", "a") and e.scheduler.counters.preemptions == 1
    while not plan.chunks:
        plan = e.beat() or plan
    (chunk,) = plan.chunks
    assert chunk.row.request == b and chunk.start + len(chunk.tokens) == 8  # 3 + 5 outputs
    assert chunk.tokens == (*b.prompt_ids, *e.outputs["b"])[chunk.start :]
    e.run()
    finished_as_alone(e, a, b)


def test_rows_are_dealt_to_the_bank_that_will_have_most_left():
    e = engine(rows=4, banks=2, num_pages=6, prefill_chunk=32)  # 5 pages of 4 in each
    a = request("a", [1] * 8, max_tokens=9, **NEVER)
    b = request("b", [2] * 4, max_tokens=5, **NEVER)
    c = request("c", [3] * 4, max_tokens=5, **NEVER)
    d = request("d", [1] * 9, max_tokens=5, **NEVER)
    e.add(a, b, c, d)
    plan = e.beat()
    # 2 pages of a in the first; b, then c find more in the second, and d shares what a begins with.
    assert [chunk.row.bank for chunk in plan.chunks] == [0, 1, 1, 0]
    assert plan.chunks[3].pages[:2] == plan.chunks[0].pages and plan.chunks[3].start == 8
    e.run()
    finished_as_alone(e, a, b, c, d)
    assert e.scheduler.load.free_pages == 10


def test_the_youngest_row_of_the_crowded_bank_is_preempted():
    e = engine(rows=4, banks=2, num_pages=6, prefill_chunk=32)  # 5 pages of 4 in each
    a = request("a", [1] * 3, max_tokens=14, **NEVER)
    b = request("b", [2] * 8, max_tokens=5, **NEVER)
    c = request("c", [3] * 8, max_tokens=9, **NEVER)
    d = request("d", [4] * 3, max_tokens=9, **NEVER)
    e.add(a, b, c, d)
    assert [chunk.row.bank for chunk in e.beat().chunks] == [0, 1, 0, 1]
    assert e.beat() is None  # 3 pages for a, 4 for c. First see whether somebody ended
    plan = e.beat()
    assert names(plan) == ("", "ad") and e.scheduler.counters.preemptions == 1
    e.run()
    finished_as_alone(e, a, b, c, d)


def test_a_preempted_row_finds_its_pages_where_nobody_needed_them():
    e = engine(num_pages=8, prefill_chunk=16)  # 7 pages of 4
    a = request("a", [1] * 8, max_tokens=9, **NEVER)
    b = request("b", [2] * 8, max_tokens=13, **NEVER)
    e.add(a, b)
    assert [len(r.pages) for r in e.beat().rows] == [3, 3]  # 8 + 1 + 4 tokens, the last not cached
    assert e.beat() is None  # 4 pages each: 8 > 7
    assert names(e.beat()) == ("", "a")  # the free page is enough for it
    (chunk,) = e.beat().chunks
    assert (chunk.start, len(chunk.tokens), chunk.final) == (12, 1, True)  # of 8 + 5 known tokens
    e.run()
    finished_as_alone(e, a, b)
    assert e.scheduler.counters.preemptions == 1


def test_a_stopped_row_frees_its_slot_and_later_results_are_dropped():
    e = engine(rows=1, decode_block=2)
    prompts = ([n] for n in range(1, 50))
    candidates = [request("a", prompt, vocab=6, max_tokens=40) for prompt in prompts]
    a = next(r for r in candidates if 4 <= len(expected_tokens(r, 64)[0]) < 10)
    b = request("b", [7])
    e.add(a, b)
    e.run()
    finished_as_alone(e, a, b)
    assert e.reasons["a"] == "stop"
    listed = [names(plan)[1] for plan in e.device.plans]
    length = len(e.outputs["a"])
    assert listed.count("a") == -(-(length - 1) // 2) + 1  # one block in vain, known a beat late


def test_abort_frees_at_once_and_silences():
    e = engine(rows=1)
    a, b = request("a", [1], max_tokens=60, **NEVER), request("b", [2])
    e.add(a, b)
    e.beat()
    e.scheduler.abort("a")
    plan = e.beat()
    assert names(plan) == ("b", "b") and plan.chunks[0].slot == 0
    assert e.outputs["a"] == []
    e.scheduler.abort("a")  # again, and ids that never were: ignored
    e.scheduler.abort("x")
    e.add(request("a", [3], max_tokens=4))  # the id is free again
    e.run()
    finished_as_alone(e, b)
    assert len(e.outputs["a"]) <= 4 and set(e.reasons) == {"a", "b"}


def test_abort_of_a_waiting_row_and_of_one_that_left_unread():
    e = engine(rows=1)
    e.add(request("a", [1], max_tokens=3, **NEVER), request("b", [2]))
    e.scheduler.abort("b")
    plan = e.beat()
    assert plan.steps == 2  # a has left by now
    e.scheduler.abort("a")
    e.run()
    assert e.outputs == {"a": [], "b": []} and e.reasons == {}
    assert e.scheduler.load.free_pages == 32


def test_logprobs_are_those_of_the_new_tokens_and_as_many_as_asked():
    for wanted in (None, 0, 1, 2):
        e = engine()
        e.add(request("a", [1], max_tokens=3, logprobs=wanted, **NEVER))
        plan = e.scheduler.schedule()
        (output,) = e.scheduler.commit(plan, *e.device.run(plan))
        if wanted is None:
            assert output.logprobs is None
        else:
            ids = output.token_ids
            tops = [[(i + n, -i - n) for n in range(wanted)] for i in ids]
            assert len(ids) == 3
            assert output.logprobs == [(-i, top) for i, top in zip(ids, tops, strict=True)]


def block(tokens: list[list[int]], count: list[int], finish: list[int]) -> BlockResult:
    arrays = [np.array(values, np.int32) for values in (tokens, count, finish)]
    return BlockResult(*arrays)


def test_a_row_without_finite_logits_ends_as_an_error():
    scheduler = engine().scheduler
    scheduler.add(request("a", [1], max_tokens=5))
    plan = scheduler.schedule()
    (output,) = scheduler.commit(plan, block([[7, 8, -1, 0, 0]], [2], [1]))
    assert (output.token_ids, output.finish_reason) == ([7, 8], "error")
    assert not scheduler.has_work


def test_a_runner_that_ran_fewer_steps_than_planned_is_found_out():
    scheduler = engine().scheduler
    scheduler.add(request("a", [1], max_tokens=50))
    plan = scheduler.schedule()
    with pytest.raises(RuntimeError, match="runs on after 3 of a block's 4 steps"):
        scheduler.commit(plan, block([[7, 8, 9, 1, 0]], [3], [0]))


def test_a_speculative_block_holds_pages_for_the_most_and_leaves_by_the_fewest():
    e = engine(rows=1, decode_block=2, draft=3, prefill_chunk=4)
    a = request("a", [1, 2, 3, 4, 5], max_tokens=12, **NEVER)
    e.add(a)
    e.beat()  # 4 of the prompt's tokens
    plan = e.beat()
    (entry,) = plan.rows
    row = entry.row
    assert (plan.steps, plan.draft) == (2, 3)
    assert (row.least, row.bound, row.computed) == (3, 9, 13)  # 1 + 2 and 1 + 2 * 4; 5 + 9 - 1
    assert len(entry.pages) == 4  # 13 tokens
    given = e.device.lines[entry.slot].produced
    plan = e.beat()
    (entry,) = plan.rows
    assert entry.cached == 13 and len(entry.pages) == 4  # 5 + 12 - 1 tokens of at most 17
    assert (row.least, row.bound) == (given + 2, min(12, given + 8)) and row.slot == 0
    e.run()
    finished_as_alone(e, a)


def test_a_row_leaves_a_speculative_block_that_is_sure_to_end_it():
    e = engine(rows=1, decode_block=4, draft=2)
    a, b = request("a", [1], max_tokens=5, **NEVER), request("b", [2], max_tokens=2, **NEVER)
    e.add(a, b)
    assert names(e.beat()) == ("a", "a")  # 1 by the prefill + 4 steps = max_tokens
    assert names(e.beat()) == ("b", "b")
    e.run()
    finished_as_alone(e, a, b)


def test_few_pages_make_a_block_plain_before_anybody_is_preempted():
    e = engine(decode_block=4, draft=3, num_pages=7, prefill_chunk=16)  # 6 pages of 4
    a = request("a", [1, 2, 3], max_tokens=20, **NEVER)
    b = request("b", [4, 5, 6], max_tokens=9, **NEVER)
    e.add(a, b)
    assert e.beat().draft == 0  # no row has a slot yet
    plan = e.beat()  # a speculative block needs 6 pages for a and 3 for b
    assert names(plan) == ("", "ab") and plan.draft == 0
    plan = e.beat()
    assert names(plan) == ("", "a") and plan.draft == 3
    e.run()
    finished_as_alone(e, a, b)
    assert e.scheduler.counters.preemptions == 0


def test_the_draft_policy_sees_the_rows_with_a_slot_and_the_knob():
    e, seen = engine(draft=3), []
    e.scheduler.draft_policy = lambda rows, most: seen.append((len(rows), most)) or 1
    e.scheduler.knobs = Knobs(decode_block=4, prefill_chunk=8, live_rows=2, draft=2)
    a = request("a", [1] * 3, max_tokens=30, **NEVER)
    e.add(a)
    e.beat()
    assert e.beat().draft == 1 and seen[0] == (1, 2)
    e.run()
    finished_as_alone(e, a)


def test_knobs_take_effect_in_the_next_beat():
    e = engine(rows=2)
    a, b = request("a", [1] * 8, **NEVER), request("b", [2] * 8, **NEVER)
    e.add(a, b)
    e.scheduler.knobs = Knobs(decode_block=2, prefill_chunk=4, live_rows=1)
    assert names(e.beat()) == ("a", "")
    plan = e.beat()
    assert names(plan) == ("a", "a") and len(plan.chunks[0].tokens) == 4 and plan.steps == 2
    assert names(e.beat()) == ("", "a")
    e.scheduler.knobs = Knobs(decode_block=4, prefill_chunk=8, live_rows=2)
    assert names(e.beat()) == ("b", "ab")
    e.run()
    finished_as_alone(e, a, b)


def test_a_knob_never_speculates_beyond_what_was_compiled():
    scheduler = engine(draft=3).scheduler
    with pytest.raises(ValueError, match="knob draft=4: want 0 to 3"):
        scheduler.knobs = Knobs(decode_block=4, prefill_chunk=8, live_rows=2, draft=4)


@pytest.mark.parametrize("name", ["decode_block", "prefill_chunk", "live_rows", "admit_together"])
def test_knobs_beyond_what_was_compiled_are_refused(name):
    scheduler = engine(q_tile=4).scheduler
    good = dict(decode_block=4, prefill_chunk=8, live_rows=2, admit_together=2)
    for value in (0, good[name] + 1):
        with pytest.raises(ValueError, match=rf"knob {name}={value}: want \d to {good[name]}"):
            scheduler.knobs = Knobs(**good | {name: value})
    assert scheduler.knobs == Knobs(decode_block=4, prefill_chunk=8, live_rows=2)


def order_of(e: FakeEngine) -> str:
    """Ids in the order of their chunks."""
    return "".join(c.row.request.id for plan in e.device.plans for c in plan.chunks)


def knobs_of(e: FakeEngine, **changes) -> Knobs:
    return dataclasses.replace(e.scheduler.knobs, **changes)


def test_longest_first_admits_by_limit_and_passes_nobody_for_ever(monkeypatch):
    limits = dict(a=2, b=3, c=9, d=4, e=9)
    for window, order in ((128, "cedba"), (2, "bcaed"), (0, "abcde")):
        monkeypatch.setattr(scheduler_module, "_ORDER_WINDOW", window)
        e = engine(rows=1)
        e.add(*(request(n, [1], max_tokens=limits[n], **NEVER) for n in limits))
        e.scheduler.knobs = knobs_of(e, longest_first=True)
        e.run()
        assert order_of(e) == order, window


def test_a_preempted_row_is_first_also_where_the_longest_are():
    e = engine(rows=2, num_pages=6)
    e.add(*(request(n, [1] * 4, max_tokens=12, **NEVER) for n in "ab"))
    e.scheduler.knobs = knobs_of(e, longest_first=True)
    e.beat()
    e.add(request("c", [1], max_tokens=19, **NEVER))
    e.run()
    assert e.scheduler.counters.preemptions == 1 and order_of(e) == "abbc"


def test_rows_are_admitted_together_once_enough_slots_are_free():
    e = engine(rows=3, prefill_chunk=16)
    e.scheduler.knobs = knobs_of(e, admit_together=2)
    limits = dict(a=5, b=9, c=9, d=3, e=3)
    e.add(*(request(n, [1], max_tokens=limits[n], **NEVER) for n in limits))
    assert [names(e.beat()) for _ in range(3)] == [("abc", "abc"), ("", "bc"), ("de", "de")]
    e.run()
    e = engine(rows=2)
    e.scheduler.knobs = knobs_of(e, admit_together=2)
    e.add(request("a", [1], max_tokens=9, **NEVER), request("b", [1], max_tokens=5, **NEVER))
    e.beat()
    e.add(request("c", [1], max_tokens=3, **NEVER))
    assert names(e.beat()) == ("c", "ac")  # nobody else waits: one free slot is enough


def test_pages_in_reserve_keep_rows_out_while_others_run():
    e = engine(rows=2, num_pages=9)
    e.scheduler.knobs = knobs_of(e, reserve_pages=5)
    e.add(*(request(n, [1] * 4, max_tokens=5, **NEVER) for n in "ab"))
    assert names(e.beat()) == ("a", "a")  # 2 of 8 pages; b needs 2 and 5 must be left
    assert names(e.beat()) == ("b", "b")
    e.run()


def test_a_beat_that_costs_more_has_longer_blocks():
    assert best_steps([1, 1, 8, 8], 8, 0) == 1
    assert best_steps([1, 1, 8, 8], 8, 1) == best_steps([1, 1, 8, 8], 8)
    assert best_steps([1, 1, 8, 8], 8, 100) == 8


def test_the_scheduler_imports_no_jax():
    folder = Path(scheduler_module.__file__).parent
    for name in ("scheduler.py", "pages.py", "request.py"):
        tree = ast.parse((folder / name).read_text())
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        modules = {getattr(n, "module", None) or n.names[0].name for n in imports}
        assert not [m for m in modules if m.split(".")[0] in ("jax", "flax")], name


def test_a_new_scheduler_has_nothing_to_do():
    assert Scheduler.schedule(engine().scheduler) is None
    assert not engine().has_work
