"""How many tokens to propose in the next block: the default rules of `Scheduler.draft_policy`.

What lookup would have gained is known without running it: `Shadow` plays its rounds over the tokens
that come out anyway, so speculation is switched on where a row begins to copy and off where it
stops, and nothing is spent on trying. What a draft model gains must be tried, the more rarely the
longer it doesn't pay. What a step costs is measured, or assumed by one number where a job must be
the same each time. Pure Python, no jax. Read next: `scheduler.py`, `lookup.py`.
"""

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lepton_jax.engine.request import Row, StepOutput
from lepton_jax.telemetry import BeatStats

SUFFIX = 3  # tokens, as in lookup.py
ASSUMED_COST = 0.1  # of one more token beside a step of one: CPUs, 0.07 in int8 to 0.13 in float32

_KEPT = 0.95  # of a row's memory with each token: it is about 20 tokens long
_KEPT_BY_ALL = 0.998
_PRIOR = 4.0  # tokens that a new row is taken to have had, like those of the others
_MARGIN = 1.05  # a change must promise so much more
_SAMPLES = 8  # of a program's seconds that are remembered
_HOPED = 0.8  # acceptance of a draft model before it has proposed anything
_ROUNDS = 64  # of all rows, after which older ones count little; `_ROW_ROUNDS` of one
_ROW_ROUNDS, _PRIOR_ROUNDS = 16, 4.0  # rounds that a row is taken to have had like the others'
_PATIENCE, _LONGEST_PATIENCE = 64, 1024  # plain blocks until a draft model is tried again
_TRUSTED = 2  # samples: the first one may hold a compilation


class Promise(NamedTuple):
    """What a step with proposals is expected to give a row, in tokens, and its cost beside a plain
    step, infinite before that is measured.
    """

    tokens_a_step: float
    step_cost: float


class Shadow:
    """One text and the rounds that lookup would have made of its outputs, for each draft length.

    Attributes:
      tokens, rounds: of the outputs, the older ones counting less and less.
    """

    def __init__(self, prompt: Sequence[int], drafts: Sequence[int]):
        self.tokens = 0.0
        self.rounds = dict.fromkeys(drafts, 0.0)
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # where each short run of tokens ended last
        self._open = {draft: (0, 0) for draft in drafts}  # place to copy from, copies left
        for token in prompt:
            self._push(token)

    def add(self, token: int) -> list[int]:
        """Takes in an output; the draft lengths whose round it ended."""
        ended = []
        for draft, (source, left) in self._open.items():
            if left and self._text[source] == token:
                self._open[draft] = (source + 1, left - 1)
            else:
                ended.append(draft)
        self._push(token)
        self.tokens = _KEPT * self.tokens + 1
        for draft in self.rounds:
            self.rounds[draft] = _KEPT * self.rounds[draft] + (draft in ended)
        if ended:
            source = self._match()
            for draft in ended:
                self._open[draft] = (source, draft if source else 0)
        return ended

    def _push(self, token: int) -> None:
        text = self._text
        for count in range(1, min(SUFFIX, len(text)) + 1):
            self._ends[tuple(text[-count:])] = len(text)  # the place behind it
        text.append(token)

    def _match(self) -> int:
        """The place behind the longest suffix's latest occurrence; 0 where there is none."""
        for count in range(min(SUFFIX, len(self._text)), 0, -1):
            place = self._ends.get(tuple(self._text[-count:]))
            if place is not None:
                return place
        return 0


