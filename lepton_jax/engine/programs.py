"""Compiled programs by their shape: made ahead in the background, late where nobody foresaw them.

`warm_up` queues shapes and `get` waits for one, so a job runs as soon as the programs of its first
beat are there while the others are still being compiled. A shape that was never queued is compiled
late with a warning, or refused in strict mode. How a shape is compiled is the runner's business.
"""

import functools
import logging
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lepton_jax import host_memory
from lepton_jax.kept_programs import KeptProgram

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

    def __init__(self, compile_shape: Callable[[Any], KeptProgram], *, strict: bool = False):
        self.compiled: dict[Any, Any] = {}
        self.late = 0
        self._compile_shape, self._strict = compile_shape, strict
        self._queued: dict[Any, Future] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._warm, self._told = False, logging.WARNING
        self._clock, self._busy, self._since = threading.Lock(), 0, 0.0
        self._seconds = 0.0
        self._took: list[float] = []  # to compile each program

    @property
    def seconds(self) -> float:
        """Until now, during which one was being compiled or fetched from the compilation cache."""
        with self._clock:
            return self._seconds + (time.perf_counter() - self._since if self._busy else 0.0)

    @property
    def mean_seconds(self) -> float:
        """That compiling one takes; 0 before the first."""
        return statistics.fmean(self._took) if self._took else 0.0

    def warm_up(self, shapes: Sequence[Any], *, wait: bool, guessed: bool = False) -> None:
        """Queues these shapes in their order. `wait`: returns when all are compiled. `guessed`:
        others may be needed, which is no reason to warn.
        """
        self._warm, self._told = True, logging.INFO if guessed else logging.WARNING
        for shape in shapes:
            self._queue(shape)
        for shape in shapes if wait else ():
            self.get(shape)

    def add(self, shape: Any) -> None:
        """Queues a shape that nobody needs; where it can't be compiled there is a warning."""
        self._queue(shape).add_done_callback(functools.partial(_tell_failure, shape))

    def _queue(self, shape: Any) -> Future:
        if shape in self.compiled:
            done = Future()
            done.set_result(self.compiled[shape])
            return done
        if shape not in self._queued:
            self._pool = self._pool or ThreadPoolExecutor(_THREADS, thread_name_prefix="compile")
            self._queued[shape] = self._pool.submit(self._compile, shape)
        return self._queued[shape]

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
            log.log(self._told, "compiling while the job runs: %s", message)
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
            made = self._compile_shape(shape)
        finally:
            with self._clock:
                self._busy -= 1
                self._seconds += 0.0 if self._busy else time.perf_counter() - self._since
        self._took.append(made.seconds)
        self.compiled[shape] = made.program
        host_memory.release()
        return made.program


def _tell_failure(shape: Any, done: Future) -> None:
    if not done.cancelled() and done.exception() is not None:
        log.warning("a program that would have saved time can't be had: %s", shape)
        log.warning("%s: %s", type(done.exception()).__name__, done.exception())
