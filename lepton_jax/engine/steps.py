"""The two programs of the engine: `prefill` and `decode_block`, pure functions that the runner
compiles.

`prefill` computes a packed batch of prompt chunks, writes their keys and values, and samples the
next token of the rows whose prompt ends here. `decode_block` runs up to k steps for a set of rows
and stops early when all are done. Between programs everything that depends on sampled tokens stays
on the device in `RowState`, so the host can schedule a block before it has read the one before.
Read next: `packing.py` (inputs), `sampling.py`, `runner.py`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lepton_jax.engine import packing
from lepton_jax.engine.packing import DecodeShape, PrefillShape, bits_of
from lepton_jax.engine.row_params import SampleSpec, unpack
from lepton_jax.engine.sampling import History, Sampled, sample
from lepton_jax.kernels.attention import Backend, PagedBatch, at_layer, decode_batch, held
from lepton_jax.models.build import Model
from lepton_jax.models.runs import LayerOf
from lepton_jax.sharding import Axis
from lepton_jax.sharding.placement import CUT_SPEC, WHOLE_SPEC

RUNNING, STOPPED, LENGTH = 0, 1, 2  # finish codes
Runs = tuple[int, ...]  # layers that share each cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowState:
    """What the device remembers of each slot (first dimension: slots).

    Attributes:
      tokens: int32, the token sampled last; its key and value are not cached yet.
      lengths: int32, tokens cached.
      produced: int32, outputs sampled so far.
      finish: int32, RUNNING, STOPPED or LENGTH.
      logprob, top_ids, top_logprobs: of that last token, `[slots]`, `[slots, n]`; None where no row
      asks.
      history: what penalties look at; None where no row asks.
      texts: int32 `[slots, text]`, the row's tokens from its first, of which `lengths + 1` are
      known; None without speculation.
      drafted: int32, tokens that the draft model has cached; None where there is none.
    """

    tokens: jax.Array
    lengths: jax.Array
    produced: jax.Array
    finish: jax.Array
    logprob: jax.Array | None = None
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None
    history: History | None = None
    texts: jax.Array | None = None
    drafted: jax.Array | None = None

    @classmethod
    def zeros(cls, slots: int, vocab: int, spec: SampleSpec) -> "RowState":
        ints = [jnp.zeros(slots, jnp.int32) for _ in range(3)]
        state = cls(*ints, finish=jnp.full(slots, LENGTH, jnp.int32))
        if spec.logprobs >= 0:
            tops = (slots, spec.logprobs)
            state = dataclasses.replace(
                state,
                logprob=jnp.zeros(slots),
                top_ids=jnp.zeros(tops, jnp.int32),
                top_logprobs=jnp.zeros(tops),
            )
        if spec.penalties:
            state = dataclasses.replace(state, history=History.zeros(slots, vocab))
        if spec.text:
            state = dataclasses.replace(state, texts=jnp.zeros((slots, spec.text), jnp.int32))
        if spec.drafted:
            state = dataclasses.replace(state, drafted=jnp.zeros(slots, jnp.int32))
        return state

    def filled_from(self, older: "RowState") -> "RowState":
        """This state with what an older one holds, which may lack pieces or have fewer
        alternatives.
        """
        copied = {}
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(older, field.name)
            if field.name.startswith("top_") and theirs is not None:
                theirs = mine.at[:, : theirs.shape[1]].set(theirs)
            copied[field.name] = mine if theirs is None else theirs
        return RowState(**copied)

    def at(self, slots: jax.Array) -> "RowState":
        """The lines of some slots; a slot beyond the last gives a finished row."""
        lines = jax.tree.map(lambda a: jnp.take(a, slots, axis=0, mode="clip"), self)
        known = slots < self.tokens.shape[0]
        return dataclasses.replace(lines, finish=jnp.where(known, lines.finish, LENGTH))

    def put(self, slots: jax.Array, lines: "RowState") -> "RowState":
        """These lines in their slots; slots beyond the last are dropped."""
        return jax.tree.map(lambda a, b: a.at[slots].set(b, mode="drop"), self, lines)

    def noted(self, places: jax.Array, tokens: jax.Array) -> "RowState":
        """With tokens `[slots, n]` at these places of the texts; a place of -1 is dropped."""
        if self.texts is None:
            return self
        places = jnp.where(places < 0, self.texts.shape[1], places)
        lines = jnp.arange(places.shape[0])[:, None]
        texts = self.texts.at[lines, places].set(tokens, mode="drop")
        return dataclasses.replace(self, texts=texts)

    def sampled(self, new: Sampled, *, running: jax.Array, limit: jax.Array) -> "RowState":
        """After one more token for the running rows; the others stay as they are."""
        produced = self.produced + running
        done = jnp.where(new.stopped, STOPPED, jnp.where(produced >= limit, LENGTH, RUNNING))

        def pick(old, fresh):
            return jnp.where(running.reshape(-1, *[1] * (old.ndim - 1)), fresh, old)

        state = dataclasses.replace(
            self,
            tokens=pick(self.tokens, new.tokens),
            produced=produced,
            finish=pick(self.finish, done),
        ).noted(jnp.where(running, self.lengths, -1)[:, None], new.tokens[:, None])
        if self.logprob is None:
            return state
        return dataclasses.replace(
            state,
            logprob=pick(self.logprob, new.logprob),
            top_ids=pick(self.top_ids, new.top_ids),
            top_logprobs=pick(self.top_logprobs, new.top_logprobs),
        )


# What of the state each device has of its own where several share a model: its share of V.
STATE_SPECS = RowState(*[WHOLE_SPEC] * 7, history=CUT_SPEC, texts=WHOLE_SPEC, drafted=WHOLE_SPEC)


def prefill(
    leaves: tuple,
    caches: tuple,
    state: RowState,
    packed: jax.Array,
    *,
    model: Model,
    backend: Backend,
    shape: PrefillShape,
) -> tuple[tuple, RowState, jax.Array]:
    """Computes packed prompt chunks; rows whose prompt ends here get their next token in `state`.

    The third result is what was sampled, laid out by `packing.sampled_layout`.
    """
    inputs = packing.prefill_layout(shape).split(packed)
    decoder = model.bind(leaves)
    batch = PagedBatch(
        **{field.name: inputs[field.name] for field in dataclasses.fields(PagedBatch)}
    )
    attend = attend_pages(backend, batch, decode=False, here=model.axis.holds(inputs["banks"]))
    hidden, caches = decoder(inputs["tokens"], inputs["positions"], caches, attend)
    logits = decoder.logits(hidden[inputs["last"]])

    slots, final = inputs["slots"], inputs["final"] == 1
    if shape.spec.penalties:
        history = _count_chunks(state.history, inputs, axis=model.axis)
        state = dataclasses.replace(state, history=history)
    lines = state.at(slots)
    if shape.spec.text:
        lines = dataclasses.replace(lines, texts=inputs["texts"])
    if shape.spec.drafted:
        lines = dataclasses.replace(lines, drafted=jnp.zeros_like(slots))
    new = sample(
        logits,
        unpack(inputs["params"], shape.spec),
        index=inputs["produced"],
        history=lines.history,
        spec=shape.spec,
        axis=model.axis,
        allowed=_allowed(inputs, logits.shape[-1], model.axis),
    )
    lines = dataclasses.replace(lines, lengths=inputs["kv_lens"], produced=inputs["produced"])
    lines = lines.sampled(new, running=final, limit=inputs["limit"])
    lines = _count_sampled(lines, counted=final, axis=model.axis)
    state = state.put(jnp.where(final, slots, state.tokens.shape[0]), lines)
    return caches, state, _sampled_lines(lines, shape)


def _allowed(inputs: dict, share: int, axis: Axis) -> jax.Array | None:
    """bool[R, V] of the mask in a prefill's inputs; None where it has none."""
    if "allowed" not in inputs:
        return None
    bits = (inputs["allowed"][:, :, None] >> jnp.arange(32)) & 1
    return axis.mine(bits.reshape(bits.shape[0], -1) == 1, share)


