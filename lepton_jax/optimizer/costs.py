"""What an engine's programs cost in seconds, as a linear model: predicted, measured, kept in
profiles.

A decode block pays once for opening and closing, and for each step: reading the weights, computing
its rows, and attending over their view. A prefill program pays once and for each of its places.
`CostMeter` fits the model to beats. Pure Python and numpy; read next: `controller.py`.
"""

import dataclasses
import itertools
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence

import numpy as np

from lepton_jax.config import EngineSection, RunConfig
from lepton_jax.telemetry import BeatStats

# A token that a step verifies costs more than a row: 0.16 to 0.20 of a step of one row, where a row
# costs 0.08 (SmolLM2-135M w8a8 with drafts of 3 and 7, two cores, 2026-11-28).
_TOKEN = 2.0
_LEAST_SHARE = 0.005  # of a step, for a token: on accelerators, that read weights meanwhile
_GUESSED = 3e-4  # weight of a guess beside a measurement: it decides what no measurement does
_GUESSES = list(itertools.product((1, 8), (1, 16, 64), (64, 512)))  # steps, rows, view
_KEPT = 9  # timings of a program; their median is what counts, so that a stray one does not


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds; "place" is a row of a program times a token of its view.

    Attributes:
      block, block_place: of a decode block besides its steps, and for each place.
      step, step_row, step_place: of a step, for each row of the program, for each place.
      program, program_token: of a prefill program, and for each token of its size.
      gap: between two beats, while the device has nothing to do.
    """

    block: float
    step: float
    step_row: float
    program: float
    program_token: float
    block_place: float = 0.0
    step_place: float = 0.0
    gap: float = 0.0

    def step_seconds(self, rows: int, view: int = 0) -> float:
        """Of one step of a program of `rows` rows."""
        return self.step + rows * (self.step_row + self.step_place * view)

    def decode_seconds(self, steps: int, rows: int, view: int = 0) -> float:
        """Of a block of `steps` steps."""
        return self.block + self.block_place * rows * view + steps * self.step_seconds(rows, view)

    def prefill_seconds(self, places: int) -> float:
        """Of a prefill program of so many tokens."""
        return self.program + self.program_token * places

    def beat_steps(self, rows: int, view: int = 0) -> float:
        """Steps that a beat costs besides its own."""
        fixed = self.gap + self.decode_seconds(0, rows, view)
        return fixed / self.step_seconds(rows, view)

    def verify_seconds(self, rows: int, draft: int) -> float:
        """Of a step that verifies `draft` proposed tokens for each row."""
        return self.step_seconds(rows) + rows * draft * _TOKEN * self.step_row

    @property
    def draft_share(self) -> float:
        """Of one more token of a row in a step, beside a step of one row."""
        step = self.step_seconds(1)
        share = _TOKEN * self.step_row / step if step else 0.0  # steps of tiny models are lost
        return max(_LEAST_SHARE, round(share, 4))

    def scaled(self, factor: float) -> "Costs":
        """All of them times a factor."""
        return Costs(**{name: value * factor for name, value in dataclasses.asdict(self).items()})


# Without measurements, in steps: a beat costs as much as reading the weights, as does computing the
# places of the smallest prefill program (`engine/scheduler.py` reckons so too).
UNIT = Costs(block=1.0, step=1.0, step_row=0.0, program=0.0, program_token=1 / 128)

# On a CPU a prompt's token costs as much as a decoded one, and a beat nearly nothing: about what
# SmolLM2-135M takes in w8a8 on two idle AVX-512 cores, 2026-11-24. Only the proportions count.
ON_CPU = Costs(block=0.002, step=0.01, step_row=0.0008, program=0.005, program_token=0.00055)


def assumed(platform: str) -> Costs:
    """Costs where nothing is measured, by jax's name of the platform."""
    return ON_CPU if platform == "cpu" else UNIT


def settled(config: RunConfig, costs: Costs) -> EngineSection:
    """A config's engine, with what drafts cost where that can't be measured: a job that must be
    the same each time reckons with these costs.
    """
    section = config.engine
    if not config.job.exact or section.draft_cost:
        return section
    return dataclasses.replace(section, draft_cost=costs.draft_share)


