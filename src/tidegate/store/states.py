"""States of a request.

                     ┌────────── retry, released, worker died ────────────┐
                     ▼                                                    │
    submit ──────► queued ────────────── admitted ───────────────────► running
                     │                                                    │
                     ├─► expired    its deadline came first               ├─► succeeded
                     ├─► cancelled  by its owner                          ├─► failed
                     │                                                    │
                     └─► dead  ◄─── its workers died 3 times ─────────────┴─► cancelled

A stream is recorded once, when it ends, in one of the right-hand states.
Invariant: an end state never changes, save that a person may requeue a dead job, or discard it:
it is cancelled then.
"""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    DEAD = "dead"

    @property
    def is_end(self) -> bool:
        return self not in (Status.QUEUED, Status.RUNNING)


MAX_LAPSES = 3  # workers that may die under a job before it counts as the killer
