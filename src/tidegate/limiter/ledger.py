"""What this process waits for, holds and has still to say: decided here, sent by `courier.py`.

Does no I/O. Invariants: a ticket is waiting, held or gone, and each is granted or given up once;
what was said in a batch that may not have arrived is said again, until a later batch is confirmed;
a permit that is passed on inside the process is never also given back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count, islice

MAX_ENTRIES = 500


@dataclass(slots=True, eq=False)
class Waiter:
    """A ticket in the queue. `deadline_ms` and `asked_ms` are of the lease's clock."""

    ticket: int
    limit: str
    hard_ms: int
    asked_ms: float
    deadline_ms: float
    future: asyncio.Future[Holding]
    sent: bool = False


@dataclass(slots=True, eq=False)
class Holding:
    """A permit in use. `on_fence` cancels the body that uses it."""

    ticket: int
    limit: str
    epoch: int
    seq: int
    hard_until_ms: float
    waited_ms: float
    fenced: bool = False
    on_fence: Callable[[], None] | None = None

    def hard_left_ms(self, now_ms: float) -> int:
        return max(1, int(self.hard_until_ms - now_ms))


@dataclass(slots=True)
class Release:
    """A permit given back. `sent` once it has been in a batch, which may have arrived."""

    ticket: int
    limit: str
    epoch: int
    seq: int
    outcome: str
    tokens: int | None
    sent: bool = False


@dataclass(frozen=True, slots=True)
class Transfer:
    """A permit passed on inside the process: what the server counts under `source` is `heir`'s."""

    source: int
    heir: Holding


@dataclass(slots=True)
class Batch:
    """What one call of the script carries; kept until it is known to have arrived."""

    joining: bool = False
    held: list[Holding] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    cancels: list[int] = field(default_factory=list)
    enqueues: list[Waiter] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.transfers) + len(self.releases) + len(self.cancels) + len(self.enqueues)


@dataclass(slots=True)
class Counts:
    """How often things happened since the start; the tests' and benchmarks' ground."""

    admitted: int = 0
    recycled: int = 0
    local: int = 0
    strays: int = 0
    fenced: int = 0


def _new_future() -> asyncio.Future[Holding]:
    return asyncio.get_running_loop().create_future()


