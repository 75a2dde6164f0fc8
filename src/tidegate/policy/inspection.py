"""Inspection of a running pool: overview, changes by people, and why a request waits.

The owner of a request sees what it waits for, but not processes, other tenants' calls or who paused
a limit; an operator sees these too. A job that no worker has taken yet waits for the limit that
blocks jobs of the same tenant, type and model.

Invariants: an overview is complete even while PostgreSQL is unavailable, and says so; reading
changes nothing; every action logs who did it and why.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from shlex import quote
from typing import Any
from uuid import UUID

from tidegate.call import CLASSIFIER_LIMIT, DEFAULT_POOL, Status
from tidegate.errors import InvalidRequest, NotFound, StoreUnavailable
from tidegate.limiter import (
    DEFAULT_BANDS,
    MAX_BOUND,
    Concurrency,
    Limit,
    LimitView,
    PermitView,
    Place,
    QueueView,
    Quota,
    Rate,
    SessionView,
    Snapshot,
    TenantView,
    WaitEstimate,
    WaitingLine,
    format_span,
)
from tidegate.policy.format import (
    MEASURES,
    TOTAL,
    binds_model,
    caller_of,
    in_words,
    is_of_models,
    left_in_words,
    pause_in_words,
    plain_model,
    subject_of,
    to_plain,
    usage_in_words,
)
from tidegate.policy.imported import acceptance
from tidegate.policy.learned import LearnedLimit, kept_free, shared_limits
from tidegate.policy.rollout import PolicyKeeper, Revision
from tidegate.store.batches import BatchStand
from tidegate.store.requests import ActiveRequests, JobsAhead, RunningCall, Whereabouts
from tidegate.store.tenants import Tenants
from tidegate.telemetry.logging import Log, get_logger

log = get_logger()

_ANSWER_WITHIN_MS = 2_000
LONGEST_PAUSE_MS = 366 * 86_400_000
_MOST_NAMED = 3  # tenants named in a sentence as holders of a limit


@dataclass(frozen=True, slots=True)
class InForce:
    """The revision in force. The other fields are None while its record is unavailable."""

    revision: int
    origin: str | None = None
    set_by: str | None = None
    reason: str | None = None
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class ShownLimit:
    """A limit with a description in words. For the other fields see `LimitView`. bound: that of
    the policy in force. current: the bound that an adaptive limit has found. Amounts of the unit
    `usd` are in millionths of a dollar. source: `set` by a person, `imported` or `learned`."""

    limit: str
    words: str
    unit: str
    bound: int
    current: int
    used: int
    waiting: int
    lapsing: int
    shadow: bool
    shadowed: int
    paused_ms: int
    paused_by: str
    room_in_ms: int
    source: str


@dataclass(frozen=True, slots=True)
class Overview:
    """A pool. recovering_ms: how long no call is admitted after Valkey lost its data. learned:
    limits as the provider's answers report them, beside those in force."""

    pool: str
    in_force: InForce
    recovering_ms: int
    limits: list[ShownLimit]
    processes: list[SessionView]
    tenants: list[TenantView]
    queues: list[QueueView]
    policy: dict[str, Any]
    learned: list[LearnedLimit]


@dataclass(frozen=True, slots=True)
class ShownPermit:
    """A permit in use. request_id, since: known only for jobs, else None."""

    process: str
    session: str
    ticket: int
    tenant: str
    limits: tuple[str, ...]
    hard_deadline_ms: int
    request_id: UUID | None = None
    since: datetime | None = None


