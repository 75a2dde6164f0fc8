"""Calling the lines of batches: in the lowest priority, a window of them at a time.

Invariant: a line is marked in PostgreSQL before its call and ended after it, both fenced by its
claim; one that this process can't finish is handed back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from uuid import UUID

import orjson

from tidegate.call import Caller
from tidegate.config import Config
from tidegate.errors import (
    ClaimLost,
    DeadlineExceeded,
    LeaseLost,
    LimiterUnavailable,
    QueueFull,
    QuotaExceeded,
    ShuttingDown,
    StoreUnavailable,
    TidegateError,
)
from tidegate.jobs.held import Held, Look
from tidegate.jobs.outages import Key, Turn
from tidegate.jobs.retry import is_of_upstream, retry_wait_ms
from tidegate.jobs.wrapped import targets_of
from tidegate.limiter import Permit
from tidegate.observed import RETRIED
from tidegate.relay.call import CallFailed, Life
from tidegate.relay.detached import collected, detached_call
from tidegate.relay.paths import dialect_of, endpoint_of
from tidegate.relay.spine import Relay
from tidegate.store.batch_lines import Line
from tidegate.store.bell import BATCHES
from tidegate.store.line_records import PRIORITY
from tidegate.store.records import Failure
from tidegate.store.relayed import RelayRecord, observed_of
from tidegate.store.states import Status
from tidegate.store.store import Store
from tidegate.telemetry import Log, get_logger
from tidegate.tracing import Trail

WINDOW = 128
MOST_BYTES = 32_000_000  # of the bodies that are claimed at a time
_STRAYS_EVERY_S = 5.0
_AWAY_S = 0.25
_OUT_S = 0.25
_IDLE_MS = 500
_PUT_OFF_A_S, _PUT_OFF_AT_ONCE = 200.0, 1_000.0
_AGAIN_MS = 500.0
_LAST_RECORDS_S = 8.0
# Says nothing of the line: it can be called later.
_LATER = (
    LimiterUnavailable,
    QueueFull,
    StoreUnavailable,
    LeaseLost,
    ShuttingDown,
    DeadlineExceeded,  # the batch expires as a whole
    QuotaExceeded,  # its tenant's budget: the batch stands still
)

log = get_logger()


@dataclass(slots=True)
class _UnderWay:
    """A line of a task, which waits for its turn, is called, then writes how it ended."""

    line: Line
    life: Life
    trail: Trail | None
    is_over: bool = False
    turn: Turn | None = None

    @property
    def waits(self) -> bool:
        return self.life.waits and not self.is_over

    @property
    def is_called(self) -> bool:
        return not self.life.waits and not self.is_over


class LineCaller:
    """One process's share of all lines. `tasks` are those under way."""

    def __init__(self, config: Config, store: Store, relay: Relay, held: Held) -> None:
        self._held = held
        self._outages = held.outages
        self._config = config
        self._store = store
        self._relay = relay
        self._tasks: dict[asyncio.Task[None], _UnderWay] = {}
        self._freed = asyncio.Event()

    async def feed(self) -> None:
        """Claim lines and begin them, for ever."""
        loop = asyncio.get_running_loop()
        looked_at = loop.time()
        look = Look(a_s=_PUT_OFF_A_S, at_once=_PUT_OFF_AT_ONCE)
        while True:
            await self._leave_held_up()
            free = WINDOW - len(self._tasks)
            if free < WINDOW // 4:
                self._freed.clear()
                await self._freed.wait()
                continue
            if loop.time() - looked_at > _STRAYS_EVERY_S:
                looked_at = loop.time()
                await self._store.batch_lines.release_strays(
                    one.line for one in self._tasks.values()
                )
            if not (free := self._held.may_claim(free)):
                await asyncio.sleep(_OUT_S)
                continue
            mark = self._store.work_mark(BATCHES)
            most = look.at(free)
            try:
                claimed = await self._store.batch_lines.claim(most, MOST_BYTES)
            except StoreUnavailable:
                self._outages.unclaimed()
                raise
            is_last = len(claimed) < max(1, most // 2)
            held = await self._without_held(claimed, look.put_off)
            if not claimed:
                self._outages.unclaimed()
            rest_s = look.found(held=held, free=len(claimed))
            if more := claimed[free:]:
                del claimed[free:]
                await self._until_done(partial(self._store.batch_lines.give_back, more))
            for line in claimed:
                self._begin(line)
            if rest_s:
                await asyncio.sleep(rest_s)
            elif is_last:
                await self._store.wait_work(_IDLE_MS, mark, BATCHES)

    async def _without_held(self, claimed: list[Line], put_off: int) -> int:
        """Return lines to the queue that nothing can be called for; how many."""
        waits_ms = self._held.waits_ms(
            ((line.id, self._targets_of(line)) for line in claimed), put_off
        )
        if waits_ms:
            held = [line for line in claimed if line.id in waits_ms]
            claimed[:] = [line for line in claimed if line.id not in waits_ms]
            await self._until_done(
                partial(self._store.batch_lines.give_back, held, waits_ms=waits_ms)
            )
        return len(waits_ms)

    def _targets_of(self, line: Line) -> tuple[Key, ...]:
        model = orjson.loads(line.body).get("model") or ""  # checked when the batch came
        return targets_of(self._relay, line.endpoint, str(model))

    async def _leave_held_up(self) -> None:
        """Give up what waits of batches whose tenants may spend no more: it is called later."""
        over = await self._store.batch_lines.held_up()
        if over:
            await self._give_up(lambda one: one.waits and one.line.batch_id in over)

    async def leave_held(self) -> None:
        """Give up what waits for what cannot be called now: it would take the places of others."""
        waiting = [one.line for one in self._tasks.values() if one.waits]
        waits_ms = self._held.waits_ms((line.id, self._targets_of(line)) for line in waiting)
        await self._give_up(lambda one: one.waits and one.line.id in waits_ms, waits_ms)

    async def leave_ended(self) -> None:
        """Give up what waits of batches that take no more calls: its turn may be far away."""
        ids = {one.line.batch_id for one in self._tasks.values() if one.waits}
        if ids and (over := await self._store.batch_lines.over(ids)):
            await self._give_up(lambda one: one.waits and one.line.batch_id in over)

    async def drain(self) -> None:
        """Hand back what waits; what is called has the grace to end."""
        await self._give_up(lambda one: one.waits)
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=self._config.shutdown_grace_ms / 1000)
        await self._give_up(lambda one: one.waits or one.is_called)
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=_LAST_RECORDS_S)

    async def _give_up(
        self, whether: Callable[[_UnderWay], bool], waits_ms: Mapping[UUID, int] | None = None
    ) -> None:
        chosen = {task: one.line for task, one in self._tasks.items() if whether(one)}
        for task in chosen:
            task.cancel()
        if not chosen:
            return
        await asyncio.wait(chosen)
        try:
            await self._store.batch_lines.give_back(chosen.values(), waits_ms=waits_ms)
        except StoreUnavailable as away:  # they return when this process is gone
            log.debug(Log.STORE_AWAY, detail=away.message)

    def _begin(self, line: Line) -> None:
        one = _UnderWay(line, Life(), self._relay.tracing.trail(line.id, None))
        task = asyncio.create_task(self._guarded(one))
        self._tasks[task] = one
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        self._freed.set()

    async def _guarded(self, one: _UnderWay) -> None:
        """The top of a line's task: it must not stay claimed."""
        try:
            await self._call(one)
        except Exception:
            log.exception(Log.INTERNAL_ERROR, request_id=str(one.line.id))
            error = TidegateError("an internal error; it has been logged")
            await self._finish(one.line, Life(), error, None)

    async def _call(self, one: _UnderWay) -> None:
        line, life = one.line, one.life
        error: TidegateError | None = None
        words: CallFailed | None = None
        try:
            await self._collect(one)
        except ClaimLost:
            # Another worker has it, which this changes nothing of; or its batch is being cancelled.
            self._outages.left(one.turn)
            await self._until_done(lambda: self._store.batch_lines.give_back([line]))
            return
        except CallFailed as failed:
            error, words = failed.error, failed
        except TidegateError as own:
            error = own
        if one.turn is not None or is_of_upstream(error):
            turn = one.turn or Turn(self._targets_of(line))
            called = life.target.upstream.name if life.target else None
            self._outages.ended(turn, called, error)
        if error is not None and (wait_ms := self._wait_ms(line, life, error)) is not None:
            waits_ms, counted = {line.id: wait_ms}, life.tries - life.of_upstream
            await self._until_done(
                lambda: self._store.batch_lines.give_back(
                    [line], waits_ms=waits_ms, counted=counted
                )
            )
            self._relay.budgets.forget(line.id)
            if life.tries:
                again = observed_of(_record_of(line, life, Failure.of(error), None))
                self._store.observers.note(replace(again, status=RETRIED))
            return
        await self._finish(line, life, error, words)

    async def _collect(self, one: _UnderWay) -> None:
        line = one.line

        async def admitted(_permit: Permit | None) -> None:
            if one.turn is None and self._outages.is_any:
                one.turn = self._outages.enter(self._targets_of(line))
            await self._store.batch_lines.begin(line)

        left_ms = round((line.expires_at - datetime.now(UTC)).total_seconds() * 1000)
        try:
            call = detached_call(
                request_id=line.id,
                path=line.endpoint,
                body=line.body.encode(),
                caller=await self._caller_of(line),
                priority=PRIORITY,
                deadline_ms=left_ms,
                trail=one.trail,
                most_tries=self._config.max_attempts - line.attempts,
            )
            await collected(self._relay, call, one.life, admitted)
        except asyncio.CancelledError:
            self._outages.left(one.turn)
            raise
        finally:
            one.is_over = True

    async def _caller_of(self, line: Line) -> Caller:
        """Who asks, and whose budget it spends. Raises StoreUnavailable."""
        caller = Caller(line.tenant_id, line.key_id, line.models)
        if line.key_id is None:
            return caller
        return replace(caller, budgets=await self._relay.budgets.budgets_of(line.tenant_id))

    def _wait_ms(self, line: Line, life: Life, error: TidegateError) -> float | None:
        """Until the line is called again; None where it has failed."""
        if isinstance(error, _LATER):
            return _AGAIN_MS
        if is_of_upstream(error):
            return self._held.wait_ms(self._targets_of(line))
        attempts = line.attempts + life.tries - life.of_upstream
        return retry_wait_ms(error, max(1, attempts), self._config.max_attempts)

    async def _finish(
        self, line: Line, life: Life, error: TidegateError | None, words: CallFailed | None
    ) -> None:
        status_code: int | None = None
        answer: str | None = None
        if error is None:
            status_code, answer = life.http_status, life.said.decode("utf-8", "replace")
        elif words is not None and words.status and words.body:
            status_code, answer = words.status, words.body.decode("utf-8", "replace")
        failure = None if error is None else Failure.of(error)
        call = await self._store.relayed.prepare(_record_of(line, life, failure, status_code))
        await self._until_done(
            lambda: self._store.batch_lines.end(
                line, call, status_code=status_code, answer=answer, failure=failure
            )
        )

    async def _until_done(self, write: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await write()
                return
            except StoreUnavailable:
                await asyncio.sleep(_AWAY_S)


def _record_of(
    line: Line, life: Life, failure: Failure | None, status_code: int | None
) -> RelayRecord:
    now, target = datetime.now(UTC), life.target
    endpoint = endpoint_of("POST", line.endpoint, dialect_of(line.endpoint, frozenset(), b""))
    return RelayRecord(
        request_id=line.id,
        tenant_id=line.tenant_id,
        pool=target.upstream.pool if target else "",
        endpoint=line.endpoint,
        status=Status.SUCCEEDED if failure is None else Status.FAILED,
        http_status=status_code or 0,
        received_at=now,
        finished_at=life.finished_at or now,
        request=line.body.encode(),
        response=life.said,
        kind=life.kind.value if life.kind else None,
        model=target.model if target else life.model,
        priority=PRIORITY,
        tries=line.attempts + life.tries,
        admitted_at=life.admitted_at,
        queue_ms=life.queue_ms,
        upstream_ms=life.upstream_ms,
        first_byte_ms=life.first_byte_ms,
        charge=life.charge,
        finish_reason=life.told.finish_reason,
        response_id=life.told.response_id,
        model_version=life.told.model_version,
        failure=failure,
        key_id=line.key_id,
        source="batch",
        upstream=target.upstream.name if target else None,
        dialect=endpoint.dialect.value if endpoint else "",
        operation=endpoint.name if endpoint else "",
        throttled=life.throttled,
        trail=life.trail,
    )
