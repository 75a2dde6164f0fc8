"""How many streams and long polls each tenant has open in this process.

Invariant: an opening is counted from its being let in to its close, once, however it ends.
"""

from __future__ import annotations

from collections import Counter
from typing import Self

from tidegate.call import Caller
from tidegate.errors import QuotaExceeded

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
    """One per process."""

    def __init__(self) -> None:
        self._streams: Counter[str] = Counter()
        self._long_polls: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Openings streams={self._streams.total()} polls={self._long_polls.total()}>"

    def stream(self, caller: Caller) -> Opening:
        """Count one more open stream. Raises QuotaExceeded."""
        return _opened(self._streams, caller, caller.caps.most_streams, "streams")

    def long_poll(self, caller: Caller) -> Opening:
        """Count one more long poll. Raises QuotaExceeded."""
        return _opened(self._long_polls, caller, caller.caps.most_long_polls, "long polls")


def _opened(counter: Counter[str], caller: Caller, most: int | None, what: str) -> Opening:
    if most is not None and counter[caller.tenant_id] >= most:
        raise QuotaExceeded(
            f"tenant {caller.tenant_id} has as many {what} open as it may",
            limit=f"most_{what.replace(' ', '_')}",
            allowed=f"at most {most} open {what} at a time in each process",
            retry_after_ms=_RETRY_AFTER_MS,
        )
    return Opening(counter, caller.tenant_id)
