"""The sizes of an engine, and which sizes its programs are compiled for: few, so that starts are
quick, and none much too large.
"""

import dataclasses
from typing import Any, Self

from lepton_jax.config import EngineSection

SMALLEST_PREFILL = 128
GUIDED_PREFILLS = (8, 32)
SMALLEST_VIEW, VIEW_STEP = 256, 64  # tokens


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is fixed for the life of a runner, in rows, tokens and pages.

    `num_pages` are those of each of the `banks`, among which rows are dealt out.
    """

    rows: int
    page_size: int
    num_pages: int
    prefill_chunk: int
    decode_block: int
    max_len: int
    draft: int = 0
    prefill_sizes: tuple[int, ...] = ()
    banks: int = 1

    @classmethod
    def of(
        cls, section: EngineSection, *, max_len: int, num_pages: int, banks: int, **more: Any
    ) -> Self:
        """By a config; the arguments are what it may leave open. `more`: fields of a subclass."""
        return cls(
            rows=section.rows,
            page_size=section.page_size,
            num_pages=section.num_pages or num_pages,
            prefill_chunk=section.prefill_chunk,
            decode_block=section.decode_block,
            max_len=max_len,
            draft=section.draft_tokens if section.speculation != "off" else 0,
            prefill_sizes=section.prefill_sizes,
            banks=banks,
            **more,
        )

    @property
    def pages_per_row(self) -> int:
        return -(-self.max_len // self.page_size)


def ladder(top: int, factor: int, bottom: int) -> list[int]:
    """Sizes top, top/factor, ... down to bottom, ascending: few programs, at most `factor` too
    large.
    """
    sizes = [top]
    while sizes[-1] > bottom:
        sizes.append(max(bottom, -(-sizes[-1] // factor)))
    return sizes[::-1]


def fit(sizes: list[int], need: int) -> int:
    """The smallest size that is enough; the largest where none is."""
    return next((size for size in sizes if size >= need), sizes[-1])


@dataclasses.dataclass(frozen=True)
class Rungs:
    """Sizes of programs, each list ascending.

    Attributes:
      prefill: tokens, in whole tiles.
      guided: of prefills that take guided rows one token further.
      decode: rows.
      views: tokens of a block's view; none where the backend has no views.
    """

    prefill: list[int]
    guided: list[int]
    decode: list[int]
    views: list[int]

    @classmethod
    def of(cls, sizes: Sizes, *, tile: int, has_views: bool) -> "Rungs":
        """For an engine's sizes; `tile` is the backend's Q_TILE."""
        rows, most = sizes.rows, -(-sizes.prefill_chunk // tile)
        tiles = ladder(most, 2, min(most, -(-SMALLEST_PREFILL // tile)))
        if sizes.prefill_sizes:
            wanted = {-(-size // tile) for size in sizes.prefill_sizes}
            tiles = [*sorted(count for count in wanted if count < most), most]
        top = -(-sizes.max_len // VIEW_STEP) * VIEW_STEP
        least = tiles[0] * tile
        return cls(
            prefill=[count * tile for count in tiles],
            guided=[size for size in GUIDED_PREFILLS if size < least and size % tile == 0],
            decode=ladder(rows, 8, min(rows, 4)),
            views=ladder(top, 4, min(top, SMALLEST_VIEW)) if has_views else [],
        )
