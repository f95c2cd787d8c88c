"""jax's persistent compilation cache, on where it can be written: a second run starts in seconds.

`enable` is called by the drivers and by `api.py` before anything is compiled. The cache only saves
time: where it can't be written there is a warning and the run goes on. `counts` says what it saved.
"""

import dataclasses
import logging
import os
import tempfile
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

log = logging.getLogger(__name__)

_HIT = "/jax/compilation_cache/cache_hits"
_MISS = "/jax/compilation_cache/cache_misses"


@dataclasses.dataclass
class CacheCounts:
    """Programs of this process that were found in the cache, and that had to be compiled."""

    hits: int = 0
    misses: int = 0


_counts = CacheCounts()
_listening = False


def default_directory() -> Path:
    """Under XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lepton_jax" / "compile"


def enable(directory: str | os.PathLike = "") -> Path | None:
    """Keeps compiled programs in a directory (by default `default_directory()`).

    A directory that jax was already told to use stays, unless another is given. Returns the
    directory, or None with a warning where it can't be written; never raises for that.
    """
    _listen()
    chosen = directory or jax.config.jax_compilation_cache_dir
    try:
        chosen = Path(chosen or default_directory())
        chosen.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=chosen, prefix="probe-") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except (OSError, RuntimeError) as error:  # RuntimeError: a home directory that isn't known
        log.warning(
            "compiled programs are not kept: %s can't be written (%s); set "
            "JAX_COMPILATION_CACHE_DIR to a directory that can",
            chosen or "a cache in the home directory",
            error,
        )
        _use(None)
        return None
    _use(str(chosen))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return chosen


def _use(directory: str | None) -> None:
    """Tells jax; where it has used another directory before, it must forget that one."""
    if directory != jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", directory)
        compilation_cache.reset_cache()


def counts() -> CacheCounts:
    """Hits and misses since `enable` was first called."""
    return dataclasses.replace(_counts)


def _listen() -> None:
    global _listening
    if not _listening:
        jax.monitoring.register_event_listener(_count)
        _listening = True


def _count(event: str, **_) -> None:
    if event == _HIT:
        _counts.hits += 1
    elif event == _MISS:
        _counts.misses += 1
