"""What a beat does: which prompts to prefill, which rows to decode and for how many steps. Pure Python, no jax.

The device runs programs in the order of dispatch, so the scheduler may plan on what is dispatched but not yet read:
a row whose last chunk is in a plan decodes in the same plan; a page is shareable as soon as the chunk that fills it
is planned; a row that is sure to end in a block gives slot and pages up when the block is planned.
A row's end by a stop token is known one beat late. Read next: `request.py` (the data), `pages.py` (the memory).
"""

import dataclasses
import heapq
from collections import deque

from lepton_jax.engine.pages import PagePool
from lepton_jax.engine.request import (
    FINISH_REASONS,
    BlockResult,
    Chunk,
    Entry,
    Plan,
    Request,
    Row,
    StepOutput,
)


@dataclasses.dataclass
class Counters:
    """Since the scheduler was made."""

    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0


class Scheduler:
    """Continuous batching over a fixed number of slots and pages.

    `decode_block` and `prefill_chunk` may be set between beats, up to the values it was made with.
    """

    def __init__(
        self,
        *,
        rows: int,
        page_size: int,
        num_pages: int,
        prefill_chunk: int,
        decode_block: int,
        max_len: int,
        q_tile: int = 1,
        prefix_cache: bool = True,
    ):
        self.decode_block, self.prefill_chunk = decode_block, prefill_chunk
        self.counters = Counters()
        self._max_len, self._tile, self._prefix_cache = max_len, q_tile, prefix_cache
        self._pool = PagePool(num_pages, page_size)
        self._slots = list(range(rows))
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []  # rows with a slot, oldest first
        self._rows: dict[str, Row] = {}  # all that are not finished
        self._unread = 0  # plans scheduled but not committed
        self._starved = False  # a waiting row found too few pages in this beat

    @property
    def has_work(self) -> bool:
        """Whether some request is not finished."""
        return bool(self._rows)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError, with the numbers, on one that can never be served."""
        count, pool = len(request.prompt_ids), self._pool
        if request.id in self._rows:
            raise ValueError(f"request id {request.id!r} is already running: ids must differ")
        if not count:
            raise ValueError("the prompt has no tokens: want at least one")
        if count >= self._max_len:
            raise ValueError(
                f"the prompt has {count} tokens, but engine.max_len={self._max_len} leaves room for "
                f"{self._max_len - 1}: shorten it or raise engine.max_len"
            )
        limit = min(request.params.max_tokens, self._max_len - count)
        pages = -(-(count + limit - 1) // pool.page_size)
        if pages > pool.num_pages - 1:
            raise ValueError(
                f"prompt and outputs need {pages} pages of {pool.page_size} tokens, but there are "
                f"{pool.num_pages - 1}: raise engine.num_pages or lower max_tokens"
            )
        self._rows[request.id] = row = Row(request, limit)
        self._waiting.append(row)
        self.counters.prompt_tokens += count

    def abort(self, request_id: str) -> None:
        """Drops a request; unknown and finished ids are ignored, because their end may just not be read yet."""
        row = self._rows.get(request_id)
        if row is not None:
            if row.slot is None and row in self._waiting:
                self._waiting.remove(row)
            self._finish(row)

    def schedule(self) -> Plan | None:
        """The next beat, or None where nothing can be planned before the plan in flight is committed."""
        chunks = self._prefill()
        more_to_admit = chunks and self._waiting and self._slots and not self._starved
        rows, steps = ((), 0) if more_to_admit else self._decode()
        if not chunks and not rows:
            return None
        self._unread += 1
        return Plan(tuple(chunks), rows, steps)

    def commit(self, plan: Plan, result: BlockResult | None) -> list[StepOutput]:
        """Takes in what a plan produced; what was planned for rows that have ended meanwhile is dropped."""
        self._unread -= 1
        outputs = []
        for line, entry in enumerate(plan.rows):
            if not entry.row.finished:
                outputs.append(self._take(entry.row, result, line))
        return [output for output in outputs if output.token_ids or output.finish_reason]

    # Prefill

    def _prefill(self) -> list[Chunk]:
        """Chunks of rows that are being prefilled, then of waiting rows while there is room."""
        self._starved = False
        budget, chunks = self.prefill_chunk, []
        for row in self._running:
            if not row.ready and budget >= self._tile:
                chunks.append(self._chunk(row, budget))
                budget -= self._padded(chunks[-1])
        while self._waiting and self._slots and budget >= self._tile:
            row = self._waiting[0]
            if not self._admit(row):
                self._starved = True
                break
            self._waiting.popleft()
            chunks.append(self._chunk(row, budget))
            budget -= self._padded(chunks[-1])
        return chunks

    def _padded(self, chunk: Chunk) -> int:
        return -(-len(chunk.tokens) // self._tile) * self._tile

    def _admit(self, row: Row) -> bool:
        """Gives a waiting row a slot and the pages of its known tokens; False where there aren't enough.

        One page is kept back for each running row, which will soon need it.
        """
        tokens, pool = row.tokens, self._pool
        row.keys = pool.keys(tokens, row.keys)
        shared = pool.match(row.keys[: (len(tokens) - 1) // pool.page_size]) if self._shares(row) else []
        needed = -(-len(tokens) // pool.page_size) - len(shared)
        if needed + len(self._running) > pool.available:
            pool.release(shared)
            return False
        row.pages = shared + pool.allocate(needed)
        row.computed = len(shared) * pool.page_size
        row.slot = heapq.heappop(self._slots)
        self._running.append(row)
        self.counters.prefix_hit_tokens += row.computed
        return True

    def _shares(self, row: Row) -> bool:
        """Rows with penalties compute their whole prompt: the device counts its tokens as they pass."""
        p = row.request.params
        penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        return self._prefix_cache and penalties == (1, 0, 0)

    def _chunk(self, row: Row, budget: int) -> Chunk:
        tokens, start = row.tokens, row.computed
        stop = min(len(tokens), start + budget // self._tile * self._tile)
        row.computed = stop
        if stop == len(tokens):
            row.bound = len(row.outputs) + 1
            row.entering = True
        if self._prefix_cache:
            for page, key in zip(row.pages, row.keys[: stop // self._pool.page_size], strict=False):
                self._pool.register(page, key)
        return Chunk(
            row, row.slot, tuple(row.pages), start, tuple(tokens[start:stop]), stop == len(tokens)
        )

    # Decode

    def _decode(self) -> tuple[tuple[Entry, ...], int]:
        """The ready rows and the steps of their block; rows that are sure to end in it leave."""
        while ready := [row for row in self._running if row.ready]:
            steps = min(self.decode_block, max(row.limit - row.bound for row in ready))
            bounds = [min(row.limit, row.bound + steps) for row in ready]
            needs = [self._pages_short(*pair) for pair in zip(ready, bounds, strict=True)]
            if sum(needs) <= self._pool.available:
                break
            if self._unread:
                return (), 0
            self._preempt(self._running[-1])
        else:
            return (), 0
        entries = []
        for row, bound, need in zip(ready, bounds, needs, strict=True):
            row.pages += self._pool.allocate(need)
            row.computed += bound - row.bound
            row.bound = bound
            entries.append(Entry(row, row.slot, tuple(row.pages)))
        for row in ready:
            if row.bound >= row.limit:
                self._release(row)
        return tuple(entries), steps

    def _pages_short(self, row: Row, bound: int) -> int:
        """Pages to add so that all but the last of `bound` outputs can be cached."""
        cached = len(row.request.prompt_ids) + bound - 1
        return max(0, -(-cached // self._pool.page_size) - len(row.pages))

    def _preempt(self, row: Row) -> None:
        """Sends a row back to the front of the queue; its tokens so far will be prefilled again."""
        if self._prefix_cache:
            row.keys = self._pool.keys(row.tokens, row.keys)
            full = row.computed // self._pool.page_size
            for page, key in zip(row.pages, row.keys[:full], strict=False):
                self._pool.register(page, key)
        self._release(row)
        row.bound, row.computed, row.entering = 0, 0, False
        self._waiting.appendleft(row)
        self.counters.preemptions += 1

    # Endings

    def _take(self, row: Row, result: BlockResult, line: int) -> StepOutput:
        first = 0 if row.entering else 1
        places = range(first, 1 + int(result.count[line]))
        ids = [int(result.tokens[line, place]) for place in places]
        reason = FINISH_REASONS.get(int(result.finish[line]))
        wanted = row.request.params.logprobs
        logprobs = None if wanted is None else _logprobs(result, line, places, wanted)
        if ids and ids[-1] < 0:  # the sampler's mark of a row without finite logits
            ids.pop()
            logprobs = logprobs and logprobs[:-1]
            reason = "error"
        row.entering = False
        row.outputs += ids
        self.counters.generated_tokens += len(ids)
        if reason:
            self._finish(row)
        return StepOutput(row.request.id, ids, logprobs, reason)

    def _finish(self, row: Row) -> None:
        row.finished = True
        self._release(row)
        self._rows.pop(row.request.id, None)

    def _release(self, row: Row) -> None:
        """Takes slot and pages back; what is already dispatched for the row runs before they are used again."""
        if row.slot is None:
            return
        self._pool.release(row.pages)
        heapq.heappush(self._slots, row.slot)
        row.pages, row.slot = [], None
        self._running.remove(row)


def _logprobs(
    result: BlockResult, line: int, places: range, wanted: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    return [
        (
            float(result.logprob[line, place]),
            [
                (int(i), float(p))
                for i, p in zip(
                    result.top_ids[line, place, :wanted],
                    result.top_logprobs[line, place, :wanted],
                    strict=True,
                )
            ],
        )
        for place in places
    ]
