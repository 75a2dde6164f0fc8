"""Timers of a modelled pool, judged by the test of admission alone.

What fits in the moment before a limit's timer would have fitted without it: nothing takes room away
while nothing happens. Changes nothing in the model, whose state is compared with the server's.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from tidegate.limiter import Concurrency
from tidegate.limiter.simulation import DAY_MS, LimitState, PoolModel, read_member

# Waiters keep their turn for this long until their process has acknowledged its grants.
ACK_WITHIN_MS = 100


def late_timers(model: PoolModel) -> list[str]:
    """Return the limits with waiters of which the next has room now, or before the timer."""
    pool = model.pool
    if pool.quiet() or model.pump.more or model.queues.starving():
        return []
    return [
        f"{limit.name}: at {at} it has room, its timer is {model.pump.timed.get(limit.name)}"
        for limit in list(pool.limits.values())
        if limit.waits
        for at in _moments(model, limit)
        if has_room_at(model, limit, at)
    ]


def has_room_at(model: PoolModel, limit: LimitState, at: int) -> bool:
    """Return whether the next waiter of a limit has room there, if nothing happens until then."""
    pool = model.pool
    now, resets, touched = pool.now, pool.resets, set(pool.touched)
    copy = replace(limit, spending=deepcopy(limit.spending))
    pool.limits[limit.name], pool.now, pool.resets = copy, at, {}
    try:
        number, bands = model.pump._turn(copy)
        if number == 0:
            return False
        band = copy.band(number)
        _, queue = band.line_front(band.front()[1])
        amount = read_member(queue.first()[0]).amount(queue.flow.lane.index(limit.name))
        if isinstance(copy.limit, Concurrency) and number != bands[0]:
            copy.passing = number, bands[0]
        return model.capacity.has_room(copy, number, amount)
    finally:
        pool.limits[limit.name], pool.now, pool.resets = limit, now, resets
        pool.touched = touched


def _moments(model: PoolModel, limit: LimitState) -> list[int]:
    """Return when the next waiter must not have room: now, and right before the timer."""
    now, timer = model.pool.now, model.pump.timed.get(limit.name)
    if timer is None:
        return [now, now + 3 * DAY_MS]
    return [now, timer - 1] if timer > now + ACK_WITHIN_MS else []
