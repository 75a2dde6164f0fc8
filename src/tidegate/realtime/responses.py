"""Turns of the Responses API over WebSocket: the provider's side of one client's connection.

    NativeExchange ──► ProviderTurns.open ──► provider    a call, as one event `response.create`
    NativeExchange ◄── Exchange ◄──────────── provider    its events, as a stream of HTTP

The spine sees each turn as a call over HTTP: an event `error` before any other is an answer with
its status and headers, all other events are a stream of status 200. The connection stays open from
one turn to the next, since the provider keeps what `previous_response_id` names in its memory, even
of responses that are not stored.

    https://developers.openai.com/api/docs/guides/websocket-mode

Invariants: turns are made one after another; a connection whose turn has not ended as the protocol
has it is cut, so that no turn continues without its permit; a response that only the connection
holds is continued there or nowhere.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import orjson
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tidegate.admission.estimator import with_stored
from tidegate.dialects import refusals
from tidegate.dialects.answers import MOST_TOKENS
from tidegate.dialects.resources import Reference
from tidegate.dialects.spec import Dialect, Headers, RequestFacts
from tidegate.errors import (
    InvalidRequest,
    UpstreamGarbled,
    UpstreamUnavailable,
    WebSocketRefused,
)
from tidegate.policy.deployment import Upstream
from tidegate.policy.providers import has_responses_socket
from tidegate.realtime import sockets
from tidegate.spine.routing import Target
from tidegate.spine.run import masked
from tidegate.upstream.transport import (
    READ_AHEAD_BYTES,
    Connection,
    Exchange,
    HttpAnswer,
    RelayWire,
    RequestPlace,
    Timeouts,
)

CREATE, STEER, PROCESSED = "response.create", "response.steer", "response.processed"
_CREATED, _ERROR = b"response.created", b"error"
_ENDS = frozenset(
    (b"response.completed", b"response.failed", b"response.incomplete", b"response.cancelled")
)
_KIND = re.compile(rb'\s*\{\s*"type"\s*:\s*"([\w.]{1,100})"')
_STREAMED = b'"stream":true'
_LONGEST_STREAM_ID = 256
# The provider keeps the last response of each of at most 32 streams.
_MOST_HELD = 64
_SWEEP_S = 0.25
# How long the failed response may take to follow an error in mid-response.
_FAILED_WITHIN_S = 2.0
# Of a request over HTTP, without a meaning in a handshake.
_OF_BODIES = frozenset((b"content-type", b"accept", b"accept-encoding"))
_JSON: Headers = [(b"content-type", b"application/json")]
_EVENTS: Headers = [(b"content-type", b"text/event-stream; charset=utf-8")]


def speaks(upstream: Upstream) -> bool:
    """Return whether an upstream has the WebSocket of the Responses API."""
    return has_responses_socket(upstream.provider)


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """A turn that a client requests. body: that of the same request over HTTP. stream_id: names
    the stream, and is repeated by the events of the turn."""

    body: bytes
    stream_id: str | None = None

    @classmethod
    def of(cls, message: str | bytes) -> TurnRequest | SteerRequest | ProcessedNotice:
        """Return the request in a client's message. Raises InvalidRequest."""
        try:
            event = orjson.loads(message)
        except orjson.JSONDecodeError:
            raise _invalid("message", "a message is not JSON", "one JSON object") from None
        if type(event) is not dict:
            raise _invalid("message", "a message is not an object", "one JSON object")
        kind = event.pop("type", None)
        if kind == STEER:
            return SteerRequest(event.get("input"), event.get("previous_response_id"))
        if kind == PROCESSED:
            return ProcessedNotice(str(event.get("response_id")))
        if kind != CREATE:
            raise _invalid("type", f"{str(kind)[:64]!a} is not an event of a client", CREATE)
        stream_id = event.pop("stream_id", None)
        is_named = type(stream_id) is str and 1 <= len(stream_id) <= _LONGEST_STREAM_ID
        if stream_id is not None and not is_named:
            allowed = f"a text of 1 to {_LONGEST_STREAM_ID} characters"
            raise _invalid("stream_id", "stream_id is not the name of a stream", allowed)
        event.pop("stream", None)  # each turn is a stream
        if event.pop("background", None):
            reason = "a response over WebSocket can't run in the background"
            raise _invalid("background", reason, "false, or POST /v1/responses")
        try:
            return cls(orjson.dumps({"stream": True, **event}), stream_id)
        except orjson.JSONEncodeError:
            allowed = "at most 250 levels"
            raise _invalid("message", "a message is nested too deeply", allowed) from None


