"""The third program of the engine: `score`, a prefill that gives log-probabilities and hidden
states instead of a next token.

It rides on the prefill's way: packed chunks, pages, shared beginnings. Logits are computed for the
asked places only, a slice of them at a time, so that a chunk times Gemma's vocabulary of 262,144 is
never in memory. Here too: its buffers. What may be asked is `scored.py`; read next: `runner.py`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.engine.packing import Layout, bits_of, chunk_pieces, place_chunks
from lepton_jax.engine.request import Chunk
from lepton_jax.engine.sampling import log_total
from lepton_jax.engine.scored import ScoreResult, ScoreSpec
from lepton_jax.engine.steps import attend_pages
from lepton_jax.kernels.attention import Backend, PagedBatch
from lepton_jax.models.build import Model

_SLICE_BYTES = 32 << 20  # of the logits in memory at a time
_SLICE_PLACES = 128


@dataclasses.dataclass(frozen=True)
class ScoreShape:
    """A scoring program: `tokens` T of at most `rows` R prompts, page tables of `pages` W."""

    tokens: int
    rows: int
    pages: int
    spec: ScoreSpec


def score_layout(shape: ScoreShape) -> Layout:
    """Host to device. Asked places come first in `places`; the rest is not looked at."""
    T, C = shape.tokens, shape.spec.targets
    pieces = chunk_pieces(shape.tokens, shape.rows, shape.pages)
    if C:
        pieces |= dict(asked=(1,), places=(T,), targets=(T, C))  # `places`: indices in tokens
    if shape.spec.pool:
        pieces |= dict(weights=(T,))  # float bits: each token's share of its prompt's hidden state
    if shape.spec.inner:
        pieces |= dict(layer=(shape.rows,))  # of each prompt's hidden state
    return Layout(**pieces)


def score_result_layout(shape: ScoreShape, hidden_size: int) -> Layout:
    """Device to host."""
    T, C = shape.tokens, shape.spec.targets
    pieces = dict(logprobs=(T, C), greedy=(T, C)) if C else {}
    if shape.spec.pool:
        pieces |= dict(pooled=(shape.rows, hidden_size))
    return Layout(**pieces)


def score(
    leaves: tuple,
    caches: tuple,
    packed: jax.Array,
    *,
    model: Model,
    backend: Backend,
    shape: ScoreShape,
) -> tuple[tuple, jax.Array]:
    """Computes packed prompt chunks. The second result is laid out by `score_result_layout`."""
    inputs = score_layout(shape).split(packed)
    decoder = model.bind(leaves)
    batch = PagedBatch(
        **{field.name: inputs[field.name] for field in dataclasses.fields(PagedBatch)}
    )
    attend = attend_pages(backend, batch, decode=False, here=model.axis.holds(inputs["banks"]))
    inner = _Inner(inputs, layers=model.config.num_layers) if shape.spec.inner else None
    hidden, caches, *kept = decoder(
        inputs["tokens"], inputs["positions"], caches, attend, tap=inner
    )
    pieces = {}
    if shape.spec.targets:
        pieces |= _log_probabilities(decoder, hidden, inputs, model)
    if shape.spec.pool:
        weights = jax.lax.bitcast_convert_type(inputs["weights"], jnp.float32)
        # As a sum by rows, not a product: unused lines are 0 and padding never counts.
        states = inner.states(hidden, *kept) if inner else hidden
        shares = jnp.where(weights[:, None] > 0, weights[:, None] * states.astype(jnp.float32), 0)
        pooled = jax.ops.segment_sum(shares, inputs["rows"], num_segments=shape.rows)
        pieces |= dict(pooled=bits_of(pooled))
    return caches, score_result_layout(shape, model.config.hidden_size).join(pieces)


class _Inner:
    """The hidden states that prompts ask for between layers: a decoder's `tap`."""

    def __init__(self, inputs: dict, *, layers: int):
        self._wanted, self._layers = inputs["layer"][inputs["rows"]], layers

    def __call__(self, kept: jax.Array, layer: jax.Array | int, x: jax.Array) -> jax.Array:
        """What is kept `[T, D]` once x, the same shape, went through so many layers."""
        return jnp.where((self._wanted == layer)[:, None], x, kept)

    def states(self, last: jax.Array, kept: jax.Array) -> jax.Array:
        """`[T, D]`, from `last` where the state after the final norm is asked."""
        final = (self._wanted < 0) | (self._wanted >= self._layers)
        return jnp.where(final[:, None], last, kept)


def _log_probabilities(decoder, hidden: jax.Array, inputs: dict, model: Model) -> dict:
    """Of the targets of the asked places, and whether they are the likeliest, slice by slice.

    The likeliest ids themselves would take another pass over the logits: a third more time for all
    of this (2-core AVX-512 CPU, [128, 49152], 2026-11-24).
    """
    most, width = inputs["targets"].shape
    axis, vocab = model.axis, model.axis.share(model.config.vocab_size)
    size = min(most, _SLICE_PLACES, max(8, _SLICE_BYTES // (4 * vocab)))
    slices = -(-most // size)
    padding = slices * size - most
    places = jnp.pad(inputs["places"], (0, padding)).reshape(slices, size)
    targets = jnp.pad(inputs["targets"], ((0, padding), (0, 0))).reshape(slices, size, width)

    def one_slice(index, out):
        logprobs, greedy = out
        logits = decoder.logits(hidden[places[index]])
        top = axis.max(jnp.max(logits, -1))
        total = log_total(logits, top, axis)[:, None]
        chosen = axis.pick(logits, targets[index])
        is_top = (chosen >= top[:, None]).astype(jnp.int32)
        return logprobs.at[index].set(chosen - total), greedy.at[index].set(is_top)

    shape = slices, size, width
    count = -(-inputs["asked"][0] // size)
    start = jnp.zeros(shape), jnp.zeros(shape, jnp.int32)
    logprobs, greedy = jax.lax.fori_loop(0, count, one_slice, start)
    lines = [a.reshape(-1, width)[:most] for a in (bits_of(logprobs), greedy)]
    return dict(zip(("logprobs", "greedy"), lines, strict=True))


def pack_scores(chunks: Sequence[Chunk], shape: ScoreShape, *, tile: int) -> np.ndarray:
    """The buffer of a program that runs these chunks."""
    buffer, view = score_layout(shape).zeros()
    starts = place_chunks(view, chunks, tile=tile)
    asked = 0
    for line, (chunk, start) in enumerate(zip(chunks, starts, strict=True)):
        request, places = chunk.row.request, chunk.scored_places
        if shape.spec.inner:
            view["layer"][line] = request.scoring.layer
        first = request.first_scored
        for place in places:
            ids = request.scoring.targets[place - first]
            view["places"][asked] = start + place - chunk.start
            view["targets"][asked, : len(ids)] = ids
            asked += 1
        if request.scoring.pool == "mean":
            share = np.float32(1 / len(request.prompt_ids)).view(np.int32)
            view["weights"][start : start + len(chunk.tokens)] = share
        elif request.scoring.pool and chunk.final:
            view["weights"][start + len(chunk.tokens) - 1] = np.float32(1).view(np.int32)
    if shape.spec.targets:
        view["asked"][:] = asked
    return buffer


def read_scores(buffer: np.ndarray, shape: ScoreShape, hidden_size: int) -> ScoreResult:
    """What a program of this shape gave."""
    pieces = score_result_layout(shape, hidden_size).split(buffer)
    greedy = pieces.pop("greedy", None)
    floats = {name: piece.view(np.float32) for name, piece in pieces.items()}
    return ScoreResult(**floats, greedy=None if greedy is None else greedy == 1)
