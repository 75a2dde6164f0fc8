"""Worker: claims jobs, runs each through the spine, records its end.

Each kind has its own bounded window of claimed jobs, so that a full limit of one kind does not
delay another. Large bodies of wrapped calls are read when they are called, a bounded number of
bytes per kind. Images of an answer are written to the blob store before the end is recorded.

Invariants: every write about a job is fenced by its claim; a job that this process cannot finish is
returned to the queue, never dropped; a cancellation is only effective while the call is open.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from functools import partial
from uuid import UUID

from tidegate.call import DEFAULT_POOL, Call, Kind, Status, Tier, new_id
from tidegate.errors import (
    CallPreempted,
    ClaimLost,
    DeadlineExceeded,
    FetchFailed,
    InvalidRequest,
    NotFound,
    StoreUnavailable,
    TidegateError,
    UpstreamUnavailable,
)
from tidegate.jobs.background import BackgroundRunner
from tidegate.jobs.batches import BatchRunner
from tidegate.jobs.calls import (
    NOT_THE_JOBS_FAULT,
    Feeder,
    Lacking,
    LastTries,
    OwnLimits,
    ask_of,
    caller_of,
    internal,
    is_of_upstream,
    key_of,
    log_end,
    places_of,
    record_of,
    retry_wait_ms,
    run_wrapped,
    status_of,
    stored_pictures,
    time_left_ms,
    uncounted_wait_ms,
    until_review,
)
from tidegate.jobs.outages import ClaimDepth, Held, Key, Outages, PutOff, Turn
from tidegate.jobs.provider_batches import ProviderBatchRunner
from tidegate.jobs.tiers import TierOffers
from tidegate.limiter import Concurrency, Limiter, Permit, PoolPolicy
from tidegate.record import RETRIED, CallRecord, Failure
from tidegate.settings import Config
from tidegate.spine.models import is_lacking
from tidegate.spine.native import Relay
from tidegate.spine.prompt import PromptCalls, files_known
from tidegate.spine.routing import Target
from tidegate.spine.run import MOST_TRIES, Terms
from tidegate.store.blobs import Blobs
from tidegate.store.jobs import CANCELLED
from tidegate.store.notifications import UNSURE, ServerClock, Sign, next_beat_s
from tidegate.store.queue import Callers
from tidegate.store.records import ClaimedJob, FailedTry
from tidegate.store.statistics import OpenJobs
from tidegate.store.store import Store
from tidegate.telemetry.logging import Log, get_logger
from tidegate.telemetry.tracing import parent_of

# Delay between the starts of the loops, so that they do not all query at the same moment.
_STAGGERED_S = 0.015
_IDLE_WAIT_MS = 1_000


Tasks = dict[asyncio.Task[None], ClaimedJob]


class Stage(Enum):
    """The progress of a job in this process, which decides what a stop or a cancellation does to
    it."""

    WAITING = auto()  # returned to the queue immediately
    CALLING = auto()  # admitted: may end within the grace period
    RECORDING = auto()  # the call has ended: must not be repeated, and takes only a moment


class Stages:
    """The stages of the jobs in `tasks`; a job without an entry is waiting."""

    def __init__(self, tasks: Callable[[], Tasks]) -> None:
        self.tasks = tasks
        self._stages: dict[tuple[object, int], Stage] = {}
        self._called_off: set[tuple[object, int]] = set()

    def enter(self, job: ClaimedJob, stage: Stage) -> None:
        self._stages[_key(job)] = stage

    def leave(self, job: ClaimedJob) -> None:
        """Forget the job's stage: it waits again, or this process has finished it."""
        self._stages.pop(_key(job), None)
        self._called_off.discard(_key(job))

    def at(self, *stages: Stage) -> Tasks:
        return {
            task: job
            for task, job in self.tasks().items()
            if self._stages.get(_key(job), Stage.WAITING) in stages
        }

    def call_off(self, task: asyncio.Task[None], job: ClaimedJob) -> None:
        """Cancel the call of a job in stage CALLING, as its owner requested."""
        if _key(job) not in self._called_off:
            self._called_off.add(_key(job))
            task.cancel()

    def is_called_off(self, job: ClaimedJob) -> bool:
        return _key(job) in self._called_off


