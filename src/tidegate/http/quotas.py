"""Quotas on open streams and long polls of each tenant in this process.

Invariant: an opening is counted from its being let in to its close, once, however it ends.
"""

from __future__ import annotations

from collections import Counter
from typing import Self

from tidegate.call import Caller
from tidegate.errors import QuotaExceeded, TooManyFollowers

MOST_LONG_POLLS = 4_000
MOST_FOLLOWERS = 2_000
_RETRY_AFTER_MS = 1_000


class Opening:
    """One stream or long poll; `close` may be called often."""

    __slots__ = ("_counter", "_tenant")

    def __init__(self, counter: Counter[str], tenant: str) -> None:
        counter[tenant] += 1
        self._counter: Counter[str] | None = counter
        self._tenant = tenant

    def close(self) -> None:
        counter, self._counter = self._counter, None
        if counter is None:
            return
        counter[self._tenant] -= 1
        if not counter[self._tenant]:
            del counter[self._tenant]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class Openings:
    """One per process. Of the long polls and of the followers of a process, a tenant with a key may
    have half of what the others leave: no number of tenants can take them all."""

    def __init__(self) -> None:
        self._streams: Counter[str] = Counter()
        self._long_polls: Counter[str] = Counter()
        self._followers: Counter[str] = Counter()  # of events; they count as long polls too

    def __repr__(self) -> str:
        polls = self._long_polls.total() + self._followers.total()
        return f"<Openings streams={self._streams.total()} polls={polls}>"

    def stream(self, caller: Caller) -> Opening:
        """Count one more open stream. Raises QuotaExceeded."""
        open_now = self._streams[caller.tenant_id]
        return _opened(self._streams, caller, open_now, caller.caps.most_streams, "streams")

    def long_poll(self, caller: Caller) -> Opening:
        """Count one more long poll. Raises QuotaExceeded."""
        share = _share_of(self._long_polls, caller, MOST_LONG_POLLS)
        if self._long_polls[caller.tenant_id] >= share:
            raise _quota_exceeded(caller, share, "long polls")
        return self._capped_poll(self._long_polls, caller)

    def follower(self, caller: Caller) -> Opening:
        """Count one more client that follows a request. Raises QuotaExceeded and
        TooManyFollowers."""
        if self._followers[caller.tenant_id] >= _share_of(self._followers, caller, MOST_FOLLOWERS):
            said = "too many clients follow requests here; poll, or ask again"
            raise TooManyFollowers(said, retry_after_ms=_RETRY_AFTER_MS)
        return self._capped_poll(self._followers, caller)

    def _capped_poll(self, counter: Counter[str], caller: Caller) -> Opening:
        open_now = self._long_polls[caller.tenant_id] + self._followers[caller.tenant_id]
        return _opened(counter, caller, open_now, caller.caps.most_long_polls, "long polls")


def _share_of(counter: Counter[str], caller: Caller, most: int) -> int:
    """Where a caller shows no key its tenant is what it says, and a share would bind nobody."""
    left = most - counter.total() + counter[caller.tenant_id]
    return left if caller.key_id is None else (left + 1) // 2


def _opened(
    counter: Counter[str], caller: Caller, open_now: int, most: int | None, what: str
) -> Opening:
    if most is not None and open_now >= most:
        raise _quota_exceeded(caller, most, what)
    return Opening(counter, caller.tenant_id)


def _quota_exceeded(caller: Caller, most: int, what: str) -> QuotaExceeded:
    return QuotaExceeded(
        f"tenant {caller.tenant_id} has as many {what} open as it may",
        limit=f"most_{what.replace(' ', '_')}",
        allowed=f"at most {most} open {what} at a time in each process",
        retry_after_ms=_RETRY_AFTER_MS,
    )
