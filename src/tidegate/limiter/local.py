"""This process's own share of the limits, while Valkey is away for longer than the lease.

Pure. Invariant: the shares of all sessions known at the last answer never exceed the limits, so
that many processes alone are together no more than they were.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from tidegate.limiter.entries import Waiter
from tidegate.limiter.limits import Concurrency, PoolPolicy, Quota, share_of

_DAY_MS = 86_400_000


class LocalShare:
    """What may be let in without asking. `set` before `allows`."""

    def __init__(self) -> None:
        self._policy: PoolPolicy | None = None
        self._sessions = 0
        self._held: Mapping[str, int] = {}
        # limit -> (ms, amount) of what was let in here
        self._spent: dict[str, deque[tuple[float, int]]] = {}

    def set(self, policy: PoolPolicy, sessions: int, held: Mapping[str, int]) -> None:
        """`held` is how many permits this process holds of each limit, and may change."""
        self._policy, self._sessions, self._held = policy, sessions, held

    def allows(self, waiter: Waiter, at_ms: float) -> bool:
        """Whether our share of every limit has room; what is taken of rates is noted."""
        flow = waiter.flow
        spends = flow.spends(waiter.amounts)
        for name in flow.limits:
            if not self._has_room(name, spends.get(name, 0), at_ms):
                return False
        for name, amount in spends.items():
            self._spent.setdefault(name, deque()).append((at_ms, amount))
        return True

    def _has_room(self, name: str, amount: int, at_ms: float) -> bool:
        assert self._policy is not None
        limit = self._policy.binding(name)
        if limit is None:
            return False
        share = share_of(limit.bound, self._sessions)
        if isinstance(limit, Concurrency):
            return self._held.get(name, 0) < share
        span_ms = _DAY_MS if isinstance(limit, Quota) else limit.window_ms + limit.slack
        spent = self._spent.setdefault(name, deque())
        while spent and spent[0][0] + span_ms <= at_ms:
            spent.popleft()
        return sum(each for _, each in spent) + amount <= share
