"""What this process has still to say to its pool, and what it said without hearing back.

Invariant: what was said in a batch that may not have arrived is said again, in the same order and
before anything newer, until a later batch is confirmed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from math import inf
from typing import TypeVar

from tidegate.limiter.entries import Batch, Holding, Release, Transfer, Waiter
from tidegate.limiter.flow import Flow

MAX_ENTRIES = 500
# Each flow costs the server a look at all of its limits.
MAX_FLOWS = 15
# A permit that was freed while nobody waits is kept for the next one here no longer than this.
SPARE_MS = 5.0


E = TypeVar("E", Waiter, Release)


def _some(entries: Iterable[E]) -> list[E]:
    """As many as one call may carry, in their order."""
    taken: list[E] = []
    flows: set[Flow] = set()
    for entry in islice(entries, MAX_ENTRIES):
        flows.add(entry.flow)
        if len(flows) > MAX_FLOWS:
            break
        taken.append(entry)
    return taken


class Outbox:
    """See the module. `urgent` is set by what somebody may be waiting for; `parting` are tickets
    given up or passed on, until the server is known to have heard of it."""

    def __init__(self) -> None:
        self.urgent = False
        self.parting: set[int] = set()
        self._enqueues: dict[int, Waiter] = {}
        self._cancels: list[tuple[int, Flow | None, str]] = []
        self._settles: list[tuple[int, str]] = []
        self._releases: dict[int, Release] = {}
        self._transfers: list[Transfer] = []
        # Permits that were just freed while nobody waited, and since when, by their flow's key: the
        # next one who asks may have them.
        self._spare: dict[str, dict[int, float]] = {}

    def __len__(self) -> int:
        said_back = len(self._releases) + len(self._transfers) + len(self._settles)
        return len(self._enqueues) + len(self._cancels) + said_back

    def enqueue(self, waiter: Waiter) -> None:
        self._enqueues[waiter.ticket] = waiter

    def unqueue(self, ticket: int) -> None:
        """The ticket has not been said, or will not be said again."""
        self._enqueues.pop(ticket, None)

    def cancel(self, ticket: int, flow: Flow | None, member: str) -> None:
        self._cancels.append((ticket, flow, member))
        self.parting.add(ticket)

    def settle(self, ticket: int, actual: str) -> None:
        self._settles.append((ticket, actual))

    def give(self, release: Release, *, spare_since_ms: float | None) -> None:
        """Give a permit back; one that is spare may be taken out again until it is said."""
        self._releases[release.ticket] = release
        if spare_since_ms is not None:
            self._spare.setdefault(release.flow.key, {})[release.ticket] = spare_since_ms

    def take_spare(self, flow: Flow) -> Release | None:
        """A permit of this flow that was freed and not yet said."""
        spare = self._spare.get(flow.key)
        return self._releases.pop(spare.popitem()[0]) if spare else None

    def forget_spare(self) -> None:
        """From now on what was freed stays given back, and is said without delay."""
        if self._spare:
            self._spare.clear()
            self.urgent = self.urgent or len(self._releases) > 0

    def unsent(self) -> list[Release]:
        """Permits given back that nobody has heard of."""
        self._spare.clear()
        return [release for release in self._releases.values() if not release.sent]

    def unsay_releases(self) -> None:
        """Whoever heard of them has forgotten it."""
        for release in self._releases.values():
            release.sent = False

    def keep(self, release: Release) -> None:
        """It was passed on instead."""
        del self._releases[release.ticket]

    def transfer(self, transfer: Transfer) -> None:
        self._transfers.append(transfer)

    # -- batches

    def take(self, now_ms: float = inf) -> Batch:
        """The next batch to send, at most `MAX_ENTRIES` of each sort, of `MAX_FLOWS` flows. What
        has been spare for less than `SPARE_MS` is kept back: many that call again in the same
        moment would each find nothing else."""
        kept = self._fresh(now_ms)
        enqueues = _some(self._enqueues.values())
        for waiter in enqueues:
            waiter.sent = True
            del self._enqueues[waiter.ticket]
        batch = Batch(
            transfers=self._transfers[:MAX_ENTRIES],
            cancels=self._cancels[:MAX_ENTRIES],
            enqueues=enqueues,
        )
        del self._transfers[:MAX_ENTRIES]
        # A permit may only be given back once the server has heard how it came to its holder.
        if not self._transfers:
            said = (one for one in self._releases.values() if one.ticket not in kept)
            batch.releases = _some(said)
        for release in batch.releases:
            release.sent = True
            del self._releases[release.ticket]
        # The usage of a call may only be told once the server has heard that it ended.
        if len(self._releases) == len(kept):
            ready = [one for one in self._settles if one[0] not in kept]
            batch.settles = ready[:MAX_ENTRIES]
            self._settles = ready[MAX_ENTRIES:] + [one for one in self._settles if one[0] in kept]
        del self._cancels[:MAX_ENTRIES]
        held_back = len(kept) + sum(ticket in kept for ticket, _ in self._settles)
        self.urgent = len(self) > held_back
        return batch

    def _fresh(self, now_ms: float) -> set[int]:
        """The permits that are still kept for the next one who asks; the others are no more."""
        if not self._spare:
            return set()
        self._spare = {
            key: fresh
            for key, spare in self._spare.items()
            if (fresh := {one: at for one, at in spare.items() if now_ms - at < SPARE_MS})
        }
        return {ticket for spare in self._spare.values() for ticket in spare}

    def take_join(self, waiting: Mapping[int, Waiter], held: Iterable[Holding]) -> Batch:
        """A batch that tells a server which knows nothing of us all that we hold and wait for.

        The server forgets what it had of this session, so cancels and transfers have no object
        any more; releases still have: the permit may be held over.
        """
        self.parting.difference_update(ticket for ticket, _, _ in self._cancels)
        self.parting.difference_update(t.source for t in self._transfers)
        self._cancels.clear()
        self._transfers.clear()
        self._enqueues = dict(waiting)
        batch = self.take()
        batch.joining = True
        batch.held = list(held)
        return batch

    def confirm(self, batch: Batch) -> None:
        """The server has done what the batch said."""
        self.parting.difference_update(ticket for ticket, _, _ in batch.cancels)
        self.parting.difference_update(release.ticket for release in batch.releases)
        self.parting.difference_update(transfer.source for transfer in batch.transfers)

    def restore(self, batch: Batch, waiting: Mapping[int, Waiter]) -> None:
        """The batch may or may not have arrived."""
        self._transfers[:0] = batch.transfers
        self._releases = {r.ticket: r for r in batch.releases} | self._releases
        self._settles[:0] = batch.settles
        self._cancels[:0] = batch.cancels
        again = {w.ticket: w for w in batch.enqueues if w.ticket in waiting}
        self._enqueues = again | self._enqueues
        self.urgent = True
