"""Jobs that went back to the queue because nothing could be called for them.

Invariant: what this process has put off comes back as soon as nothing holds it: few at first, as
the end of a pause is not yet an answer, and twice as many each second. `_MOST_KNOWN` at most are
known here; the others, and those of a process that was killed, come back in their time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from tidegate.jobs.held import Held
from tidegate.jobs.outages import Key
from tidegate.store.records import ClaimedJob, Failure
from tidegate.store.store import Store

_FIRST_BACK, _MOST_BACK, _MOST_KNOWN = 12, 1_000, 20_000
_COUNT_EVERY_S = 15.0
_APART_MS, _MOST_APART_MS = 250, 600_000  # far, as they are brought back sooner


@dataclass(slots=True)
class _Group:
    """What waits for the same: the claim by which each was put off, and until when."""

    ids: dict[UUID, tuple[int, float]] = field(default_factory=dict)
    at_once: int = _FIRST_BACK


class PutOff:
    """One per worker. targets_of: what may be called for a job, upstreams each with its model."""

    def __init__(
        self,
        store: Store,
        held: Held,
        targets_of: Callable[[ClaimedJob], Sequence[Key]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.held = held
        self._store = store
        self._targets_of = targets_of
        self._clock = clock
        self._groups: dict[tuple[Key, ...], _Group] = {}
        self._known = 0
        self._counted_at = clock()

    def __repr__(self) -> str:
        return f"<PutOff {self._known} for {len(self._groups)} targets>"

    def waits_ms(self, jobs: Iterable[ClaimedJob]) -> dict[UUID, int]:
        """As `Held.waits_ms`, of these jobs."""
        each = ((job.request_id, self._targets_of(job)) for job in jobs)
        apart = {"apart_ms": _APART_MS, "most_apart_ms": _MOST_APART_MS}
        return self.held.waits_ms(each, self._known, **apart)

    def wait_ms(self, job: ClaimedJob) -> int:
        """For how long it stays in the queue, since its call failed by the upstream."""
        return self.held.wait_ms(self._targets_of(job))

    async def hand_back(
        self,
        jobs: Sequence[ClaimedJob],
        waits_ms: Mapping[UUID, int] | None = None,
        failure: Failure | None = None,
    ) -> None:
        """As `Store.hand_back`; those in `waits_ms` are put off."""
        await self._store.hand_back(jobs, waits_ms, failure)
        for job in jobs:
            if (wait_ms := (waits_ms or {}).get(job.request_id)) is not None:
                self.note(job, wait_ms)

    def note(self, job: ClaimedJob, wait_ms: int) -> None:
        """It went back to the queue for so long."""
        group = self._groups.setdefault(tuple(self._targets_of(job)), _Group())
        is_new = job.request_id not in group.ids
        if self._known < _MOST_KNOWN or not is_new:
            self._known += is_new
            # Its claim was released, by which the number of that grew.
            group.ids[job.request_id] = job.claim + 1, self._clock() + wait_ms / 1000

    async def bring_back(self) -> None:
        """Let those be claimed that nothing holds any more. To be called every second; raises
        StoreUnavailable, after which they come back in their time."""
        await self._store.bring_back(self._back())

    async def bring_all_back(self) -> None:
        """Leave what is known here to other processes; raises StoreUnavailable."""
        groups, self._groups, self._known = self._groups, {}, 0
        claims = {one: what[0] for group in groups.values() for one, what in group.ids.items()}
        while claims:
            some = [claims.popitem() for _ in range(min(_MOST_BACK, len(claims)))]
            await self._store.bring_back(dict(some))

    def _back(self) -> dict[UUID, int]:
        found: dict[UUID, int] = {}
        now = self._clock()
        if now - self._counted_at > _COUNT_EVERY_S:
            self._counted_at = now
            self._forget_past(now)
        for targets, group in list(self._groups.items()):
            if self.held.ms(targets):
                group.at_once = _FIRST_BACK
                continue
            for request_id in list(group.ids)[: group.at_once]:
                claim, until = group.ids.pop(request_id)
                self._known -= 1
                if until > now:
                    found[request_id] = claim
            group.at_once = min(_MOST_BACK, 2 * group.at_once)
            if not group.ids:
                del self._groups[targets]
        return found

    def _forget_past(self, now: float) -> None:
        """Those that have come back by themselves."""
        for targets, group in list(self._groups.items()):
            group.ids = {one: what for one, what in group.ids.items() if what[1] > now}
            if not group.ids:
                del self._groups[targets]
        self._known = sum(len(group.ids) for group in self._groups.values())
