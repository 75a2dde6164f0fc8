"""Calls of jobs of all kinds: claims, payer, upstreams, record and retries.

Invariants: a claimed job that no upstream can take returns to its queue and takes no slot of the
feeder's window; no claim is lost while PostgreSQL is unavailable: a job that cannot be returned is
started.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, Protocol, TypeVar
from uuid import UUID

from tidegate.call import Caller, Media, Status, Tier, new_id
from tidegate.dialects.requests import in_tier
from tidegate.errors import (
    BudgetExceeded,
    BudgetReserved,
    BudgetUnbounded,
    CallPreempted,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    LastTryWaits,
    LeaseLost,
    LimiterUnavailable,
    LimitPaused,
    LimitUsedUp,
    NotFound,
    QueueFull,
    ShuttingDown,
    StoreUnavailable,
    TidegateError,
    UpstreamError,
    UpstreamTierBusy,
)
from tidegate.jobs.outages import ClaimDepth, Held, Key
from tidegate.limiter import Limiter
from tidegate.policy.format import CallerName, subject_of
from tidegate.policy.format import caller_of as caller_named
from tidegate.record import CallRecord, Failure, Lineage, OutputFile
from tidegate.spine.detached import collected, detached_call, endpoint_named
from tidegate.spine.models import targets_for
from tidegate.spine.native import Relay
from tidegate.spine.prompt import PromptRequest
from tidegate.spine.routing import Target
from tidegate.spine.run import CallFailed, OnAdmitted
from tidegate.store.batches import BatchLine
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.jobs import CANCELLED
from tidegate.store.notifications import PULSED_MS, Notifications, ServerClock
from tidegate.store.queue import MAX_LAPSES, Callers
from tidegate.store.records import ClaimedJob, log_job
from tidegate.telemetry.logging import Log, get_logger
from tidegate.telemetry.tracing import Trail

log = get_logger()
WhomT = TypeVar("WhomT")
_OTHER_ENDS = {
    CANCELLED.code: Status.CANCELLED,
    # The deadline passed at a limit after the job was marked.
    **dict.fromkeys(
        (DeadlineExceeded.code, LimitPaused.code, LimitUsedUp.code),
        Status.EXPIRED,
    ),
}
# Errors that do not concern the job: this or another worker can call it later.
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
_RESERVED_WAIT_MS = 1_000
_LONGEST_SERVER_WAIT_MS = 86_400_000


def ask_of(job: ClaimedJob) -> PromptRequest:
    kind = job.classification.kind
    return PromptRequest(job.prompt, job.attachments, job.image_uri, kind, job.tenant_id)


def caller_of(job: ClaimedJob) -> Caller:
    """Return the tenant and key that submitted a job, whose budgets apply to it."""
    return Caller(job.tenant_id, job.key_id)


def status_of(failure: Failure | None) -> Status:
    return Status.SUCCEEDED if failure is None else _OTHER_ENDS.get(failure.code, Status.FAILED)


def log_end(
    job: ClaimedJob, record: CallRecord, failure: Failure | None, wait_ms: int | None
) -> None:
    """Log the end of a job, or its retry after `wait_ms`."""
    fields = {
        "request_id": str(job.request_id),
        "tenant": job.tenant_id,
        **({"trace_id": record.trail.trace} if record.trail else {}),
        "type": job.classification.kind,
        "queue_ms": round(record.queue_ms or 0.0, 1),
        "upstream_ms": round(record.upstream_ms or 0.0, 1),
        **({"code": failure.code} if failure else {}),
    }
    if wait_ms is None:
        log_job(fields)
    else:
        log.info(Log.JOB_RETRY, retry_in_ms=wait_ms, **fields)


_LACKING_MS = (1_000, 2_000)
_YIELDS_FOR_S, _YIELD_S = 10.0, 0.3


class Lacking:
    """Leaves jobs to other processes whose upstream this process could not set up. It delays its
    own claims for a while, since it could be the first to claim the same jobs again."""

    def __init__(self) -> None:
        self._until = float("-inf")

    def leave_ms(self) -> int:
        """Return how long to put a job off."""
        self._until = time.monotonic() + _YIELDS_FOR_S
        return random.randint(*_LACKING_MS)

    async def yield_claim(self) -> None:
        if time.monotonic() < self._until:
            await asyncio.sleep(_YIELD_S)


def internal() -> TidegateError:
    return TidegateError("an internal error; it has been logged")


def time_left_ms(job: ClaimedJob, clock: ServerClock) -> int | None:
    """Return the time until the job's deadline, negative after it; None without one."""
    if job.deadline_at is None:
        return None
    return round((job.deadline_at - clock.now()).total_seconds() * 1000)


