"""Rows that no replica has yet, grouped by what they begin with.

A group's homes are the replicas that have computed its beginning. A row that is long for the time
that is left goes to whoever asks first. Otherwise a replica takes the longest row of its own groups
or of those without a common beginning; then it becomes home of a new group; then it helps where a
group's homes are too far behind. Only a replica with nothing to do takes from others' groups
otherwise. Read next: `balancer.py`, which calls this.
"""

import bisect
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Collection, Hashable
from typing import Protocol

_MOST_HOMES = 65_536  # beginnings remembered; replicas evict pages too
_ENOUGH = 8  # candidates of new groups looked at where a slow replica needs a short row


class Pace(Protocol):
    """What `take` asks of the replicas' rates."""

    horizon: float  # time until all rows are done at best
    urgent: float  # work of a row that takes so long that it must begin now

    def rate_of(self, names: Collection[str]) -> float: ...


class _Group:
    """Rows by expected work; the longest is last."""

    def __init__(self):
        self.rows: list[tuple[float, int, str]] = []
        self.work = 0.0
        self.homes: set[str] = set()

    def longest(self, most: float) -> int:
        """Place of the longest row of at most so much work; -1 where there is none."""
        return bisect.bisect_right(self.rows, (most, float("inf"), "")) - 1


class Queued:
    """Rows with their expected work and what they begin with (None: nothing in common)."""

    def __init__(self):
        self.work = 0.0
        self._groups: dict[Hashable, _Group] = {}
        self._where: dict[str, tuple[Hashable, float, int]] = {}  # key to prefix, work, number
        self._homes: OrderedDict[Hashable, set[str]] = OrderedDict()
        self._by_work: list[tuple[float, int, str]] = []  # heap of all rows, gone ones too
        self._new: list[tuple[float, int, Hashable]] = []  # heap of groups without a home
        self._own: dict[str, set[Hashable]] = {}  # replica to prefixes that it has and are queued
        self._barred: dict[str, str] = {}  # key to the replica from which it was recalled
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def add(self, key: str, work: float, prefix: Hashable, *, not_for: str = "") -> None:
        """Queues a row; `not_for` names a replica that shall not get it back."""
        # The number counts down, so that of equals the first is the last in its group.
        number = -next(self._numbers)
        group = self._groups.get(prefix)
        if group is None:
            group = self._groups[prefix] = _Group()
            for name in self._homes.get(prefix, ()):
                self._join(name, prefix, group)
        bisect.insort(group.rows, (work, number, key))
        group.work += work
        self.work += work
        self._where[key] = prefix, work, number
        heapq.heappush(self._by_work, (-work, -number, key))
        if not_for:
            self._barred[key] = not_for
        if prefix is not None and not group.homes:
            heapq.heappush(self._new, (-work, -number, prefix))

    def remove(self, key: str) -> None:
        """Forgets a row; unknown keys are ignored."""
        if key in self._where:
            prefix, work, number = self._where[key]
            group = self._groups[prefix]
            self._pop(prefix, bisect.bisect_left(group.rows, (work, number, key)))

    def allow_all(self) -> None:
        """Rows may go back to the replicas from which they were recalled."""
        self._barred.clear()

    def forget_home(self, name: str) -> None:
        """A replica is gone, and what it had computed."""
        self._own.pop(name, None)
        self.allow_all()  # whoever is left may have to take them
        for homes in self._homes.values():
            homes.discard(name)
        for prefix, group in self._groups.items():
            if name in group.homes:
                group.homes.discard(name)
                if not group.homes:
                    work, number, _ = group.rows[-1]
                    heapq.heappush(self._new, (-work, -number, prefix))

    def take(
        self, name: str, *, most: float, pace: Pace, hungry: bool
    ) -> tuple[str, float, Hashable] | None:
        """(key, work, prefix) of the row that a replica shall have next; None where none fits it.

        Args:
          most: work that the row may have.
          pace: of the replicas.
          hungry: whether the replica would idle without one.
        """
        found = None
        prefix, work = self._longest_of_all()
        if pace.urgent < work <= most:
            found = self._longest(name, [prefix], most)
        candidates = [p for p in (None, *self._own.get(name, ())) if p in self._groups]
        if found is None:
            found = self._longest(name, candidates, most)
        if found is None:
            found = self._longest(name, self._without_home(), most)
        if found is None:
            others = [p for p in self._groups if p is not None and p not in candidates]
            behind = [p for p in others if self._behind(p, pace)]
            found = self._longest(name, behind or (others if hungry else ()), most)
        if found is None:
            return None
        prefix, place = found
        if prefix is not None:
            homes = self._homes.setdefault(prefix, set())
            homes.add(name)
            self._homes.move_to_end(prefix)
            self._join(name, prefix, self._groups[prefix])
            if len(self._homes) > _MOST_HOMES:
                self._homes.popitem(last=False)
        work, _, key = self._pop(prefix, place)
        return key, work, prefix

    def _longest(
        self, name: str, prefixes: Collection[Hashable], most: float
    ) -> tuple[Hashable, int] | None:
        """(prefix, place) of the longest row of these groups that may go to the replica."""
        best, found = None, None
        for prefix in prefixes:
            group = self._groups[prefix]
            place = group.longest(most)
            while place >= 0 and self._barred.get(group.rows[place][2]) == name:
                place -= 1
            if place >= 0 and (best is None or group.rows[place][:2] > best):
                best, found = group.rows[place][:2], (prefix, place)
        return found

    def _longest_of_all(self) -> tuple[Hashable, float]:
        """(prefix, work) of the longest row; there must be one."""
        while True:
            work, number, key = self._by_work[0]
            prefix, _, valid = self._where.get(key, (None, 0.0, 1))
            if valid == -number:
                return prefix, -work
            heapq.heappop(self._by_work)

    def _without_home(self) -> list[Hashable]:
        """Some groups that nobody has begun, those with the longest rows first."""
        kept, prefixes = [], []
        while self._new and len(prefixes) < _ENOUGH:
            entry = heapq.heappop(self._new)
            group = self._groups.get(entry[2])
            if group is None or group.homes:
                continue
            head = (-group.rows[-1][0], -group.rows[-1][1], entry[2])
            if entry == head:
                kept.append(entry)
                prefixes.append(entry[2])
            elif entry < head:  # its row is gone, the group's next is shorter
                heapq.heappush(self._new, head)
        for entry in kept:
            heapq.heappush(self._new, entry)
        return prefixes

    def _behind(self, prefix: Hashable, pace: Pace) -> bool:
        """Whether a group's homes would still be at it after everything else is done."""
        group = self._groups[prefix]
        rate = pace.rate_of(group.homes)
        return not rate or group.work / rate > pace.horizon

    def _join(self, name: str, prefix: Hashable, group: _Group) -> None:
        group.homes.add(name)
        self._own.setdefault(name, set()).add(prefix)

    def _pop(self, prefix: Hashable, place: int) -> tuple[float, int, str]:
        group = self._groups[prefix]
        row = group.rows.pop(place)
        group.work -= row[0]
        self.work -= row[0]
        del self._where[row[2]]
        self._barred.pop(row[2], None)
        if not group.rows:
            del self._groups[prefix]
            for name in group.homes:
                self._own[name].discard(prefix)
        return row
