"""The device sampler against slow arithmetic, rule by rule, and the packing of its parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lepton_jax.config import SamplingParams
from lepton_jax.engine import sampling
from lepton_jax.engine.row_params import SampleSpec, pack, unpack, width
from lepton_jax.engine.sampling import History, sample

EOS = (2, 7)
FULL = dict(
    temperature=0.75,
    top_k=5,
    top_p=0.875,
    min_p=0.125,
    repetition_penalty=1.5,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    logit_bias={4: -2.5, 9: 100.0, 1: 0.5},
    min_tokens=3,
    stop_token_ids=(11, 2),
    logprobs=3,
)


@functools.partial(jax.jit, static_argnames="spec")
def _sample(logits, packed, index, history, spec):
    return sample(logits, unpack(packed, spec), index=index, history=history, spec=spec)


def run(logits, rows, *, seeds=None, index=None, history=None, eos_ids=EOS, spec=None):
    """One sampling step of rows with logits [B, V] (or one row of logits for all), as numpy."""
    spec = spec or functools.reduce(SampleSpec.union, (SampleSpec.of(r, eos_ids) for r in rows))
    count = len(rows)
    logits = np.broadcast_to(np.asarray(logits, np.float32), (count, np.shape(logits)[-1]))
    seeds = range(count) if seeds is None else seeds
    index = jnp.zeros(count, jnp.int32) if index is None else jnp.asarray(index, jnp.int32)
    packed = pack(rows, spec, eos_ids=eos_ids, seeds=seeds)
    return jax.tree.map(np.asarray, _sample(logits, packed, index, history, spec))


def _counted(rows, vocab, prompt, output):
    """The history of these (rows, ids)."""

    @jax.jit
    def count(prompt, output):
        return History.zeros(rows, vocab).count_prompt(*prompt).count_output(*output)

    ids = [np.array(pair, np.int32) for pair in (prompt, output)]
    return jax.tree.map(np.asarray, count(*ids))


def kept_by_hand(logits, params, slack):
    """Probabilities after top-k, top-p and min-p (0: dropped); slack widens the last two."""
    scores = np.asarray(logits, np.float64) / params.temperature
    p = np.exp(scores - scores.max())
    if params.top_k:
        p[scores < np.sort(scores)[::-1][min(params.top_k, len(p)) - 1] - abs(slack)] = 0
    p /= p.sum()
    if params.top_p < 1:
        better = np.array([p[p > x].sum() for x in p])
        p[better >= params.top_p + slack] = 0
    p[p < params.min_p * p.max() * (1 - slack)] = 0
    return p / max(p.sum(), 1e-30)


def chi_square_ok(tokens, probabilities):
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities[probabilities > 0] * len(tokens)
    freedom = len(expected) - 1
    assert freedom > 0 and expected.min() > 5
    statistic = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    return statistic < freedom + 5 * np.sqrt(2 * freedom) + 5


# --- parameters ---------------------------------------------------------------------------------


def test_spec_of_asks_for_what_a_row_needs_and_no_more():
    assert SampleSpec.of(SamplingParams(), ()) == SampleSpec()
    assert SampleSpec.of(SamplingParams(), EOS) == SampleSpec(stop_ids=2)
    assert SampleSpec.of(SamplingParams(ignore_eos=True), EOS) == SampleSpec()
    assert SampleSpec.of(SamplingParams(top_k=5, top_p=0.5), ()) == SampleSpec()
    assert SampleSpec.of(SamplingParams(temperature=1.0), ()) == SampleSpec(stochastic=True)
    assert SampleSpec.of(SamplingParams(logprobs=0), ()) == SampleSpec(logprobs=0)
    assert SampleSpec.of(SamplingParams(**FULL), EOS) == SampleSpec(
        stochastic=True,
        truncate=True,
        penalties=True,
        bias=4,
        stop_ids=4,  # 11, 2, 7: eos 2 counts once
        min_tokens=True,
        logprobs=4,
    )


def test_union_serves_both_and_is_the_least_such():
    a = SampleSpec(stochastic=True, bias=4, logprobs=-1)
    b = SampleSpec(penalties=True, bias=2, stop_ids=1, logprobs=0)
    both = SampleSpec(stochastic=True, penalties=True, bias=4, stop_ids=1, logprobs=0)
    assert a.union(b) == b.union(a) == both
    assert both.union(a) == both and hash(both) == hash(a.union(b))


def test_pack_and_unpack_round_trip():
    row = SamplingParams(**FULL)
    spec = SampleSpec.of(row, EOS)
    packed = pack([row, None], spec, eos_ids=EOS, seeds=[-1, 2**40 + 5])
    assert packed.dtype == np.int32 and packed.shape == (2, width(spec))
    out = jax.tree.map(np.asarray, jax.jit(unpack, static_argnums=1)(packed, spec))
    assert out.seed.tolist() == [[2**32 - 1, 2**32 - 1], [256, 5]]
    assert out.temperature.tolist() == [0.75, 0.0]
    assert out.top_k.tolist() == [5, 0]
    assert out.top_p.tolist() == [0.875, 1.0]
    assert out.min_p.tolist() == [0.125, 0.0]
    assert out.repetition.tolist() == [1.5, 1.0]
    assert out.presence.tolist() == [-0.5, 0.0]
    assert out.frequency.tolist() == [0.25, 0.0]
    assert out.min_tokens.tolist() == [3, 0]
    assert out.bias_ids.tolist() == [[4, 9, 1, -1], [-1] * 4]
    assert out.bias_values.tolist() == [[-2.5, 100.0, 0.5, 0.0], [0.0] * 4]
    assert out.stop_ids.tolist() == [[11, 2, 7, -1], [-1] * 4]


def test_a_greedy_program_carries_only_stop_ids():
    spec = SampleSpec.of(SamplingParams(), EOS)
    packed = pack([SamplingParams()], spec, eos_ids=EOS, seeds=[9])
    assert packed.tolist() == [[2, 7]]
    assert pack([None], SampleSpec(), eos_ids=EOS, seeds=[0]).shape == (1, 0)


def test_pack_refuses_what_the_spec_or_the_seeds_lack():
    with pytest.raises(ValueError, match="row 1 needs .*stochastic=True.*union"):
        pack([None, SamplingParams(temperature=1.0)], SampleSpec(), eos_ids=(), seeds=[0, 1])
    with pytest.raises(ValueError, match="2 rows but 1 seeds"):
        pack([None, None], SampleSpec(), eos_ids=(), seeds=[0])
    with pytest.raises(ValueError, match="3 columns but .* takes 1"):
        unpack(jnp.zeros((2, 3), jnp.int32), SampleSpec(stop_ids=1))


# --- greedy, stop, bias, penalties ---------------------------------------------------------------


def test_greedy_takes_the_first_best_and_reports_stops():
    logits = np.zeros((3, 12))
    logits[0, [5, 8]] = 3.0
    logits[1, 7] = 1.0
    logits[2, 11] = 1.0
    rows = [SamplingParams(), SamplingParams(), SamplingParams(stop_token_ids=(11,))]
    out = run(logits, rows)
    assert out.tokens.tolist() == [5, 7, 11]
    assert out.stopped.tolist() == [False, True, True]
    assert (out.logprob, out.top_ids, out.top_logprobs) == (None, None, None)
    assert not run(logits[1], [SamplingParams(ignore_eos=True)]).stopped[0]


@pytest.mark.parametrize(
    "extra", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}]
)
def test_broken_logits_end_their_row_only(extra):
    logits = np.random.default_rng(0).normal(size=(5, 500))
    logits[0, 3] = np.nan
    logits[1] = -np.inf
    logits[2, 400] = np.inf
    rows = [SamplingParams(**extra)] * 5
    out = run(logits, rows)
    assert out.tokens[:3].tolist() == [-1, -1, -1] and out.stopped[:3].all()
    assert (out.tokens[3:] >= 0).all()
    assert out.tokens[3:].tolist() == run(logits[3:], rows[3:], seeds=[3, 4]).tokens.tolist()


def test_bias_is_added_and_padding_touches_nothing():
    logits = np.array([1.0, 0.0, 0.0, 0.5])
    rows = [
        SamplingParams(logit_bias={1: 1.5, 0: -3.0, 3: 0.25}),
        SamplingParams(logit_bias={0: -0.75}),
        SamplingParams(),
    ]
    assert run(logits, rows).tokens.tolist() == [1, 3, 0]


def test_penalties_by_hand():
    prompt, output = ([0, 0, -1, 0], [1, 5, 2, -1]), ([0, 0, 0, 1, -1], [3, 3, 4, 0, 0])
    history = _counted(2, 6, prompt, output)
    assert np.asarray(history.prompt_seen).nonzero()[1].tolist() == [1, 5]
    assert np.asarray(history.output_counts).tolist() == [[0, 0, 0, 2, 1, 0], [1, 0, 0, 0, 0, 0]]
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    spec = SampleSpec.of(params, ())
    packed = pack([params, None], spec, eos_ids=(), seeds=[0, 0])
    logits = np.array([[1.0, 3.0, 2.0, 4.0, -1.0, -2.0]] * 2, np.float32)
    shape = jax.jit(functools.partial(sampling._shape, spec=spec))
    parameters = jax.jit(unpack, static_argnums=1)(packed, spec)
    shaped = shape(logits, parameters, index=np.zeros(2, np.int32), history=history)
    # untouched; prompt 3/2; untouched; 4/2 - 2*.5 - .25; -1*2 - .5 - .25; prompt -2*2
    assert np.asarray(shaped[0]).tolist() == [1.0, 1.5, 2.0, 0.75, -2.75, -4.0]
    assert np.array_equal(shaped[1], logits[1])  # an idle row is neutral
    assert run(logits, [params] * 2, history=history, eos_ids=()).tokens.tolist() == [2, 3]


def test_history_forgets_cleared_rows():
    rows = np.arange(3)
    history = jax.jit(History.clear)(_counted(3, 4, (rows, rows), (rows, rows)), np.array([1, -1]))
    expected = [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert np.asarray(history.output_counts).tolist() == expected
    assert np.asarray(history.prompt_seen).astype(int).tolist() == expected


def test_min_tokens_masks_every_stop_id_until_then():
    logits = np.arange(8.0)[::-1].copy()
    logits[2], logits[5], logits[7] = 50.0, 40.0, 60.0
    row = SamplingParams(min_tokens=2, stop_token_ids=(5,))
    out = run(logits, [row] * 4, index=[0, 1, 2, 3])
    assert out.tokens.tolist() == [0, 0, 7, 7]
    assert out.stopped.tolist() == [False, False, True, True]
    out = run(logits, [SamplingParams(min_tokens=2, stop_token_ids=(5,), ignore_eos=True)])
    assert out.tokens.tolist() == [7] and not out.stopped[0]


def test_logprobs_are_the_models_own():
    logits = np.random.default_rng(1).normal(size=(2, 50)) * 3
    rows = [
        SamplingParams(logit_bias={17: 100.0}, logprobs=3),
        SamplingParams(temperature=2.0, top_k=2, logprobs=0),
    ]
    out = run(logits, rows)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-expected, axis=-1)[:, :4]
    assert out.tokens[0] == 17
    np.testing.assert_allclose(out.logprob, expected[[0, 1], out.tokens], atol=1e-5)
    assert out.top_ids.tolist() == order.tolist()
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(expected, order, -1), atol=1e-5)
    assert run(logits, [SamplingParams(logprobs=0)] * 2).top_ids.shape == (2, 0)


# --- truncation and the draw ---------------------------------------------------------------------

TRUNCATED = SampleSpec(stochastic=True, truncate=True)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-24, 24), min_size=40, max_size=40),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 5, 17, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.97, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
)
def test_kept_set_against_float64(logits, temperature, top_k, top_p, min_p):
    """512 draws stay within the set and reach all likely tokens of it; coarse logits give ties."""
    logits = np.array(logits) / 4
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    out = run(logits, [params] * 512, spec=TRUNCATED, eos_ids=())
    drawn = set(out.tokens.tolist())
    may, must = kept_by_hand(logits, params, 1e-5), kept_by_hand(logits, params, -1e-5)
    assert drawn <= set(may.nonzero()[0].tolist())
    assert drawn >= set(((must > 0) & (may > 0.04)).nonzero()[0].tolist())  # chance to miss: 1e-9


def test_ties_with_the_last_kept_token_are_kept():
    logits = np.array([3.0, 1.0, 1.0, 1.0, 0.0])
    out = run(logits, [SamplingParams(temperature=2.0, top_k=2)] * 400, eos_ids=())
    assert set(out.tokens.tolist()) == {0, 1, 2, 3}
    out = run(np.zeros(300), [SamplingParams(temperature=1.0, top_k=100)] * 2000, eos_ids=())
    assert len(set(out.tokens.tolist())) > 280


@pytest.mark.parametrize("vocab", [50, 6143, 7001, 20000])
def test_top_k_cut_is_the_kth_score(vocab):
    """Read off the leaders (up to 64) and bisected (beyond), with V in and out of blocks."""
    top_k = np.array([0, 1, 2, 63, 64, 65, 100, 1000, vocab, 10**6], np.int32)
    scores = np.random.default_rng(vocab).normal(size=(len(top_k), vocab)).astype(np.float32) * 2
    scores -= scores.max(-1, keepdims=True)
    cut = np.asarray(jax.jit(sampling._top_k_cut)(scores, top_k))
    for row, k in enumerate(top_k):
        kept = int((scores[row] >= cut[row]).sum())
        assert kept == (min(k, vocab) if k else vocab), (k, cut[row])


def test_top_k_cut_of_tied_and_masked_scores_ends():
    scores = np.zeros((4, 9000), np.float32)
    scores[1, 70:] = -np.inf  # fewer tokens than asked for
    scores[2, 10:] = -3.0
    scores[3, 40:] = -np.inf  # fewer than leaders
    cut = np.asarray(jax.jit(sampling._top_k_cut)(scores, np.full(4, 100, np.int32)))
    kept = (scores >= cut[:, None]) & np.isfinite(scores)
    assert kept.sum(-1).tolist() == [9000, 70, 9000, 40]


@pytest.mark.parametrize(
    "extra",
    [
        {"temperature": 1.0},
        {"temperature": 1.6},
        {"temperature": 0.6, "top_k": 9},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.2, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_distribution(extra):
    """Chi-square of 10,000 draws: seeds 0..99 by positions 0..99 of one row."""
    logits = np.random.default_rng(3).normal(size=30)
    params = SamplingParams(**extra)
    seeds, index = np.divmod(np.arange(10000), 100)
    out = run(logits, [params] * 10000, seeds=seeds, index=index, eos_ids=())
    assert chi_square_ok(out.tokens, kept_by_hand(logits, params, 0.0))


def test_distribution_across_blocks():
    """A vocabulary of several blocks, not a multiple of one: every region gets its share."""
    logits = np.random.default_rng(4).normal(size=1000)
    out = run(logits, [SamplingParams(temperature=1.0)] * 6000, eos_ids=())
    p = kept_by_hand(logits, SamplingParams(temperature=1.0), 0.0)
    assert chi_square_ok(out.tokens // 40, p.reshape(25, 40).sum(-1))


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 1000])
def test_draw_inverts_the_cumulative_sum_exactly(vocab):
    rng = np.random.default_rng(vocab)
    bits = np.concatenate([[0, 1, 2**32 - 1, 2**31], rng.integers(0, 2**32, 60)])
    weights = rng.integers(0, 2**29 // vocab, (len(bits), vocab))
    weights[:, rng.random(vocab) < 0.7] = 0  # masked, often at both ends
    weights[:, vocab // 2] += 1
    got = np.asarray(jax.jit(sampling._draw)(weights.astype(np.int32), bits.astype(np.uint32)))
    for row, (w, b) in enumerate(zip(weights.tolist(), bits.tolist(), strict=True)):
        target = b * sum(w) >> 32
        assert got[row] == np.searchsorted(np.cumsum(w), target, side="right")
        assert w[got[row]] > 0


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_high_product(a, b):
    assert int(sampling._high_product(jnp.uint32(a), jnp.uint32(b))) == a * b >> 32


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 5.0, 40.0]))
@example(18023491, 40.0)  # the best of the second row would be among those that are left out
def test_weights_follow_the_distribution(seed, spread):
    scores = (np.random.default_rng(seed).normal(size=(2, 3000)) * spread).astype(np.float32)
    scores[1, ::3] = -np.inf
    scores -= scores.max(-1, keepdims=True)  # the best is 0
    weights = np.asarray(jax.jit(sampling._weights)(scores)).astype(np.int64)
    total = weights.sum(-1)
    assert (total <= 2**30).all() and (total > 2**29 - 3000).all()
    assert (weights[1, ::3] == 0).all()
    p = np.exp(scores.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights / total[:, None], p, atol=4e-9, rtol=1e-5)


# --- seeds and batches ---------------------------------------------------------------------------


def test_a_rows_token_does_not_depend_on_its_batch():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(9, 3000)) * 2
    rows = [
        SamplingParams(temperature=1.0),
        SamplingParams(),
        SamplingParams(temperature=0.7, top_k=50, top_p=0.9),
        SamplingParams(temperature=2.0, top_k=500),
        SamplingParams(temperature=1.5, top_p=0.7),
        SamplingParams(temperature=1.0, min_p=0.02),
        SamplingParams(temperature=1.0, top_p=0.99, logit_bias={5: 4.0}),
        SamplingParams(temperature=3.0, repetition_penalty=1.2),
        SamplingParams(temperature=1.0, stop_token_ids=(1, 4, 9), min_tokens=9),
    ]
    seeds, index = rng.integers(0, 2**63, 9), rng.integers(0, 1000, 9)
    seen = np.tile(np.arange(0, 3000, 2), 9)
    history = _counted(9, 3000, ([], []), (np.repeat(np.arange(9), 1500), seen))
    together = run(logits, rows, seeds=seeds, index=index, history=history).tokens
    order = np.array([4, 8, 0, 2, 1, 3, 7, 5, 6])
    turned = run(
        logits[order],
        [rows[i] for i in order],
        seeds=seeds[order],
        index=index[order],
        history=jax.tree.map(lambda x: x[order], history),
    ).tokens
    assert turned.tolist() == together[order].tolist()
    union = functools.reduce(SampleSpec.union, (SampleSpec.of(r, EOS) for r in rows))
    for i, spec in [*((i, union) for i in range(9)), (2, None), (6, None)]:
        place = slice(i, i + 1)
        one = History(history.prompt_seen[place], history.output_counts[place])
        alone = run(
            logits[i], rows[place], seeds=seeds[place], index=index[place], history=one, spec=spec
        )
        assert alone.tokens[0] == together[i], rows[i]


def test_seed_and_position_fix_the_draw():
    logits = np.zeros(1000)
    rows = [SamplingParams(temperature=1.0)] * 6
    out = run(logits, rows, seeds=[1, 1, 1, 2, 1 + 2**32, 1 + 2**64], index=[0, 0, 1, 0, 0, 0])
    first, again, later, other, high, wrapped = out.tokens.tolist()
    assert first == again == wrapped
    assert len({first, later, other, high}) == 4


def test_greedy_rows_stay_greedy_among_stochastic_ones():
    logits = np.random.default_rng(6).normal(size=(2, 400))
    rows = [SamplingParams(top_k=7, top_p=0.2), SamplingParams(temperature=1.0, top_p=0.9)]
    for seed in range(5):
        out = run(logits, rows, seeds=[seed, seed])
        assert out.tokens[0] == logits[0].argmax()


def test_a_vanishing_temperature_is_greedy():
    logits = np.random.default_rng(8).normal(size=(50, 300))
    out = run(logits, [SamplingParams(temperature=1e-30)] * 50, eos_ids=())
    assert out.tokens.tolist() == logits.argmax(-1).tolist()
