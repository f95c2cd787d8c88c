"""The rows' state on the device, by hand. The programs themselves run in test_engine_loop.py."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lepton_jax.engine.row_params import SampleSpec
from lepton_jax.engine.sampling import Sampled
from lepton_jax.engine.steps import LENGTH, RUNNING, STOPPED, RowState

SLOTS, VOCAB = 3, 5
FULL = SampleSpec(penalties=True, logprobs=2)


def state(**fields) -> RowState:
    lines = {name: jnp.asarray(values) for name, values in fields.items()}
    return dataclasses.replace(RowState.zeros(SLOTS, VOCAB, SampleSpec()), **lines)


def test_a_new_state_runs_nothing():
    assert RowState.zeros(SLOTS, VOCAB, SampleSpec()).finish.tolist() == [LENGTH] * 3


def test_pieces_exist_only_where_asked():
    plain, full = (RowState.zeros(SLOTS, VOCAB, spec) for spec in (SampleSpec(), FULL))
    assert plain.logprob is plain.top_ids is plain.top_logprobs is plain.history is None
    assert full.top_ids.shape == full.top_logprobs.shape == (SLOTS, 2)
    assert full.history.output_counts.shape == (SLOTS, VOCAB)


def test_slots_beyond_the_last_read_as_finished_and_are_not_written():
    before = state(tokens=[7, 8, 9], finish=[RUNNING] * 3, lengths=[1, 2, 3])
    slots = jnp.array([2, SLOTS])
    lines = before.at(slots)
    assert lines.finish.tolist() == [RUNNING, LENGTH]
    assert int(lines.tokens[0]) == 9
    after = before.put(slots, dataclasses.replace(lines, tokens=jnp.array([1, 2])))
    assert after.tokens.tolist() == [7, 8, 1]
    assert after.finish.tolist() == [RUNNING] * 3
    assert after.lengths.tolist() == [1, 2, 3]


def test_only_running_rows_take_a_token_and_a_stop_goes_before_a_limit():
    before = state(tokens=[7, 8, 9], produced=[3, 3, 3], finish=[RUNNING, STOPPED, RUNNING])
    new = Sampled(tokens=jnp.array([1, 2, 3]), stopped=jnp.array([False, False, True]))
    running = before.finish == RUNNING
    after = before.sampled(new, running=running, limit=jnp.array([5, 4, 4]))
    assert after.tokens.tolist() == [1, 8, 3]
    assert after.produced.tolist() == [4, 3, 4]
    assert after.finish.tolist() == [RUNNING, STOPPED, STOPPED]
    again = after.sampled(new, running=after.finish == RUNNING, limit=jnp.array([5, 4, 4]))
    assert again.finish.tolist() == [LENGTH, STOPPED, STOPPED]


def test_a_larger_state_keeps_what_the_smaller_one_held():
    small = RowState.zeros(SLOTS, VOCAB, SampleSpec(logprobs=1))
    small = dataclasses.replace(
        small,
        tokens=jnp.array([7, 8, 9]),
        logprob=jnp.array([-1.0, -2.0, -3.0]),
        top_ids=jnp.array([[4], [5], [6]]),
        top_logprobs=jnp.array([[-0.5], [-0.25], [-0.125]]),
    )
    grown = RowState.zeros(SLOTS, VOCAB, FULL).filled_from(small)
    assert grown.tokens.tolist() == [7, 8, 9]
    assert grown.logprob.tolist() == [-1, -2, -3]
    assert grown.top_ids.tolist() == [[4, 0], [5, 0], [6, 0]]
    assert grown.top_logprobs.tolist() == [[-0.5, 0], [-0.25, 0], [-0.125, 0]]
    assert not np.any(grown.history.output_counts)
    counted = grown.history.count_output(jnp.array([1]), jnp.array([3]))
    more = dataclasses.replace(FULL, logprobs=4)
    grown = RowState.zeros(SLOTS, VOCAB, more).filled_from(
        dataclasses.replace(grown, history=counted)
    )
    assert int(grown.history.output_counts[1, 3]) == 1
    assert grown.top_ids.shape == (SLOTS, 4)
