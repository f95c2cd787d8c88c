"""Vector memory (VMEM) of a TPU: what a Pallas kernel claims for itself, and what stays out of it.

More than it uses. What a kernel leaves to XLA is filled, while it runs, with a layer's whole cache
where that fits, which XLA moves in and out again: Llama 3.1 70B int8 on v6e:2x4 (67 MB a layer)
moved 1.78 times the least bytes a step with 32 MiB claimed, 1.00 times with 96 (libtpu 0.0.50.1,
2026-11-29). A cache that fits what is left is kept out by name: with 8 rows 1.017 and 1.000.
"""

from typing import Any

import jax

LEAST = 32 * 2**20  # what the kernels' blocks may need; an interpreted kernel has no chip


def claim() -> int:
    """Bytes for `vmem_limit_bytes`, by the chip that the program is lowered for."""
    from jax.experimental.pallas import tpu as pltpu  # takes a second

    if not pltpu.is_tpu_device():
        return LEAST
    return max(LEAST, pltpu.get_tpu_info().vmem_capacity_bytes * 3 // 4)


def kept_out(arguments: Any) -> Any:
    """A kernel's arguments that stay in main memory; as they are where no TPU runs it."""
    from jax.experimental.pallas import tpu as pltpu

    if not pltpu.is_tpu_device():
        return arguments
    return jax.tree.map(
        lambda array: pltpu.with_memory_space_constraint(array, pltpu.HBM), arguments
    )
