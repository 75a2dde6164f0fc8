"""A moment of all pools as the page gets it.

Invariant: a frame is bounded, whatever the policy and the crowd: of the limits, tenants and
processes the most pressed ones are in it, and how many others there are.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tidegate.errors import LimiterUnavailable
from tidegate.http.services import Services
from tidegate.limiter import Limiter, LimitView, PoolPolicy, QueueView, SessionView, Snapshot
from tidegate.limiter.limits import Concurrency, Quota, Rate
from tidegate.metrics.board import Note, UpstreamFound
from tidegate.policy.words import in_words

MOST_LIMITS = 100
MOST_TENANTS = 50
MOST_PROCESSES = 100
MOST_FOUND = 10
_SORTS = {"c": "concurrency", "r": "rate", "q": "quota"}

Frame = dict[str, Any]


async def live_frame(services: Services) -> Frame:
    """All pools as Valkey sees them now, and the upstreams as the processes do."""
    notes, pools = await asyncio.gather(
        services.board.notes(),
        asyncio.gather(*(_pool(name, limiter) for name, limiter in services.limiters.items())),
    )
    return {
        "at": time.time(),
        "pools": pools,
        "postgresql_away": services.store.away,
        "upstreams": [upstream_frame(name, notes.notes) for name in services.relay.health],
    }


def upstream_frame(upstream: str, notes: Iterable[Note]) -> Frame:
    """As the process finds it that finds it worst; `found` has those that do not find it well."""
    told = [
        (note.process, note.upstreams[upstream]) for note in notes if upstream in note.upstreams
    ]
    told.sort(key=lambda one: _badness(one[1]), reverse=True)
    bad = [(process, one) for process, one in told if one.state != "ok" or one.key_refused]
    return {
        "upstream": upstream,
        "state": told[0][1].state,
        "key_refused": any(one.key_refused for _, one in told),
        "detail": told[0][1].why,
        "processes": len(told),
        "out_in": len(bad),
        "found": [
            {"process": process, "state": one.state, "detail": one.why}
            for process, one in bad[:MOST_FOUND]
        ],
    }


def _badness(found: UpstreamFound) -> tuple[bool, int, int]:
    return found.key_refused, ("ok", "trying", "out").index(found.state), found.faults


async def _pool(name: str, limiter: Limiter) -> Frame:
    try:
        return pool_frame(name, await limiter.snapshot(), limiter.policy)
    except LimiterUnavailable as away:
        return {"pool": name, "problem": away.message}


def pool_frame(pool: str, snapshot: Snapshot, policy: PoolPolicy) -> Frame:
    """One pool: see `docs/dashboard.md` for what the page makes of it."""
    limits = sorted(snapshot.limits.values(), key=_pressure, reverse=True)
    processes = sorted(snapshot.processes, key=lambda one: (-one.held, one.name))
    tenants = _tenants(snapshot)
    shown = sorted(limits[:MOST_LIMITS], key=lambda one: one.limit)
    waiting_at = _by_process(snapshot.queues)
    return {
        "pool": pool,
        "revision": snapshot.revision,
        "recovering_ms": snapshot.recovering_ms,
        "in_flight": sum(one.held for one in snapshot.processes),
        "waiting": sum(one.waiting for one in snapshot.tenants),
        "limits": [_limit(one, policy) for one in shown],
        "more_limits": len(limits) - len(shown),
        "tenants": tenants[:MOST_TENANTS],
        "more_tenants": len(tenants[MOST_TENANTS:]),
        "processes": [_process(one, waiting_at) for one in processes[:MOST_PROCESSES]],
        "more_processes": len(processes[MOST_PROCESSES:]),
    }


def _pressure(view: LimitView) -> tuple[bool, int, float]:
    return view.paused_ms > 0, view.waiting, view.used / max(1, view.current)


def _limit(view: LimitView, policy: PoolPolicy) -> Frame:
    limit = policy.limit(view.limit)
    found: Frame = {
        "limit": view.limit,
        "sort": _SORTS.get(view.sort, view.sort),
        "words": str(view.bound) if limit is None else in_words(limit),
        "bound": view.bound,
        "current": view.current,
        "used": view.used,
        "waiting": view.waiting,
        "lapsing": view.lapsing,
        "reserved": view.reserved,
        "shadowed": view.shadowed,
        "paused_ms": view.paused_ms,
        "paused_by": view.paused_by,
        "room_in_ms": view.room_in_ms,
        "shadow": limit is not None and limit.shadow,
    }
    if isinstance(limit, Concurrency):
        found["adaptive"] = limit.adaptive is not None
    if isinstance(limit, Rate):
        found |= {"unit": limit.unit, "window_ms": limit.window_ms}
    if isinstance(limit, Quota):
        found |= {"unit": limit.unit, "zone": limit.zone}
    return found


def _tenants(snapshot: Snapshot) -> list[Frame]:
    """Those that wait, the longest queue first, with what holds them up."""
    held_up: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for queue in snapshot.queues:
        held_up[queue.tenant][queue.held_up_by or ""] += queue.waiting
    found = [
        {
            "tenant": one.tenant,
            "waiting": one.waiting,
            "weight": one.weight,
            "held_up_by": _largest(held_up[one.tenant]),
        }
        for one in snapshot.tenants
    ]
    return sorted(found, key=lambda one: (-one["waiting"], one["tenant"]))


def _largest(counted: Mapping[str, int]) -> str:
    """The limit that holds most of it up; empty where none does."""
    return max(counted, key=lambda limit: counted[limit], default="")


def _by_process(queues: Iterable[QueueView]) -> Mapping[str, int]:
    waiting: defaultdict[str, int] = defaultdict(int)
    for queue in queues:
        waiting[queue.sid] += queue.waiting
    return waiting


def _process(view: SessionView, waiting_at: Mapping[str, int]) -> Frame:
    return {
        "process": view.name,
        "session": view.sid,
        "left_ms": view.left_ms,
        "held": view.held,
        "waiting": waiting_at.get(view.sid, 0),
        "blocked": view.blocked,
    }
