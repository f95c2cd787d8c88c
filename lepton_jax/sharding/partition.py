"""Which dimension of a weight is cut, said once: a table from logical axes to those of the mesh.

Every other dimension is whole on each device. Sizes that don't divide are padded with zeros, which
changes no result: kv heads of zeros attend to nothing, and what they give is multiplied by zeros.
Storage types follow from the weight: a piece is planned like a weight of its own.
Read next: `heads.py`, `placement.py`, `tensors/cut.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lepton_jax.sharding.axis import GRID, Axis
from lepton_jax.sharding.heads import Heads
from lepton_jax.tensors import CompressedTensor, Cut, CutTwice, ParamSpec

# "heads" are the outputs of attention, kv head by kv head, as inputs of the projection after it.
# "model" are all devices; experts are cut along the two dimensions of their grid (`axis.GRID`).
RULES: Mapping[str, str] = {
    "kv_heads": "model",
    "heads": "model",
    "ffn": "model",
    "vocab": "model",
    "experts": "expert",
    "expert_ffn": "rest",
}


def cut_of(spec: ParamSpec, axis: Axis, heads: Heads | None) -> Cut | None:
    """How a weight of this spec is cut; None where every device holds all of it.

    Args:
      spec: of the whole weight.
      axis: the devices.
      heads: of the model's attention; None: kv heads are cut like anything else.

    Raises ValueError where two dimensions of a weight would be cut along one axis.
    """
    parts = {"model": axis.size, "expert": axis.spread, "rest": axis.size // axis.spread}
    dims = {dim: RULES[name] for dim, name in enumerate(spec.axes) if name in RULES}
    dims = {dim: along for dim, along in dims.items() if parts[along] > 1}
    if len(dims) > 1 and sorted(dims.values()) != sorted(GRID):
        raise ValueError(
            f"axes {spec.axes} of {spec.shape}: {[spec.axes[dim] for dim in dims]} would all be "
            "cut along mesh.model: let one of them out of sharding/partition.py's RULES"
        )
    cuts = []
    for dim, along in dims.items():
        if heads and spec.axes[dim] in ("kv_heads", "heads"):
            share = axis.kv_share(heads.kv_heads) * (spec.shape[dim] // heads.kv_heads)
            cuts.append(Cut(dim, axis.size, share, copies=axis.banks))
        else:
            cuts.append(Cut(dim, parts[along], -(-spec.shape[dim] // parts[along])))
    if len(cuts) < 2:
        return cuts[0] if cuts else None
    outer, inner = cuts
    return CutTwice(inner.dim, axis.size, inner.share, outer)


def check_experts(count: int, axis: Axis) -> None:
    """Raises ValueError where a model of `count` experts, 0 if it is dense, can't be spread so."""
    if axis.spread == 1 or (count and count % axis.spread == 0):
        return
    if not count:
        raise ValueError(f"mesh.expert={axis.spread}, but the model has no experts: leave it out")
    both = math.gcd(count, axis.size)
    raise ValueError(
        f"mesh.expert={axis.spread} does not divide the {count} experts: want one of "
        f"{[n for n in range(1, both + 1) if both % n == 0]}, which divide mesh.model={axis.size} "
        "too"
    )


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


def uneven_costs(specs: Mapping[str, ParamSpec], axis: Axis, heads: Heads) -> list[str]:
    """What it costs that sizes don't divide, a line for each logical axis."""
    attention = heads.cost(axis.size)
    costs = {"kv_heads": attention} if attention else {}
    for spec in specs.values():
        cut = cut_of(spec, axis, heads)
        if cut is None or spec.axes[cut.dim] in ("kv_heads", "heads"):
            continue
        name, size = spec.axes[cut.dim], spec.shape[cut.dim]
        padded = cut.along * cut.share
        if padded > size:
            told = name.replace("_", " ")
            costs[name] = (
                f"{size} {told} padded to {padded} for mesh.model={axis.size}: "
                f"{100 * (padded / size - 1):.2g} % more of what works on the {told}"
            )
    return list(costs.values())