class Control:
    """Inspection and changes of one pool, through this process's limiter. Its methods raise
    LimiterUnavailable while Valkey is unavailable.

    `tenants`: those on record; their weights and limits are part of the pool's policy."""

    def __init__(self, keeper: PolicyKeeper, running: ActiveRequests, tenants: Tenants) -> None:
        self.keeper = keeper
        self.limiter = keeper.limiter
        self.running = running
        self.tenants = tenants

    async def overview(self, *, without_us: bool = False) -> Overview:
        """Return the pool's overview; `without_us` leaves out this process."""
        snapshot = await self.limiter.snapshot()
        policy = self.limiter.policy
        return Overview(
            pool=self.limiter.pool,
            in_force=await self._in_force(snapshot.revision),
            recovering_ms=snapshot.recovering_ms,
            limits=[self._report_of(view) for view in snapshot.limits.values()],
            processes=[
                one
                for one in snapshot.processes
                if not without_us or one.sid != self.limiter.session
            ],
            tenants=list(snapshot.tenants),
            queues=list(snapshot.queues),
            policy=to_plain(policy),
            learned=await self.learned(),
        )

    async def learned(self) -> list[LearnedLimit]:
        """Return the limits that headers of answers report, and others' use of the account."""
        return await shared_limits(self.limiter, self.keeper.provider)

    async def accept(self, limits: Collection[str], *, by: str, reason: str = "") -> Revision:
        """Put learned bounds in force: of these limits, or of all that differ if none is named.
        Raises NotFound if nothing is learned of one, or nothing differs, and StoreUnavailable."""
        change = acceptance(await self.learned(), limits, self.keeper.provider)
        why = reason or "learned from the headers of answers"
        return await self.keeper.change(change, set_by=by, reason=why)

    async def permits(self) -> list[ShownPermit]:
        """Return every permit in use."""
        held = await self.limiter.permits()
        return shown_permits(held, await self.calls())

    async def calls(self) -> Mapping[tuple[str, int], RunningCall]:
        """Return the recorded calls by permit; empty while PostgreSQL is unavailable."""
        try:
            return await self.running.calls(self.limiter.pool)
        except StoreUnavailable as error:
            log.debug(Log.STORE_AWAY, detail=error.message)
            return {}

    async def pause(self, limit: str, for_ms: int | None, *, by: str, reason: str = "") -> bool:
        """Pause a limit, which then admits no call, for a time or until it is resumed. Return False
        if a longer pause is already in force. Raises NotFound."""
        await self._check_there(limit)
        length = {} if for_ms is None else {"for_ms": for_ms}
        after = {"for_ms": for_ms, "reason": reason, "pool": self.limiter.pool, "by": by}
        await self.tenants.actions.note("limit.pause", limit, after=after)
        paused = await self.limiter.penalise(limit, reason=reason, by=by, **length)
        if paused:
            log.warning(Log.LIMIT_PAUSED, limit=limit, for_ms=for_ms, by=by, reason=reason)
        return paused

    async def resume(self, limit: str, *, by: str) -> bool:
        """End a pause; return False if there was none. Raises NotFound."""
        await self._check_there(limit)
        after = {"pool": self.limiter.pool, "by": by}
        await self.tenants.actions.note("limit.resume", limit, after=after)
        resumed = await self.limiter.resume(limit, by=by)
        if resumed:
            log.warning(Log.LIMIT_RESUMED, limit=limit, by=by)
        return resumed

    async def revoke(self, process: str, *, by: str) -> int:
        """Release all permits of a process that is certainly dead. Raises NotFound."""
        sessions = (await self.limiter.snapshot()).processes
        is_there = any(process in (one.sid, one.name) for one in sessions)
        pool = {"pool": self.limiter.pool}
        if is_there:
            await self.tenants.actions.note("permits.revoke", process, after=pool)
        ended = await self.limiter.revoke(process)
        if not ended:
            raise NotFound(f"no process {process} is in the pool")
        if not is_there:  # an ended session, which snapshots do not show, may have had permits
            await self.tenants.actions.note("permits.revoke", process, after=pool)
        log.warning(Log.SESSION_REVOKED, session=process, by=by)
        return ended

    async def _in_force(self, revision: int) -> InForce:
        try:
            newest = (await self.keeper.history(1))[:1]
        except StoreUnavailable as error:
            log.debug(Log.STORE_AWAY, detail=error.message)
            newest = []
        for record in newest:
            if record.revision == revision:
                return InForce(
                    revision, record.origin, record.set_by, record.reason, record.created_at
                )
        return InForce(revision)

    def _report_of(self, view: LimitView) -> ShownLimit:
        limit = self.limiter.policy.limit(view.limit)
        unit, source = "calls", "set"
        if isinstance(limit, Rate | Quota):
            unit, source = limit.unit, limit.source
        values: dict[str, Any] = {"words": words_of(view, limit), "unit": unit, "source": source}
        same = {
            one.name: getattr(view, one.name)
            for one in fields(ShownLimit)
            if one.name not in values
        }
        return ShownLimit(**values, **same)

    async def _check_there(self, limit: str) -> None:
        """Raise the errors of a change before the change is recorded."""
        if self.limiter.policy.binding(limit) is None:
            raise NotFound(f"there is no limit {limit}")
        await self.limiter.ping(_ANSWER_WITHIN_MS)


