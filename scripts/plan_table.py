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

NAMES = {
    "llama-3.1-8b": "Llama 3.1 8B",
    "llama-3.1-70b": "Llama 3.1 70B",
    "qwen3-32b": "Qwen3 32B",
    "gemma-3-27b": "Gemma 3 27B",
    "mixtral-8x7b": "Mixtral 8x7B",
    "qwen3-30b-a3b": "Qwen3 30B A3B",
}
# Model, preset, slice, mesh.model, rows, max_len.
CASES = [
    ("llama-3.1-8b", "none", "v5e:1x1", 1, 32, 1024),
    ("llama-3.1-8b", "int8", "v5e:1x1", 1, 32, 1024),
    ("llama-3.1-8b", "w8a8", "v5e:1x1", 1, 32, 1024),
    ("llama-3.1-8b", "int4", "v5e:1x1", 1, 32, 1024),
    ("llama-3.1-8b", "none", "v6e:1x1", 1, 64, 1024),
    ("llama-3.1-8b", "int8", "v6e:1x1", 1, 64, 1024),
    ("llama-3.1-8b", "w8a8", "v6e:1x1", 1, 64, 1024),
    ("llama-3.1-8b", "int4", "v6e:1x1", 1, 64, 1024),
    ("llama-3.1-70b", "int8", "v5e:2x4", 8, 32, 2048),
    ("llama-3.1-70b", "int8", "v6e:2x4", 8, 64, 2048),
    ("llama-3.1-70b", "int8", "v5p:2x2x1", 4, 64, 2048),
    ("qwen3-32b", "int8", "v5e:2x2", 4, 16, 2048),
    ("qwen3-32b", "none", "tpu7x:1x1x1", 2, 64, 2048),
    ("gemma-3-27b", "int8", "v6e:2x2", 4, 32, 2048),
    ("mixtral-8x7b", "int8", "v5e:2x4", 8, 32, 2048),
    ("qwen3-30b-a3b", "int8", "v6e:2x2", 4, 64, 2048),
]
HEAD = (
    "| model | preset | slice | rows x tokens | a device holds, GiB | temporaries, MiB | traffic | "
    "all-reduces | step at best | tokens/s a chip, at most |"
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


def names_of(case: tuple) -> list[str]:
    """The first cells of a row, which say what it is about."""
    model, preset, topology, _, rows, max_len = case
    return [NAMES[model], preset.replace("none", "bf16"), topology, f"{rows} x {max_len}"]


def line(case: tuple, plan: Plan, decode: Program | None) -> str:
    """One row; traffic in multiples of weights and live cache."""
    gib = 2**30
    if decode is None:
        short = (plan.memory.total - plan.budget) / gib
        return f"| {' | '.join(names_of(case))} | {short:.2f} too many | | | | | |"
    plan = dataclasses.replace(plan, decode=decode)
    cost = plan.decode_cost
    least = cost.weight_bytes + cost.cache_bytes
    cells = [
        *names_of(case),
        f"{decode.memory.total / gib:.1f} of {plan.budget / gib:.1f}",
        f"{decode.memory.temporaries / 2**20:,.0f}",
        f"{(decode.step_bytes + cost.cache_bytes) / least:.3f}",
        f"{sum(decode.traffic.collectives.values()) / decode.steps:g}",
        f"{1e3 * plan.step_seconds:.1f} ms",
        f"{plan.tokens_per_second / plan.target.chips:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="keep lines that contain this text")
    only = parser.parse_args().only
    print(f"{HEAD}\n{'|---' * 10}|", flush=True)
    for case in CASES:
        if only in " ".join(map(str, case)):
            plan = plan_of(case)
            print(line(case, plan, compiled(plan) if plan.fits else None), flush=True)


if __name__ == "__main__":
    main()
