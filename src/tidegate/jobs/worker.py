"""A worker: takes jobs, runs each through the spine, and records how it ended.

Invariant: every write about a job is fenced by its claim, so that a worker that lost its claim
changes nothing; a job that this process can't finish is handed back or retaken, never dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID

from tidegate.attempt import Attempt, attempt_result
from tidegate.call import DEFAULT_POOL, Call, Kind
from tidegate.config import Config
from tidegate.errors import (
    ClaimLost,
    DeadlineExceeded,
    StoreUnavailable,
    TidegateError,
    UpstreamUnavailable,
)
from tidegate.jobs.batch_runner import BatchRunner
from tidegate.jobs.bodies import CallBodies
from tidegate.jobs.ends import ask_of, internal, log_end, payer_of, status_of, time_left_ms
from tidegate.jobs.feeder import Feeder
from tidegate.jobs.held import Held
from tidegate.jobs.outages import Key, Outages, Turn
from tidegate.jobs.pictures import kept
from tidegate.jobs.put_off import PutOff
from tidegate.jobs.retry import NOT_THE_JOBS_FAULT, is_of_upstream, retry_wait_ms, spent_wait_ms
from tidegate.jobs.stages import Stage, Stages, Tasks, end_cancelling
from tidegate.jobs.wrapped import run_wrapped, targets_of
from tidegate.limiter import Permit
from tidegate.pipeline import Pipeline
from tidegate.relay.spine import Relay
from tidegate.store.blobs import Blobs
from tidegate.store.cancels import CANCELLED
from tidegate.store.records import AttemptResult, ClaimedJob, Failure
from tidegate.store.states import Status
from tidegate.store.store import Store
from tidegate.telemetry import Log, get_logger
from tidegate.tracing import parent_of

_UNSURE_WINDOW, _LARGEST_WINDOW = 16, 256
_STORE_POLL_S = 0.25
_LAST_CLAIM_S, _LAST_RECORDS_S = 1.0, 8.0
_CANCELS_EVERY_MS = 1_000

log = get_logger()


class Worker:
    """One process's share of the queue of a pool."""

    def __init__(
        self,
        *,
        config: Config,
        store: Store,
        blobs: Blobs,
        pipeline: Pipeline,
        relay: Relay,
        pool: str = DEFAULT_POOL,
    ) -> None:
        self._relay = relay
        self._pool = pool
        self._outages = outages = Outages({pool, *relay.targets.upstreams})
        self._put_off = PutOff(store, Held(outages, relay.health), self._targets_of)
        batches = BatchRunner(config, store, blobs, relay, self._put_off.held)
        self._batches = batches.run if pool == DEFAULT_POOL else asyncio.Event.wait
        self._config = config
        self._store = store
        self._blobs = blobs
        self._bodies = CallBodies(blobs, config.max_held_bytes)
        self._pipeline = pipeline
        self._stages = Stages(self._tasks)
        feeder = partial(Feeder, store, self._put_off, pool)
        self._feeders = [
            feeder(None, lambda: _UNSURE_WINDOW, self._classify),
            *(feeder(kind, partial(self._window, kind), self._work) for kind in Kind),
        ]

    def _window(self, kind: Kind) -> int:
        # Twice the limit in force keeps it full even if every other worker is gone.
        return min(_LARGEST_WINDOW, 2 * self._pipeline.at_once(kind) + 2)

    def _targets_of(self, job: ClaimedJob) -> tuple[Key, ...]:
        """What may be called for a job: upstreams, each with its model."""
        if job.endpoint is not None:
            return targets_of(self._relay, job.endpoint, job.model or "")
        kind = job.classification.kind
        model = self._config.classifier_model if kind is None else self._config.model_for(kind)
        return ((self._pool, job.model or model),)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then finish what runs within the grace, hand back the rest."""
        beat_s = self._config.claim_lease_ms / 3000
        store = self._store
        await self._store_tolerant(store.heartbeat)
        each_beat = (store.heartbeat, store.retake_lapsed)
        each_second = (store.tend_queues, store.expire_due, store.cancels.cancel_returned)
        for_held = (self._leave_held, self._put_off.bring_back)
        loops = [
            *(self._forever(feeder.run) for feeder in self._feeders),
            *(self._forever(self._every(beat_s, one)) for one in each_beat),
            *(self._forever(self._every(1.0, one)) for one in (*each_second, *for_held)),
            self._forever(self._heed_cancels),
        ]
        tasks = [asyncio.create_task(loop) for loop in loops]
        batches = asyncio.ensure_future(self._batches(stop))
        try:
            await stop.wait()
        finally:
            # The heartbeat goes on while the last jobs finish, or their claims would lapse.
            await self._close_feeders(tasks[: len(self._feeders)])
            await self._drain()
            await batches
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for last in (self._put_off.bring_all_back, self._store.leave):
                await self._store_tolerant(last)

    async def _close_feeders(self, running: list[asyncio.Task[None]]) -> None:
        """Not by cancelling, if it can be helped: jobs just claimed are handed back at once."""
        for feeder in self._feeders:
            feeder.close()
        await asyncio.wait(running, timeout=_LAST_CLAIM_S)
        for task in running:
            task.cancel()

    async def _drain(self) -> None:
        """Hand back what has not been admitted, then wait for the rest until the grace is over."""
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

    async def _give_up(self, given: Tasks, waits_ms: Mapping[UUID, int] | None = None) -> None:
        if not given:
            return
        for task in given:
            task.cancel()
        await asyncio.wait(given)
        # A task that ended by itself meanwhile has moved its job on: the fence skips it.
        await self._store_tolerant(lambda: self._put_off.hand_back([*given.values()], waits_ms))

    async def _heed_cancels(self) -> None:
        """Give up, at the latest after a second, what its owners do not want any more."""
        while True:
            heard = await self._store.cancels.wait(_CANCELS_EVERY_MS)
            mine = {job.request_id for job in self._tasks().values()}
            if mine:
                await self._store_tolerant(partial(self._heed, heard & mine))

    async def _heed(self, heard: set[UUID]) -> None:
        asked = await self._store.cancels.asked(heard)
        for task, job in self._stages.at(Stage.CALLING).items():
            if job.request_id in asked:
                self._stages.call_off(task, job)
        waiting = self._stages.at(Stage.WAITING).items()
        await self._give_up({task: job for task, job in waiting if job.request_id in asked})

    async def _classify(self, job: ClaimedJob) -> None:
        """Settle the kind of a job that the rules were unsure of; it then queues under it."""

        async def classify() -> None:
            try:
                turn = self._outages.enter(self._targets_of(job))
            except UpstreamUnavailable:
                waits_ms = {job.request_id: self._put_off.wait_ms(job)}
                await self._fenced(lambda: self._put_off.hand_back([job], waits_ms))
                return
            try:
                decided = await self._pipeline.decide(ask_of(job), within_ms=time_left_ms(job))
            finally:
                self._outages.left(turn)

            async def requeue() -> None:
                await self._store.classified(job, decided)
                await self._store.hand_back([job])

            await self._fenced(requeue)

        await self._guarded(job, classify)

    async def _work(self, job: ClaimedJob) -> None:
        await self._guarded(job, lambda: self._run_and_record(job))

    async def _guarded(self, job: ClaimedJob, work: Callable[[], Awaitable[None]]) -> None:
        """The top of a job's task: a job must not stay claimed by a worker that is done with it."""
        try:
            await work()
        except Exception:
            log.exception(Log.INTERNAL_ERROR, request_id=str(job.request_id))
            await self._end_unadmitted(job, internal())
        finally:
            self._stages.leave(job)

    async def _run_and_record(self, job: ClaimedJob) -> None:
        kind = job.classification.kind
        assert kind is not None
        since = datetime.now(UTC) if job.was_called else job.created_at  # a retry has waited before
        trail = self._relay.tracing.trail(job.request_id, parent_of(job.traceparent))
        attempt = Attempt(waiting_since=since, trail=trail)
        model = job.model or self._config.model_for(kind)
        turn: Turn | None = None

        async def admitted(permit: Permit | None) -> None:
            nonlocal turn
            if turn is None and self._outages.is_any:
                turn = self._outages.enter(self._targets_of(job))
            self._stages.enter(job, Stage.CALLING)
            fence = (0, 0) if permit is None else permit.fence
            running = partial(self._store.running, job, model=model, failed=attempt.failed_try)
            await running(fence=fence, queue_ms=attempt.queue_ms)
            attempt.is_marked, attempt.failed_try = True, None

        async def run(left_ms: int | None) -> None:
            caller = await payer_of(job, self._config, self._store)
            if job.endpoint is not None:
                async with self._bodies.of(job, kind) as body:
                    wrapped = partial(run_wrapped, self._relay, job, attempt, admitted, body=body)
                    await wrapped(caller=caller, max_attempts=self._config.max_attempts)
                return
            if kind is Kind.IMAGE_GENERATION and self._blobs.away:
                await self._blobs.ping()  # a picture with nowhere to go would be paid for in vain
            media = await self._pipeline.media(ask_of(job))
            call = Call(job.request_id, job.prompt, kind, model, media, job.tenant_id, job.priority)
            await self._pipeline.run(call, attempt, None, caller, left_ms, admitted)

        failure: TidegateError | None = None
        try:
            await self._run_when_recorded(job, kind, attempt, run)
        except ClaimLost:
            self._outages.left(turn)
            return
        except TidegateError as error:
            failure = error
        except asyncio.CancelledError:
            if not self._stages.is_called_off(job):
                self._outages.left(turn)
                raise
            end_cancelling()
            failure = CANCELLED
        except Exception:  # nobody foresaw it; what the attempt has brought is recorded
            log.exception(Log.INTERNAL_ERROR, request_id=str(job.request_id))
            failure = internal()
        if turn is not None or is_of_upstream(failure):
            turn = turn or Turn(self._targets_of(job))
            self._outages.ended(turn, attempt.upstream, failure)
        if attempt.is_marked:
            self._stages.enter(job, Stage.RECORDING)
        else:
            attempt.admitted_at = None  # nothing was called
        await self._record(job, attempt, model, failure)

    async def _run_when_recorded(
        self,
        job: ClaimedJob,
        kind: Kind,
        attempt: Attempt,
        run: Callable[[int | None], Awaitable[None]],
    ) -> None:
        """Run the call; while PostgreSQL is away the permit goes back and is asked for again."""
        while True:
            left_ms = time_left_ms(job)
            if left_ms is not None and left_ms <= 0:
                raise DeadlineExceeded("its deadline came while it waited", limit=kind.limit)
            try:
                await run(left_ms)
                return
            except StoreUnavailable:
                self._stages.leave(job)
                attempt.admitted_at = None
                await self._until_store_is_back()

    async def _record(
        self, job: ClaimedJob, attempt: Attempt, model: str, error: TidegateError | None
    ) -> None:
        try:
            pictures = await kept(self._blobs, attempt.answer.pictures)
        except StoreUnavailable as away:
            error, pictures = error or away, ()
        failure = Failure.of(error) if error else None
        result = attempt_result(attempt, model, pictures, failure)
        wait_ms, hand_back = spent_wait_ms(error), self._store.hand_back
        if is_of_upstream(error):
            hand_back, wait_ms = self._put_off.hand_back, self._put_off.wait_ms(job)
        is_counted = wait_ms is None
        if result is None:
            assert error is not None
            if wait_ms is not None:
                waits_ms = {job.request_id: wait_ms}
                await self._fenced(lambda: hand_back([job], waits_ms, failure))
                return
            if isinstance(error, NOT_THE_JOBS_FAULT):
                await asyncio.sleep(_STORE_POLL_S)
                await self._fenced(lambda: self._store.hand_back([job]))
                return
            await self._end_unadmitted(job, error)
        else:
            if error is not None and is_counted:
                made = job.attempts + attempt.counted_tries + 1
                wait_ms = retry_wait_ms(error, made, self._config.max_attempts)
            await self._end(job, result, wait_ms, is_counted)
            if wait_ms is not None and is_of_upstream(error):
                self._put_off.note(job, wait_ms)
        log_end(job, attempt, failure, wait_ms)

    async def _end_unadmitted(self, job: ClaimedJob, error: TidegateError) -> None:
        status = Status.EXPIRED if isinstance(error, DeadlineExceeded) else Status.FAILED
        await self._fenced(lambda: self._store.fail_unadmitted(job, status, Failure.of(error)))

    async def _end(
        self, job: ClaimedJob, result: AttemptResult, wait_ms: int | None, is_counted: bool
    ) -> None:
        """Record the end of an attempt: the job's, or with `wait_ms` until the next attempt."""
        if wait_ms is not None:
            not_before = datetime.now(UTC) + timedelta(milliseconds=wait_ms)
            await self._fenced(lambda: self._store.retry(job, result, not_before, is_counted))
        else:
            await self._fenced(lambda: self._store.finish(job, status_of(result), result))

    async def _fenced(self, write: Callable[[], Awaitable[None]]) -> None:
        """Make a fenced write, waiting for PostgreSQL if need be; a lost claim ends it quietly."""
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
                await self._store.ping(1_000)
                return

    async def _store_tolerant(self, call: Callable[[], Awaitable[object]]) -> None:
        """Do what can be left out while PostgreSQL is away: it is repeated, or lapses by itself."""
        try:
            await call()
        except StoreUnavailable as away:
            log.debug(Log.STORE_AWAY, detail=away.message)

    def _every(
        self, seconds: float, call: Callable[[], Awaitable[object]]
    ) -> Callable[[], Awaitable[None]]:
        async def loop() -> None:
            while True:
                await self._store_tolerant(call)
                await asyncio.sleep(seconds)

        return loop

    async def _forever(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Keep a loop alive, until its own end, through errors that nobody foresaw; all logged."""
        while True:
            try:
                await loop()
                return
            except Exception:  # the top of a task: logged, and the loop starts again
                log.exception(Log.WORKER_LOOP_FAILED)
                await asyncio.sleep(1)
