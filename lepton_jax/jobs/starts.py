"""Cold and warm starts: how long a fresh process takes to its first token.

A child process runs the bench driver with `bench.measure=first_token`: it imports, loads, compiles
everything that the job workload needs, and prints a line at its first token. Cold: the compilation
cache is empty. Warm: the cold start has filled it. Model files are there already in both.
The parent must not have touched the device, which some platforms give to one process only.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from lepton_jax.jobs.benchmark import spread


def measure_starts(arguments: Sequence[str], *, repeats: int) -> Iterator[dict[str, Any]]:
    """The records "cold_start" and "warm_start", in seconds from the start of the process.

    Args:
      arguments: the bench driver's, without what it shall measure.
      repeats: pairs of starts, each with a cache of its own.
    """
    seconds: dict[str, list[float]] = {"cold_start": [], "warm_start": []}
    records: dict[str, dict] = {}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="lepton_jax-start-") as cache:
            for name in seconds:
                took, records[name] = time_start(arguments, cache)
                seconds[name].append(took)
    for name, values in seconds.items():
        yield {"name": name, **spread(values, "s", best=min), **records[name]}


def time_start(arguments: Sequence[str], cache: str) -> tuple[float, dict[str, Any]]:
    """Seconds to the first token of one child, and its record.

    Raises ValueError with the last line that it says where it fails.
    """
    command = [sys.executable, "-m", "lepton_jax.bench", *arguments]
    command.append("--config.bench.measure=first_token")
    begun = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
        ) as child,
    ):
        line = child.stdout.readline()
        took = time.perf_counter() - begun
        if child.wait() or not line:
            log.seek(0)
            said = log.read().split("\n")
            last = next((line for line in reversed(said) if line.strip()), "nothing was said")
            raise ValueError(
                f"a start ended with exit code {child.returncode}: {last.removeprefix('error: ')}"
            )
    return took, json.loads(line)
