"""Work conservation: whether somebody waits while all that his call needs is free.

Judged apart from the model's own rules of turns, from what is used and what is spent. Changes
nothing in the model, whose state is compared with the server's.
"""

from __future__ import annotations

from copy import deepcopy

from tidegate.limiter import Concurrency, Rate
from tidegate.limiter.simulation import LimitState, PoolModel, SessionQueue, read_member, span_of


def free_but_waiting(model: PoolModel) -> list[str]:
    """Queues of processes that live and are known to all, whose first ticket could go: nothing it
    needs is full, paused, paced, kept for somebody who starves, or a rate in whose line others
    stand before it."""
    if model.pool.quiet() or model.queues.starving():
        return []
    queues = [
        queue
        for sid, session in model.pool.sessions.items()
        if sid in model.pool.subscribed and sid not in model.pump.fresh
        for queue in session.queues.values()
    ]
    return [queue.id for queue in queues if all(_free(model, queue, i) for i in _positions(queue))]


def _positions(queue: SessionQueue) -> range:
    return range(len(queue.flow.lane))


def _free(model: PoolModel, queue: SessionQueue, position: int) -> bool:
    limit = model.pool.limit(queue.flow.lane[position])
    amount = read_member(queue.first()[0]).amount(position)
    if limit.is_rate and amount == 0:
        return True
    if model.pool.pause_of(limit) is not None:
        return False
    if limit.limit.shadow:
        return True
    if isinstance(limit.limit, Concurrency):
        cap = model.capacity.cap(limit, queue.flow.band)
        if not limit.by_tokens:
            return limit.used < cap
        if amount > limit.limit.bound or _too_great_before(model, limit, queue):
            return False
        return limit.used + max(1, min(amount, cap)) <= cap
    if _others_before(limit, queue) or _kept_for_higher(model, limit, queue):
        return False
    spending = deepcopy(limit.spending)  # which forgets what counts no more, when it is looked at
    spent = spending.look(limit.limit, model.pool.now, model.pool.resets.get(limit.name, 0))
    taken = spending.taken(limit.limit, model.pool.now)  # a ramp is by this, refilled or not
    if spending.paced_at(limit.limit, limit.clamped(amount), taken, model.pool.now):
        return False
    bound = limit.limit.bound
    return bound > 0 and spent + min(amount, bound) <= bound


def _kept_for_higher(model: PoolModel, limit: LimitState, queue: SessionQueue) -> bool:
    """Beyond its share a band leaves to higher ones what they may need of a rate."""
    if not isinstance(limit.limit, Rate):
        return False
    since = model.pool.now - span_of(limit.limit)
    higher = [band for number, band in limit.bands.items() if number < queue.flow.band]
    return any(max(band.held_at, band.used_at) > since for band in higher)


def _too_great_before(model: PoolModel, limit: LimitState, queue: SessionQueue) -> bool:
    """The head of the line at a limit on tokens in flight needs more than is free for its band:
    smaller calls behind it wait for it, or it would never fit."""
    return any(
        limit.used + read_member(other.first()[0]).amount(other.flow.lane.index(limit.name))
        > model.capacity.cap(limit, other.flow.band)
        for other in _in_line(limit)
        if other is not queue
    )


def _others_before(limit: LimitState, queue: SessionQueue) -> bool:
    """A great demand at the head of a rate's line is waited for, or it would never fit."""
    return any(other is not queue for other in _in_line(limit))


def _in_line(limit: LimitState) -> list[SessionQueue]:
    return [
        queue
        for band in limit.bands.values()
        for line in band.lines.values()
        for queue in line.values()
    ]
