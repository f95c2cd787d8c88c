"""A replica: an engine somewhere else that is asked for one beat at a time.

A beat takes what changed (requests added, aborted) and gives what came of one step, so a thread of
this process and an actor on another machine look alike: `beat` returns a future at once. The engine
dispatches ahead, so its device works on while an answer travels.
Read next: `pool.py` (who asks), `ray_replicas.py` (actors).
"""

import dataclasses
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import jax

from lepton_jax import compile_cache
from lepton_jax.engine.protocol import Limits, TokenEngine
from lepton_jax.engine.request import StepOutput
from lepton_jax.telemetry import peak_memory_bytes


@dataclasses.dataclass(frozen=True)
class Command:
    """A call of an engine's method."""

    name: str
    arguments: tuple = ()


@dataclasses.dataclass(frozen=True)
class Beat:
    """What a beat gave; `has_work` says whether another can give something."""

    outputs: list[StepOutput]
    stats: Mapping[str, Any]
    has_work: bool


class Replica(Protocol):
    """An engine somewhere else, or in this process (`here`); `slots` rows run on it at once."""

    here: bool
    name: str
    slots: int
    limits: Limits

    def beat(self, commands: Sequence[Command]) -> Future[Beat]:
        """Begins a beat; one at a time. The future fails when the replica is dead."""

    def close(self) -> None:
        """Gives its resources back; waits for nothing."""


def serve(engine: TokenEngine, commands: Sequence[Command]) -> Beat:
    """One beat of an engine, where the engine is."""
    for command in commands:
        getattr(engine, command.name)(*command.arguments)
    outputs = engine.step() if engine.has_work else []
    return Beat(outputs, engine.stats(), engine.has_work)


def process_stats() -> dict[str, Any]:
    """Of the process that has the devices, beside `Engine.stats()`: the kind of device, most bytes
    held by the process and by a device that counts them, compiled programs found in the cache.
    """
    device, cache = jax.local_devices()[0], compile_cache.counts()
    stats = {
        "device": device.device_kind,
        "peak_memory_bytes": peak_memory_bytes(),
        "compile_cache_hits": cache.hits,
        "compile_cache_misses": cache.misses,
    }
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return stats if peak is None else stats | {"device_peak_memory_bytes": peak}


class ThreadReplica:
    """An engine in a thread of this process, on devices of its own."""

    here = True

    def __init__(self, name: str, engine: Any, *, slots: int):
        """`engine` is a `TokenEngine` with `limits` and `close`."""
        self.name, self.slots, self.limits = name, slots, engine.limits
        self._engine = engine
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        # A daemon: an engine that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"replica-{name}", daemon=True)
        self._thread.start()

    def beat(self, commands: Sequence[Command]) -> Future[Beat]:
        future: Future[Beat] = Future()
        self._asked.put((future, tuple(commands)))
        return future

    def close(self) -> None:
        self._asked.put(None)
        self._engine.close()

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            future, commands = asked
            try:
                beat = serve(self._engine, commands)
            except BaseException as error:  # whoever waits for the beat must hear of it
                future.set_exception(error)
            else:
                future.set_result(beat)
        self._engine.close()  # again: a beat that was under way may have made a cache
