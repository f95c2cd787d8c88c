"""What a beat does: which prompts to prefill, which rows to decode and for how many steps.

The device runs programs in the order of dispatch, so the scheduler may plan on what is dispatched
but not yet read: a row whose last chunk is in a plan decodes in the same plan; a page is shareable
as soon as the chunk that fills it is planned; a row that is sure to end in a block gives slot and
pages up when the block is planned. A row's end by a stop token is known one beat late, and so is
how many tokens a speculative block gave: until then plans hold for the fewest and the most. A
request to score ends with its prefill: it gives slot and pages up when its last chunk is planned.
A guided row never decodes: each token that it gets is prefilled, with those that must follow it,
and gives the next.
Pure Python, no jax. Read next: `request.py` (the data), `pages.py` (the memory).
"""

import dataclasses
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence

from lepton_jax.engine.knobs import Knobs, best_steps, longest_draft
from lepton_jax.engine.pages import PagePool
from lepton_jax.engine.protocol import check_room
from lepton_jax.engine.request import (
    FINISH_REASONS,
    BlockResult,
    Chunk,
    Drafted,
    Entry,
    Plan,
    Request,
    Row,
    StepOutput,
    is_long_prompt,
)
from lepton_jax.engine.rungs import Sizes
from lepton_jax.engine.scored import Scored, ScoreResult

_MOST_BEATS = 64  # of `prefill_beats`
_ORDER_WINDOW = 128  # waiting rows among which `longest_first` looks, and the most that pass one


@dataclasses.dataclass
class Counters:
    """Since the scheduler was made. Padding is the runner's to count: it knows the programs."""

    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    scored_tokens: int = 0
    preemptions: int = 0


@dataclasses.dataclass(frozen=True)
class Load:
    """How full the engine is: rows with a slot and without one, pages that could be given out."""

    running: int
    waiting: int
    free_pages: int
    pages: int