def places_of(relay: Relay, path: str, model: str, bound: str | None = None) -> list[Target]:
    """Return the targets of a call, or the one upstream that it is bound to; empty for a path that
    only another version accepts."""
    try:
        endpoint = endpoint_named(path)
        targets, model = relay.spine.targets, endpoint.model or model
        return targets_for(targets, bound, endpoint.dialect, model)
    except (InvalidRequest, NotFound):
        return []


def targets_of(relay: Relay, path: str, model: str) -> tuple[Key, ...]:
    """Return the upstreams and models that a call may go to."""
    return tuple(map(key_of, places_of(relay, path, model)))


def key_of(target: Target) -> Key:
    return target.upstream.name, target.model


def record_of(job: ClaimedJob, trail: Trail | None = None) -> CallRecord:
    """Return the record of a job's next call."""
    record = CallRecord("job", job.tenant_id, job.created_at, job.request_id)
    record.pool, record.kind, record.model = job.pool, job.classification.kind, job.model
    record.priority, record.trail, record.subject = job.priority, trail, job.subject
    record.lineage = Lineage.of(job.conversation, trail)
    # A repeated call has not waited since the job was submitted.
    record.waits_since = datetime.now(UTC) if job.was_called else job.created_at
    return record


async def run_wrapped(
    relay: Relay,
    job: ClaimedJob,
    record: CallRecord,
    admitted: OnAdmitted,
    *,
    body: bytes,
    caller: Caller,
    max_attempts: int,
    left: Callable[[], bool],
    left_ms: int | None,
) -> None:
    """Make the call that a job wraps, with its `body`, on the budget of `caller`, in the job's
    tier. left: as in `Terms`; left_ms: until the deadline. Raises UpstreamError, and what else
    `Relay.run` raises."""
    assert job.endpoint is not None
    call = detached_call(
        request_id=job.request_id,
        path=job.endpoint,
        body=body,
        caller=caller,
        priority=job.priority,
        deadline_ms=None if left_ms is None else max(1, left_ms),
        trail=record.trail,
        most_tries=max_attempts - job.attempts,
        preempted=job.preemptions,
        has_own_deadline=left_ms is not None,
    )
    call.terms.subject, call.terms.conversation = job.subject, job.conversation
    call.terms.left, call.terms.upstream = left, job.bound_upstream
    if job.tier is Tier.FLEX:
        call.body = in_tier(body, call.endpoint.dialect, job.tier)
    record.dialect, record.operation = call.endpoint.dialect.value, call.endpoint.name
    try:
        await collected(relay, call, record, admitted)
    except CallFailed as failed:
        raise failed.error from None


_GIVEN_UP = "given up in the flex tier: only the usual tier still makes the deadline"


async def until_review(
    job: ClaimedJob, clock: ServerClock, call: Coroutine[Any, Any, None]
) -> None:
    """Make a call in the job's tier: in flex, only until the tier has to be reviewed. Raises
    UpstreamTierBusy then."""
    if job.tier is not Tier.FLEX or job.revisit_at is None:
        await call
        return
    left_s = max(0.0, (job.revisit_at - clock.now()).total_seconds())
    try:
        async with asyncio.timeout(left_s) as bound:
            await call
    except TimeoutError:
        if not bound.expired():
            raise
        raise UpstreamTierBusy(_GIVEN_UP) from None


