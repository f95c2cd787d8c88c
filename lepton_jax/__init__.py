"""lepton_jax: batched inference of language models in JAX.

    from lepton_jax import LeptonEngine, SamplingParams

The way of a prompt: `jobs` -> `text` -> `engine` -> `models` on `kernels` and `tensors`. Drivers
are `lepton_jax.run`, `compress`, `plan`, `tune` and `bench`. The package loads no jax until the
engine is named.
"""

from lepton_jax import telemetry as telemetry  # its clock begins
from lepton_jax.config import (
    CascadeSection,
    EngineSection,
    MeshSection,
    RunConfig,
    SamplingParams,
    ScoringSection,
)

__all__ = [
    "CascadeSection",
    "EngineSection",
    "LeptonEngine",
    "LeptonOptimizer",
    "MeshSection",
    "RunConfig",
    "SamplingParams",
    "ScoringSection",
    "compress",
]


def __getattr__(name: str):
    if name == "LeptonOptimizer":
        from lepton_jax.optimizer.lepton_optimizer import LeptonOptimizer

        return LeptonOptimizer
    if name in ("LeptonEngine", "compress"):
        from lepton_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
