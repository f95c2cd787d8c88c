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
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax import compile_cache
from lepton_jax.engine import packing, scoring, speculation, steps
from lepton_jax.engine.packing import DecodeShape, PrefillShape
from lepton_jax.engine.programs import Programs
from lepton_jax.engine.request import BlockResult, Plan
from lepton_jax.engine.row_params import SampleSpec
from lepton_jax.engine.rungs import Rungs, Sizes, fit
from lepton_jax.engine.scored import ScoreResult, ScoreSpec
from lepton_jax.engine.scoring import ScoreShape
from lepton_jax.kept_programs import KeptProgram
from lepton_jax.kernels.attention import Backend
from lepton_jax.models.build import Model
from lepton_jax.sharding import Placement
from lepton_jax.sharding.placement import CUT_SPEC, WHOLE_SPEC, specs_of

Shape = PrefillShape | DecodeShape | ScoreShape  # of a program
MOST_VIEW_BYTES = 256 << 20  # a block's copy of its rows' cache is at most this large


@dataclasses.dataclass
class InFlight:
    """A dispatched plan; `sampled`, `scores` and `result` are device arrays that will be ready when
    the programs are.

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
    sampled: jax.Array | None = None
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
        backend: Backend,
        kv_dtype: Any,
        eos_ids: tuple[int, ...],
        strict: bool = False,
        placement: Placement | None = None,
    ):
        self.placement = placement or Placement.holding(leaves, model.heads)
        self.model, self.sizes = self._looped(model.on(self.placement.axis), leaves), sizes
        self.spec = SampleSpec(text=sizes.max_len if sizes.draft else 0)
        self.score_spec = ScoreSpec()
        self._warm = self.spec, self.score_spec  # what `forget` goes back to
        self.timings = Timings()
        self.leaves, self.backend = tuple(leaves), backend
        self._kv_dtype = kv_dtype
        self._lines = dict(slots=sizes.rows, eos_ids=eos_ids)  # what packing must know of rows
        fetch = weakref.WeakMethod(self._fetch)  # in a cycle with them it would outlive its engine
        self.programs = Programs(lambda shape: fetch()(shape), strict=strict)
        self._grown: list[int] = []  # rows of programs besides the rungs, ascending
        self._last_block = 0, 0  # most cached tokens of a row, tokens of a draft
        self._draft: Model | None = None
        self._draft_leaves, self._draft_kv_dtype = (), None
        self.reset()
        has_views = hasattr(backend, "open_view")
        self.rungs = Rungs.of(sizes, tile=backend.Q_TILE, has_views=has_views)
        self.drafts = draft_sizes(sizes.draft)

    def reset(self) -> None:
        """Gives caches and state up; `dispatch` makes new ones."""
        self._caches: tuple | None = None
        self._drafting: tuple = ()  # the draft model's caches
        self._state: steps.RowState | None = None
        self._scratch: tuple = ()
        self._scratch_of = (0, 0, 0)  # rows, view and tail that it is for
        self._last_done = 0.0

    def forget(self) -> None:
        """Programs serve again what the last warm-up required, and no more."""
        self.spec, self.score_spec = self._warm
        self._state = None

    def close(self) -> None:
        """Gives caches, state and weights up for good; what isn't compiled is not any more."""
        self.programs.close()
        self.reset()
        self.leaves = self._draft_leaves = ()

    def draft_with(self, model: Model, leaves: tuple, *, kv_dtype: Any) -> None:
        """Lets a second model propose; before any program is made."""
        self._draft, self._draft_leaves = self._looped(model, leaves), tuple(leaves)
        self._draft_kv_dtype = kv_dtype
        self.spec = dataclasses.replace(self.spec, drafted=True)
        self._warm = self.spec, self.score_spec

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

    def shapes_for(
        self, prompt_tokens: int, rows: int, cached: int = 0
    ) -> list[PrefillShape | DecodeShape]:
        """The programs that a job can reach, those first that its first beats need.

        Args:
          prompt_tokens: tokens of all prompts, each rounded up to a tile.
          rows: requests that decode.
          cached: tokens of the longest of those prompts that decode first.
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
        first = [self._decode_shape(decode, cached, 0)] if decode else []
        return list(dict.fromkeys([prefills[-1], *first, *prefills[::-1], *decodes]))

    def score_shapes_for(self, prompt_tokens: int) -> list[ScoreShape]:
        """The programs that a job of scoring can reach, by the tokens of all its prompts."""
        most = fit(self.rungs.prefill, prompt_tokens)
        return [self._score_shape(size) for size in self.rungs.prefill if size <= most]

    def warm_up(self, shapes: list[Shape], *, wait: bool, guessed: bool = False) -> None:
        """Compiles these programs in the background and allocates caches and state; `wait` and
        `guessed` as `Programs.warm_up` takes them.
        """
        self._warm = self.spec, self.score_spec
        self.programs.warm_up(shapes, wait=wait, guessed=guessed)
        self._allocate()

    def grow(self, rows: int) -> None:
        """Compiles the program of the last block for fewer rows in the background; from when it is
        there, it runs blocks that fit.
        """
        self._grown = sorted({*self._grown, rows})
        self.programs.add(self._decode_shape(rows, *self._last_block))

    def dispatch(self, plan: Plan) -> InFlight:
        """Enqueues the plan's prefill, then its decode block; returns before they have run."""
        self._allocate()
        flight = InFlight(plan, time.perf_counter())
        if plan.chunks:
            real, tile = sum(len(chunk.tokens) for chunk in plan.chunks), self.backend.Q_TILE
            padded = tile * sum(-(-len(chunk.tokens) // tile) for chunk in plan.chunks)
            run = self._run_scores if plan.scoring else self._run_prefill
            flight.prefill_places = run(flight, padded)
            self.timings.prefill_tokens += real
            self.timings.prefill_padding += flight.prefill_places - real
        if plan.rows:
            self._run_block(flight)
        return flight

    def _run_scores(self, flight: InFlight, tokens: int) -> int:
        """The size of the program that it chose for so many tokens."""
        shape = self._score_shape(fit(self.rungs.prefill, tokens))
        packed = scoring.pack_scores(flight.plan.chunks, shape, tile=self.backend.Q_TILE)
        program = self.programs.get(shape)
        self._caches, flight.scores = program(self.leaves, self._caches, packed)
        flight.scores.copy_to_host_async()
        flight.score_shape = shape
        return shape.tokens

    def _run_prefill(self, flight: InFlight, tokens: int) -> int:
        """As `_run_scores`."""
        shape = self._prefill_shape(fit(self._prefills, tokens))
        packed = packing.pack_prefill(flight.plan, shape, tile=self.backend.Q_TILE, **self._lines)
        program = self.programs.get(shape)
        self._caches, self._state, flight.sampled = program(
            self.leaves, self._caches, self._state, packed
        )
        flight.sampled.copy_to_host_async()
        flight.prefill_shape = shape
        return shape.tokens

    def _run_block(self, flight: InFlight) -> None:
        plan = flight.plan
        cached = max(entry.cached for entry in plan.rows)
        draft = fit(self.drafts, plan.draft) if plan.draft else 0
        self._last_block = cached, draft
        flight.decode_shape = shape = self._smallest_block(len(plan.rows))
        program = self.programs.get(shape)
        packed = packing.pack_decode(plan, shape, **self._lines)
        if self._scratch_of != (shape.rows, shape.view, shape.tail):
            self._scratch = ()  # the old one goes before the new one comes
            views = self._abstract_views(shape)
            self._scratch = self.placement.zeros(views, CUT_SPEC)
            self._scratch_of = (shape.rows, shape.view, shape.tail)
        if shape.draft:
            leaves = self.leaves + self._draft_leaves
            memory = self._caches, self._scratch, self._drafting
            memory, self._state, flight.result = program(leaves, memory, self._state, packed)
            self._caches, self._scratch, self._drafting = memory
        else:
            memory = self._caches, self._scratch
            memory, self._state, flight.result = program(self.leaves, memory, self._state, packed)
            self._caches, self._scratch = memory
        flight.result.copy_to_host_async()

    def _smallest_block(self, rows: int) -> DecodeShape:
        """The program of the last block for so many rows; one that `grow` asked for once it is
        compiled.
        """
        regular = fit(self.rungs.decode, rows)
        for size in self._grown:
            shape = self._decode_shape(size, *self._last_block)
            if rows <= size < regular and shape in self.programs.compiled:
                return shape
        return self._decode_shape(regular, *self._last_block)

    def read(
        self, flight: InFlight
    ) -> tuple[BlockResult | None, ScoreResult | None, BlockResult | None]:
        """Waits for a plan; the results of its decode block, of its prompts to score and of its
        prefill, each None where it had none.
        """
        scores, sampled = None, None
        if self._last_done:
            flight.gap_seconds = max(0.0, flight.dispatched - self._last_done)
        if flight.scores is not None:
            buffer = np.asarray(flight.scores)
            flight.prefill_seconds = self._lap(flight)
            hidden_size = self.model.config.hidden_size
            scores = scoring.read_scores(buffer, flight.score_shape, hidden_size)
        if flight.sampled is not None:
            buffer = np.asarray(flight.sampled)
            flight.prefill_seconds = self._lap(flight)
            sampled = packing.read_sampled(buffer, flight.prefill_shape, flight.plan)
        result = None
        if flight.result is not None:
            buffer = np.asarray(flight.result)
            flight.decode_seconds = self._lap(flight)
            result, flight.steps = packing.read_block(buffer, flight.decode_shape, flight.plan)
            self._count_block(flight, result)
        self.timings.gap_seconds += flight.gap_seconds
        self.timings.prefill_seconds += flight.prefill_seconds
        self.timings.decode_seconds += flight.decode_seconds
        return result, scores, sampled

    def _count_block(self, flight: InFlight, result: BlockResult) -> None:
        shape, speculated = flight.decode_shape, result.speculated
        flight.tokens = flight.rounds = int(result.count.sum())
        timings = self.timings
        if speculated:
            flight.rounds = int(speculated.rounds.sum())
            timings.verified_steps += flight.steps
            timings.proposed_tokens += int(speculated.proposed.sum())
            timings.accepted_tokens += flight.tokens - flight.rounds
        timings.decode_steps += flight.steps
        timings.decode_tokens += flight.tokens
        timings.decode_padding += flight.steps * shape.rows - flight.rounds

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
        return view if rows * view * self._view_token_bytes <= MOST_VIEW_BYTES else 0

    @functools.cached_property
    def _view_token_bytes(self) -> int:
        """Of a token in the views of all layers."""
        page = self._cache(self.model, self._kv_dtype, pages=1)
        page_bytes = int(np.prod(page.shape)) * jnp.dtype(page.dtype).itemsize
        return self.model.config.num_layers * page_bytes // self.sizes.page_size

    def lower(self, shape: Shape) -> jax.stages.Lowered:
        """The program of a shape before it is compiled; leaves and devices may be abstract."""
        program, arguments = self._program(shape)
        return program.lower(*arguments)

    def _fetch(self, shape: Shape) -> KeptProgram:
        """The compiled program of a shape; an earlier process may have made it."""
        _, arguments = self._program(shape)
        avals, tree = jax.tree.flatten(arguments)
        models = [m.described for m in (self.model, self._draft) if m]
        return compile_cache.fetch(
            repr((shape, models, self.backend.__name__, tree, avals)),
            lambda mark: self._program(shape, mark)[0].lower(*arguments).compile(),
            devices=self.placement.devices,
        )

    def _program(self, shape: Shape, mark: str = "") -> tuple[Any, tuple]:
        """The jitted function of a shape, and its arguments as ShapeDtypeStructs; with a mark in
        its name.
        """
        caches, leaves, place = self._abstract_caches(), self.leaves, self.placement
        kinds = CUT_SPEC, steps.STATE_SPECS, WHOLE_SPEC
        if isinstance(shape, ScoreShape):
            step, layout, kinds = scoring.score, scoring.score_layout(shape), kinds[::2]
            arguments = [caches]
        elif isinstance(shape, PrefillShape):
            step, layout = steps.prefill, packing.prefill_layout(shape)
            arguments = [caches, self._abstract_state(shape.spec)]
        else:
            step, layout = steps.decode_block, packing.decode_layout(shape)
            memory = caches, self._abstract_views(shape)
            if shape.draft:
                step = functools.partial(speculation.speculative_block, draft=self._draft)
                memory, leaves = (*memory, self._abstract_drafting()), leaves + self._draft_leaves
            arguments = [memory, self._abstract_state(shape.spec)]
        step = functools.partial(step, model=self.model, backend=self.backend, shape=shape)
        step.__name__ = f"{step.func.__name__}_{mark}".rstrip("_")
        leaves, donated = _abstract(leaves), range(1, 1 + len(arguments))
        # Scratch is written only: kept as an argument, it is where the views are made.
        program = place.program(
            step, (specs_of(leaves), *kinds), kinds, donate=donated, keep_unused=True
        )
        return program, (leaves, *place.abstract((*arguments, _ints(layout.size)), kinds))

    def _looped(self, model: Model, leaves: tuple) -> Model:
        return model.in_loops(leaves, platform=self.placement.devices[0].platform)

    def _cache(self, model: Model, dtype: Any, *, pages: int) -> Any:
        """Of a model's layers that share so many pages."""
        heads = model.axis.kv_share(model.config.num_kv_heads)
        sizes = pages, self.sizes.page_size, heads, model.config.head_dim
        cache = self.backend.cache_layer(*sizes, dtype=dtype)
        return jax.tree.map(lambda spec: spec.abstract(), cache)

    def _abstract_caches(self) -> tuple:
        pages, model = self.sizes.num_pages, self.model
        return tuple(self._cache(model, self._kv_dtype, pages=n * pages) for n in model.runs)

    def _abstract_drafting(self) -> tuple:
        pages, model = self.sizes.num_pages, self._draft
        runs = model.runs if model else ()
        return tuple(self._cache(model, self._draft_kv_dtype, pages=n * pages) for n in runs)

    def _abstract_views(self, shape: DecodeShape) -> tuple:
        return steps.view_shapes(self.backend, self._abstract_caches(), shape, self.model.runs)

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
