"""Background work at providers: responses, interactions, videos, batches; polled to its end.

    accepted by the provider ──► polled repeatedly ──► ended: on record, charged, not counted

Each poll is claimed and can be repeated by another worker. A call that takes longer than its
upstream's `total_timeout_ms` is cancelled at the provider, and polled until it has ended there, for
`GRACE_MS` at most.

Invariants: a call counts in the limiter until the provider reports its end or does not know it any
more, or has had that time; it is recorded and charged once, by what the provider reports.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import quote
from uuid import UUID

import orjson

from tidegate.admission.estimator import with_stored
from tidegate.call import Caller, Status, UsageState
from tidegate.dialects import DIALECTS
from tidegate.dialects.spec import AnswerFacts, Dialect, Endpoint, OngoingWork
from tidegate.errors import (
    ClaimLost,
    LimiterUnavailable,
    StoreUnavailable,
    UpstreamError,
    UpstreamGarbled,
)
from tidegate.jobs.calls import crowded, forever, run_until
from tidegate.record import CallRecord, Failure
from tidegate.settings import Config
from tidegate.spine.bodies import Pieces, aside
from tidegate.spine.detached import detached_call
from tidegate.spine.hand_over import GRACE_MS
from tidegate.spine.models import unchecked_facts
from tidegate.spine.native import NativeExchange, Relay
from tidegate.spine.out import NothingOut
from tidegate.spine.resources import Keeping, MadeBy
from tidegate.spine.routing import Target
from tidegate.spine.run import refusal_of
from tidegate.store.provider.background import BackgroundCall, BackgroundCalls
from tidegate.store.provider.resources import NewResource
from tidegate.store.store import Store
from tidegate.telemetry.logging import Log, get_logger
from tidegate.upstream.transport import Exchange

_POLL_EVERY_S = 0.5
_AT_ONCE = 16
_LONGEST_WAIT_MS = 30_000.0
_SHARE_OF_AGE = 0.1  # of the call's age: the time between two polls
_TROUBLE_WAIT_MS = 10_000.0
_GONE_AFTER_MS = 60_000.0
LOST_AFTER_S = 60.0  # for how long a provider must not know a call
_MOST_MISSED = 10_000
_END_TRIES = 40
_MOST_ANSWER_BYTES = 64_000_000  # of a parsed answer; a batch may contain all of its answers
log = get_logger()


@dataclass(frozen=True, slots=True)
class _Reported:
    """A provider's report on its work: its object, None if the provider does not know the work.
    end: its final status, None while it continues, or for work that is given up. facts: of an
    object that is too long to be parsed, and is empty here."""

    body: bytes
    document: dict[str, Any] | None
    end: Status | None = Status.FAILED
    facts: AnswerFacts | None = None


def _work_of(call: BackgroundCall) -> OngoingWork:
    return DIALECTS[call.dialect].works[call.kind]


def _rest_ms(call: BackgroundCall) -> float:
    """Return how long the call may still take to end: a grace period follows its longest time, or
    its cancellation if that is later."""
    if call.left_ms > 0:
        return call.left_ms + GRACE_MS
    over_ms = call.cancelled_ms or 0.0 if _work_of(call).cancel else -call.left_ms
    return GRACE_MS - over_ms


class BackgroundRunner:
    """One process's share of all background calls."""

    def __init__(self, config: Config, store: Store, relay: Relay) -> None:
        self._config = config
        self._calls: BackgroundCalls = store.background
        self._due = store.notifications.due
        self._relay, self._spine = relay, relay.spine
        self._in_hand: dict[UUID, asyncio.Task[None]] = {}
        self._missed: dict[UUID, float] = {}  # since when the provider does not know them

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; a poll in progress may end within the grace period."""
        rest = partial(self._due, "background", _POLL_EVERY_S)
        await run_until(
            stop,
            [forever(self._see_to_all, rest)],
            self._in_hand,
            grace_ms=self._config.shutdown_grace_ms,
            leave=self._calls.leave,
        )

    async def _see_to_all(self) -> None:
        while len(self._in_hand) < _AT_ONCE:
            full = crowded(self._in_hand.values(), _AT_ONCE)
            call = await self._calls.take(self._in_hand, full)
            if call is None:
                return
            task = asyncio.create_task(self._guarded(call), name=call.upstream)
            self._in_hand[call.id] = task
            task.add_done_callback(partial(self._polled, call.id))

    def _polled(self, request_id: UUID, _: asyncio.Task[None]) -> None:
        self._in_hand.pop(request_id, None)

    async def _guarded(self, call: BackgroundCall) -> None:
        """Run one poll."""
        try:
            await self._poll(call)
        except ClaimLost:
            return
        except StoreUnavailable as unavailable:  # it is due, and taken again
            log.debug(Log.STORE_AWAY, detail=unavailable.message)
        except LimiterUnavailable:  # which the limiter logs
            with suppress(ClaimLost, StoreUnavailable):
                await self._calls.put_off(call, _TROUBLE_WAIT_MS)
        except Exception:  # the top of a task: logged, and the call is polled again
            log.exception(Log.WORKER_LOOP_FAILED, request_id=str(call.id))
            with suppress(ClaimLost, StoreUnavailable):
                await self._calls.put_off(call, _TROUBLE_WAIT_MS)

    async def _poll(self, call: BackgroundCall) -> None:
        if call.state == "running":
            await self._poll_running(call)
            return
        # It has ended, or may never have been accepted, and its time has passed.
        await self._no_longer_counted(call)
        await self._calls.forget(call)

    async def _poll_running(self, call: BackgroundCall) -> None:
        upstream = self._spine.targets.upstreams.get(call.upstream)
        is_over = call.left_ms <= 0
        await self._counted(call)
        if upstream is None or call.dialect not in upstream.base_urls:
            if is_over:
                await self._end(call, _Reported(b"", None), None)
            else:
                await self._calls.put_off(call, _TROUBLE_WAIT_MS)
            return
        target = Target(upstream, call.record.model or "")
        try:
            reported = await self._ask(call, target, "GET")
            if reported.document is not None:
                self._missed.pop(call.id, None)
            elif not (is_over or self._is_lost(call)):
                await self._calls.put_off(call, self._wait_ms(call))
                return
            can_cancel = bool(_work_of(call).cancel) and call.cancelled_ms is None
            if is_over and reported.end is None and can_cancel:
                reported = await self._ask(call, target, "POST")
                if reported.end is None:
                    wait_ms = float(self._config.background_poll_ms)
                    await self._calls.put_off(call, wait_ms, is_cancelled=True)
                    return
            if reported.end is not None or _rest_ms(call) <= 0:
                await self._end(call, reported, target)
                return
        except UpstreamError as error:
            if call.left_ms <= -GRACE_MS:
                await self._end(call, _Reported(b"", None), target)
            else:
                await self._calls.put_off(call, max(float(error.pause_ms), self._wait_ms(call)))
            return
        await self._calls.put_off(call, self._wait_ms(call))

    def _is_lost(self, call: BackgroundCall) -> bool:
        """Whether the provider has not known the call for long enough: a proxy before a provider in
        an outage may answer 404 too."""
        now = time.monotonic()
        if len(self._missed) >= _MOST_MISSED:
            self._missed.clear()
        return now - self._missed.setdefault(call.id, now) >= LOST_AFTER_S

    def _wait_ms(self, call: BackgroundCall) -> float:
        """Return the time until the next poll, which grows with the call's age."""
        shortest_ms = float(self._config.background_poll_ms)
        longest_ms = max(_LONGEST_WAIT_MS, shortest_ms)
        return min(longest_ms, max(shortest_ms, call.age_ms * _SHARE_OF_AGE))

    async def _counted(self, call: BackgroundCall) -> None:
        """Count the call again, in case Valkey has lost its data."""
        limiter = self._limiter(call)
        if limiter is None or not call.limits:
            return
        if (rest_ms := round(_rest_ms(call))) > 0:
            with suppress(LimiterUnavailable):  # the next poll repeats it
                await limiter.hold(call.permit, call.limits, rest_ms)

    async def _no_longer_counted(self, call: BackgroundCall) -> None:
        """Stop counting the call. Raises LimiterUnavailable."""
        limiter = self._limiter(call)
        if limiter is not None and call.limits:
            await limiter.revoke(call.permit)

    def _limiter(self, call: BackgroundCall) -> Any:
        upstream = self._spine.targets.upstreams.get(call.upstream)
        return None if upstream is None else self._spine.account(Target(upstream, "")).limiter

    # At the provider

    async def _ask(self, call: BackgroundCall, target: Target, method: str) -> _Reported:
        """Read the work, or with POST cancel it. Raises UpstreamError."""
        work = _work_of(call)
        path = self._path(call, work.cancel if method == "POST" else work.read)
        exchange = await self._open(call, target, method, path)
        try:
            if exchange.status == 404:
                return _Reported(b"", None)
            if exchange.status == 202:  # xAI's, without a body
                return _Reported(b"", {}, None)
            if exchange.status >= 300:
                raise (await refusal_of(exchange, target, call.dialect)).error
            answer = await Pieces.of(exchange, _MOST_ANSWER_BYTES)
            if not answer.is_whole:
                return await self._long(call, exchange, await answer.joined())
        finally:
            exchange.close()
        try:
            document = await answer.read(orjson.loads)
        except orjson.JSONDecodeError:
            raise UpstreamGarbled("the provider's answer about a response is not JSON") from None
        if not isinstance(document, dict):
            raise UpstreamGarbled("the provider's answer about a response is not an object")
        return _Reported(await answer.joined(), document, work.end_of(document))

    @staticmethod
    async def _long(call: BackgroundCall, exchange: Exchange, begin: bytes) -> _Reported:
        """Return the report of an object that is too long to be parsed, such as a batch with all
        its answers. It has ended, since work in progress contains no answers. A bounded part of it
        is kept in the record."""
        make, record = _work_of(call).tally, call.record
        tally = None if make is None else make({}, record.request)
        held, piece = b"", begin
        while piece:
            record.keep(piece)
            if tally is not None:
                held += piece
                done = await aside(len(held), partial(tally.skim, held, is_last=False))
                held = held[done:]
            piece = await exchange.next()
        if tally is not None:
            await aside(record.answer_bytes, partial(tally.skim, held, is_last=True))
        return _Reported(b"", {}, Status.SUCCEEDED, None if tally is None else tally.facts())

    def _path(self, call: BackgroundCall, path: str) -> str:
        model = quote(call.record.model or "", safe="")
        return path.replace("{model}", model).replace("{id}", call.resource_id or "")

    async def _open(self, call: BackgroundCall, target: Target, method: str, path: str) -> Exchange:
        access = target.upstream.access(Dialect(call.dialect))
        wire, timeouts = self._relay.wire, self._spine.timeouts[call.upstream]
        path, _, query = path.partition("?")
        place = wire.place(access.url(path, query, model=target.model, streams=False), access)
        headers = [(b"accept", b"application/json")]
        body = b"" if method == "POST" else None
        return await wire.open(method, place, headers, body, None, timeouts)

    async def _facts(
        self, call: BackgroundCall, target: Target, document: dict[str, Any], size_bytes: int
    ) -> AnswerFacts | None:
        """Return the facts of all the answers within the work, whose object has `size_bytes`; None
        if the work is one answer. Raises UpstreamError."""
        work = _work_of(call)
        if work.tally is None:
            return None
        tally = await aside(size_bytes, partial(work.tally, document, call.record.request))
        if path := work.results(document):
            exchange = await self._open(call, target, "GET", path)
            try:
                if exchange.status >= 300:
                    raise (await refusal_of(exchange, target, call.dialect)).error
                async for row in rows_of(exchange):
                    tally.add(row)
            finally:
                exchange.close()
        return tally.facts()

    # The end of a call

    async def _end(self, call: BackgroundCall, reported: _Reported, target: Target | None) -> None:
        """End a call: charge it and record it. Raises UpstreamError if its answers cannot be
        read."""
        record, facts, made = call.record, None, list[NewResource]()
        if target is not None and reported.document is not None:
            document, size_bytes = reported.document, len(reported.body)
            facts = reported.facts or await self._facts(call, target, document, size_bytes)
            made = self._made(call, target, reported.document)
        record.finished_at = datetime.now(UTC)
        record.sent, record.http_status, record.waits = True, 200, False
        record.response_type = "application/json"
        if record.admitted_at is not None:
            took = record.finished_at - record.admitted_at
            record.upstream_ms = took.total_seconds() * 1000
        record.streamed = False
        if reported.body:
            record.keep(reported.body)
        self._missed.pop(call.id, None)
        status = reported.end or Status.FAILED
        if target is not None:
            await self._charge(call, record, target, facts, whole=status is Status.SUCCEEDED)
        if made:
            await self._relay.resources.note(made)
        record.end(status, _failure(reported))
        await self._ended(call, record)
        log.info(
            Log.BACKGROUND_ENDED,
            request_id=str(call.id),
            upstream=call.upstream,
            state=status.value,
            looks=call.looks,
        )
        with suppress(LimiterUnavailable):  # the last poll repeats it
            await self._no_longer_counted(call)

    async def _ended(self, call: BackgroundCall, record: CallRecord) -> None:
        """Write a call's end. A result that the provider delivers only once is retried for some
        seconds while PostgreSQL is unavailable. Raises StoreUnavailable and ClaimLost."""
        for left in reversed(range(_END_TRIES if _work_of(call).is_read_once else 1)):
            try:
                await self._calls.end(call, record, _GONE_AFTER_MS)
                return
            except StoreUnavailable:
                if not left:
                    raise
            await asyncio.sleep(_POLL_EVERY_S)

    def _made(
        self, call: BackgroundCall, target: Target, document: dict[str, Any]
    ) -> list[NewResource]:
        """Return the files that the work made, which belong to its caller."""
        caller = Caller(call.tenant_id, call.record.key_id)
        by = MadeBy(caller, Dialect(call.dialect), call.id, call.record.subject)
        return self._relay.resources.made(by, target, "file", _work_of(call).files(document))

    async def _charge(
        self,
        call: BackgroundCall,
        record: CallRecord,
        target: Target,
        facts: AnswerFacts | None,
        *,
        whole: bool,
    ) -> None:
        """Charge a call by the usage in its answer, as a call that was made directly; or by
        `facts`, of all answers within it, whether it succeeded or not."""
        caller, work = Caller(call.tenant_id, record.key_id), _work_of(call)
        model = (record.model or None) if "{model}" in work.path else None
        native = detached_call(
            request_id=call.id,
            endpoint=Endpoint(Dialect(call.dialect), work.operation, work.path, model=model),
            body=record.request,
            caller=caller,
            priority=record.priority,
            deadline_ms=None,
        )
        raw, spec = record.request, DIALECTS[native.endpoint.dialect]
        body, request_facts = await aside(len(raw), partial(unchecked_facts, native.endpoint, raw))
        if references := await aside(len(raw), partial(spec.references, body, raw)):
            stored = await self._relay.resources.stored_tokens(caller, spec.name, references)
            request_facts.pieces = (
                with_stored(request_facts.pieces, stored) if stored else request_facts.pieces
            )
        exchange = NativeExchange(
            self._relay.wire,
            self._spine.timeouts,
            native,
            body,
            request_facts,
            NothingOut(),
            record,
        )
        exchange.known_facts = facts
        exchange.keeping = Keeping(self._relay.resources, native, None, references)
        whole = whole or facts is not None
        account = self._spine.account(target)
        demand = exchange.demand(target, account)
        await exchange.read_aside(whole=whole)
        exchange.settle(target, account, demand, whole=whole, failed=None)
        if facts is not None and facts.is_estimate and record.charge.state is UsageState.TOLD:
            record.charge = replace(record.charge, state=UsageState.ESTIMATED)
            return
        account.demands.learn(demand, record.answer.usage, record.charge.usage, whole=whole)


