"""A worker: takes jobs, runs each through the spine, and records how it ended.

Invariant: every write about a job is fenced by its claim, so that a worker that lost its claim
changes nothing; a job that this process can't finish is handed back or retaken, never dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from tidegate.call import Call, Event, Kind, Media, new_id
from tidegate.config import Config
from tidegate.errors import (
    ClaimLost,
    DeadlineExceeded,
    LeaseLost,
    LimiterUnavailable,
    StoreUnavailable,
    TidegateError,
)
from tidegate.jobs.feeder import Feeder
from tidegate.jobs.retry import retry_wait_ms
from tidegate.limiter import Permit
from tidegate.pipeline import Ask, Attempt, Pipeline, attempt_result
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.records import ClaimedJob, Failure, OutputFile
from tidegate.store.states import Status
from tidegate.store.store import Store
from tidegate.telemetry import Log, get_logger

_UNSURE_WINDOW = 16
_LARGEST_WINDOW = 256
_STORE_POLL_S = 0.25

log = get_logger()


class Worker:
    """One process's share of the queue."""

    def __init__(self, *, config: Config, store: Store, blobs: Blobs, pipeline: Pipeline) -> None:
        self._config = config
        self._store = store
        self._blobs = blobs
        self._pipeline = pipeline
        self._admitted: set[tuple[object, int]] = set()
        self._feeders = [Feeder(store, None, _UNSURE_WINDOW, self._classify)]
        for kind in Kind:
            # Twice the limit keeps it full even if every other worker is gone.
            window = min(_LARGEST_WINDOW, 2 * config.rate_limits[kind] + 2)
            self._feeders.append(Feeder(store, kind, window, self._work))

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then finish what runs within the grace, hand back the rest."""
        beat_s = self._config.claim_lease_ms / 3000
        await self._store_tolerant(self._store.heartbeat)
        loops = [
            *(self._forever(feeder.run) for feeder in self._feeders),
            self._forever(self._every(beat_s, self._store.heartbeat)),
            self._forever(self._every(beat_s, self._retake)),
            self._forever(self._every(1.0, self._store.expire_due)),
        ]
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            await stop.wait()
        finally:
            # The heartbeat goes on while the last jobs finish, or their claims would lapse.
            for task in tasks[: len(self._feeders)]:
                task.cancel()
            await self._drain()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._store_tolerant(self._store.leave)

    async def _drain(self) -> None:
        """Hand back what has not been admitted, then wait for the rest until the grace is over."""
        grace_s = self._config.shutdown_grace_ms / 1000
        waiting = [t for t, job in self._tasks().items() if self._key(job) not in self._admitted]
        await self._give_up(waiting)
        running = list(self._tasks())
        if running:
            await asyncio.wait(running, timeout=grace_s)
        await self._give_up(list(self._tasks()))

    def _tasks(self) -> dict[asyncio.Task[None], ClaimedJob]:
        return {task: job for feeder in self._feeders for task, job in feeder.tasks.items()}

    @staticmethod
    def _key(job: ClaimedJob) -> tuple[object, int]:
        return job.request_id, job.claim

    async def _give_up(self, tasks: list[asyncio.Task[None]]) -> None:
        if not tasks:
            return
        jobs = self._tasks()
        given = [jobs[task] for task in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        # A task that ended by itself meanwhile has moved its job on: the fence skips it.
        await self._store_tolerant(lambda: self._store.hand_back(given))

    async def _classify(self, job: ClaimedJob) -> None:
        """Settle the kind of a job that the rules were unsure of; it then queues under it."""
        ask = _ask_of(job)
        decided = await self._pipeline.decide(ask)

        async def requeue() -> None:
            await self._store.classified(job, decided)
            await self._store.hand_back([job])

        await self._fenced(requeue)

    async def _work(self, job: ClaimedJob) -> None:
        try:
            await self._run_and_record(job)
        except Exception:  # the top of a job's task: it must not stay claimed by a live worker
            log.exception(Log.INTERNAL_ERROR, request_id=str(job.request_id))
            failure = Failure("internal", "an internal error; it has been logged")
            await self._fenced(lambda: self._store.fail_unadmitted(job, Status.FAILED, failure))
        finally:
            self._admitted.discard(self._key(job))

    async def _run_and_record(self, job: ClaimedJob) -> None:
        kind = job.classification.kind
        assert kind is not None
        attempt = Attempt()
        model = job.model or self._config.model_for(kind)

        async def admitted(permit: Permit) -> None:
            self._admitted.add(self._key(job))
            await self._store.running(
                job, model=model, fence=permit.fence, queue_ms=attempt.queue_ms
            )

        failure: TidegateError | None = None
        try:
            media = await self._pipeline.media(_ask_of(job))
            call = Call(job.request_id, job.prompt, kind, model, media, job.tenant_id)
            await self._run_when_recorded(job, call, attempt, admitted)
        except ClaimLost:
            return
        except TidegateError as error:
            failure = error
        await self._record(job, attempt, model, failure)

    async def _run_when_recorded(
        self,
        job: ClaimedJob,
        call: Call,
        attempt: Attempt,
        admitted: Callable[[Permit], Awaitable[None]],
    ) -> None:
        """Run the call; while PostgreSQL is away the permit goes back and is asked for again."""
        while True:
            try:
                await self._pipeline.run(
                    call, attempt, _ignore, deadline_ms=_left_ms(job), on_admitted=admitted
                )
                return
            except StoreUnavailable:
                self._admitted.discard(self._key(job))
                attempt.admitted_at = None
                await self._until_store_is_back()

    async def _record(
        self, job: ClaimedJob, attempt: Attempt, model: str, error: TidegateError | None
    ) -> None:
        failure = Failure.of(error) if error else None
        pictures = await self._keep_pictures(attempt.answer.pictures)
        result = attempt_result(attempt, model, pictures, failure)
        wait_ms = None
        if error is not None:
            made = job.attempts + (result is not None)
            wait_ms = retry_wait_ms(error, max(1, made), self._config.max_attempts)
        if result is None:
            assert failure is not None
            status = Status.EXPIRED if isinstance(error, DeadlineExceeded) else Status.FAILED
            if isinstance(error, LimiterUnavailable | StoreUnavailable | LeaseLost):
                await asyncio.sleep(_STORE_POLL_S)
                await self._store_tolerant(lambda: self._store.hand_back([job]))
                return
            await self._fenced(lambda: self._store.fail_unadmitted(job, status, failure))
        elif wait_ms is not None:
            not_before = datetime.now(UTC) + timedelta(milliseconds=wait_ms)
            await self._fenced(lambda: self._store.retry(job, result, not_before))
        else:
            status = Status.FAILED if failure else Status.SUCCEEDED
            await self._fenced(lambda: self._store.finish(job, status, result))
        self._log_end(job, attempt, failure, wait_ms)

    @staticmethod
    def _log_end(
        job: ClaimedJob, attempt: Attempt, failure: Failure | None, wait_ms: int | None
    ) -> None:
        log.info(
            Log.JOB_DONE if wait_ms is None else Log.JOB_RETRY,
            request_id=str(job.request_id),
            type=job.classification.kind,
            queue_ms=round(attempt.queue_ms, 1),
            upstream_ms=round(attempt.upstream_ms, 1),
            **({"code": failure.code} if failure else {}),
            **({"retry_in_ms": wait_ms} if wait_ms is not None else {}),
        )

    async def _keep_pictures(self, pictures: list[Media]) -> tuple[OutputFile, ...]:
        kept = []
        for picture in pictures:
            key = new_key(datetime.now(UTC))
            await self._blobs.put(key, picture.data)
            size = len(picture.data)
            kept.append(OutputFile(new_id(), picture.mime_type, size, key, picture.name))
        return tuple(kept)

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
            try:
                await self._store.ping(1_000)
                return
            except StoreUnavailable:
                continue

    async def _retake(self) -> None:
        retaken = await self._store.retake_lapsed()
        if retaken:
            log.warning(Log.JOBS_RETAKEN, jobs=len(retaken))

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
        """Keep a loop alive through errors that nobody foresaw; each is logged."""
        while True:
            try:
                await loop()
            except Exception:  # the top of a task: logged, and the loop starts again
                log.exception(Log.WORKER_LOOP_FAILED)
                await asyncio.sleep(1)


def _ask_of(job: ClaimedJob) -> Ask:
    return Ask(job.prompt, job.attachments, job.image_uri, job.classification.kind)


def _left_ms(job: ClaimedJob) -> int | None:
    if job.deadline_at is None:
        return None
    left = (job.deadline_at - datetime.now(UTC)).total_seconds()
    return max(1, round(left * 1000))


async def _ignore(_event: Event) -> None:
    """Jobs have no listener while they run: the answer is recorded whole."""
