"""Several hosts that run one program over one mesh (SPMD): start-up, agreement, the end of one.

Each host runs the same command and reads the same rows; programs span their devices, so all must
dispatch the same programs in the same order. The scheduler is deterministic and results are on all
hosts; host 0's plans are the ones that count, and a host whose plan differs stops before it runs
it. Only host 0 writes. `hosts.coordinator` is an address that all can reach, or "auto" where jax
knows the cluster (TPU pods, Slurm, Open MPI, Kubernetes).
Read next: `links.py` (what travels between hosts), `engine/loop.py` (who asks for `agree`).
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
import signal
import socket
import sys
import time
import traceback
from importlib import metadata
from typing import Any

import jax

from lepton_jax import compat
from lepton_jax.checkpoints.load import identify
from lepton_jax.config import HostsSection, RunConfig
from lepton_jax.distributed.links import GONE, Link, accept, connect, leave, tell
from lepton_jax.engine.request import Plan, Request
from lepton_jax.kept_programs import source_digest

_PACKAGES = ("jax", "jaxlib", "numpy")
_GRACE = 3.0  # seconds
_BY_SIGNAL = 128  # plus a signal's number: exit codes of those that one has ended, as in a shell
_AGAIN = "repeat the command on all hosts to go on"


class Hosts:
    """This host among all; alone by default."""

    def __init__(self, index: int = 0, count: int = 1, links: dict[int, Link] | None = None):
        self.index, self.count = index, count
        self._links = links or {}
        self._plans = 0
        for other, link in self._links.items():
            link.watch(functools.partial(self._gone, other))

    @property
    def first(self) -> bool:
        """Whether this is the host that writes."""
        return self.index == 0

    def share(self, value: Any) -> Any:
        """Host 0's value, on all hosts; JSON."""
        if self.first:
            for link in self._links.values():
                link.send({"value": value})
            return value
        return self._links[0].next()["value"]

    def agree(self, plan: Plan | None) -> None:
        """Raises RuntimeError where this host's next plan isn't host 0's."""
        if self.count == 1:
            return
        mine = plan_digest(plan)
        theirs = self.share(mine)
        if theirs != mine:
            raise RuntimeError(
                f"plan {self._plans} of host {self.index} isn't that of host 0: they don't serve "
                "the same rows"
            )
        self._plans += 1

    def require_same_models(self, config: RunConfig) -> None:
        """Raises ValueError where a path holds another model here than on host 0: devices of both
        would hold parts of one. A path that all can read but one can't is a CheckpointError.
        """
        if self.count == 1:
            return
        paths = {
            "model.path": config.model.path,
            "engine.draft_model": config.engine.draft_model,
            "cascade.model": config.cascade.model,
        }
        mine = {field: identify(path) for field, path in paths.items() if path}
        for field, theirs in self.share(mine).items():
            if theirs != mine[field]:
                raise ValueError(
                    f"{field}={paths[field]!r} holds another model on host {self.index} than on "
                    f"host 0 (fingerprints {mine[field]} and {theirs}): copy the same files to all "
                    "hosts, or give a directory that all share"
                )

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """The others learn how this host ended. Where it failed it ends at once: what is registered
        for the end of a process would wait for them. A signal ends all with its exit code.
        """
        failed = error is not None and not (isinstance(error, SystemExit) and not error.code)
        if not failed or self.count == 1:
            for link in self._links.values():
                link.close()
            return
        if isinstance(error, RuntimeError | ConnectionError):
            time.sleep(_GRACE)  # what meets a lost host fails before the link says which it is
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exception(error)
        code = _exit_code(error)
        by_signal = code > _BY_SIGNAL
        how = "was interrupted" if by_signal else "has failed; see its own output"
        farewell = f"host {self.index} of {self.count} {how}"
        tell(self._links.values(), {"farewell": farewell, "code": code if by_signal else GONE})
        sys.stderr.flush()
        os._exit(code)

    def _gone(self, other: int, reason: str, code: int) -> None:
        """Another host is gone: this one ends too, and host 0 tells the rest why."""
        reason = reason or f"host {other} of {self.count} is gone (killed, or cut off)"
        rest = [link for index, link in self._links.items() if index != other]
        tell(rest, {"farewell": reason, "code": code})
        leave(f"{reason}; {_AGAIN}", code)


def _exit_code(error: BaseException) -> int:
    """As the driver of one host would exit with it."""
    if isinstance(error, KeyboardInterrupt):
        return _BY_SIGNAL + signal.SIGINT
    return error.code if isinstance(error, SystemExit) and type(error.code) is int else 1


ALONE = Hosts()


