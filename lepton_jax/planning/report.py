"""A plan as text for a terminal, as plain data and as a page.

What comes from shapes and what from compiled programs is said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lepton_jax.html.page import render
from lepton_jax.html.svg_plots import Series, scatter
from lepton_jax.planning.memory import full_sizes, memory_of
from lepton_jax.planning.plan import Plan
from lepton_jax.planning.programs import Program
from lepton_jax.planning.remedies import remedies
from lepton_jax.planning.roofline import StepCost, decode_cost

_GIB, _MIB = 2**30, 2**20
_PARTS = ("weights", "cache", "compute", "interconnect")


def headline(plan: Plan) -> str:
    """The model and where it runs."""
    c, devices = plan.config, len(plan.target.devices)
    compression = "rules" if c.compression.rules else c.compression.preset
    spread = f" mesh.expert={plan.served.spread}," if plan.served.spread > 1 else ""
    how = "hosts.coordinator" if plan.served.shards == devices else "pool.ray"
    hosts = f" on {plan.target.hosts} hosts by {how}" if plan.target.hosts > 1 else ""
    return (
        f"{c.model.path}, compression {compression}, on {plan.target.name}: {devices} "
        f"device{'s' * (devices > 1)} ({plan.chip.name}), mesh.model={plan.served.shards},"
        f"{spread} {plan.replicas} replica{'s' * (plan.replicas > 1)}{hosts}"
    )


def verdict(plan: Plan) -> str:
    """Fits or not, by how much, and what would."""
    spare = (plan.budget - plan.memory.total) / _GIB
    if plan.fits:
        return f"fits, {spare:.2f} GiB to spare"
    why = f"the compiler refuses it: {plan.refusal}" if plan.refusal else f"{-spare:.2f} GiB short"
    ways = remedies(plan)
    would = (
        f"; would fit: {' or '.join(ways)}" if ways else "; on these devices nothing smaller would"
    )
    return f"does not fit, {why}{would}"


def memory_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """(what, GiB, how it is known) on one device."""
    m, known = plan.memory, "compiled" if plan.decode else "estimated"
    cache = f"{plan.rows} rows x {plan.max_len} tokens, {plan.served.kv_dtype}"
    if (banks := plan.served.axis.banks) > 1:
        cache += f", dealt out to {banks} banks of devices"
    rows = [
        ("weights", m.weights, "from shapes"),
        ("cache", m.cache, cache),
        ("temporaries", m.temporaries, known),
    ]
    if plan.decode:
        rows += [("code", m.code, known), ("other", m.other, "rows' state, inputs, views, padding")]
    of = f"of {plan.budget / _GIB:.2f} (0.9 x {plan.chip.memory / _GIB:.2f})"
    rows.append(("in all", m.total, of))
    return [(name, f"{nbytes / _GIB:.3f}", note) for name, nbytes, note in rows]


def step_lines(plan: Plan) -> list[str]:
    """How long a step takes at best, and why."""
    cost = plan.decode_cost
    lines = [
        f"decode step of {plan.rows} rows with {plan.context} cached tokens, at best "
        f"{1e3 * plan.step_seconds:.2f} ms: {_parts(cost)}; bound by {cost.bound}",
        f"  reads {cost.weight_bytes / 1e9:.2f} GB of weights and {cost.cache_bytes / 1e9:.2f} GB "
        f"of cache, {cost.flops / 1e12:.3f} TFLOP (from shapes)",
    ]
    if plan.decode:
        lines.append(_moved(plan, plan.decode))
        lines.append(f"  collectives a step: {_collectives(plan.decode)} (compiled)")
    elif plan.served.shards > 1:
        lines.append(
            f"  collectives a step: {cost.reduced_bytes / 1e6:.2f} MB reduced (from shapes)"
        )
    prefill, tokens = plan.prefill_cost, plan.config.engine.prefill_chunk
    lines.append(
        f"prefill of {tokens} tokens, at best {1e3 * prefill.seconds:.2f} ms "
        f"({tokens / prefill.seconds:,.0f} tokens/s a replica): {_parts(prefill)}; bound by "
        f"{prefill.bound}"
    )
    per_chip = plan.tokens_per_second / plan.target.chips
    lines.append(
        f"generated tokens/s at most {plan.tokens_per_second:,.0f}, {per_chip:,.0f} a chip"
    )
    if plan.decode and plan.prefill:
        lines.append(
            f"compiled in {plan.decode.seconds:.0f} s (decode) and {plan.prefill.seconds:.0f} s "
            f"(prefill); temporaries {plan.decode.memory.temporaries / _MIB:.0f} and "
            f"{plan.prefill.memory.temporaries / _MIB:.0f} MiB"
        )
    return lines


def _moved(plan: Plan, decode: Program) -> str:
    cost = plan.decode_cost
    if plan.chip.platform != "tpu":  # its programs read the cache themselves, and have one memory
        return (
            f"  program moves {decode.step_bytes / 1e9:.2f} GB a step, cache and intermediate "
            "results among them (compiled)"
        )
    ratio = decode.step_bytes / cost.weight_bytes
    whole = (decode.step_bytes + cost.cache_bytes) / (cost.weight_bytes + cost.cache_bytes)
    return (
        f"  program moves {decode.step_bytes / 1e9:.2f} GB a step besides the cache: {ratio:.3f} x "
        f"the weights; with the cache {whole:.3f} x the least; and {decode.vector_bytes / 1e9:.2f} "
        "GB through vector memory (compiled)"
    )


def text(plan: Plan) -> str:
    """For a terminal."""
    rows = [f"  {name:<12} {gib:>9} GiB  {note}" for name, gib, note in memory_rows(plan)]
    largest = _largest(plan)
    return "\n".join(
        [headline(plan), verdict(plan), "one device holds", *rows, largest, *step_lines(plan)]
    )


def _largest(plan: Plan) -> str:
    return (
        f"largest that fits: {plan.largest_rows} rows of {plan.max_len} tokens, or {plan.rows} "
        f"rows of {plan.largest_len} tokens (from shapes)"
    )


def _parts(cost: StepCost) -> str:
    named = ((part, 1e3 * getattr(cost, part)) for part in _PARTS)
    return ", ".join(f"{part} {ms:.2f}" for part, ms in named if ms)


def _collectives(program: Program) -> str:
    found = program.traffic.collectives
    if not found:
        return "none"
    return ", ".join(
        f"{count / program.steps:g} {kind} "
        f"({program.traffic.collective_bytes[kind] / program.steps / 1e6:.2f} MB)"
        for kind, count in sorted(found.items())
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain data, without what differs from run to run (seconds of compiling)."""
    cost = plan.decode_cost
    data = {
        "model": plan.config.model.path,
        "compression": plan.config.compression.preset,
        "target": plan.target.name,
        "devices": len(plan.target.devices),
        "hosts": plan.target.hosts,
        "mesh": {
            "model": plan.served.shards,
            "expert": plan.served.spread,
            "data": plan.replicas,
        },
        "rows": plan.rows,
        "max_len": plan.max_len,
        "context": plan.context,
        "kv_dtype": str(plan.served.kv_dtype),
        "fits": plan.fits,
        "memory": dataclasses.asdict(plan.memory)
        | {"total": plan.memory.total, "budget": plan.budget},
        "largest": {"rows": plan.largest_rows, "max_len": plan.largest_len},
        "remedies": [] if plan.fits else remedies(plan),
        "step": dataclasses.asdict(cost) | {"seconds": plan.step_seconds, "bound": cost.bound},
        "prefill": dataclasses.asdict(plan.prefill_cost) | {"bound": plan.prefill_cost.bound},
        "tokens_per_second": plan.tokens_per_second,
        "tokens_per_second_per_chip": plan.tokens_per_second / plan.target.chips,
        "refusal": plan.refusal,
    }
    for name, program in (("decode", plan.decode), ("prefill", plan.prefill)):
        if program is not None:
            data[f"compiled_{name}"] = {
                "step_bytes": int(program.step_bytes),
                "vector_bytes": int(program.vector_bytes),
                "temporaries": program.memory.temporaries,
                "code": program.memory.code,
                "collectives": {
                    kind: {
                        "count": count / program.steps,
                        "bytes": program.traffic.collective_bytes[kind] / program.steps,
                    }
                    for kind, count in sorted(program.traffic.collectives.items())
                },
            }
    return data


