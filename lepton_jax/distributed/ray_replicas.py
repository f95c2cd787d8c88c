"""Replicas as Ray actors, on this machine or on a cluster's: each loads the model itself.

Ray (extra `ray`) starts the processes, moves calls and answers, and says when an actor is dead;
here is only what an actor does. It is asked for one beat at a time like any replica.
Read next: `replicas.py` (beats), `pool.py` (who asks).
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import jax

from lepton_jax.config import PoolSection
from lepton_jax.distributed.replicas import Beat, Command, process_stats, serve
from lepton_jax.engine.protocol import Limits
from lepton_jax.kept_programs import source_digest


class Starter(Protocol):
    """A loaded model that can be started: what runs in an actor, `LeptonEngine` in effect."""

    engine: Any  # a `TokenEngine` with `limits`, after `start`
    fingerprint: str
    loaded: Any  # with `bytes`

    def start(self, *, workload: Sequence[Any], strict: bool, profile: Any) -> Any: ...


Load = Callable[[float], Starter]  # with the share of the host's memory that it may plan with


def leave_devices(section: PoolSection) -> None:
    """Keeps a driver off the devices that its actors shall have; before jax looks for devices."""
    if section.ray and platform_of(section):
        jax.config.update("jax_platforms", "cpu")


def platform_of(section: PoolSection) -> str | None:
    """Of the devices that actors ask for; None: they take what their machines have."""
    return "tpu" if section.tpus else "gpu" if section.gpus else None


class _Actor:
    """What Ray runs."""

    def __init__(self):
        self._process: dict[str, Any] = {}
        self._due = -math.inf

    def node(self) -> str:
        """The machine that it is on."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def load(self, load: Load, cores: range, share: float) -> tuple[str, int, str]:
        """Fingerprint and bytes of the loaded model; digest of the code that loaded it.

        `cores` of the machine to keep to, none where there are other devices; `share` of its memory
        that this actor may plan with.
        """
        if cores and hasattr(os, "sched_setaffinity"):
            found = sorted(os.sched_getaffinity(0))  # before XLA counts them for its threads
            os.sched_setaffinity(0, {found[core % len(found)] for core in cores})
        if not cores:
            # The driver's environment may keep it off the devices (JAX_PLATFORMS=cpu).
            jax.config.update("jax_platforms", None)
        self._starter = load(share)
        return self._starter.fingerprint, self._starter.loaded.bytes, source_digest()

    def start(self, workload: Sequence[Any], strict: bool, profile: Any) -> Limits:
        self._starter.start(workload=workload, strict=strict, profile=profile)
        return self._starter.engine.limits

    def beat(self, commands: Sequence[Command]) -> Beat:
        beat, now = serve(self._starter.engine, commands), time.monotonic()
        if now >= self._due or not beat.has_work:  # the last is exact
            self._process, self._due = process_stats(), now + 1.0
        return dataclasses.replace(beat, stats={**beat.stats, **self._process})


class RayReplica:
    """An actor as a `Replica`."""

    here = False

    def __init__(self, name: str, actor: Any, *, slots: int, limits: Limits):
        self.name, self.slots, self.limits, self._actor = name, slots, limits, actor

    def beat(self, commands: Sequence[Command]) -> Future[Beat]:
        return self._actor.beat.remote(list(commands)).future()

    def close(self) -> None:
        """Ends the actor's process; of one that is dead already too."""
        import ray

        ray.kill(self._actor)


