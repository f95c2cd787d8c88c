"""A device of plain Python for the scheduler: it runs plans on pages whose cells hold tokens.

The next token is a hash of all the tokens that it finds in the row's pages, so one wrong page, slot
or order of programs gives tokens that `expected_tokens`, which knows no pages, doesn't give. The
`FakeEngine` is the engine's loop: a plan is run before the result of the one before is committed.
In a speculative block a row gains as many tokens a step as a hash says, and what it rejects is
written behind them.
"""

import dataclasses
import zlib

import numpy as np

from lepton_jax.config import SamplingParams
from lepton_jax.engine.request import BlockResult, Chunk, Entry, Plan, Request
from lepton_jax.engine.rungs import Sizes
from lepton_jax.engine.scheduler import Scheduler

STOP = 0
RUNNING, STOPPED, LENGTH = 0, 1, 2
_TOPS = 2  # alternatives that the device reports


def request(name: str, prompt, vocab: int = 50, **params) -> Request:
    """A request that ends at token 0; `vocab` is the seed: tokens are below it."""
    params = SamplingParams(**{"stop_token_ids": (STOP,), **params})
    return Request(name, tuple(prompt), params, seed=vocab)


def next_token(tokens: list[int], index: int, vocab: int) -> int:
    return zlib.crc32(repr((tokens, index)).encode()) % vocab


def expected_tokens(r: Request, max_len: int) -> tuple[list[int], str]:
    """The outputs of a request that has a machine to itself, and why they end."""
    outputs: list[int] = []
    limit = min(r.params.max_tokens, max_len - len(r.prompt_ids))
    while len(outputs) < limit:
        outputs.append(next_token([*r.prompt_ids, *outputs], len(outputs), r.seed))
        if outputs[-1] in r.params.stop_token_ids:
            return outputs, "stop"
    return outputs, "length"


@dataclasses.dataclass
class Line:
    """State of a slot: the last token, tokens cached before it, outputs so far, finish code."""

    token: int
    length: int
    produced: int
    finish: int