def join(config: RunConfig) -> Hosts:
    """Meets the other hosts and joins their devices. Before anything else touches jax's devices.

    Raises ValueError naming the flag: host 0 can't be reached, hosts are missing, or they differ in
    versions or configuration.
    """
    section = config.hosts
    if not section.coordinator:
        if section.count > 1:
            raise ValueError(
                f"hosts.count={section.count} without hosts.coordinator: each host would run the "
                "whole job; give HOST:PORT of host 0, or auto, or leave hosts.count out"
            )
        return ALONE
    _check(config)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if section.coordinator == "auto":
        _start_jax(section)
        index, count = jax.process_index(), jax.process_count()
        address = _published_address(index, section.timeout)
    else:
        index, count = section.index, section.count
        host, _, port = section.coordinator.rpartition(":")
        address = host, int(port) + 1
    links = _meet(address, index=index, count=count, seconds=section.timeout)
    _compare(links, index, hello(config))
    if section.coordinator != "auto":
        _start_jax(section, section.coordinator, count, index)
    if config.mesh.model != jax.device_count():
        raise ValueError(
            f"mesh.model={config.mesh.model}, and the {count} hosts have {jax.device_count()} "
            f"devices together: set mesh.model to that"
        )
    return Hosts(index, count, links)


def hello(config: RunConfig) -> dict[str, str]:
    """What must be the same on all hosts: versions and configuration, by name."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    versions |= {"python": platform.python_version(), "lepton_jax": source_digest()}
    fields = {
        f"config.{section}.{name}": json.dumps(value, default=str)
        for section, values in dataclasses.asdict(config).items()
        if isinstance(values, dict)
        for name, value in values.items()
        if (section, name) != ("hosts", "index")
    }
    return versions | fields


def differences(mine: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """What differs, as "name: mine, theirs"."""
    return [
        f"{name} is {mine.get(name)} and {theirs.get(name)}"
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    ]


def plan_digest(plan: Plan | None) -> str:
    """Of all that the device is told by a plan."""
    if plan is None:
        return ""
    chunks = [
        (c.row.request.id, c.slot, c.pages, c.start, c.tokens, c.final, *_asked(c.row.request))
        for c in plan.chunks
    ]
    rows = [(e.row.request.id, e.slot, e.pages, e.cached) for e in plan.rows]
    text = repr((chunks, rows, plan.steps, plan.draft))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _asked(request: Request) -> tuple:
    """What the sampler is told of a row, when it comes in."""
    return request.params, request.seed


def _check(config: RunConfig) -> None:
    """What several hosts can't do together."""
    job = config.job
    if config.mesh.data > 1 or config.pool.ray:
        raise ValueError(
            "hosts.coordinator joins hosts into one mesh, and mesh.data or pool.ray makes "
            "replicas: choose one (replicas on several machines are pool.ray)"
        )
    if job.order != "input" or not job.exact:
        raise ValueError(
            "several hosts (hosts.coordinator) must resume alike: want job.order=input and "
            "job.exact=true"
        )


def _start_jax(section: HostsSection, *where: Any) -> None:
    """Joins the devices. Raises ValueError where jax can't; `where` is what "auto" leaves to it."""
    try:
        jax.distributed.initialize(*where, initialization_timeout=int(section.timeout))
    except (ValueError, RuntimeError) as error:
        auto = (
            "auto is for TPU pods, Slurm, Open MPI and Kubernetes; elsewhere give HOST:PORT of "
            "host 0, hosts.count and each host's hosts.index"
        )
        raise ValueError(
            f"hosts.coordinator={section.coordinator}: jax can't join the hosts ({error}): "
            f"{'let all hosts reach this port of host 0, or give another' if where else auto}"
        ) from error
    if handler := signal.getsignal(signal.SIGTERM):
        signal.signal(signal.SIGTERM, handler)  # jax took it for the notice of a preemption to come


def _meet(address: tuple[str, int], *, index: int, count: int, seconds: float) -> dict[int, Link]:
    if index == 0:
        return accept(address, count, seconds)
    return {0: connect(address, index, seconds)}


def _compare(links: dict[int, Link], index: int, mine: dict[str, str]) -> None:
    """All hosts send what they are to host 0, which answers with the problem, "" where none is."""
    if index:
        tell(links.values(), {"hello": mine})  # host 0 may have answered already, and left
        try:
            problem = links[0].read()["problem"]
        except OSError:
            problem = "host 0 has ended before all had met: see its own output"
    else:
        problem = _problem(links, mine)
        tell(links.values(), {"problem": problem})
    if problem:
        raise ValueError(problem)


def _problem(links: dict[int, Link], mine: dict[str, str]) -> str:
    """What keeps the hosts from working together, in host 0's eyes."""
    lines = []
    for n, link in sorted(links.items()):
        try:
            found = differences(mine, link.read()["hello"])
        except OSError:
            return f"host {n} has ended before all had met: see its own output"
        if found:
            lines.append(f"hosts 0 and {n}: {'; '.join(found)}")
    text = " | ".join(lines)
    return text and f"the hosts differ: {text}. Give all the same versions and flags"


def _published_address(index: int, seconds: float) -> tuple[str, int]:
    """Where host 0 will listen, by way of jax's coordination service."""
    client = compat.coordination_client()
    if index == 0:
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        client.key_value_set("lepton_jax/host_0", f"{socket.gethostname()}:{port}")
    found = client.blocking_key_value_get("lepton_jax/host_0", int(seconds * 1000))
    host, _, port = found.rpartition(":")
    return host, int(port)
