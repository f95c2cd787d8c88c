"""Which replica gets which row: the longest expected row goes next to the replica that will be free
first, by its outstanding tokens and its measured tokens per second.

Pure Python without a clock: whoever calls passes the time, in any unit. So the pool, the simulator
and a test by hand run the same code, and with a count of beats for the time every decision can be
repeated. Work is counted in tokens, as the caller weighs them. A row is queued, or on one replica,
or gone: that is all the bookkeeping that "none lost, none twice" needs.
Longest first: Graham, "Bounds on multiprocessing timing anomalies", 1969. Moving rows of stragglers
at the end: Dean and Ghemawat, "MapReduce", 2004. Read next: `queued.py` (rows that wait, by what
they begin with), `pool.py` (who calls this), `simulator.py`.
"""

import dataclasses
import math
from collections.abc import Collection, Hashable, Mapping

from lepton_jax.distributed.queued import Queued

_AHEAD = 0.25  # of a replica's slots: rows queued on it, so that a freed slot is filled at once
_MEMORY = 30.0  # of a rate, in units of time: older beats weigh less than 1/e
_SLOW = 0.8  # of the best speed of a row: slower replicas don't get rows that outlast the job
_MARGIN = 0.5  # of the time to the end: how long a row may take there, as it may turn out longer
_FIRST = 4.0  # times as long may a replica take for its first token: it compiles
_WORTH = 1.5  # times the time that a row would take elsewhere: what must be left before it is moved


@dataclasses.dataclass(eq=False)
class Assigned:
    """A row on a replica: its expected work and what of it is done, in tokens."""

    work: float
    prefix: Hashable
    done: float = 0.0

    @property
    def left(self) -> float:
        return max(self.work - self.done, 0.0)


@dataclasses.dataclass(eq=False)
class Replica:
    """What the balancer knows of a replica.

    Attributes:
      slots: rows that it runs at once.
      rows: those that it has, by key, oldest first.
      outstanding: what is left of their expected work.
      seen: the time of its last beat; `moved` of the last that did something.
      stuck: it was stalled, and its rows were taken from it; until its next beat.
    """

    slots: int
    seen: float
    moved: float
    rows: dict[str, Assigned] = dataclasses.field(default_factory=dict)
    outstanding: float = 0.0
    stuck: bool = False
    _tokens: float = 0.0
    _seconds: float = 0.0

    @property
    def rate(self) -> float | None:
        """Measured tokens per unit of time; None before the first."""
        return self._tokens / self._seconds if self._seconds and self._tokens else None

    def measure(self, tokens: float, seconds: float) -> None:
        kept = math.exp(-seconds / _MEMORY)
        self._tokens = self._tokens * kept + tokens
        self._seconds = self._seconds * kept + seconds