class Ledger:
    """See the module. `recycling` is set while a freed permit may be passed on in the process."""

    def __init__(self, new_future: Callable[[], asyncio.Future[Holding]] | None = None) -> None:
        self._new_future = new_future or _new_future
        self.waiting: dict[int, Waiter] = {}
        self.held: dict[int, Holding] = {}
        self.held_of: Counter[str] = Counter()
        self.counts = Counts()
        self.recycling = False
        self._tickets = count(1)
        self._lanes: dict[str, dict[int, Waiter]] = {}
        self._enqueues: dict[int, Waiter] = {}
        self._cancels: list[int] = []
        self._releases: list[Release] = []
        # By heir, so that a permit passed on many times while Valkey is away is one entry; those
        # which may have arrived stay as they were said.
        self._transfers: dict[int, Transfer] = {}
        self._said_transfers: list[Transfer] = []
        # Tickets given up or passed on, until the server is known to have heard of it.
        self._parting: set[int] = set()

    def __repr__(self) -> str:
        return f"<Ledger waiting={len(self.waiting)} held={len(self.held)} unsaid={self.unsaid()}>"

    def unsaid(self) -> int:
        """How many entries are to be sent."""
        transfers = len(self._transfers) + len(self._said_transfers)
        return len(self._enqueues) + len(self._cancels) + len(self._releases) + transfers

    def waiting_in(self, limit: str) -> int:
        return len(self._lanes.get(limit, ()))

    def ask(self, limit: str, *, hard_ms: int, now_ms: float, deadline_ms: float) -> Waiter:
        """A new waiter at the end of its lane."""
        future = self._new_future()
        waiter = Waiter(next(self._tickets), limit, hard_ms, now_ms, deadline_ms, future)
        self.waiting[waiter.ticket] = waiter
        self._lanes.setdefault(limit, {})[waiter.ticket] = waiter
        self._enqueues[waiter.ticket] = waiter
        return waiter

    def abandon(self, ticket: int, now_ms: float) -> None:
        """The waiter gave up. A grant that reached it already, or crosses this, is given back."""
        waiter = self._forget(ticket)
        if waiter is None:
            if ticket in self.held:
                self.release(ticket, outcome="ignored", tokens=None, now_ms=now_ms)
        elif waiter.sent:
            self._cancel(ticket)

    def _forget(self, ticket: int) -> Waiter | None:
        waiter = self.waiting.pop(ticket, None)
        if waiter is not None:
            lane = self._lanes[waiter.limit]
            del lane[ticket]
            if not lane:
                del self._lanes[waiter.limit]
            self._enqueues.pop(ticket, None)
        return waiter

    def _cancel(self, ticket: int) -> None:
        self._cancels.append(ticket)
        self._parting.add(ticket)

    def release(self, ticket: int, *, outcome: str, tokens: int | None, now_ms: float) -> None:
        """Give a permit back, or pass it on to the next waiter here while `recycling`."""
        holding = self.held.pop(ticket, None)
        if holding is None:
            return
        self.held_of[holding.limit] -= 1
        passed_to_us = self._transfers.pop(ticket, None)
        source = ticket if passed_to_us is None else passed_to_us.source
        release = Release(source, holding.limit, holding.epoch, holding.seq, outcome, tokens)
        self._parting.add(source)
        if holding.fenced or not self.recycling or not self._pass_on(release, now_ms):
            self._releases.append(release)

    def _pass_on(self, release: Release, now_ms: float) -> bool:
        waiter = self._first_of(release.limit)
        if waiter is None:
            return False
        heir = self._hold(waiter, release.epoch, release.seq, now_ms)
        self._transfers[heir.ticket] = Transfer(release.ticket, heir)
        self.counts.recycled += 1
        return True

    def _first_of(self, limit: str) -> Waiter | None:
        """The first waiter of a lane whose task has not been cancelled in this very moment."""
        for waiter in self._lanes.get(limit, {}).values():
            if not waiter.future.done():
                return waiter
        return None

    def recycle_unsent(self, now_ms: float) -> None:
        """Valkey is away: pass on what was freed but never said."""
        self._releases = [
            release
            for release in self._releases
            if release.sent or not self._pass_on(release, now_ms)
        ]

    def admit_locally(self, shares: Iterable[tuple[str, int]], epoch: int, now_ms: float) -> None:
        """Valkey is away for longer than the lease: use this process's own share."""
        for limit, share in shares:
            while self.held_of[limit] < share:
                waiter = self._first_of(limit)
                if waiter is None:
                    break
                self._hold(waiter, epoch, 0, now_ms)
                self.counts.local += 1

    def grant(self, ticket: int, epoch: int, seq: int, now_ms: float) -> None:
        """The server let a ticket in. One that nobody waits for any more is given back."""
        waiter = self.waiting.get(ticket)
        if waiter is not None:
            self._hold(waiter, epoch, seq, now_ms)
        elif ticket not in self.held and ticket not in self._parting:
            self.counts.strays += 1
            self._cancel(ticket)

    def _hold(self, waiter: Waiter, epoch: int, seq: int, now_ms: float) -> Holding:
        self._forget(waiter.ticket)
        holding = Holding(
            waiter.ticket,
            waiter.limit,
            epoch,
            seq,
            now_ms + waiter.hard_ms,
            now_ms - waiter.asked_ms,
        )
        self.held[waiter.ticket] = holding
        self.held_of[waiter.limit] += 1
        self.counts.admitted += 1
        # A future that is done belongs to a task that is being cancelled: it will abandon.
        if not waiter.future.done():
            waiter.future.set_result(holding)
        return holding

    def fence(self) -> int:
        """Our session is gone: cancel every body. They stay in the ledger until they have ended."""
        fenced = [holding for holding in self.held.values() if not holding.fenced]
        for holding in fenced:
            holding.fenced = True
            if holding.on_fence is not None:
                holding.on_fence()
        self.counts.fenced += len(fenced)
        return len(fenced)

    def take(self) -> Batch:
        """The next batch to send, at most `MAX_ENTRIES` of each sort."""
        enqueues = list(islice(self._enqueues.values(), MAX_ENTRIES))
        for waiter in enqueues:
            waiter.sent = True
            del self._enqueues[waiter.ticket]
        batch = Batch(
            transfers=[*self._said_transfers, *self._transfers.values()],
            releases=self._releases[:MAX_ENTRIES],
            cancels=self._cancels[:MAX_ENTRIES],
            enqueues=enqueues,
        )
        for release in batch.releases:
            release.sent = True
        self._said_transfers.clear()
        self._transfers.clear()
        del self._releases[:MAX_ENTRIES]
        del self._cancels[:MAX_ENTRIES]
        return batch

    def take_join(self) -> Batch:
        """A batch that tells a server which knows nothing of us all that we hold and wait for.

        The server forgets what it had of this session, so cancels and transfers have no object
        any more; releases still have: the permit may be held over.
        """
        self._parting.difference_update(self._cancels)
        self._parting.difference_update(t.source for t in self._said_transfers)
        self._parting.difference_update(t.source for t in self._transfers.values())
        self._cancels.clear()
        self._said_transfers.clear()
        self._transfers.clear()
        self._enqueues = dict(self.waiting)
        batch = self.take()
        batch.joining = True
        batch.held = list(self.held.values())
        return batch

    def confirm(self, batch: Batch) -> None:
        """The server has done what the batch said."""
        self._parting.difference_update(batch.cancels)
        self._parting.difference_update(release.ticket for release in batch.releases)
        self._parting.difference_update(transfer.source for transfer in batch.transfers)

    def restore(self, batch: Batch) -> None:
        """The batch may or may not have arrived: say it again, before anything newer."""
        self._said_transfers[:0] = batch.transfers
        self._releases[:0] = batch.releases
        self._cancels[:0] = batch.cancels
        again = {w.ticket: w for w in batch.enqueues if w.ticket in self.waiting}
        self._enqueues = again | self._enqueues

    def reconcile(self, held: Iterable[tuple[int, int]], epoch: int, now_ms: float) -> None:
        """Compare with all that the server says we hold: pick up grants whose push was lost."""
        for ticket, seq in held:
            self.grant(ticket, epoch, seq, now_ms)

    def refuse(self, waiter: Waiter, error: Exception, now_ms: float) -> None:
        """End a wait with an error."""
        self.abandon(waiter.ticket, now_ms)
        if not waiter.future.done():
            waiter.future.set_exception(error)
