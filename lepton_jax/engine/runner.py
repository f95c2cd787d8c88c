"""The device side of a beat: programs, caches and state; a plan goes in, tokens come out one beat
later.

`dispatch` packs a plan into one buffer per program and enqueues them; `read` waits for what they
produced. Programs are compiled ahead of time per shape (`programs.py`) and called directly. Which
shapes exist is decided in `rungs.py`. Read next: `steps.py` (what the programs do), `packing.py`
(their buffers), `loop.py` (who calls this).
"""

import dataclasses
import functools
import time
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.engine import packing, scoring, speculation, steps
from lepton_jax.engine.packing import DecodeShape, PrefillShape
from lepton_jax.engine.programs import Programs
from lepton_jax.engine.request import BlockResult, Chunk, Plan, Speculated
from lepton_jax.engine.row_params import SampleSpec, pack
from lepton_jax.engine.rungs import Rungs, Sizes, fit
from lepton_jax.engine.scored import ScoreResult, ScoreSpec
from lepton_jax.engine.scoring import ScoreShape
from lepton_jax.models.build import Model
from lepton_jax.sharding import Placement
from lepton_jax.sharding.placement import CUT_SPEC, WHOLE_SPEC, specs_of

_MOST_VIEW_BYTES = 256 << 20  # a block's copy of its rows' cache is at most this large


@dataclasses.dataclass
class InFlight:
    """A dispatched plan; `ran`, `scores` and `result` are device arrays that will be ready when the
    programs are.

    `prefill_places` is the size of its prefill program. `read` fills in the seconds, those that the
    device had nothing to do before (`gap_seconds`) among them, and the `steps` and `tokens` of its
    block; `rounds` counts a row's step once, however many tokens it gave.
    """

    plan: Plan
    dispatched: float
    prefill_places: int = 0
    gap_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    rounds: int = 0
    ran: jax.Array | None = None
    prefill_shape: PrefillShape | None = None
    score_shape: ScoreShape | None = None
    scores: jax.Array | None = None
    decode_shape: DecodeShape | None = None
    result: jax.Array | None = None


