"""A plan: whether a model fits, what is the most that does, how fast a step can be and why.

`make_plan(config)` computes everything from shapes and, unless `plan.compile` is false, compiles
the engine's decode block and prefill and puts the compiler's account in the place of the estimates.
Read next: `report.py`, `search.py`.
"""

from __future__ import annotations

import dataclasses

from lepton_jax.config import EngineSection, RunConfig
from lepton_jax.engine.row_params import SampleSpec
from lepton_jax.engine.sizing import DEVICE_SHARE, max_len_of
from lepton_jax.planning.chips import Chip
from lepton_jax.planning.from_config import (
    Target,
    require_plannable,
    served_of,
    target_of,
)
from lepton_jax.planning.memory import Memory, full_sizes, largest_len, largest_rows, memory_of
from lepton_jax.planning.programs import (
    OutOfMemoryError,
    Program,
    compile_decode,
    compile_prefill,
)
from lepton_jax.planning.roofline import StepCost, decode_cost, prefill_cost
from lepton_jax.planning.served import Served


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a model on a slice; seconds and bytes are of one device.

    Attributes:
      config: what was asked.
      target: where.
      served: the model; one device of `served.shards` holds a part.
      max_len, rows, context: of the decode step.
      memory: by the compiler where `decode` is there, else from shapes.
      largest_rows, largest_len: the most that fits with the other as asked; 0: nothing does.
      decode_cost, prefill_cost: rooflines; prefill's of one chunk.
      decode, prefill: the compiled programs.
      refusal: what the compiler says where a program needs more than there is.
    """

    config: RunConfig
    target: Target
    served: Served
    max_len: int
    rows: int
    context: int
    memory: Memory
    largest_rows: int
    largest_len: int
    decode_cost: StepCost
    prefill_cost: StepCost
    decode: Program | None = None
    prefill: Program | None = None
    refusal: str = ""

    @property
    def chip(self) -> Chip:
        return self.target.chip

    @property
    def budget(self) -> int:
        """Bytes that weights, cache and programs may take of a device."""
        return budget_of(self.chip)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.budget and not self.refusal

    @property
    def replicas(self) -> int:
        """Copies of the model: `mesh.data`, or where that is 1 as many as there is room for."""
        asked = self.config.mesh.data
        return asked if asked > 1 else len(self.target.devices) // self.served.shards

    @property
    def step_seconds(self) -> float:
        """Of a decode step at best; of a TPU with the compiled program's traffic where it is known.

        Elsewhere programs read the cache themselves, which `cost` counts, and at its largest view.
        """
        cost = self.decode_cost
        if self.decode is None or self.chip.platform != "tpu":
            return cost.seconds
        moved = (self.decode.step_bytes - cost.weight_bytes) / self.chip.bandwidth
        return cost.seconds + max(0.0, moved)

    @property
    def tokens_per_second(self) -> float:
        """Of all replicas at best."""
        return self.replicas * self.rows / self.step_seconds


def budget_of(chip: Chip) -> int:
    return int(DEVICE_SHARE * chip.memory)


def make_plan(config: RunConfig) -> Plan:
    """Raises ValueError, naming the field to change, where there is nothing to plan."""
    require_plannable(config)
    target = target_of(config)
    served = served_of(config, target.chip)
    engine = config.engine
    max_len = max_len_of(engine, served.config.max_position)
    context = min(config.plan.context or max_len, max_len)
    budget = budget_of(target.chip)
    sizes = full_sizes(served, engine, rows=engine.rows, max_len=max_len)
    plan = Plan(
        config=config,
        target=target,
        served=served,
        max_len=max_len,
        rows=engine.rows,
        context=context,
        memory=memory_of(served, sizes),
        largest_rows=largest_rows(served, _free(engine), max_len=max_len, budget=budget),
        largest_len=largest_len(served, _free(engine), rows=engine.rows, budget=budget),
        decode_cost=decode_cost(served, target.chip, rows=engine.rows, context=context),
        prefill_cost=prefill_cost(served, target.chip, tokens=engine.prefill_chunk),
    )
    return _compiled(plan) if config.plan.compile and plan.fits else plan


def _free(engine: EngineSection) -> EngineSection:
    """With as many pages as rows need, not as many as are set."""
    return dataclasses.replace(engine, num_pages=0)


def _compiled(plan: Plan) -> Plan:
    sizes = full_sizes(plan.served, plan.config.engine, rows=plan.rows, max_len=plan.max_len)
    options = dict(devices=plan.target.devices, spec=SampleSpec.of(plan.config.sampling, (0, 1, 2)))
    try:
        decode = compile_decode(plan.served, sizes, **options)
        prefill = compile_prefill(plan.served, sizes, **options)
    except OutOfMemoryError as error:
        return dataclasses.replace(plan, refusal=str(error))
    memory = max(decode.memory, prefill.memory, key=lambda memory: memory.total)
    return dataclasses.replace(plan, decode=decode, prefill=prefill, memory=memory)
