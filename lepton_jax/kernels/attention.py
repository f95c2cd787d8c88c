"""Attention behind one door: what a step's batch looks like, and which backend serves a platform.

A backend is a module with `Q_TILE`, `BLOCKS`, `cache_layer`, `write` and `attend`:
`attention_xla.py` (CPU and GPU), `attention_tpu.py` (Pallas: jax's ragged paged attention, and a
kernel of our own for int8 caches), and `attention_reference.py` (plain jnp without blocks, what the
others are tested against).
All speak of the same paged cache: for each layer an array, or a tree of them where it is quantized
(`kv_cache.py`), cut into pages of Z tokens, page 0 a null page.
"""

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class PagedBatch:
    """Which tokens a step computes and where their rows keep keys and values.

    Attributes:
      positions: int32 `[T]`, place of each token in its row; -1 is padding.
      rows: int32 `[T]`, the line of `page_table` that each token belongs to.
      page_table: int32 `[R, W]`, page ids in order; 0 is the null page.
      kv_lens: int32 `[R]`, tokens in the cache once this step's keys and values are written; 0 is
      idle.
      cu_q_lens: int32 `[R + 1]`, prefix sums of the query tokens of each row.
      num_seqs: int32 `[1]`, rows in use.
    """

    positions: jax.Array
    rows: jax.Array
    page_table: jax.Array
    kv_lens: jax.Array
    cu_q_lens: jax.Array
    num_seqs: jax.Array


jax.tree_util.register_dataclass(
    PagedBatch,
    data_fields=["positions", "rows", "page_table", "kv_lens", "cu_q_lens", "num_seqs"],
    meta_fields=[],
)


def decode_batch(lengths: jax.Array, active: jax.Array, page_table: jax.Array) -> PagedBatch:
    """One new token for each row.

    Args:
      lengths: int32 `[B]`, tokens already cached, which is the position of the new one.
      active: bool `[B]`; the others are idle: they write to the null page and read nothing.
      page_table: int32 `[B, W]`.
    """
    rows = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    return PagedBatch(
        positions=jnp.where(active, lengths, -1),
        rows=rows,
        page_table=page_table,
        kv_lens=jnp.where(active, lengths + 1, 0),
        cu_q_lens=jnp.arange(lengths.shape[0] + 1, dtype=jnp.int32),
        num_seqs=jnp.full((1,), lengths.shape[0], jnp.int32),
    )


def held(batch: PagedBatch, here: jax.Array | bool) -> PagedBatch:
    """The batch without the rows whose cache isn't `here`, bool `[R]` or True: these are idle."""
    if here is True:
        return batch
    return dataclasses.replace(
        batch,
        positions=jnp.where(here[batch.rows], batch.positions, -1),
        kv_lens=jnp.where(here, batch.kv_lens, 0),
    )


def at_layer(batch: PagedBatch, index: jax.Array | int, pages: int) -> PagedBatch:
    """The batch in the `index`-th of the layers whose caches of so many pages lie one behind the
    other.
    """
    return dataclasses.replace(batch, page_table=batch.page_table + index * pages)


def is_limited(window: jax.Array | int) -> bool:
    """Whether queries see a window only: a size that is an array is that of a layer in a loop, and
    larger than any text where there is none.
    """
    return not isinstance(window, int) or window > 0


@dataclasses.dataclass(frozen=True)
class Blocked:
    """A backend that attends over `block` cached tokens at a time, and is the module else."""

    module: ModuleType
    block: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    @property
    def __name__(self) -> str:
        return f"{self.module.__name__}/{self.block}"

    def attend(self, *operands: Any, **options: Any) -> jax.Array:
        """That of the module, in these blocks."""
        return self.module.attend(*operands, block=self.block, **options)


Backend = ModuleType | Blocked


def backend_for(platform: str, block: int = 0) -> Backend:
    """The attention backend of a platform name as jax gives it ("cpu", "gpu", "tpu").

    `block`: cached tokens to attend over at a time; 0: the first of the backend's `BLOCKS`, which
    are those that may be worth a try.
    """
    if platform == "tpu":
        from lepton_jax.kernels import attention_tpu as module  # imports Pallas: only where it runs
    else:
        from lepton_jax.kernels import attention_xla as module
    return Blocked(module, block) if block else module
