"""A semaphore for many processes, kept in Valkey: never over, no polling, no leaks.

Knows nothing of language models, HTTP or PostgreSQL, and can be used alone:

    policy = PoolPolicy({"kind:text_only": 5})
    async with Limiter.from_url("redis://localhost", pool="gemini", policy=policy) as limiter:
        async with limiter.acquire("kind:text_only", deadline_ms=30_000) as permit:
            ...

`courier.py` draws the states; `lua/` is what runs in Valkey; `model.py` is the specification that
the tests step beside it.
"""

from tidegate.limiter.limiter import Limiter
from tidegate.limiter.limits import PoolPolicy
from tidegate.limiter.observer import Observer, State
from tidegate.limiter.permit import Acquisition, Permit
from tidegate.limiter.snapshot import LimitView, LocalState, Snapshot

__all__ = [
    "Acquisition",
    "LimitView",
    "Limiter",
    "LocalState",
    "Observer",
    "Permit",
    "PoolPolicy",
    "Snapshot",
    "State",
]
