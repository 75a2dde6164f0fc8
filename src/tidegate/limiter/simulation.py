"""Engine of the limiter without its I/O: for rehearsals, benchmarks and tests.

Holds the executable model of a pool, the session and the queue of a process, and the messages
between them. Invariant: the product itself never imports this; what it exports may change with
any version, unlike the names of `tidegate.limiter`.
"""

from tidegate.limiter.connection import (
    LINGER_HURRIED_S,
    LINGER_IDLE_S,
    LINGER_S,
    pack_request,
    unpack_reply,
)
from tidegate.limiter.flow import Flow, Holding, MessageBatch, Waiter, flow_of
from tidegate.limiter.limiter import MAX_WAITERS
from tidegate.limiter.messages import (
    Barred,
    Join,
    Keyspace,
    Push,
    Renewal,
    RenewReply,
    ScriptName,
    SyncReply,
    SyncRequest,
    fragment,
    load,
    pack,
)
from tidegate.limiter.model.pool import PoolModel
from tidegate.limiter.model.queues import BEHIND
from tidegate.limiter.model.rates import DAY_MS, Pacing, span_of
from tidegate.limiter.model.state import (
    DUE_APART_MS,
    BandState,
    DueOrder,
    LimitState,
    Paces,
    PauseGate,
    SessionQueue,
    SessionState,
    read_actual,
    read_flow,
    read_member,
    write_charges,
)
from tidegate.limiter.permit import PermitIssuer
from tidegate.limiter.policy import LEAST_USE, amount_of
from tidegate.limiter.queue import LocalQueue
from tidegate.limiter.session import Clock, Lease, Session
from tidegate.limiter.views import read_place

__all__ = [
    "BEHIND",
    "DAY_MS",
    "DUE_APART_MS",
    "LEAST_USE",
    "LINGER_HURRIED_S",
    "LINGER_IDLE_S",
    "LINGER_S",
    "MAX_WAITERS",
    "BandState",
    "Barred",
    "Clock",
    "DueOrder",
    "Flow",
    "Holding",
    "Join",
    "Keyspace",
    "Lease",
    "LimitState",
    "LocalQueue",
    "MessageBatch",
    "Paces",
    "Pacing",
    "PauseGate",
    "PermitIssuer",
    "PoolModel",
    "Push",
    "RenewReply",
    "Renewal",
    "ScriptName",
    "Session",
    "SessionQueue",
    "SessionState",
    "SyncReply",
    "SyncRequest",
    "Waiter",
    "amount_of",
    "flow_of",
    "fragment",
    "load",
    "pack",
    "pack_request",
    "read_actual",
    "read_flow",
    "read_member",
    "read_place",
    "span_of",
    "unpack_reply",
    "write_charges",
]
