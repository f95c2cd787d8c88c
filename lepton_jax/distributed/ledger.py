"""The accounts of replicas: who worked how long, what a perfect split would take, what it took.

With m equal workers the time is T/m at best, T being that of one. Here T is not run but computed:
the work that was done at the rates that the replicas had while their slots were full. Times are
seconds of whoever calls. Read next: `balancer.py`, which decides and keeps no accounts.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(eq=False)
class Account:
    """Of one replica, in seconds and tokens.

    `full_*` count the stretches in which all its slots were taken, `ended` is the end of its last
    row, `rows` those that it finished.
    """

    slots: int
    began: float
    seen: float
    ended: float
    rows: int = 0
    tokens: float = 0.0
    busy: float = 0.0
    full_tokens: float = 0.0
    full_seconds: float = 0.0
    died: float | None = None

    @property
    def rate(self) -> float:
        """Tokens per second while full, or while busy where that is more; 0 without any."""
        full = self.full_tokens / self.full_seconds if self.full_seconds else 0.0
        return max(full, self.tokens / self.busy if self.busy else 0.0)


class Ledger:
    """Accounts by the names of replicas."""

    def __init__(self):
        self.accounts: dict[str, Account] = {}

    def open(self, name: str, *, slots: int, now: float) -> None:
        self.accounts[name] = Account(slots, began=now, seen=now, ended=now)

    def rest(self, now: float) -> None:
        """What was before doesn't count: work begins now."""
        for name, account in self.accounts.items():
            self.accounts[name] = Account(account.slots, began=now, seen=now, ended=now)

    def beat(self, name: str, *, tokens: float, held: int, ended: int, now: float) -> None:
        """Counts a stretch of a replica since its last.

        Args:
          tokens: done in it.
          held: rows that the replica had in it.
          ended: of these, those that ended.
        """
        account = self.accounts[name]
        seconds, account.seen = now - account.seen, now
        account.tokens += tokens
        account.rows += ended
        if not held:
            return
        account.busy += seconds
        account.ended = now
        if held >= account.slots:
            account.full_tokens += tokens
            account.full_seconds += seconds

    def idle(self, name: str, now: float) -> None:
        """A stretch without rows, or one that counts for nothing, ends now."""
        self.accounts[name].seen = now

    def died(self, name: str, now: float) -> None:
        self.accounts[name].died = now

    def report(self) -> dict[str, Any]:
        """In JSON types: the utilisation of each replica, idle time at the end, T/m and measured,
        until the last that any of them did.

        "utilization" is the share of the time that a replica was there in which it had rows,
        "tail_idle" the share of all replicas' time after each one's last row, "ideal_seconds" T/m
        and "seconds" what it took.
        """
        accounts = self.accounts.values()
        now = max(max(account.seen, account.died or 0.0) for account in accounts)
        began = min(account.began for account in accounts)
        there = {n: (a.died or now) - a.began for n, a in self.accounts.items()}
        seconds, whole = now - began, sum(there.values())
        idle = sum(now - a.ended for a in accounts if a.died is None)
        # A dead replica counts for the share of the time that it was there.
        rate = sum(a.rate * there[n] / seconds for n, a in self.accounts.items()) if seconds else 0
        ideal = sum(a.tokens for a in accounts) / rate if rate else 0.0
        return {
            "replicas": [
                {
                    "name": name,
                    "rows": a.rows,
                    "tokens_per_second": round(a.rate, 1),
                    "utilization": round(a.busy / there[name], 4) if there[name] else 0.0,
                    "died": a.died is not None,
                }
                for name, a in self.accounts.items()
            ],
            "tail_idle": round(idle / whole, 4) if whole else 0.0,
            "seconds": round(seconds, 3),
            "ideal_seconds": round(ideal, 3),
            "of_ideal": round(ideal / seconds, 4) if seconds else 0.0,
        }
