"""Candidates of close times run again, in turns: what else the machine does slows all of them
alike, and doesn't choose the winner.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from lepton_jax.config import RunConfig
from lepton_jax.optimizer.costs import Costs
from lepton_jax.optimizer.found import Tried
from lepton_jax.optimizer.play import Play
from lepton_jax.optimizer.predict import Outlook
from lepton_jax.optimizer.sample import SampledRequest
from lepton_jax.optimizer.space import Candidate
from lepton_jax.optimizer.trial import Models, Stand, Trial
from lepton_jax.text.tokenizer import Tokenizer

_MOST = 3
_CLOSE = 1.3  # times the best score: what may part two runs of one candidate on a shared machine


@dataclasses.dataclass(frozen=True)
class Finalist:
    """A candidate that was tried, what it is run with, and what it took then."""

    models: Models
    config: RunConfig
    costs: Costs
    plays: Sequence[Play]
    trial: Trial


def close_ones(
    tried: Sequence[Tried], outlooks: Mapping[Candidate, Outlook], *, room: int
) -> list[Tried]:
    """The best, by score, and those close to it, as far as the bytes of all of them are within
    `room`; three at most.
    """
    close: list[Tried] = []
    for one in sorted(tried, key=lambda one: one.score):
        memory = outlooks[one.candidate].memory
        if one.score > _CLOSE * (close or [one])[0].score or len(close) == _MOST:
            break
        if memory <= room:
            room -= memory
            close.append(one)
    return close


def take_turns(
    finalists: Sequence[Finalist],
    requests: Sequence[SampledRequest],
    *,
    tokenizer: Tokenizer,
    rounds: int,
    progress: Callable[[int], None] = lambda turn: None,
) -> list[Trial]:
    """Serves all requests so many times on the engines of each, which are up together.

    Knobs begin as they did in a finalist's trial. `progress` is called before each turn with its
    number. Returns a trial of each finalist's turns alone.
    """
    with contextlib.ExitStack() as opened:
        stands = [
            opened.enter_context(
                Stand(
                    one.models,
                    one.config,
                    requests,
                    tokenizer=tokenizer,
                    plays=one.plays,
                    costs=one.costs,
                )
            )
            for one in finalists
        ]
        for one, stand in zip(finalists, stands, strict=True):
            stand.begin(one.trial.knobs)
        tapes, runs = [stand.listen() for stand in stands], [[] for _ in stands]
        for turn in range(rounds * len(stands)):
            progress(turn)
            place = turn % len(stands)
            runs[place].append(stands[place].run())
        return [stand.trial(*heard) for stand, *heard in zip(stands, runs, tapes, strict=True)]
