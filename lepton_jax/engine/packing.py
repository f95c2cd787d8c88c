"""One int32 buffer per program and direction: what the host sends to a step and what it reads back.

A `Layout` names the pieces of a flat buffer once; the host writes and reads them as numpy views,
the device splits the same buffer inside jit. Floats travel as their bits. So a block costs one copy
to the device and one from it. The shapes of programs (`PrefillShape`, `DecodeShape`) are here too,
because they fix the layouts.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.engine.request import BlockResult, Chunk, Plan, Row, Speculated
from lepton_jax.engine.row_params import SampleSpec, pack, width


@dataclasses.dataclass(frozen=True)
class PrefillShape:
    """A prefill program: `tokens` T of at most `rows` R prompts, page tables of `pages` W."""

    tokens: int
    rows: int
    pages: int
    spec: SampleSpec


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """A decode program: `rows` B, up to `steps` steps a block, page tables of `pages` W.

    `view` > 0: the block works on a copy of up to so many cached tokens a row (backends with
    `open_view`). `draft` > 0: a step verifies so many proposed tokens a row beside its last one.
    """

    rows: int
    steps: int
    pages: int
    spec: SampleSpec
    view: int = 0
    draft: int = 0

    @property
    def tail(self) -> int:
        """Places of a row's new tokens in a block."""
        return self.steps * (1 + self.draft)