@dataclass(frozen=True, slots=True)
class SteerRequest:
    """Input that a client adds to a response in progress: the provider begins another response by
    itself then."""

    input: Any
    previous_response_id: Any


@dataclass(frozen=True, slots=True)
class ProcessedNotice:
    """Notice of Codex that it has processed a response. It has no answer."""

    response_id: str


def _invalid(field: str, reason: str, allowed: str) -> InvalidRequest:
    return InvalidRequest(field, reason, allowed=allowed)


def _event_of(body: bytes, stream_id: str | None) -> bytes:
    """Return a body that `TurnRequest` has made as the event that the provider gets."""
    kind = b'"type":"response.create"'
    if stream_id is not None:
        kind += b',"stream_id":%b' % orjson.dumps(stream_id)
    return body.replace(_STREAMED, kind, 1)


class ProviderTurns:
    """The connection to a provider for the turns of one client. A `CallSocket`.

    stream_id: of the turn in progress. upstream: to which the connection is open, if any.
    """

    def __init__(self, wire: RelayWire) -> None:
        self.stream_id: str | None = None
        self.upstream: Upstream | None = None
        self._wire = wire
        self._socket: ClientConnection | None = None
        self._held: dict[str, int] = {}  # responses of the connection, with their tokens

    # A `CallSocket`

    def serving(self, targets: Sequence[Target]) -> list[Target]:
        found = [one for one in targets if speaks(one.upstream)]
        if targets and not found:
            message = "no upstream of this model speaks the Responses API over WebSocket"
            raise WebSocketRefused(f"{message}: send it as POST /v1/responses", methods=("POST",))
        return found

    def continued(
        self,
        references: Sequence[Reference],
        facts: RequestFacts | None,
        targets: Sequence[Target],
    ) -> tuple[Sequence[Reference], list[Target]]:
        held = [
            one for one in references if one.kind == "response" and one.resource_id in self._held
        ]
        if not held or self.upstream is None:
            return references, list(targets)
        name = self.upstream.name
        left = [one for one in targets if one.upstream.name == name]
        if not left:
            message = f"the response {held[0].resource_id!r} lives at the upstream {name!r}, "
            message += "to which this call does not go"
            raise _invalid(held[0].field, message, f"a model that {name!r} serves")
        if facts is not None:
            tokens = sum(self._held[one.resource_id] for one in held)
            facts.pieces = with_stored(facts.pieces, tokens)
        return [one for one in references if one not in held], left

    async def open(
        self,
        target: Target,
        url: str,
        headers: Headers,
        body: bytes,
        timeouts: Timeouts,
        opened: Callable[[Exchange], None] | None,
    ) -> Exchange:
        loop, place = asyncio.get_running_loop(), _place(target, url)
        answer = HttpAnswer(loop)
        turn = _Turn(self, answer, loop)
        # The stand-in has what an exchange calls of an HTTP connection.
        connection = cast(Connection, turn)
        try:
            socket = await self._connected(target, url, headers, timeouts)
        except InvalidStatus as refused:
            response = refused.response
            if response.status_code < 400:
                reason = f"the provider answered {response.status_code}, which opens no WebSocket"
                raise UpstreamGarbled(reason) from None
            raw = response.headers.raw_items()
            pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in raw]
            turn.refuse(response.status_code, pairs, bytes(response.body or b""))
            exchange = Exchange(self._wire, place.origin, connection, answer, timeouts)
            await exchange.begun()
            return exchange
        exchange = Exchange(self._wire, place.origin, connection, answer, timeouts)
        if opened is not None:
            opened(exchange)
        turn.begin(socket, exchange)
        try:
            with suppress(ConnectionClosed):  # which reading reports
                await socket.send(_event_of(body, self.stream_id), text=True)
            await exchange.begun()
        except BaseException:  # cancellation too: the turn must not continue
            exchange.close()
            await asyncio.sleep(0)
            raise
        return exchange

    async def _connected(
        self, target: Target, url: str, headers: Headers, timeouts: Timeouts
    ) -> ClientConnection:
        """Return the open connection if it leads to this upstream, else a new one. Raises
        InvalidStatus and UpstreamError."""
        socket, upstream = self._socket, target.upstream
        if socket is not None and self.upstream is upstream and socket.close_code is None:
            return socket
        await self.close()
        sent = [pair for pair in headers if pair[0] not in _OF_BODIES]
        socket = await sockets.open_upstream(
            url,
            await self._wire.bare(_place(target, url), sent),
            subprotocol=None,
            connect_ms=timeouts.connect_ms,
        )
        self._socket, self.upstream = socket, upstream
        return socket

    # Between turns, and at the end

    async def unasked(self) -> bytes:
        """Wait for an event of the provider that belongs to no turn. Raises ConnectionClosed."""
        socket, upstream = self._socket, self.upstream
        if socket is None or upstream is None:
            await asyncio.get_running_loop().create_future()
            raise AssertionError("nobody sets this future")
        return masked(await socket.recv(decode=False), Target(upstream, ""))

    async def processed(self, notice: ProcessedNotice) -> None:
        """Pass on a notice about a response of this connection."""
        if self._socket is not None and notice.response_id in self._held:
            event = {"type": PROCESSED, "response_id": notice.response_id}
            with suppress(ConnectionClosed):
                await self._socket.send(orjson.dumps(event), text=True)

    def hold(self, event: dict[str, Any]) -> None:
        """Note the response of a turn that has ended, which the next turn may continue."""
        response = event.get("response")
        if type(response) is not dict or type(response_id := response.get("id")) is not str:
            return
        if response.get("status") not in ("completed", "incomplete"):
            return
        usage = response.get("usage")
        tokens = usage.get("total_tokens") if type(usage) is dict else 0
        if type(tokens) is not int or not 0 <= tokens <= MOST_TOKENS:
            tokens = 0
        self._held.pop(response_id, None)
        self._held[response_id] = tokens
        if len(self._held) > _MOST_HELD:
            del self._held[next(iter(self._held))]

    def cut(self) -> None:
        """Close the connection in the event loop's next iteration, if it is open."""
        socket, self._socket, self.upstream = self._socket, None, None
        self._held.clear()
        if socket is not None:
            sockets.cut(socket)

    async def close(self) -> None:
        """Close the connection, and wait until it is closed."""
        socket = self._socket
        self.cut()
        if socket is not None:
            await socket.wait_closed()