class CostMeter:
    """Fits `Costs` to beats. Timings of a program are kept by its shape and steps."""

    def __init__(self):
        self._decodes: dict[tuple[int, int, int], deque] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._prefills: dict[int, deque] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._gaps: deque = deque(maxlen=_KEPT)
        self._fitted: dict[Costs, Costs] = {}  # by prior, until the next beat

    def take(self, beat: BeatStats) -> None:
        """Adds a beat's timings; those of speculative blocks are another program's."""
        if beat.steps and beat.decode_seconds and not beat.draft:
            key = beat.steps, beat.row_places, beat.view
            self._decodes[key].append(beat.decode_seconds)
        if beat.prefill_places and beat.prefill_seconds:
            self._prefills[beat.prefill_places].append(beat.prefill_seconds)
        self._gaps.append(beat.gap_seconds)
        self._fitted.clear()

    def costs(self, prior: Costs) -> Costs:
        """The model nearest to the medians, in shares of each; what nothing measured is scaled
        from `prior`, so that its proportions stay. So do those of what the measured can't part:
        where all steps had as many rows, what these cost and what the step does.
        """
        if prior not in self._fitted:
            self._fitted[prior] = self._nearest(prior)
        return self._fitted[prior]

    def _nearest(self, prior: Costs) -> Costs:
        decodes = {key: statistics.median(times) for key, times in self._decodes.items()}
        prefills = {key: statistics.median(times) for key, times in self._prefills.items()}
        steps = {key[0] for key in decodes}
        if not decodes and not prefills:
            return prior
        scale = _scale(prior, decodes, prefills)
        costs = prior.scaled(scale)
        if len(steps) > 1:
            guesses = {key: costs.decode_seconds(*key) for key in _GUESSES}
            keys, seconds = [*decodes, *guesses], [*decodes.values(), *guesses.values()]
            weights = [1.0] * len(decodes) + [_GUESSED] * len(guesses)
            lines = [[1, r * v, s, s * r, s * r * v] for s, r, v in keys]
            names = ("block", "block_place", "step", "step_row", "step_place")
            fitted = _fit(lines, seconds, weights)
            costs = dataclasses.replace(costs, **dict(zip(names, fitted, strict=True)))
        if len(prefills) > 1:
            lines, seconds = [[1, places] for places in prefills], list(prefills.values())
            fitted = _fit(lines, seconds, [1.0] * len(lines))
            costs = dataclasses.replace(costs, program=fitted[0], program_token=fitted[1])
        gap = statistics.median(self._gaps) if self._gaps else 0.0
        return dataclasses.replace(costs, gap=gap)


def _scale(prior: Costs, decodes: Mapping, prefills: Mapping) -> float:
    """How much longer programs took than `prior` says, in the median."""
    shares = [seconds / prior.decode_seconds(*key) for key, seconds in decodes.items()]
    shares += [seconds / prior.prefill_seconds(places) for places, seconds in prefills.items()]
    return statistics.median(shares)


def _fit(
    lines: Sequence[Sequence[float]], seconds: Sequence[float], weights: Sequence[float]
) -> list[float]:
    """Coefficients, none negative, with the least weighted sum of squared relative errors: the best
    of the plain least squares over all sets of columns, which are few.
    """
    goal = np.array(weights, float)
    matrix = np.array(lines, float) * (goal / np.array(seconds, float))[:, None]
    best, error = np.zeros(matrix.shape[1]), float(np.square(goal).sum())
    columns = [n for n in range(matrix.shape[1]) if matrix[:, n].any()]
    for count in range(1, len(columns) + 1):
        for chosen in map(list, itertools.combinations(columns, count)):
            found, _, rank, _ = np.linalg.lstsq(matrix[:, chosen], goal)
            left = float(np.square(matrix[:, chosen] @ found - goal).sum())
            if rank == count and (found >= 0).all() and left < error - 1e-12:
                best, error = np.zeros(matrix.shape[1]), left
                best[chosen] = found
    return best.tolist()
