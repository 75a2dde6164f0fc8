"""Retry policy: whether and when a failed attempt or webhook is tried again. Pure."""

from __future__ import annotations

import random

from tidegate.errors import (
    BudgetExceeded,
    ConfigError,
    LeaseLost,
    LimiterUnavailable,
    QueueFull,
    ShuttingDown,
    StoreUnavailable,
    TidegateError,
    UpstreamError,
)

# Says nothing of the job: somebody, perhaps another worker, can do it later.
NOT_THE_JOBS_FAULT = (
    LimiterUnavailable,
    QueueFull,
    StoreUnavailable,
    LeaseLost,
    ShuttingDown,
    ConfigError,
)
_FIRST_WAIT_MS = 500
_LONGEST_WAIT_MS = 60_000
_SPENT_WAIT_MS = 60_000
_LONGEST_SERVER_WAIT_MS = 86_400_000


# After each try to deliver a webhook but the last.
_WEBHOOK_WAITS_MS = (5_000, 30_000, 120_000, 600_000, 3_600_000, 21_600_000)
_WEBHOOK_JITTER = 0.2


def webhook_wait_ms(tries: int, rng: random.Random | None = None) -> int | None:
    """Milliseconds until a webhook is tried again, or None when it is given up.

    `tries` counts those made. Jitter spreads those that a receiver's outage has gathered.
    """
    if tries > len(_WEBHOOK_WAITS_MS):
        return None
    spread = (rng or random).uniform(1 - _WEBHOOK_JITTER, 1 + _WEBHOOK_JITTER)
    return round(_WEBHOOK_WAITS_MS[tries - 1] * spread)


def is_of_upstream(error: TidegateError | None) -> bool:
    """Whether a fault is the upstream's: it uses up no attempt, and `Outages` says when to ask
    again."""
    return isinstance(error, UpstreamError) and error.of_upstream


def spent_wait_ms(error: TidegateError | None, rng: random.Random | None = None) -> int | None:
    """Milliseconds until a job whose tenant has spent its budget is looked at again: when the next
    period begins, and every minute or so before, since a budget can be raised. None for others."""
    if not isinstance(error, BudgetExceeded):
        return None
    look = (rng or random).uniform(_SPENT_WAIT_MS / 2, _SPENT_WAIT_MS)
    return max(1, round(min(look, error.retry_after_ms or look)))


def retry_wait_ms(
    error: TidegateError, attempts: int, max_attempts: int, rng: random.Random | None = None
) -> int | None:
    """Milliseconds until the next attempt, or None when there is to be none.

    `attempts` counts those made, this one included. Exponential backoff with full jitter (Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015); what the server directs is the
    least, and its jitter is only added, since coming earlier would be refused again.
    """
    if not error.retryable or attempts >= max_attempts:
        return None
    ceiling = min(_LONGEST_WAIT_MS, _FIRST_WAIT_MS * 2 ** (attempts - 1))
    jitter = (rng or random).uniform(0, ceiling)
    directed = min(error.retry_after_ms or 0, _LONGEST_SERVER_WAIT_MS)
    return round(directed + (jitter if not directed else jitter / 4))