class Layout:
    """Named int32 arrays, one after the other in a flat buffer."""

    def __init__(self, **shapes: tuple[int, ...]):
        self._shapes = shapes
        self.size = sum(math.prod(shape) for shape in shapes.values())

    def split(self, buffer) -> dict:
        """The pieces of a flat int32 buffer `[size]`: views of a numpy array, slices of a traced
        one.
        """
        pieces, start = {}, 0
        for name, shape in self._shapes.items():
            stop = start + math.prod(shape)
            pieces[name] = buffer[start:stop].reshape(shape)
            start = stop
        return pieces

    def join(self, pieces: dict[str, jax.Array]) -> jax.Array:
        """The flat buffer of traced pieces, whatever order their dict has (jit and loops sort
        dicts).
        """
        return jnp.concatenate([pieces[name].reshape(-1) for name in self._shapes])

    def zeros(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A new host buffer and its views."""
        buffer = np.zeros(self.size, np.int32)
        return buffer, self.split(buffer)


def chunk_pieces(tokens: int, rows: int, pages: int) -> dict[str, tuple[int, ...]]:
    """What every program over packed chunks gets: `place_chunks` fills it in."""
    T, R = tokens, rows
    return dict(
        tokens=(T,),
        positions=(T,),  # -1: padding
        rows=(T,),  # line of each token's prompt below
        num_seqs=(1,),
        cu_q_lens=(R + 1,),
        kv_lens=(R,),
        page_table=(R, pages),
        banks=(R,),  # where those pages are
    )


def place_chunks(view: dict[str, np.ndarray], chunks: Sequence[Chunk], *, tile: int) -> list[int]:
    """Writes the pieces above, a line for each chunk; the index of each chunk's first token."""
    view["positions"][:] = -1
    view["num_seqs"][:] = len(chunks)
    starts, start = [], 0
    for line, chunk in enumerate(chunks):
        count = len(chunk.tokens)
        end, stop = start + count, chunk.start + count
        starts.append(start)
        view["tokens"][start:end] = chunk.tokens
        view["positions"][start:end] = range(chunk.start, stop)
        start_next = start + -(-count // tile) * tile
        view["rows"][start:start_next] = line
        view["cu_q_lens"][line + 1 :] = start_next
        view["kv_lens"][line] = stop
        view["banks"][line] = chunk.row.bank
        view["page_table"][line, : len(chunk.pages)] = chunk.pages
        start = start_next
    return starts


def prefill_layout(shape: PrefillShape) -> Layout:
    """Host to device. Unused lines have slot = the number of slots (dropped on the device)."""
    R, text, guided = shape.rows, shape.spec.text, shape.spec.guided
    return Layout(
        **chunk_pieces(shape.tokens, R, shape.pages),
        slots=(R,),  # where the row's state lives
        last=(R,),  # index in tokens of the row's last token
        final=(R,),  # 1: sample the row's next token after its last one
        first=(R,),  # 1: the row starts here; 2: its tokens here were sampled, so they are counted
        outputs_from=(
            R,
        ),  # position at which outputs begin (a preempted row is fed its own outputs again)
        produced=(R,),  # outputs before the one sampled now
        limit=(R,),  # most outputs of the row
        params=(R, width(shape.spec)),
        **(dict(texts=(R, text)) if text else {}),  # the row's known tokens, from its first
        **(dict(allowed=(R, guided)) if guided else {}),  # ids that may be sampled, 32 a word
    )


def sampled_layout(shape: PrefillShape) -> Layout:
    """Device to host, of a prefill: what it sampled, as a block of no steps would say it."""
    R, tops = shape.rows, shape.spec.logprobs
    pieces = dict(tokens=(R, 1), finish=(R,))
    if tops >= 0:
        pieces |= dict(logprob=(R, 1), top_ids=(R, 1, tops), top_logprobs=(R, 1, tops))
    return Layout(**pieces)


def decode_layout(shape: DecodeShape) -> Layout:
    """Host to device. Lines beyond the live rows have slot = the number of slots."""
    B = shape.rows
    return Layout(
        steps=(1,),
        slots=(B,),
        limit=(B,),
        page_table=(B, shape.pages),
        banks=(B,),  # where those pages are
        params=(B, width(shape.spec)),
    )


def result_layout(shape: DecodeShape) -> Layout:
    """Device to host: place 0 of `tokens` is the token with which the row entered the block.

    Of a speculative block also the counts of `request.Speculated`.
    """
    B, N = shape.rows, 1 + shape.tail
    pieces = dict(steps=(1,), count=(B,), finish=(B,), tokens=(B, N))
    if shape.draft:
        pieces |= dict(rounds=(B,), proposed=(B,))
    if shape.spec.logprobs >= 0:
        tops = shape.spec.logprobs
        pieces |= dict(logprob=(B, N), top_ids=(B, N, tops), top_logprobs=(B, N, tops))
    return Layout(**pieces)


def bits_of(values: jax.Array) -> jax.Array:
    """Values as they travel: float32 as int32 of the same bits, int32 as it is."""
    if values.dtype == jnp.float32:
        return jax.lax.bitcast_convert_type(values, jnp.int32)
    return values


def pack_prefill(
    plan: Plan, shape: PrefillShape, *, tile: int, slots: int, eos_ids: Sequence[int]
) -> np.ndarray:
    """The buffer of a prefill that runs a plan's chunks.

    Args:
      plan: whose chunks are of requests to continue.
      shape: of the program.
      tile: the backend's Q_TILE.
      slots: of the engine; `eos_ids` the model's.
    """
    buffer, view = prefill_layout(shape).zeros()
    starts = place_chunks(view, plan.chunks, tile=tile)
    view["slots"][:] = slots
    for line, (chunk, start) in enumerate(zip(plan.chunks, starts, strict=True)):
        row = chunk.row
        view["slots"][line] = chunk.slot
        view["last"][line] = start + len(chunk.tokens) - 1
        view["final"][line] = chunk.final
        view["first"][line] = 2 if chunk.counted else chunk.start == 0
        if shape.spec.guided:
            view["allowed"][line] = _allowed(chunk, shape.spec.guided)
        view["outputs_from"][line] = len(row.request.prompt_ids)
        view["produced"][line] = len(row.outputs)
        view["limit"][line] = row.limit
        if shape.spec.text and chunk.final:
            known = row.tokens
            view["texts"][line, : len(known)] = known
    _pack_params(view, [chunk.row for chunk in plan.chunks], shape.spec, eos_ids)
    return buffer


def pack_decode(
    plan: Plan, shape: DecodeShape, *, slots: int, eos_ids: Sequence[int]
) -> np.ndarray:
    """The buffer of a block that runs a plan's rows; arguments as of `pack_prefill`."""
    buffer, view = decode_layout(shape).zeros()
    view["steps"][:] = plan.steps
    view["slots"][:] = slots
    for line, entry in enumerate(plan.rows):
        view["slots"][line] = entry.slot
        view["limit"][line] = entry.row.limit
        view["page_table"][line, : len(entry.pages)] = entry.pages
        view["banks"][line] = entry.row.bank
    _pack_params(view, [entry.row for entry in plan.rows], shape.spec, eos_ids)
    return buffer


def read_block(buffer: np.ndarray, shape: DecodeShape, plan: Plan) -> tuple[BlockResult, int]:
    """What a block gave, and the steps that it ran."""
    pieces = result_layout(shape).split(buffer)
    steps = int(pieces.pop("steps")[0])
    return _block_result(pieces, len(plan.rows)), steps


def read_sampled(buffer: np.ndarray, shape: PrefillShape, plan: Plan) -> BlockResult:
    """What a prefill sampled, a line for each chunk."""
    pieces = sampled_layout(shape).split(buffer)
    pieces["count"] = np.zeros_like(pieces["finish"])
    return _block_result(pieces, len(plan.chunks))


def _allowed(chunk: Chunk, words: int) -> np.ndarray:
    """The mask int32[words] of the ids that may come after a chunk."""
    guide = chunk.row.request.guide
    if guide is None or not chunk.final:
        return np.full(words, -1, np.int32)
    mask = np.zeros(words, np.int32)
    known = guide.mask()[:words]
    mask[: len(known)] = known  # a model may have more ids than its tokenizer
    return mask


def _pack_params(
    view: dict[str, np.ndarray], rows: list[Row], spec: SampleSpec, eos_ids: Sequence[int]
) -> None:
    idle = view["params"].shape[0] - len(rows)
    params = [row.request.params for row in rows] + [None] * idle
    seeds = [row.request.seed for row in rows] + [0] * idle
    view["params"][:] = pack(params, spec, eos_ids=eos_ids, seeds=seeds)


def _block_result(pieces: dict[str, np.ndarray], rows: int) -> BlockResult:
    """The pieces of a result buffer for its first `rows` lines, floats as floats again."""
    floats = {"logprob", "top_logprobs"} & pieces.keys()
    values = {
        name: (piece.view(np.float32) if name in floats else piece)[:rows]
        for name, piece in pieces.items()
    }
    counts = [field.name for field in dataclasses.fields(Speculated)]
    speculated = Speculated(*map(values.pop, counts)) if "rounds" in values else None
    return BlockResult(**values, speculated=speculated)
