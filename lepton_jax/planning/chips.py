"""What makers state for their chips, and what a small measurement says of the CPU at hand.

TPU figures: the "System architecture" pages of v4, v5e, v5p, v6e and TPU7x in Google Cloud's
documentation (docs.cloud.google.com/tpu/docs). Bandwidths, peaks of products and links are those
of `telemetry.py`. Read next: `roofline.py`, which holds work against them.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import psutil

from lepton_jax.telemetry import DevicePeaks, device_peaks

_GIB = 2**30
_RATES = ("bandwidth", "float32", "bf16", "int8")
_RENDEZVOUS = 5e-5  # seconds until threads that are a CPU's devices have met


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as the runner sees it.

    Attributes:
      name: as topologies and reports name it.
      memory: bytes that a program may use; 0: unknown.
      bandwidth: bytes/s of that memory.
      float32, bf16, int8: FLOP/s of dense products whose both sides have that type.
      link: bytes/s that it sends to other devices over all its links; 0: unknown.
      hop: seconds before the first byte from a neighbour arrives.
      operation: seconds that a small operation takes whatever its size; 0: not counted.
      platform: as jax names it.
    """

    name: str
    memory: int
    bandwidth: float
    float32: float
    bf16: float
    int8: float
    link: float = 0.0
    hop: float = 1e-6
    operation: float = 0.0
    platform: str = "tpu"


def _made(name: str, peaks: DevicePeaks, *, memory: int, **more) -> Chip:
    # An exact float32 product runs as six bf16 passes on a TPU.
    return Chip(
        name,
        memory=memory,
        bandwidth=peaks.bandwidth,
        float32=peaks.bf16 / 6,
        bf16=peaks.bf16,
        int8=peaks.int8,
        link=peaks.link,
        **more,
    )


def _tpu(name: str, kind: str, *, gib: float) -> Chip:
    return _made(name, device_peaks(kind), memory=int(gib * _GIB))


# Memory is what the compiler lets a program have (libtpu 0.0.52). A device is a chip, and of TPU7x
# half of one.
TPUS = {
    "v4": _tpu("v4", "TPU v4", gib=30.75),
    "v5e": _tpu("v5e", "TPU v5e", gib=15.75),
    "v5p": _tpu("v5p", "TPU v5p", gib=95.73),
    "v6e": _tpu("v6e", "TPU v6e", gib=31.24),
    "tpu7x": _tpu("tpu7x", "TPU7x", gib=94.74),
}


_NAMES = {  # by `jax.Device.device_kind`
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def chip_here() -> Chip:
    """The device at hand: its maker's figures, or measured ones of a CPU.

    Raises ValueError on an accelerator whose figures aren't known.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return measured_cpu()
    peaks = device_peaks(device.device_kind)
    if peaks is None:
        raise ValueError(
            f"no peaks are known for {device.device_kind!r}: add them to lepton_jax/telemetry.py, "
            "or plan for a TPU, plan.topology=v6e:1x1"
        )
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    if device.device_kind in _NAMES:
        known = TPUS[_NAMES[device.device_kind]]
        return dataclasses.replace(known, memory=memory or known.memory)
    return _made(device.device_kind, peaks, memory=memory, platform=device.platform)


@functools.cache
def measured_cpu() -> Chip:
    """What plain XLA programs reach on this CPU, in two seconds: the best of some runs each."""
    read = jnp.ones(1 << 25, jnp.float32)  # 128 MiB: beyond any cache
    rows, inputs, outputs = 64, 1024, 4096
    rates = {}
    for name, dtype, wide in (
        ("float32", jnp.float32, jnp.float32),
        ("bf16", jnp.bfloat16, jnp.float32),
        ("int8", jnp.int8, jnp.int32),
    ):
        x, weights = jnp.ones((rows, inputs), dtype), jnp.ones((outputs, inputs), dtype)
        product = functools.partial(jnp.einsum, "MI,OI->MO", preferred_element_type=wide)
        seconds = _best_seconds(jax.jit(product), x, weights)
        rates[name] = 2 * rows * inputs * outputs / seconds
    small = jnp.ones((32, 512))
    return Chip(
        "cpu",
        memory=psutil.virtual_memory().total,
        bandwidth=read.nbytes / _best_seconds(jax.jit(jnp.sum), read),
        operation=_best_seconds(jax.jit(_small_operations), small) / _SMALL,
        platform="cpu",
        **rates,
    )


def shared(chip: Chip, working: int) -> Chip:
    """One of so many devices of a CPU that work at once: they share its rates, each operation takes
    as many times as long, and they are linked by its memory.
    """
    rates = {rate: getattr(chip, rate) / working for rate in _RATES}
    slow = dict(hop=_RENDEZVOUS, operation=chip.operation * working)
    return dataclasses.replace(chip, link=rates["bandwidth"], **rates, **slow)


_SMALL = 64  # operations
_LEAST_RUNS, _LEAST_SECONDS = 7, 0.3


def _small_operations(x: jax.Array) -> jax.Array:
    """_SMALL norms, each of which waits for the one before."""
    for _ in range(_SMALL):
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x


def _best_seconds(function: Callable, *arguments: jax.Array) -> float:
    """Of many runs, so that one of them has the machine to itself."""
    function(*arguments).block_until_ready()
    best, spent, runs = float("inf"), 0.0, 0
    while runs < _LEAST_RUNS or spent < _LEAST_SECONDS:
        begin = time.perf_counter()
        function(*arguments).block_until_ready()
        seconds = time.perf_counter() - begin
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
    return best
