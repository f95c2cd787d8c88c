"""The smallest slice that serves a model, and how to spread and compress it there.

From shapes alone: every kind of chip, slice, number of devices that share the model, and preset is
tried in an instant. Plan the winner, `--topology=...`, to have it compiled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from lepton_jax.config import RunConfig
from lepton_jax.engine.sizing import max_len_of
from lepton_jax.planning.chips import TPUS
from lepton_jax.planning.from_config import presets_of, require_plannable, served_of
from lepton_jax.planning.memory import full_sizes, memory_of
from lepton_jax.planning.plan import budget_of
from lepton_jax.planning.roofline import decode_cost
from lepton_jax.planning.topology import SLICES, can_start, chips_of, devices_of, hosts_of


@dataclasses.dataclass(frozen=True)
class Found:
    """A way to serve: tokens/s are at best and of all replicas together; `spare` bytes a device."""

    topology: str
    chips: int
    hosts: int
    preset: str
    shards: int
    spread: int
    replicas: int
    tokens_per_second: float
    spare: int
    bound: str


def search(config: RunConfig) -> list[Found]:
    """All that fit and reach `plan.target`, best first: fewest chips, then the least lossy preset,
    then the most tokens/s. Of a kind of chip only its smallest slice that does is listed.

    Raises ValueError where nothing does, with what comes nearest, and on fields without effect.
    """
    require_plannable(config)
    plan, best, nearest = config.plan, [], (0.0, "")
    if plan.topology:
        raise ValueError(
            f"plan.topology={plan.topology!r}: a search tries all slices; leave it out"
        )
    if config.compression.rules:
        raise ValueError("compression.rules: a search tries plan.presets; leave the rules out")
    for kind in plan.chips or tuple(TPUS):
        if kind not in TPUS:
            raise ValueError(f"plan.chips={kind!r} is unknown: want some of {', '.join(TPUS)}")
        candidates = list(_candidates(config, kind))
        good = [found for found in candidates if found.tokens_per_second >= plan.target]
        least = min((found.chips for found in good), default=0)
        best += [found for found in good if found.chips == least]
        for found in candidates:
            nearest = max(nearest, (found.tokens_per_second, f"{found.topology} {found.preset}"))
    if not best:
        way = "allow more chips, or lower engine.rows or engine.max_len"
        if nearest[1]:
            way = f"most is {nearest[0]:,.0f} tokens/s on {nearest[1]}; lower plan.target or {way}"
        raise ValueError(
            f"{config.model.path} with {config.engine.rows} rows at plan.target={plan.target:g} "
            f"tokens/s: no slice of plan.most_chips={plan.most_chips} or fewer serves it; {way}"
        )
    order = plan.presets.index
    return sorted(best, key=lambda f: (f.chips, order(f.preset), -f.tokens_per_second))


def _candidates(config: RunConfig, kind: str) -> Iterator[Found]:
    """What fits; raises ValueError where no mesh can have a cache such as the config asks for."""
    chip, max_len, refused, taken = TPUS[kind], 0, None, False
    presets = presets_of(config.model.path, config.plan.presets)
    if not presets:
        raise ValueError(
            f"plan.presets={config.plan.presets}: {config.model.path} holds compressed leaves, "
            "which no preset compresses again: add none"
        )
    for preset in presets:
        compression = dataclasses.replace(config.compression, preset=preset)
        served = served_of(dataclasses.replace(config, compression=compression), chip)
        max_len = max_len or max_len_of(config.engine, served.config.max_position)
        context = min(config.plan.context or max_len, max_len)
        for shards in (1, 2, 4, 8, 16, 32, 64):
            if served.config.num_heads < shards:
                break  # parts of a head: nobody cuts so finely
            fitting = []
            for spread in _spreads(served.config.num_experts, shards):
                shared = dataclasses.replace(served, shards=shards, spread=spread)
                sizes = full_sizes(shared, config.engine, rows=config.engine.rows, max_len=max_len)
                try:
                    spare = budget_of(chip) - memory_of(shared, sizes).total
                except ValueError as error:
                    refused = refused or error
                    continue
                taken = True
                if spare >= 0:
                    cost = decode_cost(shared, chip, rows=config.engine.rows, context=context)
                    fitting.append((cost.seconds, spread, spare, cost))
            if not fitting:
                continue
            _, spread, spare, cost = min(fitting, key=lambda found: found[:2])
            for size in SLICES[kind]:
                chips, devices = chips_of(size), devices_of(kind, size)
                hosts = hosts_of(kind, size)
                if devices % shards or chips > config.plan.most_chips:
                    continue
                if not can_start(shards, devices, hosts):
                    continue
                replicas = devices // shards
                yield Found(
                    topology=f"{kind}:{size}",
                    chips=chips,
                    hosts=hosts,
                    preset=preset,
                    shards=shards,
                    spread=spread,
                    replicas=replicas,
                    tokens_per_second=replicas * config.engine.rows / cost.seconds,
                    spare=spare,
                    bound=cost.bound,
                )
    if refused and not taken:
        raise refused


def _spreads(experts: int, shards: int) -> list[int]:
    """What mesh.expert may be."""
    both = math.gcd(experts, shards) if experts else 1
    return [n for n in range(1, both + 1) if both % n == 0]


def as_text(found: list[Found]) -> str:
    """A table, best first."""
    lines = [
        f"{'topology':<12} {'preset':<8} hosts mesh.model .expert replicas  tokens/s  a chip  "
        "bound by"
    ]
    for f in found:
        lines.append(
            f"{f.topology:<12} {f.preset:<8} {f.hosts:>5} {f.shards:>10} {f.spread:>7} "
            f"{f.replicas:>8} {f.tokens_per_second:>9,.0f} {f.tokens_per_second / f.chips:>7,.0f}  "
            f"{f.bound}"
        )
    if any(f.hosts > 1 for f in found):
        lines.append("several hosts: one replica by hosts.coordinator, more by pool.ray")
    return "\n".join(lines)


def as_json(found: list[Found]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(f) for f in found]
