"""Speculative decode blocks: a step proposes tokens, verifies them in one pass of the model and
keeps those that plain decoding would have chosen.

Verifying samples every place as `steps.decode_block` would, with the row's own rules, seed and
output position, and accepts a proposal where it is the very token that was sampled there. So the
outputs are those of plain decoding, greedy or sampled, up to the rounding of larger products; for a
proposal made without randomness this is the rejection sampling of Leviathan et al. (2023), with the
same draws. Penalties see the proposals before their place, which are accepted where it counts.
Proposals come from `lookup.py` or `draft_model.py`; how long they are is decided in
`draft_length.py`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.engine import packing
from lepton_jax.engine.draft_model import Drafter, side_by_side
from lepton_jax.engine.lookup import lookup
from lepton_jax.engine.packing import DecodeShape, bits_of
from lepton_jax.engine.row_params import SampleSpec, unpack
from lepton_jax.engine.sampling import History, Sampled, sample
from lepton_jax.engine.steps import (
    RUNNING,
    RowState,
    attend_pages,
    attend_view,
    close_views,
    open_views,
)
from lepton_jax.kernels.attention import Backend
from lepton_jax.models.build import Model
from lepton_jax.models.decoder import Decoder
from lepton_jax.sharding import Axis


def speculative_block(
    leaves: tuple,
    memory: tuple[tuple, tuple, tuple],
    state: RowState,
    packed: jax.Array,
    *,
    model: Model,
    backend: Backend,
    shape: DecodeShape,
    draft: Model | None = None,
) -> tuple[tuple[tuple, tuple, tuple], RowState, jax.Array]:
    """As `steps.decode_block`, with up to `1 + shape.draft` tokens for each row and step.

    With a `draft` model `leaves` has its leaves behind the model's, and the last part of `memory`
    is its caches; otherwise proposals are looked up.
    """
    caches, scratch, drafting = memory
    inputs = packing.decode_layout(shape).split(packed)
    entry, own = state.at(inputs["slots"]), len(model.specs)
    drafter = None
    if draft is not None:
        drafter = _drafter(draft.bind(leaves[own:]), backend, inputs, shape.spec)
        drafting = drafter.catch_up(drafting, entry)
    block = _Block(model.bind(leaves[:own]), backend, shape, inputs, entry, drafter)
    end = jax.lax.while_loop(block.unfinished, block.step, block.begin(caches, drafting))
    caches = block.close(caches, end)
    pieces = dict(
        steps=end.index[None],
        count=end.lines.produced - entry.produced,
        finish=end.lines.finish,
        **end.record,
    )
    result = packing.result_layout(shape).join(pieces)
    lines = end.lines
    if drafter is not None:  # of a row that did not run nothing is known to be drafted
        running = entry.finish == RUNNING
        drafted = jnp.where(running, lines.lengths, lines.drafted)
        lines = dataclasses.replace(lines, drafted=drafted)
    memory = caches, end.working if shape.view else scratch, end.drafting
    return memory, state.put(inputs["slots"], lines), result


def _drafter(
    decoder: Decoder, backend: Backend, inputs: dict[str, jax.Array], spec: SampleSpec
) -> Drafter:
    params = unpack(inputs["params"], spec)
    plain = dataclasses.replace(spec, penalties=False, logprobs=-1)
    table, here = inputs["page_table"], decoder.axis.holds(inputs["banks"])
    return Drafter(decoder, backend, table=table, here=here, params=params, spec=plain)


class _Step(NamedTuple):
    """What a block's loop carries.

    `places` i32[B, S]: the position of the token at each place of the views, -1 where there is none
    or it was rejected; `[B, 0]` without views. `record`: the result's pieces so far. `drafting`:
    the draft model's caches, () without one.
    """

    index: jax.Array
    lines: RowState
    working: tuple
    places: jax.Array
    record: dict[str, jax.Array]
    drafting: tuple


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block while it is traced: what stays the same in all its steps."""

    decoder: Decoder
    backend: Backend
    shape: DecodeShape
    inputs: dict[str, jax.Array]
    entry: RowState
    drafter: Drafter | None

    @property
    def here(self) -> jax.Array | bool:
        """The rows whose cache this device's bank has."""
        return self.decoder.axis.holds(self.inputs["banks"])

    def begin(self, caches: tuple, drafting: tuple) -> _Step:
        shape, lengths = self.shape, self.entry.lengths
        runs = tuple(len(run.layers) for run in self.decoder.runs)
        how = dict(lengths=lengths, shape=shape, runs=runs)
        working = open_views(self.backend, caches, self.inputs["page_table"], **how)
        places = jnp.zeros((shape.rows, 0), jnp.int32)
        if shape.view:
            places = _first_places(lengths, shape)
        record = _record(self.entry, shape)
        return _Step(jnp.int32(0), self.entry, working, places, record, drafting)

    def unfinished(self, carry: _Step) -> jax.Array:
        running = jnp.any(carry.lines.finish == RUNNING)
        return (carry.index < self.inputs["steps"][0]) & running

    def step(self, carry: _Step) -> _Step:
        """Proposes, verifies and accepts."""
        lines, shape, limit = carry.lines, self.shape, self.inputs["limit"]
        width, axis = 1 + shape.draft, self.decoder.axis
        ahead = jnp.arange(width)
        running, index = lines.finish == RUNNING, lines.produced[:, None] + ahead
        valid = running[:, None] & (index < limit[:, None])
        positions = jnp.where(valid, lines.lengths[:, None] + ahead, -1)
        proposed, drafting = self._propose(carry, valid)
        tokens = jnp.concatenate([lines.tokens[:, None], proposed], 1)
        hidden, carry = self._forward(carry, jnp.maximum(tokens, 0), positions)
        params = unpack(self.inputs["params"], shape.spec)
        new = sample(
            self.decoder.logits(hidden),
            jax.tree.map(lambda a: jnp.repeat(a, width, 0), params),
            index=index.reshape(-1),
            history=_histories(lines.history, proposed, axis),
            spec=shape.spec,
            axis=axis,
        )
        new = jax.tree.map(lambda a: a.reshape(-1, width, *a.shape[1:]), new)
        accepted = _accepted(new, proposed, valid)
        kept = valid & (ahead <= accepted[:, None])
        done = lines.produced - self.entry.produced
        record = _write_record(carry.record, new, done, kept=kept)
        return carry._replace(
            index=carry.index + 1,
            lines=_advance(lines, new, kept, limit=limit, axis=axis),
            places=self._place(carry, jnp.where(kept, positions, -1)),
            record=_count(record, proposed, valid=valid),
            drafting=drafting,
        )

    def close(self, caches: tuple, end: _Step) -> tuple:
        """The caches after the block: from the views only what the rows kept, in order."""
        lengths = self.entry.lengths
        return close_views(
            self.backend,
            caches,
            end.working,
            self.inputs["page_table"],
            lengths=lengths,
            shape=self.shape,
            written=jnp.where(self.here, end.lines.lengths - lengths, 0),
            order=_kept_first(end.places[:, self.shape.view :]),
        )

    def _propose(self, carry: _Step, valid: jax.Array) -> tuple[jax.Array, tuple]:
        """Proposals i32[B, draft], -1: none, and the draft model's caches."""
        lines = carry.lines
        if self.drafter is not None:
            return self.drafter.propose(carry.drafting, lines, valid)
        return lookup(lines.texts, lines.lengths, self.shape.draft), carry.drafting

    def _forward(
        self, carry: _Step, tokens: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, _Step]:
        """Hidden states of tokens `[B, 1 + draft]`, which go into the caches or views."""
        if self.shape.view:
            carry = carry._replace(places=self._place(carry, positions))
            span = carry.places, positions, self._next_place(carry)
            attend = attend_view(self.backend.verify_view, span, here=self.here)
        else:
            running, lengths = carry.lines.finish == RUNNING, carry.lines.lengths
            starts = jnp.where(running, lengths, 0)
            batch = side_by_side(starts, positions, self.inputs["page_table"])
            attend = attend_pages(self.backend, batch, decode=False, here=self.here)
        hidden, working = self.decoder(
            tokens.reshape(-1), positions.reshape(-1), carry.working, attend
        )
        return hidden, carry._replace(working=working)

    def _next_place(self, carry: _Step) -> jax.Array:
        return self.shape.view + carry.index * (1 + self.shape.draft)

    def _place(self, carry: _Step, positions: jax.Array) -> jax.Array:
        """The places with this step's positions."""
        if not self.shape.view:
            return carry.places
        return jax.lax.dynamic_update_slice(carry.places, positions, (0, self._next_place(carry)))


