"""What passes between the parts of the engine: requests, rows, plans, results.

A `Request` is what a caller adds; a `Row` is the host's memory of it while it runs; a `Plan` is
what one beat does; a `BlockResult` is what the device gave back for it; a `StepOutput` is what the
caller gets. Plain data, no jax. Read next: `scheduler.py`, and `scored.py` for requests to score.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lepton_jax.config import SamplingParams
from lepton_jax.engine.scored import Scored, Scoring

FINISH_REASONS = {1: "stop", 2: "length"}  # by the device's finish code; 0 is still running


class Guide(Protocol):
    """What prescribes the ids of one answer (`lepton_jax/text/constraints.py` makes one)."""

    @property
    def done(self) -> bool:
        """Whether nothing may follow."""

    @property
    def error(self) -> str:
        """Why it can't go on; "" as long as it can."""

    def mask(self) -> np.ndarray:
        """The ids that may come next, int32: bit i % 32 of word i // 32."""

    def accept(self, token_id: int, *, force: bool) -> list[int]:
        """Takes the id that came; with `force` the ids that must follow, already taken too."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Token ids to continue, or to score where `scoring` is there.

    `seed` is the one in effect for the row's random draws. A row with a `guide` is prefilled token
    by token: the host must know each before the next can be sampled.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    scoring: Scoring | None = None
    guide: Guide | None = None

    @property
    def first_scored(self) -> int:
        """The first place with targets; the number of tokens where there is none."""
        return len(self.prompt_ids) - len(self.scoring.targets)


@dataclasses.dataclass(eq=False)
class Row:
    """The host's memory of a request.

    Attributes:
      limit: most outputs, from max_tokens and the engine's max_len.
      outputs: ids that came back from the device.
      bound: outputs there can be at most once all that is dispatched has run; 0 until the chunk
        that ends the row's known tokens is dispatched.
      least: as `bound`, but how many there are at least unless a stop token ends them; the same
        without speculation.
      computed: tokens whose keys and values are cached, or will be at most once all dispatched has
        run.
      bank: where its pages are.
      pages: the row's pages in order; `keys` the hashes of those full of known tokens.
      slot: line of the device's row state; None while the row has none.
      entering: its first token is sampled but not read.
      ahead: of each decode block that is dispatched but not read, the steps and the most tokens.
      counted: of a guided row: the known tokens that aren't computed were sampled.
      scored: what came back of a scoring request so far.
      finished: nothing more comes out for it.
    """

    request: Request
    limit: int
    outputs: list[int] = dataclasses.field(default_factory=list)
    bound: int = 0
    least: int = 0
    computed: int = 0
    bank: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)
    slot: int | None = None
    entering: bool = False
    ahead: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    counted: bool = False
    scored: Scored | None = None
    finished: bool = False

    @property
    def tokens(self) -> list[int]:
        """The known tokens: the prompt, then the outputs read so far."""
        return [*self.request.prompt_ids, *self.outputs]

    @property
    def ready(self) -> bool:
        """Whether the row can decode: all its known tokens are computed and the next is sampled."""
        return self.slot is not None and self.bound > 0

    def recount(self) -> None:
        """Sets `least`, `bound` and `computed` of a ready row from what is read and dispatched."""
        known = len(self.outputs) + self.entering
        self.least = min(self.limit, known + sum(steps for steps, _ in self.ahead))
        self.bound = min(self.limit, known + sum(most for _, most in self.ahead))
        self.computed = len(self.request.prompt_ids) + self.bound - 1


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a row's tokens to prefill, from place `start`; `final` samples the token after it.

    `counted`: its tokens were sampled in a prefill, so penalties know them. Slot and pages, which
    are of the row's bank, are copies: the row may give its own up in the beat of its final chunk.
    """

    row: Row
    slot: int
    pages: tuple[int, ...]
    start: int
    tokens: tuple[int, ...]
    final: bool
    counted: bool = False

    @property
    def scored_places(self) -> range:
        """Places of the chunk whose targets are asked (of a scoring request)."""
        stop = self.start + len(self.tokens)
        return range(min(stop, max(self.start, self.row.request.first_scored)), stop)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row in a decode block. Slot and pages are copies: the row may give its own up here.

    `cached`: tokens in its cache before the block, at most.
    """

    row: Row
    slot: int
    pages: tuple[int, ...]
    cached: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One beat: a packed prefill, then a decode block of up to `steps` steps; either may be empty.

    A block of 0 steps only reads the tokens with which its rows enter. With `draft` > 0 a step may
    give a row up to 1 + draft tokens. The chunks are all of requests to continue or, where
    `scoring`, all of requests to score.
    """

    chunks: tuple[Chunk, ...] = ()
    rows: tuple[Entry, ...] = ()
    steps: int = 0
    draft: int = 0

    @property
    def scoring(self) -> bool:
        return bool(self.chunks) and self.chunks[0].row.request.scoring is not None

    @property
    def long_prompt(self) -> bool:
        return is_long_prompt(self.chunks)


def is_long_prompt(chunks: Sequence[Chunk]) -> bool:
    """Whether one prompt, which goes on in the next beat, fills a prefill, alone or beside tokens
    that guides added to outputs.
    """
    added = [chunk.final and chunk.start >= len(chunk.row.request.prompt_ids) for chunk in chunks]
    return added.count(False) == 1 and not chunks[added.index(False)].final


@dataclasses.dataclass(frozen=True)
class Speculated:
    """What became of a speculative block's proposals, int32 `[B]` each.

    Attributes:
      rounds: steps in which the row ran.
      proposed: tokens that were proposed in them.
    """

    rounds: np.ndarray
    proposed: np.ndarray


@dataclasses.dataclass(frozen=True)
class BlockResult:
    """What a decode block gave, a line for each entry of the plan.

    Attributes:
      tokens: int32 `[B, 1 + k]`, place 0 is the token with which the row entered.
      count: int32 `[B]`, how many of the tokens after place 0 are new.
      finish: int32 `[B]`, 0 running, 1 a stop token came, 2 the limit is reached.
      logprob: float32 `[B, 1 + k]` of those tokens; None, like the next two, where no row asks.
      top_ids, top_logprobs: `[B, 1 + k, n]`, the likeliest tokens in their places.
      speculated: of a speculative block, in which k is steps * (1 + draft).
    """

    tokens: np.ndarray
    count: np.ndarray
    finish: np.ndarray
    logprob: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    speculated: Speculated | None = None


class Drafted(NamedTuple):
    """A row's rounds of up to `draft` proposals in a block, and how many of these were accepted."""

    rounds: int
    accepted: int
    draft: int


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """New tokens of a request, or what was asked of one to score.

    Attributes:
      token_ids: the new ids, a stop token included.
      logprobs: for each of them (log-probability, [(id, log-probability) of the likeliest]); None
        where not asked.
      finish_reason: None while it runs, else "stop" (the last id is a stop token), "whole" (the
        row's guide lets nothing follow), "length", "scored", "error" where the model gave no finite
        logits, or "constraint" where the guide couldn't go on.
      scored: of a scoring request that is done.
      restarted: what came before of this request is void: it began anew on another replica.
      drafted: of a speculative block.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[tuple[float, list[tuple[int, float]]]] | None = None
    finish_reason: str | None = None
    scored: Scored | None = None
    restarted: bool = False
    drafted: Drafted | None = None
