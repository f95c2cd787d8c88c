r"""README's table of plans: released models on TPU slices, decode blocks compiled without a TPU.

    PYTHONPATH=. python scripts/plan_table.py [--only=v6e:1x1]

Prints a line of markdown as each is done; all of them take some minutes on two cores. A plan that
doesn't fit isn't compiled. `--only` keeps the lines that contain a text.
"""

import argparse
import dataclasses

from lepton_jax.config import (
    CompressionSection,
    EngineSection,
    MeshSection,
    ModelSection,
    PlanSection,
    RunConfig,
)
from lepton_jax.engine.row_params import SampleSpec
from lepton_jax.planning.memory import full_sizes
from lepton_jax.planning.plan import Plan, make_plan
from lepton_jax.planning.programs import Program, compile_decode

# Model, preset, slice, mesh.model, rows, max_len.
CASES = [
    ("llama-3.1-8b", "none", "v5e:1x1", 1, 32, 1024),
    ("llama-3.1-8b", "int8", "v5e:1x1", 1, 32, 1024),
    ("llama-3.1-8b", "w8a8", "v5e:1x1", 1, 32, 1024),
    ("llama-3.1-8b", "int4", "v5e:1x1", 1, 32, 1024),
    ("llama-3.1-70b", "int8", "v5e:2x4", 8, 32, 2048),
    ("llama-3.1-8b", "none", "v6e:1x1", 1, 64, 1024),
    ("llama-3.1-8b", "int8", "v6e:1x1", 1, 64, 1024),
    ("llama-3.1-8b", "w8a8", "v6e:1x1", 1, 64, 1024),
    ("llama-3.1-8b", "int4", "v6e:1x1", 1, 64, 1024),
    ("llama-3.1-70b", "int8", "v6e:2x4", 8, 64, 2048),
    ("qwen3-32b", "int8", "v5e:2x2", 4, 16, 2048),
    ("gemma-3-27b", "int8", "v6e:2x2", 4, 32, 2048),
    ("mixtral-8x7b", "int8", "v5e:2x4", 8, 32, 2048),
    ("qwen3-30b-a3b", "int8", "v6e:2x2", 4, 64, 2048),
    ("llama-3.1-70b", "int8", "v5p:2x2x1", 4, 64, 2048),
    ("qwen3-32b", "none", "tpu7x:1x1x1", 2, 64, 2048),
]
HEAD = (
    "| model | preset | slice | rows x tokens | weights | cache | temporaries | fits | traffic | "
    "all-reduces | step | tokens/s a chip | bound by | compiled in |"
)


def plan_of(case: tuple) -> Plan:
    """The plan of a case, from shapes."""
    model, preset, topology, shards, rows, max_len = case
    return make_plan(
        RunConfig(
            model=ModelSection(path=f"published:{model}"),
            compression=CompressionSection(preset=preset),
            mesh=MeshSection(model=shards),
            engine=EngineSection(rows=rows, max_len=max_len),
            plan=PlanSection(topology=topology, compile=False),
        )
    )


def compiled(plan: Plan) -> Program:
    """Its decode block, greedy, with places for four ids that end a row."""
    return compile_decode(
        plan.served,
        full_sizes(plan.served, plan.config.engine, rows=plan.rows, max_len=plan.max_len),
        devices=plan.target.devices,
        spec=SampleSpec(stop_ids=4),
    )


def line(case: tuple, plan: Plan, decode: Program | None) -> str:
    """One row; sizes in GiB of a device, traffic in multiples of weights and live cache."""
    model, preset, topology, shards, rows, max_len = case
    gib = 2**30
    cells = [
        model,
        preset,
        f"{topology}, mesh.model={shards}",
        f"{rows} x {max_len}",
        f"{plan.memory.weights / gib:.2f}",
        f"{plan.memory.cache / gib:.2f}",
    ]
    if decode is None:
        short = (plan.memory.total - plan.budget) / gib
        return f"| {' | '.join(cells)} | | {short:.2f} GiB short | | | | | | |"
    plan = dataclasses.replace(plan, decode=decode)
    cost = plan.decode_cost
    least = cost.weight_bytes + cost.cache_bytes
    total = decode.memory.total
    cells += [
        f"{decode.memory.temporaries / 2**20:.0f} MiB",
        f"{total / gib:.2f} of {plan.budget / gib:.2f}",
        f"{(decode.step_bytes + cost.cache_bytes) / least:.3f}",
        f"{sum(decode.traffic.collectives.values()) / decode.steps:g}",
        f"{1e3 * plan.step_seconds:.1f} ms",
        f"{plan.tokens_per_second / plan.target.chips:,.0f}",
        cost.bound,
        f"{decode.seconds:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="keep lines that contain this text")
    only = parser.parse_args().only
    print(f"{HEAD}\n{'|---' * 14}|", flush=True)
    for case in CASES:
        if only in " ".join(map(str, case)):
            plan = plan_of(case)
            print(line(case, plan, compiled(plan) if plan.fits else None), flush=True)


if __name__ == "__main__":
    main()
