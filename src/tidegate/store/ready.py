"""What a process knows of the ready jobs: where each queue begins, and how far it has read.

PostgreSQL keeps the entries of jobs that have left the queue until no transaction can see them any
more, and whoever looks for the first ready job walks past all of them. So nobody looks: a claim
reads which jobs have come since the last one, by the transactions that brought them, and begins in
each queue (of one tenant and priority) where the first ready job was.

Invariant: every job that was ready in the snapshot read last is at or after the `since` of its
queue, or is among the queue's `early`. Whatever that snapshot could not see yet, such as a commit
that is late, comes with the next reading, since it is a snapshot and not a time that is compared.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from tidegate.store.records import Json

_ALL = 2**62  # after every transaction
_MOST_EARLY = 256
_QUICK_S = 0.05

Key = tuple[str, int]  # tenant and priority
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """A queue that a claim looks at: `n` is the tenant's turn."""

    n: int
    key: Key
    since: datetime | None
    early: tuple[UUID, ...]

    def row(self) -> Json:
        return {
            "n": self.n,
            "tenant_id": self.key[0],
            "priority": self.key[1],
            "since": self.since,
            "early": list(self.early),
        }


@dataclass(slots=True)
class _Queue:
    """`since`: when its first ready job was made, but for the early ones; None: no others.

    Early ones are claimed by their ids. So a job that comes back after long does not have the
    search begin with it, among all that have left since.
    """

    since: datetime | None = None
    early: dict[UUID, datetime] = field(default_factory=dict)

    def add(self, jobs: int, named: Sequence[tuple[datetime, UUID]]) -> None:
        """`jobs` became ready; `named` are the oldest of them, in their order."""
        if jobs > len(named):
            self._begin(named[-1][0])
        for made_at, request_id in named:
            if self.since is None or made_at < self.since:
                self.early[request_id] = made_at
        if len(self.early) > _MOST_EARLY:
            by_age = sorted(self.early.items(), key=lambda one: (one[1], one[0]))
            self._begin(by_age[_MOST_EARLY // 2][1])
            self.early = dict(by_age[: _MOST_EARLY // 2])

    def _begin(self, made_at: datetime) -> None:
        self.since = made_at if self.since is None else min(self.since, made_at)

    def turn(self, n: int, key: Key, limit: int) -> Turn:
        """The oldest first: what is not early waits while there are more early ones than asked."""
        oldest = sorted(self.early, key=lambda one: (self.early[one], one))
        few = len(oldest) <= 2 * limit
        return Turn(n, key, self.since if few else None, tuple(oldest[: 2 * limit]))


class Ready:
    """The ready jobs of one pool and lane."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[int, _Queue]] = {}
        self._tenants: list[str] = []
        self._xmax: int | None = None
        self._under_way: list[int] = []
        self._swept_to = 0
        self._sweep_end = 0
        self._step = _ALL

    def __repr__(self) -> str:
        queues = sum(len(queues) for queues in self._queues.values())
        return f"<Ready queues={queues} swept={self.is_swept}>"

    # Reading on

    @property
    def is_unread(self) -> bool:
        return self._xmax is None

    @property
    def unread(self) -> tuple[int, int, list[int]]:
        """The transactions to read: from, before, and those that were under way."""
        return (_ALL if self._xmax is None else self._xmax), _ALL, self._under_way

    def read(self, rows: Sequence[Row]) -> None:
        """Take in what came; the snapshot of it is where the next reading begins."""
        xmax = rows[0]["xmax"]
        if self._xmax is None or xmax < self._xmax:
            # The first reading; or another server, which has not come as far as the one before.
            self._xmax = xmax
            self.begin_sweep()
        self._xmax, self._under_way = xmax, rows[0]["under_way"]
        self._add(rows)

    # Going through all that was there before

    @property
    def is_swept(self) -> bool:
        return not self.is_unread and self._swept_to >= self._sweep_end

    def begin_sweep(self) -> None:
        """Look at all again, up to where was read, whatever is known."""
        assert self._xmax is not None
        self._swept_to, self._sweep_end = 0, self._xmax

    @property
    def unswept(self) -> tuple[int, int, list[int]]:
        """The next step, as `unread`."""
        return self._swept_to, min(self._swept_to + self._step, self._sweep_end), []

    @property
    def is_shortest_step(self) -> bool:
        return self._step == 1

    def swept(self, before: int, rows: Sequence[Row], took_s: float) -> None:
        """A step is done; a slow one is followed by a shorter one."""
        self._add(rows)
        self._swept_to = before
        self._step = min(2 * self._step, _ALL) if took_s < _QUICK_S else max(1, self._step // 2)

    def not_swept(self) -> None:
        """A step took too long."""
        self._step = max(1, min(self._step, self._sweep_end - self._swept_to) // 8)

    def _add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row["tenant_id"] is None:
                continue
            tenant = row["tenant_id"]
            if tenant not in self._queues:
                self._queues[tenant] = {}
                insort(self._tenants, tenant)
            queue = self._queues[tenant].setdefault(row["priority"], _Queue())
            queue.add(row["jobs"], list(zip(row["made_at"], row["ids"], strict=True)))

    # Claiming

    def tenants_after(self, last: str) -> list[str]:
        """All tenants that may have ready jobs, in turn from after `last`."""
        place = bisect_right(self._tenants, last)
        return self._tenants[place:] + self._tenants[:place]

    def turns(self, tenants: Iterable[str], limit: int) -> list[Turn]:
        """What a claim of at most `limit` jobs is to look at."""
        return [
            queue.turn(n, (tenant, priority), limit)
            for n, tenant in enumerate(tenants)
            for priority, queue in self._queues.get(tenant, {}).items()
        ]

    def settle(self, turn: Turn, since: datetime | None, early: Iterable[UUID]) -> None:
        """After the claim's commit: where the queue begins now, and the early ones that are left.

        What was learnt meanwhile by sweeping stands.
        """
        tenant, priority = turn.key
        queues = self._queues.get(tenant, {})
        queue = queues.get(priority)
        if queue is None:
            return
        if queue.since == turn.since:
            queue.since = since
        left = set(early)
        for request_id in turn.early:
            if request_id not in left:
                queue.early.pop(request_id, None)
        if queue.since is None and not queue.early:
            del queues[priority]
            if not queues:
                del self._queues[tenant]
                self._tenants.pop(bisect_right(self._tenants, tenant) - 1)
