"""Responses and interactions in the background: polled by workers until they have ended.

    taken by the provider ──► looked at, again and again ──► ended: on record, charged, not counted

Each look is claimed and can be repeated by another worker. A call that takes longer than its
upstream's `total_timeout_ms` is cancelled at the provider, and looked at until it has ended there.

Invariants: a call counts in the limiter until the provider has said that it has ended, or does not
know it any more; it is put on record and charged once, by what the provider reports.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import orjson

from tidegate.call import Caller, Status
from tidegate.dialects import DIALECTS
from tidegate.dialects.requests import skimmed
from tidegate.dialects.spec import Dialect
from tidegate.errors import (
    ClaimLost,
    LimiterUnavailable,
    StoreUnavailable,
    UpstreamError,
    UpstreamGarbled,
)
from tidegate.record import KEPT_BYTES, CallRecord, Failure
from tidegate.settings import Config
from tidegate.spine.background import GRACE_MS
from tidegate.spine.detached import detached_call
from tidegate.spine.native import NativeExchange, Relay
from tidegate.spine.out import NothingOut
from tidegate.spine.routing import Target
from tidegate.spine.run import refusal_of
from tidegate.store.provider.background import BackgroundCall, BackgroundCalls
from tidegate.store.store import Store
from tidegate.telemetry.logging import Log, get_logger

_LOOK_EVERY_S = 0.5
_AT_ONCE = 16
_LONGEST_WAIT_MS = 30_000.0
_SHARE_OF_AGE = 0.1  # of how long it has taken, between two looks
_TROUBLE_WAIT_MS = 10_000.0
_GONE_AFTER_MS = 60_000.0
_MOST_ANSWER_BYTES = KEPT_BYTES
# Where each kind is made, by its client, and read, below the upstream's base URL.
_PATHS = {
    "response": ("/v1/responses", "/responses"),
    "interaction": ("/v1beta/interactions", "/v1beta/interactions"),
}
_STATUSES = {
    "completed": Status.SUCCEEDED,
    "incomplete": Status.SUCCEEDED,
    "requires_action": Status.SUCCEEDED,
    "requires_continuation": Status.SUCCEEDED,
    "budget_exceeded": Status.FAILED,
    "failed": Status.FAILED,
    "cancelled": Status.CANCELLED,
}

log = get_logger()


@dataclass(frozen=True, slots=True)
class _Reported:
    """What a provider said of a response: its object, None where it does not know it."""

    body: bytes
    shown: dict[str, Any] | None

    @property
    def status(self) -> str:
        return "gone" if self.shown is None else str(self.shown.get("status"))


class BackgroundRunner:
    """One process's share of all background calls."""

    def __init__(self, config: Config, store: Store, relay: Relay) -> None:
        self._config = config
        self._calls: BackgroundCalls = store.background
        self._relay, self._spine = relay, relay.spine
        self._in_hand: dict[UUID, asyncio.Task[None]] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; a look that has begun has the grace to end."""
        loop = asyncio.create_task(self._forever(self._see_to_all))
        try:
            await stop.wait()
        finally:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
            looks = set(self._in_hand.values())
            if looks:
                await asyncio.wait(looks, timeout=self._config.shutdown_grace_ms / 1000)
            for look in looks:
                look.cancel()
            await asyncio.gather(*looks, return_exceptions=True)
            try:
                await self._calls.leave()
            except StoreUnavailable as away:  # others wait for the lease
                log.debug(Log.STORE_AWAY, detail=away.message)

    async def _forever(self, loop: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await loop()
            except StoreUnavailable as away:
                log.debug(Log.STORE_AWAY, detail=away.message)
            except Exception:  # the top of a task: logged, and the loop starts again
                log.exception(Log.WORKER_LOOP_FAILED)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _see_to_all(self) -> None:
        while len(self._in_hand) < _AT_ONCE:
            call = await self._calls.take(self._in_hand)
            if call is None:
                return
            task = asyncio.create_task(self._guarded(call))
            self._in_hand[call.id] = task
            task.add_done_callback(partial(self._looked, call.id))

    def _looked(self, request_id: UUID, _: asyncio.Task[None]) -> None:
        self._in_hand.pop(request_id, None)

    async def _guarded(self, call: BackgroundCall) -> None:
        """The top of a look's task."""
        try:
            await self._look(call)
        except ClaimLost:
            return
        except StoreUnavailable as away:  # it is due, and taken again
            log.debug(Log.STORE_AWAY, detail=away.message)
        except Exception:  # the top of a task: logged, and the call is looked at again
            log.exception(Log.WORKER_LOOP_FAILED, request_id=str(call.id))
            with suppress(ClaimLost, StoreUnavailable):
                await self._calls.put_off(call, _TROUBLE_WAIT_MS)

    async def _look(self, call: BackgroundCall) -> None:
        if call.state == "running":
            await self._look_at_running(call)
            return
        # It has ended, or nobody knows whether it was ever taken: its time is over.
        await self._no_longer_counted(call)
        await self._calls.forget(call)

    async def _look_at_running(self, call: BackgroundCall) -> None:
        upstream = self._spine.targets.upstreams.get(call.upstream)
        left = call.deadline_at - datetime.now(UTC)
        is_over = left <= timedelta(0)
        await self._counted(call, left)
        if upstream is None or call.dialect not in upstream.base_urls:
            if is_over:
                await self._end(call, _Reported(b"", None), None)
            else:
                await self._calls.put_off(call, _TROUBLE_WAIT_MS)
            return
        target = Target(upstream, call.record.model or "")
        try:
            seen = await self._ask(call, target, "GET")
            if is_over and seen.status not in _STATUSES and call.cancelled_at is None:
                seen = await self._ask(call, target, "POST")
                if seen.status not in (*_STATUSES, "gone"):
                    wait_ms = float(self._config.background_poll_ms)
                    await self._calls.put_off(call, wait_ms, is_cancelled=True)
                    return
        except UpstreamError as error:
            if left <= timedelta(milliseconds=-GRACE_MS):
                await self._end(call, _Reported(b"", None), target)
            else:
                after_ms = error.retry_after_ms or 0
                await self._calls.put_off(call, max(float(after_ms), self._wait_ms(call)))
            return
        if seen.status in _STATUSES or seen.status == "gone":
            await self._end(call, seen, target)
        else:
            await self._calls.put_off(call, self._wait_ms(call))

    def _wait_ms(self, call: BackgroundCall) -> float:
        """The longer it has taken, the longer it probably still takes."""
        age_ms = (datetime.now(UTC) - call.created_at).total_seconds() * 1000
        longest_ms = max(_LONGEST_WAIT_MS, float(self._config.background_poll_ms))
        return min(longest_ms, max(float(self._config.background_poll_ms), age_ms * _SHARE_OF_AGE))

    async def _counted(self, call: BackgroundCall, left: timedelta) -> None:
        """Count it, in case Valkey has lost its data."""
        limiter = self._limiter(call)
        if limiter is None or not call.limits:
            return
        left_ms = max(0, round(left.total_seconds() * 1000)) + GRACE_MS
        with suppress(LimiterUnavailable):  # the next look repeats it
            await limiter.hold(call.permit, call.limits, left_ms)

    async def _no_longer_counted(self, call: BackgroundCall) -> None:
        """Raises LimiterUnavailable."""
        limiter = self._limiter(call)
        if limiter is not None and call.limits:
            await limiter.revoke(call.permit)

    def _limiter(self, call: BackgroundCall) -> Any:
        upstream = self._spine.targets.upstreams.get(call.upstream)
        return None if upstream is None else self._spine.lane(Target(upstream, "")).limiter

    # At the provider

    async def _ask(self, call: BackgroundCall, target: Target, method: str) -> _Reported:
        """Read the response, or by POST cancel it. Raises UpstreamError."""
        path = f"{_PATHS[call.kind][1]}/{call.resource_id}"
        path = f"{path}/cancel" if method == "POST" else path
        access = target.upstream.access(Dialect(call.dialect))
        wire, timeouts = self._relay.wire, self._spine.timeouts[call.upstream]
        place = wire.place(access.url(path, "", model=target.model, streams=False), access)
        headers = [(b"accept", b"application/json")]
        body = b"" if method == "POST" else None
        exchange = await wire.open(method, place, headers, body, None, timeouts)
        try:
            if exchange.status == 404:
                return _Reported(b"", None)
            if exchange.status >= 300:
                raise (await refusal_of(exchange, target, call.dialect)).error
            answer = await exchange.read(_MOST_ANSWER_BYTES)
        finally:
            exchange.close()
        try:
            shown = orjson.loads(answer)
        except orjson.JSONDecodeError:
            raise UpstreamGarbled("the provider's answer on a response is no JSON") from None
        if not isinstance(shown, dict):
            raise UpstreamGarbled("the provider's answer on a response is no object")
        return _Reported(answer, shown)

    # Its end

    async def _end(self, call: BackgroundCall, seen: _Reported, target: Target | None) -> None:
        record = call.record
        record.finished_at = datetime.now(UTC)
        record.sent, record.http_status, record.waits = True, 200, False
        record.response_type = "application/json"
        if record.admitted_at is not None:
            took = record.finished_at - record.admitted_at
            record.upstream_ms = took.total_seconds() * 1000
        record.streamed = False
        if seen.body:
            record.keep(seen.body)
        status = _STATUSES.get(seen.status, Status.FAILED)
        if target is not None:
            self._charge(call, record, target, whole=status is Status.SUCCEEDED)
        record.end(status, _failure(seen))
        await self._calls.end(call, record, _GONE_AFTER_MS)
        log.info(
            Log.BACKGROUND_ENDED,
            request_id=str(call.id),
            upstream=call.upstream,
            state=seen.status,
            looks=call.looks,
        )
        with suppress(LimiterUnavailable):  # the last look repeats it
            await self._no_longer_counted(call)

    def _charge(
        self, call: BackgroundCall, record: CallRecord, target: Target, *, whole: bool
    ) -> None:
        """By what the answer says of itself, as of a call that was made here."""
        caller = Caller(call.tenant_id, record.key_id)
        native = detached_call(
            request_id=call.id,
            path=_PATHS[call.kind][0],
            body=record.request,
            caller=caller,
            priority=record.priority,
            deadline_ms=None,
        )
        read = skimmed(record.request)
        spec = DIALECTS[native.endpoint.dialect]
        asked = spec.request_facts(native.endpoint, read.body, read.whole)
        exchange = NativeExchange(
            self._relay.wire, self._spine.timeouts, native, read.body, asked, NothingOut(), record
        )
        lane = self._spine.lane(target)
        demand = exchange.demand(target, lane)
        exchange.settle(target, lane, demand, whole=whole, failed=None)
        lane.demands.learn(demand, record.answer.usage, record.charge.usage, whole=whole)


def _failure(seen: _Reported) -> Failure | None:
    if _STATUSES.get(seen.status) is Status.SUCCEEDED:
        return None
    if seen.status == "cancelled":
        return Failure("cancelled", "the response was cancelled")
    if seen.shown is None:
        return Failure("background_lost", "the provider does not know the response any more")
    error = seen.shown.get("error")
    errors = seen.shown.get("errors")  # an interaction's
    error = errors[0] if isinstance(errors, list) and errors else error
    said = error.get("message") if isinstance(error, dict) else None
    return Failure("upstream_failed", str(said or "the provider failed to make it")[:2_000])
