"""What a process is at: what it holds, who waits in it, what went wrong lately.

Invariant: it is read from this process's memory, so that it can be had while both stores are away;
it holds no prompt, answer or key, and is bounded whatever the process is doing.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tidegate import __version__
from tidegate.metrics.process import Watch, resident_bytes
from tidegate.observed import Observed
from tidegate.telemetry import recent_problems

MOST_PERMITS = 200
MOST_QUEUES = 100
MOST_FAILURES = 50
MOST_TASKS = 30


class State:
    """One per process. A listener of `Observers` too, for the calls that failed last."""

    def __init__(self, instance_id: str, watch: Watch) -> None:
        self._instance_id = instance_id
        self._watch = watch
        self._began = time.monotonic()
        self._failures: deque[dict[str, Any]] = deque(maxlen=MOST_FAILURES)

    def take(self, batch: Sequence[Observed]) -> None:
        """Remember those that failed."""
        for one in batch:
            if one.status == "succeeded":
                continue
            told = {
                "at": one.finished_at.isoformat(),
                "request_id": None if one.request_id is None else str(one.request_id),
                **{name: getattr(one, name) for name in ("source", "status", "code", "pool")},
                "tenant": one.tenant_id,
                "model": one.model,
                "upstream": one.upstream,
                "attempts": one.attempts,
            }
            self._failures.append({name: value for name, value in told.items() if value})

    def shown(self) -> dict[str, Any]:
        """All of it, as plain values."""
        watch, store = self._watch, self._watch.store
        return {
            "instance_id": self._instance_id,
            "version": __version__,
            "pid": os.getpid(),
            "up_s": round(time.monotonic() - self._began, 1),
            "memory_bytes": resident_bytes(),
            "cpu_s": round(time.process_time(), 2),
            "loop_lag_ms": round(watch.lag_s * 1000, 2),
            "threads": threading.active_count(),
            "pools": {name: self._pool(name) for name in watch.limiters},
            "upstreams": {
                name: {
                    "state": one.state,
                    "key_refused": one.key_dead,
                    "why": one.why,
                    "announced": [said.shown() for said in one.announced.all()],
                }
                for name, one in watch.health.items()
            },
            "record": {
                "postgresql": "away" if store.away else "up",
                "waiting": store.relayed.waiting,
                "spilled_bytes": store.spill.used_bytes,
                "dropped": store.relayed.dropped,
            },
            "tasks": _tasks(),
            "failed_calls": list(self._failures),
            "problems": recent_problems(),
        }

    def _pool(self, name: str) -> dict[str, Any]:
        limiter = self._watch.limiters[name]
        state = limiter.local_state()
        return {
            "valkey": state.state,
            "last_error": limiter.last_error if state.state == "away" else None,
            "session": limiter.session,
            "silent_ms": None if math.isinf(state.silent_ms) else round(state.silent_ms),
            "sessions": state.sessions,
            "revision": state.revision,
            "held": state.permits,
            "waiting": state.waiters,
            "permits": [asdict(one) for one in limiter.local_permits(MOST_PERMITS)],
            "queues": [asdict(one) for one in limiter.local_queues(MOST_QUEUES)],
        }


def _tasks() -> dict[str, int]:
    """How many tasks of the event loop run which coroutine, the most frequent ones."""
    names: Counter[str] = Counter()
    for task in asyncio.all_tasks():
        names[getattr(task.get_coro(), "__qualname__", "?")] += 1
    return dict(names.most_common(MOST_TASKS))
