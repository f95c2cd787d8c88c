"""Proposals of a second, cheaper model that shares the rows' pages: `Drafter`, within a program.

The draft model keeps caches of its own, over the same page tables. It computes a row's text only
when it is asked for proposals: `catch_up` fills in what it has not seen, the prompt at first and
what plain blocks decoded, so a row that is never speculated on costs it nothing. What it has seen
is `RowState.drafted`. Its proposals are sampled with the row's own rules, but penalties, and with
the row's own draws, so that a draft model that agrees with the model also agrees where the model
is random. Read next: `speculation.py`, which verifies them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lepton_jax.engine.row_params import RowParams, SampleSpec
from lepton_jax.engine.sampling import sample
from lepton_jax.engine.steps import RUNNING, RowState, attend_pages
from lepton_jax.kernels.attention import Backend, PagedBatch, decode_batch
from lepton_jax.models.decoder import Decoder

_CATCH_UP = 32  # tokens of a row that are caught up at once


def side_by_side(starts: jax.Array, positions: jax.Array, table: jax.Array) -> PagedBatch:
    """M tokens a row over pages: positions i32 `[B, M]`, from `starts` i32 `[B]` on, -1: none.

    Each row counts as long as if all its tokens were there, because a kernel takes a row's queries
    for its last tokens; what it reads too much is behind every query that matters.
    """
    rows, width = positions.shape
    return PagedBatch(
        positions=positions.reshape(-1),
        rows=jnp.repeat(jnp.arange(rows, dtype=jnp.int32), width),
        page_table=jnp.pad(table, ((0, 0), (0, width))),  # the null page behind the last one
        kv_lens=starts + width,
        cu_q_lens=jnp.arange(rows + 1, dtype=jnp.int32) * width,
        num_seqs=jnp.full((1,), rows, jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class Drafter:
    """The draft model while a block is traced.

    Attributes:
      decoder: the draft model, bound.
      backend: of attention.
      table: i32 `[B, W]`, pages of the rows.
      here: bool `[B]`, the rows whose pages this device's bank has, or True.
      params: of the rows, without penalties; `spec` is theirs.
    """

    decoder: Decoder
    backend: Backend
    table: jax.Array
    here: jax.Array | bool
    params: RowParams
    spec: SampleSpec

    def catch_up(self, caches: tuple, lines: RowState) -> tuple:
        """The caches with all tokens of the running rows but their last ones."""
        running = lines.finish == RUNNING

        def behind(carry):
            seen, _ = carry
            return jnp.any(running & (seen < lines.lengths))

        def go_on(carry):
            seen, caches = carry
            places = seen[:, None] + jnp.arange(_CATCH_UP)
            positions = jnp.where(running[:, None] & (places < lines.lengths[:, None]), places, -1)
            last = lines.texts.shape[1] - 1
            tokens = jnp.take_along_axis(lines.texts, jnp.minimum(places, last), 1)
            batch = side_by_side(jnp.where(running, seen, 0), positions, self.table)
            attend = attend_pages(self.backend, batch, decode=False, here=self.here)
            _, caches = self.decoder(tokens.reshape(-1), batch.positions, caches, attend)
            return jnp.minimum(seen + _CATCH_UP, lines.lengths), caches

        seen = jnp.where(running, lines.drafted, lines.lengths)
        return jax.lax.while_loop(behind, go_on, (seen, caches))[1]

    def propose(self, caches: tuple, lines: RowState, valid: jax.Array) -> tuple[jax.Array, tuple]:
        """Proposals i32[B, draft] and the caches with the keys of all of them.

        `valid` bool[B, 1 + draft]: places that a row may still fill, the first that of its last
        token.
        """
        draft = valid.shape[1] - 1

        def one(place, carry):
            tokens, proposed, caches = carry
            there = jax.lax.dynamic_index_in_dim(valid, place, axis=1, keepdims=False)
            batch = decode_batch(lines.lengths + place, there, self.table)
            attend = attend_pages(self.backend, batch, decode=True, here=self.here)
            hidden, caches = self.decoder(tokens, batch.positions, caches, attend)
            new = sample(
                self.decoder.logits(hidden),
                self.params,
                index=lines.produced + place,
                history=None,
                spec=self.spec,
                axis=self.decoder.axis,
            )
            proposed = jax.lax.dynamic_update_index_in_dim(proposed, new.tokens, place, axis=1)
            return jnp.maximum(new.tokens, 0), proposed, caches

        # One pass more than there are proposals: the last proposal's key is needed if it is right.
        empty = jnp.zeros(valid.shape, jnp.int32)
        _, proposed, caches = jax.lax.fori_loop(0, 1 + draft, one, (lines.tokens, empty, caches))
        return proposed[:, :draft], caches