def _place(target: Target, url: str) -> RequestPlace:
    return RelayWire.place(url, target.upstream.access(Dialect.OPENAI))


class _Turn:
    """A turn in the place of the HTTP connection of an `Exchange`: it reads events into the
    `answer`."""

    def __init__(
        self, owner: ProviderTurns, answer: HttpAnswer, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._owner = owner
        self._answer = answer
        self._loop = loop
        self._room = asyncio.Event()
        self._room.set()
        self._reading: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._has_begun = False  # the provider has begun a response
        self._has_failed = False  # and reported an error in it
        self._is_over = True  # the connection can take another turn

    def begin(self, socket: ClientConnection, exchange: Exchange) -> None:
        """Read the events of the turn, within its timeouts."""
        self._is_over = False
        self._reading = self._loop.create_task(self._read(socket))
        self._check(exchange)

    def _check(self, exchange: Exchange) -> None:
        if (phase := exchange.overdue(self._loop.time())) is not None:
            exchange.cut(phase)
        else:
            self._timer = self._loop.call_later(_SWEEP_S, self._check, exchange)

    # What an exchange calls

    def goes_out(self) -> bool:
        return False

    def read_on(self) -> None:
        self._room.set()

    def done(self) -> bool:
        self._stop()
        return False  # it is kept by its owner

    def drop(self) -> None:
        self._is_over = False
        self._stop()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._reading is not None:
            self._reading.cancel()
        if not self._is_over:
            self._owner.cut()

    # The provider's events

    async def _read(self, socket: ClientConnection) -> None:
        answer = self._answer
        try:
            while not answer.ended and answer.failure is None:
                within_s = _FAILED_WITHIN_S if self._has_failed else None
                async with asyncio.timeout(within_s):
                    message = await socket.recv(decode=False)
                self._take(message)
                if answer.size_bytes > READ_AHEAD_BYTES:
                    self._room.clear()
                    await self._room.wait()
        except TimeoutError:  # nothing followed the error: who knows whether it has ended
            self._end()
        except ConnectionClosed:
            place = "in mid-answer" if answer.status else "before its answer"
            answer.fail(UpstreamUnavailable(f"the provider closed the connection {place}"))

    def _take(self, message: bytes) -> None:
        """Add an event to the answer."""
        answer, found = self._answer, _KIND.match(message)
        kind, event = b"" if found is None else found[1], None
        if found is None or kind in _ENDS or kind == _ERROR or message.find(b"\n") >= 0:
            try:
                event = orjson.loads(message)
            except orjson.JSONDecodeError:
                event = None
            if type(event) is not dict or type(event.get("type")) is not str:
                answer.fail(UpstreamGarbled("the provider sent an event that can't be read"))
                return
            kind, message = event["type"].encode("utf-8", "replace"), orjson.dumps(event)
        self._has_begun = self._has_begun or kind == _CREATED
        if event is not None and kind == _ERROR and not answer.status:
            self._is_over = True
            self.refuse(*_refusal_in(event))
            return
        if not answer.status:
            answer.status, answer.headers = 200, _EVENTS
        piece = b"event: %b\ndata: %b\n\n" % (kind, message)
        answer.pieces.append(piece)
        answer.size_bytes += len(piece)
        if kind in _ENDS and event is not None:
            self._owner.hold(event)
            self._is_over = True
            self._end()
        elif kind == _ERROR:
            self._has_failed = True
            if not self._has_begun:
                self._is_over = True
                self._end()
        answer.changed()

    def _end(self) -> None:
        self._answer.ended = True
        self._answer.changed()

    def refuse(self, status: int, headers: Headers, body: bytes) -> None:
        """Set the answer to a refusal."""
        answer = self._answer
        answer.headers, answer.pieces, answer.size_bytes = headers, [body], len(body)
        answer.status = status
        self._end()


def _refusal_in(event: dict[str, Any]) -> tuple[int, Headers, bytes]:
    """Return status, headers and body of the answer over HTTP that an event `error` reports."""
    error = refusals.error_object(event) or {}
    status = event.get("status", event.get("status_code"))
    if type(status) is not int or not 400 <= status <= 599:
        status = refusals.status_of(error)
    named: dict[str, Any] = {}
    for headers in (event.get("headers"), error.get("headers")):
        if type(headers) is dict:
            named |= {str(name).lower(): value for name, value in headers.items()}
    pairs = [
        (name.encode("utf-8", "replace"), str(value).encode("utf-8", "replace"))
        for name, value in named.items()
        if type(value) in (str, int, float) and name not in ("content-type", "content-length")
    ]
    shown = {name: value for name, value in error.items() if name != "headers"}
    return status, [*_JSON, *pairs], orjson.dumps({"error": shown})