def _histories(history: History | None, proposed: jax.Array, axis: Axis) -> History | None:
    """What penalties see at each place `[B * (1 + draft), V]`: the proposals before it too."""
    if history is None:
        return None
    rows, draft = proposed.shape
    width = 1 + draft
    history = jax.tree.map(lambda a: jnp.repeat(a, width, 0), history)
    before = jnp.arange(draft) < jnp.arange(width)[:, None]  # [1 + draft, draft]
    proposed = axis.local(proposed, history.prompt_seen.shape[1])
    tokens = jnp.where(before, proposed[:, None], -1)
    lines = jnp.broadcast_to(jnp.arange(rows * width)[:, None], (rows * width, draft))
    return history.count_output(lines.reshape(-1), tokens.reshape(-1))


def _accepted(new: Sampled, proposed: jax.Array, valid: jax.Array) -> jax.Array:
    """i32[B], how many proposals are what was sampled; none behind a token that ends the row."""
    same = (new.tokens[:, :-1] == proposed) & ~new.stopped[:, :-1] & valid[:, 1:]
    return jnp.sum(jnp.cumprod(same.astype(jnp.int32), axis=1), axis=1)


def _advance(
    lines: RowState, new: Sampled, kept: jax.Array, *, limit: jax.Array, axis: Axis
) -> RowState:
    """The rows after the tokens that they keep, bool[B, 1 + draft]: the first ones or none."""
    count = jnp.sum(kept.astype(jnp.int32), 1)
    running, last = count > 0, jnp.maximum(count - 1, 0)

    def final(values):
        return values[jnp.arange(values.shape[0]), last]

    before = jnp.where(kept, lines.lengths[:, None] + 1 + jnp.arange(kept.shape[1]), -1)
    history = lines.history
    if history is not None:
        line = jnp.broadcast_to(jnp.arange(kept.shape[0])[:, None], kept.shape)
        tokens = axis.local(new.tokens, history.prompt_seen.shape[1])
        tokens = jnp.where(kept, tokens, -1)
        history = history.count_output(line.reshape(-1), tokens.reshape(-1))
    lines = dataclasses.replace(
        lines,
        lengths=lines.lengths + count,
        produced=lines.produced + jnp.maximum(count - 1, 0),
        history=history,
    )
    lines = lines.noted(before, new.tokens)
    return lines.sampled(jax.tree.map(final, new), running=running, limit=limit)


