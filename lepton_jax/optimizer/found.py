"""What a search found: each candidate that was run, and the best."""

import dataclasses
from collections.abc import Mapping

from lepton_jax.optimizer.costs import Costs
from lepton_jax.optimizer.space import Candidate
from lepton_jax.optimizer.trial import Trial

# What an effect says, by objective: so many times as ...
GAINS = {
    "throughput": "fast",
    "latency": "fast to a request's last token (95th percentile)",
    "cost": "cheap in seconds x devices",
}
_COMPILING = ("compile_seconds", "programs")


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate that was run. `predicted` seconds are those from just before its trial, `score`
    is what the objective makes small, `fits` whether the memory allows it to win.
    """

    candidate: Candidate
    predicted: float
    trial: Trial
    costs: Costs
    score: float
    fits: bool

    @property
    def error(self) -> float:
        """Of the prediction, in shares of what was measured."""
        return self.predicted / self.trial.seconds - 1

    def again(self, trial: Trial, *, costs: Costs, score: float) -> "Tried":
        """With a later trial of it, to whose compiling that of the first is added."""
        both = {n: getattr(self.trial, n) + getattr(trial, n) for n in _COMPILING}
        trial = dataclasses.replace(trial, **both)
        return dataclasses.replace(self, trial=trial, costs=costs, score=score)


@dataclasses.dataclass(frozen=True)
class Found:
    """A search's result.

    Attributes:
      best: the winner.
      tried: all trials in their order; the first is the config as it was.
      considered: candidates in the space; `too_large` of them don't fit into memory.
      unpredicted: why nothing could be said of others, with how many these are.
      too_coarse: precisions, in words, that diverge more than allowed, with their KL.
      kl: of the winner's precision; None where nothing was measured.
      objective: what was made small.
    """

    best: Tried
    tried: tuple[Tried, ...]
    considered: int
    too_large: int
    unpredicted: Mapping[str, int]
    too_coarse: dict[str, float]
    kl: float | None
    objective: str

    @property
    def effect(self) -> float:
        """T0/T1: the score before over the score after, so that a gain is above 1; scores are
        times, but where cost is what counts.
        """
        return self.tried[0].score / self.best.score

    @property
    def compiled(self) -> tuple[int, float]:
        """Programs of all trials, and the seconds that compiling them took."""
        trials = [one.trial for one in self.tried]
        return sum(t.programs for t in trials), sum(t.compile_seconds for t in trials)
