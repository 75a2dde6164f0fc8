"""Every metric with its labels, in the one place that spells them. Pure.

Invariant: no label holds a request's id or a client's own words: tenants and models are bounded by
`tally.Known`, all else is a name of ours or of the deployment. Base units: seconds, bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SHARED = "PROMETHEUS_MULTIPROC_DIR"  # as prometheus-client reads it
NAMED = "TIDEGATE_CHILD"  # the name of a process among those of its supervisor

Sort = Literal["counter", "gauge", "histogram"]
# How the values of several processes on one machine come to one: where `sum`, `max` or
# `mostrecent` is said, of the living ones alone.
Merge = Literal["", "livesum", "livemax", "livemostrecent"]

_WAITS_S = (
    0.001,
    0.005,
    0.02,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
    1800.0,
)
_QUICK_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
# As the conventions name them.
CALL_BUCKETS_S = tuple(0.01 * 2**step for step in range(14))
TOKEN_BUCKETS = tuple(float(4**step) for step in range(14))
# window: second, minute, hour, day, month; empty where it was not said, mostly a minute.
_ANNOUNCED = ("upstream", "model", "unit", "window")
_GEN_AI = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")


@dataclass(frozen=True, slots=True, eq=False)
class Spec:
    """One metric. labels: in their order. everywhere: it is true of the whole deployment, the same
    from whichever process it is asked; else it is what processes of one machine have seen."""

    name: str
    sort: Sort
    said: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: Merge = ""
    everywhere: bool = False


def _counter(name: str, said: str, *labels: str) -> Spec:
    return Spec(name, "counter", said, labels)


def _histogram(name: str, said: str, buckets: tuple[float, ...], *labels: str) -> Spec:
    return Spec(name, "histogram", said, labels, buckets)


def _own(name: str, said: str, *labels: str, merge: Merge = "livesum") -> Spec:
    return Spec(name, "gauge", said, labels, merge=merge)


def _of_all(name: str, said: str, *labels: str) -> Spec:
    return Spec(name, "gauge", said, labels, everywhere=True)


class Metric:
    """All of them, by what they are called here."""

    CALLS = _counter(
        "tidegate_calls_total",
        "Calls that have ended. status: succeeded, failed, cancelled, expired, dead, refused, or "
        "retried for an attempt that goes back into its queue. source: relay, stream, job, batch, "
        "or judge for a question of the classifier, which is no request",
        *("source", "kind", "pool", "model", "status"),
    )
    FAILURES = _counter(
        "tidegate_failures_total",
        "Calls that did not succeed, by the code of the error",
        *("source", "pool", "code"),
    )
    TENANT_CALLS = _counter(
        "tidegate_tenant_calls_total", "Calls that have ended, by tenant", "tenant", "status"
    )
    TENANT_TOKENS = _counter(
        "tidegate_tenant_tokens_total", "LLM tokens charged, by tenant", "tenant", "type"
    )
    TENANT_COST = _counter(
        "tidegate_tenant_cost_total", "Cost in the currency of the prices, by tenant", "tenant"
    )
    TENANT_QUEUE = _counter(
        "tidegate_tenant_queue_seconds_total",
        "Time that admitted calls have waited for admission, by tenant",
        "tenant",
    )
    TOKENS = _counter(
        "tidegate_tokens_total",
        "LLM tokens charged, and those of the classifier's questions. cached is a part of input, "
        "thoughts comes beside output",
        *("pool", "model", "type"),
    )
    COST = _counter(
        "tidegate_cost_total",
        "Cost in the currency of the prices, the classifier's questions included",
        *("pool", "model"),
    )
    ATTEMPTS = _counter("tidegate_attempts_total", "Calls made upstream", "source", "pool")
    THROTTLED = _counter(
        "tidegate_throttled_total", "Calls upstream that were answered with 429", "source", "pool"
    )
    RETRIES = _counter(
        "tidegate_retries_total", "Calls upstream after the first of a request", "source", "pool"
    )
    QUEUE = _histogram(
        "tidegate_queue_seconds",
        "From receipt to admission, of admitted calls",
        _WAITS_S,
        *("source", "kind", "pool"),
    )
    FIRST_BYTE = _histogram(
        "tidegate_first_byte_seconds",
        "From sending a call to the first bytes of its answer, of calls that succeeded",
        CALL_BUCKETS_S,
        *("source", "pool"),
    )
    GEN_AI_DURATION = _histogram(
        "gen_ai_client_operation_duration_seconds",
        "Length of the last call upstream; gen_ai.client.operation.duration of OpenTelemetry",
        CALL_BUCKETS_S,
        *(*_GEN_AI, "error_type", "pool"),
    )
    GEN_AI_TOKENS = _histogram(
        "gen_ai_client_token_usage",
        "LLM tokens of a call; gen_ai.client.token.usage of OpenTelemetry",
        TOKEN_BUCKETS,
        *(*_GEN_AI, "gen_ai_token_type"),
    )
    GEN_AI_FIRST_CHUNK = _histogram(
        "gen_ai_client_operation_time_to_first_chunk_seconds",
        "To the first chunk of a stream; gen_ai.client.operation.time_to_first_chunk",
        CALL_BUCKETS_S,
        *_GEN_AI,
    )
    HTTP = _counter("tidegate_http_requests_total", "Answered HTTP requests", "route", "status")
    HTTP_SECONDS = _counter(
        "tidegate_http_request_seconds_total",
        "Time from receipt to the end of the answer, summed up",
        "route",
    )
    SYNC = _histogram(
        "tidegate_limiter_sync_seconds",
        "Round trips of the limiter's script to Valkey",
        _QUICK_S,
        "pool",
    )
    ENTRIES = _counter(
        "tidegate_limiter_entries_total",
        "Entries (a release, a wish to wait, a cancellation) that those round trips carried",
        "pool",
    )
    REFUSALS = _counter(
        "tidegate_limiter_refusals_total", "Waiters told no", "pool", "limit", "code"
    )
    FENCED = _counter(
        "tidegate_limiter_fenced_permits_total",
        "Running calls cancelled because this process had lost its session",
        "pool",
    )
    STATE_CHANGES = _counter(
        "tidegate_limiter_state_changes_total", "Changes into a state", "pool", "state"
    )
    STATE = _own(
        "tidegate_limiter_processes", "Processes by the state of their limiter", "pool", "state"
    )
    HELD = _own("tidegate_permits_held", "Permits that processes hold now", "pool", "process")
    WAITERS = _own("tidegate_waiters", "Calls that wait for admission now", "pool", "process")
    UPSTREAM_OUT = _own(
        "tidegate_upstream_out", "Processes that leave an upstream out after faults", "upstream"
    )
    KEY_REFUSED = _own(
        "tidegate_upstream_key_refused",
        "Processes whose key an upstream has refused",
        "upstream",
    )
    ANNOUNCED_BOUND = _own(
        "tidegate_upstream_announced_limit",
        "What an upstream's last answer said that its own rate limit is",
        *_ANNOUNCED,
        merge="livemostrecent",
    )
    ANNOUNCED_LEFT = _own(
        "tidegate_upstream_announced_remaining",
        "What it said remains of it, at that time",
        *_ANNOUNCED,
        merge="livemostrecent",
    )
    ANNOUNCED_RESET = _own(
        "tidegate_upstream_announced_reset_timestamp_seconds",
        "When it said that the limit begins again, since 1970",
        *_ANNOUNCED,
        merge="livemostrecent",
    )
    POSTGRES_AWAY = _own("tidegate_postgres_away", "Processes for which PostgreSQL is away")
    SPILL = _own(
        "tidegate_spill_bytes", "On the disk because PostgreSQL could not take it", merge="livemax"
    )
    UNWRITTEN = _own(
        "tidegate_record_waiting", "Records of native calls that are not written yet", "process"
    )
    DROPPED = _counter(
        "tidegate_record_dropped_total", "Records left out because the buffer was full"
    )
    LOOP_LAG = _histogram(
        "tidegate_event_loop_lag_seconds",
        "How late a timer of the event loop comes; it is looked at four times a second",
        _QUICK_S,
        "process",
    )
    MEMORY = _own("tidegate_process_resident_memory_bytes", "Memory in use", "process")
    CPU = _counter("tidegate_process_cpu_seconds_total", "Processor time used", "process")
    STARTED = _own(
        "tidegate_process_start_time_seconds", "When a process started, since 1970", "process"
    )

    BUILD = _of_all("tidegate_build_info", "1, with the version", "version")
    VALKEY_UP = _of_all("tidegate_valkey_up", "1 if Valkey has answered for the pool", "pool")
    POSTGRES_UP = _of_all("tidegate_postgres_up", "1 if PostgreSQL has answered")
    BOUND = _of_all("tidegate_limit_bound", "The bound in force", "pool", "limit")
    CURRENT = _of_all(
        "tidegate_limit_current",
        "The bound that an adaptive limit has found; of others the bound",
        *("pool", "limit"),
    )
    USED = _of_all(
        "tidegate_limit_used",
        "Permits in use, or what of a rate is reserved and spent in its window",
        *("pool", "limit"),
    )
    WAITING = _of_all("tidegate_limit_waiting", "Calls that a limit holds up", "pool", "limit")
    LAPSING = _of_all(
        "tidegate_limit_lapsing", "Of those in use: of processes that are gone", "pool", "limit"
    )
    PAUSED = _of_all(
        "tidegate_limit_paused_seconds",
        "For how long nobody is let in; 0: not paused",
        *("pool", "limit"),
    )
    SESSIONS = _of_all("tidegate_sessions", "Processes in the pool", "pool")
    BLOCKED = _of_all("tidegate_sessions_blocked", "Of those: paused or out of reach", "pool")
    RECOVERING = _of_all(
        "tidegate_pool_recovering_seconds",
        "Quiet time that is left after Valkey lost its data; nobody is let in",
        "pool",
    )
    EPOCH = _of_all("tidegate_pool_epoch", "Grows when Valkey has lost its data", "pool")
    REVISION = _of_all("tidegate_policy_revision", "The policy in force", "pool")
    TENANT_WAITING = _of_all(
        "tidegate_tenant_waiting", "Calls that wait for admission, by tenant", "pool", "tenant"
    )
    QUEUED = _of_all(
        "tidegate_queue_jobs",
        "Jobs ready to be taken up, at most 10,000 of a queue. lane: their kind, or unsure",
        *("pool", "lane", "tenant"),
    )
    OLDEST = _of_all("tidegate_queue_oldest_seconds", "Age of the oldest of them", "pool", "lane")
    RETRYING = _of_all("tidegate_jobs_retrying", "Jobs that wait for their next try, up to 10,000")
    CLAIMED = _of_all(
        "tidegate_jobs_claimed", "Jobs that wait for admission in workers, up to 10,000"
    )
    RUNNING = _of_all("tidegate_jobs_running", "Jobs that workers run, up to 10,000")
    DEAD = _of_all("tidegate_jobs_dead", "Dead jobs that nobody has looked after, up to 10,000")
    WEBHOOKS = _of_all(
        "tidegate_webhooks_pending", "Webhooks that are to be delivered, up to 10,000"
    )
    WEBHOOKS_OLDEST = _of_all(
        "tidegate_webhooks_oldest_seconds", "For how long the oldest of them has been due"
    )
    WORKERS = _of_all("tidegate_workers", "Workers heard of within a minute")
    LEFT_OUT = _of_all(
        "tidegate_metrics_left_out",
        "Limits, tenants or queues beyond those that are shown",
        "what",
    )


ALL: tuple[Spec, ...] = tuple(one for one in vars(Metric).values() if isinstance(one, Spec))