def _sampled_lines(lines: RowState, shape: PrefillShape) -> jax.Array:
    names = ("tokens", "logprob", "top_ids", "top_logprobs")
    pieces = {name: getattr(lines, name) for name in names if getattr(lines, name) is not None}
    bits = {name: bits_of(values) for name, values in pieces.items()}
    return packing.sampled_layout(shape).join(dict(bits, finish=lines.finish))


def decode_block(
    leaves: tuple,
    memory: tuple[tuple, tuple],
    state: RowState,
    packed: jax.Array,
    *,
    model: Model,
    backend: Backend,
    shape: DecodeShape,
) -> tuple[tuple[tuple, tuple], RowState, jax.Array]:
    """Up to `steps` tokens for each listed row. The third result is laid out by
    `packing.result_layout`; `memory` is the caches and scratch, which begins as zeros like
    `view_shapes(...)`.
    """
    caches, scratch = memory
    inputs = packing.decode_layout(shape).split(packed)
    steps, table = inputs["steps"][0], inputs["page_table"]
    decoder, params = model.bind(leaves), unpack(inputs["params"], shape.spec)
    entry, here = state.at(inputs["slots"]), model.axis.holds(inputs["banks"])

    def step(carry):
        index, lines, working, record = carry
        running = lines.finish == RUNNING
        batch = decode_batch(lines.lengths, running, table)
        if shape.view:
            span = shape.view - entry.lengths, shape.view + index
            attend = attend_view(backend.attend_view, span, here=here)
        else:
            attend = attend_pages(backend, batch, decode=True, here=here)
        hidden, working = decoder(lines.tokens, batch.positions, working, attend)
        new = sample(
            decoder.logits(hidden),
            params,
            index=lines.produced,
            history=lines.history,
            spec=shape.spec,
            axis=model.axis,
        )
        lines = dataclasses.replace(lines, lengths=lines.lengths + running)
        lines = lines.sampled(new, running=running, limit=inputs["limit"])
        lines = _count_sampled(lines, counted=running, axis=model.axis)
        return index + 1, lines, working, _write_record(record, lines, index + 1)

    def unfinished(carry):
        index, lines, _, _ = carry
        return (index < steps) & jnp.any(lines.finish == RUNNING)

    record = _write_record(_empty_record(shape), entry, 0)
    how = dict(lengths=entry.lengths, shape=shape)
    working = open_views(backend, caches, table, runs=model.runs, **how)
    ran, lines, working, record = jax.lax.while_loop(
        unfinished, step, (jnp.int32(0), entry, working, record)
    )
    written = jnp.where(here, lines.lengths - entry.lengths, 0)
    caches = close_views(backend, caches, working, table, written=written, **how)
    count = lines.produced - entry.produced
    pieces = dict(steps=ran[None], count=count, finish=lines.finish, **record)
    result = packing.result_layout(shape).join(pieces)
    memory = caches, working if shape.view else scratch
    return memory, state.put(inputs["slots"], lines), result