def words_of(view: LimitView, limit: Limit | None) -> str:
    """Return a limit in words; a limit that only carries pauses, such as an upstream's, has
    none."""
    if limit is not None:
        return in_words(limit)
    return f"{view.bound}" if view.bound < MAX_BOUND else "no limit of its own"


def shown_permits(
    held: tuple[PermitView, ...], calls: Mapping[tuple[str, int], RunningCall]
) -> list[ShownPermit]:
    """Return the permits with the requests that hold them, if known."""
    found = []
    for permit in held:
        call = calls.get((permit.process, permit.seq))
        found.append(
            ShownPermit(
                process=permit.process,
                session=permit.sid,
                ticket=permit.ticket,
                tenant=permit.tenant,
                limits=permit.limits,
                hard_deadline_ms=permit.left_ms,
                request_id=None if call is None else call.request_id,
                since=None if call is None else call.admitted_at,
            )
        )
    return found


def binding_limit(found: Whereabouts, snapshot: Snapshot) -> LimitView | None:
    """Return the limit that a queued job waits for; None if none is evident."""
    queues = [one for one in equivalent_queues(found, snapshot) if one.held_up_by]
    own = [one for one in queues if one.tenant == found.tenant_id]
    if not own and found.claimed_by is None:
        own = [one for one in queues if _binds(one.held_up_by or "", found, any_model=True)]
    if own:
        # Of several processes with such waiters, the one that has this job is preferred.
        queue = max(own, key=lambda one: (one.process == found.claimed_by, one.waiting))
        return snapshot.limits.get(queue.held_up_by or "")
    views = [one for one in snapshot.limits.values() if _binds(one.limit, found)]
    held = [one for one in views if one.paused_ms or one.waiting or is_full(one)]
    if found.claimed_by is not None:  # it waits in no other queue than its type's
        held = [one for one in held if one.limit == _kind_limit(found)]
    return max(held, key=lambda one: (one.paused_ms, one.room_in_ms, one.waiting), default=None)


def is_put_back(found: Whereabouts) -> bool:
    """Return whether a job waits for a time; among several pools it then waits for no open one."""
    return found.not_before is not None and _left_ms(found.not_before) > 0


def _shut_gate(found: Whereabouts, snapshot: Snapshot) -> LimitView | None:
    """Return the pause of its upstream, by a person or by its outages; None if there is none."""
    view = snapshot.limits.get(f"upstream:{found.pool}")
    return view if view is not None and view.paused_ms else None


def is_full(view: LimitView) -> bool:
    """Return whether a limit admits no call; one in shadow mode admits all."""
    return not view.shadow and view.used >= (view.current if view.sort == "c" else view.bound)


def adapted_from(view: LimitView) -> int | None:
    """Return the configured bound of an adaptive limit that has found a lower one, else None."""
    return view.bound if view.sort == "c" and view.current < view.bound else None


def admitted_per_s(view: LimitView, limit: Limit | None) -> float | None:
    """Return how many calls a second a full limit admits, by its calls' durations or its window.
    None if that is unknown, and for limits that do not count calls."""
    if view.paused_ms:
        return None
    if isinstance(limit, Concurrency) and not limit.by_tokens and view.cost_ms:
        return view.current * 1000 / view.cost_ms
    if isinstance(limit, Rate) and limit.unit == "requests":
        return limit.bound * 1000 / limit.window_ms
    return None


def _kind_limit(found: Whereabouts) -> str:
    # A job of unknown kind waits for the classifier.
    return CLASSIFIER_LIMIT if found.kind is None else f"kind:{found.kind}"


def equivalent_queues(found: Whereabouts, snapshot: Snapshot) -> Iterator[QueueView]:
    """Yield queues of the job's type (if the pool limits types), of no other model as far as that
    is known, and under no limit of another key, user or conversation."""
    kind_limit = _kind_limit(found)
    for queue in snapshot.queues:
        kinds = [one for one in queue.limits if one.startswith("kind:")]
        models = [subject for one in queue.limits if (subject := _models_of(one)) is not None]
        is_same = found.model is None or all(_is_one_of(found.model, subject) for subject in models)
        is_same &= all(_is_of_caller(one, found) for one in queue.limits)
        if (not kinds or kind_limit in kinds) and is_same:
            yield queue


