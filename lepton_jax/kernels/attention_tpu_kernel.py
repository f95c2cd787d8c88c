"""The Pallas kernel for TPU behind `attention_tpu_int8.py`: tiles of queries visit their pages.

A grid step is a tile. Its row's blocks of pages come one after the other into one half of a double
buffer while the other half is worked on, the next tile's first block among them, so that the memory
never waits. Blocks are fetched as they are stored and worked on in parts, those that a query sees;
a word of 32 bits in them holds two pairs of a key's and a value's byte, which are taken apart in
registers. A key's scale multiplies its scores and a value's scale its weights, so no number of the
cache is ever stored wide.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.kernels.attention_reference import MASKED
from lepton_jax.kernels.kv_cache import QuantizedKV
from lepton_jax.tensors import vector_memory

LANES, SUBLANES = 128, 8  # of a register of 32 bits


class Schedule(NamedTuple):
    """What M tiles visit, int32 `[M]` each.

    Attributes:
      row: of the page table.
      first, stop: position of the tile's first query, and that after its last one.
      begin, end: the first block, and the one after the last.
      before: blocks that the tiles before visit.
      following: int32 `[M + 1]`: the first tile that visits any block, then for each tile the next
        one that does; M: none.
      used: int32 `[1]`, tiles of which the others come behind: these are left as they are.
    """

    row: jax.Array
    first: jax.Array
    stop: jax.Array
    begin: jax.Array
    end: jax.Array
    before: jax.Array
    following: jax.Array
    used: jax.Array


@dataclasses.dataclass(frozen=True)
class Heads:
    """What is the same for all tiles.

    Attributes:
      count: K; `lines` of 128 lanes of each, A; `group` G.
      scale, window, soft_cap: as of `attention_reference.attend`.
      page_size: Z; `pages` fetched at a time, a multiple of `part`, worked on at a time.
      phases: tokens that share a word; then a head's are worked on in as many turns.
    """

    count: int
    lines: int
    group: int
    scale: float
    window: int
    soft_cap: float
    page_size: int
    pages: int
    part: int
    phases: int

    @property
    def span(self) -> int:
        """Tokens of a block."""
        return self.page_size * self.pages


@functools.partial(jax.jit, static_argnames=("heads", "interpret"))  # traced once for all layers
def attend_tiles(
    queries: jax.Array,
    cache: QuantizedKV,
    schedule: Schedule,
    page_table: jax.Array,
    *,
    heads: Heads,
    interpret: bool = False,
) -> jax.Array:
    """Attention of bfloat16 queries `[M, K * A, tile * G, 128]` over a cache of one layer in the
    layout of `attention_tpu_int8.py`; in the same shape. What stands for no query may be anything.
    `interpret` runs on any platform, slowly.
    """
    from jax.experimental import pallas as pl  # takes a second
    from jax.experimental.pallas import tpu as pltpu

    tiles, _, lines, _ = queries.shape
    cache = vector_memory.kept_out(cache)

    def of_tile(tile, *plan):  # those that aren't used stay with the last one: nothing is copied
        used = Schedule(*plan[:-1]).used[0]
        return jnp.minimum(tile, jnp.maximum(used - 1, 0)), 0, 0, 0

    one_tile = pl.BlockSpec((1, *queries.shape[1:]), of_tile)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_visit, heads=heads),
        out_shape=jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(schedule) + 1,
            grid=(tiles,),
            in_specs=[one_tile, anywhere, anywhere],
            out_specs=one_tile,
            scratch_shapes=[
                pltpu.VMEM((2, heads.pages, *cache.values.shape[1:]), cache.values.dtype),
                pltpu.VMEM((2, heads.pages, *cache.scale.shape[1:]), cache.scale.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((heads.count, lines, LANES), jnp.float32),
                pltpu.VMEM((heads.count, lines, LANES), jnp.float32),
                pltpu.VMEM((heads.count * heads.lines, lines, LANES), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vector_memory.claim()
        ),
        interpret=interpret,
        name="paged_attention_int8",
    )(*schedule, page_table, queries, cache.values, cache.scale)


def _visit(*references, heads: Heads):
    """One tile: fetches its blocks in turns with the work on them."""
    from jax.experimental import pallas as pl

    *plan, table, q, values, scales, out, value_halves, scale_halves, arrived = references[:-3]
    schedule, state = Schedule(*plan), references[-3:]
    tile, tiles = pl.program_id(0), pl.num_programs(0)
    copies = _Copies(
        schedule,
        table,
        (values, scales),
        (value_halves, scale_halves),
        arrived=arrived,
        page_size=heads.page_size,
    )

    first, stop = schedule.first[tile], schedule.stop[tile]
    part_tokens = heads.part * heads.page_size

    @pl.when((tile == 0) & (schedule.following[0] < tiles))
    def _():
        copies.start(schedule.following[0], 0)

    def visit(block, carry):
        begin, following = schedule.begin[tile], schedule.following[tile + 1]
        last = block + 1 == schedule.end[tile]

        @pl.when(~last | (following < tiles))
        def _():
            copies.start(jnp.where(last, following, tile), jnp.where(last, 0, block + 1 - begin))

        fetched, place = copies.wait(tile, block - begin), block * heads.span
        nearest = jnp.maximum(first - heads.window + 1 - place, 0) if heads.window else 0
        end = jnp.minimum(pl.cdiv(stop - place, part_tokens), heads.pages // heads.part)

        def work(part, carry):
            pages = [array.at[pl.ds(part * heads.part, heads.part)] for array in fetched]
            place_of_part = place + part * part_tokens
            _attend_part(q, pages, state, place=place_of_part, first=first, heads=heads)
            return carry

        return jax.lax.fori_loop(nearest // part_tokens, end, work, carry)

    @pl.when(tile < schedule.used[0])
    def _():
        for array, value in zip(state, (MASKED, 0, 0), strict=True):
            array[...] = jnp.full_like(array, value)
        jax.lax.fori_loop(schedule.begin[tile], schedule.end[tile], visit, 0)
        _, total, mixed = state
        for line in range(heads.count * heads.lines):
            sums = total[line // heads.lines]
            found = mixed[line] / jnp.where(sums > 0, sums, 1)
            out[0, line] = found.astype(out.dtype)


@dataclasses.dataclass(frozen=True)
class _Copies:
    """The copies of tiles' blocks, a tile's `visit`-th at a time: pages up to its last query.

    Attributes:
      schedule, table: of the kernel.
      sources: values and scales; `halves`, of each two places for a block.
      arrived: a semaphore for each half.
      page_size: Z.
    """

    schedule: Schedule
    table: Any
    sources: tuple
    halves: tuple
    arrived: Any
    page_size: int

    def start(self, tile, visit) -> None:
        self._each(tile, visit, lambda copy: copy.start())

    def wait(self, tile, visit) -> list:
        """The block, once it is there."""
        self._each(tile, visit, lambda copy: copy.wait())
        return [half.at[self._half(tile, visit)] for half in self.halves]

    def _half(self, tile, visit):
        return (self.schedule.before[tile] + visit) % 2

    def _each(self, tile, visit, act: Callable) -> None:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        half, pages = self._half(tile, visit), self.halves[0].shape[1]
        row, first = self.schedule.row[tile], (self.schedule.begin[tile] + visit) * pages
        held = pl.cdiv(self.schedule.stop[tile], self.page_size)
        for place in range(pages):

            @pl.when(first + place < held)
            def _(place=place):
                page = self.table[row, first + place]
                for source, halves in zip(self.sources, self.halves, strict=True):
                    to = halves.at[half, place]
                    act(pltpu.make_async_copy(source.at[page], to, self.arrived.at[half]))


def _attend_part(q, pages, state, *, place, first, heads: Heads):
    """Adds the tokens of some pages, from `place` on, to what the queries have found, a running
    softmax.
    """
    values, scales = pages
    scales = _side_by_side(scales, heads.page_size // heads.phases)
    pairs = _pairs(values, heads)
    here = first + jax.lax.broadcasted_iota(jnp.int32, (q.shape[2], 1), 0) // heads.group
    tokens = heads.part * heads.page_size // heads.phases
    ahead = heads.phases * jax.lax.broadcasted_iota(jnp.int32, (1, tokens), 1)
    for head, phase in itertools.product(range(heads.count), range(heads.phases)):
        places = place + ahead + phase
        seen = places <= here
        if heads.window:
            seen &= places > here - heads.window
        line = 2 * (phase * heads.count + head)
        known = [scales[line + n : line + n + 1] for n in (0, 1)]
        own = [next(pairs) for _ in range(heads.lines)]
        _attend_head(q, head, own, state, scales=known, seen=seen, heads=heads)


def _attend_head(q, head: int, pairs: list, state, *, scales: list, seen, heads: Heads):
    """Adds tokens of one head: pairs `[tokens, 128]`, scales `[1, tokens]` of keys and values, and
    who is seen by whom, `[queries, tokens]`.
    """
    (top, total, mixed), (key_scale, value_scale) = state, scales
    own = range(head * heads.lines, (head + 1) * heads.lines)
    scores = sum(_product(q[0, line], key, 1) for line, (key, _) in zip(own, pairs, strict=True))
    scores = scores * (key_scale * heads.scale)
    if heads.soft_cap:
        scores = heads.soft_cap * jnp.tanh(scores / heads.soft_cap)
    scores = jnp.where(seen, scores, MASKED)
    highest = jnp.maximum(top[head], jnp.max(scores, axis=1, keepdims=True))
    fade = jnp.exp(top[head] - highest)
    weights = jnp.exp(scores - highest[:, :1])
    top[head] = highest
    total[head] = total[head] * fade + jnp.sum(weights, axis=1, keepdims=True)
    # A scale that isn't seen may be that of an earlier row, or not a number.
    weights = jnp.where(seen, weights * value_scale, 0).astype(jnp.bfloat16)
    for line, (_, value) in zip(own, pairs, strict=True):
        mixed[line] = mixed[line] * fade + _product(weights, value, 0)


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """float32 of a's second axis with this one of b."""
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _pairs(values, heads: Heads):
    """The pairs of some pages' tokens, heads outermost, in each the phases: twice bfloat16
    `[tokens, 128]`, of values `[pages, groups, lines, 128]` in vector memory.
    """
    pages, groups, lines, _ = values.shape
    words = values.reshape(pages * groups * lines, LANES).bitcast(jnp.int32)
    step = (
        words.shape[0] * heads.phases // (pages * heads.page_size)
    )  # words of a token, or of those in a word
    count = heads.count * heads.lines * heads.phases
    for word in range(step):
        both = words[word::step, :] if step > 1 else words[...]
        for shift in (24, 8)[: count - 2 * word]:  # the lower pair is in the lower bytes
            yield _byte(both, shift), _byte(both, shift - 8)


def _byte(words: jax.Array, shift: int) -> jax.Array:
    """bfloat16 of the byte that a shift to the left brings to the top."""
    return ((words << shift) >> 24).astype(jnp.float32).astype(jnp.bfloat16)


def _side_by_side(scales, page_size: int) -> jax.Array:
    """Of pages `[pages, lines, lanes]` the lanes that hold their tokens, `[lines, pages * Z]`."""
    from jax.experimental.pallas import tpu as pltpu

    pages = scales.shape[0]
    if page_size >= LANES:
        return jnp.concatenate([scales[page] for page in range(pages)], axis=1)
    registers, each = [], LANES // page_size
    lane = jax.lax.broadcasted_iota(jnp.int32, scales.shape[1:], 1)
    for begin in range(0, pages, each):
        register = scales[begin]
        for place in range(1, each):
            turned = pltpu.roll(scales[begin + place], place * page_size, 1)
            register = jnp.where(lane < place * page_size, register, turned)
        registers.append(register)
    return jnp.concatenate(registers, axis=1)
