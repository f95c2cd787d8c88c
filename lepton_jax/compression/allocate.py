"""Which scheme each weight gets, so that the whole loses least within a budget.

    chosen = allocate(sensitivity.kl, sensitivity.bytes, most_bytes=budget)
    rules = rules_of(sensitivity.paths, [schemes[i] for i in chosen])

Losses of single weights are taken to add up, which holds while they are small. The choice is the
multiple-choice knapsack problem, solved exactly up to the unit that bytes are counted in (Sinha &
Zoltners, "The Multiple-Choice Knapsack Problem", 1979). Where losses come from: `sensitivity.py`.
"""

import re
from collections.abc import Sequence

import numpy as np

from lepton_jax.compression.rules import Rule
from lepton_jax.compression.scheme import Scheme

_UNITS = 1 << 16  # that the span from the smallest to the largest choice is counted in


def allocate(
    losses: np.ndarray,
    sizes: np.ndarray,
    *,
    most_bytes: float = np.inf,
    most_loss: float = np.inf,
) -> list[int]:
    """For each weight the index of what it becomes: the least sum of losses within `most_bytes`, or
    where `most_loss` is given the least bytes within that.

    Args:
      losses: `[weights, candidates]`, 0 or more.
      sizes: bytes `[weights, candidates]`.

    Raises ValueError where nothing fits, saying what the least is.
    """
    least, lowest = sizes.min(1), losses.min(1).sum()
    if most_bytes < least.sum():
        raise ValueError(
            f"a budget of {most_bytes:.0f} bytes: the smallest that these candidates allow is "
            f"{least.sum()}; raise compression.auto_bytes or add smaller candidates"
        )
    if most_loss < lowest:
        raise ValueError(
            f"a budget of {most_loss:.3g} nats a token: the least that these candidates are "
            f"predicted to lose is {lowest:.3g}; raise compression.auto_kl or add finer candidates"
        )
    extra = sizes - least[:, None]
    span = int(min(extra.max(1).sum(), most_bytes - least.sum()))
    unit = -(-span // _UNITS) or 1
    units = -(-extra // unit)  # rounded up: what fits in units fits in bytes
    count = units.max(1).sum() + 1
    if most_bytes < np.inf:
        count = min(count, int(most_bytes - least.sum()) // unit + 1)
    best, picks = np.zeros(count), []
    for loss, cost in zip(losses, units, strict=True):
        trials = np.full((len(loss), count), np.inf)
        for index, (value, step) in enumerate(zip(loss, cost, strict=True)):
            if step < count:
                trials[index, step:] = best[: count - step] + value
        picks.append(trials.argmin(0))
        best = trials.min(0)
    # Sums in another order may differ in the last bit, so the least loss counts as within reach.
    at = int(np.argmax(best <= max(most_loss, best[-1]))) if most_loss < np.inf else count - 1
    chosen = []
    for pick, cost in zip(reversed(picks), units[::-1], strict=True):
        chosen.append(int(pick[at]))
        at -= int(cost[chosen[-1]])
    return chosen[::-1]


def rules_of(paths: Sequence[str], schemes: Sequence[Scheme]) -> tuple[Rule[Scheme], ...]:
    """Rules that give each path its scheme: one a scheme, with the layers of a kind together."""
    found: dict[Scheme, dict[str, list[str]]] = {}
    for path, scheme in zip(paths, schemes, strict=True):
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", path)
        kinds = found.setdefault(scheme, {})
        if layer:
            kinds.setdefault(layer[2], []).append(layer[1])
        else:
            kinds[path] = []
    return tuple(
        Rule("|".join(_pattern(*kind) for kind in kinds.items()), scheme)
        for scheme, kinds in found.items()
    )


def _pattern(kind: str, layers: Sequence[str]) -> str:
    if not layers:
        return re.escape(kind)
    return rf"layers\.({'|'.join(layers)})\.{re.escape(kind)}"
