"""Native calls: route, admit, call, pass on, settle, record; retried and failed over.

Bodies pass through unchanged except for the model's name; uploads and files are streamed. Output
is held back for at most `HELD_S` and `HELD_BYTES` until it has content, because a provider can
answer 200 and fail before the first output: such a call is retried or moves to the next upstream.

Invariants: a permit is held exactly while its upstream call is open; another try or upstream is
taken only before anything was sent to the client; the provider's usage of a whole answer stands,
every other charge is at least the estimated input and the visible output; a caller can use only
the models that it may use, also for tools and fallbacks; redirects are followed within the
upstream's base URL only; an upload URL with a key never reaches a client.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from random import random
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit
from uuid import UUID

import orjson

from tidegate.admission.demand import (
    CacheWrite,
    Demand,
    Demands,
    Prices,
    Rates,
    charge_of,
    cut_charge,
    estimated_charge,
    foreseen,
    is_unknown,
)
from tidegate.admission.estimator import Estimate
from tidegate.call import DEFAULT_POOL, NO_BUDGETS, NO_CHARGE, OTHER_KIND, Caller, Charge, Outcome
from tidegate.dialects import DIALECTS, dialect_of, endpoint_of, refusals
from tidegate.dialects.answers import WithoutUsageEvent, asking_for_usage, visible_output
from tidegate.dialects.headers import Remaining, of_answer, to_return, to_send, with_key
from tidegate.dialects.requests import NAMES_MODEL, check_said_once, skimmed
from tidegate.dialects.spec import Dialect, Endpoint, Headers, ModelList, Operation, RequestFacts
from tidegate.errors import (
    BudgetReserved,
    DeadlineExceeded,
    DemandImpossible,
    Forbidden,
    InvalidRequest,
    LimitPaused,
    LimitUsedUp,
    NotFound,
    TidegateError,
    UpstreamError,
    UpstreamGarbled,
    UpstreamThrottled,
    UpstreamUnauthorized,
)
from tidegate.limiter import Demand as Wanted
from tidegate.limiter import Limiter, Permit, PoolPolicy
from tidegate.policy.deployment import Upstream
from tidegate.settings import Config
from tidegate.spine.record import (
    KEPT_BYTES,
    MOST_TRIES,
    CallFailed,
    Life,
    NativeCall,
    Out,
    coding_of,
    decoded,
)
from tidegate.spine.routing import (
    Gate,
    Gates,
    NotWorthWaiting,
    Patience,
    RetryBudget,
    Suspect,
    Target,
    Targets,
)
from tidegate.store.quotas import BudgetGate
from tidegate.telemetry.logging import get_logger
from tidegate.telemetry.tracing import HEADER, Tracing, Trail
from tidegate.upstream.http import Exchange, RelayWire, Timeouts

_REFUSAL_BYTES = 1_000_000


async def refusal_of(exchange: Exchange, target: Target, dialect: str) -> CallFailed:
    """An answer that is not a success, read to its end. Raises UpstreamError where that fails."""
    body = await exchange.read(_REFUSAL_BYTES)
    status = exchange.status
    if status < 400:
        raise UpstreamGarbled(f"the provider answered {status}, which is not followed")
    headers, key = exchange.headers, target.upstream.key.encode()
    coding = coding_of(headers)
    text = decoded(body, coding) if coding else body
    if coding and key in text:  # goes on decoded, and without it
        body, headers = text, [pair for pair in headers if pair[0].lower() != b"content-encoding"]
    said = refusals.error_of_refusal_in(text)
    named = {
        name.decode("latin-1").lower(): value.decode("latin-1") for name, value in exchange.headers
    }
    error = refusals.upstream_error(
        status, said, named, secret=target.upstream.key, dialect=dialect
    )
    return CallFailed(
        error,
        target,
        status=status,
        headers=to_return(headers, target.upstream.key, same_length=False),
        body=body.replace(key, b"***"),
    )


def native_charge(
    call: NativeCall,
    asked: RequestFacts | None,
    life: Life,
    demands: Demands,
    demand: Demand,
    *,
    body: dict[str, Any],
    whole: bool,
    images: int | None,
) -> Charge:
    """Of a call that an upstream has begun to answer, or may have. `body`: as it was parsed.
    `images`: None where they were not counted."""
    if asked is None or life.target is None or not life.sent or not call.endpoint.is_counted:
        return NO_CHARGE
    usage, model = life.told.usage, life.target.model
    rates = demands.prices.of(model or life.told.model_version or "")
    dialect = DIALECTS[call.endpoint.dialect]
    if images is None and asked.images and life.streams and _tells_pictures(call):
        images = dialect.image_count(life.said)
    if whole and (images or not is_unknown(usage)):
        return charge_of(rates, usage, images, whole=True)
    came = visible_output(dialect, life.said, life.said_bytes)
    estimate = _estimate(demands, demand, asked, model, call.caller.tenant_id)
    if is_unknown(usage):
        pictures = images or came.images
        writes = _cache_write(rates, body)
        return estimated_charge(rates, estimate, came.tokens, pictures, usage.details, writes)
    return cut_charge(rates, usage, estimate, came.tokens, images)


def _cache_write(rates: Rates | None, body: dict[str, Any]) -> CacheWrite | None:
    """To which cache a request asks its input to be written, where that has a price of its own: who
    leaves before the usage is told has it written all the same."""
    if rates is None or rates.cache_write == rates.cache_write_1h == rates.input:
        return None
    try:
        text = orjson.dumps(body)  # in which no name is escaped
    except orjson.JSONEncodeError:  # nested deeper than can be written
        return "1h"
    if b'"cache_control":' not in text:
        return None
    return "1h" if b'"ttl":"1h"' in text else "5m"


def _tells_pictures(call: NativeCall) -> bool:
    """Whether the pictures of a whole stream can be counted: others come in parts."""
    return call.endpoint.dialect is Dialect.GEMINI or call.endpoint.path == "/responses"


def price_of(
    call: NativeCall, asked: RequestFacts | None, model: str, demands: Demands, demand: Demand
) -> tuple[int, int]:
    """What a call will cost, about: millionths of money, and LLM tokens."""
    if asked is None or not call.endpoint.is_counted:
        return 0, 0
    estimate = _estimate(demands, demand, asked, model, call.caller.tenant_id)
    return foreseen(demands.prices.of(model), estimate, asked.images)


def _estimate(
    demands: Demands, demand: Demand, asked: RequestFacts, model: str, tenant: str
) -> Estimate:
    if demand.estimate is not None:
        return demand.estimate
    return demands.estimator.of_pieces(
        model,
        asked.kind.value,
        asked.pieces,
        images=asked.images,
        max_output_tokens=asked.max_output_tokens,
        tenant=tenant,
    )


_TEXT = re.compile(rb'\s*("(?:[^"\\]|\\.)*")')
# Below other objects there may be more models, such as a tool's parameter of that name.
_MOST_MODELS = 8
# Whose bodies name the model of the path again, which must be the same.
_NAMES_IT_AGAIN = (Operation.EMBED, Operation.COUNT)


def body_for(
    call: NativeCall, body: dict[str, Any], target: Target, *, ask_usage: bool
) -> bytes | None:
    """The bytes of the client, but with the upstream's name for the model, and asking a stream
    for its usage. None for a request without a body. Raises InvalidRequest."""
    if not call.body:
        return None
    try:
        return _changed(call, body, target, ask_usage)
    except orjson.JSONEncodeError:  # what can be read can be nested deeper than what can be written
        allowed = "at most 250 levels"
        raise InvalidRequest("body", "the body is nested too deeply", allowed=allowed) from None


def _changed(call: NativeCall, body: dict[str, Any], target: Target, ask_usage: bool) -> bytes:
    raw, named = call.body, call.endpoint.model
    if named is not None:
        again = call.endpoint.operation in _NAMES_IT_AGAIN and named != target.model
        return _model_named_again(raw, named, target.model) if again else raw
    if target.model and body.get("model") != target.model:
        with_model = _with_model if "model" in body else _naming_model
        body = {**body, "model": target.model}
        raw = with_model(raw, target.model) or _rewritten(raw, "model", target.model)
    return asking_for_usage(raw, body) if ask_usage else raw


def _with_model(raw: bytes, model: str) -> bytes | None:
    """The same with another value of the outermost `model`; None where it is not found. There is
    one such field, and its value is a text."""
    found = [one.end() for one in NAMES_MODEL.finditer(raw)]
    if len(found) > _MOST_MODELS:
        return None
    name = orjson.dumps(model)
    for end in found:
        if (text := _TEXT.match(raw, end)) is None:
            continue
        changed = raw[: text.start(1)] + name + raw[text.end(1) :]
        if len(found) == 1 or orjson.loads(changed)["model"] == model:
            return changed
    return None


def _rewritten(raw: bytes, name: str, value: Any) -> bytes:
    """With another value of a field: from the bytes, since a large body is parsed without files."""
    return orjson.dumps({**orjson.loads(raw), name: value})


def _naming_model(raw: bytes, model: str) -> bytes:
    """The same with a model that it did not name."""
    start = raw.index(b"{") + 1
    return b'%b"model":%b,%b' % (raw[:start], orjson.dumps(model), raw[start:])


def _model_named_again(raw: bytes, named: str, model: str) -> bytes:
    names = rb'("model"\s*:\s*"(?:models/)?)%b(?=")' % re.escape(named.encode())
    name = orjson.dumps(model)[1:-1]
    return re.sub(names, lambda found: found[1] + name, raw)


HELD_S = 2.0
HELD_BYTES = 65_536
_FIELDS = (b":", b"event:", b"id:", b"retry:")
_BEGUN = frozenset(
    {
        *("response.created", "response.in_progress", "response.queued"),
        *("response.content_part.added", "response.reasoning_summary_part.added"),
        *("message_start", "ping"),
    }
)


async def beginning_of(exchange: Exchange, *, streams: bool) -> tuple[bytes, dict[str, Any] | None]:
    """The first bytes of an answer, up to its first output where it `streams`, and the object that
    tells an error where there was one before that. Raises UpstreamError. Cancelling leaves the
    exchange open."""
    first = await exchange.next()
    if streams:
        prelude = Prelude()
        until = asyncio.get_running_loop().time() + HELD_S
        holds = prelude.holds(first, at_end=exchange.at_end)
        while holds and not exchange.at_end and len(first) < HELD_BYTES:
            try:
                async with asyncio.timeout_at(until):
                    piece = await exchange.next()
            except TimeoutError:
                break
            first += piece
            holds = prelude.holds(piece, at_end=exchange.at_end)
        if prelude.is_events:
            return first, prelude.error
    # Half a line is of no use to anybody.
    while streams and refusals.is_too_short(first) and not exchange.at_end:
        first += await exchange.next()
    if not refusals.may_begin_with_error(first):
        return first, None
    while (value := refusals.error_event_in(first)) is None:
        if exchange.at_end or len(first) > refusals.LONGEST_BYTES:
            return first, None
        first += await exchange.next()
    return first, value


class Prelude:
    """The events of a stream before any output. `error` is the one that tells an error; `is_events`
    is false for what is no stream of events."""

    __slots__ = ("_rest", "error", "is_events")

    def __init__(self) -> None:
        self.error: dict[str, Any] | None = None
        self.is_events = True
        self._rest = b""

    def holds(self, piece: bytes, *, at_end: bool) -> bool:
        """Whether no output has come, this piece included; nor an error."""
        data, start = self._rest + piece, 0
        while (end := data.find(b"\n", start)) >= 0 or (at_end and start < len(data)):
            end = len(data) if end < 0 else end
            if not self._is_without_output(data[start:end].rstrip(b"\r")):
                return False
            start = end + 1
        self._rest = data[start:]
        return True

    def _is_without_output(self, line: bytes) -> bool:
        if not line.startswith(b"data:"):
            if line and not line.startswith(_FIELDS):
                self.is_events = False
                return False
            return True
        try:
            value = orjson.loads(line[5:])
        except orjson.JSONDecodeError:  # the end, or nobody's protocol
            return False
        if type(value) is not dict:
            return False
        if refusals.error_object(value) is not None:
            self.error = value
            return False
        return _has_no_output(value)


def _has_no_output(event: dict[str, Any]) -> bool:
    kind = event.get("type")
    if kind == "content_block_start":
        block = _object(event.get("content_block"))
        return block.get("type") in ("text", "thinking") and not _says(block)
    if kind == "response.output_item.added":
        return _object(event.get("item")).get("type") in ("message", "reasoning")
    if type(kind) is str:
        return kind in _BEGUN
    choices = event.get("choices")
    if type(choices) is not list or event.get("usage") is not None:
        return False
    return all(type(one) is dict and _is_empty(one) for one in choices)


def _is_empty(choice: dict[str, Any]) -> bool:
    if choice.get("finish_reason") or choice.get("text"):
        return False
    return not any(value for name, value in _object(choice.get("delta")).items() if name != "role")


def _says(block: dict[str, Any]) -> bool:
    return any(block.get(name) for name in ("text", "thinking", "signature", "citations"))


def _object(value: Any) -> dict[str, Any]:
    return value if type(value) is dict else {}


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
        asked: RequestFacts | None,
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
            images = DIALECTS[self._call.endpoint.dialect].image_count(life.said)
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
        if (
            life.streams
            and (value := refusals.error_event_in(refusals.tail_of(pieces))) is not None
        ):
            error = refusals.stream_error(
                value, exchange.headers, secret=key, dialect=self._call.endpoint.dialect
            )
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
            refusals.stream_error(
                value, exchange.headers, secret=key, dialect=self._call.endpoint.dialect
            ),
            target,
            status=refusals.status_of(refusals.error_object(value) or {}),
            headers=refusals.own_headers(to_return(exchange.headers, key, same_length=False)),
            body=orjson.dumps(refusals.error_body(value)).replace(key.encode(), b"***"),
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


_MOST_VALUES = 100_000
# Fields that name models; so does any that ends in `_model`.
_NAMES = frozenset(
    (
        *("model", "models", "modelname", "model_name", "fallbacks", "fallback_models"),
        *("allowed_models", "fallbackmodels", "allowedmodels"),
    )
)
# What a model reads or writes, where `model` is a word like any other; schemas name fields so.
_CONTENT = frozenset(
    (
        *("messages", "input", "contents", "content", "parts", "prompt", "metadata", "system"),
        *("instructions", "systeminstruction", "system_instruction", "user", "stop", "logit_bias"),
        *("schema", "json_schema", "input_schema", "parametersjsonschema", "properties"),
        *("responseschema", "response_schema", "responsejsonschema", "input_examples"),
        *("functiondeclarations", "function_declarations", "labels"),
    )
)
_OF_CLIENTS = ("function", "custom")  # tools that the client runs itself
_MAYBE_NAME = re.compile(rb"model|fallbacks", re.IGNORECASE)
_ESCAPE = re.compile(rb"\\u00[46]")  # of a letter
_TOOLS = re.compile(r"(?:.*\.)?tools")


def check_model(caller: Caller, model: str, field: str = "model") -> None:
    """Raises Forbidden for a model that is not among those of the caller's tenant."""
    if not caller.may_ask(model):
        allowed = ", ".join(caller.models or ()) or "no model"
        asked = f"the model {model[:200]}" if model else "without naming a model"
        raise Forbidden(
            f"tenant {caller.tenant_id} may not ask {asked}; allowed: {allowed}",
            field=field,
            allowed=allowed,
        )