class FakeDevice:
    def __init__(self, *, page_size: int, tile: int = 1):
        self.page_size, self.tile = page_size, tile
        # (bank, page, offset): (place, token)
        self.cells: dict[tuple[int, int, int], tuple[int, int]] = {}
        self.lines: dict[int, Line] = {}
        self.plans: list[Plan] = []

    def run(self, plan: Plan) -> tuple[BlockResult | None, None, BlockResult | None]:
        """What `Runner.read` gives."""
        self.plans.append(plan)
        self._prefill(plan.chunks)
        sampled = self._sampled(plan.chunks) if plan.chunks else None
        return self._decode(plan) if plan.rows else None, None, sampled

    def _sampled(self, chunks: tuple[Chunk, ...]) -> BlockResult:
        """A line for each chunk; of one that isn't final it says nothing that may be used."""
        lines = [self.lines[chunk.slot] if chunk.final else None for chunk in chunks]
        tokens = np.array([[line.token if line else -7] for line in lines], np.int32)
        finish = [line.finish if line else STOPPED for line in lines]
        return _result(tokens, count=[0] * len(lines), finish=finish)

    def _prefill(self, chunks: tuple[Chunk, ...]) -> None:
        assert len({chunk.slot for chunk in chunks}) == len(chunks)
        writers: dict[tuple[int, int], Chunk] = {}
        for chunk in chunks:
            for place, token in enumerate(chunk.tokens, chunk.start):
                page = self._write(chunk, place, token)
                assert writers.setdefault(page, chunk) is chunk, f"two chunks write page {page}"
        for chunk in chunks:
            if chunk.final:
                produced = len(chunk.row.outputs)
                length = chunk.start + len(chunk.tokens)
                line = self.lines[chunk.slot] = Line(-1, length, produced, RUNNING)
                self._sample(line, chunk)

    def _decode(self, plan: Plan) -> BlockResult:
        lines = [self.lines[entry.slot] for entry in plan.rows]
        assert len({entry.slot for entry in plan.rows}) == len(lines)
        tokens = np.full((len(lines), 1 + plan.steps * (1 + plan.draft)), -7, np.int32)
        tokens[:, 0] = [line.token for line in lines]
        before = [line.produced for line in lines]
        for _ in range(plan.steps):
            writers: dict[tuple[int, int], int] = {}
            for number, (line, entry) in enumerate(zip(lines, plan.rows, strict=True)):
                if line.finish == RUNNING:
                    new, pages = self._verify(line, entry, plan.draft)
                    place = 1 + line.produced - before[number] - len(new)
                    tokens[number, place : place + len(new)] = new
                    for page in pages:
                        assert writers.setdefault(page, number) == number, f"two write page {page}"
        count = [line.produced - b for line, b in zip(lines, before, strict=True)]
        return _result(tokens, count=count, finish=[line.finish for line in lines])

    def _verify(
        self, line: Line, entry: Entry, draft: int
    ) -> tuple[list[int], set[tuple[int, int]]]:
        """A step of a row: its new tokens and the pages that it wrote."""
        room = min(draft, entry.row.limit - line.produced - 1)
        accepted = min(room, zlib.crc32(repr((line.token, line.length)).encode()) % (1 + draft))
        begin, new, pages = line.length, [], set()
        while line.finish == RUNNING and len(new) <= accepted:
            pages.add(self._write(entry, line.length, line.token))
            line.length += 1
            self._sample(line, entry)
            new.append(line.token)
        for place in range(line.length, begin + 1 + room):
            pages.add(self._write(entry, place, -5))
        return new, pages

    def _write(self, where: Chunk | Entry, place: int, token: int) -> tuple[int, int]:
        """The bank and page that it wrote to."""
        bank, page, offset = self._cell(where, place)
        assert page != 0, "the null page is no row's"
        self.cells[bank, page, offset] = place, token
        return bank, page

    def _cell(self, where: Chunk | Entry, place: int) -> tuple[int, int, int]:
        page = where.pages[place // self.page_size]
        return where.row.bank, page, place % self.page_size

    def _sample(self, line: Line, where: Chunk | Entry) -> None:
        """The next token after those in the pages; `where` is the chunk or entry with the row."""
        row, tokens = where.row, []
        for place in range(line.length):
            cell = self._cell(where, place)
            found, token = self.cells[cell]
            assert found == place, f"cell {cell} holds place {found}, want {place}"
            tokens.append(token)
        line.token = next_token(tokens, line.produced, row.request.seed)
        line.produced += 1
        if line.token in row.request.params.stop_token_ids:
            line.finish = STOPPED
        elif line.produced >= row.limit:
            line.finish = LENGTH


def _result(tokens: np.ndarray, *, count: list[int], finish: list[int]) -> BlockResult:
    """With log-probabilities that follow from the tokens."""
    return BlockResult(
        tokens=tokens,
        count=np.array(count),
        finish=np.array(finish),
        logprob=-tokens.astype(np.float32),
        top_ids=np.stack([tokens + n for n in range(_TOPS)], -1),
        top_logprobs=np.stack([-tokens - float(n) for n in range(_TOPS)], -1),
    )


class FakeEngine:
    """The loop over a scheduler and the fake device, of `Sizes`."""

    def __init__(self, *, q_tile: int = 1, draft: int = 0, prefix_cache: bool = True, **sizes):
        self.max_len, self.tile = sizes["max_len"], q_tile
        self.scheduler = Scheduler(Sizes(**sizes), q_tile=q_tile, prefix_cache=prefix_cache)
        self.scheduler.speculate(draft)
        self.device = FakeDevice(page_size=sizes["page_size"], tile=q_tile)
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self._in_flight: tuple | None = None  # a plan and what it gave

    def add(self, *requests: Request) -> None:
        for r in requests:
            self.scheduler.add(r)
            self.outputs[r.id] = []

    def beat(self) -> Plan | None:
        """One beat; its plan. What the beat before produced is in `outputs` and `reasons`."""
        chunk = self.scheduler.knobs.prefill_chunk
        plan = self.scheduler.schedule()
        if plan:
            padded = sum(-(-len(c.tokens) // self.tile) * self.tile for c in plan.chunks)
            assert padded <= chunk, f"{padded} padded tokens in a program of {chunk}"
            assert all(c.tokens for c in plan.chunks)
        flight = (plan, *self.device.run(plan)) if plan else None
        done, self._in_flight = self._in_flight, flight
        for output in self.scheduler.commit(*done) if done else ():
            assert output.request_id not in self.reasons, "output after the end"
            self.outputs[output.request_id] += output.token_ids
            if output.finish_reason:
                self.reasons[output.request_id] = output.finish_reason
        return plan

    @property
    def has_work(self) -> bool:
        return self._in_flight is not None or self.scheduler.has_work

    def run(self, most: int = 10_000) -> None:
        """Beats until all is done."""
        for _ in range(most):
            if not self.has_work:
                return
            self.beat()
        raise AssertionError(f"not done after {most} beats")
