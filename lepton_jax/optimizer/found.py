"""What a search found: each candidate that was run, and the best."""

import dataclasses
from collections.abc import Mapping

from lepton_jax.optimizer.costs import Costs
from lepton_jax.optimizer.space import Candidate
from lepton_jax.optimizer.trial import Trial


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
        seconds = self.trial.compile_seconds + trial.compile_seconds
        trial = dataclasses.replace(trial, compile_seconds=seconds)
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
    """

    best: Tried
    tried: tuple[Tried, ...]
    considered: int
    too_large: int
    unpredicted: Mapping[str, int]
    too_coarse: dict[str, float]
    kl: float | None

    @property
    def effect(self) -> float:
        """T1/T0 as a gain: the time before over the time after."""
        return self.tried[0].trial.seconds / self.best.trial.seconds