def _binds(limit_id: str, found: Whereabouts, *, any_model: bool = False) -> bool:
    """Return whether a job falls under a limit. `any_model`: if the job's model is not known yet,
    count limits on models too."""
    measure = MEASURES.get(limit_id.partition(":")[0])
    if measure and measure.unit == "images" and found.kind != "image_generation":
        return False
    subject = _models_of(limit_id)
    if subject is not None:
        return any_model if found.model is None else _is_one_of(found.model, subject)
    if limit_id == f"upstream:{found.pool}":
        return True
    if caller_of(limit_id) is not None:
        return _is_of_caller(limit_id, found)
    kind = _kind_limit(found).partition(":")[2]
    return subject_of(limit_id) in (f"kind/{kind}", f"tenant/{found.tenant_id}", TOTAL)


def _is_of_caller(limit_id: str, found: Whereabouts) -> bool:
    """Return whether a limit is on no key, user or conversation other than the job's."""
    match caller_of(limit_id):
        case "key", key:
            return found.key_id == key
        case "user", tenant, user:
            return (found.tenant_id, found.subject) == (tenant, user)
        case _, tenant, conversation:
            return (found.tenant_id, found.conversation) == (tenant, conversation)
    return True


def _is_one_of(model: str, subject: str) -> bool:
    return binds_model(subject, plain_model(model))


def _models_of(limit_id: str) -> str | None:
    """Return the model or pattern that a limit is on; None for other limits."""
    scope, subject = limit_id.partition(":")[0], subject_of(limit_id)
    is_one = (
        subject is not None and (scope == "model" or scope in MEASURES) and is_of_models(subject)
    )
    return subject if is_one else None


Lines = Callable[[str, int, str], Awaitable[WaitingLine]]


async def estimate_of(
    lines: Lines, found: Whereabouts, snapshot: Snapshot, ahead: JobsAhead | None
) -> WaitEstimate | None:
    """Return how long a queued job still waits, even if no worker has it yet. None if it waits
    for no evident limit, or if counting the jobs before it took too long.

    A job without a worker comes after all that its tenant has waiting for the same limit. Some jobs
    that workers have may wait for other limits."""
    view = binding_limit(found, snapshot)
    if view is None or ahead is None:
        return None
    queues = [one for one in equivalent_queues(found, snapshot) if one.held_up_by == view.limit]
    own = [one for one in queues if one.tenant == found.tenant_id] or queues
    usual = 1 + len(DEFAULT_BANDS) // 2
    band = max(own, key=lambda one: one.waiting).band if own else usual
    line = await lines(view.limit, band, found.tenant_id)
    before = min(ahead.claimed, max(0, line.waiting - 1))
    if found.claimed_by is None:
        before = ahead.unclaimed + max(line.waiting, ahead.claimed)
    return line.estimate(before, view.cost_ms)


def _how_long(wait: WaitEstimate | None) -> str:
    """Return text such as `; 12 calls are ahead, admission in about 47 s`."""
    if wait is None:
        return ""
    calls = "1 call is" if wait.ahead == 1 else f"{wait.ahead} calls are"
    if wait.wait_ms is None:
        return f"; {calls} ahead{_stalled(wait)}"
    about = "" if wait.is_certain else "about "
    return f"; {calls} ahead, admission in {about}{format_span(wait.wait_ms)}"


def _stalled(wait: WaitEstimate) -> str:
    if not wait.stalled_ms:
        return ""
    span = format_span(wait.stalled_ms)
    return f", no estimate: no call under this limit has ended for at least {span}"


@dataclass(frozen=True, slots=True)
class Reason:
    """What a request or ticket waits for.

    sentence: the answer in words. status: of a request. process: the process that has it.
    held_up_by: the limit that it waits for. ahead: tickets of its tenant before it, or requests
    before a job that no worker has taken yet. ahead_of_all: approximate number of calls of all
    tenants that are admitted before it. wait_ms: the estimated time left. These three are None if
    unknown. is_certain: wait_ms is that of a window, a quota or a pause. limit, holders: that limit
    and the permits of it. adapted_from: its configured bound, if it has adapted to less.
    rate_per_s: how many calls a second it admits, if known. next_action: how to shorten the wait.
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
    ahead_of_all: int | None = None
    is_certain: bool = False
    next_action: str | None = None

    @property
    def is_of_the_pool(self) -> bool:
        """Whether the inspected pool knows the request or ticket."""
        return self.held_up_by is not None or bool(self.holders)


def request_id_of(text: str) -> UUID | None:
    """Return the id of a request; None for a ticket."""
    try:
        return UUID(text)
    except ValueError:
        return None


_BATCH = re.compile(r"(?:msg)?batch_([0-9a-f]{32})")


def batch_id_of(text: str) -> UUID | None:
    """Return the id of a batch in its clients' form; None for anything else."""
    found = _BATCH.fullmatch(text)
    return None if found is None else UUID(found[1])