def _failure(reported: _Reported) -> Failure | None:
    if reported.end is Status.SUCCEEDED:
        return None
    if reported.end is Status.CANCELLED:
        return Failure("cancelled", "the response was cancelled")
    if reported.document is None:
        return Failure("background_lost", "the provider does not know the response any more")
    if reported.end is None:
        return Failure("background_lost", "the provider reported no end of the response in time")
    error = reported.document.get("error")
    errors = reported.document.get("errors")  # of an interaction
    error = errors[0] if isinstance(errors, list) and errors else error
    message = error.get("message") if isinstance(error, dict) else None
    return Failure("upstream_failed", str(message or "the provider failed to make it")[:2_000])


# Read as an answer without usage, so that the usage of the whole is unknown.
_UNREAD: dict[str, Any] = {"response": {"unread": True}}


async def rows_of(
    exchange: Exchange, most_bytes: int = _MOST_ANSWER_BYTES
) -> AsyncIterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file. A line that is too long or no JSON counts as an
    answer of unknown usage, since it would be the same whenever it is read."""
    held: list[bytes] = []  # of an incomplete line
    size_bytes = 0
    while piece := await exchange.next():
        for number, part in enumerate(piece.split(b"\n")):
            if number:  # each part but the first begins a line
                row = await _row(b"".join(held), size_bytes > most_bytes)
                held, size_bytes = [], 0
                if row is not None:
                    yield row
            size_bytes += len(part)
            if size_bytes <= most_bytes:
                held.append(part)
    if (last := await _row(b"".join(held), size_bytes > most_bytes)) is not None:
        yield last


async def _row(line: bytes, is_too_long: bool) -> dict[str, Any] | None:
    if is_too_long:
        return _UNREAD
    if not line.strip():
        return None
    try:
        row = await aside(len(line), partial(orjson.loads, line))
    except orjson.JSONDecodeError:
        return _UNREAD
    return row if isinstance(row, dict) else _UNREAD
