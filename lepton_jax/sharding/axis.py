"""What a program may ask of the devices that share its model: sums, maxima, a few candidates.

`Axis` is a model on one device, for which there is nothing to ask: its methods give back what they
got and cost nothing. `MeshAxis` asks, inside `shard_map`; every device gets the same answers, so
all take the same decisions. A dimension that is cut lies in equal shares, the first on the first
device. Devices that share a model lie in a grid: experts may be spread over its first dimension
(`experts`), all else over both. Read next: `partition.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

GRID = ("expert", "rest")  # the mesh axes that all devices of a model lie along


@dataclasses.dataclass(frozen=True)
class Axis:
    """The axis of one device.

    Attributes:
      size: devices on it.
      spread: of them, over how many experts are spread.
      banks: sets of them with all kv heads, by turns: device i is in bank i % banks (`heads.py`).
      name: of the mesh axes that they lie along.
    """

    size: int = 1
    spread: int = 1
    banks: int = 1
    name: str | tuple[str, ...] = GRID

    @property
    def experts(self) -> Axis:
        """The devices over which experts are spread."""
        return self

    def share(self, count: int) -> int:
        """What each device has of `count` things; the last devices' may be padding."""
        return -(-count // self.size)

    def kv_share(self, kv_heads: int) -> int:
        """What each device has of all kv heads; the last devices' may be padding."""
        return -(-kv_heads * self.banks // self.size)

    def holds(self, banks: jax.Array) -> jax.Array | bool:
        """Of rows in these banks `[B]`, whether this device's bank has their cache."""
        return True

    def sum(self, y: jax.Array) -> jax.Array:
        """Over the devices."""
        return y

    def max(self, y: jax.Array) -> jax.Array:
        return y

    def min(self, y: jax.Array) -> jax.Array:
        return y

    def local(self, ids: jax.Array, share: int) -> jax.Array:
        """Where ids of the whole dimension lie in this device's share; -1: not here."""
        return ids

    def whole(self, ids: jax.Array, share: int) -> jax.Array:
        """The ids in the whole dimension of places in this device's share."""
        return ids

    def own(self, y: jax.Array, places: jax.Array) -> jax.Array:
        """`y [*places, ...]`, zeros where a place is -1."""
        return y

    def lookup(self, look: Callable, ids: jax.Array, share: int) -> jax.Array:
        """`look(ids)` `[*ids, ...]` of whole ids, where each device can look up its share only."""
        return look(ids)

    def pick(self, values: jax.Array, ids: jax.Array) -> jax.Array:
        """The values `[B, n]` at whole ids `[B, n]` of rows `[B, share]`."""
        return jnp.take_along_axis(values, ids, axis=-1)

    def top_k(self, values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """The k largest of rows `[B, share]` of all devices, the largest first, and whole ids."""
        return jax.lax.top_k(values, min(k, values.shape[-1]))

    def best(self, values: jax.Array, k: int) -> jax.Array:
        """The k largest of all devices' candidates `[B, n]`; n at most k, descending."""
        return values

    def running(self, totals: jax.Array) -> tuple[jax.Array | int, jax.Array]:
        """Of int32 totals `[B]` of the shares: the sum over the devices before this one, and over
        all.
        """
        return 0, totals

    def chosen(self, y: jax.Array, here: jax.Array) -> jax.Array:
        """The int32 y of the one device where `here` is true."""
        return y

    def mine(self, values: jax.Array, share: int) -> jax.Array:
        """This device's share `[B, share]` of values `[B, n]` that all devices have."""
        return values[:, :share]

    def within(self, scores: jax.Array, count: int) -> jax.Array:
        """Scores `[B, share]` of a dimension of `count` places; -inf where padding is."""
        return scores


WHOLE = Axis()


@dataclasses.dataclass(frozen=True)
class MeshAxis(Axis):
    """The axis of `size` devices inside a `shard_map` over mesh axes `name`."""

    @property
    def experts(self):
        return MeshAxis(size=self.spread, name=GRID[0]) if self.spread > 1 else WHOLE

    @property
    def index(self) -> jax.Array:
        return jax.lax.axis_index(self.name)

    def holds(self, banks):
        return True if self.banks == 1 else banks == self.index % self.banks

    def sum(self, y):
        return jax.lax.psum(y, self.name)

    def max(self, y):
        return jax.lax.pmax(y, self.name)

    def min(self, y):
        return jax.lax.pmin(y, self.name)

    def local(self, ids, share):
        places = ids - self.index * share
        return jnp.where((places >= 0) & (places < share), places, -1)

    def whole(self, ids, share):
        return ids + self.index * share

    def own(self, y, places):
        here = (places >= 0).reshape(*places.shape, *[1] * (y.ndim - places.ndim))
        return jnp.where(here, y, 0)

    def lookup(self, look, ids, share):
        places = self.local(ids, share)
        return self.sum(self.own(look(jnp.maximum(places, 0)), places))

    def pick(self, values, ids):
        places = self.local(ids, values.shape[-1])
        found = jnp.take_along_axis(values, jnp.maximum(places, 0), axis=-1)
        return self.sum(self.own(found, places))

    def top_k(self, values, k):
        share = values.shape[-1]
        own, places = jax.lax.top_k(values, min(k, share))
        candidates, ids = self._gathered(own), self._gathered(self.whole(places, share))
        best, places = jax.lax.top_k(candidates, min(k, candidates.shape[-1]))
        return best, jnp.take_along_axis(ids, places, axis=-1)

    def best(self, values, k):
        candidates = self._gathered(values)
        return jax.lax.top_k(candidates, min(k, candidates.shape[-1]))[0]

    def running(self, totals):
        all_totals = jax.lax.all_gather(totals, self.name)
        before = (jnp.arange(self.size) < self.index)[:, None]
        return jnp.sum(jnp.where(before, all_totals, 0), 0), jnp.sum(all_totals, 0)

    def chosen(self, y, here):
        return self.sum(jnp.where(here, y, 0))

    def mine(self, values, share):
        beyond = max(0, share * self.size - values.shape[1])
        values = jnp.pad(values, ((0, 0), (0, beyond)))
        return jax.lax.dynamic_slice_in_dim(values, self.index * share, share, axis=1)

    def within(self, scores, count):
        share = scores.shape[-1]
        if share * self.size == count:
            return scores
        ids = self.whole(jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1), share)
        return jnp.where(ids < count, scores, -jnp.inf)

    def _gathered(self, candidates: jax.Array) -> jax.Array:
        """The few candidates `[B, n]` of each device side by side, `[B, devices * n]`."""
        return jax.lax.all_gather(candidates, self.name, axis=1, tiled=True)