def is_of_upstream(error: TidegateError | None) -> bool:
    """Whether a fault is the upstream's: it uses up no attempt, and `Outages` sets the next one."""
    return isinstance(error, UpstreamError) and error.of_upstream


def uncounted_wait_ms(
    error: TidegateError | None, left_ms: int | None = None, rng: random.Random | None = None
) -> int | None:
    """Return the milliseconds until the next attempt after an error that uses up no attempt, else
    None.

    A preempted call is retried immediately. A call that a budget rejected waits for the next
    period, but at most about a minute, since a budget can be raised, and at most half of the time
    left before its deadline; a second or less if calls in progress hold the rest of the budget. A
    call of unknown cost waits as long: an operator may set a price, allow estimates, or cancel it.
    One that needs more than a whole period of a budget fails.
    A last attempt waits for another one.
    """
    if isinstance(error, CallPreempted):
        return 0
    if isinstance(error, LastTryWaits):
        return error.retry_after_ms
    if isinstance(error, BudgetReserved):
        return round((rng or random).uniform(_RESERVED_WAIT_MS / 2, _RESERVED_WAIT_MS))
    if not isinstance(error, BudgetExceeded | BudgetUnbounded):
        return None
    if isinstance(error, BudgetExceeded) and error.never_fits:
        return None
    longest_ms: float = _SPENT_WAIT_MS
    if left_ms is not None:
        longest_ms = min(longest_ms, max(left_ms / 2, _RESERVED_WAIT_MS))
    wait_ms = (rng or random).uniform(longest_ms / 2, longest_ms)
    return max(1, round(min(wait_ms, error.retry_after_ms or wait_ms)))


def retry_wait_ms(
    error: TidegateError, attempts: int, max_attempts: int, rng: random.Random | None = None
) -> int | None:
    """Return the milliseconds until the next attempt, None for no further attempt.

    `attempts` counts all made so far, including this one. Exponential backoff with full jitter
    (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015). A server's
    `Retry-After` is the minimum, up to `UpstreamError.pause_ms`, and jitter is only added to it,
    since an earlier call would be refused again.
    """
    if not error.retryable or attempts >= max_attempts:
        return None
    ceiling = min(_LONGEST_WAIT_MS, _FIRST_WAIT_MS * 2 ** (attempts - 1))
    jitter = (rng or random).uniform(0, ceiling)
    stated_ms = error.pause_ms if isinstance(error, UpstreamError) else error.retry_after_ms
    directed = min(stated_ms or 0, _LONGEST_SERVER_WAIT_MS)
    return round(directed + (jitter if not directed else jitter / 4))


_LOOK_EVERY_S, _LOOK_SHARE = 0.9, 10