class Balancer:
    """Deals rows to replicas and takes them back from those that die or fall behind."""

    def __init__(self, *, stall_after: float = math.inf):
        """`stall_after`: a replica with rows that does nothing for so long gets no more of them,
        and others take over what it has once they have nothing else.
        """
        self.replicas: dict[str, Replica] = {}
        self._stall_after = stall_after
        self._queued = Queued()
        self._owner: dict[str, str] = {}  # key to replica
        self._pace: _Pace | None = None
        self._paced = 0  # deals with it

    def __len__(self) -> int:
        """Rows that are queued or on a replica."""
        return len(self._queued) + len(self._owner)

    def add_replica(self, name: str, *, slots: int, now: float) -> None:
        """Makes a replica known. Raises ValueError where its name is in use."""
        if name in self.replicas:
            raise ValueError(f"replica {name!r} is already there: names must differ")
        self.replicas[name] = Replica(slots, seen=now, moved=now)

    def add(self, key: str, work: float, *, prefix: Hashable = None) -> None:
        """Queues a row.

        Args:
          key: its own. Raises ValueError where a row that isn't finished has it.
          work: expected tokens.
          prefix: the same for rows that begin alike, so that one replica computes that once.
        """
        if key in self._owner or key in self._queued:
            raise ValueError(f"row {key!r} is already there: keys must differ")
        self._queued.add(key, work, prefix)

    def owner(self, key: str) -> str | None:
        """The replica that has a row; None where it is queued or gone."""
        return self._owner.get(key)

    def drop(self, key: str) -> str | None:
        """Forgets a row: it is finished, or nobody wants it. The replica that had it, if any."""
        name = self._owner.pop(key, None)
        if name is None:
            self._queued.remove(key)
            return None
        replica = self.replicas[name]
        replica.outstanding -= replica.rows.pop(key).left
        return name

    def beat(self, name: str, tokens: Mapping[str, float], now: float) -> None:
        """Takes in what a replica did since its last beat: work done, by key of its rows."""
        replica = self.replicas[name]
        for key, count in tokens.items():
            row = replica.rows[key]
            before = row.left
            row.done += count
            replica.outstanding -= before - row.left
        total = sum(tokens.values())
        if replica.rows and now > replica.seen:
            replica.measure(total, now - replica.seen)
        if total:
            replica.moved = now
        replica.seen = now
        replica.stuck = False

    def deal(self, now: float, ready: Collection[str]) -> dict[str, list[str]]:
        """Rows for the replicas that can take some now: keys by name, in the order to begin them.

        One row at a time goes to the ready replica whose rows will be done first. A replica gets
        what fills its slots and a little ahead; where fewer rows are open than that, its share of
        them by its rate, so that the end is split and none hoards.
        """
        dealt: dict[str, list[str]] = {name: [] for name in ready}
        names = [name for name in ready if not self.stalled(name, now)]
        if not len(self._queued) or not names:
            return dealt
        working = any(r.rows for n, r in self.replicas.items() if not self.stalled(n, now))
        if not working:
            self._queued.allow_all()  # nobody else is left to take what some shall not have
        pace = self._pace_at(now, fresh=not working)
        open_names = {name: pace.room(self.replicas[name]) for name in names}
        while open_names and len(self._queued):
            name = min(open_names, key=lambda n: (pace.wait(self.replicas[n]), n))
            replica = self.replicas[name]
            hungry = len(replica.rows) < replica.slots
            row = None
            if len(replica.rows) < open_names[name]:
                row = self._queued.take(name, most=pace.longest(replica), pace=pace, hungry=hungry)
                if row is None and not working and not any(dealt.values()):
                    row = self._queued.take(name, most=math.inf, pace=pace, hungry=True)
            if row is None:
                del open_names[name]
                continue
            key, work, prefix = row
            if not replica.rows:
                replica.moved = replica.seen = now
            replica.rows[key] = Assigned(work, prefix)
            replica.outstanding += work
            self._owner[key] = name
            dealt[name].append(key)
        return dealt

    def lose(self, name: str) -> list[str]:
        """A replica is dead: its rows are queued again, from their beginning. Their keys."""
        replica = self.replicas.pop(name)
        self._queued.forget_home(name)
        for key, row in replica.rows.items():
            del self._owner[key]
            self._queued.add(key, row.work, row.prefix)
        return list(replica.rows)

    def recall(self, now: float) -> list[tuple[str, str]]:
        """Rows that another replica would do sooner: (key, the replica that had it).

        Of slow replicas those that would outlast the job; once nothing is queued and somebody has a
        free slot, of all replicas as many as there are such slots. They are queued again, from
        their beginning; the caller takes them from the replica.
        """
        pace = _Pace(self, now)
        live = [r for n, r in self.replicas.items() if not self.stalled(n, now)]
        room = 0 if len(self._queued) else sum(max(0, r.slots - len(r.rows)) for r in live)
        moved = []
        for name in sorted(self.replicas, key=lambda n: -pace.wait(self.replicas[n])):
            slow = pace.longest(self.replicas[name]) < math.inf
            if not room and not slow:
                continue
            late = self._late(name, now, pace)
            if room:
                moved += [(key, name) for _, key in late[: room - len(moved)]]
            else:
                moved += [(key, name) for left, key in late if left > _MARGIN * pace.horizon]
        for name, replica in self.replicas.items():
            replica.stuck = self.stalled(name, now)
        for key, name in moved:
            row = self.replicas[name].rows[key]
            self.drop(key)
            self._queued.add(key, row.work, row.prefix, not_for=name)
        return moved

    def stalled(self, name: str, now: float) -> bool:
        """Whether a replica has rows and has done nothing for too long."""
        replica = self.replicas[name]
        patience = self._stall_after * (1.0 if replica.rate else _FIRST)
        late = bool(replica.rows) and now - replica.moved > patience
        return replica.stuck or late

    def _pace_at(self, now: float, *, fresh: bool) -> "_Pace":
        """Rates as of now. Where there are many replicas a few beats change little: the last ones
        do, until a sixteenth of the replicas has come by.
        """
        self._paced += 1
        if fresh or self._pace is None or self._paced > len(self.replicas) // 16:
            self._pace, self._paced = _Pace(self, now), 0
        return self._pace

    def _late(self, name: str, now: float, pace: "_Pace") -> list[tuple[float, str]]:
        """(time left, key) of rows that a good replica would do sooner from their beginning."""
        replica, stalled = self.replicas[name], self.stalled(name, now)
        if not replica.rows or not pace.best:
            return []
        late = []
        for place, (key, row) in enumerate(replica.rows.items()):
            left = math.inf if stalled else row.left / pace.speed(replica)
            if place >= replica.slots:  # it waits for a slot
                left += pace.wait(replica) / 2
            if left > _WORTH * row.work / pace.best:
                late.append((left, key))
        return sorted(late, reverse=True)


