"""Why a request waits: which limit holds it up, who has that limit, and who paused it.

Invariant: the answer is one sentence and the facts behind it; nothing is changed by asking.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from tidegate.errors import InvalidRequest, NotFound
from tidegate.limiter import LimitView, Place, Snapshot
from tidegate.policy.binding import adapted_from, admitted_per_s, alike, binding_limit
from tidegate.policy.control import Control, ShownPermit, shown_permits
from tidegate.policy.words import pause_in_words, span_in_words
from tidegate.store.running import Whereabouts
from tidegate.store.states import Status


@dataclass(frozen=True, slots=True)
class Reason:
    """What a request or ticket waits for.

    sentence: the answer in words. status: of a request. process: that has it. held_up_by: the
    limit that it waits for. ahead: tickets of its tenant before it, or requests before a job that
    no worker has taken yet; wait_ms: an estimate; both None where they are not known. limit,
    holders: that limit, and who has permits of it. adapted_from: the bound of that limit, where it
    has adapted itself to less. rate_per_s: how many calls a second it admits, where that is known.
    """

    what: str
    sentence: str
    status: str | None = None
    process: str | None = None
    held_up_by: str | None = None
    ahead: int | None = None
    wait_ms: int | None = None
    limit: LimitView | None = None
    holders: tuple[ShownPermit, ...] = ()
    adapted_from: int | None = None
    rate_per_s: float | None = None


async def why(control: Control, what: str) -> Reason:
    """Of a request by its id, or of a ticket as `process/ticket`.

    Raises NotFound, InvalidRequest for what is neither, LimiterUnavailable, StoreUnavailable.
    """
    try:
        request_id = UUID(what)
    except ValueError:
        return await _why_ticket(control, what)
    found = await control.running.whereabouts(request_id)
    if found.status is Status.RUNNING:
        return await _why_running(control, found)
    if found.status is not Status.QUEUED:
        return Reason(what, _how_it_ended(found), found.status.value)
    return await _why_queued(control, found)


async def _why_ticket(control: Control, what: str) -> Reason:
    process, slash, number = what.rpartition("/")
    if not slash or not number.isdecimal():
        allowed = "the id of a request, or process/ticket"
        raise InvalidRequest("what", f"{what} is neither a request nor a ticket", allowed=allowed)
    found = await control.limiter.why(process, int(number))
    if found is None:
        raise NotFound(f"no ticket {number} of {process} waits")
    place = found.place
    holders = shown_permits(found.holders, await control.calls())
    return Reason(
        what,
        _sentence_of_place(place, found.limit),
        process=process,
        held_up_by=place.held_up_by,
        ahead=place.ahead,
        wait_ms=place.wait_ms,
        limit=found.limit,
        holders=tuple(holders),
    )


async def _why_running(control: Control, found: Whereabouts) -> Reason:
    permits = [one for one in await control.permits() if one.request_id == found.request_id]
    sentence = f"has run for {_ago(found.admitted_at)} in {found.claimed_by}"
    if not permits:
        sentence += ", though its permit is not in the pool: it is being recorded, or was lost"
    return Reason(
        str(found.request_id),
        sentence,
        found.status.value,
        found.claimed_by,
        holders=tuple(permits),
    )


async def _why_queued(control: Control, found: Whereabouts) -> Reason:
    """A job that waits: for its time, for a worker, or in a worker for a limit."""
    what, status = str(found.request_id), found.status.value
    if found.not_before is not None and (left := _left_ms(found.not_before)) > 0:
        sentence = f"waits {span_in_words(left)} more before it is tried again"
        if found.failure_code:
            sentence += f", after {found.failure_code}"
        return Reason(what, sentence, status)
    if found.claimed_by is None:
        return await _unclaimed(control, found)
    snapshot = await control.limiter.snapshot(permits=True)
    queues = [
        queue
        for queue in alike(found, snapshot)
        if queue.process == found.claimed_by and queue.tenant == found.tenant_id
    ]
    if not queues:
        return Reason(what, f"is being prepared by {found.claimed_by}", status, found.claimed_by)
    # One process may have waiting of it in several bands: the fullest speaks for all.
    queue = max(queues, key=lambda one: one.waiting)
    view = snapshot.limits.get(queue.held_up_by or "")
    place = Place(queue.tenant, queue.band, queue.limits, queue.held_up_by, queue.waiting - 1, None)
    return Reason(
        what,
        _sentence_of_queue(place, view, found.claimed_by),
        status,
        found.claimed_by,
        queue.held_up_by,
        limit=view,
        holders=tuple(await _holders(control, snapshot, queue.held_up_by)),
        adapted_from=None if view is None else adapted_from(view),
        rate_per_s=None if view is None else _rate(control, view),
    )


async def _unclaimed(control: Control, found: Whereabouts) -> Reason:
    """No worker has it: those that were claimed before it fill the workers' windows."""
    snapshot = await control.limiter.snapshot(permits=True)
    view = binding_limit(found, snapshot)
    what, status = str(found.request_id), found.status.value
    place = await control.running.place(found.request_id)
    ahead = None if place is None else place - 1
    if view is None:
        sentence = f"has waited {_ago(found.created_at)} for a worker to take it"
        if found.kind is None:
            sentence = "waits for a worker that asks the classifier what it is"
        view = snapshot.limits.get(f"kind:{found.kind}")
        return Reason(what, sentence, status, ahead=ahead, limit=view)
    rate = _rate(control, view)
    wait_ms = None
    if ahead is not None and rate:
        wait_ms = round(max(view.room_in_ms, (ahead + 1) * 1000 / rate))
    sentence = f"has waited {_ago(found.created_at)}: {_state(view)}"
    if ahead is not None:
        sentence += f"; {ahead} {'request is' if ahead == 1 else 'requests are'} ahead"
    if rate is not None and wait_ms is not None:
        sentence += f", at {rate:.2g}/s about {span_in_words(wait_ms)}"
    return Reason(
        what,
        sentence,
        status,
        held_up_by=view.limit,
        ahead=ahead,
        wait_ms=wait_ms,
        limit=view,
        holders=tuple(await _holders(control, snapshot, view.limit)),
        adapted_from=adapted_from(view),
        rate_per_s=rate,
    )


