"""Measures the engine on a workload: tokens per second, on whatever device jax has.

`Bench` warms an engine up for one workload and times runs of it; `measure` repeats that and gives a record with what
one needs to judge a figure. All from token ids to token ids: no text. Workloads are in `workloads.py`, starts of
fresh processes in `starts.py`; `scripts/compare_peers.py` times us through `Bench` too.
"""

import dataclasses
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine.loop import Engine
from lepton_jax.jobs.workloads import Workload
from lepton_jax.telemetry import StepStats, device_peaks, peak_memory_bytes, roofline


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

    def __init__(self, loaded: Loaded, section: EngineSection, workload: Workload):
        self.workload = workload
        self._params = SamplingParams(max_tokens=workload.new, ignore_eos=True)
        requests = [(count, self._params) for count in workload.lengths()]
        section = dataclasses.replace(section, rows=workload.rows or section.rows)
        self.engine = Engine(
            loaded.model, loaded.leaves, section=section, workload=requests, strict=True
        )
        self.engine.warm_up(requests)
        self._runs = 0

    def run(self, prompts: list[list[int]]) -> Timing:
        """Serves all prompts and times it; raises RuntimeError where a row's count of tokens is wrong.

        Decode is timed between two moments that a caller sees: the first block's tokens have come (they aren't
        counted), the last token has.
        """
        self._runs += 1
        counts = {f"{self._runs}-{place}": 0 for place in range(len(prompts))}
        start = time.perf_counter()
        for request_id, prompt in zip(counts, prompts, strict=True):
            self.engine.add_request(request_id, prompt, self._params)
        began, before = start, 0
        while self.engine.has_work:
            for output in self.engine.step():
                counts[output.request_id] += len(output.token_ids)
            if self.workload.kind == "decode" and not before:
                before, began = sum(counts.values()), time.perf_counter()
        end = time.perf_counter()
        wrong = {i: count for i, count in counts.items() if count != self.workload.new}
        if wrong:
            raise RuntimeError(
                f"{self.workload.name}: want {self.workload.new} tokens each, got {wrong}"
            )
        if self.workload.kind == "prefill":
            return Timing(sum(map(len, prompts)), end - start)
        return Timing(sum(counts.values()) - before, end - began)


def measure(
    loaded: Loaded, section: EngineSection, workload: Workload, *, preset: str, repeats: int
) -> dict[str, Any]:
    """A record of `repeats` runs after one that isn't counted: the median, all values, and their circumstances."""
    bench = Bench(loaded, section, workload)
    vocab = loaded.config.vocab_size
    bench.run(workload.prompts(0, vocab))
    before = StepStats.of(bench.engine.stats())
    rates = [bench.run(workload.prompts(1 + i, vocab)).rate for i in range(repeats)]
    after = StepStats.of(bench.engine.stats())
    return {
        "name": workload.name,
        "value": round(statistics.median(rates), 2),
        "unit": "tokens/s",
        "best": round(max(rates), 2),
        "values": [round(rate, 2) for rate in rates],
        "preset": preset,
        "dtype": loaded.dtype,
        **device_record(),
        "roofline": _fraction(loaded, after - before, workload.kind, int8=preset == "w8a8"),
        "programs": after.programs,
        "compile_seconds": round(after.compile_seconds, 3),
        "peak_rss_mb": peak_memory_bytes() >> 20,
    }


def device_record() -> dict[str, Any]:
    """What the figures were measured on."""
    device = jax.local_devices()[0]
    name = _cpu_name() if device.platform == "cpu" else device.device_kind
    return {"platform": device.platform, "device_kind": device.device_kind, "device": name}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _fraction(loaded: Loaded, stats: StepStats, kind: str, *, int8: bool) -> float | None:
    """The share of the device's bandwidth (decode, job) or FLOP/s (prefill) that the runs reached."""
    peaks = device_peaks(jax.local_devices()[0].device_kind)
    if peaks is None:
        return None
    parameters = sum(math.prod(spec.shape) for spec in loaded.model.specs.values() if spec.inputs)
    shares = roofline(stats, peaks, weight_bytes=loaded.bytes, parameters=parameters, int8=int8)
    share = shares.prefill_flops if kind == "prefill" else shares.decode_bandwidth
    return None if share is None else round(share, 4)
