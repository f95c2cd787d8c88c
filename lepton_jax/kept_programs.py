"""Executables kept between processes by what they are made of: a second start traces nothing.

jax's own cache is asked with a program that was traced and lowered already, which takes longer than
fetching it. Here the key is what a program is made from: the source of this package, the versions
and flags of what compiles it, the devices, and what the caller names. Files are as private as jax's
own: who can write them can run code in this process.
"""

import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import pickle
import platform
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import serialize_executable

from lepton_jax.whole_file import write_whole

log = logging.getLogger(__name__)

_FOLDERS = 4  # sources, versions and flags whose programs are kept, those that were used last
_MOST_BYTES = 2 << 30  # of the programs of each
_PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-pjrt", "jax-cuda13-pjrt")
_DIGEST = re.compile("[0-9a-f]{64}")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


@dataclasses.dataclass(frozen=True)
class KeptProgram:
    """A compiled program, and the seconds that compiling it took where that was done."""

    program: jax.stages.Compiled
    seconds: float


class KeptPrograms:
    """Compiled programs as files: `directory/ENVIRONMENT/PROGRAM`, both named by digests."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._folder: Path | None = None
        self._lock = threading.Lock()

    def name(self, made_of: str, devices: Sequence[jax.Device]) -> str:
        """Of the program for which a text says all that it depends on besides the environment."""
        settings = sorted((k, v) for k, v in jax.config.values.items() if "cache" not in k)
        ids = [device.id for device in devices]
        return _digest(self._environment().name, made_of, repr((settings, ids)))

    def find(self, name: str, devices: Sequence[jax.Device]) -> KeptProgram | None:
        """None where it isn't kept, or what is kept isn't what was written."""
        path = self._environment() / name
        try:
            content = path.read_bytes()
            os.utime(path)
            digest, payload = content[:64], content[64:]
            if _digest_of(payload).encode() != digest:
                raise ValueError("its digest is another")
            seconds, parts = pickle.loads(payload)
            program = serialize_executable.deserialize_and_load(
                *parts, backend=devices[0].client, execution_devices=devices
            )
            return KeptProgram(program, seconds)
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a bad disk or another machine left
            log.warning("a kept program is of no use and compiled again: %s (%s)", path, error)
            return None

    def keep(self, name: str, program: KeptProgram) -> None:
        """Where that fails there is a warning, and the next process compiles it again."""
        try:
            parts = serialize_executable.serialize(program.program)
            payload = pickle.dumps((program.seconds, parts))
            folder = self._environment()
            write_whole(folder / name, _digest_of(payload).encode() + payload)
            _make_room(folder)
        except Exception as error:  # of a backend that can't, or a full disk
            log.warning("a program is not kept for the next start: %s", error)

    def _environment(self) -> Path:
        """The folder of programs made by this source, with these versions and flags."""
        with self._lock:
            if self._folder is None:
                folder = self._directory / _digest(_SOURCE, *_VERSIONS, *_environment())
                folder.mkdir(parents=True, exist_ok=True)
                os.utime(folder)
                ours = [p for p in self._directory.iterdir() if _DIGEST.fullmatch(p.name)]
                for path in _oldest_first(ours)[:-_FOLDERS]:
                    shutil.rmtree(path, ignore_errors=True)
                self._folder = folder
            return self._folder


def circumstances() -> dict[str, str]:
    """What else than settings decides how a program rounds, by name: for people, and to compare."""
    return {
        "jax": jax.__version__,
        "lepton_jax": source_digest(),
        "device": f"{jax.devices()[0].device_kind}, {processor_name()}",
    }


def source_digest() -> str:
    """Of this package's code as it runs here: checkouts differ where versions don't."""
    return _SOURCE


def processor_name() -> str:
    """As its maker calls it, with a digest of its instructions."""
    told = _processor()
    named = [line.partition(":")[2].strip() for line in told if line.startswith("model name")]
    return f"{named[0] if named else platform.machine()} ({_digest(*told)[:8]})"


def _make_room(folder: Path) -> None:
    """Removes what was found least recently, as far as all together are too large."""
    files = _oldest_first(list(folder.iterdir()))
    excess = sum(map(_size, files)) - _MOST_BYTES
    for path in files:
        if excess <= 0:
            return
        excess -= _size(path)
        path.unlink(missing_ok=True)


def _oldest_first(paths: Sequence[Path]) -> list[Path]:
    """By when they were used; another process may have taken some away meanwhile."""

    def used(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    return sorted(paths, key=used)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read_source() -> str:
    package = Path(__file__).parent
    sources = sorted(package.rglob("*.py"))
    texts = (f"{path.relative_to(package)} {_digest_of(path.read_bytes())}" for path in sources)
    return _digest(*texts)[:16]


def _environment() -> list[str]:
    """What else programs depend on, whichever they are."""
    devices = jax.devices()
    return [
        *(f"{name} {os.environ.get(name)}" for name in _VARIABLES),
        f"{devices[0].client.platform_version} {[device.device_kind for device in devices]}",
        f"{_cores()} cores",
        *_processor(),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cores() -> int | None:
    """That this process may use: XLA cuts a CPU's programs for them."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def _processor() -> list[str]:
    """Its kind and, on Linux, its name and instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    told = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return [platform.machine(), platform.processor(), *sorted(told)]


def _digest(*texts: str) -> str:
    return _digest_of("\n".join(texts).encode())


def _digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# At import: what is on disk later isn't what this process runs.
_SOURCE = _read_source()
_VERSIONS = [f"{name} {_version(name)}" for name in _PACKAGES]
