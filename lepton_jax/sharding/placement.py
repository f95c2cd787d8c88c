"""Devices that hold one model together: pieces are put on them, programs compiled over them.

A value of a program either is the same on all devices (WHOLE_SPEC), or each device has one of its
own (CUT_SPEC). To jax the latter is one array whose first dimension holds the devices' own arrays
one after the other: they may be laid out as the device likes (a kernel's padded caches, a packed
piece), and nobody has to say where the cut runs. On one device all of this is a plain jit.
Read next: `partition.py`, `engine/runner.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from lepton_jax.sharding.axis import GRID, WHOLE, Axis, MeshAxis
from lepton_jax.sharding.heads import Heads
from lepton_jax.sharding.partition import cut_of, piece_plan, pieces_of
from lepton_jax.tensors import CompressedTensor, Cut, ParamSpec, Region

CUT_SPEC, WHOLE_SPEC = PartitionSpec(GRID), PartitionSpec()
Devices = Sequence[jax.Device] | np.ndarray  # as Placement takes them


def grid_of(devices: Sequence[jax.Device], expert: int) -> np.ndarray:
    """Devices as a grid `[expert, rest]`."""
    return np.array(devices).reshape(expert, -1)


def grids_of_parts(leaf: Any) -> set[tuple[int, ...]]:
    """Shapes of the grids of devices that hold a part of a leaf each; none where it is whole."""
    shardings = [getattr(array, "sharding", None) for array in jax.tree.leaves(leaf)]
    return {
        s.mesh.devices.shape
        for s in shardings
        if isinstance(s, NamedSharding) and s.spec == CUT_SPEC
    }


def axis_of(devices: int, heads: Heads | None, *, spread: int = 1) -> Axis:
    """The axis of so many devices for a model with these heads; over `spread` of them experts."""
    if devices == 1:
        return WHOLE
    return MeshAxis(size=devices, spread=spread, banks=heads.banks(devices) if heads else 1)


class Placement:
    """An ordered set of devices for one model.

    Args:
      devices: a sequence, or a grid of numpy with experts spread over its first dimension.
      heads: as below.

    Attributes:
      devices: in the order of the pieces.
      local: which of them belong to this process.
      axis: what programs ask the others through.
      heads: of the model's attention.
    """

    def __init__(self, devices: Devices, heads: Heads | None = None):
        grid = np.atleast_2d(np.array(devices))
        self.devices, self.heads = tuple(grid.flat), heads
        here = jax.process_index()
        self.local = tuple(i for i, d in enumerate(grid.flat) if d.process_index == here)
        self.axis = axis_of(grid.size, heads, spread=grid.shape[0])
        self.mesh = Mesh(grid, GRID)

    @classmethod
    def holding(cls, leaves: Sequence[Any], heads: Heads) -> Placement:
        """Where leaves lie; the default device where they aren't on any yet."""
        for array in jax.tree.leaves(leaves):
            sharding = getattr(array, "sharding", None)
            if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == GRID:
                return cls(sharding.mesh.devices, heads)
        arrays = [array for array in jax.tree.leaves(leaves) if isinstance(array, jax.Array)]
        return cls(tuple(arrays[0].devices())[:1] if arrays else jax.local_devices()[:1], heads)

    def beside(self, heads: Heads) -> Placement:
        """For a second model on the same axis, in whose banks its rows are too."""
        placement = copy.copy(self)
        placement.heads = heads
        return placement

    @property
    def first(self) -> jax.Device:
        """The first of the devices that belong to this process."""
        return self.devices[self.local[0]]

    def sharding(self, spec: PartitionSpec) -> Sharding:
        if self.axis.size == 1:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, spec)

    def region(self, spec: ParamSpec) -> Region | None:
        """What this process's devices have of a weight together; None where that is all of it, or
        nothing but padding, for which the loader gives them all of it too.
        """
        cut = cut_of(spec, self.axis, self.heads)
        found = None if cut is None else cut.among(self.local, spec.shape)
        return found if found and found.shape != spec.shape and all(found.shape) else None

    def put(self, spec: ParamSpec, leaf: Any, region: Region | None = None) -> Any:
        """A leaf with values on its devices; one that lies cut on as many others is moved.

        Args:
          spec: of the whole weight.
          leaf: the weight, or what is in `region` of it.
          region: as `region` gives it.

        Raises ValueError where its storage type can't be cut so.
        """
        cut = cut_of(spec, self.axis, self.heads)
        if self._lies_cut(leaf):
            return jax.tree.map(lambda a: jax.device_put(a, self.sharding(a.sharding.spec)), leaf)
        if cut is None:
            return jax.tree.map(self._everywhere, leaf)
        try:
            piece_plan(leaf, spec, cut)
            pieces = pieces_of(leaf, region.cut if region else cut)
        except ValueError as error:
            higher = " or mesh.expert higher" if "experts" in spec.axes else ""
            raise ValueError(
                f"a {type(leaf).__name__} of {spec.shape} can't be cut along {spec.axes[cut.dim]} "
                f"into {cut.along} parts of {cut.share} for mesh.model={cut.parts}: {error}. Set "
                f"mesh.model lower{higher}, or compress this weight otherwise"
            ) from error
        return self.joined([pieces[place] for place in (region.places if region else self.local)])

    def joined(self, pieces: Sequence[Any]) -> Any:
        """The pieces of this process's devices, in their order, as a leaf of all devices."""
        return jax.tree.map(lambda *parts: self._as_one(parts), *pieces)

    def shardings_of_pieces(self, spec: ParamSpec, leaf: Any) -> Any | None:
        """For each array of a planned leaf, by its name where it is compressed, a sharding that
        gives every device the part in its piece; None where there are no such parts.
        """
        cut = cut_of(spec, self.axis, self.heads)
        if cut is None:
            return None
        if not isinstance(leaf, CompressedTensor):
            return self._sharding_of(cut, leaf.shape)
        cuts, arrays = leaf.cuts(cut), leaf.arrays()
        if cuts is None:
            return None
        found = {n: self._sharding_of(cuts.get(n, cut), a.shape) for n, a in arrays.items()}
        return found if all(found.values()) else None

    def pieces_in(self, arrays: Any) -> list[Any]:
        """What this process's devices have of a tree of arrays with such shardings."""

        def here(array: jax.Array, device: jax.Device) -> jax.Array:
            return next(s.data for s in array.addressable_shards if s.device == device)

        mine = [self.devices[i] for i in self.local]
        return [jax.tree.map(lambda a, d=d: here(a, d), arrays) for d in mine]

    def _sharding_of(self, cut: Cut, shape: tuple[int, ...]) -> Sharding | None:
        if not cut.fills(shape):
            return None
        names = [f"part{i}" for i in range(len(cut.grid))]
        mesh = Mesh(np.array(self.devices).reshape([count for _, count in cut.grid]), names)
        along = {dim: name for (dim, _), name in zip(cut.grid, names, strict=True)}
        return NamedSharding(mesh, PartitionSpec(*(along.get(d) for d in range(len(shape)))))

    def put_all(self, specs: Mapping[str, ParamSpec], leaves: Sequence[Any]) -> tuple[Any, ...]:
        """`put` for the leaves of a model, in the order of its specs."""
        return tuple(self.put(s, leaf) for s, leaf in zip(specs.values(), leaves, strict=True))

    def planned(self, spec: ParamSpec, leaf: Any) -> Any:
        """What `put` will give for a leaf of ParamSpecs: ShapeDtypeStructs with their shardings."""
        cut = cut_of(spec, self.axis, self.heads)
        plan = piece_plan(leaf, spec, cut).abstract()
        return self.abstract(plan, WHOLE_SPEC if cut is None else CUT_SPEC)

    def abstract(self, tree: Any, specs: Any) -> Any:
        """One device's arrays or ShapeDtypeStructs as arguments of a program; specs: a prefix."""

        def argument(spec: PartitionSpec, part: Any) -> Any:
            return jax.tree.map(lambda a: self._argument(a, spec), part)

        return jax.tree.map(argument, specs, tree)

    def zeros(self, tree: Any, specs: Any) -> Any:
        """Arrays of zeros like one device's."""
        return jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding),
            self.abstract(tree, specs),
        )

    def copies(self, tree: Any, specs: Any) -> Any:
        """Arrays that each device shall begin with, from those of one."""

        def placed(spec: PartitionSpec, part: Any) -> Any:
            if spec == CUT_SPEC:
                return jax.tree.map(lambda a: self._as_one([a] * len(self.local)), part)
            return jax.tree.map(self._everywhere, part)

        return jax.tree.map(placed, specs, tree)

    def program(
        self, step: Callable, inputs: tuple, outputs: Any, *, donate: Sequence[int] = (), **options
    ) -> Any:
        """A jitted function that runs `step` on every device; `inputs` and `outputs` say of each
        argument and result which of the two kinds it is. Further options are those of `jax.jit`.
        """
        if self.axis.size > 1:
            step = jax.shard_map(
                step, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
            )
        return jax.jit(step, donate_argnums=tuple(donate), **options)

    def _argument(self, array: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        spec = spec if array.shape else WHOLE_SPEC  # a scalar is the same everywhere
        shape = array.shape
        if spec == CUT_SPEC:
            shape = (self.axis.size * shape[0], *shape[1:])
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=self.sharding(spec))

    def _lies_cut(self, leaf: Any) -> bool:
        grids, here = grids_of_parts(leaf), self.mesh.devices.shape
        for grid in grids - {here}:
            spread = "" if grid[0] == here[0] else f", experts from {grid[0]} to {here[0]}"
            raise ValueError(
                f"leaves that lie in parts on {math.prod(grid)} devices can't be moved to "
                f"{self.axis.size}{spread}: load the model for these devices"
            )
        return bool(grids)

    def _as_one(self, parts: Sequence[Any]) -> jax.Array:
        """The arrays of this process's devices, as a part of one of all of them."""
        shape = parts[0].shape
        if not shape:
            return self._everywhere(parts[0])
        here = [
            jax.device_put(part, self.devices[i]) for part, i in zip(parts, self.local, strict=True)
        ]
        shape = (self.axis.size * shape[0], *shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self.sharding(CUT_SPEC), here)

    def _everywhere(self, array: Any) -> jax.Array:
        target = self.sharding(WHOLE_SPEC)
        if self.axis.size == 1 or getattr(array, "sharding", None) == target:
            return jax.device_put(array, target)
        copies = [jax.device_put(array, self.devices[i]) for i in self.local]
        return jax.make_array_from_single_device_arrays(array.shape, target, copies)


def specs_of(tree: Any) -> Any:
    """The PartitionSpecs of placed arrays, or of what `planned` gives."""

    def spec(array: Any) -> PartitionSpec:
        named = isinstance(array.sharding, NamedSharding)
        return array.sharding.spec if named else WHOLE_SPEC

    return jax.tree.map(spec, tree)