def check_body(caller: Caller, endpoint: Endpoint, body: Mapping[str, Any]) -> None:
    """Raises Forbidden for a model within a body that the caller may not ask, and InvalidRequest
    where a body of Gemini's dialect names another model than its path."""
    if endpoint.model is not None:
        for field, named in _named_again(body):
            if named.rpartition("/")[2] != endpoint.model:
                raise InvalidRequest(
                    field,
                    f"{field} names another model than the path",
                    allowed=f"models/{endpoint.model}",
                )
    if caller.models is not None:
        for field, model in _models_in(body):
            check_model(caller, model, field)


def check_names(caller: Caller, raw: bytes) -> None:
    """Raises InvalidRequest where an object of a body names models twice in one field: parsers do
    not agree on which of them is meant, so that another one could be asked than was checked."""
    if caller.models is None or (not _ESCAPE.search(raw) and len(_MAYBE_NAME.findall(raw)) < 2):
        return

    def check(pairs: list[tuple[str, Any]]) -> None:
        named = [name for name, _ in pairs if _names_models(name.casefold())]
        for name in named:
            if named.count(name) > 1:
                said = f"{name} is named more than once in an object"
                raise InvalidRequest(name, said, allowed=f"one {name}")

    try:
        json.loads(raw, object_pairs_hook=check, parse_int=len, parse_float=len)
    except (ValueError, RecursionError):
        raise InvalidRequest("body", "the body is nested too deeply") from None


