"""Exchange of one realtime session: a call of the spine that lasts as long as its two WebSockets.

    client ──► up ──► provider        messages of the client: models checked, turns under the limits
    client ◄── down ◄── provider      messages of the provider: usage read, key masked
               watch                  revoked key, idle timeout, total timeout, rejected turns

Messages are forwarded unchanged in both directions, but for the upstream's name of the model and
the id of a message that requests a turn, each only as fast as its reader accepts them.
The first of the three to end ends the session: both sides are closed with a code and a reason, and
the permit is released after the provider's side is closed.

Invariants: the permit is held from before the provider is connected until its connection is closed;
however the session ends, both connections end within `CLOSE_S`; if the client disconnects while its
turn waits for the limits, the turn does not begin.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast
from uuid import uuid4

import orjson
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.connection import Connection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tidegate.admission.demand import CallDemand
from tidegate.admission.estimator import pieces_of
from tidegate.call import REALTIME_KIND, CallCost
from tidegate.dialects import refusals
from tidegate.dialects.headers import of_answer, to_return
from tidegate.dialects.parsing import LARGE_BYTES
from tidegate.dialects.spec import Dialect, Headers
from tidegate.errors import (
    AdmissionError,
    Forbidden,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    RealtimeIdle,
    RealtimeStalled,
    TidegateError,
    Unauthenticated,
    UpstreamError,
    UpstreamGarbled,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from tidegate.realtime import sockets
from tidegate.realtime.events import (
    Events,
    GeminiEvents,
    Message,
    OpenAIEvents,
    event_id_of,
    read,
    references_in,
)
from tidegate.realtime.resumption import may_sign, signed
from tidegate.realtime.turns import Turns, is_rate
from tidegate.record import CallRecord
from tidegate.spine.bodies import aside
from tidegate.spine.resources import Resources
from tidegate.spine.routing import Suspect, Target, Targets
from tidegate.spine.run import CallFailed, Spine, Terms, UpstreamAccount, masked
from tidegate.telemetry.tracing import HEADER
from tidegate.upstream.transport import RelayWire

WATCH_EVERY_S = 0.5
_SHORTEST_SECRET = 8  # a shorter key, such as `none`, is not a secret
_NORMAL = (1000, 1001, 1005)
_SUBPROTOCOL = "realtime"

By = Literal["client", "provider", "gateway"]
Problem = Callable[[TidegateError], dict[str, Any]]


class RealtimeRefused(Exception):
    """A budget has no room for the first turn. Not a TidegateError: the spine, which reserves whole
    calls, does not handle it."""

    def __init__(self, error: TidegateError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass(frozen=True, slots=True)
class End:
    """How a session ended: the side that closed it, the close code and reason, and our own error if
    any."""

    by: By
    code: int
    reason: str = ""
    error: TidegateError | None = None


def code_of(error: TidegateError) -> int:
    """Return the close code for an error of ours."""
    if isinstance(error, InvalidRequest):
        return 1007
    if isinstance(error, RealtimeIdle):
        return 1001
    if isinstance(error, UpstreamError) or type(error) is TidegateError:  # an internal one
        return 1011
    may_return = error.retryable and not isinstance(error, QuotaExceeded)
    return 1013 if may_return or isinstance(error, AdmissionError) else 1008


@dataclass(frozen=True, slots=True)
class RealtimeBounds:
    """Bounds of a session. stalled_ms: how long a side may read nothing of a message; wait_ms: how
    long a turn waits for limits. The idle and total timeouts are those of the upstream's calls."""

    stalled_ms: int
    wait_ms: int


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """A requested session with `model`, by a request to `path` below a base URL.

    query: returns the query, which may name the upstream's model. first: returns the message that
    opens the session at a provider, with the model's name; None if the query names it. transcribes:
    the session only makes transcripts. homes: the upstreams where the resources live that this
    message names; None if it names none. resumes_tokens: of the conversation that it resumes.
    """

    dialect: Dialect
    model: str
    path: str
    query: Callable[[str], str]
    headers: Headers
    first: Callable[[str], str] | None = None
    transcribes: bool = False
    homes: frozenset[str] | None = None
    resumes_tokens: int = 0