def of_batch(what: str, stand: BatchStand) -> Reason:
    """Return the reason of a batch without a line that waits for a limit."""
    if stand.finished_at is not None:
        text = f"waits for nothing: {stand.status}, {_ago(stand.finished_at)} ago"
    elif stand.paused_by is not None and stand.status in ("validating", "in_progress"):
        why = f": {stand.pause_reason}" if stand.pause_reason else ""
        text = f"is paused by {stand.paused_by}{why}; {stand.waiting} of {_lines(stand.total)} left"
    elif stand.lacks_tenant and stand.status == "in_progress" and stand.waiting:
        text = f"is paused while its tenant {stand.tenant_id} is disabled or removed; "
        text += f"{stand.waiting} of {_lines(stand.total)} left"
    elif stand.status == "validating":
        text = f"waits for a worker that checks its {_lines(stand.total)}"
    elif stand.status == "in_progress" and stand.calling:
        text = f"has no waiting line: its last {stand.calling} are running"
    else:
        text = "waits for a worker that writes its results"
    return Reason(what, text, stand.status)


async def why_batch(control: Control, what: str, stand: BatchStand, line: Whereabouts) -> Reason:
    """Return what the lines of a batch wait for, by the next one to be called. Raises as `why`."""
    reason = await _why_queued(control, line)
    left = f"has {stand.waiting} of {_lines(stand.total)} left to call; the next"
    return replace(reason, what=what, sentence=f"{left} {reason.sentence}", status=stand.status)


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count} lines"


async def why(control: Control, what: str, found: Whereabouts | None = None) -> Reason:
    """Return why a request, by its id, or a ticket, as `process/ticket`, waits. `found`: a
    request's whereabouts, with the pool and the model whose limits apply.

    Raises NotFound, InvalidRequest for any other text, LimiterUnavailable, StoreUnavailable."""
    reason = await _why(control, what, found)
    if reason.limit is None or reason.limit.sort == "c":
        return reason
    kept = kept_free(await control.learned(), reason.limit.limit)
    return replace(reason, sentence=". ".join((reason.sentence, *kept)))


async def _why(control: Control, what: str, found: Whereabouts | None) -> Reason:
    if found is None:
        request_id = request_id_of(what)
        if request_id is None:
            return await _why_ticket(control, what)
        found = await control.running.whereabouts(request_id)
        found = replace(found, pool=control.limiter.pool)
    if found.status is Status.RUNNING:
        return await _why_running(control, found)
    if found.status is not Status.QUEUED:
        return Reason(what, _how_it_ended(found), found.status.value)
    return await _why_queued(control, found)


async def _why_ticket(control: Control, what: str) -> Reason:
    process, slash, number = what.rpartition("/")
    if not slash or not number.isdecimal():
        allowed = "the full id of a request or a batch, or process/ticket"
        raise InvalidRequest("what", f"no request, batch or ticket {what!r}", allowed=allowed)
    found = await control.limiter.why(process, int(number))
    if found is None:
        raise NotFound(f"no ticket {number} of process {process} is waiting")
    place = found.place
    holders = shown_permits(found.holders, await control.calls())
    action = _next_action(place.held_up_by, found.limit, control.limiter.pool)
    return Reason(
        what,
        f"{_sentence_of_place(place, found.limit, holders)}. {action}",
        process=process,
        held_up_by=place.held_up_by,
        ahead=place.ahead,
        wait_ms=place.wait_ms,
        limit=found.limit,
        holders=tuple(holders),
        adapted_from=None if found.limit is None else adapted_from(found.limit),
        rate_per_s=place.rate_per_s,
        ahead_of_all=place.ahead_of_all,
        is_certain=place.is_certain,
        next_action=action,
    )


async def _why_running(control: Control, found: Whereabouts) -> Reason:
    if found.is_for_batch:
        text = f"is in a provider's batch for {_ago(found.admitted_at)} ({found.batch})"
        return Reason(str(found.request_id), text, found.status.value)
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


_GATHERED = "waits to be put into a batch of its provider, with others"