def view_shapes(backend: Backend, caches: tuple, shape: DecodeShape, runs: Runs) -> tuple:
    """The scratch of `decode_block` as ShapeDtypeStructs: memory for the views of each run of
    layers, or () for none.

    Fresh memory for every block would cost a CPU its page faults: 50,000 a block of 32 rows, a
    sixth of its time (2026-11-24).
    """
    if not shape.view:
        return ()

    def views(caches):
        table = jnp.zeros((shape.rows, shape.pages), jnp.int32)
        lengths = jnp.zeros(shape.rows, jnp.int32)
        return open_views(backend, caches, table, lengths=lengths, shape=shape, runs=runs)

    return jax.eval_shape(views, caches)


def attend_pages(backend: Backend, batch: PagedBatch, *, decode: bool, here: jax.Array | bool):
    """The decoder's `attend` over a paged cache, of the rows that are `here`."""
    everywhere = held(batch, here)

    def attend(q, k, v, cache, *, layer: LayerOf | None = None, **options):
        batch = everywhere
        if layer is not None:
            batch = at_layer(batch, layer.index, cache.shape[0] // layer.count)
        cache = backend.write(cache, k, v, batch)
        return backend.attend(q, cache, batch, decode=decode, **options), cache

    return attend


def attend_view(attend: Callable, span: tuple, *, here: jax.Array | bool):
    """The decoder's `attend` over a view, by a backend's function of these places; of the rows
    `[B]` that are `here`.
    """

    def attend_here(q, k, v, view, *, layer: LayerOf | None = None, **options):
        place = 0 if layer is None else layer.index
        out, view = attend(q, k, v, view, span=(*span, place), **options)
        if here is not True:
            here_too = jnp.repeat(here, out.shape[0] // here.shape[0])  # several tokens a row
            out = jnp.where(here_too[:, None, None, None], out, 0)
        return out, view

    return attend_here


def open_views(
    backend: Backend, caches: tuple, table: jax.Array, *, lengths, shape: DecodeShape, runs: Runs
) -> tuple:
    """What the steps of a block work on: a view of each cache with room for the block's new tokens,
    or where the shape has no views the caches themselves.
    """
    if not shape.view:
        return caches
    places = dict(tokens=shape.view, steps=shape.tail)
    return tuple(
        backend.open_view(cache, table, lengths, layers=layers, **places)
        for cache, layers in zip(caches, runs, strict=True)
    )


def close_views(
    backend: Backend,
    caches: tuple,
    working: tuple,
    table: jax.Array,
    *,
    lengths,
    shape: DecodeShape,
    **kept,
) -> tuple:
    """The caches after a block, with the tokens that `kept` says: see a backend's `close_view`."""
    if not shape.view:
        return working
    return tuple(
        backend.close_view(cache, view, table, lengths, **kept)
        for cache, view in zip(caches, working, strict=True)
    )


def _empty_record(shape: DecodeShape) -> dict[str, jax.Array]:
    """int32 `[B, 1 + steps, ...]` for each per-token piece of the result."""
    names = ("tokens", "logprob", "top_ids", "top_logprobs")
    pieces = packing.result_layout(shape).split(jnp.zeros(packing.result_layout(shape).size, int))
    return {name: jnp.zeros(pieces[name].shape, jnp.int32) for name in names if name in pieces}


def _write_record(record: dict, lines: RowState, index) -> dict[str, jax.Array]:
    """The lines' last tokens at place `index` of the record."""
    return {
        name: jax.lax.dynamic_update_index_in_dim(
            record[name], bits_of(getattr(lines, name)), index, axis=1
        )
        for name in record
    }


def _count_chunks(history: History, inputs: dict, *, axis: Axis) -> History:
    """Tokens of the chunks: prompt up to `outputs_from`, a preempted row's own outputs after it."""
    row, position = inputs["rows"], inputs["positions"]
    history = history.clear(jnp.where(inputs["first"] == 1, inputs["slots"], -1))
    slots = inputs["slots"][row]
    is_output = position >= inputs["outputs_from"][row]
    tokens = axis.local(inputs["tokens"], history.prompt_seen.shape[1])
    tokens = jnp.where((position < 0) | (inputs["first"][row] == 2), -1, tokens)
    history = history.count_prompt(slots, jnp.where(is_output, -1, tokens))
    return history.count_output(slots, jnp.where(is_output, tokens, -1))


def _count_sampled(lines: RowState, *, counted: jax.Array, axis: Axis) -> RowState:
    if lines.history is None:
        return lines
    tokens = axis.local(lines.tokens, lines.history.prompt_seen.shape[1])
    rows = jnp.arange(lines.tokens.shape[0], dtype=jnp.int32)
    history = lines.history.count_output(rows, jnp.where(counted, tokens, -1))
    return dataclasses.replace(lines, history=history)