class RealtimeExchange:
    """A `CallExchange`. `answer` returns the client's socket, after answering its handshake if
    needed; `check` raises once the caller is no longer permitted. `resources`: of which a message
    may only name the caller's own."""

    bills = False  # each turn is reserved separately
    ended_alone = False

    def __init__(
        self,
        spine: Spine,
        wire: RelayWire,
        terms: Terms,
        request: SessionRequest,
        record: CallRecord,
        bounds: RealtimeBounds,
        resources: Resources,
        *,
        answer: Callable[[Headers], Awaitable[Connection]],
        check: Callable[[], Awaitable[None]],
        problem: Problem,
    ) -> None:
        self.terms = terms
        self.dialect = request.dialect
        self.started = False
        self.has_response = False
        self.ended: End | None = None
        self.turns: Turns | None = None
        self._spine = spine
        self._wire = wire
        self._request = request
        self._record = record
        self._bounds = bounds
        self._resources = resources
        self._answer = answer
        self._check = check
        self._problem = problem
        self._loop = asyncio.get_running_loop()
        self._active_at = 0.0

    def serving(self, targets: Targets, model: str) -> list[Target]:
        found, homes = targets.of(self.dialect, model), self._request.homes
        return found if homes is None else [one for one in found if one.upstream.name in homes]

    def elsewhere(self, targets: Targets) -> list[Target]:
        return self.serving(targets, self._request.model)

    def demand(self, target: Target, account: UpstreamAccount) -> CallDemand:
        """Return the demand on concurrency limits; the rates are each turn's."""
        terms = self.terms
        demand = account.demands.of_native(
            target.model,
            REALTIME_KIND,
            pieces_of(""),
            account.limiter.policy,
            tenant=terms.caller.tenant_id,
            priority=terms.priority,
            tags=(terms.caller.key_id, terms.subject, terms.conversation),
        )
        limits = tuple(one for one in demand.limits if not is_rate(account, one))
        held = CallDemand(limits, demand.tenant, demand.priority, 0)
        return account.gate.bind(held, target.model)

    def cost(self, target: Target, account: UpstreamAccount, demand: CallDemand) -> CallCost:
        return CallCost(0, 0)

    def suspect(self) -> Suspect:
        caller = self.terms.caller
        request = hash((self._request.dialect, self._request.model))
        return Suspect(None if caller.key_id is None else caller.tenant_id, request)

    def settle(
        self,
        target: Target,
        account: UpstreamAccount,
        demand: CallDemand,
        *,
        whole: bool,
        failed: CallFailed | None,
    ) -> int | None:
        if self.turns is not None:
            usage = self._record.answer.usage = self.turns.usage
            self._record.charge = replace(self.turns.charge, usage=usage)
        return None

    async def make(
        self, target: Target, account: UpstreamAccount, demand: CallDemand, *, is_try: bool
    ) -> None:
        request, bounds, record = self._request, self._bounds, self._record
        self.turns = turns = Turns(self.terms, target, account, self._spine.budgets, bounds.wait_ms)
        try:
            await turns.open()
        except QuotaExceeded as spent:
            raise RealtimeRefused(spent) from None
        began = self._loop.time()
        upstream: ClientConnection | None = None
        try:
            upstream = await self._connected(target)
            record.sent = self.has_response = True
            if is_try or account.gate.has_doubts:
                await account.gate.worked(target.model, tried=is_try)
            client = await self._answer(of_answer(target.upstream.name, record.queue_ms or 0.0))
            self.started = True
            record.http_status = 101
            if request.first is not None:
                model = target.model
                if request.dialect is Dialect.GEMINI:
                    model = target.upstream.access(request.dialect).live_model(model)
                first = request.first(model)
                turns.opened(first, request.resumes_tokens)
                await upstream.send(first)
            self.ended = await self._relayed(client, upstream, target, began)
            await self._close(client, upstream, self.ended)
        except UpstreamError as error:
            raise CallFailed(error, target) from None
        finally:
            if upstream is not None:
                sockets.cut(upstream)
                await upstream.wait_closed()
            await turns.close()
        if self.ended.by == "provider" and self.ended.code not in _NORMAL:
            reason = f"the provider closed the session ({self.ended.code})"
            raise CallFailed(UpstreamUnavailable(reason), target, reported=True)

    async def _connected(self, target: Target) -> ClientConnection:
        """Connect to the provider. Raises CallFailed and UpstreamError."""
        request, trail = self._request, self.terms.trail
        access = target.upstream.access(request.dialect)
        url = access.url(request.path, request.query(target.model), model=target.model)
        place, headers = RelayWire.place(url, access), request.headers
        if trail is not None:
            traceparent = trail.begin(target.upstream.name, target.model, str(place.origin))
            headers = [*headers, (HEADER, traceparent.encode())]
        try:
            return await sockets.open_upstream(
                url,
                await self._wire.bare(place, headers),
                subprotocol=_SUBPROTOCOL if request.dialect is Dialect.OPENAI else None,
                connect_ms=self._spine.timeouts[target.upstream.name].connect_ms,
            )
        except InvalidStatus as refused:
            raise self._refusal(refused, target) from None

    def _refusal(self, refused: InvalidStatus, target: Target) -> CallFailed:
        response = refused.response
        status, body = response.status_code, bytes(response.body or b"")
        named = {name.lower(): value for name, value in response.headers.raw_items()}
        if status < 400:
            error: UpstreamError = UpstreamGarbled(
                f"the provider answered {status}, which opens no WebSocket"
            )
            return CallFailed(error, target)
        secret = target.upstream.key
        error = refusals.upstream_error(
            status,
            refusals.error_of_refusal_in(body),
            named,
            secret=secret,
            dialect=self._request.dialect,
        )
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]
        headers = to_return(raw, secret, same_length=False)
        failed = CallFailed(
            error, target, status=status, headers=headers, body=masked(body, target)
        )
        return failed.named(self._record.queue_ms or 0.0)

    # While the session is open

    async def _relayed(
        self, client: Connection, upstream: Connection, target: Target, began: float
    ) -> End:
        events: Events = GeminiEvents(self._signing(target))
        if self._request.dialect is Dialect.OPENAI:
            only = self._request.transcribes
            events = OpenAIEvents(
                self.terms.caller, self._request.model, target.model, transcribes=only
            )
        self._active_at = self._loop.time()
        work: tuple[Coroutine[Any, Any, End], ...] = (
            self._up(client, upstream, events, target),
            self._down(client, upstream, events, target),
            self._watch(target, began),
        )
        tasks = [self._loop.create_task(one) for one in work]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        first = next(task for task in tasks if not task.cancelled())
        return first.result()

    def _signing(self, target: Target) -> Callable[[str], str] | None:
        """Return what makes a provider's handle the tenant's own; None without a secret for it."""
        key, tenant = target.upstream.key, self.terms.caller.tenant_id
        turns = cast(Turns, self.turns)
        if not may_sign(key):
            return None
        return lambda handle: signed(handle, turns.context_tokens, key, tenant)

    async def _up(
        self, client: Connection, upstream: Connection, events: Events, target: Target
    ) -> End:
        turns = cast(Turns, self.turns)
        while True:
            try:
                message = await client.recv()
            except ConnectionClosed as closed:
                return _end_of("client", closed)
            self._active_at = self._loop.time()
            try:
                found: dict[str, Any] | None = None
                if len(message) > LARGE_BYTES:
                    found = await aside(len(message), partial(read, message))
                event = events.client_event(message, found)
                await self._check_references(message, target)
                with _unless_lost(client):
                    await turns.sent(event)
                    await turns.may_go_on()
            except _ClientLost:
                return _lost(client)
            except (InvalidRequest, Forbidden, NotFound) as refused:
                if self._request.dialect is Dialect.GEMINI:  # Gemini Live has no event for errors
                    return _ended_by(refused)
                await self._send_error(client, refused, message)
                continue
            except TidegateError as error:
                return _ended_by(error)
            if event.begins_turn:
                try:
                    with _unless_lost(client):
                        await turns.ask(
                            joins=event.joins, continues=event.continues, event_id=event.event_id
                        )
                except _ClientLost:
                    return _lost(client)
                except TidegateError as error:
                    over = not isinstance(error, AdmissionError)  # such as a spent budget
                    if over or self._request.dialect is Dialect.GEMINI:
                        return _ended_by(error)
                    await self._send_error(client, error, message)
                    continue
            try:
                await upstream.send(event.message)
            except ConnectionClosed as closed:
                return _end_of("provider", closed)

    async def _check_references(self, message: Message, target: Target) -> None:
        """Raise NotFound for a resource in a client's message that is not the caller's own,
        InvalidRequest for one that lives at another upstream; and StoreUnavailable."""
        finding = partial(references_in, self.dialect, message)
        if references := await aside(len(message), finding):
            await self._resources.among(self.terms.caller, self.dialect, references, [target])

    async def _down(
        self, client: Connection, upstream: Connection, events: Events, target: Target
    ) -> End:
        turns = cast(Turns, self.turns)
        secrets = tuple(one for one in target.upstream.secrets if len(one) >= _SHORTEST_SECRET)
        while True:
            try:
                message = await upstream.recv()
            except ConnectionClosed as closed:
                return _end_of("provider", closed)
            self._active_at = self._loop.time()
            reported = events.reported(message)
            over: TidegateError | None = None
            charged = turns.charge
            try:
                await turns.take(reported)
            except TidegateError as error:
                over = error
            if turns.charge is not charged:  # recorded even if this process is killed
                self._record.charge = replace(turns.charge, usage=turns.usage)
                self._spine.journal.note(self._record)
            if reported.model is not None and not self._may_use(reported.model, target):
                reason = f"the provider changed the model to {reported.model[:200]}"
                return _ended_by(Forbidden(reason, field="session.model"))
            shown = message if reported.shown is None else reported.shown
            if (end := await self._passed(client, _masked(shown, secrets))) is not None:
                return end
            if over is not None:
                return _ended_by(over)

    def _may_use(self, model: str, target: Target) -> bool:
        """Return whether the caller may call the model that a provider reports, usually the
        requested one with the date of its version."""
        caller = self.terms.caller
        return model.startswith(target.model) or caller.may_ask(model)

    async def _passed(self, client: Connection, message: Message) -> End | None:
        try:
            async with asyncio.timeout(self._bounds.stalled_ms / 1000):
                await client.send(message)
        except TimeoutError:
            return _ended_by(RealtimeStalled("the client reads too slowly"))
        except ConnectionClosed as closed:
            return _end_of("client", closed)
        return None

    async def _watch(self, target: Target, began: float) -> End:
        """Return when the session has to end for a reason other than the close of a side."""
        bounds, turns = self._spine.timeouts[target.upstream.name], cast(Turns, self.turns)
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            await turns.end_unbegun()
            now = self._loop.time()
            if (now - began) * 1000 >= bounds.total_ms:
                reason = f"the session was open for {bounds.total_ms} ms, which is the longest here"
                return _ended_by(UpstreamTimeout(reason, phase="total"), 1001)
            if (now - self._active_at) * 1000 >= bounds.idle_ms:
                return _ended_by(
                    RealtimeIdle(f"neither side sent anything for {bounds.idle_ms} ms")
                )
            try:
                await self._check()
            except (Unauthenticated, Forbidden) as refused:
                return _ended_by(refused)

    # The end

    async def _send_error(
        self, client: Connection, error: TidegateError, about: Message = ""
    ) -> None:
        """Send an error to a client of OpenAI's dialect, as its event `error`."""
        inner = {**self._problem(error)["error"], "event_id": event_id_of(about) if about else None}
        event = {"type": "error", "event_id": f"event_{uuid4().hex}", "error": inner}
        await self._passed(client, orjson.dumps(event).decode())

    async def _close(self, client: Connection, upstream: Connection, end: End) -> None:
        """Close both sides concurrently: a client that reads slowly must not keep the provider
        open, whose work the permit covers."""
        code = end.code if end.by == "client" else 1000
        closing = [sockets.close(upstream, code, "")]
        if end.by != "client":
            closing.append(self._close_client(client, end))
        await asyncio.gather(*closing)

    async def _close_client(self, client: Connection, end: End) -> None:
        """Send the client the reason, if its dialect has an event for it, and close its side."""
        if isinstance(end.error, RealtimeStalled):
            sockets.cut(client)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(sockets.CLOSE_S):
                if end.error is not None and self._request.dialect is Dialect.OPENAI:
                    await self._send_error(client, end.error)
                await sockets.close(client, end.code, end.reason)
        sockets.cut(client)