class OwnLimits:
    """Tenants, keys, users and conversations whose own limits delay calls of this process. One per
    worker. limiters: of all upstreams in use."""

    def __init__(
        self,
        limiters: Callable[[], Iterable[Limiter]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limiters = limiters
        self._clock = clock
        self._next_at = float("-inf")
        self._held: frozenset[CallerName] = frozenset()

    def __repr__(self) -> str:
        return f"<OwnLimits {sorted(self._held)}>"

    def __bool__(self) -> bool:
        return bool(self._held)

    async def look(self) -> None:
        """Read which limits delay this process's calls, at most once a second and for a tenth of
        the time, since it grows with the limits of a pool; one without an answer counts as none."""
        if (began := self._clock()) < self._next_at:
            return
        held: set[CallerName] = set()
        for limiter in self._limiters():
            if limiter.waiters and any(_caller_of(one) for one in limiter.policy.limits):
                with suppress(LimiterUnavailable):
                    queues = (await limiter.snapshot()).queues
                    own = (one.held_up_by for one in queues if one.sid == limiter.session)
                    held |= {whom for one in own if one and (whom := _caller_of(one))}
        self._held, ended = frozenset(held), self._clock()
        self._next_at = max(began + _LOOK_EVERY_S, ended + _LOOK_SHARE * (ended - began))

    def of(self, job: ClaimedJob) -> tuple[CallerName, ...]:
        """Return those of a job's key, user and conversation whose limits delay calls."""
        user, talk = job.subject or "", job.conversation or ""
        own: tuple[CallerName, ...] = (
            ("key", job.key_id or ""),
            ("user", job.tenant_id, user),
            ("conversation", job.tenant_id, talk),
        )
        return tuple(one for one in own if one in self._held)

    def of_line(self, line: BatchLine) -> CallerName | None:
        """Return the key or tenant of a batch line whose limit delays calls, if any."""
        own: tuple[CallerName, ...] = (("key", line.key_id or ""), ("tenant", line.tenant_id))
        return next((one for one in own if one in self._held), None)

    def filling(self, jobs: Iterable[ClaimedJob], window: int) -> dict[str, Callers]:
        """Return, by tenant, the callers of which no more should be claimed, since so many of their
        `jobs` wait: each gets at least its share of half the window."""
        count = Counter((job.tenant_id, one) for job in jobs for one in self.of(job))
        found: dict[str, Callers] = {}
        for tenant, whom in _filling(count, window):
            found[tenant] = found.get(tenant, frozenset()) | {(whom[0], whom[-1])}
        return found

    def filling_lines(self, lines: Iterable[BatchLine], window: int) -> list[str]:
        """Return the keys and tenants of which no more lines should be claimed, as `filling`."""
        count = Counter(one for line in lines if (one := self.of_line(line)) is not None)
        return ["/".join(one) for one in _filling(count, window)]


def _caller_of(limit_id: str) -> CallerName | None:
    """Return whom a limit applies to, if only to a tenant, key, user or conversation."""
    whom = subject_of(limit_id) or ""
    tenant = whom.removeprefix("tenant/")
    return caller_named(limit_id) if tenant == whom else ("tenant", tenant)


def _filling(waiting: Mapping[WhomT, int], window: int) -> list[WhomT]:
    """Return those with at least their share of half the window."""
    return [one for one, count in waiting.items() if 2 * count * len(waiting) >= window]


_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 4.0


async def stored_pictures(blobs: Blobs, pictures: Iterable[Media]) -> tuple[OutputFile, ...]:
    """Store images as the files of a record. Raises StoreUnavailable if the blob store is
    unavailable for long."""
    files = []
    for picture in pictures:
        key = await _put(blobs, picture.data)
        kind, data = picture.mime_type, picture.data
        files.append(OutputFile(new_id(), kind, len(data), key, picture.name))
    return tuple(files)


async def _put(blobs: Blobs, data: bytes) -> str:
    pause_s = _FIRST_PAUSE_S
    while True:
        key = new_key(datetime.now(UTC))
        try:
            await blobs.put(key, data)
            return key
        except StoreUnavailable:
            if pause_s > _LONGEST_PAUSE_S:
                raise
        await asyncio.sleep(pause_s)
        pause_s *= 2


_UNAVAILABLE_WAIT_S = 0.25
_FULL_WAIT_S = 0.25
_OUT_WAIT_S = 0.25
# A claim costs PostgreSQL the same for one job as for a hundred, mostly for planning. Frequent
# claims wait to claim more together, and take at most a quarter of the time.
_REST_OF_CLAIM, _LONGEST_REST_S = 3, 0.02
# After so long a single free place is filled, by a job whose deadline may be near.
_GATHER_S = 1.0
_LONGEST_CLAIM_S = 120.0  # each statement has a deadline: a longer claim never ends
_LAST_TRY_WAITS_MS = 1_000, 10_000


async def forever(step: Callable[[], Awaitable[None]], rest: Callable[[], Awaitable[None]]) -> None:
    """Repeat a step, with a rest after each, until cancelled. Unforeseen errors are logged."""
    while True:
        try:
            await step()
        except StoreUnavailable as unavailable:
            log.debug(Log.STORE_AWAY, detail=unavailable.message)
        except Exception:  # the top of a task: logged, and the loop starts again
            log.exception(Log.WORKER_LOOP_FAILED)
        await rest()


async def run_loops(stop: asyncio.Event, loops: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run loops until `stop` is set or this is cancelled, and cancel them then."""
    tasks = [asyncio.create_task(loop) for loop in loops]
    try:
        await stop.wait()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run_until(
    stop: asyncio.Event,
    loops: Iterable[Coroutine[Any, Any, None]],
    in_hand: Mapping[UUID, asyncio.Task[None]],
    *,
    grace_ms: int,
    leave: Callable[[], Awaitable[None]],
) -> None:
    """Run loops until `stop` is set. Tasks that are `in_hand` then may end within the grace period;
    the others are cancelled. `leave` then releases the leases of this process."""
    try:
        await run_loops(stop, loops)
    finally:
        last = set(in_hand.values())
        if last:
            await asyncio.wait(last, timeout=grace_ms / 1000)
        for task in last:
            task.cancel()
        await asyncio.gather(*last, return_exceptions=True)
        try:
            await leave()
        except StoreUnavailable as unavailable:  # other processes wait for the lease to expire
            log.debug(Log.STORE_AWAY, detail=unavailable.message)


def crowded(at_work: Iterable[asyncio.Task[None]], at_once: int) -> list[str]:
    """Return the upstreams that may get no more of `at_once` slots: those with at least as many
    tasks (by task name) as there are free slots. So an unresponsive upstream leaves slots for the
    others."""
    counts = Counter(task.get_name() for task in at_work)
    free = at_once - counts.total()
    return [upstream for upstream, count in counts.items() if count >= free]


class Claimed(Protocol):
    """A job or batch line that this process has claimed. lapses: workers that died while calling
    it."""

    @property
    def request_id(self) -> UUID: ...

    @property
    def lapses(self) -> int: ...


ClaimedT = TypeVar("ClaimedT", bound=Claimed)


class LastTries:
    """Calls one at a time the jobs and lines that fail for good if one more worker dies: a call
    that only ran beside a deadly one must not die with it again. One per process."""

    def __init__(self) -> None:
        self._under_way: UUID | None = None

    def begin(self, one: Claimed) -> None:
        """Begin a last attempt before the call is marked as possibly made; `over` ends it. Raises
        LastTryWaits."""
        if one.lapses < MAX_LAPSES - 1 or self._under_way == one.request_id:
            return
        if self._under_way is not None:
            message = "a call whose workers died is tried alone, and another such call is under way"
            raise LastTryWaits(message, retry_after_ms=random.randint(*_LAST_TRY_WAITS_MS))
        self._under_way = one.request_id

    def over(self, one: Claimed) -> None:
        """End an attempt: its result is recorded, or it was not made."""
        if self._under_way == one.request_id:
            self._under_way = None


@dataclass(eq=False, repr=False)
class Feeder(Generic[ClaimedT]):
    """Claims jobs or lines of one lane, at most `window` at a time; `tasks` work on them.

    claim: claims up to a number. waits_ms: when to claim again those that no upstream can take;
    release: returns claims to the queue, those in its second argument for so long. idle_ms: the
    longest wait for a notification. passes_over: whether the last claim skipped some that may soon
    be claimed.
    """

    notifications: Notifications
    lane: str
    held: Held
    depth: ClaimDepth
    window: Callable[[], int]
    claim: Callable[[int], Awaitable[list[ClaimedT]]]
    waits_ms: Callable[[Sequence[ClaimedT]], Mapping[UUID, int]]
    release: Callable[[Sequence[ClaimedT], Mapping[UUID, int]], Awaitable[None]]
    work: Callable[[ClaimedT], Coroutine[Any, Any, None]]
    idle_ms: int
    passes_over: Callable[[], bool] = lambda: False
    tasks: dict[asyncio.Task[None], ClaimedT] = field(default_factory=dict)
    _slot_freed: asyncio.Event = field(default_factory=asyncio.Event)
    _closing: asyncio.Event = field(default_factory=asyncio.Event)

    def __repr__(self) -> str:
        return f"<Feeder {self.lane}: {len(self.tasks)} of {self.window()}>"

    def needs_room(self) -> int:
        """Return how many tasks must end before the next claim, within a second of the last."""
        window = self.window()
        return max(0, len(self.tasks) + max(1, window // 4) - window)

    def close(self) -> None:
        """Stop claiming. A claim in progress is completed, and its tasks are started."""
        self._closing.set()

    async def run(self) -> None:
        """Claim and start tasks until closed; tasks in progress continue.

        A claim that is cancelled midway is released later as a stray. Raises TimeoutError for a
        claim that does not end, since heartbeats would hide that nothing is claimed.
        """
        began = -math.inf
        while not self._closing.is_set():
            free = self.window() - len(self.tasks)
            if free < 1 or (self.needs_room() and time.monotonic() - began < _GATHER_S):
                self._slot_freed.clear()
                # Or the window has grown with a raised limit.
                await self._unless_closed(self._slot_freed.wait(), _FULL_WAIT_S)
                continue
            if not (free := self.held.may_claim(free)):
                await self._unless_closed(asyncio.sleep(_OUT_WAIT_S))
                continue
            mark = self.notifications.work_mark(self.lane)
            most, began = self.depth.at(free), time.monotonic()
            try:
                async with asyncio.timeout(_LONGEST_CLAIM_S):
                    claimed = await self.claim(most)
            except StoreUnavailable:
                # The store logs its change of state.
                self.held.outages.unclaimed()
                await self._unless_closed(asyncio.sleep(_UNAVAILABLE_WAIT_S))
                continue
            waits_ms = self.waits_ms(claimed)
            ready = [one for one in claimed if one.request_id not in waits_ms]
            if not ready:
                self.held.outages.unclaimed()
            rest_s = self.depth.found(held=len(waits_ms), free=len(ready))
            for one in await self._without_held(claimed, ready[:free], waits_ms):
                self._start(one)
            if rest_s:
                await self._unless_closed(asyncio.sleep(rest_s))
            # A claim is bounded in bytes too: a nearly full one may have left some.
            elif len(claimed) < max(1, most // 2):
                if len(claimed) > 1:
                    took_s = time.monotonic() - began
                    rest_s = min(_REST_OF_CLAIM * took_s, _LONGEST_REST_S)
                    await self._unless_closed(asyncio.sleep(rest_s))
                idle_ms = self.idle_ms if claimed else PULSED_MS
                if self.passes_over():
                    idle_ms = round(_FULL_WAIT_S * 1000)
                await self._unless_closed(self.notifications.wait_work(idle_ms, mark, self.lane))

    async def _without_held(
        self, claimed: list[ClaimedT], chosen: list[ClaimedT], waits_ms: Mapping[UUID, int]
    ) -> list[ClaimedT]:
        """Return to the queue what is held, and what a wider claim brought beyond the window."""
        if len(chosen) < len(claimed):
            ids = {one.request_id for one in chosen}
            try:
                await self.release([one for one in claimed if one.request_id not in ids], waits_ms)
            except StoreUnavailable:
                return claimed  # none is lost: their tasks wait for PostgreSQL
        return chosen

    async def _unless_closed(
        self, wait: Coroutine[Any, Any, object], timeout_s: float | None = None
    ) -> None:
        tasks = [asyncio.ensure_future(wait), asyncio.ensure_future(self._closing.wait())]
        try:
            await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def _start(self, one: ClaimedT) -> None:
        task = asyncio.create_task(self.work(one))
        self.tasks[task] = one
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.pop(task)
        self._slot_freed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error(Log.INTERNAL_ERROR, exc_info=error)
