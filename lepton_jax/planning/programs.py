"""The engine's real programs, compiled for devices that may not be there, and what they cost.

The runner lowers them as it always does, from abstract leaves; nothing is allocated. What comes out
is read here: memory by the compiler's account, traffic and collectives by `traffic.py`.
Read next: `topology.py` (the devices), `plan.py` (what is made of it).
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Sequence

import jax

from lepton_jax.engine.packing import DecodeShape, PrefillShape
from lepton_jax.engine.row_params import SampleSpec
from lepton_jax.engine.rungs import Sizes
from lepton_jax.engine.runner import Runner
from lepton_jax.planning.memory import Memory, cache_bytes
from lepton_jax.planning.module_text import VECTOR_MEMORY, Module
from lepton_jax.planning.roofline import is_expert, visited_share
from lepton_jax.planning.served import Served
from lepton_jax.planning.topology import compile_absent
from lepton_jax.planning.traffic import Traffic, traffic
from lepton_jax.sharding import Placement, grid_of


class OutOfMemoryError(ValueError):
    """A program needs more than its device has, says the compiler."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: its memory, its traffic in one run, how many steps that is, and the
    seconds that compiling took.
    """

    kind: str
    steps: int
    memory: Memory
    traffic: Traffic
    seconds: float
    text: str = dataclasses.field(repr=False)
    through_vector_memory: float = 0.0  # bytes in one run

    @property
    def vector_bytes(self) -> float:
        """Through vector memory in one step, what kernels do there left out."""
        return self.through_vector_memory / self.steps

    @property
    def step_bytes(self) -> float:
        """Through main memory in one step, caches that a kernel reads left out."""
        return self.traffic.total / self.steps


def compile_decode(
    served: Served, sizes: Sizes, *, devices: Sequence[jax.Device], spec: SampleSpec
) -> Program:
    """The decode block of all rows, with the largest view where the backend has views.

    Raises OutOfMemoryError.
    """
    runner = _runner(served, sizes, devices, spec)
    shapes = [s for s in _shapes(runner, DecodeShape) if not s.draft]
    return _compile(served, runner, max(shapes, key=lambda s: (s.rows, s.view)))


def compile_prefill(
    served: Served, sizes: Sizes, *, devices: Sequence[jax.Device], spec: SampleSpec
) -> Program:
    """The prefill of `sizes.prefill_chunk` tokens. Raises OutOfMemoryError."""
    runner = _runner(served, sizes, devices, spec)
    return _compile(served, runner, max(_shapes(runner, PrefillShape), key=lambda s: s.tokens))


def _shapes(runner: Runner, kind: type) -> list:
    shapes = runner.shapes_for(runner.sizes.prefill_chunk, runner.sizes.rows)
    return [shape for shape in shapes if isinstance(shape, kind)]


def _runner(served: Served, sizes: Sizes, devices, spec: SampleSpec) -> Runner:
    model = served.model.with_context(sizes.max_len)
    placement = Placement(grid_of(devices[: served.shards], served.spread), model.heads)
    leaves = [placement.planned(model.specs[p], leaf) for p, leaf in served.leaves.items()]
    runner = Runner(
        model,
        tuple(leaves),
        sizes=sizes,
        backend=served.backend,
        kv_dtype=served.kv_dtype,
        eos_ids=(),
        placement=placement,
    )
    runner.require(spec)
    return runner


def _compile(served: Served, runner: Runner, shape: DecodeShape | PrefillShape) -> Program:
    absent = runner.placement.devices[0] not in jax.devices()
    begin = time.perf_counter()
    with _chip_in_scope(runner.placement) if absent else contextlib.nullcontext():
        lowered = runner.lower(shape)
    try:
        compiled = compile_absent(lowered) if absent else lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(re.sub(r"\s+", " ", str(error))[:400]) from error
    seconds = time.perf_counter() - begin
    decode, text = isinstance(shape, DecodeShape), compiled.as_text()
    steps, tokens = (shape.steps, shape.rows) if decode else (1, shape.tokens)
    counted = dict(steps=steps, partly=_read_in_part(served, runner.sizes, tokens))
    module = Module(text)
    return Program(
        kind="decode" if decode else "prefill",
        steps=steps,
        memory=_memory(served, runner.sizes, compiled),
        traffic=traffic(module, **counted),
        seconds=seconds,
        text=text,
        through_vector_memory=traffic(module, space=VECTOR_MEMORY, **counted).total,
    )


def _read_in_part(served: Served, sizes: Sizes, tokens: int) -> dict[int, float]:
    """What a kernel reads of caches and of experts, by their bytes; see `traffic`."""
    cache = jax.tree.leaves(served.cache_layer(sizes.num_pages, sizes.page_size))
    partly = {spec.nbytes: 0.0 for spec in cache}
    for path in filter(is_expert, served.leaves):
        piece, share = served.piece(path), visited_share(served.config, tokens)
        by_expert = [a for a in jax.tree.leaves(piece) if len(a.shape) == len(piece.shape)]
        partly |= {array.nbytes: share * array.nbytes for array in by_expert}
    return partly


def _chip_in_scope(placement: Placement):
    """Pallas asks the mesh in scope, not the arguments, which chip it compiles for."""
    return jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh)


def _memory(served: Served, sizes: Sizes, compiled: jax.stages.Compiled) -> Memory:
    """By the compiler's account of one device."""
    found = compiled.memory_analysis()
    weights, cache = served.weight_bytes, cache_bytes(served, sizes)
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(
        weights=weights,
        cache=cache,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        other=held - weights - cache,
    )