class _ClientLost(Exception):
    """The client disconnected while one of its messages waited for the limits."""


@contextmanager
def _unless_lost(client: Connection) -> Iterator[None]:
    """Raise `_ClientLost` from a wait for the limits when the client disconnects: nothing is
    received meanwhile that would report it."""
    lost, task, waits = client.connection_lost_waiter, asyncio.current_task(), True
    assert task is not None

    def end(_: object) -> None:
        if waits:
            task.cancel()

    lost.add_done_callback(end)
    try:
        yield
    except asyncio.CancelledError:
        if not lost.done():
            raise
        task.uncancel()
        raise _ClientLost from None
    finally:
        waits = False
        lost.remove_done_callback(end)


def _lost(client: Connection) -> End:
    reason = client.close_reason or "the connection was lost"
    return End("client", client.close_code or 1006, reason)


def _ended_by(error: TidegateError, code: int | None = None) -> End:
    return End("gateway", code or code_of(error), error.message_with_allowed, error)


def _end_of(by: By, closed: ConnectionClosed) -> End:
    """Return the close of a side, or 1006 if the connection was lost."""
    if closed.rcvd is not None:
        return End(by, closed.rcvd.code, closed.rcvd.reason)
    if closed.sent is not None:  # the side violated the protocol, or a bound
        return End(by, closed.sent.code, closed.sent.reason)
    return End(by, 1006, "the connection was lost")


def _masked(message: Message, secrets: tuple[str, ...]) -> Message:
    """Return a provider's message with the secrets of the call masked."""
    for secret in secrets:
        if isinstance(message, str):
            message = message.replace(secret, "***") if secret in message else message
        elif secret.encode() in message:
            message = message.replace(secret.encode(), b"***")
    return message
