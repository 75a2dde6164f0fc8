"""Limiter: distributed concurrency and rate limits in Valkey, without polling, excess or leaks.

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
from tidegate.limiter.connection import OnConflict
from tidegate.limiter.limiter import Limiter
from tidegate.limiter.permit import Acquisition, Permit
from tidegate.limiter.policy import Adaptive, Band, Concurrency, PoolPolicy, Quota, Rate
from tidegate.limiter.queue import Demand, Tokens
from tidegate.limiter.sync import SyncLimiter
from tidegate.limiter.views import (
    Change,
    LimitView,
    LocalState,
    Observer,
    PermitView,
    Place,
    QueueView,
    SessionView,
    Snapshot,
    State,
    TenantView,
    Why,
)

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