def _rate(control: Control, view: LimitView) -> float | None:
    return admitted_per_s(view, control.limiter.policy.limit(view.limit))


async def _holders(control: Control, snapshot: Snapshot, limit: str | None) -> list[ShownPermit]:
    held = tuple(permit for permit in snapshot.permits if limit in permit.limits)
    return shown_permits(held, await control.calls())


def _sentence_of_place(place: Place, view: LimitView | None) -> str:
    sentence = _sentence(place.held_up_by, view)
    sentence += f", {place.ahead} before it"
    if place.wait_ms is not None:
        sentence += f", about {span_in_words(place.wait_ms)}"
    return sentence


def _sentence_of_queue(place: Place, view: LimitView | None, process: str) -> str:
    others = f"up to {place.ahead} before it there" if place.ahead else "next in line there"
    return f"{_sentence(place.held_up_by, view)}, in {process}, {others}"


def _sentence(held_up_by: str | None, view: LimitView | None) -> str:
    if held_up_by is None:
        return "its process takes no grants: it is paused or can't be reached"
    if view is None:
        return f"waits for {held_up_by}"
    of_it = f"{held_up_by}: " if view.paused_ms else ""
    return f"waits for {of_it}{_state(view)}"


def _state(view: LimitView) -> str:
    """A limit, and how much of it is used or who paused it."""
    if view.paused_ms:
        return _paused(view)
    if view.sort == "c":
        before = adapted_from(view)
        adapted = "" if before is None else f" (adapted down from {before})"
        return f"{view.limit}: {view.used} of {view.current} are in use{adapted}"
    room = f", room in {span_in_words(view.room_in_ms)}" if view.room_in_ms else ""
    return f"{view.limit}: {view.used} of {view.bound} are spent{room}"


def _paused(view: LimitView) -> str:
    by = f" by {view.paused_by}" if view.paused_by else ""
    return f"{view.limit} is paused{by}, {pause_in_words(view.paused_ms)}"


def _how_it_ended(found: Whereabouts) -> str:
    code = f" ({found.failure_code})" if found.failure_code else ""
    return f"waits for nothing: {found.status.value}{code}, {_ago(found.finished_at)} ago"


def _ago(at: datetime | None) -> str:
    return "an unknown time" if at is None else span_in_words(max(0.0, -_left_ms(at)))


def _left_ms(at: datetime) -> float:
    return (at - datetime.now(UTC)).total_seconds() * 1000
