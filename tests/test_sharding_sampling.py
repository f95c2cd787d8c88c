"""Sampling from logits that several devices share: token for token what one device samples.

Both get the same logits, so that nothing but the sampler can differ.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_jax.config import SamplingParams
from lepton_jax.engine.row_params import SampleSpec, pack, unpack
from lepton_jax.engine.sampling import History, log_total, sample
from lepton_jax.sharding import WHOLE, Placement
from lepton_jax.sharding.placement import CUT_SPEC, WHOLE_SPEC

EOS = (2,)
ROWS = [
    SamplingParams(),
    SamplingParams(temperature=0.9, logprobs=5),
    SamplingParams(temperature=1.2, top_k=3),
    SamplingParams(temperature=1.0, top_k=400),
    SamplingParams(temperature=1.5, top_p=0.6),
    SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.02),
    SamplingParams(repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.3),
    SamplingParams(temperature=1.1, repetition_penalty=0.7, logit_bias={3: 2.0, 1999: 5.0}),
    SamplingParams(logit_bias={2: 100.0}, min_tokens=4),
    SamplingParams(temperature=1.0, logprobs=8, stop_token_ids=(7, 1500)),
]
VOCAB, DEVICES = 2002, 4  # doesn't divide: two of the last device's places are padding


def logits_of(kind):
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(len(ROWS), VOCAB)).astype(np.float32) * 2
    if kind == "ties":
        logits = np.round(logits)
    if kind == "one device has it all":
        logits[:, 600:] = -50
    if kind == "broken":
        logits[1], logits[3] = np.nan, -np.inf
    return logits


def run(placement, logits, index, seed):
    spec = SampleSpec()
    for params in ROWS:
        spec = spec.union(SampleSpec.of(params, EOS))
    packed = pack(ROWS, spec, eos_ids=EOS, seeds=[seed + i for i in range(len(ROWS))])
    axis = placement.axis
    share = axis.share(VOCAB)
    seen = np.random.default_rng(5).integers(0, VOCAB, (2, 40 * len(ROWS)))
    lines = np.repeat(np.arange(len(ROWS)), 40)

    def step(whole, packed, seen, lines):
        first = 0 if axis is WHOLE else axis.index * share
        padded = jnp.pad(whole, ((0, 0), (0, axis.size * share - VOCAB)), constant_values=-jnp.inf)
        mine = jax.lax.dynamic_slice_in_dim(padded, first, share, axis=1)
        history = History.zeros(len(ROWS), share)
        history = history.count_prompt(lines, axis.local(seen[0], share))
        history = history.count_output(lines, axis.local(seen[1], share))
        new = sample(
            mine,
            unpack(packed, spec),
            index=jnp.full(len(ROWS), index, jnp.int32),
            history=history,
            spec=spec,
            axis=axis,
        )
        return new, history

    results = WHOLE_SPEC, CUT_SPEC
    program = placement.program(step, (WHOLE_SPEC,) * 4, results)
    new, history = program(logits, packed, seen, lines)
    return jax.tree.map(np.asarray, new), np.asarray(history.output_counts).sum()


@pytest.mark.parametrize("kind", ["random", "ties", "one device has it all", "broken"])
def test_tokens_and_logprobs_are_those_of_one_device(kind):
    one, many = Placement(jax.devices()[:1]), Placement(jax.devices()[:DEVICES])
    logits, tokens = logits_of(kind), []
    for index in (0, 5):
        want, counted = run(one, logits, index, seed=11)
        got, counted_too = run(many, logits, index, seed=11)
        assert got.tokens.tolist() == want.tokens.tolist()
        assert got.stopped.tolist() == want.stopped.tolist()
        assert counted == counted_too == 40 * len(ROWS)
        sound = want.tokens >= 0
        assert got.top_ids[sound].tolist() == want.top_ids[sound].tolist()
        for name in ("logprob", "top_logprobs"):
            ours, theirs = getattr(got, name)[sound], getattr(want, name)[sound]
            np.testing.assert_allclose(ours, theirs, atol=2e-6)
        tokens.append(want.tokens)
    assert (tokens[0] != tokens[1]).any()  # drawn, and with a minimum length


def test_shares_of_a_total():
    logits, placement = logits_of("random"), Placement(jax.devices()[:2])

    def total_of(x):
        return log_total(x, placement.axis.max(x.max(-1)), placement.axis)

    program = placement.program(total_of, (CUT_SPEC,), WHOLE_SPEC)
    halves = np.concatenate(np.split(logits, 2, axis=1))
    total = program(halves)
    np.testing.assert_allclose(total, jax.nn.logsumexp(logits, -1), rtol=1e-6)