def _names_models(folded: str) -> bool:
    return folded in _NAMES or folded.endswith("_model")


def _named_again(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where bodies of Gemini's dialect name the model of the path once more."""
    if type(named := body.get("model")) is str:
        yield "model", named
    for name in ("generateContentRequest", "generate_content_request"):
        request = body.get(name)
        if type(request) is dict and type(named := request.get("model")) is str:
            yield f"{name}.model", named
    requests = body.get("requests")
    for request in requests if type(requests) is list else ():
        if type(request) is dict and type(named := request.get("model")) is str:
            yield "requests.model", named


def _models_in(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every model that a body names, with its field; without recursion, since how deep a body is
    is its client's choice. Raises InvalidRequest for one that is too large for that."""
    left: list[tuple[str, Any]] = [("", body)]
    for _ in range(_MOST_VALUES):
        if not left:
            return
        path, value = left.pop()
        if type(value) is list:
            left += [(path, one) for one in value]
        elif isinstance(value, Mapping) and not _is_of_client(path, value):
            for name, inner in value.items():
                folded = name.casefold()
                if folded in _CONTENT:
                    continue
                field = f"{path}.{name}" if path else name
                if _names_models(folded):
                    for one in inner if type(inner) is list else (inner,):
                        if type(one) is str:
                            yield field, one
                        else:
                            left.append((field, one))
                elif type(inner) in (dict, list):
                    left.append((field, inner))
    raise InvalidRequest("body", "the body holds too many values beside its content")


def _is_of_client(path: str, value: Mapping[str, Any]) -> bool:
    """Whether this is a tool that the client runs. Elsewhere, such as beside `model` itself, a
    `type` says nothing of the sort."""
    return value.get("type") in _OF_CLIENTS and _TOOLS.fullmatch(path) is not None


_KEPT_S = 60.0
_LONGEST_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class _Listed:
    at: float
    models: list[dict[str, Any]]


class Models:
    """One per process; each upstream's list is kept for a minute."""

    def __init__(self, wire: RelayWire) -> None:
        self._wire = wire
        self._lists: dict[tuple[str, Dialect], _Listed] = {}

    async def listed(
        self, call: NativeCall, upstreams: list[Upstream], routes: Mapping[str, Target]
    ) -> bytes:
        """The body of the answer; `routes` are the names that routes give, and whom each leads to.
        Raises CallFailed where no upstream gave a list."""
        shape = DIALECTS[call.endpoint.dialect].models
        found = await asyncio.gather(
            *(self._of(call, one) for one in upstreams), return_exceptions=True
        )
        models: dict[str, dict[str, Any]] = {}
        failure: BaseException | None = None
        for upstream, result in zip(upstreams, found, strict=True):
            if isinstance(result, BaseException):
                failure = result
                continue
            for model in _shown(shape, upstream, result):
                models.setdefault(str(model[shape.id_key]), model)
        if failure is not None and len(models) == 0:
            raise failure
        for name, target in routes.items():
            known = models.get(f"{shape.prefix}{target.model}", {})
            models[f"{shape.prefix}{name}"] = _as(shape, name, known)
        allowed = [one for name, one in models.items() if call.caller.may_ask(name)]
        return orjson.dumps(shape.whole(allowed))

    async def _of(self, call: NativeCall, upstream: Upstream) -> list[dict[str, Any]]:
        dialect = call.endpoint.dialect
        known = self._lists.get((upstream.name, dialect))
        if known is None or time.monotonic() - known.at > _KEPT_S:
            models = await self._asked(call, upstream)
            known = self._lists[upstream.name, dialect] = _Listed(time.monotonic(), models)
        return known.models

    async def _asked(self, call: NativeCall, upstream: Upstream) -> list[dict[str, Any]]:
        dialect, target = call.endpoint.dialect, Target(upstream, "")
        spec = DIALECTS[dialect]
        shape = spec.models
        url = f"{upstream.base_urls[dialect]}{shape.path}"
        given = [pair for pair in call.headers if pair[0] == b"anthropic-version"]
        headers = with_key([*given, *to_send([])], spec, upstream.key)
        try:
            exchange = await self._wire.open("GET", self._wire.place(url), headers, None)
            try:
                if exchange.status >= 300:
                    raise await refusal_of(exchange, target, dialect)
                body = orjson.loads(await exchange.read(_LONGEST_BYTES))
                models = [one for one in body[shape.key] if isinstance(one[shape.id_key], str)]
            finally:
                exchange.close()
        except UpstreamError as error:
            raise CallFailed(error, target) from None
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise CallFailed(UpstreamGarbled("the list of models is not one"), target) from None
        return models


def is_plain(caller: Caller, upstreams: list[Upstream], routes: Mapping[str, Target]) -> bool:
    """Whether the only upstream's own list says it all."""
    only = upstreams[0]
    alone = len(upstreams) == 1 and not routes
    return alone and caller.models is None and only.models == ("*",) and not only.aliases


def _shown(
    shape: ModelList, upstream: Upstream, models: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Those that may be asked by their own name, and the aliases."""
    found = [one for one in models if upstream.fit(one[shape.id_key].removeprefix(shape.prefix))]
    by_name = {one[shape.id_key].removeprefix(shape.prefix): one for one in models}
    for alias, name in upstream.aliases.items():
        found.append(_as(shape, alias, by_name.get(name, {})))
    return found


def _as(shape: ModelList, name: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """A model by another name."""
    return {**model, shape.id_key: f"{shape.prefix}{name}"}


MOST_REDIRECTS = 3
REDIRECTS = frozenset((301, 302, 303, 307, 308))
_REDIRECT_LONGEST_BYTES = 8_000
# Whatever a server could read as a step upwards, or in another way than it is read here.
_UNSOUND = re.compile(rb"[\\\x00-\x20\x7f-\xff]|/\.|%2e|%5c|%00", re.IGNORECASE)


def followed(headers: Iterable[tuple[bytes, bytes]], base: str) -> str | None:
    """The URL to which a redirect leads that is to be followed, else None. `base`: that of the
    upstream, without a slash at its end."""
    named = [value for name, value in headers if name.lower() == b"location"]
    if len(named) != 1 or len(named[0]) > _REDIRECT_LONGEST_BYTES or _UNSOUND.search(named[0]):
        return None
    location = named[0].decode("ascii").partition("#")[0]
    scheme, _, rest = base.partition("://")
    origin = f"{scheme}://{rest.partition('/')[0]}"
    if location[: len(origin)].lower() == origin.lower():
        location = location[len(origin) :]
    if not location.startswith("/") or location.startswith("//"):
        return None
    url = origin + location
    return url if url.startswith(f"{base}/") else None


_HARD_MARGIN_MS = 5_000
_REDIRECT_BYTES = 65_536

log = get_logger()


class Relay:
    """One per process, over the limiters of all pools."""

    def __init__(
        self,
        *,
        config: Config,
        targets: Targets,
        pools: Mapping[str, Limiter],
        wire: RelayWire,
        tracing: Tracing,
        budgets: BudgetGate,
    ) -> None:
        self.targets = targets
        self.budgets = budgets
        self.tracing = tracing
        self._gates = {
            name: Gate(name, pools[one.pool], one.key)
            for name, one in targets.upstreams.items()
            if one.pool in pools
        }
        self.health = Gates(self._gates)
        self.remaining = {pool: Remaining(limiter) for pool, limiter in pools.items()}
        self._pools = pools
        self._wire = wire
        self._demands = {
            name: Demands(kinds_optional=name != DEFAULT_POOL, prices=Prices(upstream))
            for name, upstream in targets.upstreams.items()
        }
        self._budget = RetryBudget()
        self._timeouts = {
            name: timeouts_of(config, upstream) for name, upstream in targets.upstreams.items()
        }
        self._models = Models(wire)

    async def run(
        self, call: NativeCall, out: Out, life: Life, on_admitted: Begun | None = None
    ) -> None:
        """Make the call; its answer goes to `out` as it comes, and `life` is filled.

        `on_admitted` is called before each try upstream, under its permit; what it raises ends the
        call, and nothing was sent. Without `out.started` a try that broke off is made again.
        Raises CallFailed for what the last upstream said, and our own errors for what came before;
        after `out.started` nothing more can be told to the client but that it failed. Cancellation
        leaves neither a waiter nor an open upstream call.
        """
        life.trail = call.trail
        if call.endpoint.operation is Operation.MODELS and await self._listed(call, out, life):
            return
        body: dict[str, Any] = {}
        asked: RequestFacts | None = None
        if call.endpoint.is_counted or call.body:
            read = skimmed(call.body)
            if read.raw is not call.body:  # it was large: others go first now
                await asyncio.sleep(0)
            body = read.body
            asked = DIALECTS[call.endpoint.dialect].request_facts(call.endpoint, body, read.whole)
            check_said_once(read.raw, body)
            check_model(call.caller, asked.model)
            check_body(call.caller, call.endpoint, body)
            check_names(call.caller, read.raw)
            life.model, life.streams = asked.model, asked.streams
            life.kind = asked.kind if call.endpoint.is_counted else None
        self._budget.earn()
        work = Work(self, call, body, asked, out, life, on_admitted)
        await work.until_answered(self._chain(call, asked))

    async def _listed(self, call: NativeCall, out: Out, life: Life) -> bool:
        """Answer for the list of models, where it is not the only upstream's own."""
        upstreams = self.targets.speaking(call.endpoint.dialect)
        if not call.endpoint.path.endswith("/models") or not upstreams:
            return False
        routes = self.targets.named_by_routes(call.endpoint.dialect)
        if is_plain(call.caller, upstreams, routes):
            return False
        body = await self._models.listed(call, upstreams, routes)
        life.keep(body)
        length = (b"content-length", str(len(body)).encode())
        await out.start(200, [(b"content-type", b"application/json"), length])
        await out.body(body, False)
        return True

    def _chain(self, call: NativeCall, asked: RequestFacts | None) -> list[Target]:
        if asked is not None:
            return self.targets.of(call.endpoint.dialect, asked.model)
        name = call.endpoint.model
        if call.endpoint.operation is Operation.MODELS and name is not None:
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
        """Those that may be asked now; where all are out, all: the first to be back comes first."""
        if len(targets) == 1:
            return targets
        found = [one for one in targets if self.gate_of(one).state != "out"]
        return found or sorted(targets, key=lambda one: self.gate_of(one).ready_in_ms())

    def gate_of(self, target: Target) -> Gate:
        return self._gates[target.upstream.name]

    def limiter_of(self, target: Target) -> Limiter:
        return self._pools[target.upstream.pool]

    def demand_of(self, call: NativeCall, asked: RequestFacts | None, target: Target) -> Demand:
        counted = call.endpoint.is_counted and asked is not None
        demand = self._demands[target.upstream.name].of_native(
            target.model,
            asked.kind if counted and asked else OTHER_KIND,
            asked.pieces if asked else {},
            self.limiter_of(target).policy,
            tenant=call.caller.tenant_id,
            priority=call.priority,
            images=asked.images if asked else 0,
            max_output_tokens=asked.max_output_tokens if counted and asked else 1,
        )
        return self.gate_of(target).bind(demand, target.model)

    def wanted(
        self, demand: Demand, target: Target, deadline_ms: int | None, *, once: bool = False
    ) -> Wanted:
        hard_ms = self._timeouts[target.upstream.name].total_ms + _HARD_MARGIN_MS
        return demand.to_admit(deadline_ms, hard_ms, once=once)

    async def open(
        self,
        call: NativeCall,
        target: Target,
        body: bytes | AsyncIterator[bytes] | None,
        on_sent: Callable[[], None] | None = None,
    ) -> Exchange:
        """Send the request to an upstream. Raises UpstreamError."""
        dialect = call.endpoint.dialect
        base = target.upstream.base_urls[dialect]
        text = f"{base}{call.endpoint.path_for(target.model)}"
        if call.query:
            text = f"{text}?{call.query}"
        headers = with_key(call.headers, DIALECTS[dialect], target.upstream.key)
        place = self._wire.place(text)
        if call.trail is not None:
            said = call.trail.begin(target.upstream.name, target.model, str(place.origin))
            headers.append((HEADER, said.encode()))
        timeouts = self._timeouts[target.upstream.name]
        exchange = await self._wire.open(call.method, place, headers, body, on_sent, timeouts)
        if exchange.status in REDIRECTS and _may_follow(call):
            return await self._follow(exchange, base, headers, timeouts)
        return exchange

    async def _follow(
        self, exchange: Exchange, base: str, headers: Headers, timeouts: Timeouts
    ) -> Exchange:
        """The answer at the end of an upstream's redirects, or the redirect that is not followed.
        Raises UpstreamError."""
        for _ in range(MOST_REDIRECTS):
            onward = followed(exchange.headers, base)
            if onward is None:
                break
            try:
                await exchange.read(_REDIRECT_BYTES)
            finally:
                exchange.close()
            place = self._wire.place(onward)
            exchange = await self._wire.open("GET", place, headers, None, None, timeouts)
            if exchange.status not in REDIRECTS:
                break
        return exchange

    def may_try_again(self) -> bool:
        return self._budget.spend()

    def demands_of(self, target: Target) -> Demands:
        return self._demands[target.upstream.name]


def _may_follow(call: NativeCall) -> bool:
    return call.method == "GET" and call.endpoint.operation is Operation.FILES


def timeouts_of(config: Config, upstream: Upstream) -> Timeouts:
    """How long an upstream may take: as it is set for itself, else as for all."""
    return Timeouts(
        connect_ms=config.connect_timeout_ms,
        first_byte_ms=upstream.timeouts.get("first_byte_timeout_ms", config.first_byte_timeout_ms),
        idle_ms=upstream.timeouts.get("idle_timeout_ms", config.idle_timeout_ms),
        total_ms=upstream.timeouts.get("total_timeout_ms", config.total_timeout_ms),
    )


# Of the JSON that holds one: a line of a batch, or what is handed in as a job.
LONGEST_BYTES = 20_000_000
_NO_DEADLINE_MS = 30 * 86_400_000
_JSON = (b"content-type", b"application/json")
_ALLOWED = (
    "a native path that asks a model, such as /v1/chat/completions, /v1/responses, /v1/messages "
    "or /v1beta/models/<model>:generateContent"
)


def endpoint_named(path: object, field: str = "endpoint") -> Endpoint:
    """The endpoint of a path, which must ask a model for something, in one piece. Raises
    InvalidRequest."""
    endpoint = None
    if isinstance(path, str):
        endpoint = endpoint_of("POST", path, dialect_of(path, frozenset(), b""))
    if endpoint is None or not endpoint.is_counted:
        raise InvalidRequest(field, "there is no such endpoint to wait for", allowed=_ALLOWED)
    if endpoint.streams:
        raise InvalidRequest(
            field, "an answer that is waited for does not stream", allowed=_ALLOWED
        )
    return endpoint


def asked_by(endpoint: Endpoint, body: Mapping[str, Any]) -> RequestFacts:
    """What a body asks for. Raises InvalidRequest, for a stream too, and for a model that can't be
    put on record."""
    if body.get("stream"):
        raise InvalidRequest(
            "body.stream", "an answer that is waited for does not stream", allowed="false"
        )
    asked = DIALECTS[endpoint.dialect].request_facts(endpoint, body)
    if not asked.model.isprintable():  # neither NUL nor half of a surrogate pair is
        raise InvalidRequest("body.model", "this is not the name of a model", allowed="a name")
    return asked


def detached_call(
    *,
    request_id: UUID,
    path: str,
    body: bytes,
    caller: Caller,
    priority: int,
    deadline_ms: int | None,
    trail: Trail | None = None,
    most_tries: int = MOST_TRIES,
) -> NativeCall:
    """The call as if a client made it now. `deadline_ms`: from now to admission. Raises NotFound
    for a path that another version took in."""
    try:
        endpoint = endpoint_named(path)
    except InvalidRequest as unknown:
        raise NotFound(f"{unknown.message}: {path}") from None
    return NativeCall(
        request_id=request_id,
        endpoint=endpoint,
        method="POST",
        query="",
        headers=[_JSON, *DIALECTS[endpoint.dialect].headers],
        body=body,
        caller=caller,
        received=time.monotonic(),
        received_at=datetime.now(UTC),
        wait_ms=_NO_DEADLINE_MS if deadline_ms is None else deadline_ms,
        priority=priority,
        trail=trail,
        repeats=False,
        most_tries=max(1, min(most_tries, MOST_TRIES)),
    )


async def collected(relay: Relay, call: NativeCall, life: Life, admitted: Begun) -> None:
    """Make the call; `life.said` is then the whole answer. Raises what `Relay.run` raises, and
    UpstreamGarbled for an answer that is too long to keep, or compressed so that nobody reads it.
    """
    await relay.run(call, _Nobody(), life, admitted)
    if life.answer_bytes > KEPT_BYTES:
        raise UpstreamGarbled(f"the answer is longer than {KEPT_BYTES} bytes")
    if life.coding and not life.said:
        raise UpstreamGarbled(f"the answer is compressed ({life.coding[:20].decode('latin-1')})")


class _Nobody(Out):
    """Nobody is told while it comes: the spine keeps it in the call's `Life`."""

    async def start(self, status: int, headers: Headers) -> None:
        pass

    async def body(self, piece: bytes, more: bool) -> None:
        pass


UPLOADS = "/upload/v1beta/files"
MAX_BYTES = 2 * 1024**3  # https://ai.google.dev/gemini-api/docs/files
_URLS = (b"x-goog-upload-url", b"x-goog-upload-control-url")


def check_files(call: NativeCall) -> None:
    """Raises Forbidden where a caller with a key would see the files of others: the account's list
    is one for all tenants, while a file's own name is known to nobody but who made it."""
    lists = call.endpoint.operation is Operation.FILES and call.endpoint.path.endswith("/files")
    if lists and call.caller.key_id is not None:
        raise Forbidden("files are not listed: the account behind this gateway serves others too")


async def upload(
    relay: Relay,
    call: NativeCall,
    pieces: AsyncIterator[bytes],
    own: Callable[[str], str],
    out: Out,
    life: Life,
) -> None:
    """One request of an upload; `own` gives the URL by which the client reaches us, of its query.
    Raises as `Relay.run`."""
    target = relay.first_of(call.endpoint.dialect)
    life.target, life.tries = target, 1
    try:
        exchange = await relay.open(call, target, pieces)
        try:
            if exchange.status >= 300:
                raise await refusal_of(exchange, target, call.endpoint.dialect)
            life.http_status = exchange.status
            headers = _own(to_return(exchange.headers, target.upstream.key), own)
            await out.start(exchange.status, headers)
            while piece := await exchange.next():
                life.keep(piece)
                await out.body(piece, True)
            await out.body(b"", False)
        finally:
            exchange.close()
    except UpstreamError as error:
        raise CallFailed(error, target) from None


def _own(headers: Headers, own: Callable[[str], str]) -> Headers:
    return [
        (name, own(_query_of(value.decode("latin-1"))).encode() if name in _URLS else value)
        for name, value in headers
    ]


def _query_of(theirs: str) -> str:
    """Of the upstream's URL, without its key."""
    pairs = parse_qsl(urlsplit(theirs).query, keep_blank_values=True)
    return urlencode([pair for pair in pairs if pair[0] != "key"])