class DraftRule:
    """Chooses the draft length that promises most tokens a second.

    A block's steps give each row as many tokens as its shadow's rounds had, and cost what steps of
    as many rows and that length took. `choose` is a draft policy.

    Attributes:
      chosen: the length that was chosen last, 0: none.
      promise: of the best length besides 0, when it was.
    """

    def __init__(self, drafts: Sequence[int], row_sizes: Sequence[int], *, cost: float = 0.0):
        """
        Args:
          drafts: the lengths that there are programs for, ascending, without 0.
          row_sizes: numbers of rows that there are programs for, ascending.
          cost: of one more token in a step as a share of a step of one; 0: measured.
        """
        self._drafts, self._sizes, self._cost = tuple(drafts), tuple(row_sizes), cost
        self._seconds: Mapping = defaultdict(lambda: deque(maxlen=_SAMPLES))
        self.forget()

    def forget(self) -> None:
        """As new, but for what was measured."""
        self._shadows: dict[str, Shadow] = {}
        self._prompts: dict[str, Sequence[int]] = {}
        self._all_tokens, self._all_rounds = 1.0, dict.fromkeys(self._drafts, 1.0)
        self.chosen, self.promise = 0, Promise(1.0, math.inf)

    def add(self, request_id: str, prompt: Sequence[int]) -> None:
        """A request has come."""
        if self._drafts:
            self._prompts[request_id] = prompt

    def read(self, outputs: Sequence[StepOutput]) -> None:
        """New outputs of the requests; those that end are dropped."""
        for output in outputs:
            if output.request_id in self._prompts:
                self._read(output)
                if output.finish_reason:
                    self.drop(output.request_id)

    def drop(self, request_id: str) -> None:
        """A request has gone."""
        self._prompts.pop(request_id, None)
        self._shadows.pop(request_id, None)

    def take(self, beat: BeatStats) -> None:
        """Hears what a beat's block took (`beats.Listener`)."""
        if beat.steps and not self._cost:
            seconds = beat.decode_seconds / beat.steps
            self._seconds[beat.row_places, beat.draft].append(seconds)

    def choose(self, running: Sequence[Row], most: int) -> int:
        """The draft length of the next block, one of `drafts` up to `most` or 0."""
        lengths, rows = [0, *(draft for draft in self._drafts if draft <= most)], len(running)
        costs = {draft: self._step_cost(rows, draft) for draft in lengths}
        tokens = {
            draft: sum(self.tokens_a_step(row.request.id, draft) for row in running)
            for draft in lengths
        }
        rates = {draft: tokens[draft] / costs[draft] for draft in lengths}
        best = max(rates, key=rates.get)
        if rates[best] > _MARGIN * rates.get(self.chosen, 0.0):
            self.chosen = best
        if drafts := lengths[1:]:
            tried = max(drafts, key=rates.get)
            self.promise = Promise(tokens[tried] / rows, costs[tried] / costs[0])
        return self.chosen

    def tokens_a_step(self, request_id: str, draft: int) -> float:
        """What a row is expected to gain by a step, 1 to 1 + draft."""
        if not draft:
            return 1.0
        shadow = self._shadows.get(request_id)
        tokens, rounds = (shadow.tokens, shadow.rounds[draft]) if shadow else (0.0, 0.0)
        share = self._all_rounds[draft] / self._all_tokens
        return min(1.0 + draft, (tokens + _PRIOR) / (rounds + _PRIOR * share))

    def _step_cost(self, rows: int, draft: int) -> float:
        """Seconds, or the time of a step of one row where nothing is measured.

        A program without measurements is taken to cost what one of its size with them did, by the
        assumed cost of a token; the plain one is measured first.
        """
        rows = next((size for size in self._sizes if size >= rows), self._sizes[-1])
        samples = self._seconds[rows, draft]
        if len(samples) >= _TRUSTED:
            return min(samples)
        assumed = self._assumed(rows, draft)
        plain = self._seconds[rows, 0]
        if self._cost:
            return assumed
        if len(plain) < _TRUSTED:
            return float("inf") if draft else 1.0
        return min(plain) * assumed / self._assumed(rows, 0)

    def _assumed(self, rows: int, draft: int) -> float:
        """What a step costs beside one of one row, if each token costs alike."""
        return 1 + (self._cost or ASSUMED_COST) * (rows * (1 + draft) - 1)

    def _read(self, output: StepOutput) -> None:
        shadow = self._shadows.get(output.request_id)
        if shadow is None:
            shadow = Shadow(self._prompts[output.request_id], self._drafts)
            self._shadows[output.request_id] = shadow
        for token in output.token_ids:
            ended = shadow.add(token)
            self._all_tokens = _KEPT_BY_ALL * self._all_tokens + 1
            for draft in self._drafts:
                rounds = _KEPT_BY_ALL * self._all_rounds[draft]
                self._all_rounds[draft] = rounds + (draft in ended)


