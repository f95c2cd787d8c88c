"""What calibration gathers about the inputs of a weight, token by token, in bounded memory.

`measure` looks at one batch of inputs inside a traced program, `merge` joins two looks, and
`act_range` turns them into the range of static activations. Who runs the model: `calibrate.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp

KINDS = ("hessian", "squares", "largest", "sizes", "histogram")
RANGES = ("absmax", "percentile", "mse")
_LOWEST, _PER_OCTAVE, _BINS = -24, 32, 48 * 32  # of the histogram of log2 of magnitudes
Statistics = dict[str, jax.Array]


def zeros(kinds: Iterable[str], inputs: int, experts: int = 0) -> Statistics:
    """Before any token: "count" and the asked kinds for a weight of I inputs (of each expert).

    count: tokens `[]`. hessian: sum of x x^T `[I, I]`. squares: sum of x^2 `[I]`. sizes: sum of |x|
    `[I]`. largest: maximum of |x| `[I]`. histogram: of all |x|, float32 `[bins]`, logarithmic. With
    experts all but the last, each with a leading `[E]`.
    """
    lead = (experts,) if experts else ()
    shapes = dict.fromkeys(KINDS, (*lead, inputs))
    shapes |= {"hessian": (*lead, inputs, inputs), "histogram": (_BINS,)}
    wanted = {kind: shapes[kind] for kind in kinds} | {"count": lead}
    return {kind: jnp.zeros(shape, jnp.float32) for kind, shape in wanted.items()}


def measure(x: jax.Array, kinds: Iterable[str], group_sizes: jax.Array | None) -> Statistics:
    """The statistics of inputs `x [M, I]`; by group of consecutive rows where these have sizes."""
    x = x.astype(jnp.float32)
    if group_sizes is None:
        return {kind: _MEASURES[kind](x) for kind in (*kinds, "count")}
    last = jnp.cumsum(group_sizes)
    expert = jnp.searchsorted(last, jnp.arange(x.shape[0]), side="right")

    def of_group(group):
        own = (expert == group).astype(jnp.float32)
        rows = x * own[:, None]
        found = {kind: _MEASURES[kind](rows) for kind in kinds}
        return found | {"count": jnp.sum(own)}

    return jax.lax.map(of_group, jnp.arange(group_sizes.shape[0]))


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Of the tokens of both."""
    return {
        kind: jnp.maximum(a[kind], b[kind]) if kind == "largest" else a[kind] + b[kind]
        for kind in a
    }


def mean_hessian(statistics: Statistics) -> jax.Array:
    """Mean of x x^T, `[I, I]` or `[E, I, I]`; 0 where no token came."""
    count = jnp.maximum(statistics["count"], 1.0)
    return statistics["hessian"] / count[..., None, None]


def act_range(statistics: Statistics, rule: str, percentile: float) -> jax.Array:
    """The largest magnitude `[]` that int8 activations shall hold; larger ones saturate.

    "absmax" takes the largest that came, "percentile" the magnitude that so many percent of all
    don't exceed, and "mse" the one with the least squared error of rounding and saturating, from a
    histogram (bins 2 % wide) under the assumption that values are even between two steps.
    """
    largest = jnp.maximum(jnp.max(statistics["largest"]), 1e-30)
    if rule == "absmax":
        return largest
    counts = statistics["histogram"]
    if rule == "percentile":
        below = jnp.cumsum(counts)  # float32: its last is not quite the sum
        share = below / below[-1]
        return jnp.minimum(_magnitudes(1.0)[jnp.argmax(share >= percentile / 100.0)], largest)
    magnitude = _magnitudes(0.5)
    candidates = largest * 2.0 ** (-jnp.arange(64) / 8)

    def error(limit):
        step = limit / 127.0
        rounding = jnp.minimum(magnitude**2, step**2 / 12)
        return jnp.sum(counts * jnp.where(magnitude <= limit, rounding, (magnitude - limit) ** 2))

    return candidates[jnp.argmin(jax.lax.map(error, candidates))]


def _magnitudes(at: float) -> jax.Array:
    """Of the bins `[bins]`: their lower ends (0), middles (0.5) or upper ends (1)."""
    return 2.0 ** (_LOWEST + (jnp.arange(_BINS) + at) / _PER_OCTAVE)


def _histogram(x):
    place = (jnp.log2(jnp.maximum(jnp.abs(x), 2.0**_LOWEST)) - _LOWEST) * _PER_OCTAVE
    place = jnp.clip(place.astype(jnp.int32), 0, _BINS - 1).reshape(-1)
    return jnp.zeros(_BINS, jnp.float32).at[place].add(1.0)


_MEASURES = {
    "hessian": lambda x: jnp.matmul(x.T, x, precision="highest"),
    "squares": lambda x: jnp.sum(x * x, axis=0),
    "largest": lambda x: jnp.max(jnp.abs(x), axis=0),
    "sizes": lambda x: jnp.sum(jnp.abs(x), axis=0),
    "histogram": _histogram,
    "count": lambda x: jnp.asarray(x.shape[0], jnp.float32),
}
