"""Many replicas that look like one engine: `add_request`, `add_scoring`, `step`, `abort`, ...

A pool asks each replica for a beat at a time and deals rows to those that are back. In lockstep
(`job.exact`) all replicas step together and the balancer's clock counts the steps: which row runs
where and beside which others is then the same in every run of the same rows on as many replicas,
and so is rounding. Otherwise nobody waits for others and rows go by measured time; greedy tokens
may then differ where rounding decides. When a replica dies its rows begin anew on others, in both
cases; what had come of them is void (`StepOutput.restarted`).
Read next: `balancer.py` (who gets what), `replicas.py` (what is asked).
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from lepton_jax.config import SamplingParams
from lepton_jax.distributed.balancer import Balancer
from lepton_jax.distributed.ledger import Ledger
from lepton_jax.distributed.replicas import Beat, Command, Replica
from lepton_jax.engine.protocol import Limits
from lepton_jax.engine.request import StepOutput
from lepton_jax.engine.scored import Scoring

log = logging.getLogger(__name__)

_PROMPT_WEIGHT = 0.25  # tokens of work for one of a prompt: prefill is at least so much faster
_LONGEST_WAIT = 1.0  # seconds for a beat before stalled replicas are looked for
_RECALL_EVERY = 1.0  # seconds
_SECONDS = ("prefill_seconds", "decode_seconds", "gap_seconds", "compile_seconds")
_LARGEST = ("device", "peak_memory_bytes", "device_peak_memory_bytes", *_SECONDS)


class ReplicasLost(RuntimeError):
    """All replicas are dead."""


@dataclasses.dataclass(eq=False)
class _Request:
    """A request as it was given; `came` tokens have been handed on, `void` says that they are."""

    command: Command
    work: float
    prompt_work: float
    prefix: tuple[int, ...] | None
    came: int = 0
    void: bool = False


@dataclasses.dataclass(eq=False)
class _Member:
    """A replica with what is to be told to it, and the beat it is at."""

    replica: Replica
    told: list[Command] = dataclasses.field(default_factory=list)
    withdrawn: set[str] = dataclasses.field(default_factory=set)  # aborts in `told`
    flight: Future | None = None
    held: int = 0
    has_work: bool = False
    stats: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Pool:
    """A `TokenEngine` of many."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        lockstep: bool,
        stall_after: float = 300.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """`stall_after`: seconds without progress after which others take a replica's rows over;
        in lockstep all wait for the slowest.
        """
        self._members = {replica.name: _Member(replica) for replica in replicas}
        self._lockstep, self._stall_after, self._clock = lockstep, stall_after, clock
        self.limits = _least([replica.limits for replica in replicas])
        self.max_len = self.limits.max_len
        self.pages = tuple(replica.limits.num_pages for replica in replicas)
        self._requests: dict[str, _Request] = {}
        self._ledger = Ledger()
        for name, member in self._members.items():
            self._ledger.open(name, slots=member.replica.slots, now=clock())
        self._beats, self._recalled, self._began = 0, 0.0, False
        self._gone: list[Mapping[str, Any]] = []  # stats of the dead
        self._balancer = self._new_balancer()

    @property
    def has_work(self) -> bool:
        """Whether some request is not finished."""
        return bool(self._requests)

    def add_request(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams
    ) -> None:
        """Queues a request. Raises ValueError, saying why, on one that can never be served."""
        self.limits.check_request(prompt_ids, params)
        command = Command("add_request", (request_id, tuple(prompt_ids), params))
        self._add(request_id, command, prompt_ids, new_tokens=params.max_tokens)

    def add_scoring(self, request_id: str, prompt_ids: Sequence[int], scoring: Scoring) -> None:
        """Queues a prompt to score. Raises ValueError as above."""
        self.limits.check_scoring(prompt_ids, scoring)
        command = Command("add_scoring", (request_id, tuple(prompt_ids), scoring))
        self._add(request_id, command, prompt_ids, new_tokens=0)

    def abort(self, request_id: str) -> None:
        """Drops a request wherever it is; nothing more comes out for it."""
        if self._requests.pop(request_id, None) is not None:
            self._withdraw(request_id, self._balancer.drop(request_id))

    def forget(self) -> None:
        """As if nothing had been served. Raises ValueError while a request is open."""
        if self._requests:
            raise ValueError("requests are open: forget only when all are answered or aborted")
        for member in self._members.values():
            member.told.append(Command("forget"))
        self._beats, self._recalled = 0, 0.0
        self._balancer = self._new_balancer()

    def step(self) -> list[StepOutput]:
        """Waits for the next replica's beat, in lockstep for all. Raises ReplicasLost."""
        if not self._began:
            self._ledger.rest(self._clock())
            self._began = True
        self._deal()
        self._send()
        flights = {m.flight: name for name, m in self._members.items() if m.flight is not None}
        if not flights:
            raise RuntimeError(f"no replica takes the {len(self._requests)} open requests")
        if self._lockstep:
            done, _ = wait(flights)
            self._beats += 1
        else:
            done, _ = wait(flights, timeout=_LONGEST_WAIT, return_when=FIRST_COMPLETED)
        outputs = []
        for name in [name for flight, name in flights.items() if flight in done]:
            member = self._members[name]
            flight, member.flight = member.flight, None
            error = flight.exception()
            if error is None:
                outputs += self._take(name, flight.result())
            else:
                self._lose(name, error)
        return outputs

    def stats(self) -> dict[str, Any]:
        """Counts of all replicas together; seconds are those of the replica that took most, so that
        rates are the pool's, and so is memory.

        "pool" is the `Ledger`'s report.
        """
        all_stats = [*self._gone, *(member.stats for member in self._members.values())]
        names = {name for stats in all_stats for name in stats if name != "pool"}
        total: dict[str, Any] = {}
        for name in sorted(names):
            found = [stats[name] for stats in all_stats if name in stats]
            total[name] = max(found) if name in _LARGEST else sum(found)
        return total | {"pool": self._ledger.report()}

    def close(self) -> None:
        """Gives the replicas back."""
        for member in self._members.values():
            member.replica.close()

    # Requests

    def _add(
        self, request_id: str, command: Command, prompt_ids: Sequence[int], *, new_tokens: int
    ) -> None:
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is already running: ids must differ")
        page = self.limits.page_size
        prompt_work = _PROMPT_WEIGHT * len(prompt_ids)
        prefix = tuple(prompt_ids[:page]) if len(prompt_ids) > page else None
        work = prompt_work + min(new_tokens, self.max_len - len(prompt_ids))
        self._requests[request_id] = _Request(command, work, prompt_work, prefix)
        self._balancer.add(request_id, work, prefix=prefix)

    def _withdraw(self, request_id: str, name: str | None) -> None:
        """Tells a replica to drop a request that it has."""
        if name is not None:
            member = self._members[name]
            member.told.append(Command("abort", (request_id,)))
            member.withdrawn.add(request_id)

    def _void(self, request_id: str) -> None:
        request = self._requests[request_id]
        request.void, request.came = request.void or request.came > 0, 0

    # Replicas

    def _new_balancer(self) -> Balancer:
        balancer = Balancer(stall_after=float("inf") if self._lockstep else self._stall_after)
        for name, member in self._members.items():
            balancer.add_replica(name, slots=member.replica.slots, now=self._now)
        return balancer

    @property
    def _now(self) -> float:
        """The balancer's time."""
        return float(self._beats) if self._lockstep else self._clock()

    def _deal(self) -> None:
        now = self._now
        if not self._lockstep and now - self._recalled > _RECALL_EVERY:
            self._recalled = now
            for request_id, name in self._balancer.recall(now):
                self._void(request_id)
                self._withdraw(request_id, name)
        ready = [name for name, member in self._members.items() if member.flight is None]
        for name, request_ids in self._balancer.deal(now, ready).items():
            told = self._members[name].told
            told += [self._requests[request_id].command for request_id in request_ids]

    def _send(self) -> None:
        """Begins the next beat of those that have something to do."""
        for name, member in self._members.items():
            if member.flight is None and (member.told or member.has_work):
                member.held = len(self._balancer.replicas[name].rows)
                self._ledger.idle(name, self._clock())
                member.flight = member.replica.beat(member.told)
                member.told, member.withdrawn = [], set()

    def _take(self, name: str, beat: Beat) -> list[StepOutput]:
        """What a beat gave, less what it gave for requests that it shall not have any more."""
        member = self._members[name]
        member.has_work, member.stats = beat.has_work, beat.stats
        outputs, work = [], {}
        for output in beat.outputs:
            request = self._requests.get(output.request_id)
            gone = output.request_id in member.withdrawn
            if request is None or gone or self._balancer.owner(output.request_id) != name:
                continue
            first = request.prompt_work if not request.came else 0.0
            work[output.request_id] = len(output.token_ids) + first
            request.came += len(output.token_ids)
            if request.void:
                output = dataclasses.replace(output, restarted=True)
                request.void = False
            outputs.append(output)
        ended = [output.request_id for output in outputs if output.finish_reason]
        self._balancer.beat(name, work, self._now)
        self._ledger.beat(
            name,
            tokens=sum(work.values()),
            held=member.held,
            ended=len(ended),
            now=self._clock(),
        )
        for request_id in ended:
            del self._requests[request_id]
            self._balancer.drop(request_id)
        return outputs

    def _lose(self, name: str, error: BaseException) -> None:
        """A replica is dead; its rows begin anew on others. Raises ReplicasLost after the last."""
        member = self._members.pop(name)
        self._gone.append(member.stats)
        lost = self._balancer.lose(name)
        for request_id in lost:
            self._void(request_id)
        self._ledger.died(name, self._clock())
        member.replica.close()
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if not self._members:
            raise ReplicasLost(f"all replicas are dead; the last, {name}: {reason}") from error
        log.warning("replica %s is dead, others do its %d rows: %s", name, len(lost), reason)


def _least(limits: Sequence[Limits]) -> Limits:
    """What all replicas can serve."""
    names = [field.name for field in dataclasses.fields(Limits)]
    return Limits(*(min(getattr(each, name) for each in limits) for name in names))