class RayActors:
    """Actors that have loaded a model: `start` makes replicas of them.

    Attributes:
      fingerprint: of the model, the same in all; `bytes` that its weights take in each.
    """

    def __init__(self, section: PoolSection, load: Load):
        """Raises ValueError where Ray is missing, can't be reached, or lacks what is asked of it;
        what was started here is ended then.

        `load` is pickled and called in each actor.
        """
        try:
            import ray
        except ImportError as error:
            raise ValueError(
                f"pool.ray={section.ray} needs Ray: pip install 'lepton_jax[ray]'"
            ) from error
        self._ray, self._mine = ray, not ray.is_initialized()
        if self._mine:
            self._connect(section)
        self._actors: list[Any] = []
        try:
            self._start_actors(section)
            self.fingerprint, self.bytes = self._one_model(section, load)
        except BaseException:
            self.close()
            raise

    def _start_actors(self, section: PoolSection) -> None:
        self._check_resources(section)
        options: dict[str, Any] = {"num_cpus": section.cpus, "num_gpus": section.gpus}
        if section.tpus:
            options["resources"] = {"TPU": section.tpus}
        actor = self._ray.remote(**options)(_Actor)
        self._actors = [actor.remote() for _ in range(section.ray)]

    def _parts(self, section: PoolSection) -> list[tuple[range, float]]:
        """Cores and share of the memory for each actor: those that are on one machine share it."""
        nodes = self._get([actor.node.remote() for actor in self._actors], "say where it is")
        if platform_of(section):
            return [(range(0), 1.0)] * len(nodes)
        cores, places = max(1, int(section.cpus)), [nodes[:n].count(m) for n, m in enumerate(nodes)]
        return [
            (range(place * cores, (place + 1) * cores), 1 / nodes.count(node))
            for place, node in zip(places, nodes, strict=True)
        ]

    def start(
        self, workload: Sequence[Any], *, slots: int, strict: bool, profile: Any
    ) -> list[RayReplica]:
        """Plans memory and begins to compile in all actors; arguments as of `Starter.start`."""
        shared = self._ray.put(list(workload))
        limits = self._get([a.start.remote(shared, strict, profile) for a in self._actors], "start")
        pairs = enumerate(zip(self._actors, limits, strict=True))
        return [RayReplica(f"{n}", a, slots=slots, limits=limit) for n, (a, limit) in pairs]

    def _one_model(self, section: PoolSection, load: Load) -> tuple[str, int]:
        pairs = list(zip(self._actors, self._parts(section), strict=True))
        models = self._get([a.load.remote(load, *part) for a, part in pairs], "load the model")
        fingerprints, sizes, sources = zip(*models, strict=True)
        if {*sources} != {source_digest()}:
            raise ValueError(
                f"the code of lepton_jax is {source_digest()} here and {', '.join(sources)} in the "
                "replicas: install the same version on all machines"
            )
        if len({*fingerprints}) > 1:
            raise ValueError(
                f"model.path holds different models for the replicas: {', '.join(fingerprints)}; "
                "copy the same files to all machines"
            )
        return fingerprints[0], sizes[0]

    def close(self) -> None:
        """Ends the actors, and Ray where it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._mine:
            self._ray.shutdown()

    def _connect(self, section: PoolSection) -> None:
        import logging

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if section.address:
            options["address"] = section.address
        else:
            options |= {"include_dashboard": False}
        try:
            self._ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"pool.address={section.address!r}: Ray can't be reached or started: {error}"
            ) from error

    def _check_resources(self, section: PoolSection) -> None:
        """An actor that no machine can hold would wait forever."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for resource, field in (("CPU", "cpus"), ("GPU", "gpus"), ("TPU", "tpus")):
            each = getattr(section, field)
            found = [machine.get(resource, 0) for machine in machines]
            if each and sum(int(count / each + 1e-9) for count in found) < section.ray:
                raise ValueError(
                    f"pool.ray={section.ray} actors with pool.{field}={each:g} each don't fit: "
                    f"Ray's machines have {', '.join(f'{count:g}' for count in found)} {resource}, "
                    "and an actor is on one of them; lower one of the two or add machines"
                )

    def _get(self, calls: list, what: str) -> list:
        try:
            return self._ray.get(calls)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise ValueError(f"a replica can't {what}: {cause}") from error
        except self._ray.exceptions.RayActorError as error:
            raise ValueError(f"a replica died before it could {what}: {error}") from error
