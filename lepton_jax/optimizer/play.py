"""A simulated run as a record: its beats, and when in them requests came and went.

Which beats there are doesn't depend on what they cost, so one play tells the seconds of every
compression of the same engine, and its latencies, once `Costs` are known. It also tells which
programs are reached, and which sizes of prefill programs would leave the least padding.
Read next: `simulated_engine.py`, `predict.py`.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lepton_jax.optimizer.costs import Costs
from lepton_jax.optimizer.simulated_engine import SimulatedEngine, SimulatedRow
from lepton_jax.telemetry import BeatStats

_ROUNDED = 16  # tokens: sizes are found on a sample, and others will come


class Tape:
    """A listener that keeps beats."""

    def __init__(self):
        self.beats: list[BeatStats] = []

    def take(self, beat: BeatStats) -> None:
        self.beats.append(beat)

    def forget(self) -> None:
        """What was heard stays."""


@dataclasses.dataclass(frozen=True)
class Play:
    """One engine's run.

    Attributes:
      beats: in their order.
      added: how many of them were over when each request was handed over; `first` and `ended`: when
        its first and its last output were read.
    """

    beats: tuple[BeatStats, ...]
    added: np.ndarray
    first: np.ndarray
    ended: np.ndarray

    @classmethod
    def of(cls, engine: SimulatedEngine, rows: Sequence[SimulatedRow], *, queue: int) -> "Play":
        """Serves the rows, at most `queue` of them handed over and not ended."""
        tape, open_rows = Tape(), 0
        engine.listen(tape)
        added: list[int] = []
        first, ended = np.zeros(len(rows), int), np.zeros(len(rows), int)
        while len(added) < len(rows) or open_rows:
            while len(added) < len(rows) and open_rows < queue:
                engine.add(rows[len(added)])
                added.append(len(tape.beats))
                open_rows += 1
            for output in engine.step():
                place, now = int(output.request_id), len(tape.beats)
                first[place] = first[place] or now
                if output.finish_reason:
                    ended[place], open_rows = now, open_rows - 1
        return cls(tuple(tape.beats), np.array(added, int), first, ended)

    @functools.cached_property
    def _programs(self) -> np.ndarray:
        """steps, rows, view and prefill places of each beat, `[4, beats]`."""
        lines = [(b.steps, b.row_places, b.view, b.prefill_places) for b in self.beats]
        return np.array(lines).reshape(-1, 4).T

    def clock(self, costs: Costs) -> np.ndarray:
        """Seconds at the end of each beat, `[1 + beats]`; the first is 0."""
        steps, rows, view, places = self._programs
        seconds = np.where(steps > 0, costs.decode_seconds(steps, rows, view), 0.0)
        seconds += np.where(places > 0, costs.prefill_seconds(places), 0.0) + costs.gap
        return np.concatenate([[0.0], np.cumsum(seconds)])

    def reached(self) -> tuple[set[int], set[tuple[int, int]]]:
        """Programs: places of prefills, (rows, view) of decode blocks."""
        prefills = {beat.prefill_places for beat in self.beats if beat.prefill_places}
        decodes = {(beat.row_places, beat.view) for beat in self.beats if beat.steps}
        return prefills, decodes


def prefill_sizes(plays: Sequence[Play], *, most: int, count: int) -> tuple[int, ...]:
    """At most `count` sizes of programs up to `most` tokens that leave the prefills of these plays
    the least padding, ascending.

    The best cuts of the sorted sizes into so many groups, each as large as its largest (dynamic
    programming, as for optimal histograms: Jagadish et al., VLDB 1998).
    """
    tokens = (beat.prefill_tokens for play in plays for beat in play.beats if beat.prefill_tokens)
    counts = Counter(min(most, -(-n // _ROUNDED) * _ROUNDED) for n in tokens)
    sizes = sorted(counts)
    below = np.cumsum([0, *(counts[size] for size in sizes)])  # how many are smaller
    best = {0: (0.0, ())}  # sizes covered so far: their places, and the programs for them
    for _ in range(count):
        longer = dict(best)
        for covered, (places, chosen) in best.items():
            for upto in range(covered + 1, len(sizes) + 1):
                top = sizes[upto - 1]
                cost = places + float(below[upto] - below[covered]) * top
                if upto not in longer or cost < longer[upto][0]:
                    longer[upto] = cost, (*chosen, top)
        best = longer
    return best[len(sizes)][1]
