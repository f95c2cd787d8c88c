"""`Cut`: a dimension in equal parts, one for each device that shares a weight.

Here is the arithmetic on plain arrays; storage types cut themselves with it (`leaves.py`). Which
dimension is cut, and into how many parts, is `lepton_jax/sharding`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Cut:
    """Dimension `dim` of a weight in `parts` of `share` each; the last ones are filled with zeros.

    Arrays that begin with the weight's dimensions, such as scales by output, are cut alike; those
    that end before `dim` are the same for all parts. With `copies` each part comes so many times,
    one beside the other, all of them counted as `parts`.
    """

    dim: int
    parts: int
    share: int
    copies: int = dataclasses.field(default=1, kw_only=True)

    @property
    def along(self) -> int:
        """How many different parts there are along `dim`."""
        return self.parts // self.copies

    @property
    def grid(self) -> tuple[tuple[int | None, int], ...]:
        """Dimensions of the grid that the parts lie in, in their order: which dimension of the
        weight each goes along, None for copies, and how many parts.
        """
        return ((self.dim, self.along), (None, self.copies))

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of a part of a weight of this shape."""
        return (*whole[: self.dim], self.share, *whole[self.dim + 1 :])

    def fills(self, array: tuple[int, ...]) -> bool:
        """Whether an array of this shape has parts without padding."""
        return self.dim >= len(array) or array[self.dim] == self.along * self.share

    def split(self, array: Any) -> list[Any]:
        """The parts of a numpy or jax array."""
        if self.dim >= array.ndim:
            return [array] * self.parts
        missing = self.along * self.share - array.shape[self.dim]
        if missing:
            widths = [(0, 0)] * array.ndim
            widths[self.dim] = (0, missing)
            array = (np if isinstance(array, np.ndarray) else jnp).pad(array, widths)
        ahead = (slice(None),) * self.dim
        return [
            array[(*ahead, slice(part * self.share, (part + 1) * self.share))]
            for part in range(self.along)
            for _ in range(self.copies)
        ]

    def of(self, share: int) -> "Cut":
        """The cut of an array that holds `share` things where a part of the weight has its own."""
        return dataclasses.replace(self, share=share)

    def among(self, parts: Sequence[int], whole: tuple[int, ...]) -> "Region":
        """Where these parts of a weight lie, and what lies between them."""
        asked = [part // self.copies for part in parts]
        first, count = min(asked), max(asked) - min(asked) + 1
        bounds = [(0, size) for size in whole]
        ends = (first * self.share, (first + count) * self.share)
        bounds[self.dim] = tuple(min(end, whole[self.dim]) for end in ends)
        return Region(
            tuple(bounds),
            Cut(self.dim, count, self.share),
            tuple(part - first for part in asked),
        )


@dataclasses.dataclass(frozen=True)
class CutTwice(Cut):
    """`parts` in all: what `outer` cuts is cut further along `dim`."""

    outer: Cut

    @property
    def along(self):
        return self.parts // self.outer.parts

    @property
    def grid(self):
        return ((self.outer.dim, self.outer.parts), (self.dim, self.along))

    def shape(self, whole):
        return super().shape(self.outer.shape(whole))

    def fills(self, array):
        return self.outer.fills(array) and super().fills(array)

    def split(self, array):
        inner = Cut(self.dim, self.along, self.share)
        return [part for wide in self.outer.split(array) for part in inner.split(wide)]

    def among(self, parts, whole):
        outer = self.outer.among([part // self.along for part in parts], whole)
        inner = Cut(self.dim, self.along, self.share).among([p % self.along for p in parts], whole)
        bounds = list(inner.bounds)
        bounds[outer.cut.dim] = outer.bounds[outer.cut.dim]
        return Region(
            tuple(bounds),
            CutTwice(self.dim, outer.cut.parts * inner.cut.parts, self.share, outer.cut),
            tuple(
                wide * inner.cut.parts + narrow
                for wide, narrow in zip(outer.places, inner.places, strict=True)
            ),
        )


@dataclasses.dataclass(frozen=True)
class Region:
    """What some devices have of a weight together.

    Attributes:
      bounds: its (first, end) along each dimension of the weight, which padding isn't part of.
      cut: of the region, into the parts of all devices that have one in it.
      places: which of these parts belong to the devices that were asked for, in their order.
    """

    bounds: tuple[tuple[int, int], ...]
    cut: Cut
    places: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(end - first for first, end in self.bounds)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(*pair) for pair in self.bounds)
