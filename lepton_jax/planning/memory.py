"""Bytes of a served model on one device, from shapes alone: no weights, no compiler, no device.

Weights and caches are exact, as the loader and the runner make them; temporaries are an upper
estimate (`programs.py` has the compiler's own number). Read next: `roofline.py`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lepton_jax.config import EngineSection
from lepton_jax.engine.rungs import Sizes
from lepton_jax.engine.runner import MOST_VIEW_BYTES
from lepton_jax.engine.sizing import wanted_pages
from lepton_jax.planning.served import Served


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. `code` and `other` are known where a program was compiled; other are the
    rows' state, inputs, results, padding to tiles, and a CPU's or GPU's view of its cache.
    """

    weights: int
    cache: int
    temporaries: int
    code: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.temporaries + self.code + self.other


def full_sizes(served: Served, section: EngineSection, *, rows: int, max_len: int) -> Sizes:
    """The engine's sizes, with pages for `rows` rows of `max_len` tokens and one more for each."""
    banks, page = served.axis.banks, section.page_size
    pages = wanted_pages([max_len] * rows, rows=rows, page_size=page, banks=banks)
    section = dataclasses.replace(section, rows=rows)
    return Sizes.of(section, max_len=max_len, num_pages=pages, banks=banks)


def memory_of(served: Served, sizes: Sizes) -> Memory:
    """What one device holds while it serves with these sizes."""
    return Memory(
        weights=served.weight_bytes,
        cache=cache_bytes(served, sizes) + view_bytes(served, sizes),
        temporaries=_temporaries(served, sizes),
    )


def fits(served: Served, sizes: Sizes, *, budget: int) -> bool:
    """Whether that is within `budget` bytes."""
    return memory_of(served, sizes).total <= budget


def largest_rows(served: Served, section: EngineSection, *, max_len: int, budget: int) -> int:
    """The most `engine.rows` of `max_len` tokens that fit into `budget` bytes; 0: not even one."""

    def holds(rows: int) -> bool:
        return fits(served, full_sizes(served, section, rows=rows, max_len=max_len), budget=budget)

    return _largest(holds)


def largest_len(served: Served, section: EngineSection, *, rows: int, budget: int) -> int:
    """The most `engine.max_len`, in whole pages, that fits for `rows` rows; 0: not one page."""
    page = section.page_size
    longest = served.config.max_position // page

    def holds(pages: int) -> bool:
        sizes = full_sizes(served, section, rows=rows, max_len=pages * page)
        return pages <= longest and fits(served, sizes, budget=budget)

    return _largest(holds) * page


def bytes_of_tokens(served: Served, tokens: int) -> int:
    """Of so many tokens in one layer's cache on one device, padding included."""
    layer = served.cache_layer(1, served.page_size)
    return tokens * sum(spec.nbytes for spec in jax.tree.leaves(layer)) // served.page_size


def cache_bytes(served: Served, sizes: Sizes) -> int:
    """Of all layers' caches on one device."""
    layer = served.cache_layer(sizes.num_pages, sizes.page_size)
    return served.config.num_layers * sum(spec.nbytes for spec in jax.tree.leaves(layer))


def view_bytes(served: Served, sizes: Sizes) -> int:
    """Of the copy of its rows' cache that a decode block on a CPU or GPU works on, at most."""
    if not hasattr(served.backend, "open_view"):
        return 0
    layer = served.cache_layer(1, 1)
    token = math.prod(layer.shape) * jnp.dtype(layer.dtype).itemsize  # wide where it is quantized
    places = sizes.rows * (sizes.max_len + sizes.decode_block)
    return min(served.config.num_layers * token * places, MOST_VIEW_BYTES)


def _temporaries(served: Served, sizes: Sizes) -> int:
    """Two copies of the logits in float32 and a layer's activations of a prefill, in four bytes."""
    c = served.config
    logits = 2 * sizes.rows * served.axis.share(c.vocab_size) * 4
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    visits = max(1, c.experts_per_token) * served.spread
    wide = 3 * (c.ffn_size * visits + heads) // served.shards + 4 * c.hidden_size
    return logits + max(sizes.prefill_chunk, sizes.rows) * wide * 4


def _largest(holds: Callable[[int], bool]) -> int:
    """The largest count for which `holds`, which holds for all below it; 0 where none does."""
    if not holds(1):
        return 0
    low, high = 1, 2
    while holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
