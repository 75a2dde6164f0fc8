"""The spine of a native call: choose an upstream, admit, call, pass on, settle.

Invariants: a permit is held exactly while its upstream call is open; another upstream, or another
try, is taken only before anything of an answer has gone out; usage that is not told stays as it
was reserved.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import UTC, datetime
from random import random
from typing import Any

from tidegate.call import DEFAULT_POOL, OTHER_KIND, Outcome
from tidegate.config import Config
from tidegate.demand import Demand, Demands
from tidegate.errors import (
    DeadlineExceeded,
    DemandImpossible,
    NotFound,
    UpstreamError,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamUnauthorized,
    UpstreamUnavailable,
)
from tidegate.limiter import Limiter, Permit
from tidegate.limiter.demand import Demand as Wanted
from tidegate.providers.relay import Exchange, RelayWire
from tidegate.relay.asked import Asked, asked_of, check_one_model, parsed
from tidegate.relay.call import CallFailed, Life, NativeCall, Out
from tidegate.relay.headers import to_return, with_key
from tidegate.relay.health import Health, RetryBudget
from tidegate.relay.models import Models, is_plain
from tidegate.relay.paths import Dialect, Operation
from tidegate.relay.permission import check_model
from tidegate.relay.refusal import pause_if_throttled, refusal_of
from tidegate.relay.remaining import Remaining
from tidegate.relay.request_body import body_for
from tidegate.relay.targets import Target, Targets
from tidegate.relay.usage import pictures_in
from tidegate.relay.usage_event import WithoutUsageEvent
from tidegate.telemetry import Log, get_logger

MOST_TRIES = 4
_HARD_MARGIN_MS = 5_000
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0

log = get_logger()


class Relay:
    """One per process, over the limiters of all pools."""

    def __init__(
        self, *, config: Config, targets: Targets, pools: Mapping[str, Limiter], wire: RelayWire
    ) -> None:
        self.targets = targets
        self.health = {name: Health() for name in targets.upstreams}
        self.remaining = {pool: Remaining(limiter) for pool, limiter in pools.items()}
        self._pools = pools
        self._wire = wire
        self._demands = {
            name: Demands(kinds_optional=name != DEFAULT_POOL) for name in targets.upstreams
        }
        self._budget = RetryBudget()
        self._hard_ms = config.total_timeout_ms + _HARD_MARGIN_MS
        self._models = Models(wire)

    async def run(self, call: NativeCall, out: Out, life: Life) -> None:
        """Make the call; its answer goes to `out` as it comes, and `life` is filled.

        Raises CallFailed for what the last upstream said, and our own errors for what came before;
        after `out.started` nothing more can be told to the client but that it failed. Cancellation
        leaves neither a waiter nor an open upstream call.
        """
        if call.endpoint.operation is Operation.MODELS and await self._listed(call, out, life):
            return
        body: dict[str, Any] = {}
        asked: Asked | None = None
        if call.endpoint.operation.is_counted or call.body:
            body = parsed(call.body)
            asked = asked_of(call.endpoint, body)
            if call.endpoint.model is None:
                check_one_model(call.body)
            check_model(call.caller, asked.model)
            life.model, life.streams = asked.model, asked.streams
            life.kind = asked.kind if call.endpoint.operation.is_counted else None
        self._budget.earn()
        work = _Work(self, call, body, asked, out, life)
        await work.until_answered(self._chain(call, asked))

    async def _listed(self, call: NativeCall, out: Out, life: Life) -> bool:
        """Answer for the list of models, where it is not the only upstream's own."""
        upstreams = self.targets.speaking(call.endpoint.dialect)
        if not call.endpoint.path.endswith("/models") or not upstreams:
            return False
        if is_plain(call.caller, upstreams):
            return False
        body = await self._models.listed(call, upstreams)
        life.keep(body)
        length = (b"content-length", str(len(body)).encode())
        await out.start(200, [(b"content-type", b"application/json"), length])
        await out.body(body, False)
        return True

    def _chain(self, call: NativeCall, asked: Asked | None) -> list[Target]:
        if asked is not None:
            return self.targets.of(call.endpoint.dialect, asked.model)
        name = call.endpoint.path.rpartition("/models/")[2]
        if call.endpoint.operation is Operation.MODELS and name != call.endpoint.path:
            check_model(call.caller, name)
            return self.targets.of(call.endpoint.dialect, name)
        return [self.first_of(call.endpoint.dialect)]

    def first_of(self, dialect: Dialect) -> Target:
        """For what concerns no model. Raises NotFound where nobody speaks the dialect."""
        speaking = self.targets.speaking(dialect)
        if not speaking:
            raise NotFound(f"no upstream speaks the {dialect} dialect")
        return Target(speaking[0], "")

    def usable(self, targets: list[Target]) -> list[Target]:
        """Those that may be asked now. Raises UpstreamUnavailable where none may."""
        if len(targets) == 1 and self.health[targets[0].upstream.name].state == "ok":
            return targets
        found = [one for one in targets if self.health[one.upstream.name].admits()]
        if not found:
            first = min((self.health[one.upstream.name] for one in targets), key=Health.back_in_ms)
            raise UpstreamUnavailable(
                f"no upstream can be asked now; the last fault: {first.why}",
                retry_after_ms=first.back_in_ms(),
            )
        return found

    def limiter_of(self, target: Target) -> Limiter:
        return self._pools[target.upstream.pool]

    def demand_of(self, call: NativeCall, asked: Asked | None, target: Target) -> Demand:
        counted = call.endpoint.operation.is_counted and asked is not None
        return self._demands[target.upstream.name].of_native(
            target.model,
            asked.kind.value if counted and asked else OTHER_KIND,
            asked.pieces if asked else {},
            self.limiter_of(target).policy,
            tenant=call.caller.tenant_id,
            priority=min(call.priority, call.caller.most_priority),
            images=asked.images if asked else 0,
            max_output_tokens=asked.max_output_tokens if counted and asked else 1,
        )

    def wanted(self, demand: Demand, deadline_ms: int | None, *, once: bool = False) -> Wanted:
        return Wanted(
            demand.limits,
            demand.tenant,
            demand.priority,
            demand.tokens,
            demand.images,
            deadline_ms,
            self._hard_ms,
            once,
        )

    async def open(
        self, call: NativeCall, target: Target, body: bytes | AsyncIterator[bytes] | None
    ) -> Exchange:
        """Send the request to an upstream. Raises UpstreamError."""
        dialect = call.endpoint.dialect
        base = target.upstream.base_urls[dialect]
        text = f"{base}{call.endpoint.path_for(target.model)}"
        if call.query:
            text = f"{text}?{call.query}"
        headers = with_key(call.headers, dialect, target.upstream.key)
        return await self._wire.open(call.method, self._wire.url(text), headers, body)

    def may_try_again(self) -> bool:
        return self._budget.spend()

    def worked(self, target: Target) -> None:
        name = target.upstream.name
        if self.health[name].succeeded():
            log.warning(Log.UPSTREAM_BACK, upstream=name)

    def noted(self, failed: CallFailed) -> None:
        """What a failure says of its upstream."""
        error, name = failed.error, failed.target.upstream.name
        if isinstance(error, UpstreamThrottled | UpstreamRejected):
            self.worked(failed.target)
            return
        dead = isinstance(error, UpstreamUnauthorized)
        if self.health[name].failed(error.message, key_dead=dead):
            event = Log.UPSTREAM_KEY_DEAD if dead else Log.UPSTREAM_OUT
            log.error(event, upstream=name, detail=error.message)

    def learn(self, target: Target, demand: Demand, life: Life, *, whole: bool) -> None:
        self._demands[target.upstream.name].learn(demand, life.told.usage, whole=whole)


