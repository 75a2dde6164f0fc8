"""Limiter: distributed concurrency and rate limits in Valkey, without polling, excess or leaks.

Knows nothing of language models, HTTP or PostgreSQL, and can be used alone:

    policy = PoolPolicy({"kind:text_only": 5})
    async with Limiter.from_url("redis://localhost", pool="demo", policy=policy) as limiter:
        async with limiter.acquire("kind:text_only", deadline_ms=30_000) as permit:
            ...

All else of this package is private to it, but for `simulation`, the engine without its I/O.
`session.py` draws the states; `lua/` is what runs in Valkey; `model/` is the specification that
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
from tidegate.limiter.connection import STALLED_S
from tidegate.limiter.diagnostics import ServerReport, commands, examine, forget_pool, look_until
from tidegate.limiter.estimates import WaitEstimate, WaitingLine
from tidegate.limiter.limiter import Limiter, limited
from tidegate.limiter.messages import (
    format_amount,
    format_pause,
    format_span,
    format_unit,
    format_window,
    limit_paused,
)
from tidegate.limiter.permit import Acquisition, DetachedPermit, Outcome, Permit
from tidegate.limiter.policy import (
    DEFAULT_BANDS,
    DEFAULT_PRIORITY,
    MAX_BOUND,
    MAX_LEASE_MS,
    MEASURES_OF_SHARES,
    RESERVES,
    SOURCES,
    UNITS,
    USUAL_WEIGHTS,
    Adaptive,
    Band,
    CallUse,
    Change,
    Concurrency,
    Demand,
    FairBy,
    Limit,
    OnConflict,
    PoolPolicy,
    Quota,
    Ramp,
    Rate,
    Reserve,
    Source,
    Tokens,
    Unit,
    Weights,
    as_limit,
    check_tenant,
    next_midnight_ms,
)
from tidegate.limiter.queue import SPARE_MS
from tidegate.limiter.session import Observer, State
from tidegate.limiter.sync import SyncLimiter, SyncPermit, ThreadPermit
from tidegate.limiter.views import (
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

__all__ = [
    "DEFAULT_BANDS",
    "DEFAULT_PRIORITY",
    "MAX_BOUND",
    "MAX_LEASE_MS",
    "MEASURES_OF_SHARES",
    "RESERVES",
    "SOURCES",
    "SPARE_MS",
    "STALLED_S",
    "UNITS",
    "USUAL_WEIGHTS",
    "Acquisition",
    "Adaptive",
    "AdmissionError",
    "Band",
    "CallUse",
    "Change",
    "Concurrency",
    "ConfigError",
    "DeadlineExceeded",
    "Demand",
    "DemandImpossible",
    "DetachedPermit",
    "FairBy",
    "LeaseLost",
    "Limit",
    "LimitPaused",
    "LimitUsedUp",
    "LimitView",
    "Limiter",
    "LimiterUnavailable",
    "LocalState",
    "Observer",
    "OnConflict",
    "Outcome",
    "Permit",
    "PermitView",
    "Place",
    "PolicyConflict",
    "PoolPolicy",
    "QueueFull",
    "QueueView",
    "Quota",
    "Ramp",
    "Rate",
    "Reserve",
    "ServerReport",
    "SessionView",
    "ShuttingDown",
    "Snapshot",
    "Source",
    "State",
    "SyncLimiter",
    "SyncPermit",
    "TenantView",
    "ThreadPermit",
    "TidegateError",
    "Tokens",
    "Unit",
    "UpstreamTimeout",
    "WaitEstimate",
    "WaitingLine",
    "Weights",
    "Why",
    "as_limit",
    "check_tenant",
    "commands",
    "examine",
    "forget_pool",
    "format_amount",
    "format_pause",
    "format_span",
    "format_unit",
    "format_window",
    "limit_paused",
    "limited",
    "look_until",
    "next_midnight_ms",
]
