"""Whether and when a failed attempt is tried again. Pure."""

from __future__ import annotations

import random

from tidegate.errors import TidegateError

_FIRST_WAIT_MS = 500
_LONGEST_WAIT_MS = 60_000
_LONGEST_SERVER_WAIT_MS = 86_400_000


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
