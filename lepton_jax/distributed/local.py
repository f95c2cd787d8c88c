"""Replicas in this process: engines in threads, each on devices of its own.

Read next: `pool.py`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.config import EngineSection, MeshSection, RunConfig
from lepton_jax.distributed.pool import Pool
from lepton_jax.distributed.replicas import Replica, ThreadReplica
from lepton_jax.engine.loop import Engine
from lepton_jax.sharding import Devices, Placement, grid_of
from lepton_jax.text.constraints import guide_for
from lepton_jax.text.tokenizer import Tokenizer


def device_groups(mesh: MeshSection, found: Sequence[jax.Device] | None = None) -> list[Devices]:
    """The devices of each of `mesh.data` replicas. Raises ValueError where there are too few.

    Several replicas are of this process; a single one may span hosts.
    """
    data, model = mesh.data, mesh.model
    if found is None:
        found = jax.devices() if data == 1 else jax.local_devices()
    if data * model > len(found):
        cpu = " (JAX_NUM_CPU_DEVICES=N makes N of a CPU)" if found[0].platform == "cpu" else ""
        raise ValueError(
            f"mesh.data={data} replicas of mesh.model={model} devices need {data * model}, and "
            f"there are {len(found)} ({found[0].platform}): lower one of them, or run where there "
            f"are more{cpu}"
        )
    return [grid_of(found[n * model : (n + 1) * model], mesh.expert) for n in range(data)]


def local_engines(
    loaded: Loaded,
    section: EngineSection,
    *,
    mesh: MeshSection,
    tokenizer: Tokenizer,
    draft: Loaded | None = None,
    **asked: Any,
) -> list[Engine]:
    """An engine for each replica, ready for guided rows.

    Args:
      loaded: the model.
      section: of the config.
      mesh: whose `device_groups` they are on.
      tokenizer: the model's.
      draft: the model that proposes, for `section.speculation` "draft".
      asked: more arguments of `Engine`.
    """
    engines = []
    for devices in device_groups(mesh):
        if draft:  # before the cache is planned, which takes what is left
            place = Placement(devices, loaded.model.heads).beside(draft.model.heads)
            draft_leaves = place.put_all(draft.model.specs, draft.leaves)
        eos_ids = tokenizer.eos_ids
        how = dict(section=section, eos_ids=eos_ids, devices=devices) | asked
        engine = Engine(loaded.model, loaded.leaves, **how)
        engine.guide_with(functools.partial(guide_for, tokenizer))
        if draft:
            engine.draft_with(draft.model, draft_leaves, cost=section.draft_cost)
        engines.append(engine)
    return engines


def local_pool(engines: Sequence[Engine], config: RunConfig) -> Pool:
    """Engines of this process as one."""
    rows = config.engine.rows
    replicas = [ThreadReplica(f"{n}", engine, slots=rows) for n, engine in enumerate(engines)]
    return pool_of(replicas, config)


def pool_of(replicas: Sequence[Replica], config: RunConfig) -> Pool:
    """Replicas as one engine: in lockstep where a job promises the same bytes (`job.exact`)."""
    stall_after = config.pool.stall_seconds
    return Pool(replicas, lockstep=config.job.exact, stall_after=stall_after)
