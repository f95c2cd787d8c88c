"""jax's persistent compilation cache, on where it can be written: a second run starts in seconds.

`enable` is called by the drivers and by `api.py` before anything is compiled. The cache only saves
time: where it can't be written there is a warning and the run goes on. `counts` says what it saved.
Programs of engines come through `fetch`, which saves their tracing too (`kept_programs.py`).
"""

import dataclasses
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from lepton_jax.kept_programs import KeptProgram, KeptPrograms

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
_kept: KeptPrograms | None = None
_here = threading.local()  # hits of this thread


def default_directory() -> Path:
    """Under XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lepton_jax" / "compile"


def enable(directory: str | os.PathLike = "") -> Path | None:
    """Keeps compiled programs in a directory (by default `default_directory()`).

    A directory that jax was already told to use stays, unless another is given. Returns the
    directory, or None with a warning where it can't be written; never raises for that. A URL, such
    as gs://, is jax's business: nothing of ours is kept there, and None comes back.
    """
    _listen()
    chosen = directory or jax.config.jax_compilation_cache_dir
    if "://" in str(chosen):
        _use(str(chosen))
        return None
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


def fetch(
    made_of: str,
    compile_it: Callable[[str], jax.stages.Compiled],
    *,
    devices: Sequence[jax.Device],
) -> KeptProgram:
    """A program that is the same for the same `made_of`: kept by another process, or compiled.
    Where several hosts run it, or jax's cache is switched off, it is compiled.

    Args:
      made_of: all that the program depends on besides the source of this package, versions and
        flags.
      compile_it: takes a mark that belongs into the program's name. With it jax's cache has the
        program only if it is kept here too: what jax fetched can't be kept any more (XLA on CPU
        loses its functions).
      devices: that it runs on.
    """
    global _kept
    kept = _kept if jax.config.jax_enable_compilation_cache else None  # others may change it
    if kept is None or jax.process_count() > 1:
        return _compiled(compile_it, "")[0]
    try:
        name = kept.name(made_of, devices)
    except OSError as error:
        log.warning("programs are traced at each start: they can't be kept (%s)", error)
        _kept = None
        return _compiled(compile_it, "")[0]
    found = kept.find(name, devices)
    if found is not None:
        _counts.hits += 1
        return found
    made, is_new = _compiled(compile_it, name[:8])
    if not is_new:  # it was kept once, and is lost
        made, is_new = _compiled(compile_it, secrets.token_hex(4))
    if is_new:
        kept.keep(name, made)
    return made


def _compiled(
    compile_it: Callable[[str], jax.stages.Compiled], mark: str
) -> tuple[KeptProgram, bool]:
    """With that mark, and whether it was compiled here rather than found in jax's cache."""
    hits, began = getattr(_here, "hits", 0), time.perf_counter()
    made = KeptProgram(compile_it(mark), time.perf_counter() - began)
    return made, getattr(_here, "hits", 0) == hits


def _use(directory: str | None) -> None:
    """Tells jax; where it has used another directory before, it must forget that one."""
    global _kept
    local = directory and "://" not in directory
    _kept = KeptPrograms(Path(directory) / "programs") if local else None
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
        _here.hits = getattr(_here, "hits", 0) + 1
    elif event == _MISS:
        _counts.misses += 1