def _ahead(replica: Replica) -> int:
    return int(_AHEAD * replica.slots) or 1


class _Pace:
    """Rates and what follows from them at one time; a replica without a rate has the mean."""

    def __init__(self, balancer: Balancer, now: float):
        replicas = balancer.replicas
        live = [r for n, r in replicas.items() if not balancer.stalled(n, now)]
        known = [r.rate for r in live if r.rate]
        self._mean = sum(known) / len(known) if known else 1.0
        self._total = sum(r.rate or self._mean for r in live)
        queued = balancer._queued
        self._rows = len(queued) + sum(len(r.rows) for r in live)
        self._ahead = len(queued) > sum(map(_ahead, live))
        self.best = max((self.speed(r) for r in live), default=0.0)  # tokens per time of a row
        work = queued.work + sum(r.outstanding for r in live)
        self.horizon = work / self._total if live else 0.0  # until the end at best
        self.urgent = _MARGIN * self.horizon * self.best
        self._rates = {n: r.rate or self._mean for n, r in replicas.items()}

    def rate_of(self, names: Collection[str]) -> float:
        """Tokens per time of these replicas together."""
        return sum(self._rates.get(name, 0.0) for name in names)

    def speed(self, replica: Replica) -> float:
        """Tokens per time of one row on a full replica."""
        return (replica.rate or self._mean) / replica.slots

    def wait(self, replica: Replica) -> float:
        """Time until a replica has done what it has."""
        return replica.outstanding / (replica.rate or self._mean)

    def room(self, replica: Replica) -> int:
        """Rows that a replica shall have."""
        most = replica.slots + (_ahead(replica) if self._ahead else 0)
        share = (replica.rate or self._mean) / self._total
        return min(most, math.ceil(self._rows * share - 1e-9))

    def longest(self, replica: Replica) -> float:
        """Expected work of the longest row for a replica: a slow one gets none that it would still
        run after the others' end.
        """
        speed = self.speed(replica)
        return math.inf if speed >= _SLOW * self.best else _MARGIN * self.horizon * speed
