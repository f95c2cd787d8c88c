"""Logits become tokens: the sampler of all rows at once, on the device, without a sort over V.

Order of the rules: logit bias, penalties, minimum length, what is allowed, then greedy or
temperature, top-k, top-p, min-p, draw. What makes it cheap: top-k is a cut read off the best tokens
(`_top_k_cut`), top-p a test of the drawn token (`_draw_nucleus`), and the draw inverts the
cumulative distribution block by block (`_draw`). What makes it exact: probabilities become integer
weights (`_weights`), so sums don't depend on their order, a token of weight 0 can't be drawn, and a
row's token depends on its logits, seed and position alone, not on its batch mates or on how many
devices share V (`axis`: each has a share of the logits, and only sums, maxima and a few candidates
travel). Parameters: `row_params.py`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from lepton_jax.engine.row_params import RowParams, SampleSpec
from lepton_jax.sharding.axis import WHOLE, Axis

_SCALE_BITS = 29  # the weights of a row add up to less than 2**30: int32 sums can't overflow
_FLOOR = -math.log(2) * (_SCALE_BITS + 1)  # exp(_FLOOR) is below one weight unit: never drawn
_BLOCK = 256  # tokens in a block of the draw
_LEADERS = 64  # best tokens that are looked at one by one before bisection (`_bisect`)
_LEADER_BLOCK = 128  # a TPU register's width, to which a TPU pads whatever is narrower
_COLDEST = 1e-6  # lower temperatures count as this one: 0 / a denormal would be NaN
_TIED = 2.0**-40  # scores closer than this are the same: far below the spacing of real logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """One token a row.

    `tokens` i32[B]: the ids; -1 where the row's logits have no finite maximum (the model's output
    is broken), `stopped` bool[B]: the token is one of the row's stop ids, or -1. `logprob` f32[B]
    of the token, `top_ids` i32[B, n] and `top_logprobs` f32[B, n] of the n = spec.logprobs most
    likely tokens, best first: all three None where spec.logprobs is -1. Log-probabilities are the
    model's own (log_softmax of the logits as they came, before bias, penalties, temperature and
    truncation).
    """

    tokens: jax.Array
    stopped: jax.Array
    logprob: jax.Array | None = None
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """What the penalties look at: `prompt_seen` bool[B, V], `output_counts` i32[B, V].

    It takes 5 V bytes a row: allocate it only where a row asks for penalties. The methods return
    the changed history; under a jit that donates it, or in a loop's carry, they change it in place.
    """

    prompt_seen: jax.Array
    output_counts: jax.Array

    @classmethod
    def zeros(cls, rows: int, vocab: int) -> History:
        """An empty history of B = rows and V = vocab."""
        return cls(jnp.zeros((rows, vocab), bool), jnp.zeros((rows, vocab), jnp.int32))

    def clear(self, rows: jax.Array) -> History:
        """Forget the rows i32[n] (-1: padding), for new requests in their places."""
        rows = jnp.where(rows < 0, self.prompt_seen.shape[0], rows)
        return History(
            self.prompt_seen.at[rows].set(False, mode="drop"),
            self.output_counts.at[rows].set(0, mode="drop"),
        )

    def count_prompt(self, rows: jax.Array, tokens: jax.Array) -> History:
        """Note prompt tokens i32[T] of rows i32[T]; a negative row or token is padding."""
        place = self._place(rows, tokens)
        return History(self.prompt_seen.at[place].set(True, mode="drop"), self.output_counts)

    def count_output(self, rows: jax.Array, tokens: jax.Array) -> History:
        """Count output tokens i32[T] of rows i32[T]; a negative row or token is padding."""
        place = self._place(rows, tokens)
        return History(self.prompt_seen, self.output_counts.at[place].add(1, mode="drop"))

    def _place(self, rows: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        # A negative index would wrap around: send padding past the end, where mode="drop" drops it.
        return jnp.where((rows < 0) | (tokens < 0), self.prompt_seen.shape[0], rows), tokens


def sample(
    logits: jax.Array,
    params: RowParams,
    *,
    index: jax.Array,
    history: History | None,
    spec: SampleSpec,
    axis: Axis = WHOLE,
    allowed: jax.Array | None = None,
) -> Sampled:
    """Sample one token for each row of logits f32[B, V]; each device of `axis` has a share of V.

    `index` i32[B] is the output position of that token (0 for a row's first): with the row's seed
    it fixes the draw, and it is what min_tokens is compared with. `history` is read only where
    spec.penalties. The rules follow the Hugging Face and vLLM conventions: repetition penalty over
    prompt and output, presence and frequency over the output; top-p over what top-k leaves; tokens
    tied with the last one kept are kept. `allowed` bool[B, V]: where there, no other id is sampled.
    """
    shaped = _shape(logits, params, index=index, history=history, spec=spec, axis=axis)
    if allowed is not None:
        shaped = jnp.where(allowed, shaped, -jnp.inf)
    best = axis.max(jnp.max(shaped, -1))
    tokens = _first_of(shaped, best, axis)
    if spec.stochastic:
        drawn = _sample_tokens(shaped, params, best=best, index=index, spec=spec, axis=axis)
        tokens = jnp.where(params.temperature > 0, drawn, tokens)
    tokens = jnp.where(jnp.isfinite(best), tokens, -1)
    stopped = tokens < 0
    if spec.stop_ids:
        stopped |= jnp.any(tokens[:, None] == params.stop_ids, -1)
    if spec.logprobs < 0:
        return Sampled(tokens, stopped)
    total = log_total(logits, axis.max(jnp.max(logits, -1)), axis)
    chosen = axis.pick(logits, jnp.maximum(tokens, 0)[:, None])[:, 0]
    top, top_ids = axis.top_k(logits, spec.logprobs)
    return Sampled(tokens, stopped, chosen - total, top_ids, top - total[:, None])


def log_total(logits: jax.Array, top: jax.Array, axis: Axis) -> jax.Array:
    """log of the sum of exp(logits [..., V]) over V, `top` [...] the largest; NaN where that is not
    finite.
    """
    return top + jnp.log(axis.sum(jnp.sum(jnp.exp(logits - top[..., None]), -1)))


def _first_of(logits: jax.Array, best: jax.Array, axis: Axis = WHOLE) -> jax.Array:
    """The first id i32[B] whose logit is the best: argmax as compare and min.

    XLA's own argmax is a variadic reduce: 3.3 ms against 0.25 at [32, 49152] (CPU, 2026-11).
    """
    share = logits.shape[-1]
    ids = axis.whole(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1), share)
    return axis.min(jnp.min(jnp.where(logits == best[:, None], ids, axis.size * share), -1))


def _shape(
    logits: jax.Array,
    params: RowParams,
    *,
    index: jax.Array,
    history: History | None,
    spec: SampleSpec,
    axis: Axis = WHOLE,
) -> jax.Array:
    """The logits after bias, penalties and minimum length."""
    share, lines = logits.shape[-1], jnp.arange(logits.shape[0])[:, None]
    if spec.bias:
        ids = axis.local(params.bias_ids, share)
        ids = jnp.where(ids < 0, share, ids)
        logits = logits.at[lines, ids].add(params.bias_values, mode="drop")
    if spec.penalties:
        counts = history.output_counts
        repetition = params.repetition[:, None]
        repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(history.prompt_seen | (counts > 0), repeated, logits)
        logits -= params.frequency[:, None] * counts
        logits -= jnp.where(counts > 0, params.presence[:, None], 0.0)
    if spec.min_tokens and spec.stop_ids:
        ids = axis.local(params.stop_ids, share)
        early = (index < params.min_tokens)[:, None] & (ids >= 0)
        ids = jnp.where(early, ids, share)
        logits = logits.at[lines, ids].set(-jnp.inf, mode="drop")
    return logits


def _sample_tokens(
    logits: jax.Array,
    params: RowParams,
    *,
    best: jax.Array,
    index: jax.Array,
    spec: SampleSpec,
    axis: Axis,
) -> jax.Array:
    """Temperature, truncation and the draw; meaningless in rows that are greedy or broken."""
    warm = params.temperature > 0
    temperature = jnp.where(warm, jnp.maximum(params.temperature, _COLDEST), 1.0)
    scores = (logits - best[:, None]) / temperature[:, None]
    weights = _weights(scores, axis)
    keys = _row_keys(params.seed, index)
    if not spec.truncate:
        return _draw(weights, _random_bits(keys, 0), axis)
    active = warm & jnp.isfinite(best)
    cut = _top_k_cut(scores, jnp.where(active, params.top_k, 0), axis)
    total = axis.sum(jnp.sum(jnp.where(scores >= cut[:, None], weights, 0), -1))
    share = jnp.maximum(jnp.ceil(total * params.top_p), 1.0).astype(jnp.int32)
    share = jnp.where(active & (params.top_p < 1), share, jnp.iinfo(jnp.int32).max)
    cut = jnp.maximum(cut, jnp.log(params.min_p))
    return _draw_nucleus(jnp.where(scores >= cut[:, None], weights, 0), share, keys, axis=axis)


def _weights(scores: jax.Array, axis: Axis = WHOLE) -> jax.Array:
    """Integer weights i32[B, V] in proportion to exp(scores) (scores <= 0, 0 the best).

    A weight is floor(scale * exp(score)), scale the power of two that puts a row's total between
    2**29 and 2**30 (less the floors): a resolution of 2**-29 of the distribution, finer than that
    of a float32 uniform.
    """
    mass = jnp.exp(scores)
    exponent = jax.lax.bitcast_convert_type(axis.sum(jnp.sum(mass, -1)), jnp.int32) >> 23
    bits = (127 + 127 + _SCALE_BITS - exponent) << 23  # 2**(29 - exponent of the sum), made exactly
    scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return (mass * scale[:, None]).astype(jnp.int32)


def _top_k_cut(scores: jax.Array, top_k: jax.Array, axis: Axis = WHOLE) -> jax.Array:
    """The score f32[B] of a row's top_k-th token (i32[B]; 0: off, giving _FLOOR: keep all).

    Read off the leaders where they reach so far; only a longer list is bisected.
    """
    floor = jnp.full(top_k.shape, _FLOOR, jnp.float32)

    def find():
        leaders = axis.best(_leaders(scores), _LEADERS)
        reach = leaders.shape[-1]
        kth = jnp.take_along_axis(leaders, jnp.clip(top_k - 1, 0, reach - 1)[:, None], -1)[:, 0]
        low = jnp.where((top_k > 0) & (top_k <= reach), kth, floor)
        bracket = low, leaders[:, -1]
        return _bisect(scores, top_k, bracket, is_open=top_k > reach, axis=axis)

    return jax.lax.cond(jnp.any(top_k > 0), find, lambda: floor)


def _leaders(scores: jax.Array) -> jax.Array:
    """The best _LEADERS scores f32[B, min(_LEADERS, V)] of each row, best first.

    They lie in the _LEADERS blocks with the greatest maxima, so only those are searched: 1.1 ms
    against 2.3 for top_k over all of [32, 49152] (CPU, 2026-11).
    """
    rows, vocab = scores.shape
    if vocab <= _LEADERS * _LEADER_BLOCK:
        return jax.lax.top_k(scores, min(_LEADERS, vocab))[0]
    blocks = _blocks(scores, _LEADER_BLOCK, -jnp.inf)
    _, chosen = jax.lax.top_k(jnp.max(blocks, -1), _LEADERS)
    near = jnp.take_along_axis(blocks, chosen[:, :, None], 1).reshape(rows, -1)
    return jax.lax.top_k(near, _LEADERS)[0]


def _bisect(
    scores: jax.Array,
    top_k: jax.Array,
    bracket: tuple[jax.Array, jax.Array],
    *,
    is_open: jax.Array,
    axis: Axis,
) -> jax.Array:
    """The highest cut f32[B] in the bracket [low, high] that keeps top_k i32[B] tokens, or low.

    Rows that aren't open keep `low`. A row is done once its cut keeps exactly top_k, long before
    the floats run out; with a tie at the cut it never does, and stops where the bracket can't hold
    two different scores.
    """

    def probe(state):
        low, high, mid, is_open = state
        kept = axis.sum(jnp.sum((scores >= mid[:, None]).astype(jnp.int32), -1))
        low = jnp.where(is_open & (kept >= top_k), mid, low)
        high = jnp.where(kept >= top_k, high, mid)
        mid = (low + high) / 2
        tied = (high - low < _TIED) | (mid <= low) | (mid >= high)
        return low, high, mid, is_open & (kept != top_k) & ~tied

    low, high = bracket
    state = low, high, low, is_open  # the first probe, at low, finds the rows with fewer tokens
    return jax.lax.while_loop(lambda state: jnp.any(state[3]), probe, state)[0]


def _blocks(values: jax.Array, size: int, fill: float) -> jax.Array:
    """[B, V] as [B, blocks, size], the last block filled up."""
    rows, vocab = values.shape
    filled = jnp.pad(values, ((0, 0), (0, -vocab % size)), constant_values=fill)
    return filled.reshape(rows, -1, size)


def _row_keys(seed: jax.Array, index: jax.Array) -> jax.Array:
    """A key for each row: a pure function of its seed u32[B, 2] and the output position i32[B]."""
    keys = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys, index)


def _random_bits(keys: jax.Array, attempt: jax.Array | int) -> jax.Array:
    """u32[B], fresh ones for each attempt at a draw."""

    def bits(key):
        return jax.random.bits(jax.random.fold_in(key, attempt), (), jnp.uint32)

    return jax.vmap(bits)(keys)


def _draw_nucleus(
    weights: jax.Array, share: jax.Array, keys: jax.Array, *, axis: Axis = WHOLE
) -> jax.Array:
    """Draw from the nucleus: the tokens than which the better ones weigh less than share i32[B].

    By rejection, not by its bounds: draw; if the better tokens weigh less than the share, the token
    is in the nucleus; if not, neither are those up to it: draw again among the better ones. What is
    accepted is distributed as the weights within the nucleus. Two or three attempts settle a batch,
    where bisecting the cut took up to 20 passes over the weights (8 ms at [32, 49152] on CPU,
    2026-11). The best token is always accepted, so this ends. (The idea is from FlashInfer's
    sorting-free sampling kernels.)
    """

    def attempt(state):
        number, token, beyond, is_open = state
        left = jnp.where(weights > beyond[:, None], weights, 0)
        drawn = _draw(left, _random_bits(keys, number), axis)
        weight = axis.pick(weights, drawn[:, None])
        better = axis.sum(jnp.sum(jnp.where(weights > weight, weights, 0), -1))
        token = jnp.where(is_open, drawn, token)
        is_open &= better >= share
        return number + 1, token, jnp.where(is_open, weight[:, 0], beyond), is_open

    none = jnp.zeros(share.shape, jnp.int32)
    state = 0, none, none, jnp.ones(share.shape, bool)
    return jax.lax.while_loop(lambda state: jnp.any(state[3]), attempt, state)[1]


def _draw(weights: jax.Array, bits: jax.Array, axis: Axis = WHOLE) -> jax.Array:
    """The token i32[B] where the running sum of weights i32[B, V] passes bits / 2**32 of the total.

    Two levels, so that no scan runs over V: first the block, then the place inside it. All
    integers: the target is below the total, so the search ends on a token of positive weight
    whatever the bits.
    """
    blocks = _blocks(weights, _BLOCK, 0)
    upto = jnp.cumsum(jnp.sum(blocks, -1), -1)
    before, total = axis.running(upto[:, -1])
    target = _high_product(bits, total.astype(jnp.uint32)).astype(jnp.int32) - before
    here = (target >= 0) & (target < upto[:, -1])
    block = jnp.sum((upto <= target[:, None]).astype(jnp.int32), -1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    rest = target - jnp.take_along_axis(upto, block[:, None], 1)[:, 0] + jnp.sum(inside, -1)
    place = jnp.sum((jnp.cumsum(inside, -1) <= rest[:, None]).astype(jnp.int32), -1)
    return axis.chosen(axis.whole(block * _BLOCK + place, weights.shape[-1]), here)


def _high_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """floor(a * b / 2**32) of u32 arrays, by 16-bit halves (64-bit integers are off by default)."""
    a_high, a_low, b_high, b_low = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    cross, other = a_high * b_low, a_low * b_high
    carry = ((a_low * b_low) >> 16) + (cross & 0xFFFF) + (other & 0xFFFF)
    return a_high * b_high + (cross >> 16) + (other >> 16) + (carry >> 16)
