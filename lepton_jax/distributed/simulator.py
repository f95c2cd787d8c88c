"""Replicas that don't exist: a discrete-event simulation that runs the real balancer.

    python -m lepton_jax.distributed.simulator --replicas=64

A replica decodes its first `slots` rows together: a step gives each of them a token and takes
`_BASE` of a full step plus a share for each row, as decoding does that reads the weights once a
step. A row with a beginning in common costs `shared` more tokens on a replica that hasn't it.
Expected lengths differ from real ones. Against it: rows dealt in turn, and a static split.
Read next: `balancer.py`, `ledger.py`.
"""

import argparse
import dataclasses
import heapq
import itertools
import random
from collections.abc import Hashable, Mapping, Sequence

from lepton_jax.distributed.balancer import Balancer
from lepton_jax.distributed.ledger import Ledger

POLICIES = ("balanced", "round_robin", "static")
_RECALL = 500.0  # seconds between looks for rows on the wrong machine; most rows take thousands
_BASE = 0.6  # of a full step's time is there with one row already: the weights are read


@dataclasses.dataclass(frozen=True)
class Work:
    """A row: tokens that it will take, tokens that are expected, what it begins with."""

    key: str
    tokens: float
    expected: float
    prefix: Hashable = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a simulated job came to; `answers` counts the answers of each row.

    `of_ideal` is T/m over `seconds`, T being one replica's time for all and m the sum of speeds.
    """

    seconds: float
    of_ideal: float
    answers: Mapping[str, int]
    prefixes_computed: int
    report: Mapping


class _Machine:
    """One replica: rows that run, rows that wait, and what has been done by when."""

    def __init__(self, speed: float, slots: int, shared: float):
        self.speed, self.slots, self._shared = speed, slots, shared
        self.running: dict[str, float] = {}  # key to tokens that are left
        self.waiting: dict[str, Work] = {}
        self.prefixes: set[Hashable] = set()
        self.computed = 0
        self._now = 0.0

    def begin(self, rows: Sequence[Work]) -> None:
        self.waiting |= {row.key: row for row in rows}
        self._fill()

    def drop(self, key: str) -> None:
        self.running.pop(key, None)
        self.waiting.pop(key, None)
        self._fill()

    def advance(self, now: float) -> tuple[dict[str, float], list[str]]:
        """Tokens of each running row since the last call, and the rows that are done."""
        tokens = (now - self._now) * self._row_speed()
        self._now = now
        self.running = {key: left - tokens for key, left in self.running.items()}
        done = [key for key, left in self.running.items() if left < 1e-6]
        did = dict.fromkeys(self.running, tokens)
        for key in done:
            del self.running[key]
        self._fill()
        return did, done

    @property
    def next_end(self) -> float | None:
        return self._now + min(self.running.values()) / self._row_speed() if self.running else None

    def _row_speed(self) -> float:
        """Tokens per second of each running row; a full replica of speed 1 gives 1 in all."""
        count = len(self.running)
        return self.speed / (self.slots * (_BASE + (1 - _BASE) * count / self.slots))

    def _fill(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            key, row = next(iter(self.waiting.items()))
            del self.waiting[key]
            new = row.prefix is not None and row.prefix not in self.prefixes
            self.computed += new
            self.prefixes.add(row.prefix)
            self.running[key] = row.tokens + new * self._shared


class Simulation:
    """A job on machines of given speeds."""

    def __init__(
        self,
        rows: Sequence[Work],
        speeds: Sequence[float],
        *,
        slots: int = 16,
        policy: str = "balanced",
        deaths: Mapping[int, float] | None = None,
        shared: float = 0.0,
    ):
        """`deaths` gives the time of death of some machines, by number; at least one must live."""
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} is unknown: want one of {', '.join(POLICIES)}")
        self._rows = {row.key: row for row in rows}
        self._policy, self._slots = policy, slots
        self._machines = {f"{n}": _Machine(s, slots, shared) for n, s in enumerate(speeds)}
        self._capacity = sum(speeds)
        self._balancer, self._ledger = Balancer(), Ledger()
        self._answers = dict.fromkeys(self._rows, 0)
        self._computed = 0
        self._recall = 0.0
        self._numbers = itertools.count()
        self._events = [
            (time, next(self._numbers), f"{n}", "dies") for n, time in (deaths or {}).items()
        ]
        heapq.heapify(self._events)

    def run(self, *, alone: float = 0.0) -> Outcome:
        """Until all rows are answered. `alone`: T, seconds of one machine of speed 1."""
        for name in self._machines:
            self._balancer.add_replica(name, slots=self._slots, now=0.0)
            self._ledger.open(name, slots=self._slots, now=0.0)
        if self._policy == "balanced":
            for row in self._rows.values():
                self._balancer.add(row.key, row.expected, prefix=row.prefix)
            self._deal(0.0, list(self._machines))
        else:
            self._split()
        now, left = 0.0, len(self._rows)
        awaited: dict[str, int] = {}
        for name in self._machines:
            self._await(name, awaited)
        while left:
            now, number, name, kind = heapq.heappop(self._events)
            if kind == "dies":
                self._die(name, now)
                idle = list(self._machines)
            elif awaited.get(name) != number or name not in self._machines:
                continue  # something else happened to it meanwhile
            else:
                left -= self._beat(name, now)
                idle = [name]
            for other in self._deal(now, idle):
                self._await(other, awaited)
        seconds = now
        computed = self._computed + sum(m.computed for m in self._machines.values())
        ideal = alone / self._capacity / seconds if seconds else 0.0
        return Outcome(seconds, ideal, self._answers, computed, self._ledger.report())

    def _await(self, name: str, awaited: dict[str, int]) -> None:
        end = self._machines[name].next_end
        awaited[name] = number = next(self._numbers)
        if end is not None:
            heapq.heappush(self._events, (end, number, name, "ends"))

    def _beat(self, name: str, now: float) -> int:
        """Brings a machine up to date; how many rows it has ended."""
        machine = self._machines[name]
        held = len(machine.running)
        did, done = machine.advance(now)
        self._ledger.beat(name, tokens=sum(did.values()), held=held, ended=len(done), now=now)
        if self._policy == "balanced":
            self._balancer.beat(name, did, now)
        for key in done:
            self._answers[key] += 1
            if self._policy == "balanced":
                self._balancer.drop(key)
        return len(done)

    def _deal(self, now: float, idle: Sequence[str]) -> set[str]:
        """Gives rows to machines; those for which something changed."""
        changed = set(idle) & set(self._machines)
        if self._policy != "balanced":
            return changed
        recalled = []
        if now >= self._recall:
            recalled, self._recall = self._balancer.recall(now), now + _RECALL
        for key, name in recalled:
            self._machines[name].advance(now)
            self._machines[name].drop(key)
            changed.add(name)
        free = [n for n, m in self._machines.items() if n in changed or not m.running]
        dealt = self._balancer.deal(now, list(self._machines) if recalled else free)
        for name, keys in dealt.items():
            if keys:
                self._machines[name].advance(now)
                self._machines[name].begin([self._rows[key] for key in keys])
                changed.add(name)
        return changed

    def _die(self, name: str, now: float) -> None:
        machine = self._machines.pop(name)
        self._computed += machine.computed
        self._ledger.died(name, now)
        if self._policy == "balanced":
            self._balancer.lose(name)
            return
        heir = min(self._machines.values(), key=lambda m: len(m.waiting))
        heir.advance(now)
        heir.begin([self._rows[key] for key in (*machine.running, *machine.waiting)])

    def _split(self) -> None:
        names, rows = list(self._machines), list(self._rows.values())
        for number, name in enumerate(names):
            first, last = (len(rows) * n // len(names) for n in (number, number + 1))
            turns = rows[number :: len(names)]
            self._machines[name].begin(turns if self._policy == "round_robin" else rows[first:last])


def heavy_tailed(
    count: int, *, seed: int, spread: float = 1.0, error: float = 0.3, prefixes: int = 0
) -> list[Work]:
    """Rows of log-normal length around 200 tokens, at most 4096, expected with a relative error.

    `prefixes`: how many beginnings they share, drawn at random; 0: none.
    """
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        tokens = min(4096.0, max(1.0, round(200 * draw.lognormvariate(0, spread))))
        expected = tokens * draw.lognormvariate(0, error)
        prefix = draw.randrange(prefixes) if prefixes else None
        rows.append(Work(f"{number}", tokens, expected, prefix))
    return rows


def with_stragglers(count: int, *, seed: int, share: float = 0.1, slow: float = 0.4) -> list[float]:
    """Speeds of machines: 1 within 5 %, and `slow` for a share of them."""
    draw = random.Random(seed)
    late = set(draw.sample(range(count), int(share * count)))
    return [slow if n in late else draw.uniform(0.95, 1.05) for n in range(count)]


def compare(
    replicas: int, *, rows_each: int, slots: int = 16, seed: int = 0, spread: float = 1.0
) -> dict[str, float]:
    """Share of the ideal T/m that each policy reaches on the same rows and machines."""
    rows = heavy_tailed(replicas * rows_each, seed=seed, spread=spread)
    speeds = with_stragglers(replicas, seed=seed)
    alone = sum(row.tokens for row in rows)  # one machine of speed 1, full to the end
    runs = {p: Simulation(rows, speeds, slots=slots, policy=p) for p in POLICIES}
    return {policy: run.run(alone=alone).of_ideal for policy, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Share of T/m that balancing reaches, simulated.")
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 8, 64], help="2 to 512")
    parser.add_argument("--rows", type=int, default=400, help="rows for each replica")
    parser.add_argument("--slots", type=int, default=16, help="rows that a replica runs at once")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("replicas  " + "  ".join(f"{policy:>11}" for policy in POLICIES))
    for count in options.replicas:
        shares = compare(
            count, rows_each=options.rows, slots=options.slots, seed=options.seed
        ).values()
        print(f"{count:8}  " + "  ".join(f"{share:11.1%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
