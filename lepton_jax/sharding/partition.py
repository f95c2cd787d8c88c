"""Which dimension of a weight is cut, said once: a table from logical axes to the mesh's axis.

Every other dimension is whole on each device. Sizes that don't divide are padded with zeros, which
changes no result: kv heads of zeros attend to nothing, and what they give is multiplied by zeros.
Storage types follow from the weight: a piece is planned like a weight of its own.
Read next: `placement.py`, `tensors/cut.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lepton_jax.sharding.axis import Axis
from lepton_jax.tensors import CompressedTensor, Cut, ParamSpec

# "heads" are the outputs of attention, kv head by kv head, as inputs of the projection after it.
RULES: Mapping[str, str] = {
    "kv_heads": "model",
    "heads": "model",
    "ffn": "model",
    "vocab": "model",
}


def cut_of(spec: ParamSpec, axis: Axis, units: Mapping[str, int]) -> Cut | None:
    """How a weight of this spec is cut; None where every device holds all of it.

    Args:
      spec: of the whole weight.
      axis: the devices.
      units: by logical axis, how many neighbours stay together (a kv head's inputs); 1 if absent.

    Raises ValueError where two dimensions of a weight would be cut along one axis.
    """
    dims = [dim for dim, name in enumerate(spec.axes) if RULES.get(name) == axis.name]
    if axis.size == 1 or not dims:
        return None
    if len(dims) > 1:
        raise ValueError(
            f"axes {spec.axes} of {spec.shape}: {[spec.axes[dim] for dim in dims]} would all be "
            f"cut along mesh.{axis.name}: let one of them out of sharding/partition.py's RULES"
        )
    (dim,) = dims
    unit = units.get(spec.axes[dim], 1)
    return Cut(dim, axis.size, axis.share(spec.shape[dim] // unit) * unit)


def piece_plan(leaf: Any, spec: ParamSpec, cut: Cut | None) -> Any:
    """One device's part of a planned leaf: a tree of ParamSpecs like it.

    Args:
      leaf: a ParamSpec, or a compressed leaf of ParamSpecs.
      spec: of the weight that it stands for.
      cut: of that weight.
    """
    if cut is None:
        return leaf
    part = dataclasses.replace(spec, shape=cut.shape(spec.shape))
    return leaf.planned_piece(part, cut) if isinstance(leaf, CompressedTensor) else part


def pieces_of(leaf: Any, cut: Cut) -> list[Any]:
    """The parts of a leaf with values, in the order of the devices."""
    return leaf.pieces(cut) if isinstance(leaf, CompressedTensor) else cut.split(leaf)


def padding_costs(
    specs: Mapping[str, ParamSpec], axis: Axis, units: Mapping[str, int]
) -> list[str]:
    """What padding costs, a line for each logical axis that doesn't divide."""
    costs = {}
    for spec in specs.values():
        cut = cut_of(spec, axis, units)
        if cut is None or spec.axes[cut.dim] == "heads":  # they say the same as kv_heads
            continue
        name, size = spec.axes[cut.dim], spec.shape[cut.dim]
        padded = cut.parts * cut.share
        if padded > size:
            what = "attention and cache" if name == "kv_heads" else f"of what works on the {name}"
            costs[name] = (
                f"{size} {name.replace('_', ' ')} padded to {padded} for mesh.{axis.name}="
                f"{axis.size}: {100 * (padded / size - 1):.2g} % more {what}"
            )
    return list(costs.values())
