"""What this process remembers of its pool for the case that the server forgets it.

Pure. Told anew at every comparison of all, a third of a lease apart; said again when we join a
pool that lost its past. Invariant: what is said is never less than what was so.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Generic, TypeVar
from zoneinfo import ZoneInfo

from tidegate.limiter.limits import BUCKETS, Limit, PoolPolicy, Quota, Rate
from tidegate.limiter.wire import Join, Whole

# A new session is let in after half a lease at the latest, whether all others know of it or not.
VOUCH_SHARE = 0.4
# How many comparisons tell how far ahead the server's clock is: about one and a third leases.
AHEAD_KEPT = 4


def next_midnight_ms(zone: str, now_ms: float) -> int:
    """The next midnight in a time zone, in ms since 1970."""
    local = datetime.fromtimestamp(now_ms / 1000, UTC).astimezone(ZoneInfo(zone))
    day = (local + timedelta(days=1)).date()
    midnight = datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone))
    return int(midnight.timestamp() * 1000)


_DAY_MS = 86_400_000
T = TypeVar("T")


class _Reading(Generic[T]):
    """A list that may come in several pages: `known` has all that was read to the end, and what is
    being read now. `ended`: this comparison has read it to the end."""

    def __init__(self) -> None:
        self.known: dict[str, T] = {}
        self.ended = False
        self._coming: dict[str, T] = {}

    def take(self, page: dict[str, T], *, goes_on: bool) -> bool:
        """True if the next page is to be read. While another list goes on the server tells this one
        from its beginning again: two lists, each begun again by the other, would never end."""
        if goes_on:
            self.known |= page
        if goes_on and self.ended:
            return False
        self._coming |= page
        if not goes_on:
            self.known, self._coming, self.ended = self._coming, {}, True
        return goes_on


class Remembered:
    """See the module. Ends are by the lease's clock."""

    def __init__(self) -> None:
        # Permits held over for dead sessions, with the end of each.
        self._lapsing: _Reading[float] = _Reading()
        # limit -> spent as last seen, and when that counts no more
        self._spent: dict[str, tuple[int, float]] = {}
        # limit -> end, ramp_ms (0 for a gate), said
        self._paused: _Reading[tuple[float, int, str]] = _Reading()
        self.told = 0  # the last change of what is spent that we know of
        self.pages: dict[str, tuple[str, int]] = {}  # where the lists go on that are not read yet
        self._midnights: dict[str, int] = {}
        self._in_force: PoolPolicy | None = None  # when all was compared last
        # Who is told when there is one.
        self.watchers: set[Callable[[], None]] = set()
        # The sessions that are there, and the version of that list; when it was confirmed.
        self.roster_version = 0
        self._roster: set[str] = set()
        self._confirmed_ms = float("-inf")
        # By how much the server's clock is ahead of the lease's, at the most: as each of the last
        # comparisons saw it, too much by the time that the question was under way.
        self._seen_ahead_ms: deque[float] = deque(maxlen=AHEAD_KEPT)

    @property
    def pauses(self) -> dict[str, tuple[float, int, str]]:
        return self._paused.known

    def learn(
        self, whole: Whole, policy: PoolPolicy, sent_ms: float, at_ms: float, *, recovering: bool
    ) -> bool:
        """The server told what we asked for at `sent_ms`. True if it has not heard yet which
        sessions we know now."""
        self._seen_ahead_ms.append(whole.now_ms - sent_ms)
        self.told, self.pages = whole.told, dict(whole.pages)
        self._in_force = policy
        lapsing = {member: at_ms + left_ms for member, left_ms in whole.lapsing}
        if not self._lapsing.take(lapsing, goes_on="lapsing" in whole.pages):
            self.pages.pop("lapsing", None)
        pauses = {name: (at_ms + left, ramp_ms, said) for name, left, ramp_ms, said in whole.pauses}
        if not self._paused.take(pauses, goes_on="pauses" in whole.pages):
            self.pages.pop("pauses", None)
        if not self.pages:
            self._begin()
        for name, amount in whole.spent:
            if amount:
                counts_for_ms = self._counts_for(policy.limit(name), whole.now_ms)
                self._spent[name] = amount, at_ms + counts_for_ms
            else:
                self._spent.pop(name, None)
        self._tell()
        version, sids = whole.roster
        news = version != self.roster_version
        if sids is not None:
            # While it recovers, those who were there before are still to come.
            self._roster = self._roster | set(sids) if recovering else set(sids)
        self.roster_version = version
        self._confirmed_ms = at_ms
        return news

    def _counts_for(self, limit: Limit | None, server_ms: float) -> float:
        """How long at most what is spent of a limit counts, in ms."""
        if isinstance(limit, Rate):
            return (limit.window_ms + limit.slack + 1) * (1 + 1 / BUCKETS) + 1
        if isinstance(limit, Quota):
            return self._midnight_ms(limit.zone, server_ms) - server_ms
        return _DAY_MS

    def _midnight_ms(self, zone: str, server_ms: float) -> int:
        known_ms = self._midnights.get(zone, 0)
        if not server_ms < known_ms < server_ms + 1.1 * _DAY_MS:
            known_ms = self._midnights[zone] = next_midnight_ms(zone, server_ms)
        return known_ms

    def forget_version(self) -> None:
        """Another epoch: its versions are others, and its clock may be."""
        self.roster_version = self.told = 0
        self.pages = {}
        self._begin()
        self._seen_ahead_ms.clear()

    def _begin(self) -> None:
        self._lapsing.ended = self._paused.ended = False

    def places(self, *, begin: bool) -> dict[str, tuple[str, int]]:
        """Where the next request reads on. `begin`: lists that were read to the end may have
        changed, and are read once more."""
        if begin:
            self._begin()
        return dict(self.pages)

    @property
    def _ahead_ms(self) -> float | None:
        return min(self._seen_ahead_ms, default=None)

    def roster(self, at_ms: float, lease_ms: int) -> list[str]:
        """The sessions that were there; nobody if what we know may be too old to vouch for."""
        if at_ms - self._confirmed_ms > lease_ms * VOUCH_SHARE:
            return []
        return sorted(self._roster)

    def here(self, server_ms: float) -> float:
        """A moment of the server's by our clock, at the earliest; minus infinity if not known."""
        ahead_ms = self._ahead_ms
        return float("-inf") if ahead_ms is None else server_ms - ahead_ms

    def lapsing(self, at_ms: float) -> list[tuple[str, int]]:
        """(member, left_ms) of the permits held over."""
        found = self._lapsing.known.items()
        return [(member, int(end - at_ms)) for member, end in found if end - at_ms >= 1]

    def spent(self, since: Mapping[str, int], at_ms: float) -> list[tuple[str, int, int]]:
        """(limit, as last seen, admitted here `since`) of the rates and quotas."""
        self._spent = {n: seen for n, seen in self._spent.items() if seen[1] > at_ms}
        names = sorted({*self._spent, *since})
        return [(name, self._spent.get(name, (0, 0))[0], since.get(name, 0)) for name in names]

    def pause(self, limit: str, end_ms: float, ramp_ms: int, said: str) -> None:
        self.pauses[limit] = (end_ms, ramp_ms, said)
        self._tell()

    def opened(self, limit: str, at_ms: float, ramp_ms: int) -> None:
        """A gate was opened."""
        _, ramp, said = self.pauses.get(limit, (0.0, 1, ""))
        if ramp == 0:
            self.pauses[limit] = (at_ms, ramp_ms, said)

    def _tell(self) -> None:
        if self.pauses:
            for told in tuple(self.watchers):
                told()

    def paused(self, at_ms: float) -> list[tuple[str, int, int, str]]:
        """(limit, left_ms, ramp_ms, said) of the pauses that go on."""
        return [
            (name, int(end - at_ms), ramp_ms, said)
            for name, (end, ramp_ms, said) in sorted(self.pauses.items())
            if ramp_ms == 0 or end + ramp_ms - at_ms >= 1
        ]

    def paused_of(self, limits: Sequence[str], at_ms: float) -> tuple[str, ...]:
        """Those of these limits that are paused, the time included over which calls come back."""
        found: list[str] = []
        for name in limits:
            if (pause := self.pauses.get(name)) is not None:
                end, ramp_ms, _ = pause
                if ramp_ms == 0 or end + ramp_ms > at_ms:
                    found.append(name)
        return tuple(found)

    def gate(self, limit: str, at_ms: float) -> tuple[int, str] | None:
        """For how long a gate lets nobody try, and what was said of it; None where it is open."""
        end, ramp_ms, said = self.pauses.get(limit, (0.0, 1, ""))
        return None if ramp_ms else (max(0, int(end - at_ms)), said)

    def paused_ms(self, limits: Sequence[str], at_ms: float) -> int:
        """For how long still one of these limits is paused; 0 where none is."""
        if not self.pauses:
            return 0
        left = [int(self.pauses[one][0] - at_ms) for one in limits if one in self.pauses]
        return max(0, *left, 0)

    def resets(self, quotas: Mapping[str, str], at_ms: float) -> dict[str, int]:
        """When each of these day quotas, limit -> zone, begins again, by the server's clock."""
        ahead_ms = self._ahead_ms
        now_ms = time.time() * 1000 if ahead_ms is None else at_ms + ahead_ms
        return {name: self._midnight_ms(zone, now_ms) for name, zone in quotas.items()}

    def join(
        self,
        policy: PoolPolicy,
        by: str,
        name: str,
        held: list[tuple[int, int, int, int, int]],
        since: Mapping[str, int],
        at_ms: float,
        lease_ms: int,
    ) -> Join:
        """What a session says that joins; `since` is what it spent since it last compared."""
        before = self._in_force
        base = before if before is not None and before.revision < policy.revision else None
        return Join(
            policy, by, name, held, self.lapsing(at_ms), self.spent(since, at_ms),
            self.paused(at_ms), self.roster(at_ms, lease_ms), base,
        )  # fmt: skip
