"""When there can be room at the earliest, and who can't be let in before his deadline.

Invariant: nobody is refused whom some order of events could still let in, as long as no limit is
changed and no pause is ended.
"""

from __future__ import annotations

from typing import NamedTuple

from tidegate.limiter.limits import Rate
from tidegate.limiter.model.permits import Permits
from tidegate.limiter.model.state import BLOCKED, Flow, LimitState, Member, Queue, read_member
from tidegate.limiter.outlook import Barred, Outlook


class Earliest(NamedTuple):
    """When there will be room if nothing is given back, 0 where a call that ends makes it or nobody
    knows; what is used, -1 of a limit that is paused; whether `at` is certain for every call."""

    at: int
    used: int
    firm: bool


class Outlooks(Permits):
    """See the module. `waited`: queues of which a session may want to know what they wait for, by
    the number of their flow. All fields are of one call."""

    def __init__(self) -> None:
        super().__init__()
        self.firm: frozenset[str] = frozenset()
        self.barred: list[Barred] = []
        self.waited: dict[int, Queue] = {}

    def _is_firm(self, limit: LimitState) -> bool:
        """Nothing is given back where requests are counted; else a call may have reserved more than
        it uses."""
        exact = isinstance(limit.limit, Rate) and limit.limit.exact
        return exact or (limit.is_rate and limit.name in self.firm)

    def _earliest(self, limit: LimitState, amount: int) -> Earliest:
        pause, at, used = self.pause_of(limit), 0, limit.used
        if limit.is_rate:
            used, amount = self.spent(limit), limit.clamped(amount)
            if amount and limit.limit.bound and used + amount > limit.limit.bound:
                at = limit.spending.room_at(limit.limit, amount, self.now)
        if limit.limit.shadow:
            return Earliest(0, used, firm=False)
        paused_at = pause.until if pause and pause.until > self.now else 0
        if at > paused_at:
            return Earliest(at, used, self._is_firm(limit))
        if pause and paused_at:
            return Earliest(paused_at, -1, pause.gate is None)
        return Earliest(0, used, firm=False)

    def bar(self, flow: Flow, member: Member, left_ms: int) -> bool:
        """Refuse a ticket that can't be let in within `left_ms`, even if it were alone; True if
        that is so."""
        latest, found = self.now + left_ms - 1, None
        for position, limit in enumerate(self.lane(flow)):
            returned = not limit.under and not any(self.owed.values())
            settled = limit.is_rate and (self._is_firm(limit) or returned)
            if settled or self.pause_of(limit):
                at, used, firm = self._earliest(limit, member.amount(position))
                if at > latest and (firm or (settled and used >= 0)):
                    latest, found = at, Barred(member.ticket, limit.name, at - self.now, used)
        if found is not None:
            self.barred.append(found)
        return found is not None

    def outlook(self) -> list[Outlook]:
        """What each of `waited` waits for now."""
        found = []
        for number, queue in sorted(self.waited.items()):
            if queue.at is not None and queue.at != BLOCKED:
                limit, amount = self.limit(queue.at), 1
                if limit.is_rate and not self._is_firm(limit):
                    member = read_member(queue.first()[0])
                    amount = member.amount(queue.flow.lane.index(limit.name))
                at, used, firm = self._earliest(limit, amount)
                room_ms = max(0, at - self.now)
                found.append(Outlook(number, queue.at, room_ms, used, int(firm)))
        return found