class _Work:
    """One call, until it is answered."""

    def __init__(
        self,
        relay: Relay,
        call: NativeCall,
        body: dict[str, Any],
        asked: Asked | None,
        out: Out,
        life: Life,
    ) -> None:
        self._relay = relay
        self._call = call
        self._body = body
        self._asked = asked
        self._out = out
        self._life = life

    async def until_answered(self, targets: list[Target]) -> None:
        left = self._relay.usable(targets)
        while True:
            try:
                await self._by_one_of(left)
                return
            except CallFailed as failed:
                self._relay.noted(failed)
                if not self._worth_another(failed):
                    raise
                left = [one for one in left if one is not failed.target]
                if not left:
                    if not failed.error.retryable or not await self._pause(failed):
                        raise
                    left = self._relay.usable(targets)
                self._life.begin_again()

    def _worth_another(self, failed: CallFailed) -> bool:
        if self._out.started or self._life.tries >= MOST_TRIES:
            return False
        again = failed.error.retryable or isinstance(failed.error, UpstreamUnauthorized)
        return again and self._call.left_ms() > 0 and self._relay.may_try_again()

    async def _pause(self, failed: CallFailed) -> bool:
        """Before the same upstream is asked again; False where the deadline would come first.

        A throttling with a time has paused the limit: its queue waits for us.
        """
        after_ms = failed.error.retry_after_ms
        if after_ms is not None and isinstance(failed.error, UpstreamThrottled):
            return after_ms < self._call.left_ms()
        longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (self._life.tries - 1))
        pause_s = (after_ms or 0) / 1000 + longest_s * (0.5 + random() / 2)
        if pause_s * 1000 >= self._call.left_ms():
            return False
        await asyncio.sleep(pause_s)
        return True

    async def _by_one_of(self, targets: list[Target]) -> None:
        """By the first that has room at once; where none has, by the first in its turn."""
        relay, call = self._relay, self._call
        demands = [relay.demand_of(call, self._asked, target) for target in targets]
        if len(targets) > 1:
            for target, demand in zip(targets, demands, strict=True):
                try:
                    async with self._attempt(target, demand) as permit:
                        if permit is not None or not demand.limits:
                            await self._under(permit, target, demand)
                            return
                except DemandImpossible:
                    if target is targets[-1]:
                        raise
        async with self._admission(targets[0], demands[0]) as permit:
            await self._under(permit, targets[0], demands[0])

    def _attempt(
        self, target: Target, demand: Demand
    ) -> AbstractAsyncContextManager[Permit | None]:
        if not demand.limits:
            return nullcontext()
        limiter = self._relay.limiter_of(target)
        return limiter.try_acquire_for(self._relay.wanted(demand, None, once=True))

    def _admission(
        self, target: Target, demand: Demand
    ) -> AbstractAsyncContextManager[Permit | None]:
        if not demand.limits:
            return nullcontext()
        left_ms = self._call.left_ms()
        if left_ms <= 0:
            raise DeadlineExceeded("the deadline has passed", limit=demand.limits[0])
        limiter = self._relay.limiter_of(target)
        return limiter.acquire_for(self._relay.wanted(demand, left_ms))

    async def _under(self, permit: Permit | None, target: Target, demand: Demand) -> None:
        """The call itself, under its permit."""
        life = self._life
        life.target = target
        life.tries += 1
        life.admitted_at = datetime.now(UTC)
        if permit is not None:
            permit.settle(Outcome.IGNORED, tokens=0, images=0)  # until there has been a call
            life.fence = permit.fence
            if life.tries == 1:
                life.queue_ms = permit.waited_ms
            await permit.confirm()
        started = time.perf_counter()
        outcome = Outcome.IGNORED
        try:
            await self._exchange(target, demand)
            outcome = Outcome.SUCCESS
        except CallFailed as failed:
            outcome = Outcome.DROPPED if failed.error.retryable else Outcome.IGNORED
            limiter = self._relay.limiter_of(target)
            await pause_if_throttled(failed, demand, limiter)
            raise
        finally:
            life.upstream_ms = (time.perf_counter() - started) * 1000
            life.finished_at = datetime.now(UTC)
            self._settle(permit, outcome, target, demand)

    def _settle(
        self, permit: Permit | None, outcome: Outcome, target: Target, demand: Demand
    ) -> None:
        life, whole = self._life, outcome is Outcome.SUCCESS
        if life.pieces:
            life.read_usage(self._call.endpoint)
        if permit is None:
            return
        images = None
        if demand.images and whole and not life.streams:
            images = pictures_in(self._call.endpoint.dialect, life.answer)
        permit.settle(outcome, tokens=demand.used(life.told.usage, whole=whole), images=images)
        self._relay.learn(target, demand, life, whole=whole)

    async def _exchange(self, target: Target, demand: Demand) -> None:
        relay, life = self._relay, self._life
        hides = bool(self._asked and self._asked.wants_usage and target.upstream.asks_usage)
        try:
            body = body_for(self._call, self._body, target, ask_usage=hides)
            exchange = await relay.open(self._call, target, body)
            try:
                if exchange.status >= 300:
                    raise await refusal_of(exchange, target)
                relay.worked(target)
                life.http_status = exchange.status
                await self._pass_on(exchange, target, demand, hides)
            finally:
                if not exchange.close():  # it is closed in the loop's next round
                    await asyncio.sleep(0)
        except UpstreamError as error:
            raise CallFailed(error, target) from None

    async def _pass_on(
        self, exchange: Exchange, target: Target, demand: Demand, hides_usage: bool
    ) -> None:
        life, out = self._life, self._out
        without = WithoutUsageEvent() if hides_usage and _is_events(exchange) else None
        headers = to_return(exchange.headers, same_length=without is None)
        headers.append((b"x-tidegate-queue-ms", b"%.1f" % life.queue_ms))
        headers.append((b"x-tidegate-upstream", target.upstream.name.encode()))
        if left := self._relay.remaining[target.upstream.pool].of(demand.limits):
            headers.append((b"x-tidegate-remaining", left))
        await out.start(exchange.status, headers)
        if without is None:
            more = True
            while more:
                piece = await exchange.next()
                life.keep(piece)
                more = not exchange.at_end
                await out.body(piece, more)
            return
        while piece := await exchange.next():
            life.keep(piece)
            if piece := without.take(piece):
                await out.body(piece, True)
        await out.body(without.rest(), False)


def _is_events(exchange: Exchange) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in exchange.headers
    )
