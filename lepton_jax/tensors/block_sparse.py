"""`BlockSparseTensor`: whole tiles kept, equally many in each row of tiles; the product skips the
rest.

Equally many, because regular shapes are what makes the product fast (`tile_dots.py`). Tall tiles
suit it best: 192x32 on CPU, 128 inputs or more wide on TPU. What else is sparse: `sparse.py`.
"""

import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.tensors.cut import Cut
from lepton_jax.tensors.decompress import in_order
from lepton_jax.tensors.leaves import ParamSpec, register_leaf
from lepton_jax.tensors.sparse import (
    SparseTensor,
    planned_values,
    scaled,
    take_rows,
)
from lepton_jax.tensors.tile_dots import tiled_dot


@register_leaf("values", "tiles", "scale")
@dataclasses.dataclass(frozen=True)
class BlockSparseTensor(SparseTensor):
    """A weight `[*out, I]`, all its O outputs in O/R rows of tiles of R outputs by C inputs.

    Attributes:
      values: `[*out, k*C]`, the inputs of the k kept tiles side by side.
      tiles: int32 `[O/R, k]`: which of the I/C tiles each row of tiles keeps, ascending.
      inputs: I.
      scale: float32 `[*out]` of int8 values, or None.
    """

    by_output = {"values": 1, "scale": 0}
    values: Any
    tiles: Any
    inputs: int
    scale: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], self.inputs)

    @classmethod
    def planned(
        cls, spec: ParamSpec, *, height: int, width: int, kept: int, values: str = "float32"
    ) -> Self:
        """The leaf of tiles of `height` outputs by `width` inputs, `kept` in each row of tiles."""
        *outs, inputs = spec.shape
        check_tiles(spec.shape, height, width)
        if not 0 < kept <= inputs // width:
            raise ValueError(f"kept={kept}: want 1 to {inputs // width} tiles in each row of tiles")
        if spec.axes[0] == "experts" and spec.size // inputs // outs[0] % height:
            raise ValueError(f"tiles of {height} outputs do not divide those of one expert")
        stored, scale = planned_values(spec, values, (*outs, kept * width), spec.axes)
        tile_rows = spec.size // inputs // height
        return cls(
            values=dataclasses.replace(stored, inputs=spec.inputs),
            tiles=ParamSpec((tile_rows, kept), jnp.int32, ("tile_rows", "tiles")),
            inputs=inputs,
            scale=scale,
        )

    @classmethod
    @functools.partial(jax.jit, static_argnums=0, static_argnames="kept")
    def of(cls, weight: jax.Array, kept_tiles: jax.Array, scale: Any = None, *, kept: int) -> Self:
        """The leaf of the tiles of a weight `[*out, I]` where `kept_tiles [O/R, I/C]` is true: at
        `kept` places in each row, or at fewer, and then others, which are zeros, fill it up.
        """
        *outs, inputs = weight.shape
        tile_rows, columns = kept_tiles.shape
        tiles = jnp.argsort(~kept_tiles, axis=-1, stable=True)[:, :kept].astype(jnp.int32)
        parts = weight.reshape(tile_rows, -1, columns, inputs // columns)
        values = jnp.take_along_axis(parts, tiles[:, None, :, None], axis=2)
        return cls(values.reshape(*outs, -1), tiles, inputs, scale)

    def like(self, weights: list[jax.Array], scales: list[Any]) -> list[Self]:
        height, width = self.static()["height"], self.static()["width"]
        for weight in weights:
            check_tiles(weight.shape, height, width)
        tiles = [_in_use(weight, height=height, width=width) for weight in weights]
        kept = max(1, *(int(np.asarray(t).sum(-1).max()) for t in tiles))
        return [self.of(w, t, s, kept=kept) for w, t, s in zip(weights, tiles, scales, strict=True)]

    def planned_piece(self, part: ParamSpec, cut: Cut) -> Self:
        """As if the tiles were spread evenly over the inputs."""
        static = self.static()
        kept = -(-static["kept"] * part.shape[-1] // self.inputs)
        return self.planned(part, **static | dict(kept=kept))

    def static(self) -> dict[str, Any]:
        tile_rows, kept = self.tiles.shape[-2:]
        return dict(
            height=math.prod(self.values.shape[:-1]) // tile_rows,
            width=self.values.shape[-1] // kept,
            kept=kept,
            values=jnp.dtype(self.values.dtype).name,
        )

    def flat(self, keep: int = 0) -> Self:
        tiles = self.tiles.reshape(*self.values.shape[:keep], -1, self.tiles.shape[-1])
        return dataclasses.replace(super().flat(keep), tiles=tiles)

    def matmul(self, x: jax.Array) -> jax.Array:
        x, leaf = in_order(x, self)
        return scaled(tiled_dot(x, leaf.values, leaf.tiles), leaf.scale)

    def spread(self) -> jax.Array:
        kept = self.tiles.shape[-1]
        tiles = self.tiles.reshape(-1, kept)
        tile_rows, width = tiles.shape[0], self.values.shape[-1] // kept
        values = self.values.reshape(tile_rows, -1, kept, width)
        height = values.shape[1]
        spread = jnp.zeros((tile_rows, height, self.inputs // width, width), values.dtype)
        spread = spread.at[jnp.arange(tile_rows)[:, None], :, tiles].set(jnp.swapaxes(values, 1, 2))
        return spread.reshape(self.shape)

    def taken(self, ids: jax.Array) -> Self:
        outputs = self.values.shape[0]
        ids = jnp.clip(ids, 0, outputs - 1)
        tiles = take_rows(self.tiles, ids // (outputs // self.tiles.shape[0]))
        return dataclasses.replace(super().taken(ids), tiles=tiles)


@functools.partial(jax.jit, static_argnames=("height", "width"))
def _in_use(weight: jax.Array, *, height: int, width: int) -> jax.Array:
    """Which tiles of a weight `[*out, I]` aren't all zeros, bool `[O/R, I/C]`."""
    parts = weight.reshape(-1, height, weight.shape[-1] // width, width)
    return jnp.any(parts != 0, axis=(1, 3))


def check_tiles(shape: tuple[int, ...], height: int, width: int) -> None:
    """Raises ValueError unless tiles of `height` outputs by `width` inputs cover `[*out, I]`."""
    *outs, inputs = shape
    outputs = math.prod(outs)
    if outputs % height or inputs % width:
        raise ValueError(
            f"tiles of {height}x{width} do not cover {outputs} outputs by {inputs} inputs: want "
            "divisors of both"
        )