class DraftModelRule(DraftRule):
    """The rule for proposals of a draft model, by each row's acceptance: that of all rows while it
    is new, its own the more it has had.

    A proposal behind accepted ones is taken to be accepted as often as they were, so that what one
    draft length shows tells of the others.
    """

    def __init__(
        self, drafts: Sequence[int], row_sizes: Sequence[int], *, cost: float = 0.0, share: float
    ):
        """As `DraftRule`; `share` is the draft model's bytes as a share of the model's."""
        self._share = share
        super().__init__(drafts, row_sizes, cost=cost)

    def forget(self) -> None:
        super().forget()
        self._acceptance = _HOPED
        self._rows: dict[str, tuple[float, float]] = {}  # acceptance, and the rounds behind it
        self._plain, self._patience = 0, _PATIENCE

    def take(self, beat: BeatStats) -> None:
        super().take(beat)
        if beat.draft and beat.rounds:
            seen = _acceptance(beat.decode_tokens / beat.rounds - 1, beat.draft)
            weight = min(1.0, beat.rounds / _ROUNDS)
            self._acceptance += weight * (seen - self._acceptance)
            if not self.chosen and self._plain >= self._patience:  # it was a trial
                self._plain, self._patience = 0, min(2 * self._patience, _LONGEST_PATIENCE)
        elif beat.steps:
            self._plain += 1

    def choose(self, running: Sequence[Row], most: int) -> int:
        """As in `DraftRule`; after many plain blocks one tries the shortest draft again."""
        chosen = super().choose(running, most)
        if chosen:
            self._plain, self._patience = 0, _PATIENCE
        elif self._plain >= self._patience and self._drafts and self._drafts[0] <= most:
            return self._drafts[0]
        return chosen

    def drop(self, request_id: str) -> None:
        super().drop(request_id)
        self._rows.pop(request_id, None)

    def tokens_a_step(self, request_id: str, draft: int) -> float:
        own, rounds = self._rows.get(request_id, (0.0, 0.0))
        acceptance = (own * rounds + self._acceptance * _PRIOR_ROUNDS) / (rounds + _PRIOR_ROUNDS)
        return 1.0 + _accepted(acceptance, draft)

    def _read(self, output: StepOutput) -> None:
        """Adds a block's rounds to its row's; older ones count less and less."""
        if output.drafted is None or not output.drafted.rounds:
            return
        rounds, accepted, draft = output.drafted
        own, before = self._rows.get(output.request_id, (0.0, 0.0))
        weight = min(1.0, rounds / min(before + rounds, _ROW_ROUNDS))
        own += weight * (_acceptance(accepted / rounds, draft) - own)
        self._rows[output.request_id] = own, min(before + rounds, _ROW_ROUNDS)

    def _assumed(self, rows: int, draft: int) -> float:
        drafting = (1 + draft) * self._share * super()._assumed(rows, 0) if draft else 0.0
        return super()._assumed(rows, draft) + drafting


def _accepted(acceptance: float, draft: int) -> float:
    """Mean number of accepted tokens of a draft whose tokens are accepted so often each."""
    return sum(acceptance**place for place in range(1, 1 + draft))


def _acceptance(accepted: float, draft: int) -> float:
    """The inverse of `_accepted`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if _accepted(middle, draft) < accepted else (low, middle)
    return low
