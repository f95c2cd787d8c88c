"""What would fit where a plan doesn't: single settings to change, from shapes alone."""

from __future__ import annotations

import dataclasses
import math

from lepton_jax.planning.from_config import presets_of, served_of
from lepton_jax.planning.memory import fits, full_sizes
from lepton_jax.planning.plan import Plan
from lepton_jax.planning.search import search
from lepton_jax.planning.served import Served
from lepton_jax.planning.topology import SLICES, can_start, devices_of, hosts_of, split_name


def remedies(plan: Plan) -> list[str]:
    """As many pages as rows need, fewer rows, shorter ones, a smaller preset, more devices; where
    none of these is enough, the smallest slice of any chip with what it takes. Empty where nothing
    is.
    """
    found = []
    pages = " with engine.num_pages=0" if plan.config.engine.num_pages else ""
    if pages and plan.largest_rows >= plan.rows:
        found.append("engine.num_pages=0")
    if 0 < plan.largest_rows < plan.rows:
        found.append(f"engine.rows={plan.largest_rows}{pages}")
    if 0 < plan.largest_len < plan.max_len:
        found.append(f"engine.max_len={plan.largest_len}{pages}")
    compression = plan.config.compression
    for preset in presets_of(plan.config.model.path, ("int8", "int4")):
        if preset != compression.preset and not compression.rules:
            tried = dataclasses.replace(compression, preset=preset)
            config = dataclasses.replace(plan.config, compression=tried)
            if _holds(plan, served_of(config, plan.chip)):
                found.append(f"compression.preset={preset}")
                break
    for shards in _shards(plan):
        spread = math.gcd(plan.served.spread, shards)
        shared = dataclasses.replace(plan.served, shards=shards, spread=spread)
        if shards > plan.served.shards and _holds(plan, shared):
            found.append(f"mesh.model={shards}" + _slice_for(plan, shards))
            break
    return found or _elsewhere(plan)


def _shards(plan: Plan) -> list[int]:
    """Devices that may share the model: those at hand, where no slice is named."""
    sizes = [2, 4, 8, 16, 32, 64]
    if plan.config.plan.topology:
        return sizes
    return [s for s in sizes if s <= len(plan.target.devices)]


def _holds(plan: Plan, served: Served) -> bool:
    """Whether the model stored or spread so serves what the plan asks for."""
    sizes = full_sizes(served, plan.config.engine, rows=plan.rows, max_len=plan.max_len)
    try:
        return fits(served, sizes, budget=plan.budget)
    except ValueError:  # a cache that this many devices can't have
        return False


def _elsewhere(plan: Plan) -> list[str]:
    section = dataclasses.replace(plan.config.plan, topology="", chips=(), target=0.0)
    try:
        best, *_ = search(dataclasses.replace(plan.config, plan=section))
    except ValueError:  # nothing does
        return []
    preset = (
        ""
        if best.preset == plan.config.compression.preset
        else (f" and compression.preset={best.preset}")
    )
    spread = f", mesh.expert={best.spread}" if best.spread > 1 else ""
    return [f"plan.topology={best.topology} with mesh.model={best.shards}{spread}{preset}"]


def _slice_for(plan: Plan, shards: int) -> str:
    """The smallest slice of the same chip where so many devices can share, where it isn't this."""
    target = plan.target
    if not plan.config.plan.topology or can_start(shards, len(target.devices), target.hosts):
        return ""
    kind, _ = split_name(plan.config.plan.topology)
    sizes = [s for s in SLICES[kind] if can_start(shards, devices_of(kind, s), hosts_of(kind, s))]
    return f" with plan.topology={kind}:{sizes[0]}" if sizes else ""
