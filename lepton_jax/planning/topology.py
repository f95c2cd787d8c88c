"""TPUs that aren't there: libtpu holds the real compilers and describes slices of any chip.

`topology_devices("v6e:2x2")` gives devices to lay arrays and programs out on, `compile_absent` runs
XLA:TPU and Mosaic. Nothing runs on them, and no TPU is needed or locked. Read next: `programs.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterator

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from lepton_jax.planning.chips import TPUS

# Slices as Google Cloud rents them, smallest first (docs.cloud.google.com/tpu/docs, by version).
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {"v4": CUBES, "v5e": FLAT, "v5p": CUBES, "v6e": FLAT, "tpu7x": CUBES}
# Chips of the largest slice on one host; hosts of larger ones have four each (the same pages).
_ONE_HOST = {"v4": 4, "v5e": 8, "v5p": 4, "v6e": 8, "tpu7x": 4}
_HOST_CHIPS = 4
_DEVICES = {"tpu7x": 2}  # of a chip; one where nothing is said
_RING = 16  # chips: of a flat slice an axis this long closes to a ring, a shorter one is open
_CUBE = 4  # chips: of a cubic slice all axes close where all are multiples of it
# Without this libtpu describes the two cores of a v4 chip, which every machine joins, as devices.
_JOINED = {"v4": {"chip_config_name": "megacore"}}

# Without these libtpu asks the network which machine it is on, for minutes, and locks the TPU.
_QUIET = {
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def split_name(name: str) -> tuple[str, str]:
    """The chip and the slice of a name such as "v5e:2x4".

    Raises ValueError, with the names that exist, on any other.
    """
    chip, _, size = name.partition(":")
    if chip not in TPUS:
        raise ValueError(
            f"plan.topology={name!r}: no such chip; want one of {', '.join(TPUS)} and a slice, as "
            "in v5e:2x4, or leave it empty to plan for the device at hand"
        )
    if size not in SLICES[chip]:
        raise ValueError(
            f"plan.topology={name!r}: {chip} comes in slices of {', '.join(SLICES[chip])}"
        )
    return chip, size


def chips_of(size: str) -> int:
    """Of a slice such as "2x4"."""
    return math.prod(map(int, size.split("x")))


def devices_of(kind: str, size: str) -> int:
    """What jax sees of a slice."""
    return chips_of(size) * _DEVICES.get(kind, 1)


@dataclasses.dataclass(frozen=True)
class Torus:
    """How devices that share a model are linked: so many `devices` on a chip, chips along `axes`,
    each (length, whether it closes to a ring), of `dims` that a slice has.
    """

    devices: int
    axes: tuple[tuple[int, bool], ...]
    dims: int


def torus_of(kind: str, shards: int) -> Torus:
    """Of a whole slice or, where there is none of as many devices, of neighbours on one host.

    Which axes close: "System architecture" of each version (docs.cloud.google.com/tpu/docs).
    """
    devices, sizes = min(shards, _DEVICES.get(kind, 1)), SLICES[kind]
    chips = shards // devices
    whole = [tuple(map(int, size.split("x"))) for size in sizes if chips_of(size) == chips]
    lengths = whole[0] if whole else (chips,)
    if sizes == FLAT:
        closed = [length == _RING for length in lengths]
    else:
        closed = [all(length % _CUBE == 0 for length in lengths)] * len(lengths)
    axes = [axis for axis in zip(lengths, closed, strict=True) if axis[0] > 1]
    return Torus(devices, tuple(axes), sizes[0].count("x") + 1)


def hosts_of(kind: str, size: str) -> int:
    """Machines of a slice; each is a process of jax."""
    chips = chips_of(size)
    return 1 if chips <= _ONE_HOST[kind] else chips // _HOST_CHIPS


def can_start(shards: int, devices: int, hosts: int) -> bool:
    """Whether `shards` of so many devices may share a model: hosts make one mesh of all of them
    (hosts.coordinator), or replicas that don't reach beyond a host (pool.ray).
    """
    return shards == devices or shards <= devices // hosts


def topology_devices(name: str) -> list[jax.Device]:
    """All devices of a slice, as jax sees them on its machines: a chip of TPU7x is two.

    Raises ValueError where there is no such slice or no libtpu, with what to do.
    """
    kind, size = split_name(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"plan.topology={name!r} needs the TPU compiler, libtpu, and no TPU: pip install libtpu"
        )
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    one_chip = set(size) == {"1", "x"}
    options = {"chips_per_host_bounds": (1, 1, 1)} if one_chip else {}
    options |= _JOINED.get(kind, {})
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"plan.topology={name!r} is unknown to the installed libtpu: {error}. Install a newer "
            "one, pip install -U libtpu"
        ) from error
    return list(described.devices)


def compile_absent(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a program of devices that aren't there.

    It could be put in the compilation cache, but not be read from it, so the cache is left out.
    """
    with _without_cache():
        return lowered.compile()


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
