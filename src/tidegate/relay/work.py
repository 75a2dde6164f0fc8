"""One native call, from its targets to its answer: admit, call, pass on, settle, try again.

Invariants: see `spine`. What is tried again has told its client nothing yet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import UTC, datetime
from random import random
from typing import TYPE_CHECKING, Any

import orjson

from tidegate.call import NO_BUDGETS, Outcome
from tidegate.demand import Demand
from tidegate.errors import (
    BudgetReserved,
    DeadlineExceeded,
    DemandImpossible,
    LimitPaused,
    LimitUsedUp,
    TidegateError,
    UpstreamError,
    UpstreamThrottled,
    UpstreamUnauthorized,
)
from tidegate.limiter import Permit, PoolPolicy
from tidegate.providers.relay import Exchange
from tidegate.relay import inside
from tidegate.relay.asked import Asked
from tidegate.relay.beginning import beginning_of
from tidegate.relay.call import CallFailed, Life, NativeCall, Out
from tidegate.relay.charging import native_charge, price_of
from tidegate.relay.coding import coding_of
from tidegate.relay.headers import of_answer, to_return
from tidegate.relay.refusal import refusal_of
from tidegate.relay.request_body import body_for
from tidegate.relay.targets import Target
from tidegate.relay.usage import pictures_in
from tidegate.relay.usage_event import WithoutUsageEvent
from tidegate.spine.faults import Suspect
from tidegate.spine.patience import NotWorthWaiting, Patience

if TYPE_CHECKING:
    from tidegate.relay.spine import Relay

_Never = dict[int, DemandImpossible | DeadlineExceeded]
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0

Begun = Callable[[Permit | None], Awaitable[None]]


class Work:
    """One call, until it is answered."""

    def __init__(
        self,
        relay: Relay,
        call: NativeCall,
        body: dict[str, Any],
        asked: Asked | None,
        out: Out,
        life: Life,
        on_admitted: Begun | None,
    ) -> None:
        self._on_admitted = on_admitted
        self._relay = relay
        self._call = call
        self._body = body
        self._asked = asked
        self._out = out
        self._life = life
        self._tried = False
        self._bills = call.caller.budgets is not NO_BUDGETS and call.endpoint.is_counted

    async def until_answered(self, targets: list[Target]) -> None:
        left = self._relay.usable(targets)
        while True:
            policies = self._policies(left)
            try:
                await self._by_one_of(left)
                return
            except DemandImpossible:
                # A limit was taken away while it waited: it asks for what binds it now.
                now = self._policies(left)
                if all(one is other for one, other in zip(policies, now, strict=True)):
                    raise
            except BudgetReserved:
                if self._call.left_ms() <= 0:
                    raise
                await self._relay.budgets.room(self._call.caller, self._call.left_ms() / 1000)
            except CallFailed as failed:
                if not self._worth_another(failed):
                    raise
                left = [one for one in left if one is not failed.target]
                if not left:
                    if not self._call.repeats or not failed.error.retryable:
                        raise
                    if not await self._pause(failed):
                        raise
                    left = self._relay.usable(targets)
                self._life.begin_again()

    def _policies(self, targets: list[Target]) -> list[PoolPolicy]:
        return [self._relay.limiter_of(target).policy for target in targets]

    def _worth_another(self, failed: CallFailed) -> bool:
        if self._out.started or self._life.tries >= self._call.most_tries:
            return False
        again = failed.error.retryable or isinstance(failed.error, UpstreamUnauthorized)
        return again and self._call.left_ms() > 0 and self._relay.may_try_again()

    async def _pause(self, failed: CallFailed) -> bool:
        """Before the same upstream is asked again; False where the deadline would come first.

        Where it has paused a limit, the limit's queue waits for us.
        """
        if failed.paused_ms:
            return failed.paused_ms < self._call.left_ms()
        after_ms = failed.error.retry_after_ms
        longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (self._life.tries - 1))
        pause_s = (after_ms or 0) / 1000 + longest_s * (0.5 + random() / 2)
        if pause_s * 1000 >= self._call.left_ms():
            return False
        await asyncio.sleep(pause_s)
        return True

    async def _by_one_of(self, targets: list[Target]) -> None:
        """By the first that has room at once; where none has, by the first in its turn that is not
        paused for longer than we may wait."""
        relay = self._relay
        demands = self._demands(targets)
        never: _Never = {}
        if len(targets) > 1:
            for place, (target, demand) in enumerate(zip(targets, demands, strict=True)):
                try:
                    async with self._attempt(target, demand) as permit:
                        if relay.gate_of(target).binds_more(demand, target.model):
                            if permit is not None:
                                permit.settle(Outcome.IGNORED, tokens=0, images=0)
                        elif permit is not None or not demand.limits:
                            await self._admitted(permit, target, demand)
                            return
                except DemandImpossible as impossible:
                    never[place] = impossible
        while True:
            place = 0
            if never or relay.limiter_of(targets[0]).has_pauses:
                demands = self._demands(targets)
                place = self._to_wait_for(targets, demands, never)
            self._life.queue = targets[place].upstream.pool, demands[place].limits
            try:
                async with self._admission(targets[place], demands[place]) as permit:
                    await self._admitted(permit, targets[place], demands[place])
                    return
            except NotWorthWaiting:
                continue  # in another's queue, if there is one that is
            except (LimitUsedUp, LimitPaused) as early:
                if not self._life.waits or self._call.left_ms() <= 0:
                    raise
                never[place] = early
            except DeadlineExceeded as late:
                raise relay.gate_of(targets[place]).out() or late from None

    def _demands(self, targets: list[Target]) -> list[Demand]:
        return [self._relay.demand_of(self._call, self._asked, target) for target in targets]

    def _to_wait_for(self, targets: list[Target], demands: list[Demand], never: _Never) -> int:
        """The place of the first whose queue is worth standing in. Raises DeadlineExceeded where
        all have room after our deadline only, DemandImpossible where none could ever let us in."""
        left_ms = max(0, self._call.left_ms())
        late: list[TidegateError] = [x for x in never.values() if x.retry_after_ms]
        for place, (target, demand) in enumerate(zip(targets, demands, strict=True)):
            if place in never:
                continue
            why = self._relay.gate_of(target).late(demand, left_ms)
            if why is None:
                return place
            late.append(why)
        raise min(late or never.values(), key=lambda one: one.retry_after_ms or 0)

    def _attempt(
        self, target: Target, demand: Demand
    ) -> AbstractAsyncContextManager[Permit | None]:
        if not demand.limits:
            return nullcontext()
        limiter = self._relay.limiter_of(target)
        return limiter.try_acquire_for(self._relay.wanted(demand, target, None, once=True))

    def _admission(
        self, target: Target, demand: Demand
    ) -> AbstractAsyncContextManager[Permit | None]:
        if not demand.limits:
            return nullcontext()
        left_ms = self._call.left_ms()
        if left_ms <= 0:
            raise DeadlineExceeded("the deadline has passed", limit=demand.limits[0])
        relay = self._relay
        admission = relay.limiter_of(target).acquire_for(relay.wanted(demand, target, left_ms))
        payer = self._call.caller if self._bills else None
        gate = relay.gate_of(target)
        return Patience(admission, gate, demand, target.model, left_ms, relay.budgets, payer)

    def _admitted(
        self, permit: Permit | None, target: Target, demand: Demand
    ) -> Coroutine[Any, Any, None]:
        """The call under its permit, and under its tenant's budget where there is one."""
        under = self._under_budget if self._bills else self._under
        return under(permit, target, demand)

    async def _under_budget(self, permit: Permit | None, target: Target, demand: Demand) -> None:
        call, budgets = self._call, self._relay.budgets
        if permit is not None:
            permit.settle(Outcome.IGNORED, tokens=0, images=0)  # if the budget refuses it
        demands = self._relay.demands_of(target)
        price = price_of(call, self._asked, target.model, demands, demand)
        await budgets.reserve(call.caller, call.request_id, *price)
        try:
            await self._under(permit, target, demand)
        finally:
            budgets.settle(call.caller, call.request_id, self._life.charge)

    async def _under(self, permit: Permit | None, target: Target, demand: Demand) -> None:
        """The call itself, under its permit."""
        life, gate = self._life, self._relay.gate_of(target)
        tried = self._tried = gate.is_try(demand)
        life.waits = False
        life.target = target
        life.tries += 1
        life.admitted_at = datetime.now(UTC)
        if permit is not None:
            permit.settle(Outcome.IGNORED, tokens=0, images=0)  # until there has been a call
            life.fence = permit.fence
            if life.tries == 1:
                life.queue_ms = permit.waited_ms
        if self._on_admitted is not None:
            await self._on_admitted(permit)
        if permit is not None:
            await permit.confirm()  # last: a slow `on_admitted` must not make the call a late one
        started = time.perf_counter()
        outcome, refused, error = Outcome.IGNORED, False, None
        try:
            await self._exchange(target, demand)
            outcome = Outcome.SUCCESS
        except CallFailed as failed:
            error = failed
            refused = failed.status >= 400
            failed.headers += of_answer(target.upstream.name, life.queue_ms)
            life.throttled += isinstance(failed.error, UpstreamThrottled)
            life.failed = failed.error
            outcome = Outcome.DROPPED if failed.error.retryable else Outcome.IGNORED
            if isinstance(failed.error, UpstreamThrottled):
                failed.paused_ms = await gate.throttled(failed.error, target.model, demand)
            suspect = suspect_of(self._call)
            await gate.failed(failed.error, target.model, suspect=suspect, tried=tried)
            life.of_upstream += failed.error.of_upstream
            raise
        finally:
            life.upstream_ms = (time.perf_counter() - started) * 1000
            life.finished_at = datetime.now(UTC)
            if self._call.trail is not None:
                why, status = (None, 0) if error is None else (error.error, error.status)
                self._call.trail.end(why, worked=outcome is Outcome.SUCCESS, status=status)
            self._settle(permit, outcome, target, demand, refused)

    def _settle(
        self,
        permit: Permit | None,
        outcome: Outcome,
        target: Target,
        demand: Demand,
        refused: bool,
    ) -> None:
        life, whole = self._life, outcome is Outcome.SUCCESS
        demands = self._relay.demands_of(target)
        if life.pieces:
            life.read_usage(self._call.endpoint, whole=whole)
        images = None
        if demand.images and whole and not life.streams:
            images = pictures_in(self._call.endpoint.dialect, life.said)
        if not refused:
            call, asked, body = self._call, self._asked, self._body
            life.charge = native_charge(
                call, asked, life, demands, demand, body=body, whole=whole, images=images
            )
        if permit is None:
            return
        told, charged = life.told.usage, life.charge.usage
        permit.settle(outcome, tokens=demand.used(told, charged, whole=whole), images=images)
        demands.learn(demand, told, charged, whole=whole)

    async def _exchange(self, target: Target, demand: Demand) -> None:
        relay = self._relay
        hides = bool(self._asked and self._asked.wants_usage and target.upstream.asks_usage)
        try:
            body = body_for(self._call, self._body, target, ask_usage=hides)
            exchange = await relay.open(self._call, target, body, self._note_sent)
            try:
                status = exchange.status
                if self._call.endpoint.is_counted and (status < 300 or status == 429):
                    announced = relay.gate_of(target).announced
                    announced.note(target.model, exchange.headers)
                if status >= 300:
                    raise await refusal_of(exchange, target, self._call.endpoint.dialect)
                await self._pass_on(exchange, target, demand, hides)
            finally:
                self._life.first_byte_ms = exchange.first_byte_ms
                if not exchange.close():  # it is closed in the loop's next round
                    await asyncio.sleep(0)
        except UpstreamError as error:
            raise CallFailed(error, target) from None

    def _note_sent(self) -> None:
        self._life.sent = True

    async def _pass_on(
        self, exchange: Exchange, target: Target, demand: Demand, hides_usage: bool
    ) -> None:
        life, out = self._life, self._out
        first = await self._first(exchange, target)
        gate = self._relay.gate_of(target)
        if self._tried or gate.has_doubts:
            await gate.worked(target.model, tried=self._tried)
        life.http_status = exchange.status
        life.coding = coding_of(exchange.headers)
        hides_usage = hides_usage and not life.coding
        without = WithoutUsageEvent() if hides_usage and _is_events(exchange) else None
        key = target.upstream.key
        headers = to_return(exchange.headers, key, same_length=without is None)
        headers += of_answer(target.upstream.name, life.queue_ms)
        if left := self._relay.remaining[target.upstream.pool].of(demand.limits):
            headers.append((b"x-tidegate-remaining", left))
        life.keep(first)
        if without is None and exchange.at_end:
            await out.whole(exchange.status, headers, first)
        else:
            await out.start(exchange.status, headers)
            await self._pieces(exchange, first, without)
        pieces = [life.said] if life.coding else life.pieces
        if life.streams and (value := inside.error_in(inside.tail_of(pieces))) is not None:
            error = inside.error_of(value, exchange.headers, secret=target.upstream.key)
            raise CallFailed(error, target, told=True)

    async def _first(self, exchange: Exchange, target: Target) -> bytes:
        """The first bytes of the body. Raises CallFailed where they tell an error, of which the
        client has heard nothing yet."""
        if not self._call.endpoint.is_counted:  # such as a file, which may say anything
            return await exchange.next()
        first, value = await beginning_of(exchange, streams=self._life.streams)
        if value is None:
            return first
        key = target.upstream.key
        raise CallFailed(
            inside.error_of(value, exchange.headers, secret=key),
            target,
            status=inside.status_of(value),
            headers=inside.own_headers(to_return(exchange.headers, key, same_length=False)),
            body=orjson.dumps(inside.body_of(value)).replace(key.encode(), b"***"),
        )

    async def _pieces(
        self, exchange: Exchange, piece: bytes, without: WithoutUsageEvent | None
    ) -> None:
        life, out = self._life, self._out
        if without is None:
            more = not exchange.at_end
            await out.body(piece, more)
            while more:
                piece = await exchange.next()
                life.keep(piece)
                more = not exchange.at_end
                await out.body(piece, more)
            return
        while piece:
            if shown := without.take(piece):
                await out.body(shown, True)
            if piece := await exchange.next():
                life.keep(piece)
        await out.body(without.rest(), False)


def suspect_of(call: NativeCall) -> Suspect:
    """Who a fault is laid to that the request may have brought about."""
    endpoint = call.endpoint
    request = hash((endpoint.path, endpoint.model, call.query, call.body))
    return Suspect(None if call.caller.key_id is None else call.caller.tenant_id, request)


def _is_events(exchange: Exchange) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in exchange.headers
    )