def _record(entry: RowState, shape: DecodeShape) -> dict[str, jax.Array]:
    """The per-token pieces of the result with the entry tokens at place 0, and zero counts."""
    layout = packing.result_layout(shape)
    pieces = layout.split(jnp.zeros(layout.size, jnp.int32))
    for name in ("steps", "count", "finish"):
        del pieces[name]
    names = [name for name in pieces if pieces[name].ndim > 1]
    return pieces | {n: pieces[n].at[:, 0].set(bits_of(getattr(entry, n))) for n in names}


def _write_record(record: dict, new: Sampled, done: jax.Array, *, kept: jax.Array) -> dict:
    """The kept tokens behind the `done` `[B]` ones of this block."""
    lines, ahead = jnp.arange(kept.shape[0])[:, None], jnp.arange(kept.shape[1])
    place = jnp.where(kept, 1 + done[:, None] + ahead, record["tokens"].shape[1])
    return record | {
        name: record[name].at[lines, place].set(bits_of(getattr(new, name)), mode="drop")
        for name in record
        if record[name].ndim > 1
    }


def _count(record: dict, proposed: jax.Array, *, valid: jax.Array) -> dict:
    """The counts of `request.Speculated` after one more step."""
    made = jnp.sum(valid[:, 1:] & (proposed >= 0), 1)
    new = dict(rounds=valid[:, 0], proposed=made)
    return record | {name: record[name] + values for name, values in new.items()}


def _first_places(lengths: jax.Array, shape: DecodeShape) -> jax.Array:
    """Positions of a new view's places i32[B, view + tail]: each row's text ends at `view`."""
    places = jnp.arange(shape.view) - shape.view + lengths[:, None]
    places = jnp.maximum(places, -1).astype(jnp.int32)
    return jnp.pad(places, ((0, 0), (0, shape.tail)), constant_values=-1)


def _kept_first(tail: jax.Array) -> jax.Array:
    """The order of a view's new tokens, by their positions i32[B, tail], -1 where rejected, that
    puts those first which were kept.
    """
    return jnp.argsort(jnp.where(tail < 0, jnp.iinfo(jnp.int32).max, tail), axis=1)
