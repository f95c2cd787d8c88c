"""What compression changes in a model's predictions, measured on held-out text.

    dense = reference(model, leaves, windows)      # its leaves may be freed afterwards
    quality = compare(dense, compressed_model, compressed_leaves, seed=0)

Each number comes with its 95 % interval, from a bootstrap over the windows (Efron & Tibshirani, "An
Introduction to the Bootstrap", 1993). Both models run as plain decoders, window by window, and
logits exist for a slice of places at a time. Which text, and what the engine adds (greedy answers,
speed), is the caller's business: `lepton_jax/jobs/compress.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.kernels import kv_cache
from lepton_jax.kernels.attention_reference import causal_attend
from lepton_jax.models.build import Model
from lepton_jax.models.runs import LayerOf
from lepton_jax.sharding import Placement

_SLICE = 128  # places whose logits [128, V] are in memory at a time
_DRAWS = 2000  # of the bootstrap
_LIKELIEST = 5
Progress = Callable[[int, int], None]


class Estimate(NamedTuple):
    """A value and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return self._asdict()


@dataclasses.dataclass(frozen=True)
class Reference:
    """What is kept of the dense model: enough for its predictions at every place.

    Attributes:
      model: of the dense model.
      head: the leaf that makes logits.
      windows: int32 `[windows, T]`, token ids.
      hidden: `[windows, T, D]` after the final norm, on the host.
    """

    model: Model
    head: Any
    windows: np.ndarray
    hidden: np.ndarray


@dataclasses.dataclass(frozen=True)
class Quality:
    """Compressed against dense over all places that have a next token.

    Attributes:
      places: how many these are.
      perplexity, dense_perplexity: exp of the mean -log p of the next token.
      perplexity_ratio: of the two; its interval is of the pairs, so narrower than theirs.
      kl: mean KL(dense || compressed), nats a token.
      top1: share of places where both have the same likeliest token.
      top5: mean share of the dense model's five likeliest tokens among the compressed one's five.
    """

    places: int
    perplexity: Estimate
    dense_perplexity: Estimate
    perplexity_ratio: Estimate
    kl: Estimate
    top1: Estimate
    top5: Estimate

    def as_dict(self) -> dict[str, Any]:
        """In JSON types."""
        fields = vars(self).items()
        return {k: v.as_dict() if isinstance(v, Estimate) else v for k, v in fields}


def reference(
    model: Model, leaves: Sequence[Any], windows: np.ndarray, *, progress: Progress | None = None
) -> Reference:
    """Runs the dense model over int32 `windows [windows, T]`. Raises ValueError where it has no
    output head.
    """
    model.config.require_head("the model")
    head = leaves[list(model.specs).index(model.config.head_path)]
    states = _hidden_states(model, leaves, windows, attend=causal_attend, progress=progress)
    hidden = [np.asarray(h) for h in states]
    return Reference(model, head, windows, np.stack(hidden))


def compare(
    dense: Reference,
    model: Model,
    leaves: Sequence[Any],
    *,
    seed: int,
    kv_dtype: Any = None,
    progress: Progress | None = None,
) -> Quality:
    """The compressed `leaves` of `model` against the dense model on its windows.

    `seed` is that of the bootstrap; `kv_dtype` that of a key-value cache which the compressed model
    shall read its keys and values from, None: as they are. Raises ValueError where predictions
    aren't finite.
    """
    sums = _place_sums(dense.model, model)
    head = leaves[list(model.specs).index(model.config.head_path)]
    totals = []  # [windows, 5]
    attend = causal_attend if kv_dtype is None else _cached_attend(kv_dtype)
    states = _hidden_states(model, leaves, dense.windows, attend=attend, progress=progress)
    for ids, theirs, ours in zip(dense.windows, dense.hidden, states, strict=True):
        following, total = np.append(ids[1:], -1).astype(np.int32), 0.0
        for at in range(0, len(ids), _SLICE):
            part = slice(at, at + _SLICE)
            found = sums((dense.head, head), (theirs[part], ours[part]), following[part])
            total = total + np.asarray(found, np.float64)
        totals.append(total)
    places = dense.windows.shape[1] - 1
    means = np.stack(totals) / places
    if not np.all(np.isfinite(means)):
        raise ValueError(
            "the model's predictions are not finite: its weights or the recipe are unusable"
        )
    return _quality(means, places=places * len(means), seed=seed)


