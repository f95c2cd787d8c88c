"""Measures the engine on a workload: tokens per second, on whatever device jax has.

`Bench` warms an engine up for one workload and times runs of it; `measure` repeats that and gives
a record with what one needs to judge a figure. All from token ids to token ids: no text.
`scripts/compare_peers.py` times us through `Bench` too. Workloads are in `workloads.py`, starts of
fresh processes in `starts.py`.
"""

import dataclasses
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import CompressionSection, EngineSection, RunConfig, SamplingParams
from lepton_jax.engine.loop import Engine
from lepton_jax.jobs.summary import ModelCost
from lepton_jax.jobs.workloads import Workload
from lepton_jax.telemetry import StepStats, device_peaks, peak_memory_bytes, roofline
from lepton_jax.tensors import CompressedTensor


@dataclasses.dataclass(frozen=True)
class Timing:
    """`tokens` that were counted in `seconds`."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Bench:
    """An engine of one workload's size, compiled and allocated."""

    def __init__(self, loaded: Loaded, section: EngineSection, *, workload: Workload):
        self.workload = workload
        self._params = SamplingParams(max_tokens=workload.new, ignore_eos=True)
        requests = [(count, self._params) for count in workload.lengths()]
        section = dataclasses.replace(section, rows=workload.rows or section.rows)
        self.engine = Engine(
            loaded.model, loaded.leaves, section=section, workload=requests, strict=True
        )
        self.engine.warm_up(requests)
        self._runs = 0

    def add(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Queues all prompts; their request ids."""
        self._runs += 1
        ids = [f"{self._runs}-{place}" for place in range(len(prompts))]
        for request_id, prompt in zip(ids, prompts, strict=True):
            self.engine.add_request(request_id, prompt, self._params)
        return ids

    def run(self, prompts: Sequence[Sequence[int]]) -> Timing:
        """Serves all prompts and times it. Raises RuntimeError on a wrong count of tokens.

        Decode is timed between two moments that a caller sees: tokens of every row have come, which
        aren't counted; the last token has come.
        """
        work, start = self.workload, time.perf_counter()
        counts = dict.fromkeys(self.add(prompts), 0)
        began, before = start, 0
        while self.engine.has_work:
            for output in self.engine.step():
                counts[output.request_id] += len(output.token_ids)
            if work.kind == "decode" and not before and all(counts.values()):
                before, began = sum(counts.values()), time.perf_counter()
        end = time.perf_counter()
        wrong = {i: count for i, count in counts.items() if count != work.new}
        if wrong:
            raise RuntimeError(f"{work.name}: want {work.new} tokens of each row, got {wrong}")
        if work.kind == "prefill":
            return Timing(sum(map(len, prompts)), end - start)
        return Timing(sum(counts.values()) - before, end - began)


def measure(loaded: Loaded, config: RunConfig, workload: Workload) -> dict[str, Any]:
    """The record of a workload: tokens/s of `bench.repeats` runs after one that isn't counted.

    `value` is their median. `peak_rss_mb` is the process's so far, other measurements included.
    """
    bench = Bench(loaded, config.engine, workload=workload)
    vocab = loaded.config.vocab_size
    bench.run(workload.prompts(0, vocab))
    before = StepStats.of(bench.engine.stats())
    seeds = range(1, 1 + config.bench.repeats)
    rates = [bench.run(workload.prompts(seed, vocab)).rate for seed in seeds]
    after = StepStats.of(bench.engine.stats())
    devices = config.mesh.model
    cost = ModelCost.of(loaded.model, loaded.bytes, leaves=loaded.leaves, devices=devices)
    return {
        "name": workload.name,
        **spread(rates, "tokens/s", best=max),
        "roofline": _share(after - before, cost, workload.kind),
        **circumstances(loaded, bench.engine, config.compression),
    }


def first_token(loaded: Loaded, config: RunConfig, workload: Workload) -> dict[str, Any]:
    """Serves a workload up to its first token: what a process does that is started for it."""
    bench = Bench(loaded, config.engine, workload=workload)
    bench.add(workload.prompts(0, loaded.config.vocab_size))
    while not bench.engine.step():
        pass
    return circumstances(loaded, bench.engine, config.compression)


def spread(values: Sequence[float], unit: str, *, best: Any) -> dict[str, Any]:
    """The median as "value", the best (`min` or `max`), and all of them."""
    return {
        "value": round(statistics.median(values), 3),
        "unit": unit,
        "best": round(best(values), 3),
        "values": [round(value, 3) for value in values],
    }


def circumstances(
    loaded: Loaded, engine: Engine, compression: CompressionSection
) -> dict[str, Any]:
    """What a figure was measured with and on; "preset" also names rules, and what was stored."""
    kept = any(isinstance(leaf, CompressedTensor) for leaf in loaded.leaves)
    title = Recipe.from_config(compression).title
    preset = "as stored" if kept and title == "none" else title
    device, stats = jax.local_devices()[0], StepStats.of(engine.stats())
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "preset": preset,
        "dtype": np.dtype(loaded.model.dtype).name,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device": device_name(),
        "programs": stats.programs,
        "compile_seconds": round(stats.compile_seconds, 3),
        "peak_rss_mb": peak_memory_bytes() >> 20,
        "device_peak_mb": None if memory is None else memory >> 20,
    }


def device_name() -> str:
    """Of the device that is measured; of a CPU its maker's name for it."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _share(stats: StepStats, cost: ModelCost, kind: str) -> float | None:
    """Of the device's FLOP/s (prefill) or bandwidth (decode, job); None where it isn't known."""
    peaks = device_peaks(jax.local_devices()[0].device_kind)
    if peaks is None:
        return None
    shares = roofline(stats, peaks, **dataclasses.asdict(cost))
    share = shares.prefill_flops if kind == "prefill" else shares.decode_bandwidth
    return None if share is None else round(share, 4)