_BODY = """
<h1>{{ title }}</h1>
<p class="digest">{{ verdict }}</p>
<h2>One device holds</h2>
<table><tr><th>what</th><th>GiB</th><th></th></tr>
{% for name, gib, note in memory %}<tr><td>{{ name }}</td><td>{{ gib }}</td><td>{{ note }}</td></tr>
{% endfor %}</table>
<p>{{ largest }}</p>
<h2>Time</h2>
<pre>{{ steps }}</pre>
{{ step_plot }}{{ memory_plot }}
"""


def page(plan: Plan) -> str:
    """The same as a page, with steps and memory over rows."""
    from markupsafe import Markup

    counts = _row_counts(plan)
    return render(
        _BODY,
        title=headline(plan),
        verdict=verdict(plan),
        memory=memory_rows(plan),
        largest=_largest(plan),
        steps="\n".join(step_lines(plan)),
        step_plot=Markup(_step_plot(plan, counts)),
        memory_plot=Markup(_memory_plot(plan, counts)),
    )


def _row_counts(plan: Plan) -> list[int]:
    """Powers of two around the rows that were asked for."""
    top = 2 * max(plan.rows, min(plan.largest_rows, 8 * plan.rows))
    return [1 << k for k in range(top.bit_length())]


def _step_plot(plan: Plan, counts: Sequence[int]) -> str:
    costs = [
        decode_cost(plan.served, plan.chip, rows=rows, context=plan.context) for rows in counts
    ]
    series = [
        Series(
            part,
            [(n, 1e3 * getattr(c, part)) for n, c in zip(counts, costs, strict=True)],
            line=True,
        )
        for part in ("seconds", *_PARTS)
        if any(getattr(c, part) for c in costs)
    ]
    return scatter(series, title="Decode step", x="rows", y="ms at best", from_zero=True)


def _memory_plot(plan: Plan, counts: Sequence[int]) -> str:
    served, engine = plan.served, plan.config.engine
    used = [
        memory_of(served, full_sizes(served, engine, rows=n, max_len=plan.max_len)).total
        for n in counts
    ]
    points = [(n, nbytes / _GIB) for n, nbytes in zip(counts, used, strict=True)]
    limit = [(n, plan.budget / _GIB) for n in counts]
    series = [Series("needed", points, line=True), Series("there is", limit, line=True)]
    return scatter(series, title="Memory of a device", x="rows", y="GiB", from_zero=True)