@dataclasses.dataclass
class Timings:
    """Seconds and counts since the runner was made; of compiling `Programs` keeps its own."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0
    gap_seconds: float = 0.0
    prefill_tokens: int = 0
    prefill_padding: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_padding: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    verified_steps: int = 0


class Runner:
    """Runs plans of the scheduler on one device, or on several that share the model."""

    def __init__(
        self,
        model: Model,
        leaves: tuple,
        *,
        sizes: Sizes,
        backend: ModuleType,
        kv_dtype: Any,
        eos_ids: tuple[int, ...],
        strict: bool = False,
        placement: Placement | None = None,
    ):
        self.placement = placement or Placement.holding(leaves, model.units)
        self.model, self.sizes = model.on(self.placement.axis), sizes
        self.spec = SampleSpec(text=sizes.max_len if sizes.draft else 0)
        self.score_spec = ScoreSpec()
        self.timings = Timings()
        self.leaves, self.backend = tuple(leaves), backend
        self._cache_layer = backend.cache_layer(
            sizes.num_pages,
            sizes.page_size,
            self.model.axis.share(model.config.num_kv_heads),
            model.config.head_dim,
            dtype=kv_dtype,
        )
        self._eos_ids = eos_ids
        self.programs = Programs(lambda shape: self.lower(shape).compile(), strict=strict)
        self._draft: Model | None = None
        self._draft_leaves, self._draft_layer = (), None
        self._caches: tuple | None = None
        self._drafting: tuple = ()  # the draft model's caches
        self._state: steps.RowState | None = None
        self._scratch: tuple = ()
        self._scratch_of = (0, 0, 0)  # rows, view and tail that it is for
        self._last_done = 0.0
        self.rungs = Rungs.of(
            prefill_chunk=sizes.prefill_chunk,
            rows=sizes.rows,
            max_len=sizes.max_len,
            tile=backend.Q_TILE,
            has_views=hasattr(backend, "open_view"),
        )
        self.drafts = draft_sizes(sizes.draft)

    def draft_with(self, model: Model, leaves: tuple, *, kv_dtype: Any) -> None:
        """Lets a second model propose; before any program is made."""
        c, s = model.config, self.sizes
        heads = model.axis.share(c.num_kv_heads)
        pages = s.num_pages, s.page_size
        self._draft, self._draft_leaves = model, tuple(leaves)
        self._draft_layer = self.backend.cache_layer(*pages, heads, c.head_dim, dtype=kv_dtype)
        self.spec = dataclasses.replace(self.spec, drafted=True)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all layers' caches on each device, the draft model's too."""
        caches = self._abstract_caches() + self._abstract_drafting()
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(caches))

    def require(self, spec: SampleSpec | ScoreSpec) -> None:
        """Makes the programs from now on serve rows of this spec too."""
        if isinstance(spec, ScoreSpec):
            self.score_spec = self.score_spec.union(spec)
            return
        if spec.guided:
            words = -(-self.model.config.vocab_size // 32)
            spec = dataclasses.replace(spec, guided=words)
        self.spec = self.spec.union(spec)

    def shapes_for(self, prompt_tokens: int, rows: int) -> list[PrefillShape | DecodeShape]:
        """The programs that a job can reach, those first that its first beats need.

        Args:
          prompt_tokens: tokens of all prompts, each rounded up to a tile.
          rows: requests that decode.
        """
        prefill = fit(self._prefills, prompt_tokens)
        decode = fit(self.rungs.decode, rows) if rows else 0
        prefills = [self._prefill_shape(size) for size in self._prefills if size <= prefill]
        decodes = [
            self._decode_shape(size, cached, draft)
            for draft in (0, *self.drafts[::-1])
            for cached in self.rungs.views or [0]
            for size in reversed(self.rungs.decode)
            if size <= decode
        ]
        return list(dict.fromkeys([prefills[-1], *decodes[:1], *prefills[::-1], *decodes]))

    def score_shapes_for(self, prompt_tokens: int) -> list[ScoreShape]:
        """The programs that a job of scoring can reach, by the tokens of all its prompts."""
        most = fit(self.rungs.prefill, prompt_tokens)
        return [self._score_shape(size) for size in self.rungs.prefill if size <= most]

    def warm_up(self, shapes: list[PrefillShape | DecodeShape | ScoreShape], *, wait: bool) -> None:
        """Compiles these programs in the background and allocates caches and state.

        `wait`: returns when all are ready.
        """
        self.programs.warm_up(shapes, wait=wait)
        self._allocate()

    def dispatch(self, plan: Plan) -> InFlight:
        """Enqueues the plan's prefill, then its decode block; returns before they have run."""
        self._allocate()
        flight = InFlight(plan, time.perf_counter())
        if plan.chunks:
            tile = self.backend.Q_TILE
            tiles = sum(-(-len(chunk.tokens) // tile) for chunk in plan.chunks)
            size = fit(self.rungs.prefill if plan.scoring else self._prefills, tiles * tile)
            shape = self._score_shape(size) if plan.scoring else self._prefill_shape(size)
            program = self.programs.get(shape)
            if plan.scoring:
                packed = scoring.pack_scores(plan.chunks, shape, tile=tile)
                self._caches, flight.scores = program(self.leaves, self._caches, packed)
                flight.scores.copy_to_host_async()
                flight.score_shape = shape
            else:
                packed = self._pack_prefill(plan, shape)
                flight.prefill_shape = shape
                self._caches, self._state, flight.ran = program(
                    self.leaves, self._caches, self._state, packed
                )
            real = sum(len(chunk.tokens) for chunk in plan.chunks)
            self.timings.prefill_tokens += real
            self.timings.prefill_padding += shape.tokens - real
            flight.prefill_places = shape.tokens
        if plan.rows:
            rows = fit(self.rungs.decode, len(plan.rows))
            cached = max(entry.cached for entry in plan.rows)
            draft = fit(self.drafts, plan.draft) if plan.draft else 0
            shape = self._decode_shape(rows, cached, draft)
            program = self.programs.get(shape)
            packed = self._pack_decode(plan, shape)
            if self._scratch_of != (shape.rows, shape.view, shape.tail):
                self._scratch = ()  # the old one goes before the new one comes
                views = steps.view_shapes(self.backend, self._abstract_caches(), shape)
                self._scratch = self.placement.zeros(views, CUT_SPEC)
                self._scratch_of = (shape.rows, shape.view, shape.tail)
            flight.result = self._run_block(program, packed, speculative=shape.draft > 0)
            flight.result.copy_to_host_async()
            flight.decode_shape = shape
        return flight

    def _run_block(self, program, packed: np.ndarray, *, speculative: bool) -> jax.Array:
        if speculative:
            leaves = self.leaves + self._draft_leaves
            memory = self._caches, self._scratch, self._drafting
            memory, self._state, result = program(leaves, memory, self._state, packed)
            self._caches, self._scratch, self._drafting = memory
        else:
            memory = self._caches, self._scratch
            memory, self._state, result = program(self.leaves, memory, self._state, packed)
            self._caches, self._scratch = memory
        return result

    def read(
        self, flight: InFlight
    ) -> tuple[BlockResult | None, ScoreResult | None, BlockResult | None]:
        """Waits for a plan; the results of its decode block, of its prompts to score and of a
        prefill of guided rows, each None where it had none.
        """
        waiting, scores, sampled = time.perf_counter(), None, None
        if self._last_done:
            flight.gap_seconds = max(0.0, flight.dispatched - self._last_done)
        if flight.scores is not None:
            buffer = np.asarray(flight.scores)
            flight.prefill_seconds = self._lap(flight)
            hidden_size = self.model.config.hidden_size
            scores = scoring.read_scores(buffer, flight.score_shape, hidden_size)
        if flight.ran is not None:
            buffer = np.asarray(flight.ran)
            flight.prefill_seconds = self._lap(flight)
            if flight.prefill_shape.spec.guided:
                pieces = packing.sampled_layout(flight.prefill_shape).split(buffer)
                pieces["count"] = np.zeros_like(pieces["finish"])
                sampled = _block_result(pieces, len(flight.plan.chunks))
        result = None
        if flight.result is not None:
            buffer = np.asarray(flight.result)
            flight.decode_seconds = self._lap(flight)
            pieces = packing.result_layout(flight.decode_shape).split(buffer)
            self._count_block(flight, pieces)
            result = _block_result(pieces, len(flight.plan.rows))
        self.timings.gap_seconds += flight.gap_seconds
        self.timings.prefill_seconds += flight.prefill_seconds
        self.timings.decode_seconds += flight.decode_seconds
        self.timings.wait_seconds += time.perf_counter() - waiting
        return result, scores, sampled

    def _count_block(self, flight: InFlight, pieces: dict[str, np.ndarray]) -> None:
        shape, steps_run, tokens = (
            flight.decode_shape,
            int(pieces["steps"][0]),
            int(pieces["count"].sum()),
        )
        rounds = int(pieces["rounds"].sum()) if shape.draft else tokens
        flight.steps, flight.tokens, flight.rounds = steps_run, tokens, rounds
        self.timings.decode_steps += steps_run
        self.timings.decode_tokens += tokens
        self.timings.decode_padding += steps_run * shape.rows - rounds
        if shape.draft:
            self.timings.verified_steps += steps_run
            self.timings.proposed_tokens += int(pieces["proposed"].sum())
            self.timings.accepted_tokens += tokens - rounds

    def _lap(self, flight: InFlight) -> float:
        """Seconds since the device finished the program before, or since this one was enqueued."""
        now = time.perf_counter()
        seconds = now - max(self._last_done, flight.dispatched)
        self._last_done = now
        return seconds

    @property
    def _prefills(self) -> list[int]:
        """Prompt tokens of prefills; smaller ones too where guided rows go on token by token."""
        return [*self.rungs.guided, *self.rungs.prefill] if self.spec.guided else self.rungs.prefill

    def _prefill_shape(self, tokens: int) -> PrefillShape:
        rows = max(1, min(self.sizes.rows, tokens // self.backend.Q_TILE))
        return PrefillShape(tokens, rows, self.sizes.pages_per_row, self.spec)

    def _score_shape(self, tokens: int) -> ScoreShape:
        plain = self._prefill_shape(tokens)
        return ScoreShape(plain.tokens, plain.rows, plain.pages, self.score_spec)

    def _decode_shape(self, rows: int, cached: int, draft: int) -> DecodeShape:
        s = self.sizes
        view = self._view(rows, cached)
        spec = dataclasses.replace(self.spec, guided=0)
        return DecodeShape(rows, s.decode_block, s.pages_per_row, spec, view, draft)

    def _view(self, rows: int, cached: int) -> int:
        """Tokens of a block's view; 0 where the backend has none or it would be too large."""
        if not self.rungs.views:
            return 0
        view = fit(self.rungs.views, cached)
        layer, places = self._cache_layer, self.sizes.num_pages * self.sizes.page_size
        layer_bytes = int(np.prod(layer.shape)) * jnp.dtype(layer.dtype).itemsize // places
        token_bytes = self.model.config.num_layers * layer_bytes
        return view if rows * view * token_bytes <= _MOST_VIEW_BYTES else 0

    def lower(self, shape: PrefillShape | DecodeShape | ScoreShape) -> jax.stages.Lowered:
        """The program of a shape before it is compiled; leaves and devices may be abstract."""
        if isinstance(shape, ScoreShape):
            return self._lower_score(shape)
        prefill = isinstance(shape, PrefillShape)
        layout = (packing.prefill_layout if prefill else packing.decode_layout)(shape)
        fixed = dict(model=self.model, backend=self.backend, shape=shape)
        memory, leaves, place = self._abstract_caches(), self.leaves, self.placement
        if prefill:
            step = functools.partial(steps.prefill, **fixed)
        else:
            step = functools.partial(steps.decode_block, **fixed)
            memory = memory, steps.view_shapes(self.backend, memory, shape)
        if not prefill and shape.draft:
            step = functools.partial(speculation.speculative_block, **fixed, draft=self._draft)
            memory, leaves = (*memory, self._abstract_drafting()), leaves + self._draft_leaves
        leaves = _abstract(leaves)
        arguments = memory, self._abstract_state(shape.spec), _ints(layout.size)
        kinds = CUT_SPEC, steps.STATE_SPECS, WHOLE_SPEC
        # Scratch is written only: kept as an argument, it is where the views are made.
        program = place.program(
            step, (specs_of(leaves), *kinds), kinds, donate=(1, 2), keep_unused=True
        )
        return program.lower(leaves, *place.abstract(arguments, kinds))

    def _lower_score(self, shape: ScoreShape):
        step = functools.partial(scoring.score, model=self.model, backend=self.backend, shape=shape)
        leaves, place = _abstract(self.leaves), self.placement
        arguments = self._abstract_caches(), _ints(scoring.score_layout(shape).size)
        kinds = CUT_SPEC, WHOLE_SPEC
        program = place.program(step, (specs_of(leaves), *kinds), kinds, donate=(1,))
        return program.lower(leaves, *place.abstract(arguments, kinds))

    def _abstract_caches(self) -> tuple:
        layer = jax.tree.map(lambda spec: spec.abstract(), self._cache_layer)
        return (layer,) * self.model.config.num_layers

    def _abstract_drafting(self) -> tuple:
        if self._draft is None:
            return ()
        layer = jax.tree.map(lambda spec: spec.abstract(), self._draft_layer)
        return (layer,) * self._draft.config.num_layers

    def _abstract_state(self, spec: SampleSpec) -> steps.RowState:
        return jax.eval_shape(lambda: self._fresh_state(spec))

    def _fresh_state(self, spec: SampleSpec) -> steps.RowState:
        vocab = self.model.axis.share(self.model.config.vocab_size)
        return steps.RowState.zeros(self.sizes.rows, vocab, spec)

    def _allocate(self) -> None:
        """Caches once; state again whenever the spec has grown, keeping what it held."""
        if self._caches is None:
            self._caches = self.placement.zeros(self._abstract_caches(), CUT_SPEC)
            self._drafting = self.placement.zeros(self._abstract_drafting(), CUT_SPEC)
        wanted = self.placement.abstract(self._abstract_state(self.spec), steps.STATE_SPECS)
        if jax.tree.map(jnp.shape, self._state) == jax.tree.map(jnp.shape, wanted):
            return
        fresh = self.placement.copies(self._fresh_state(self.spec), steps.STATE_SPECS)
        self._state = fresh if self._state is None else fresh.filled_from(self._state)

    def _pack_prefill(self, plan: Plan, shape: PrefillShape) -> np.ndarray:
        buffer, view = packing.prefill_layout(shape).zeros()
        starts = packing.place_chunks(view, plan.chunks, tile=self.backend.Q_TILE)
        view["slots"][:] = self.sizes.rows
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
        self._pack_params(view, [chunk.row for chunk in plan.chunks], shape.spec)
        return buffer

    def _pack_decode(self, plan: Plan, shape: DecodeShape) -> np.ndarray:
        buffer, view = packing.decode_layout(shape).zeros()
        view["steps"][:] = plan.steps
        view["slots"][:] = self.sizes.rows
        for line, entry in enumerate(plan.rows):
            view["slots"][line] = entry.slot
            view["limit"][line] = entry.row.limit
            view["page_table"][line, : len(entry.pages)] = entry.pages
        self._pack_params(view, [entry.row for entry in plan.rows], shape.spec)
        return buffer

    def _pack_params(self, view: dict, rows: list, spec: SampleSpec) -> None:
        idle = view["params"].shape[0] - len(rows)
        params = [row.request.params for row in rows] + [None] * idle
        seeds = [row.request.seed for row in rows] + [0] * idle
        view["params"][:] = pack(params, spec, eos_ids=self._eos_ids, seeds=seeds)


def _allowed(chunk: Chunk, words: int) -> np.ndarray:
    """The mask int32[words] of the ids that may come after a chunk."""
    guide = chunk.row.request.guide
    if guide is None or not chunk.final:
        return np.full(words, -1, np.int32)
    mask = np.zeros(words, np.int32)
    known = guide.mask()[:words]
    mask[: len(known)] = known  # a model may have more ids than its tokenizer
    return mask


def draft_sizes(most: int) -> list[int]:
    """Draft lengths that programs are compiled for, ascending: a step's tokens are halved once."""
    half = (1 + most) // 2 - 1
    return [size for size in (half, most) if size > 0]


def _abstract(leaves: tuple) -> tuple:
    """Of all devices; the other arguments are of one device's share."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), leaves
    )


def _ints(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.int32)


def _block_result(pieces: dict[str, np.ndarray], rows: int) -> BlockResult:
    """The pieces of a result buffer for its first `rows` lines, floats as floats again."""
    floats = {
        name: pieces[name].view(np.float32)[:rows]
        for name in ("logprob", "top_logprobs")
        if name in pieces
    }
    ints = {name: pieces[name][:rows] for name in pieces if name not in ("steps", *floats)}
    counts = [field.name for field in dataclasses.fields(Speculated)]
    speculated = Speculated(*map(ints.pop, counts)) if "rounds" in ints else None
    return BlockResult(**ints, **floats, speculated=speculated)