class Scheduler:
    """Continuous batching over a fixed number of slots and pages.

    `schedule` and `commit` alternate; one plan may be in flight (scheduled, not committed), and the
    plans are committed in order. `draft_policy` may be replaced by another function of the rows
    with a slot and the knob `draft`.
    """

    def __init__(self, sizes: Sizes, *, q_tile: int = 1, prefix_cache: bool = True):
        chunk = -(-sizes.prefill_chunk // q_tile) * q_tile
        self.counters = Counters()
        self.draft_policy: Callable[[Sequence[Row], int], int] = longest_draft
        self._knobs = Knobs(sizes.decode_block, chunk, sizes.rows)
        self._most = dataclasses.replace(
            self._knobs,
            admit_together=sizes.rows,
            reserve_pages=sizes.banks * sizes.num_pages,
            beat_cost=math.inf,
            prefill_beats=_MOST_BEATS,
            longest_first=True,
        )
        self._draft = 0  # of the block that is being planned
        self._max_len, self._tile, self._prefix_cache = sizes.max_len, q_tile, prefix_cache
        self._sizes = sizes
        self.reset()

    def reset(self) -> None:
        """As new: no requests, no plans, no cache of prompts. Knobs and counters stay."""
        pages = self._sizes.num_pages, self._sizes.page_size
        self._pools = [PagePool(*pages) for _ in range(self._sizes.banks)]
        self._slots = list(range(self._most.live_rows))
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []  # rows with a slot, oldest first
        self._rows: dict[str, Row] = {}  # all that are not finished
        self._unread = 0  # plans scheduled but not committed
        self._starved = False  # a waiting row found too few pages in this beat
        self._alone = 0  # beats that one prompt filled since the last block
        self._admitting = False  # enough slots were free, and rows have been admitted since
        self._passed = 0  # rows admitted before the one at the head of the queue

    @property
    def knobs(self) -> Knobs:
        return self._knobs

    @knobs.setter
    def knobs(self, knobs: Knobs) -> None:
        least = Knobs(
            decode_block=1,
            prefill_chunk=self._tile,
            live_rows=1,
            draft=0,
            beat_cost=0,
            prefill_beats=0,
        )
        for field in dataclasses.fields(Knobs):
            value, low, high = (getattr(k, field.name) for k in (knobs, least, self._most))
            if not low <= value <= high:
                raise ValueError(f"knob {field.name}={value}: want {low} to {high}")
        self._knobs = knobs

    def turn(self, **changes: float) -> None:
        """Sets some knobs by name."""
        self.knobs = dataclasses.replace(self._knobs, **changes)

    def speculate(self, most: int) -> None:
        """Lets steps verify up to so many proposed tokens a row; the knob is set to it."""
        self._most = dataclasses.replace(self._most, draft=most)
        self._knobs = dataclasses.replace(self._knobs, draft=most)

    @property
    def most(self) -> Knobs:
        """The highest values that knobs may have."""
        return self._most

    @property
    def has_work(self) -> bool:
        """Whether some request is not finished."""
        return bool(self._rows)

    @property
    def load(self) -> Load:
        """Rows and pages as they are now."""
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            free_pages=sum(pool.available for pool in self._pools),
            pages=sum(pool.num_pages - 1 for pool in self._pools),
        )

    @property
    def tokens_left(self) -> int:
        """The most that a row with a slot may still give."""
        return max((row.limit - len(row.outputs) for row in self._running), default=0)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError, with the numbers, on one that can never run."""
        count, pool = len(request.prompt_ids), self._pools[0]
        if request.id in self._rows:
            raise ValueError(f"request id {request.id!r} is already running: ids must differ")
        limit = check_room(
            count,
            None if request.scoring else request.params.max_tokens,
            max_len=self._max_len,
            page_size=pool.page_size,
            num_pages=pool.num_pages,
        )
        self._rows[request.id] = row = Row(request, limit)
        self._waiting.append(row)
        self.counters.prompt_tokens += count

    def abort(self, request_id: str) -> None:
        """Drops a request. Ids not running are ignored: their end may just not be known above."""
        row = self._rows.get(request_id)
        if row is not None:
            if row in self._waiting:
                self._waiting.remove(row)
            self._finish(row)

    def schedule(self) -> Plan | None:
        """The next beat; None where nothing can be planned before what is in flight is committed.

        New rows go first, because a decode step costs nearly the same for few rows as for many:
        while more requests could still be admitted, a beat only prefills. Behind a prompt so long
        that it fills beats alone the ready rows would starve: of these only so many follow another.
        """
        if not self._make_room():
            return None
        chunks = self._prefill()
        for chunk in chunks:  # not sooner: within a program nothing is free for another row
            if chunk.final and chunk.row.request.scoring:
                self._release(chunk.row)
        long_prompt = is_long_prompt(chunks)
        self._alone += long_prompt
        enough = long_prompt and self._alone > self._knobs.prefill_beats
        if chunks and self._may_admit() and not self._starved and not enough:
            rows, steps = (), 0
        else:
            self._alone, (rows, steps) = 0, self._decode()
        if not chunks and not rows:
            return None
        self._unread += 1
        return Plan(tuple(chunks), rows, steps, draft=self._draft if steps else 0)

    def commit(
        self,
        plan: Plan,
        result: BlockResult | None,
        scores: ScoreResult | None = None,
        sampled: BlockResult | None = None,
    ) -> list[StepOutput]:
        """Takes in what a plan produced, less what it produced for rows that ended meanwhile.

        `sampled`: what its prefill gave, a line a chunk. Where it isn't told, rows get their first
        token with their first block.
        """
        self._unread -= 1
        outputs = self._take_scores(plan, scores) if plan.scoring else []
        if sampled is not None:
            outputs += self._take_sampled(plan, sampled)
        live = [(n, entry.row) for n, entry in enumerate(plan.rows) if not entry.row.finished]
        taken = [self._take(row, result, line=line, plan=plan) for line, row in live]
        return outputs + [output for output in taken if output.token_ids or output.finish_reason]

    # Room

    def _make_room(self) -> bool:
        """Preempts the youngest rows of each bank until the others' next blocks have pages.

        False where something in flight must be committed first: it may end rows, and outputs that
        weren't read couldn't be prefilled again. A bank's oldest row alone always fits (see `add`).
        A block is plain before a row is sent away for the pages that a speculative one may need.
        """
        self._draft = self.draft_policy(self._running, self._knobs.draft) if self._running else 0
        if self._crowded():
            self._draft = 0
        while crowded := self._crowded():
            if self._unread:
                return False
            self._preempt(crowded[-1])
        return True

    def _crowded(self) -> list[Row]:
        """The running rows of a bank with too few pages for their next blocks; none: all fit."""
        for bank, pool in enumerate(self._pools):
            if self._growth(bank) > pool.available:
                return [row for row in self._running if row.bank == bank]
        return []

    def _growth(self, bank: int) -> int:
        """Pages that a bank's running rows need besides theirs for a whole next block of each."""
        return sum(self._pages_short(row) for row in self._running if row.bank == bank)

    def _pages_short(self, row: Row, steps: int | None = None) -> int:
        """Pages that a row lacks for a block, by whose end all outputs but the last are cached."""
        steps = self._knobs.decode_block if steps is None else steps
        most = steps * (1 + self._draft)
        outputs = min(row.limit, (row.bound or len(row.outputs) + 1) + most)
        needed = self._pools[0].pages_for(len(row.request.prompt_ids) + max(outputs - 1, 0))
        return max(0, needed - len(row.pages))

    def _preempt(self, row: Row) -> None:
        """Sends a row back to the front of the queue; its tokens will be prefilled again."""
        row.keys = self._pools[0].keys(row.tokens, row.keys)
        self._register(row)
        self._release(row)
        row.bound, row.least, row.computed = 0, 0, 0
        row.scored, row.counted = None, False
        self._waiting.appendleft(row)
        self.counters.preemptions += 1

    def _register(self, row: Row) -> None:
        """Lets later rows share the row's computed pages of known tokens."""
        if self._prefix_cache:
            pool = self._pools[row.bank]
            full = row.keys[: row.computed // pool.page_size]
            for page, key in zip(row.pages, full, strict=False):
                pool.register(page, key)

    # Prefill

    def _prefill(self) -> list[Chunk]:
        """Chunks of rows that are being prefilled, then of waiting rows while there is room."""
        budget, chunks = self._knobs.prefill_chunk // self._tile, []  # in tiles
        self._starved = False
        for row in self._running:
            if not row.ready and budget and _joins(row, chunks):
                self._extend(row, 0)  # of a guided row
                chunks.append(self._chunk(row, budget * self._tile))
                budget -= self._tiles(chunks[-1])
        while budget and self._may_admit():
            index = self._next_waiting()
            row = self._waiting[index]
            if not _joins(row, chunks):
                break
            if not self._admit(row):
                self._starved = True
                break
            del self._waiting[index]
            self._passed = self._passed + 1 if index else 0
            chunks.append(self._chunk(row, budget * self._tile))
            budget -= self._tiles(chunks[-1])
        return chunks

    def _tiles(self, chunk: Chunk) -> int:
        return -(-len(chunk.tokens) // self._tile)

    def _may_admit(self) -> bool:
        """Whether rows wait and slots are free: once enough of them are, until none is."""
        knobs, waiting = self._knobs, len(self._waiting)
        free = knobs.live_rows - len(self._running)
        enough = min(knobs.admit_together, knobs.live_rows, waiting)
        self._admitting = waiting > 0 and free > 0 and (self._admitting or free >= enough)
        return self._admitting

    def _next_waiting(self) -> int:
        """Index of the row to admit next. Preempted rows are first, and a row isn't passed for
        ever.
        """
        passed_enough = self._passed >= _ORDER_WINDOW
        if not self._knobs.longest_first or self._waiting[0].outputs or passed_enough:
            return 0
        limits = [row.limit for row in itertools.islice(self._waiting, _ORDER_WINDOW)]
        return limits.index(max(limits))

    def _admit(self, row: Row) -> bool:
        """Gives a waiting row a slot and the pages of its known tokens in the bank that will have
        most left; False if there are too few.
        """
        row.keys = self._pools[0].keys(row.tokens, row.keys)
        usable = row.keys[: self._shareable(row) // self._pools[0].page_size]
        left = [pool.available + pool.known(usable) for pool in self._pools]
        banks = sorted(range(len(left)), key=left.__getitem__, reverse=True)
        return any(self._admit_to(bank, row, usable) for bank in banks)

    def _admit_to(self, bank: int, row: Row, usable: Sequence[bytes]) -> bool:
        """As `_admit`, to a bank, where pages with the `usable` keys may be shared.

        The pages for the next blocks, its own and those of the running rows, must be left over.
        """
        tokens, pool = row.tokens, self._pools[bank]
        row.bank, row.pages = bank, pool.match(usable)
        hits = len(row.pages)
        reserved = -(-self._knobs.reserve_pages // len(self._pools)) if self._running else 0
        if self._pages_short(row) + self._growth(bank) + reserved > pool.available:
            pool.release(row.pages)
            row.pages = []
            return False
        row.pages += pool.allocate(pool.pages_for(len(tokens)) - hits)
        row.computed = hits * pool.page_size
        row.slot = heapq.heappop(self._slots)
        self._running.append(row)
        self.counters.prefix_hit_tokens += row.computed
        return True

    def _shareable(self, row: Row) -> int:
        """Tokens that others may have computed: not the last, nor any with a result of its own.

        Rows with penalties compute their whole prompt: the device counts the tokens it sees.
        """
        scoring = row.request.scoring
        if not self._prefix_cache or _has_penalties(row):
            return 0
        if scoring is not None and scoring.pool == "mean":
            return 0
        before_last = len(row.tokens) - 1
        return before_last if scoring is None else min(before_last, row.request.first_scored)

    def _chunk(self, row: Row, most: int) -> Chunk:
        """The row's next chunk, of at most so many tokens."""
        tokens, start = row.tokens, row.computed
        row.computed = stop = min(len(tokens), start + most)
        final = stop == len(tokens)
        if final and row.request.scoring is None:
            row.entering = True
            row.recount()
        self._register(row)
        pages = tuple(row.pages)
        known = tuple(tokens[start:stop])
        return Chunk(row, row.slot, pages, start, known, final, counted=row.counted)

    # Decode

    def _decode(self) -> tuple[tuple[Entry, ...], int]:
        """The ready rows and the steps of their block; rows that are sure to end in it leave."""
        ready = [row for row in self._running if row.ready and row.request.guide is None]
        remaining = [row.limit - row.least for row in ready]
        most = self._knobs.decode_block
        steps = min(most, max(remaining, default=0))
        if steps and self._waiting:
            steps = best_steps(remaining, most, self._knobs.beat_cost)
        entries = tuple(self._enter(row, steps) for row in ready)
        for row in ready:  # not sooner: within a block nothing is free for another row
            if row.least == row.limit:
                self._release(row)
        return entries, steps

    def _enter(self, row: Row, steps: int) -> Entry:
        self._extend(row, steps)
        entry = Entry(row, row.slot, tuple(row.pages), cached=row.computed)
        row.ahead.append((steps, steps * (1 + self._draft)))
        row.recount()
        return entry

    def _extend(self, row: Row, steps: int) -> None:
        """Gives a row the pages that it lacks for a block of so many steps."""
        row.pages += self._pools[row.bank].allocate(self._pages_short(row, steps))

    # Endings

    def _take(self, row: Row, result: BlockResult, *, line: int, plan: Plan) -> StepOutput:
        """The row's new tokens from its line of a result."""
        count = int(result.count[line])
        most = plan.steps * (1 + plan.draft)
        ids, logprobs, reason = _read(result, line, row, range(0 if row.entering else 1, 1 + count))
        row.entering = False
        row.outputs += ids
        row.ahead.pop(0)
        row.recount()
        self.counters.generated_tokens += len(ids)
        if reason:
            self._finish(row)
        elif not plan.steps <= count <= most or len(row.outputs) >= row.limit:
            raise RuntimeError(
                f"request {row.request.id!r} runs on after {count} of a block's {plan.steps} steps"
                f" and {len(row.outputs)} of {row.limit} tokens: runner and scheduler disagree"
            )
        return StepOutput(
            row.request.id, ids, logprobs, reason, drafted=_drafted(plan, result, line)
        )

    def _take_sampled(self, plan: Plan, sampled: BlockResult) -> list[StepOutput]:
        """A token of each row whose known tokens ended and that no block of this plan goes on with;
        of a guided one also those that must follow it.
        """
        going_on = {entry.row.request.id for entry in plan.rows}
        outputs = []
        for line, chunk in enumerate(plan.chunks):
            row = chunk.row
            if not chunk.final or row.finished or row.request.id in going_on:
                continue
            guided = row.request.guide is not None
            outputs.append((self._guide if guided else self._begin)(row, sampled, line))
        return outputs

    def _begin(self, row: Row, sampled: BlockResult, line: int) -> StepOutput:
        """Takes a row's first token; its next block may be in flight."""
        ids, logprobs, reason = _read(sampled, line, row, range(1))
        row.entering = False
        row.outputs += ids
        row.recount()
        self.counters.generated_tokens += len(ids)
        if reason:
            self._finish(row)
        return StepOutput(row.request.id, ids, logprobs, reason)

    def _guide(self, row: Row, sampled: BlockResult, line: int) -> StepOutput:
        """Takes a guided row's token; what it must go on with becomes known, to be prefilled."""
        guide = row.request.guide
        ids, logprobs, reason = _read(sampled, line, row, range(1))
        if reason not in ("stop", "error"):
            # What isn't sampled has no log-probability, and penalties haven't counted it.
            forced = guide.accept(ids[0], force=logprobs is None and not _has_penalties(row))
            room = row.limit - len(row.outputs) - 1
            ids += forced[:room]
            if guide.error:
                reason = "constraint"
            elif guide.done and len(forced) <= room:
                reason = "whole"
            elif len(row.outputs) + len(ids) >= row.limit:
                reason = "length"
        row.entering, row.counted = False, True
        row.outputs += ids
        row.bound = row.least = 0
        self.counters.generated_tokens += len(ids)
        if reason:
            self._finish(row)
        return StepOutput(row.request.id, ids, logprobs, reason)

    def _take_scores(self, plan: Plan, result: ScoreResult) -> list[StepOutput]:
        """Adds each chunk's part to its row; the outputs of the rows that are whole."""
        outputs, start = [], 0
        for line, chunk in enumerate(plan.chunks):
            row, places = chunk.row, chunk.scored_places
            lines = range(start, start + len(places))
            start = lines.stop
            if row.finished:
                continue
            scoring = row.request.scoring
            row.scored = row.scored or Scored.empty(scoring)
            if places:
                row.scored.add(result, lines=lines, first=places[0] - row.request.first_scored)
            if scoring.pool:
                row.scored.add_pooled(result.pooled[line])
            self.counters.scored_tokens += len(places)
            if chunk.final:
                self._finish(row)
                finite = row.scored.is_finite(scoring)
                end = ("scored", row.scored) if finite else ("error", None)
                outputs.append(StepOutput(row.request.id, [], None, *end))
        return outputs

    def _finish(self, row: Row) -> None:
        row.finished = True
        self._release(row)
        self._rows.pop(row.request.id)

    def _release(self, row: Row) -> None:
        """Takes slot and pages back: all dispatched for the row runs before they are used again."""
        if row.slot is None:
            return
        self._pools[row.bank].release(row.pages)
        heapq.heappush(self._slots, row.slot)
        row.pages, row.slot = [], None
        self._running.remove(row)


def _read(
    result: BlockResult, line: int, row: Row, places: range
) -> tuple[list[int], list[tuple[float, list[tuple[int, float]]]] | None, str | None]:
    """(ids, their log-probabilities where asked, the finish reason) in some places of a line."""
    ids, wanted = [int(result.tokens[line, place]) for place in places], row.request.params.logprobs
    reason, logprobs = FINISH_REASONS.get(int(result.finish[line])), None
    if wanted is not None:
        tops = result.top_ids[line, :, :wanted], result.top_logprobs[line, :, :wanted]
        logprobs = [
            (
                float(result.logprob[line, place]),
                list(zip(*(values[place].tolist() for values in tops), strict=True)),
            )
            for place in places
        ]
    if ids and ids[-1] < 0:  # the sampler's mark of a row without finite logits
        return ids[:-1], logprobs and logprobs[:-1], "error"
    return ids, logprobs, reason


def _drafted(plan: Plan, result: BlockResult, line: int) -> Drafted | None:
    if result.speculated is None:
        return None
    rounds = int(result.speculated.rounds[line])
    return Drafted(rounds, int(result.count[line]) - rounds, plan.draft)


def _has_penalties(row: Row) -> bool:
    p = row.request.params
    return (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1, 0, 0)


def _joins(row: Row, chunks: Sequence[Chunk]) -> bool:
    """Whether a row may be prefilled in one program with these chunks."""
    return not chunks or (row.request.scoring is None) == (chunks[0].row.request.scoring is None)
