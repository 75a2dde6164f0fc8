"""What a queued request waits for, as its owner may know it: without processes, other tenants'
calls, or who paused a limit. Pure.

An operator learns more from `why`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from tidegate.limiter import LimitView, Snapshot
from tidegate.policy.binding import binding_limit
from tidegate.policy.words import pause_in_words, span_in_words
from tidegate.store.running import Whereabouts
from tidegate.store.states import Status


@dataclass(frozen=True, slots=True)
class Waiting:
    """`sentence` says it in words; `limit` is the id of the limit that is waited for, if it is one,
    of whose `bound` so much is `used`. `retry_in_ms`: until it is tried again, after a failure."""

    sentence: str
    limit: str | None = None
    used: int | None = None
    bound: int | None = None
    paused_ms: int | None = None
    retry_in_ms: int | None = None


def waiting(found: Whereabouts, snapshot: Snapshot | None, now: datetime) -> Waiting:
    """`snapshot` is of the request's pool; None while Valkey is away."""
    if found.status is Status.RUNNING:
        return Waiting("is running")
    if found.status is not Status.QUEUED:
        return Waiting(f"has ended: {found.status.value}")
    if found.not_before is not None and found.not_before > now:
        left_ms = round((found.not_before - now).total_seconds() * 1000)
        said = f"is tried again in {span_in_words(left_ms)}"
        return Waiting(
            f"{said}, after {found.failure_code}" if found.failure_code else said,
            retry_in_ms=left_ms,
        )
    if snapshot is None:
        return Waiting("waits until Valkey is back")
    if snapshot.recovering_ms:
        left = span_in_words(snapshot.recovering_ms)
        return Waiting(f"waits {left} more, because Valkey lost its data")
    limit = binding_limit(found, snapshot)
    if limit is not None:
        return _for(limit)
    if found.claimed_by is None:
        return Waiting("waits for a worker to take it")
    return Waiting("is being prepared")


def _for(view: LimitView) -> Waiting:
    if view.paused_ms:
        said = f"waits for {view.limit}, which is paused {pause_in_words(view.paused_ms)}"
    elif view.sort == "c":
        said = f"waits for {view.limit}: {view.used} of {view.current} are in use"
    else:
        room = f", room in {span_in_words(view.room_in_ms)}" if view.room_in_ms else ""
        said = f"waits for {view.limit}: {view.used} of {view.bound} are spent{room}"
    bound = view.current if view.sort == "c" else view.bound
    return Waiting(said, view.limit, view.used, bound, view.paused_ms or None)
