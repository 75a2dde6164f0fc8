"""Jobs in the providers' batch APIs: gathered, sent, polled, read.

    put ──► parked ── gathered with others ──► in a batch ── results ──► ended, each by itself
              ▲                                    │
              └──────── no answer, or a faster tier ┘

Each step of a batch is claimed and can be repeated by another worker. A batch and its jobs are
recorded before anything is sent, and its creation is recorded before the request that creates it.
If the reply is lost, the provider's list of batches is read; the batch is only created again once
that list shows that it was not.

Invariants: no job fails because of a provider's outage or a full queue there; a line ends once,
with its record; only a line without an answer returns to the queue; a batch is polled at most once
in `provider_batch_poll_ms`, and all batches of an upstream `_POLLS` times.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from math import inf
from uuid import UUID

from tidegate.admission.charges import TierChoice
from tidegate.call import (
    DEFAULT_POOL,
    NO_CHARGE,
    UNKNOWN_CHARGE,
    Call,
    Charge,
    Kind,
    Tier,
    new_id,
)
from tidegate.dialects.spec import Dialect, Endpoint
from tidegate.errors import (
    ClaimLost,
    FetchFailed,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    StoreUnavailable,
    TidegateError,
    UpstreamError,
)
from tidegate.jobs.calls import (
    ask_of,
    caller_of,
    crowded,
    forever,
    is_of_upstream,
    log_end,
    record_of,
    retry_wait_ms,
    run_until,
    status_of,
    stored_pictures,
    uncounted_wait_ms,
)
from tidegate.policy.deployment import Upstream
from tidegate.prices.budgets import Binding, needs_of, refused_by
from tidegate.record import RETRIED, CallRecord, Failure
from tidegate.settings import Config
from tidegate.spine.batched import BatchableCall, BatchedCalls, prompt_endpoint
from tidegate.spine.bodies import NativeCall, aside
from tidegate.spine.detached import detached_call, endpoint_named
from tidegate.spine.native import Relay
from tidegate.spine.prompt import PromptCalls, files_known
from tidegate.spine.routing import Target
from tidegate.spine.run import Terms
from tidegate.store.blobs import Blobs
from tidegate.store.jobs import CANCELLED
from tidegate.store.notifications import BATCHES, PULSED_MS, until_quick
from tidegate.store.provider.provider_batches import JoiningJob, OpenLine, OpenLines, UpstreamBatch
from tidegate.store.records import ClaimedJob
from tidegate.store.store import Store
from tidegate.telemetry.logging import Log, get_logger
from tidegate.telemetry.tracing import parent_of
from tidegate.upstream.batch_api import (
    BatchApi,
    BatchedCall,
    BatchOutline,
    BatchProgress,
    LineResult,
    batch_api,
)

MOST_LINES = 2_000
MOST_BYTES = 16_000_000
PARKED_S = 6 * 3600.0
_POLL_EVERY_S = 0.25
_AT_ONCE = 10
_BEGUN_AT_ONCE = 8  # their bodies are in memory
_POLLS = 60
_CHUNK = 100
_PRUNE_EVERY_S = 3600.0
# How long a request to create a batch may be in progress after its process was killed.
_SETTLED_AFTER_LEASES = 2
_GONE = (404, 410)
_MISSED = "the provider does not know it any more"
_NO_RESULTS = "the provider does not have its results any more"
_LOST_AFTER = timedelta(hours=50)  # longer than any provider's window

log = get_logger()


_GroupKey = tuple[str, str, str, str]  # upstream, dialect, path and model


@dataclass(frozen=True, slots=True)
class _Ready:
    """A claimed job with its call, and what it reserves of budgets. key: equal for all lines of a
    batch."""

    job: ClaimedJob
    endpoint: Endpoint
    call: BatchableCall
    needs: tuple[tuple[Binding, int], ...]

    @property
    def key(self) -> _GroupKey:
        target = self.call.target
        return target.upstream.name, self.endpoint.dialect, self.endpoint.path, target.model


LeavesAt = Callable[[Kind, Target, datetime], Awaitable[datetime | None]]


class ProviderBatchRunner:
    """One process's share of all batches at providers."""

    def __init__(
        self,
        config: Config,
        store: Store,
        blobs: Blobs,
        relay: Relay,
        prompts: PromptCalls,
        leaves_at: LeavesAt,
    ) -> None:
        """leaves_at: when to cancel a batch so that jobs with a deadline can still be called."""
        self._leaves_at = leaves_at
        self._config = config
        self._store, self._clock = store, store.notifications.clock
        self._batches = store.provider_batches
        self._blobs = blobs
        self._relay, self._prompts = relay, prompts
        self._calls = BatchedCalls(relay)
        self._apis: dict[tuple[str, str], tuple[Upstream, BatchApi]] = {}
        self._in_hand: dict[UUID, asyncio.Task[None]] = {}
        self._making: set[UUID] = set()
        # Until when providers asked for no request about a batch, in seconds of `time.monotonic`.
        self._not_before_s: dict[UUID, float] = {}

    # For the worker

    def taken_in(self, job: ClaimedJob) -> Dialect | None:
        """Return the dialect of the batch API that takes the job's call at a known price."""
        found = self._target(job)
        return None if found is None else found[0].dialect

    async def put(self, job: ClaimedJob, choice: TierChoice) -> None:
        """Park a claimed job for the next batch. Raises StoreUnavailable."""
        revisit_at = choice.revisit_at
        until = self._parked_until(revisit_at)
        await self._store.queue.park([job], until, why=choice.why, revisit_at=revisit_at)
        self._store.open_batches.changed()

    def _target(self, job: ClaimedJob) -> tuple[Endpoint, Target] | None:
        kind = job.classification.kind
        if kind is None:
            return None
        if job.endpoint is None:
            files = files_known(job.attachments, job.image_uri)
            model = job.model or self._config.model_for(kind)
            return self._calls.prompt_target(model, kind, files)
        try:
            endpoint = endpoint_named(job.endpoint)
        except InvalidRequest:
            return None
        target = self._calls.target(endpoint, endpoint.model or job.model or "")
        return None if target is None else (endpoint, target)

    # Loops

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; a step in progress may end within the grace period."""
        loops = (self._gather_all, self._see_to_all, self._prune_all)
        await run_until(
            stop,
            [forever(loop, self._rest) for loop in loops],
            self._in_hand,
            grace_ms=self._config.shutdown_grace_ms,
            leave=self._batches.leave,
        )

    async def _rest(self) -> None:
        notifications = self._store.notifications
        mark, is_idle = notifications.work_mark(BATCHES), False
        with suppress(StoreUnavailable):
            is_idle = not await self._store.open_batches.has_provider()
        if is_idle and notifications.is_sure():
            await notifications.wait_work(PULSED_MS, mark, BATCHES)
        else:
            await asyncio.sleep(_POLL_EVERY_S)

    async def _prune_all(self) -> None:
        await self._batches.prune()
        await asyncio.sleep(_PRUNE_EVERY_S)

    async def _gather_all(self) -> None:
        """Make batches of the jobs that have waited long enough, while there are any."""
        gather_ms = self._config.provider_batch_gather_ms
        if not await self._store.open_batches.has_provider():
            return
        while jobs := await self._store.queue.claim_batched(
            DEFAULT_POOL, MOST_LINES, MOST_BYTES, gather_ms
        ):
            try:
                await self._gather(jobs)
            finally:  # claims that this process forgets become free with its next heartbeat
                for job in jobs:
                    self._store.queue.settled(job)

    async def _see_to_all(self) -> None:
        """Take the batches that are due, up to a few at a time."""
        if not await self._store.open_batches.has_provider():
            return
        while len(self._in_hand) < _AT_ONCE:
            full = crowded(self._in_hand.values(), _AT_ONCE)
            batch = await self._batches.take({*self._in_hand, *self._making}, full)
            if batch is None:
                return
            self._go_on(batch)

    # From jobs to a batch

    async def _gather(self, jobs: Sequence[ClaimedJob]) -> None:
        if self._store.budgets.any:
            await self._store.budgets.known()
        there, fetched = list[_Ready](), [job for job in jobs if job.image_uri is not None]
        for job in jobs:
            if job.image_uri is None and (ready := await self._ready(job)) is not None:
                there.append(ready)
            await asyncio.sleep(0)  # thousands of jobs in a row would block the event loop
        await self._begin_all(there)
        # A caller's server may be slow: no other job waits while an image is fetched.
        prepared = await asyncio.gather(*map(self._ready, fetched))
        await self._begin_all([one for one in prepared if one is not None])

    async def _begin_all(self, jobs: Iterable[_Ready]) -> None:
        """Begin a batch for the jobs of each key, or several if they have become larger than
        claimed, by fetched images or files in base64."""
        groups: defaultdict[_GroupKey, list[_Ready]] = defaultdict(list)
        sizes: Counter[_GroupKey] = Counter()
        for one in jobs:
            size_bytes = len(one.call.body)
            if groups[one.key] and sizes[one.key] + size_bytes > MOST_BYTES:
                await self._begin(groups.pop(one.key))
                sizes[one.key] = 0
            groups[one.key].append(one)
            sizes[one.key] += size_bytes
        for group in groups.values():
            await self._begin(group)

    async def _ready(self, job: ClaimedJob) -> _Ready | None:
        """Return the job's call as a line; None if it cannot be one now: its image is fetched again
        for a later batch, or the live tier reports why."""
        try:
            found = self._target(job)
            if found is None:
                raise InvalidRequest("tier", "no provider's batch takes it any more")
            endpoint, target = found
            call = await self._line(job, endpoint, target)
            return _Ready(job, endpoint, call, self._needs(job, call))
        except StoreUnavailable:
            raise
        except TidegateError as invalid:
            if isinstance(invalid, FetchFailed):
                wait_ms = retry_wait_ms(invalid, job.attempts + 1, self._config.max_attempts)
                if wait_ms is not None:  # at the batch's price, as the live tier does at its own
                    await self._park(job, invalid, wait_ms)
                    return None
            log.info(
                Log.PROVIDER_BATCH_LEFT, request_id=str(job.request_id), reason=invalid.message
            )
        except Exception:  # an unforeseen error: logged, and no other job is delayed
            log.exception(Log.INTERNAL_ERROR, request_id=str(job.request_id))
        await self._batches.turn_away([job])
        return None

    async def _line(self, job: ClaimedJob, endpoint: Endpoint, target: Target) -> BatchableCall:
        """Return a job's call. Raises StoreUnavailable, NotFound and errors of invalid calls."""
        record, caller = record_of(job), caller_of(job)
        kind = job.classification.kind
        if job.endpoint is None:
            assert kind is not None
            media = await self._prompts.media(ask_of(job))
            model, tenant = endpoint.model or target.model, job.tenant_id
            call = Call(job.request_id, job.prompt, kind, model, media, tenant, job.priority)
            terms = Terms(job.request_id, caller, time.monotonic())
            return self._calls.of_prompt(call, terms, target, record)
        return self._calls.of_native(await self._native(job, job.endpoint), target, record)

    async def _native(self, job: ClaimedJob, path: str) -> NativeCall:
        body = job.prompt.encode()
        for attachment in job.attachments:  # a large body
            body = await self._blobs.get(attachment.blob_key)
        return detached_call(
            request_id=job.request_id,
            path=path,
            body=body,
            caller=caller_of(job),
            priority=job.priority,
            deadline_ms=None,
        )

    def _needs(self, job: ClaimedJob, call: BatchableCall) -> tuple[tuple[Binding, int], ...]:
        """Return what the job reserves of its budgets. Raises BudgetUnbounded."""
        if call.cost is None:
            return ()
        model = call.target.model
        tags = job.subject, job.conversation
        bindings = self._store.budgets.binding(caller_of(job), model, *tags)
        return needs_of(bindings, call.cost)

    async def _begin(self, group: Sequence[_Ready]) -> None:
        """Record a batch with its jobs, and send it."""
        target, endpoint = group[0].call.target, group[0].endpoint
        batch = UpstreamBatch(
            id=new_id(),
            pool=DEFAULT_POOL,
            upstream=target.upstream.name,
            dialect=endpoint.dialect,
            endpoint=endpoint.path,
            model=target.model,
            key_digest=_digest(target.upstream),
            lines=len(group),
            size_bytes=sum(len(one.call.body) for one in group),
        )
        joining = [JoiningJob(one.job, one.needs, one.job.revisit_at) for one in group]
        self._making.add(batch.id)  # this task continues with it
        try:
            begun = await self._batches.begin(batch, joining)
            # Further batches are taken when they are due, and their bodies are read again.
            if begun.batch is not None and len(self._in_hand) < _BEGUN_AT_ONCE:
                bodies = {line: one.call.body for line, one in enumerate(group)}
                self._go_on(begun.batch, bodies)
        finally:
            self._making.discard(batch.id)
        for one in joining:
            if (refusal := begun.refused.get(one.job.request_id)) is not None:
                need = next(need for binding, need in one.needs if binding == refusal.binding)
                now = self._store.notifications.clock.now()
                await self._wait_for_budget(one.job, refused_by(refusal, need, now))

    async def _wait_for_budget(self, job: ClaimedJob, error: QuotaExceeded) -> None:
        has_fallback = getattr(error, "fallback", None) is not None
        if has_fallback or not error.retryable:
            await self._batches.turn_away([job])  # the live tier uses that model, or refuses it
            return
        await self._park(job, error, uncounted_wait_ms(error) or 0)

    async def _park(self, job: ClaimedJob, error: TidegateError, wait_ms: int) -> None:
        """Have a job wait for a batch that is made `wait_ms` from now or later."""
        until = self._parked_until(job.revisit_at)
        await self._store.queue.park(
            [job],
            until,
            revisit_at=job.revisit_at,
            batch_wait_ms=wait_ms,
            failure=Failure.of(error),
        )

    def _go_on(self, batch: UpstreamBatch, bodies: Mapping[int, bytes] | None = None) -> None:
        task = asyncio.create_task(self._guarded(batch, bodies), name=batch.upstream)
        self._in_hand[batch.id] = task
        task.add_done_callback(lambda _: self._in_hand.pop(batch.id, None))

    # From a batch to the provider

    async def _guarded(self, batch: UpstreamBatch, bodies: Mapping[int, bytes] | None) -> None:
        """Run one step of a batch."""
        try:
            await self._step(batch, bodies)
        except ClaimLost:
            return
        except StoreUnavailable as unavailable:  # it is due, and taken again
            log.debug(Log.STORE_AWAY, detail=unavailable.message)
        except Exception:  # the top of a task: logged, and the batch is taken again
            log.exception(Log.WORKER_LOOP_FAILED, batch=str(batch.id))
            with suppress(StoreUnavailable):  # a batch that the step saved stays so
                await self._batches.put_off(batch, self._poll_ms)

    async def _step(self, batch: UpstreamBatch, bodies: Mapping[int, bytes] | None) -> None:
        upstream = self._relay.spine.targets.upstreams.get(batch.upstream)
        drained = self._relay.spine.targets.drained
        is_removed = upstream is None or batch.dialect not in upstream.base_urls
        if batch.state == "made" and (is_removed or batch.upstream in drained):
            await self._give_back_all(batch, "left")  # nothing was sent
            return
        if upstream is None or is_removed:
            await self._hold(batch, "its upstream is not configured any more")
            return
        place = (batch.upstream, batch.dialect)
        known = self._apis.get(place)
        if known is None or known[0] is not upstream:  # the upstream was changed
            api = batch_api(self._relay.wire, upstream, Dialect(batch.dialect))
            known = self._apis[place] = upstream, api
        api = known[1]
        try:
            match batch.state:
                case "made":
                    await self._create(api, batch, bodies)
                case "creating":
                    await self._resolve(api, batch)
                case _:
                    await self._poll(api, batch)
        except UpstreamError as error:
            if error.status in _GONE and batch.state in ("created", "cancelling"):
                await self._missed(api, batch, upstream)
            else:
                await self._hold(batch, error.message, error.pause_ms)

    @property
    def _poll_ms(self) -> float:
        return float(self._config.provider_batch_poll_ms)

    async def _pace_ms(self, batch: UpstreamBatch) -> float:
        """Return the ms until the next poll of a batch; more batches are polled less often."""
        count = (await self._batches.under_way()).get(batch.upstream, 1)
        return max(self._poll_ms, self._poll_ms * count / _POLLS)

    async def _hold(self, batch: UpstreamBatch, problem: str, wait_ms: int | None = None) -> None:
        """Postpone a batch that cannot proceed; no job fails for it."""
        if problem != batch.problem:
            log.warning(Log.PROVIDER_BATCH_HELD, **_about(batch), reason=problem)
        since = batch.created_at or batch.creating_at
        if since is not None and _passed(batch, since) > _LOST_AFTER:
            await self._give_back_all(batch, "lost", charge=UNKNOWN_CHARGE)
            return
        saved, held_ms = replace(batch, problem=problem), max(self._poll_ms, wait_ms or 0)
        if batch.state == "made":  # lines still leave it at the usual pace: see `_create`
            if wait_ms:
                now_s, held = time.monotonic(), self._not_before_s.items()
                self._not_before_s = {one: at_s for one, at_s in held if at_s > now_s}
                self._not_before_s[batch.id] = now_s + wait_ms / 1000
            left_ms = self._until((await self._batches.open_lines(batch)).leave_at)
            held_ms = self._poll_ms
        else:
            left_ms = await self._without_the_late(batch)
        await self._batches.save(saved, min(held_ms, left_ms))

    async def _without_the_late(self, batch: UpstreamBatch) -> float:
        """Requeue lines that must be called in a faster tier now, though their batch cannot be
        cancelled: the provider may charge them too. Return the ms until the next such line."""
        leave_at, now = (await self._batches.open_lines(batch)).leave_at, self._clock.now()
        if leave_at is not None and leave_at <= now:
            for one in await self._all_lines(batch):
                if one.leave_at is not None and one.leave_at <= now:
                    await self._without_answer(batch, one, "no answer", UNKNOWN_CHARGE)
            leave_at = (await self._batches.open_lines(batch)).leave_at
        return self._until(leave_at)

    async def _create(
        self, api: BatchApi, batch: UpstreamBatch, bodies: Mapping[int, bytes] | None
    ) -> None:
        lines = await self._leaving_aside(batch, await self._all_lines(batch))
        if lines and self._not_before_s.get(batch.id, 0.0) > time.monotonic():
            await self._hold(batch, batch.problem or "")
            return
        self._not_before_s.pop(batch.id, None)
        calls = await self._made(batch, lines, bodies)
        if not calls:
            await self._batches.end(batch)
            return
        if len(calls) != batch.lines:
            batch = replace(batch, file_id=None, lines=len(calls))
        outline = _outline(batch)
        if batch.file_id is None:
            file_id = await api.upload(outline, calls)
            batch = await self._batches.save(replace(batch, file_id=file_id))
        marked = batch = await self._marked(batch)
        is_sent = False

        def on_sent() -> None:
            nonlocal is_sent
            is_sent = True

        try:
            progress = await api.create(outline, batch.file_id, calls, on_sent)
        except UpstreamError as error:
            await self._not_created(marked, error, is_sent)
            return
        log.info(Log.PROVIDER_BATCH_CREATED, **_about(batch), lines=len(calls))
        await self._batches.save(_known(batch, progress), self._poll_ms)

    async def _marked(self, batch: UpstreamBatch) -> UpstreamBatch:
        """Record that the batch may be created from now on. A process that stalled before it read
        the reply records that again: another worker may have taken the batch."""
        found = replace(batch, state="creating")

        async def mark() -> None:
            nonlocal found
            found = await self._batches.save(found)

        await until_quick(mark, self._config.claim_lease_ms)
        return found

    async def _all_lines(self, batch: UpstreamBatch) -> list[OpenLine]:
        return await self._batches.lines(batch, limit=2 * MOST_LINES)

    async def _leaving_aside(
        self, batch: UpstreamBatch, lines: Sequence[OpenLine]
    ) -> list[OpenLine]:
        """Return the lines for a batch that is not created yet, without cancelled jobs and those
        that must be called in a faster tier now."""
        now, stay = self._clock.now(), []
        for one in lines:
            if one.is_cancelled or (one.leave_at is not None and one.leave_at <= now):
                await self._without_answer(batch, one, "left", NO_CHARGE)
            else:
                stay.append(one)
        return stay

    async def _made(
        self,
        batch: UpstreamBatch,
        lines: Sequence[OpenLine],
        bodies: Mapping[int, bytes] | None,
    ) -> list[BatchedCall]:
        """Return the lines as they are sent. A line that cannot be made any more, as its image or
        file was deleted, leaves the batch: the live tier reports why. One whose image's server
        fails at the moment may be in another batch."""
        calls = []
        for one in lines:
            try:
                calls.append(BatchedCall(one.line, await self._body(batch, one, bodies)))
            except StoreUnavailable:
                raise
            except TidegateError as invalid:
                job = str(one.job.request_id)
                log.info(Log.PROVIDER_BATCH_LEFT, request_id=job, reason=invalid.message)
                is_refused = not isinstance(invalid, FetchFailed)
                await self._without_answer(batch, one, "left", NO_CHARGE, is_refused=is_refused)
        return calls

    async def _body(
        self, batch: UpstreamBatch, line: OpenLine, bodies: Mapping[int, bytes] | None
    ) -> bytes:
        if bodies is not None and line.line in bodies:
            return bodies[line.line]
        endpoint = self._endpoint(batch, line.job)
        return (await self._line(line.job, endpoint, self._target_of(batch))).body

    def _endpoint(self, batch: UpstreamBatch, job: ClaimedJob) -> Endpoint:
        kind = job.classification.kind
        if job.endpoint is None and kind is not None:
            return prompt_endpoint(Dialect(batch.dialect), kind, batch.model)
        return endpoint_named(job.endpoint)

    def _target_of(self, batch: UpstreamBatch) -> Target:
        return Target(self._relay.spine.targets.upstreams[batch.upstream], batch.model)

    async def _not_created(self, batch: UpstreamBatch, error: UpstreamError, is_sent: bool) -> None:
        """Handle a failed request to create a batch: certainly not created, or possibly created."""
        is_certain = not is_sent or 400 <= (error.status or 0) < 500
        if not is_certain:
            log.warning(Log.PROVIDER_BATCH_HELD, **_about(batch), reason=error.message)
            await self._batches.save(replace(batch, problem=error.message), self._poll_ms)
            return
        batch = await self._batches.save(replace(batch, state="made", file_id=batch.file_id))
        if error.is_answer:
            # Another attempt would fail too: the live tier makes the calls.
            log.warning(Log.PROVIDER_BATCH_HELD, **_about(batch), reason=error.message)
            await self._give_back_all(batch, "refused", is_refused=True)
        else:
            await self._hold(batch, error.message, error.pause_ms)

    async def _missed(self, api: BatchApi, batch: UpstreamBatch, upstream: Upstream) -> None:
        """Handle a created batch that the provider does not know: it was deleted there, or the
        account has changed. If the next poll finds the same, the batch ends."""
        if batch.problem != _MISSED or batch.key_digest != _digest(upstream):
            await self._hold(batch, _MISSED)
            return
        others = await self._batches.known_ids(batch.upstream) - {batch.provider_id or ""}
        try:
            found = await api.find(_outline(batch), others)
        except UpstreamError as error:  # the list of batches failed too
            found = None
            log.info(Log.PROVIDER_BATCH_HELD, **_about(batch), reason=error.message)
        if found is None or batch.provider_id in found:
            await self._hold(batch, _MISSED)
        elif found:
            again = replace(batch, provider_id=found[0], problem=None)
            await self._batches.save(again, self._poll_ms)
        else:
            await self._give_back_all(batch, "deleted", is_refused=True, charge=UNKNOWN_CHARGE)

    async def _resolve(self, api: BatchApi, batch: UpstreamBatch) -> None:
        """Find out whether a batch was created whose creation had no answer."""
        outline = _outline(batch)
        found = await api.find(outline, await self._batches.known_ids(batch.upstream))
        if found is None:
            await self._hold(batch, "its creation had no answer, and others of its size are open")
            return
        if found:
            for twin in found[1:]:
                await api.cancel(twin)
            progress = await api.poll(found[0])
            log.info(Log.PROVIDER_BATCH_CREATED, **_about(batch), lines=batch.lines)
            await self._batches.save(_known(batch, progress), 0.0)
            return
        assert batch.creating_at is not None
        settled_ms = _SETTLED_AFTER_LEASES * self._config.claim_lease_ms
        passed_ms = _passed(batch, batch.creating_at).total_seconds() * 1000
        if passed_ms < settled_ms:
            await self._batches.save(batch, settled_ms - passed_ms)
            return
        await self._batches.save(replace(batch, state="made"), 0.0)

    async def _poll(self, api: BatchApi, batch: UpstreamBatch) -> None:
        """Poll a batch, and end it if the provider has ended it."""
        assert batch.provider_id is not None
        progress = await api.poll(batch.provider_id)
        if progress.has_ended and progress.is_full:
            message = progress.problem or "the provider's queue for batches is full"
            again = replace(batch, state="made", provider_id=None)
            await self._hold(again, message)
            return
        if progress.has_ended:
            await self._end(api, batch, progress)
            return
        sums, now = await self._batches.open_lines(batch), self._clock.now()
        leave_at = await self._to_leave_at(batch, sums)
        leaves = leave_at is not None and leave_at <= now
        state = batch.state
        if (leaves or sums.cancelled == sums.open) and state != "cancelling":
            await api.cancel(batch.provider_id)
            state = "cancelling"
        elif leave_at is not None and leave_at + self._cancelled_within <= now:
            await self._without_the_late(batch)
        wait_ms = await self._pace_ms(batch)
        if leave_at is not None and not leaves:
            wait_ms = min(wait_ms, (leave_at - now).total_seconds() * 1000)
        polled = replace(batch, state=state, provider_state=progress.word, problem=None)
        await self._batches.save(polled, wait_ms)

    @property
    def _cancelled_within(self) -> timedelta:
        return timedelta(milliseconds=self._config.provider_batch_cancel_ms)

    async def _to_leave_at(self, batch: UpstreamBatch, sums: OpenLines) -> datetime | None:
        """Return when the first line must leave a batch: earlier than planned if more jobs have
        arrived that would be called before it."""
        if sums.leave_at is None or sums.due_at is None or sums.kind not in set(Kind):
            return sums.leave_at
        now = await self._leaves_at(Kind(sums.kind), self._target_of(batch), sums.due_at)
        return sums.leave_at if now is None else min(now, sums.leave_at)

    # From the provider to the jobs

    async def _end(self, api: BatchApi, batch: UpstreamBatch, ended: BatchProgress) -> None:
        """Read the results of a batch, which end its lines; requeue lines without a result."""
        last_problem = batch.problem
        batch = await self._batches.save(
            replace(batch, provider_state=ended.word, problem=ended.problem)
        )
        outline = _outline(batch)
        # Gemini may have charged for the finished part of an incomplete batch.
        is_unsure = batch.dialect == Dialect.GEMINI and not ended.files and not ended.inline
        try:
            await self._read_results(batch, api.results(outline, ended))
        except UpstreamError as error:
            if error.status not in _GONE:
                raise
            if last_problem != _NO_RESULTS:  # if the next poll finds the same, the batch ends
                await self._hold(batch, _NO_RESULTS)
                return
            is_unsure = True
        charge = UNKNOWN_CHARGE if is_unsure else NO_CHARGE
        # Lines that a batch did not answer in its full time are not put into another one.
        is_refused = batch.state != "cancelling"
        await self._give_back_all(batch, ended.word, is_refused=is_refused, charge=charge)
        with suppress(UpstreamError):
            await api.forget(outline, batch.file_id, ended)

    async def _read_results(self, batch: UpstreamBatch, results: AsyncIterator[LineResult]) -> None:
        chunk, size_bytes = dict[int, LineResult](), 0
        async for result in results:
            if result.answer is None and result.error is None:
                continue
            chunk[result.line] = result
            size_bytes += len(result.answer or b"")
            if len(chunk) >= _CHUNK or size_bytes > MOST_BYTES:
                await self._answered(batch, chunk)
                chunk, size_bytes = {}, 0
        await self._answered(batch, chunk)

    async def _answered(self, batch: UpstreamBatch, chunk: Mapping[int, LineResult]) -> None:
        if not chunk:
            return
        lines = await self._batches.lines(batch, among=chunk)
        await asyncio.gather(*(self._end_line(batch, one, chunk[one.line]) for one in lines))

    async def _end_line(self, batch: UpstreamBatch, line: OpenLine, result: LineResult) -> None:
        """End a line with its answer or error."""
        record = self._record(batch, line)
        try:
            await self._end_by(batch, line, result, record)
        except StoreUnavailable:
            raise
        except Exception:  # an unforeseen error: logged, and no other line is delayed
            log.exception(Log.INTERNAL_ERROR, request_id=str(line.job.request_id))
            record = self._record(batch, line)
            record.charge = UNKNOWN_CHARGE
            await self._finish(line, record, TidegateError("an internal error; it has been logged"))

    async def _end_by(
        self, batch: UpstreamBatch, line: OpenLine, result: LineResult, record: CallRecord
    ) -> None:
        error: TidegateError | None = result.error
        if result.is_unread:
            record.charge = UNKNOWN_CHARGE
        if result.answer is not None:
            endpoint, target = self._endpoint(batch, line.job), self._target_of(batch)
            kind = line.job.classification.kind if line.job.endpoint is None else None
            try:
                read = partial(self._calls.read, record, endpoint, target, result.answer, kind)
                await aside(len(result.answer), read)
                record.files = await stored_pictures(self._blobs, record.answer.pictures)
                if line.job.endpoint is not None and self._calls.lacks_usage(record):
                    with suppress(NotFound):  # its body was deleted
                        native = await self._native(line.job, line.job.endpoint)
                        self._calls.estimate_usage(record, native, target, result.answer)
            except UpstreamError as invalid:
                error = invalid
        if line.is_cancelled:
            await self._finish(line, record, CANCELLED)
        elif error is result.error and error is not None:
            await self._failed(line, record, error)
        else:
            await self._finish(line, record, error)

    async def _failed(self, line: OpenLine, record: CallRecord, error: TidegateError) -> None:
        """Retry a line that the provider refused or failed in the live tier, or end it."""
        job = line.job
        is_counted = error.retryable and not is_of_upstream(error)
        wait_ms: int | None = 0
        if is_counted:
            wait_ms = retry_wait_ms(error, job.attempts, self._config.max_attempts)
        if wait_ms is None:
            await self._finish(line, record, error)
        else:
            failure = Failure.of(error)
            await self._requeue(line, _without_batch(job), record, failure, wait_ms, is_counted)

    async def _give_back_all(
        self,
        batch: UpstreamBatch,
        word: str,
        *,
        is_refused: bool = False,
        charge: Charge = NO_CHARGE,
    ) -> None:
        """Return all open lines to the queue, and end the batch."""
        while lines := await self._batches.lines(batch, limit=_CHUNK):
            for one in lines:
                await self._without_answer(batch, one, word, charge, is_refused=is_refused)
        await self._batches.end(batch)
        log.info(Log.PROVIDER_BATCH_ENDED, **_about(batch), state=word)

    async def _without_answer(
        self,
        batch: UpstreamBatch,
        line: OpenLine,
        word: str,
        charge: Charge,
        *,
        is_refused: bool = False,
    ) -> None:
        record = self._record(batch, line)
        record.charge = charge
        if line.is_cancelled:
            await self._finish(line, record, CANCELLED)
            return
        back = replace(line.job, tier=Tier.LIVE)
        if is_refused:
            back = _without_batch(back)
        message = f"the provider's batch ended without an answer to it ({word})"
        failure = Failure("batch_unanswered", message, retryable=True)
        await self._requeue(line, back, record, failure, 0, is_counted=False)

    def _record(self, batch: UpstreamBatch, line: OpenLine) -> CallRecord:
        """Return the record of a line's call, before its answer."""
        job, spine, now = line.job, self._relay.spine, datetime.now(UTC)
        record = record_of(job, spine.tracing.trail(job.request_id, parent_of(job.traceparent)))
        endpoint = self._endpoint(batch, job)
        record.dialect, record.operation = batch.dialect, endpoint.name
        record.upstream, record.model = batch.upstream, batch.model
        record.waits, record.attempts = False, 1
        record.admitted_at, record.queue_ms, record.fence = line.admitted_at, line.queue_ms, (0, 0)
        record.upstream_ms = max(0.0, (now - line.admitted_at).total_seconds() * 1000)
        record.finished_at = now
        return record

    async def _finish(
        self, line: OpenLine, record: CallRecord, error: TidegateError | None
    ) -> None:
        failure = None if error is None else Failure.of(error)
        if error is CANCELLED:
            record.pieces, record.answer_bytes, record.files = [], 0, ()
            record.answer.text = []
        record.end(status_of(failure), failure)
        self._settle(line, record)
        await self._written(self._store.audit.end_job(line.job, record))
        log_end(line.job, record, failure, None)

    async def _requeue(
        self,
        line: OpenLine,
        job: ClaimedJob,
        record: CallRecord,
        failure: Failure,
        wait_ms: int,
        is_counted: bool,
    ) -> None:
        record.end(RETRIED, failure)
        self._settle(line, record)
        not_before = self._clock.now() + timedelta(milliseconds=wait_ms) if wait_ms else None
        audit = self._store.audit
        await self._written(audit.retry_job(job, record, not_before, is_counted=is_counted))
        log_end(job, record, failure, wait_ms)

    def _settle(self, line: OpenLine, record: CallRecord) -> None:
        if line.hold_id is not None:
            self._store.budgets.settle(line.hold_id, record.charge, line.job.request_id)

    def _parked_until(self, revisit_at: datetime | None) -> datetime:
        latest = self._clock.now() + timedelta(seconds=PARKED_S)
        return latest if revisit_at is None else min(latest, revisit_at)

    def _until(self, at: datetime | None) -> float:
        """Return the ms until a time; infinite for None."""
        return inf if at is None else max(0.0, (at - self._clock.now()).total_seconds() * 1000)

    @staticmethod
    async def _written(write: Awaitable[bool]) -> None:
        """Raises StoreUnavailable for a write that is not in PostgreSQL: the line looks open."""
        with suppress(ClaimLost):  # the line has ended meanwhile
            if not await write:
                raise StoreUnavailable("the end of a line is kept on disk")


def _without_batch(job: ClaimedJob) -> ClaimedJob:
    """Return the job without the batch tier."""
    allowed = tuple(one for one in job.tiers_allowed if one is not Tier.BATCH)
    return replace(job, tier=Tier.LIVE, tiers_allowed=allowed)


def _digest(upstream: Upstream) -> bytes:
    """Return a digest of an upstream's key."""
    return sha256(upstream.key.encode()).digest()


def _passed(batch: UpstreamBatch, since: datetime) -> timedelta:
    """Return the time from `since` to a batch's reading, by PostgreSQL's clock: others may be
    wrong."""
    return timedelta(0) if batch.read_at is None else batch.read_at - since


def _outline(batch: UpstreamBatch) -> BatchOutline:
    return BatchOutline(batch.id, batch.endpoint, batch.model, batch.lines, batch.creating_at)


def _known(batch: UpstreamBatch, progress: BatchProgress) -> UpstreamBatch:
    return replace(
        batch,
        state="created",
        provider_id=progress.provider_id,
        provider_state=progress.word,
        problem=None,
    )


def _about(batch: UpstreamBatch) -> dict[str, str]:
    return {"batch": str(batch.id), "upstream": batch.upstream, "model": batch.model}
