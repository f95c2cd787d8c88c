"""Compiled programs by their shape: made ahead in the background, late where nobody foresaw them.

`warm_up` queues shapes and `get` waits for one, so a job runs as soon as the programs of its first
beat are there while the others are still being compiled. A shape that was never queued is compiled
late with a warning, or refused in strict mode. How a shape is compiled is the runner's business.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lepton_jax import host_memory

log = logging.getLogger(__name__)

_THREADS = 2  # tracing holds the interpreter, XLA doesn't: more would only wait


class LateCompileError(RuntimeError):
    """A strict engine met a program shape that its warm-up had not asked for."""


class Programs:
    """What `compile_shape` makes, kept by shape.

    Attributes:
      compiled: the programs that are ready.
      late: how many the warm-up had not asked for.
    """

    def __init__(self, compile_shape: Callable[[Any], Any], *, strict: bool = False):
        self.compiled: dict[Any, Any] = {}
        self.late = 0
        self._compile_shape, self._strict = compile_shape, strict
        self._queued: dict[Any, Future] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._warm = False
        self._clock, self._busy, self._since = threading.Lock(), 0, 0.0
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """Until now, during which one was being compiled or fetched from the compilation cache."""
        with self._clock:
            return self._seconds + (time.perf_counter() - self._since if self._busy else 0.0)

    @property
    def mean_seconds(self) -> float:
        """That one took until now; 0 before the first."""
        return self.seconds / len(self.compiled) if self.compiled else 0.0

    def warm_up(self, shapes: Sequence[Any], *, wait: bool) -> None:
        """Queues these shapes in their order. `wait`: returns when all are compiled."""
        self._warm = True
        missing = [s for s in shapes if s not in self.compiled and s not in self._queued]
        if missing and self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="compile")
        for shape in missing:
            self._queued[shape] = self._pool.submit(self._compile, shape)
        for shape in shapes if wait else ():
            self.get(shape)

    def get(self, shape: Any) -> Any:
        """The program of a shape; waits where it is being compiled.

        Raises LateCompileError in strict mode on a shape that no warm-up asked for.
        """
        if shape in self.compiled:
            return self.compiled[shape]
        queued = self._queued.pop(shape, None)
        if queued is None and self._warm:
            self.late += 1
            message = f"{shape} was not part of the warm-up"
            if self._strict:
                raise LateCompileError(message)
            log.warning("compiling while the job runs: %s", message)
        if queued is None or queued.cancel():  # not begun: what is needed now goes first
            return self._compile(shape)
        return queued.result()

    def close(self) -> None:
        """Drops what is queued and not begun."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
        self._queued.clear()

    def _compile(self, shape: Any) -> Any:
        with self._clock:
            self._since = self._since if self._busy else time.perf_counter()
            self._busy += 1
        try:
            program = self.compiled[shape] = self._compile_shape(shape)
        finally:
            with self._clock:
                self._busy -= 1
                self._seconds += 0.0 if self._busy else time.perf_counter() - self._since
        host_memory.release()
        return program
