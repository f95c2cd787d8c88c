"""What a run costs: counts and seconds of the engine, peak memory, and what devices can do at best.

`BeatStats` is what the engine tells its listeners of each beat (`engine/beats.py`), `StepStats` a
longer stretch of engine time: the difference of two readings of `Engine.stats()`. `ScalarLog` takes
numbers to TensorBoard; who prints them is above (`jobs/summary.py`). Nothing in this module imports
jax.
"""

import dataclasses
import importlib
import resource
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path

_IMPORTED = time.monotonic()


@dataclasses.dataclass(frozen=True)
class StepStats:
    """What the engine did in a stretch of time; tokens, steps and seconds.

    Attributes:
      prefill_tokens: prompt tokens computed; `prefill_padding` the idle places beside them.
      decode_steps: steps of all decode blocks; `decode_tokens` the tokens that they gave.
      decode_padding: places of idle or finished rows computed in those steps.
      prefix_hit_tokens: prompt tokens found in the cache instead of computed.
      generated_tokens: all new tokens, those sampled at the end of a prefill too.
      preemptions: rows sent back to the queue because pages ran out.
      proposed_tokens: verified by `verified_steps` of the decode steps; `accepted_tokens` of them
        were right, and each saved its row a step.
      compile_seconds: to compile `programs` programs, or fetch them from the compilation cache;
        `late_compiles` of them were not part of the warm-up.
    """

    prefill_tokens: int = 0
    prefill_padding: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_padding: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    verified_steps: int = 0
    compile_seconds: float = 0.0
    programs: int = 0
    late_compiles: int = 0

    @classmethod
    def of(cls, counts: Mapping[str, float]) -> "StepStats":
        """From a reading of `Engine.stats()`; counts that it holds beyond these are left out."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in counts.items() if name in names})

    def __sub__(self, earlier: "StepStats") -> "StepStats":
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(earlier)
        return StepStats(**{name: mine[name] - theirs[name] for name in mine})

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens computed per second; None where none were."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens decoded per second; None where none were."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else None

    @property
    def acceptance(self) -> float | None:
        """Share of the proposed tokens that were right; None where none were proposed."""
        return self.accepted_tokens / self.proposed_tokens if self.proposed_tokens else None

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens that a row gained by a decode step, 1 without speculation; None without steps."""
        rounds = self.decode_tokens - self.accepted_tokens
        return self.decode_tokens / rounds if rounds else None

    @property
    def padding_waste(self) -> float:
        """Share of all computed places that held no token of a row, 0 to 1."""
        idle = self.prefill_padding + self.decode_padding
        places = idle + self.prefill_tokens + self.decode_tokens
        return idle / places if places else 0.0


@dataclasses.dataclass(frozen=True)
class BeatStats:
    """One beat whose results are read: what its programs did, and how full the engine was after.

    Attributes:
      prefill_tokens: prompt tokens computed by a program of `prefill_places` tokens; 0: none ran.
      long_prompt: one prompt, which goes on in the next beat, filled that program.
      rows: in the decode block, by a program of `row_places` rows over `view` cached tokens.
      steps: that the block ran, with drafts of up to `draft` tokens; `decode_tokens` what they
        gave, in `rounds` steps of rows.
      tokens: all new ones of the beat, those sampled at the end of a prefill too.
      gap_seconds: that the device had nothing to do before.
      ended: rows that the beat ended; `stopped` of them before their limit, and `idled` of these in
        its block, so that their slots idled to its end and in the block that was dispatched
        meanwhile. The others' only token came with their prefill.
      preemptions, prefix_hit_tokens: since the beat before.
      running: rows with a slot, of `slots`; `waiting` have none.
      tokens_left: the most that a running row may still give.
      free_pages: of the `pages` of the cache.
    """

    prefill_tokens: int = 0
    prefill_places: int = 0
    prefill_seconds: float = 0.0
    long_prompt: bool = False
    rows: int = 0
    row_places: int = 0
    view: int = 0
    steps: int = 0
    decode_seconds: float = 0.0
    gap_seconds: float = 0.0
    draft: int = 0
    rounds: int = 0
    decode_tokens: int = 0
    tokens: int = 0
    ended: int = 0
    stopped: int = 0
    idled: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    running: int = 0
    slots: int = 0
    waiting: int = 0
    tokens_left: int = 0
    free_pages: int = 0
    pages: int = 0

    @property
    def seconds(self) -> float:
        """Of the device, with the gap before."""
        return self.gap_seconds + self.prefill_seconds + self.decode_seconds


@dataclasses.dataclass(frozen=True)
class DevicePeaks:
    """What the maker states for one device: bytes/s of memory, dense FLOP/s in bf16 and int8, and
    bytes/s that it sends to other devices over all its links; 0: unknown.
    """

    bandwidth: float
    bf16: float
    int8: float
    link: float = 0.0


