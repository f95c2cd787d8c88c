"""`Cut`: a dimension in equal parts, one for each device that shares a weight.

Here is the arithmetic on plain arrays; storage types cut themselves with it (`leaves.py`). Which
dimension is cut, and into how many parts, is `lepton_jax/sharding`.
"""

import dataclasses
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

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of a part of a weight of this shape."""
        return (*whole[: self.dim], self.share, *whole[self.dim + 1 :])

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


@dataclasses.dataclass(frozen=True)
class CutTwice(Cut):
    """`parts` in all: what `outer` cuts is cut further along `dim`."""

    outer: Cut

    @property
    def along(self):
        return self.parts // self.outer.parts

    def shape(self, whole):
        return super().shape(self.outer.shape(whole))

    def split(self, array):
        inner = Cut(self.dim, self.along, self.share)
        return [part for wide in self.outer.split(array) for part in inner.split(wide)]