async def _why_queued(control: Control, found: Whereabouts) -> Reason:
    """Return what a queued job waits for: its time, a worker, or in a worker a limit."""
    what, status = str(found.request_id), found.status.value
    if found.not_before is not None and (left := _left_ms(found.not_before)) > 0:
        if (spent := _spent_budget(found)) is not None:
            action = _budget_action(found)
            text = f"{spent}; it is retried in {format_span(left)}. {action}"
            return Reason(what, text, status, next_action=action)
        if found.is_for_batch:
            return Reason(what, _GATHERED, status)
        if (gate := _shut_gate(found, await control.limiter.snapshot())) is not None:
            action = _next_action(gate.limit, gate, found.pool, found.is_line)
            text = f"{_sentence(gate.limit, gate)}; it is retried in {format_span(left)}"
            text = f"{text}. {action}"
            return Reason(what, text, status, held_up_by=gate.limit, limit=gate, next_action=action)
        sentence = f"waits {format_span(left)} more before its next attempt"
        if found.failure_code:
            sentence += f", after {found.failure_code}"
        return Reason(what, sentence, status)
    if found.claimed_by is None:
        return await _unclaimed(control, found)
    snapshot = await control.limiter.snapshot(permits=True)
    queues = [
        queue
        for queue in equivalent_queues(found, snapshot)
        if queue.process == found.claimed_by and queue.tenant == found.tenant_id
    ]
    if not queues:
        return Reason(what, f"is being prepared by {found.claimed_by}", status, found.claimed_by)
    # A process may have its waiters in several bands: the longest queue is reported.
    queue = max(queues, key=lambda one: one.waiting)
    view = snapshot.limits.get(queue.held_up_by or "")
    about = await _of_limit(control, snapshot, queue.held_up_by)
    wait = await _estimate(control, found, snapshot)
    before = queue.waiting - 1
    others = f"up to {before} before it" if before else "next in its queue"
    action = _next_action(queue.held_up_by, view, found.pool, found.is_line)
    sentence = f"{_sentence(queue.held_up_by, view)}{_held_by(about['holders'])}, in "
    sentence += f"{found.claimed_by}, {others}{_how_long(wait)}. {action}"
    return Reason(
        what, sentence, status, found.claimed_by, next_action=action, **_of_estimate(wait), **about
    )


async def _estimate(
    control: Control, found: Whereabouts, snapshot: Snapshot
) -> WaitEstimate | None:
    ahead = await control.running.ahead(found.request_id)
    return await estimate_of(control.limiter.line, found, snapshot, ahead)


def _of_estimate(wait: WaitEstimate | None) -> dict[str, Any]:
    """Return the fields of a Reason about its time."""
    if wait is None:
        return {}
    return {
        "wait_ms": wait.wait_ms,
        "ahead_of_all": wait.ahead,
        "is_certain": wait.is_certain,
    }


async def _unclaimed(control: Control, found: Whereabouts) -> Reason:
    """Return the reason of a job that no worker has claimed: earlier jobs occupy the workers."""
    snapshot = await control.limiter.snapshot(permits=True)
    view = binding_limit(found, snapshot)
    what, status = str(found.request_id), found.status.value
    place = await control.running.place(found.request_id)
    ahead = None if place is None else place - 1
    if view is None:
        sentence = f"has waited {_ago(found.created_at)} for a worker to take it"
        if found.kind is None:
            sentence = "waits for a worker that classifies it"
        view = snapshot.limits.get(f"kind:{found.kind}")
        action = "`tidegate doctor` shows whether a worker runs"
        return Reason(
            what, f"{sentence}. {action}", status, ahead=ahead, limit=view, next_action=action
        )
    about = await _of_limit(control, snapshot, view.limit)
    rate, wait = about["rate_per_s"], await _estimate(control, found, snapshot)
    sentence = f"has waited {_ago(found.created_at)}: {_state(view)}{_held_by(about['holders'])}"
    if ahead is not None:
        sentence += f"; {ahead} {'request is' if ahead == 1 else 'requests are'} ahead"
    if wait is not None and wait.wait_ms is not None:
        sentence += "" if rate is None else f", at {rate:.2g}/s"
        sentence += f", admission in {'' if wait.is_certain else 'about '}"
        sentence += format_span(wait.wait_ms)
    elif wait is not None:
        sentence += _stalled(wait)
    action = _next_action(view.limit, view, found.pool, found.is_line)
    return Reason(
        what,
        f"{sentence}. {action}",
        status,
        ahead=ahead,
        next_action=action,
        **_of_estimate(wait),
        **about,
    )