# The keys are `jax.Device.device_kind`. TPU: the "System architecture" pages of v4, v5e, v5p, v6e
# and TPU7x in Google Cloud's documentation (docs.cloud.google.com/tpu/docs). v4 has no faster int8
# and none is stated for TPU7x: their int8 column repeats bf16. A TPU7x chip shows as two devices,
# each half of it. GPU: NVIDIA's data sheets of the A100, H100 and H200, without sparsity. Links are
# half of what is stated for both directions together: of ICI, of NVLink on SXM boards, of PCIe.
_PEAKS = {
    "TPU v4": DevicePeaks(1.228e12, 275e12, 275e12, 300e9),
    "TPU v5 lite": DevicePeaks(0.819e12, 197e12, 394e12, 200e9),
    "TPU v5e": DevicePeaks(0.819e12, 197e12, 394e12, 200e9),
    "TPU v5": DevicePeaks(2.765e12, 459e12, 918e12, 600e9),
    "TPU v5p": DevicePeaks(2.765e12, 459e12, 918e12, 600e9),
    "TPU v6 lite": DevicePeaks(1.638e12, 918e12, 1836e12, 400e9),
    "TPU v6e": DevicePeaks(1.638e12, 918e12, 1836e12, 400e9),
    "TPU7x": DevicePeaks(3.69e12, 1153.5e12, 1153.5e12, 300e9),
    "NVIDIA A100-SXM4-40GB": DevicePeaks(1.555e12, 312e12, 624e12, 300e9),
    "NVIDIA A100-SXM4-80GB": DevicePeaks(2.039e12, 312e12, 624e12, 300e9),
    "NVIDIA A100 80GB PCIe": DevicePeaks(1.935e12, 312e12, 624e12, 32e9),
    "NVIDIA H100 80GB HBM3": DevicePeaks(3.35e12, 989e12, 1979e12, 450e9),
    "NVIDIA H100 PCIe": DevicePeaks(2.0e12, 756e12, 1513e12, 64e9),
    "NVIDIA H200": DevicePeaks(4.8e12, 989e12, 1979e12, 450e9),
}


def device_peaks(device_kind: str) -> DevicePeaks | None:
    """The peaks of a device by its `device_kind`; None where they aren't known, as on a CPU."""
    return _PEAKS.get(device_kind)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Shares, 0 to 1, of what the device could do at best; None where nothing ran."""

    decode_bandwidth: float | None
    prefill_flops: float | None


def roofline(
    stats: StepStats, peaks: DevicePeaks, *, weight_bytes: int, parameters: int, int8: float
) -> Roofline:
    """How near a stretch came to its device's peaks.

    Both are lower bounds: decode counts the weights once a step and no cache, prefill two
    operations for each parameter and token and no attention.

    Args:
      weight_bytes: of the weights that a step reads.
      parameters: that multiply each token.
      int8: share of these that meet int8 activations in int8, at the peak of int8.
    """
    decode = prefill = None
    if stats.decode_seconds:
        moved = weight_bytes * stats.decode_steps
        decode = moved / stats.decode_seconds / peaks.bandwidth
    if stats.prefill_seconds:
        done = 2 * parameters * stats.prefill_tokens
        prefill = done / stats.prefill_seconds * (int8 / peaks.int8 + (1 - int8) / peaks.bf16)
    return Roofline(decode, prefill)


def peak_memory_bytes() -> int:
    """Most bytes of memory that this process has held so far (VmHWM)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def running_seconds() -> float:
    """Since the program began, which is when it first named this package. The process may be older:
    a shell that ends in `exec` keeps its own beginning.
    """
    return time.monotonic() - _IMPORTED


class ScalarLog:
    """Numbers by name as something goes on, for `tensorboard --logdir FOLDER`: event files in a
    folder, local or whatever tensorboardX writes to.

    The step of a job is the number of rows that this run has answered, that of a recovery its
    updates.
    """

    def __init__(self, folder: str, *, group: str = "job", field: str = "job.tensorboard"):
        """Raises ValueError where the package is missing or the folder can't be written.

        `group` comes before the names of values; `field` is what the config calls the folder.
        """
        self._group = group
        try:
            self._writer = scalar_writers(field).SummaryWriter(folder, flush_secs=10)
        except OSError as error:
            raise ValueError(
                f"{field}={folder!r} can't be written: {error.strerror or error}"
            ) from error

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{self._group}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


def scalar_writers(field: str) -> types.ModuleType:
    """tensorboardX. Raises ValueError naming the field that needs it, and the command that installs
    it.
    """
    try:
        return importlib.import_module("tensorboardX")
    except ImportError as error:
        raise ValueError(
            f"{field} needs tensorboardX: pip install 'lepton_jax[tensorboard]', or leave it empty"
        ) from error