def _quality(means: np.ndarray, *, places: int, seed: int) -> Quality:
    """From the means of each window, `[windows, 5]` in the order of `_place_sums`."""
    kl, loss, dense_loss, top1, top5 = means.T

    def of(values: np.ndarray, through: Callable = lambda x: x) -> Estimate:
        return estimate(values, seed=seed, through=through)

    return Quality(
        places=places,
        perplexity=of(loss, np.exp),
        dense_perplexity=of(dense_loss, np.exp),
        perplexity_ratio=of(loss - dense_loss, np.exp),
        kl=of(kl),
        top1=of(top1),
        top5=of(top5),
    )


def estimate(
    values: Sequence[float], *, seed: int, through: Callable[[Any], Any] = lambda x: x
) -> Estimate:
    """The mean of values and its interval; `through` is applied to means (as exp to a loss)."""
    values = np.asarray(values, np.float64)
    drawn = np.random.default_rng(seed).integers(len(values), size=(_DRAWS, len(values)))
    low, high = np.percentile(through(values[drawn].mean(axis=1)), [2.5, 97.5])
    return Estimate(float(through(values.mean())), float(low), float(high))


def common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens that two answers share from their beginning."""
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def _cached_attend(kv_dtype: Any) -> Callable:
    """`causal_attend` of keys and values as a cache of this dtype gives them back."""
    like = kv_cache.planned((1,), ("head_dim",), kv_dtype)

    def attend(q, k, v, cache, **options):
        k, v = (kv_cache.decode(kv_cache.encode(x, like)) for x in (k, v))
        return causal_attend(q, k, v, cache, **options)

    return attend


def _hidden_states(
    model: Model, leaves, windows: np.ndarray, *, attend: Callable, progress: Progress | None
):
    """`[T, D]` of each window of token ids, which starts afresh."""
    looped = model.in_loops(leaves, platform=Placement.holding(leaves, model.heads).first.platform)

    def attend_alone(*operands, layer: LayerOf | None = None, **options):
        return attend(*operands, **options)  # no layer has a cache here

    @jax.jit
    def run(leaves, ids):
        places, caches = jnp.arange(ids.shape[0]), (None,) * len(looped.runs)
        return looped.bind(leaves)(ids, places, caches, attend_alone)[0]

    for done, ids in enumerate(windows, 1):
        yield run(tuple(leaves), jnp.asarray(ids))
        if progress is not None:
            progress(done, len(windows))


def logits_of(model: Model, head, hidden):
    """float32 `[places, V]`; nothing but the head is needed of the weights."""
    path, nothing = model.config.head_path, jnp.zeros(())
    leaves = [head if name == path else nothing for name in model.specs]
    return model.bind(leaves).logits(hidden)


def _largest(x: jax.Array, count: int) -> list[jax.Array]:
    """The `count` largest distinct values of each line of `x [places, V]`, largest first.

    Passes that find a maximum each, because sorting a vocabulary costs a CPU several times all else
    here.
    """
    found = [jnp.max(x, axis=-1)]
    for _ in range(count - 1):
        below = jnp.where(x < found[-1][:, None], x, -jnp.inf)
        found.append(jnp.max(below, axis=-1))
    return found


def _place_sums(dense: Model, model: Model) -> Callable:
    """A program for the sums over a slice of places that have a next token (-1 where none is).

    They are: KL(dense || model), -log p of the next token by the model and by the dense one, equal
    likeliest tokens, and the share of the dense model's likeliest five among the model's.
    """

    @jax.jit
    def sums(heads, hidden, following):
        p = jax.nn.log_softmax(logits_of(dense, heads[0], hidden[0]))
        q = jax.nn.log_softmax(logits_of(model, heads[1], hidden[1]))
        nearest = jnp.maximum(following, 0)[:, None]
        losses = [-jnp.take_along_axis(x, nearest, axis=1)[:, 0] for x in (q, p)]
        divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        ends = [_largest(x, _LIKELIEST) for x in (p, q)]  # [places] each, largest first
        top1, top5 = (
            jnp.sum((p >= ends[0][n - 1][:, None]) & (q >= ends[1][n - 1][:, None]), axis=-1)
            for n in (1, _LIKELIEST)
        )
        top1, top5 = top1 > 0, jnp.minimum(top5, _LIKELIEST) / _LIKELIEST
        known = following >= 0
        return jnp.stack(
            [jnp.sum(jnp.where(known, x, 0)) for x in (divergence, *losses, top1, top5)]
        )

    return sums
