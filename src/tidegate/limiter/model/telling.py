"""What a session is told that compares all: a bounded slice of each list in one call.

Invariant: what is told of a rate is never less than what is spent of it; who reads a list to its
end has seen all that was in it from the beginning to the end.
"""

from __future__ import annotations

from tidegate.limiter.model.joining import Joining
from tidegate.limiter.wire import SyncRequest, Whole

# What one call tells of each list, and of how many rates it sees what is spent now.
ON_PAGE = 100
LOOKED_AT = 50
# When a pause ends that lasts until it is ended.
FOR_EVER = 9007199254740991
Place = tuple[str, int]


class Telling(Joining):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.on_page, self.looked_at = ON_PAGE, LOOKED_AT

    def whole(self, q: SyncRequest) -> Whole:
        session, policy = self.sessions[q.sid], self.policy
        ends = [s.expiry for s in self.sessions.values()] + list(self.lapsing.values())
        lapsing, more_lapsing = self._page(
            [(end, "|".join(map(str, permit))) for permit, end in self.lapsing.items()]
            if self.hold
            else [],
            q.pages.get("lapsing"),
        )
        paused, more_paused = self._pauses(q.pages.get("pauses"))
        spent, told, more_spent = self._spent_since(q)
        pages = {"spent": more_spent, "lapsing": more_lapsing, "pauses": more_paused}
        tell = policy is not None and (q.revision != self.revision or self.conflict == 1)
        return Whole(
            now_ms=self.now,
            held=[
                (ticket, held.seq, held.until)
                for ticket in q.asks
                if (held := session.held.get(ticket))
            ],
            lapsing=[(member, max(0, end - self.now)) for end, member in lapsing],
            next_event_ms=max(1, min(ends) - self.now),
            conflict=self.conflict,
            spent=spent,
            pauses=[
                (name, pause.until - self.now, pause.ramp_ms, pause.said)
                for name in paused
                if (pause := self.pause_of(self.limit(name)))
            ],
            policy=policy.pack() if policy and tell else None,
            roster=self.roster(q),
            told=told,
            pages={name: place for name, place in pages.items() if place},
        )

    def paused(self) -> dict[str, int]:
        """When nothing is left of each pause."""
        pauses = {name: limit.pause for name, limit in self.limits.items() if limit.pause}
        return {
            name: FOR_EVER if pause.gate else pause.until + pause.ramp_ms
            for name, pause in pauses.items()
        }

    def _pauses(self, place: Place | None) -> tuple[list[str], Place | None]:
        over = sorted((end, name) for name, end in self.paused().items() if end <= self.now)
        for _, name in over[: self.looked_at]:
            self.limit(name).pause = None
        page, rest = self._page([(end, name) for name, end in self.paused().items()], place)
        return [name for _, name in page], rest

    def _spent_since(self, q: SyncRequest) -> tuple[list[tuple[str, int]], int, Place | None]:
        """What is spent of the rates that changed after `told`, as of then; with the first page, of
        those that did not for the longest time as of now."""
        order = sorted((number, name) for name, (number, _) in self.spending.items())
        news = [(number, name) for number, name in order if number > q.told][: self.on_page]
        behind = len(news) == self.on_page
        told = news[-1][0] if behind else self.changes
        found = {name: self.spending[name][1] for _, name in news}
        for _, name in order[: 0 if "spent" in q.pages else self.looked_at]:
            limit = self.limit(name)
            found[name] = self.spent(limit) if limit.is_rate else 0
            if not found[name]:
                del self.spending[name]
        return list(found.items()), told, (str(told), 0) if behind else None

    def _page(
        self, rows: list[tuple[int, str]], place: Place | None
    ) -> tuple[list[tuple[int, str]], Place | None]:
        """The rows that begin at a place, (score, how many of it were read), and the next place."""
        score, passed = place or ("", 0)
        first = passed + (sum(at < int(score) for at, _ in rows) if place else 0)
        page = sorted(rows)[first : first + self.on_page]
        if len(page) < self.on_page:
            return page, None
        last = page[-1][0]
        if page[0][0] < last:
            return page, (str(last), 0)
        return page, (str(last), self.on_page + (passed if score == str(last) else 0))