def _held_by(holders: Sequence[ShownPermit]) -> str:
    """Return text such as `, held by acme (4) and beta (1)`, most permits first."""
    counts = Counter(one.tenant for one in holders).most_common(_MOST_NAMED + 1)
    if not counts:
        return ""
    named = [f"{tenant} ({count})" for tenant, count in counts[:_MOST_NAMED]]
    if len(counts) > _MOST_NAMED:
        named.append("others")
    return f", held by {' and '.join([', '.join(named[:-1]), named[-1]] if named[1:] else named)}"


def _next_action(
    held_up_by: str | None, view: LimitView | None, pool: str, of_batch: bool = False
) -> str:
    """Return what an operator can do about the wait."""
    of_pool = "" if pool == DEFAULT_POOL else f" --pool {pool}"
    if held_up_by is None:
        return "`tidegate limits show` lists the processes: resume or restart that one"
    if view is not None and view.paused_ms:
        return f"`tidegate limits resume {quote(held_up_by)}{of_pool}` ends the pause"
    priority = "give the request a higher priority"
    if of_batch:  # all lines of batches have the lowest priority
        priority = "send urgent lines as separate calls"
    if held_up_by.startswith("upstream:") or (view is not None and view.bound >= MAX_BOUND):
        return "It continues when calls of that upstream end"
    if view is not None and adapted_from(view) is not None:
        return (
            "The provider refused calls, so that the limit adapted: it rises again as calls "
            f"succeed; or {priority}"
        )
    change = f"`tidegate limits set {quote(f'{held_up_by}=N')}{of_pool}`"
    return (
        f"To shorten the wait, raise the limit if the provider allows more ({change}) or {priority}"
    )


async def _of_limit(control: Control, snapshot: Snapshot, limit: str | None) -> dict[str, Any]:
    """Return the fields of a Reason about the limit that is waited for."""
    view = snapshot.limits.get(limit or "")
    held = tuple(permit for permit in snapshot.permits if limit in permit.limits)
    in_force = None if view is None else control.limiter.policy.limit(view.limit)
    return {
        "held_up_by": limit,
        "limit": view,
        "holders": tuple(shown_permits(held, await control.calls())),
        "adapted_from": None if view is None else adapted_from(view),
        "rate_per_s": None if view is None else admitted_per_s(view, in_force),
    }


def _sentence_of_place(place: Place, view: LimitView | None, holders: Sequence[ShownPermit]) -> str:
    sentence = f"{_sentence(place.held_up_by, view)}, {place.ahead} before it"
    sentence += _held_by(holders)
    wait = WaitEstimate(
        place.wait_ms,
        place.ahead_of_all,
        is_certain=place.is_certain,
        stalled_ms=place.stalled_ms,
    )
    return sentence + _how_long(wait)


def _sentence(held_up_by: str | None, view: LimitView | None) -> str:
    if held_up_by is None:
        return "waits for its process, which accepts no permits: it is paused or can't be reached"
    if view is None:
        return f"waits for {held_up_by}"
    if view.paused_ms:
        return f"waits for {view.limit}, which is {pause_in_words(view.paused_by, view.paused_ms)}"
    return f"waits for {_state(view)}"


def _state(view: LimitView) -> str:
    """Return a limit, and how much of it is used or who paused it."""
    if view.paused_ms:
        return f"{view.limit} is {pause_in_words(view.paused_by, view.paused_ms)}"
    before = adapted_from(view)
    return usage_in_words(view) + ("" if before is None else f" (adapted down from {before})")


_BUDGET_ACTIONS = {
    "budget_exceeded": "`tidegate budgets resume BUDGET --extra-UNIT N` allows more in this "
    "period, a larger amount more in each",
    "budget_paused": "`tidegate budgets resume BUDGET` ends the pause",
    "budget_reserved": "It continues when calls in progress end",
    "budget_unbounded": "Give its model a price, or have the budget take estimates: `tidegate "
    "budgets set BUDGET --doubt estimate`; or cancel it, and submit it with max_tokens",
}

_UNTIL_A_PERSON_ACTS = ("budget_paused", "budget_unbounded")