def _key(job: ClaimedJob) -> tuple[object, int]:
    return job.request_id, job.claim


def end_cancelling() -> None:
    """Clear the cancellation that ended the current task's call; the task continues."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


class Room:
    """A budget of `most_bytes`, granted in order of arrival. A larger request is granted when it is
    alone."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held_bytes = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def of(self, size_bytes: int) -> AsyncIterator[None]:
        """Wait for so many bytes, and hold them within the block. Safe to cancel."""
        async with self._turn:
            while self._held_bytes and self._held_bytes + size_bytes > self._most_bytes:
                self._freed.clear()
                await self._freed.wait()
            self._held_bytes += size_bytes
        try:
            yield
        finally:
            self._held_bytes -= size_bytes
            self._freed.set()


class CallBodies:
    """Bodies of the wrapped calls that a worker makes."""

    def __init__(self, blobs: Blobs, most_bytes: int, clock: ServerClock) -> None:
        self._blobs, self._clock = blobs, clock
        # One budget per kind, since the calls of one kind may wait for long.
        self._rooms = {kind: Room(most_bytes // len(Kind)) for kind in Kind}

    @asynccontextmanager
    async def of(self, job: ClaimedJob, kind: Kind) -> AsyncIterator[bytes]:
        """Context with the body of a call. Raises DeadlineExceeded, StoreUnavailable, and NotFound
        if its bytes were deleted."""
        if not job.attachments:
            yield job.prompt.encode()
            return
        (attachment,) = job.attachments
        left_ms = time_left_ms(job, self._clock)
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(None if left_ms is None else left_ms / 1000):
                    await held.enter_async_context(self._rooms[kind].of(attachment.size_bytes))
            except TimeoutError:
                message = "the deadline passed while the job waited for room for its body"
                raise DeadlineExceeded(message, limit=kind.limit) from None
            try:
                body = await self._blobs.get(attachment.blob_key)
            except NotFound:
                raise NotFound("the stored body of this call was deleted") from None
            yield body


_LANES: tuple[Kind | None, ...] = (None, *Kind)
_UNSURE_WINDOW, _LARGEST_WINDOW = 16, 256
_IN_USE_S = 60.0
_STORE_POLL_S = 0.25
_LAST_CLAIM_S, _LAST_RECORDS_S = 1.0, 8.0
_CANCELS_EVERY_S = 1.0
_MADE_ROOM_MS = 2_000
_NEVER = datetime.max.replace(tzinfo=UTC)

log = get_logger()


def of_the_largest(
    own: Tasks,
    count: Counter[Hashable],
    most: int,
    whose: Callable[[ClaimedJob], Hashable] = lambda job: job.tenant_id,
) -> Iterator[tuple[asyncio.Task[None], ClaimedJob]]:
    """Yield at most `most` of these waiting jobs, each time of the owner (`whose`, by default the
    tenant) with the highest `count`, which is decremented: the lowest priority first, then the
    latest deadline, then the newest."""
    newest = list(own.items())[::-1]
    left = dict(sorted(newest, key=lambda one: _urgency(one[1]), reverse=True))
    while left and most > 0:
        owners = set(map(whose, left.values()))
        owner = max((one for one in count if one in owners), key=count.__getitem__)
        task, job = next((task, job) for task, job in left.items() if whose(job) == owner)
        del left[task]
        count[owner] -= 1
        most -= 1
        yield task, job


def _urgency(job: ClaimedJob) -> tuple[int, datetime]:
    return -job.priority, job.deadline_at or _NEVER


def _room_of(policy: PoolPolicy) -> int:
    """Return the greatest number of concurrent calls that an upstream's limits allow."""
    limits = [Concurrency(one) if isinstance(one, int) else one for one in policy.limits.values()]
    return max(
        (
            one.bound
            for one in limits
            if isinstance(one, Concurrency) and not (one.by_tokens or one.shadow)
        ),
        default=_LARGEST_WINDOW,
    )


class _JobRun:
    """One call of a job, over all its attempts. `turn`: held while an upstream is out.
    `is_marked`: the call is recorded as possibly made. `failed`: the previous attempt, until it
    is recorded too. `counted_tries`: attempts at other upstreams before the last that use up an
    attempt of the job."""

    def __init__(
        self, worker: Worker, job: ClaimedJob, kind: Kind, record: CallRecord, model: str
    ) -> None:
        self._worker = worker
        self.job, self.kind, self.record, self.model = job, kind, record, model
        self.turn: Turn | None = None
        self.failed: FailedTry | None = None
        self.is_marked = False
        self.counted_tries = 0

    async def admitted(self, permit: Permit | None) -> None:
        """Mark the call before it is made. Raises ClaimLost, StoreUnavailable, LastTryWaits, and
        UpstreamUnavailable while another call probes the upstream."""
        record = self.record
        self._worker.last_tries.begin(self.job)
        if self.turn is None:
            self.turn = self._worker.turn_of(self.job)
        if (error := record.failed) is not None:  # the call moves to another upstream
            record.failed = None
            self.failed = FailedTry(
                next_id=new_id(),
                finished_at=record.ended_at,
                upstream_ms=record.upstream_ms or 0.0,
                failure=Failure.of(error),
                is_counted=not error.of_upstream,
            )
            self.counted_tries += self.failed.is_counted
        await self._worker.mark(self.job, record, self.failed)
        self.failed, self.is_marked = None, True


class Worker:
    """One process's share of the queue of a pool."""

    def __init__(
        self,
        *,
        config: Config,
        store: Store,
        blobs: Blobs,
        limiter: Limiter,
        prompts: PromptCalls,
        relay: Relay,
        pool: str = DEFAULT_POOL,
    ) -> None:
        self._relay, self._spine = relay, relay.spine
        self._pool, self._clock = pool, store.notifications.clock
        self._provider_batches = ProviderBatchRunner(
            config, store, blobs, relay, prompts, lambda *of: self._offers.leaves_at(*of)
        )
        self._offers = TierOffers(
            config,
            OpenJobs(store.connections, pool),
            self._places_of,
            self._spine.account,
            taken_in=self._provider_batches.taken_in,
            usual_batches=store.provider_batches.usual_ms,
            now=self._clock.now,
        )
        self._outages = outages = Outages(self._spine.health)
        self._put_off = PutOff(store, Held(outages, self._spine.health), self._targets_of)
        self.last_tries = LastTries()
        self._lacking, self._own_limits = Lacking(), OwnLimits(self._limiters)
        held = self._put_off.held
        batches = BatchRunner(
            config, store, blobs, relay, held, self.last_tries, self._own_limits, self._offers
        )
        background = BackgroundRunner(config, store, relay)
        runners = (batches.run, self._provider_batches.run, background.run)
        self._runners = runners if pool == DEFAULT_POOL else ()
        self._config, self._store, self._blobs = config, store, blobs
        self._bodies = CallBodies(blobs, config.max_held_bytes, self._clock)
        self._limiter, self._prompts = limiter, prompts
        self._stages = Stages(self._tasks)
        # When each upstream was last called for jobs of a kind.
        self._called_at: dict[Kind, dict[str, float]] = {kind: {} for kind in Kind}
        self._beating = asyncio.Lock()
        self._feeders = [
            Feeder(
                store.notifications,
                kind or UNSURE,
                held,
                ClaimDepth(),
                partial(self._window, kind),
                claim=partial(self._claim, kind),
                waits_ms=self._put_off.waits_ms,
                release=self._put_off.release,
                work=self._classify if kind is None else self._work,
                idle_ms=_IDLE_WAIT_MS,
                passes_over=partial(self._passes_over, kind),
            )
            for kind in _LANES
        ]

    async def _claim(self, kind: Kind | None, most: int) -> list[ClaimedJob]:
        await self._lacking.yield_claim()
        return await self._store.queue.claim(self._pool, kind, most, self._full_of(kind))

    def _limiters(self) -> set[Limiter]:
        return {self._limiter, *(gate.limiter for gate in self._spine.health.values())}

    def _held_by_own(self, kind: Kind | None) -> Tasks:
        """Return the jobs of a kind that wait for limits of their own keys, users or
        conversations."""
        if kind is None or not self._own_limits:
            return {}
        waiting, tasks = self._stages.at(Stage.WAITING), self._feeders[_LANES.index(kind)].tasks
        return {
            task: job for task, job in tasks.items() if task in waiting and self._own_limits.of(job)
        }

    def _full_of(self, kind: Kind | None) -> dict[str, Callers]:
        held = self._held_by_own(kind)
        return self._own_limits.filling(held.values(), self._usual_window(kind)) if held else {}

    def _passes_over(self, kind: Kind | None) -> bool:
        return bool(self._full_of(kind))

    def _window(self, kind: Kind | None) -> int:
        """Return the window of a kind, enlarged by the jobs that wait for limits of their own."""
        usual = self._usual_window(kind)
        return usual + min(usual, len(self._held_by_own(kind)))

    def _usual_window(self, kind: Kind | None) -> int:
        if kind is None:
            return _UNSURE_WINDOW
        limit, now = self._limiter.policy.limit(kind.limit), time.monotonic()
        if limit is not None and limit.shadow:
            return _LARGEST_WINDOW
        bound = 0 if limit is None else limit.bound
        for name, called_at in self._called_at[kind].items():
            gate = self._spine.health.get(name)
            elsewhere = gate is not None and gate.limiter is not self._limiter
            if gate is not None and elsewhere and now - called_at < _IN_USE_S:
                bound += _room_of(gate.limiter.policy)
        # Twice the limits in force, so that they stay full even if all other workers are gone.
        return min(_LARGEST_WINDOW, 2 * bound + 2)

    def _targets_of(self, job: ClaimedJob) -> tuple[Key, ...]:
        """Return the upstreams that a job may call, each with its model."""
        return tuple(map(key_of, self._places_of(job)))

    def _places_of(self, job: ClaimedJob) -> list[Target]:
        if job.endpoint is not None:
            return places_of(self._relay, job.endpoint, job.model or "", job.bound_upstream)
        kind = job.classification.kind
        try:
            if kind is None:
                return self._prompts.targets(self._config.classifier_model)
            files = files_known(job.attachments, job.image_uri)
            model = job.model or self._config.model_for(kind)
            return self._prompts.targets(model, kind, files, job.bound_upstream)
        except (InvalidRequest, NotFound):
            return []

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then finish running jobs within the grace, and return the
        rest."""
        beat_s = self._config.claim_lease_ms / 3000
        store = self._store
        await self._store_tolerant(store.queue.heartbeat)
        each_beat = (self._beat, store.queue.retake_expired)
        store.notifications.pool = self._pool
        when_due: tuple[tuple[Sign, Callable[[], Awaitable[object]]], ...] = (
            ("ripe", store.queue.maintain),
            ("overdue", store.queue.expire_due),
            ("cancelled", store.queue.cancel_returned),
        )
        for_held = (self._leave_held, self._put_off.bring_back, self._share_windows)
        loops = [
            *(feeder.run for feeder in self._feeders),
            *(self._every(beat_s, one) for one in each_beat),
            *(self._when_due(sign, one) for sign, one in when_due),
            *(self._every(1.0, one) for one in for_held),
            self._spine.preemption.run,
        ]
        tasks = [
            asyncio.create_task(self._forever(loop, number * _STAGGERED_S))
            for number, loop in enumerate(loops)
        ]
        # Starts with the first claim: a job cancelled earlier would keep waiting for its permit.
        tasks.append(asyncio.create_task(self._forever(self._watch_cancels, 0)))
        running = [asyncio.create_task(run(stop)) for run in self._runners]
        try:
            await stop.wait()
        finally:
            # Heartbeats continue until the last jobs have finished: else their claims would expire.
            await self._close_feeders(tasks[: len(self._feeders)])
            await self._drain()
            await asyncio.gather(*running)
            # An interrupted heartbeat could reach the record after `leave` below.
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_CLAIM_S):
                    await self._beating.acquire()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for last in (self._put_off.bring_all_back, self._store.queue.leave):
                await self._store_tolerant(last)

    async def _beat(self) -> None:
        async with self._beating:
            await self._store.queue.heartbeat()

    async def _close_feeders(self, running: list[asyncio.Task[None]]) -> None:
        """Stop claiming without cancelling, so that jobs just claimed are returned immediately."""
        for feeder in self._feeders:
            feeder.close()
        await asyncio.wait(running, timeout=_LAST_CLAIM_S)
        for task in running:
            task.cancel()

    async def _drain(self) -> None:
        """Return jobs that were not admitted, then wait for the others until the grace period
        ends."""
        await self._give_up(self._stages.at(Stage.WAITING))
        if running := list(self._tasks()):
            await asyncio.wait(running, timeout=self._config.shutdown_grace_ms / 1000)
        await self._give_up(self._stages.at(Stage.WAITING, Stage.CALLING))
        if recording := list(self._tasks()):
            await asyncio.wait(recording, timeout=_LAST_RECORDS_S)

    def _tasks(self) -> Tasks:
        return {task: job for feeder in self._feeders for task, job in feeder.tasks.items()}

    async def _leave_held(self) -> None:
        waiting = self._stages.at(Stage.WAITING)
        ms = self._put_off.waits_ms(waiting.values())
        await self._give_up(
            {task: job for task, job in waiting.items() if job.request_id in ms}, ms
        )

    async def _share_windows(self) -> None:
        """Return jobs to the queue for a while, if waiting jobs fill the window of a kind, such as
        at a limit of their own tenant, and another tenant has none in it: the newest of the tenants
        with the most jobs, as many as the next claim needs. Likewise if more jobs wait for limits
        of their own keys, users or conversations than the window holds."""
        if self._own_limits or any(feeder.needs_room() for feeder in self._feeders[1:]):
            await self._own_limits.look()
        waiting = self._stages.at(Stage.WAITING)
        for kind, feeder in zip(Kind, self._feeders[1:], strict=True):
            tenants = [job.tenant_id for job in feeder.tasks.values()]
            count: Counter[Hashable] = Counter(tenants)
            over, given = feeder.needs_room(), Tasks()
            if over and self._store.queue.has_others(self._pool, kind, tenants):
                own = {task: job for task, job in feeder.tasks.items() if task in waiting}
                given = dict(of_the_largest(own, count, over))
            elif over and len(held := self._held_by_own(kind)) > self._usual_window(kind):
                count = Counter(map(self._own_limits.of, held.values()))
                given = dict(of_the_largest(held, count, over, self._own_limits.of))
            waits_ms = {job.request_id: _MADE_ROOM_MS for job in given.values()}
            await self._give_up(given, waits_ms, self._store.queue.release)

    async def _give_up(
        self,
        given: Tasks,
        waits_ms: Mapping[UUID, int] | None = None,
        release: Callable[..., Awaitable[None]] | None = None,
    ) -> None:
        if not given:
            return
        for task in given:
            task.cancel()
        await asyncio.wait(given)
        # A job whose task has ended meanwhile is skipped, since its claim has changed.
        back = release or self._put_off.release
        await self._store_tolerant(lambda: back([*given.values()], waits_ms))

    async def _watch_cancels(self) -> None:
        """End jobs that their owners have cancelled, within a second."""
        while True:
            timeout_ms = next_beat_s(_CANCELS_EVERY_S) * 1000
            notified = await self._store.notifications.wait_cancels(timeout_ms)
            own_ids = {job.request_id for job in self._tasks().values()}
            if own_ids:
                await self._store_tolerant(partial(self._end_cancelled, notified & own_ids))

    async def _end_cancelled(self, notified: set[UUID]) -> None:
        cancelled = await self._store.jobs.to_cancel(notified)
        for task, job in self._stages.at(Stage.CALLING).items():
            if job.request_id in cancelled:
                self._stages.call_off(task, job)
        waiting = self._stages.at(Stage.WAITING).items()
        await self._give_up({task: job for task, job in waiting if job.request_id in cancelled})

    async def _classify(self, job: ClaimedJob) -> None:
        """Classify a job of unknown kind and queue it under the decided kind."""

        async def classify() -> None:
            try:
                turn = self._outages.enter(self._targets_of(job))
            except UpstreamUnavailable:
                waits_ms = {job.request_id: self._put_off.wait_ms(job)}
                await self._fenced(lambda: self._put_off.release([job], waits_ms))
                return
            try:
                left_ms = time_left_ms(job, self._clock)
                decided = await self._prompts.decide(ask_of(job), within_ms=left_ms)
            finally:
                self._outages.left(turn)

            async def requeue() -> None:
                await self._store.queue.classified(job, decided)
                await self._store.queue.release([job])

            await self._fenced(requeue)

        await self._guarded(job, classify)

    async def _work(self, job: ClaimedJob) -> None:
        await self._guarded(job, lambda: self._run_and_record(job))

    async def _guarded(self, job: ClaimedJob, work: Callable[[], Awaitable[None]]) -> None:
        """Run a job's task; the job must not stay claimed once the task has ended."""
        try:
            await work()
        except Exception:  # the top of a task: logged, and the job ends as failed
            log.exception(Log.INTERNAL_ERROR, request_id=str(job.request_id))
            await self._end_unadmitted(job, record_of(job), internal())
        finally:
            self._stages.leave(job)
            self.last_tries.over(job)

    async def _placed(self, job: ClaimedJob, kind: Kind) -> ClaimedJob | None:
        """Return the job with its processing tier; None if it returned to the queue for the
        tier."""
        if not job.tiers_allowed and job.tier is None:
            return job
        recorded = job.tier
        while True:
            try:
                choice = await self._offers.choice(job, kind)
                if choice is not None and choice.tier is Tier.BATCH:
                    await self._provider_batches.put(job, choice)
                    return None
                if choice is None:
                    return job if job.tier is None else replace(job, tier=Tier.LIVE)
                job = replace(
                    job, tier=choice.tier, tier_why=choice.why, revisit_at=choice.revisit_at
                )
                if choice.tier is not recorded:
                    await self._store.jobs.placed(job)
                    recorded = choice.tier
                if choice.tier is Tier.FLEX:
                    wait_ms = await self._offers.wait_ms(job, kind, *self._targets_of(job))
                    if wait_ms:
                        await self._store.queue.release([job], {job.request_id: wait_ms})
                        return None
                return job
            except ClaimLost:
                return None
            except StoreUnavailable:
                await self._until_store_is_back()

    async def _run_and_record(self, claimed: ClaimedJob) -> None:
        kind = claimed.classification.kind
        assert kind is not None
        job = await self._placed(claimed, kind)
        if job is None:
            return
        record = record_of(
            job, self._spine.tracing.trail(job.request_id, parent_of(job.traceparent))
        )
        model = record.model = job.model or self._config.model_for(kind)
        targets = self._spine.targets
        if targets.deployment.missing and is_lacking(targets, model) and not self._places_of(job):
            # A worker that has the upstream's key claims it.
            waits_ms = {job.request_id: self._lacking.leave_ms()}
            await self._fenced(lambda: self._store.queue.release([job], waits_ms))
            return
        run = _JobRun(self, job, kind, record, model)
        failure: TidegateError | None = None
        try:
            await self._run_when_recorded(job, kind, run)
        except ClaimLost:
            self._outages.left(run.turn)
            return
        except TidegateError as error:
            failure = error
            if record.went_on_ms is not None:  # it was cancelled before it failed
                end_cancelling()
                failure = CANCELLED
        except asyncio.CancelledError:
            if not self._stages.is_called_off(job):
                self._outages.left(run.turn)
                raise
            end_cancelling()
            failure = CANCELLED
        except Exception:  # an unforeseen error: logged, and the attempt's result is recorded
            log.exception(Log.INTERNAL_ERROR, request_id=str(job.request_id))
            failure = internal()
        if isinstance(failure, CallPreempted):
            self._outages.left(run.turn)
        elif run.turn is not None or (failure is not None and is_of_upstream(failure)):
            turn = run.turn or Turn(self._targets_of(job))
            self._put_off.held.ended(turn, record.upstream, failure)
        # PostgreSQL may have the job as running before this process knows.
        if run.is_marked or failure is CANCELLED:
            self._stages.enter(job, Stage.RECORDING)
        else:
            record.admitted_at = None  # no call was made
        await self._record(job, record, failure, run.counted_tries)

    async def _make(self, run: _JobRun, left_ms: int | None) -> None:
        job, kind, record = run.job, run.kind, run.record
        caller, left = caller_of(job), partial(self._stages.is_called_off, job)
        if job.endpoint is not None:
            async with self._bodies.of(job, kind) as body:
                wrapped = partial(run_wrapped, self._relay, job, record, run.admitted, body=body)
                most, left_ms = self._config.max_attempts, time_left_ms(job, self._clock)
                await wrapped(caller=caller, max_attempts=most, left=left, left_ms=left_ms)
            return
        if kind is Kind.IMAGE_GENERATION and self._blobs.unavailable:
            await self._blobs.ping()  # an image that cannot be stored would be paid for in vain
        media, model = await self._prompts.media(ask_of(job)), run.model
        call = Call(job.request_id, job.prompt, kind, model, media, job.tenant_id, job.priority)
        if job.tier is Tier.FLEX:
            call = replace(call, tier=job.tier)
        terms = Terms(
            request_id=job.request_id,
            caller=caller,
            received=time.monotonic(),
            wait_ms=left_ms,
            priority=job.priority,
            trail=record.trail,
            repeats=False,
            most_tries=max(1, min(self._config.max_attempts - job.attempts, MOST_TRIES)),
            waits_out=True,
            subject=job.subject,
            conversation=job.conversation,
            has_own_deadline=left_ms is not None,
            left=left,
            upstream=job.bound_upstream,
        )
        await self._prompts.run(call, terms, record, None, run.admitted)

    def turn_of(self, job: ClaimedJob) -> Turn | None:
        """Take a turn for a job's call while an upstream is out. Raises UpstreamUnavailable."""
        return self._outages.enter(self._targets_of(job)) if self._outages.is_any else None

    async def mark(self, job: ClaimedJob, record: CallRecord, failed: FailedTry | None) -> None:
        """Record that a job's call is about to be made. Raises ClaimLost and StoreUnavailable."""
        self._stages.enter(job, Stage.CALLING)
        assert record.fence is not None
        kind = job.classification.kind
        if kind is not None and record.upstream is not None:
            self._called_at[kind][record.upstream] = time.monotonic()
        await self._store.queue.running(
            job,
            model=record.model or "",
            upstream=record.upstream,
            fence=record.fence,
            queue_ms=record.queue_ms or 0.0,
            failed=failed,
        )

    async def _run_when_recorded(
        self,
        job: ClaimedJob,
        kind: Kind,
        run: _JobRun,
    ) -> None:
        """Run the call; while PostgreSQL is unavailable, release the permit and wait."""
        while True:
            left_ms = time_left_ms(job, self._clock)
            if left_ms is not None and left_ms <= 0:
                raise DeadlineExceeded("the deadline passed while the job waited", limit=kind.limit)
            try:
                await until_review(job, self._clock, self._make(run, left_ms))
                return
            except StoreUnavailable:
                self._stages.leave(job)
                self.last_tries.over(job)
                run.record.begin_again()
                run.record.admitted_at = None
                await self._until_store_is_back()

    async def _record(
        self, job: ClaimedJob, record: CallRecord, error: TidegateError | None, counted: int
    ) -> None:
        """Record the result of a call. `counted`: earlier attempts that use up one of the job's."""
        if record.answer.pictures:
            try:
                record.files = await stored_pictures(self._blobs, record.answer.pictures)
            except StoreUnavailable as unavailable:
                error = error or unavailable
        failure = Failure.of(error) if error else None
        wait_ms, release = None, self._store.queue.release
        if error is not None:
            wait_ms = uncounted_wait_ms(error, time_left_ms(job, self._clock))
        if (of_tier_ms := self._offers.ended(job, record, error)) is not None:
            wait_ms = of_tier_ms
        elif error is not None and is_of_upstream(error):
            release, wait_ms = self._put_off.release, self._put_off.wait_ms(job)
        elif isinstance(error, FetchFailed):  # before a call
            wait_ms = retry_wait_ms(error, job.attempts + 1, self._config.max_attempts)
        is_counted = wait_ms is None
        if not record.was_admitted:
            assert error is not None
            if wait_ms is not None:
                waits_ms = {job.request_id: wait_ms} if wait_ms else None
                await self._fenced(lambda: release([job], waits_ms, failure))
                return
            if isinstance(error, NOT_THE_JOBS_FAULT):
                await asyncio.sleep(_STORE_POLL_S)
                await self._fenced(lambda: self._store.queue.release([job]))
                return
            await self._end_unadmitted(job, record, error)
        else:
            if error is not None and is_counted:
                made = job.attempts + counted + 1
                wait_ms = retry_wait_ms(error, made, self._config.max_attempts)
            await self._end(job, record, failure, wait_ms, is_counted)
            if wait_ms is not None and is_of_upstream(error):
                self._put_off.note(job, wait_ms)
        log_end(job, record, failure, wait_ms)

    async def _end_unadmitted(
        self, job: ClaimedJob, record: CallRecord, error: TidegateError
    ) -> None:
        expired = isinstance(error, DeadlineExceeded)
        record.end(Status.EXPIRED if expired else Status.FAILED, Failure.of(error))
        await self._fenced(lambda: self._store.queue.fail_unadmitted(job, record))

    async def _end(
        self,
        job: ClaimedJob,
        record: CallRecord,
        failure: Failure | None,
        wait_ms: int | None,
        is_counted: bool,
    ) -> None:
        """Record the end of an attempt: of the job, or with `wait_ms` until its next attempt."""
        if wait_ms is not None:
            at = self._clock.now() + timedelta(milliseconds=wait_ms) if wait_ms else None
            record.end(RETRIED, failure)
            await self._fenced(lambda: self._store.queue.retry(job, record, at, is_counted))
        else:
            record.end(status_of(failure), failure)
            await self._fenced(lambda: self._store.queue.finish(job, record))

    async def _fenced(self, write: Callable[[], Awaitable[None]]) -> None:
        """Make a fenced write, waiting for PostgreSQL if necessary; ignore a lost claim."""
        while True:
            try:
                await write()
                return
            except ClaimLost:
                return
            except StoreUnavailable:
                await self._until_store_is_back()

    async def _until_store_is_back(self) -> None:
        while True:
            await asyncio.sleep(_STORE_POLL_S)
            with suppress(StoreUnavailable):
                await self._store.connections.ping(1_000)
                return

    async def _store_tolerant(self, call: Callable[[], Awaitable[object]]) -> None:
        """Make a write that may be skipped while PostgreSQL is unavailable: a later one repeats
        it."""
        try:
            await call()
        except StoreUnavailable as unavailable:
            log.debug(Log.STORE_AWAY, detail=unavailable.message)

    def _every(
        self, seconds: float, call: Callable[[], Awaitable[object]]
    ) -> Callable[[], Awaitable[None]]:
        async def loop() -> None:
            while True:
                await self._store_tolerant(call)
                await asyncio.sleep(next_beat_s(seconds))

        return loop

    def _when_due(
        self, sign: Sign, call: Callable[[], Awaitable[object]]
    ) -> Callable[[], Awaitable[None]]:
        """Return a loop that runs `call` when `sign` is due; True from `call` means there is
        more."""

        async def loop() -> None:
            while True:
                try:
                    is_more = await call() is True
                except StoreUnavailable as unavailable:
                    log.debug(Log.STORE_AWAY, detail=unavailable.message)
                    is_more = True
                await (asyncio.sleep(1.0) if is_more else self._store.notifications.due(sign))

        return loop

    async def _forever(self, loop: Callable[[], Awaitable[None]], after_s: float) -> None:
        """Restart a loop after unforeseen errors, which are logged, until it ends by itself."""
        await asyncio.sleep(after_s)
        while True:
            try:
                await loop()
                return
            except Exception:  # the top of a task: logged, and the loop starts again
                log.exception(Log.WORKER_LOOP_FAILED)
                await asyncio.sleep(1)
