"""A semaphore for many processes, kept in Valkey: never over, no polling, no leaks.

Knows nothing of language models, HTTP or PostgreSQL, and can be used alone:

    policy = PoolPolicy({"kind:text_only": 5})
    async with Limiter.from_url("redis://localhost", pool="demo", policy=policy) as limiter:
        async with limiter.acquire("kind:text_only", deadline_ms=30_000) as permit:
            ...

`courier.py` draws the states; `lua/` is what runs in Valkey; `model.py` is the specification that
the tests step beside it.
"""

from tidegate.errors import (
    AdmissionError,
    ConfigError,
    DeadlineExceeded,
    DemandImpossible,
    LeaseLost,
    LimiterUnavailable,
    LimitPaused,
    LimitUsedUp,
    PolicyConflict,
    QueueFull,
    ShuttingDown,
    TidegateError,
    UpstreamTimeout,
)
from tidegate.limiter.demand import Demand
from tidegate.limiter.flow import Tokens
from tidegate.limiter.limiter import Limiter
from tidegate.limiter.limits import Adaptive, Band, Concurrency, PoolPolicy, Quota, Rate
from tidegate.limiter.observer import Observer, State
from tidegate.limiter.permit import Acquisition, Permit
from tidegate.limiter.precedence import OnConflict
from tidegate.limiter.snapshot import (
    Change,
    LimitView,
    LocalState,
    PermitView,
    Place,
    QueueView,
    SessionView,
    Snapshot,
    TenantView,
    Why,
)
from tidegate.limiter.threads import SyncLimiter

__all__ = [
    "Acquisition",
    "Adaptive",
    "AdmissionError",
    "Band",
    "Change",
    "Concurrency",
    "ConfigError",
    "DeadlineExceeded",
    "Demand",
    "DemandImpossible",
    "LeaseLost",
    "LimitPaused",
    "LimitUsedUp",
    "LimitView",
    "Limiter",
    "LimiterUnavailable",
    "LocalState",
    "Observer",
    "OnConflict",
    "Permit",
    "PermitView",
    "Place",
    "PolicyConflict",
    "PoolPolicy",
    "QueueFull",
    "QueueView",
    "Quota",
    "Rate",
    "SessionView",
    "ShuttingDown",
    "Snapshot",
    "State",
    "SyncLimiter",
    "TenantView",
    "TidegateError",
    "Tokens",
    "UpstreamTimeout",
    "Why",
]