def _budget_action(found: Whereabouts) -> str:
    """Return what to do about the budget that the last attempt's error names."""
    message, action = found.failure_message or "", _BUDGET_ACTIONS[found.failure_code or ""]
    action = action.replace("UNIT", "tokens" if " tokens spent" in message else "usd")
    return action.replace("BUDGET", (re.findall(r"^the budget (\S+)", message) or ["BUDGET"])[0])


def _spent_budget(found: Whereabouts) -> str | None:
    """Return `waits for a budget: ...` if a budget refused the request's last attempt, else
    None."""
    if found.failure_code not in _BUDGET_ACTIONS:
        return None
    return f"waits for a budget: {found.failure_message}"


def _how_it_ended(found: Whereabouts) -> str:
    if found.failure_code in _BUDGET_ACTIONS:
        ended = f"waits for nothing: {found.status.value} {_ago(found.finished_at)} ago"
        return f"{ended}, since {found.failure_message}"
    code = f" ({found.failure_code})" if found.failure_code else ""
    return f"waits for nothing: {found.status.value}{code}, {_ago(found.finished_at)} ago"


def _ago(at: datetime | None) -> str:
    return "an unknown time" if at is None else format_span(max(0.0, -_left_ms(at)))


def _left_ms(at: datetime) -> float:
    return (at - datetime.now(UTC)).total_seconds() * 1000


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a request waits for, for its owner. limit: the id of the limit that it waits for, if
    any, with its `bound` and how much is `used`. retry_in_ms: time until the next attempt after a
    failure. ahead: approximate number of calls of all tenants that come first. wait_ms: the
    estimated time left; with `is_certain` that of a window, a quota or a pause."""

    sentence: str
    limit: str | None = None
    used: int | None = None
    bound: int | None = None
    paused_ms: int | None = None
    retry_in_ms: int | None = None
    ahead: int | None = None
    wait_ms: int | None = None
    is_certain: bool = False


def waiting(
    found: Whereabouts,
    snapshot: Snapshot | None,
    now: datetime,
    wait: WaitEstimate | None = None,
) -> Waiting:
    """Return what a request waits for. `snapshot`: of the request's pool, None while Valkey is
    unavailable. `wait`: see `estimate_of`."""
    if found.status is Status.RUNNING:
        return Waiting("is in a provider's batch" if found.is_for_batch else "is running")
    if found.status is not Status.QUEUED:
        since = f", since {found.failure_message}" if found.failure_code in _BUDGET_ACTIONS else ""
        return Waiting(f"has ended: {found.status.value}{since}")
    if found.not_before is not None and found.not_before > now:
        left_ms = round((found.not_before - now).total_seconds() * 1000)
        text = f"is retried in {format_span(left_ms)}"
        if (spent := _spent_budget(found)) is not None:
            text = f"{spent}; it is retried in {format_span(left_ms)}"
            if found.failure_code in _UNTIL_A_PERSON_ACTS:
                text = f"{text}. {_budget_action(found)}"
            return Waiting(text, retry_in_ms=left_ms)
        if found.is_for_batch:
            return Waiting(_GATHERED)
        if snapshot is not None and (gate := _shut_gate(found, snapshot)) is not None:
            of_it = _for(gate, None)
            return replace(of_it, sentence=f"{of_it.sentence}; {text}", retry_in_ms=left_ms)
        return Waiting(
            f"{text}, after {found.failure_code}" if found.failure_code else text,
            retry_in_ms=left_ms,
        )
    if snapshot is None:
        return Waiting("waits until Valkey is back")
    if snapshot.recovering_ms:
        left = format_span(snapshot.recovering_ms)
        return Waiting(f"waits {left} more, because Valkey lost its data")
    limit = binding_limit(found, snapshot)
    if limit is not None:
        return _for(limit, wait)
    if found.claimed_by is None:
        return Waiting("waits for a worker to take it")
    return Waiting("is being prepared")


def _for(view: LimitView, wait: WaitEstimate | None) -> Waiting:
    state = (
        f"{view.limit}, which is paused {left_in_words(view.paused_ms)}"
        if view.paused_ms
        else usage_in_words(view)
    )
    bound = view.current if view.sort == "c" else view.bound
    return Waiting(
        f"waits for {state}{_how_long(wait)}",
        view.limit,
        view.used,
        bound if bound < MAX_BOUND else None,
        view.paused_ms or None,
        ahead=None if wait is None else wait.ahead,
        wait_ms=None if wait is None else wait.wait_ms,
        is_certain=wait is not None and wait.is_certain,
    )
