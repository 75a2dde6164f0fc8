"""Front of the Responses API over WebSocket: a client's connection, each turn of which is a call.

    client ──► `response.create` ──► http/native ──► spine ──► realtime/responses ──► provider
    client ◄── its events, or an event `error` with the status and headers of a refusal

A turn is answered by the same code as `POST /v1/responses`: with the key, the limits, the budgets,
the models and the record of a call of its own. The handshake is answered when the caller is
identified and some upstream speaks this protocol; otherwise the request is answered 426, and Codex
continues in HTTP.

Invariants: turns are made one after another, in the order of their requests; a client that
disconnects ends its turn, whose permit is released after the provider's connection is closed; a
rejected turn leaves the connection open; a connection lasts at most `LONGEST_S`, as at OpenAI, and
of a process that stops until its turn has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from datetime import UTC, datetime
from functools import partial
from typing import Any

import orjson
from starlette.types import Message, Receive, Scope, Send
from websockets.exceptions import ConnectionClosed

from tidegate.call import ANYBODY, Caller, new_id
from tidegate.dialects import DIALECTS, native_path
from tidegate.dialects.refusals import status_of
from tidegate.dialects.spec import Dialect, Headers
from tidegate.errors import InvalidRequest, QueueFull, TidegateError
from tidegate.http.idempotency import HEADER as IDEMPOTENCY_HEADER
from tidegate.http.native import SOCKET_EXTENSION, native
from tidegate.http.problems import REQUEST_ID_HEADER, native_status_of, refusal
from tidegate.http.services import (
    NATIVE,
    SHOW_WAIT_HEADER,
    Opening,
    Services,
    log_request,
    who,
)
from tidegate.http.sse import ABORT_EXTENSION
from tidegate.http.uvicorn_protocol import UPGRADE_EXTENSION
from tidegate.realtime import sockets
from tidegate.realtime.responses import (
    ProcessedNotice,
    ProviderTurns,
    SteerRequest,
    TurnRequest,
    speaks,
)
from tidegate.record import REFUSED, CallRecord, Failure
from tidegate.spine.bodies import aside
from tidegate.telemetry.logging import Log, get_logger

_PATH = "/v1/responses"
LONGEST_S = 3_600.0
MOST_PENDING = 16  # turns that wait for the one in progress, as many as OpenAI makes concurrently
_RETRY_AFTER_MS = 1_000
_NORMAL, _LEAVING, _LOST, _FAILED = 1000, 1001, 1006, 1011
_STOPPING = "this process is stopping; connect again"
# Of a handshake, or with an effect on one request only.
_NOT_OF_TURNS = frozenset(
    (
        *(b"connection", b"upgrade", b"content-type", b"content-length", b"transfer-encoding"),
        *(b"accept", IDEMPOTENCY_HEADER.lower().encode(), SHOW_WAIT_HEADER.encode()),
    )
)
_OF_HANDSHAKE = b"sec-websocket-"
_ERROR_HEADERS = ("retry-after", "x-ratelimit-", "x-should-retry", "x-request-id", "x-tidegate-")
# OpenAI reports it with 400; clients then send the whole conversation.
_NOT_FOUND = "previous_response_not_found"
_TOO_OLD = {
    "type": "invalid_request_error",
    "code": "websocket_connection_limit_reached",
    "message": "Responses websocket connection limit reached (60 minutes). Create a new websocket "
    "connection to continue.",
    "param": None,
}

log = get_logger()


def opens_responses(services: Services, scope: Scope) -> bool:
    """Return whether a request that offers another protocol opens a connection for turns of the
    Responses API. The protocol has to be WebSocket (the JDK's client offers HTTP/2 with a POST to
    the same path), and some upstream has to speak it."""
    path = scope["path"]
    if scope["method"] != "GET" or (path != _PATH and native_path(path) != _PATH):
        return False
    offered = [value.lower() for name, value in scope["headers"] if name == b"upgrade"]
    if not any(value.find(b"websocket") >= 0 for value in offered):
        return False
    return any(map(speaks, services.spine.targets.in_service(Dialect.OPENAI)))


async def responses(services: Services, scope: Scope, _receive: Receive, send: Send) -> None:
    """Open the connection of a request, answer its turns, and log it when it has ended."""
    front = _TurnsFront(services, scope, send)
    try:
        await front.answer()
    except Exception:  # the top of a request's task: logged only here
        log.exception(Log.INTERNAL_ERROR, method=scope["method"], path=scope["path"])
        await front.report(TidegateError("an internal error; it has been logged"))
    finally:
        front.log_answered()


class _TurnsFront:
    """A client's connection, until it is closed."""

    def __init__(self, services: Services, scope: Scope, send: Send) -> None:
        self._services = services
        self._scope = scope
        self._send = send
        self._received = time.monotonic()
        self._caller: Caller = ANYBODY
        self._status = 0
        self._client: sockets.ClientSocket | None = None
        self._provider = ProviderTurns(services.relay.wire)
        self._hold = services.hold(ANYBODY)
        self._read_bytes = 0  # of messages in the client's socket
        self._pending: deque[TurnRequest] = deque()
        self._news = asyncio.Event()  # something came of the client
        self._left = asyncio.Event()  # the client has disconnected
        self._end: tuple[int, str] | None = None  # code and reason of our close
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[Any] = task

    async def answer(self) -> None:
        services = self._services
        services.streams.add(self._task)
        try:
            try:
                handshake, opened = await self._checked()
            except TidegateError as error:
                await self._refuse(error)
                return
            try:
                await self._relayed(handshake)
            finally:
                opened.close()
        except asyncio.CancelledError:  # the process stops: turns in progress have ended
            self._task.uncancel()
            if self._client is not None:
                await sockets.close(self._client, _LEAVING, _STOPPING)
        finally:
            services.streams.discard(self._task)
            if self._client is not None:
                self._client.occupy = None
                sockets.cut(self._client)
            await self._provider.close()
            self._hold.release()

    async def _checked(self) -> tuple[sockets.Handshake, Opening]:
        """Return the handshake, and the count of its open stream. Raises TidegateError."""
        services, scope = self._services, self._scope
        if (foreign := services.origins.socket_refusal(scope["headers"])) is not None:
            raise foreign
        handshake = sockets.Handshake(scope["headers"], None)
        headers, query = scope["headers"], scope["query_string"]
        caller = services.gate.known(headers, query)
        self._caller = await services.gate.identify(headers, query) if caller is None else caller
        self._hold = services.hold(self._caller)
        return handshake, services.openings.stream(self._caller)

    async def _refuse(self, error: TidegateError) -> None:
        """Reject a connection in HTTP, which is not recorded."""
        await self.report(error)
        record = CallRecord("relay", self._caller.tenant_id, datetime.now(UTC))
        record.dialect, record.operation = Dialect.OPENAI.value, "responses"
        record.end(REFUSED, Failure.of(error))
        self._services.store.listeners.note(record)

    async def report(self, error: TidegateError) -> None:
        """Report an error: as an HTTP answer, or by closing the open socket."""
        if self._client is not None:
            await sockets.close(self._client, _FAILED, error.message)
            return
        status, headers, body = refusal(Dialect.OPENAI, error)
        self._status = status
        headers = [*headers, (REQUEST_ID_HEADER.encode(), str(new_id()).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    # The connection

    async def _relayed(self, handshake: sockets.Handshake) -> None:
        """Answer the handshake, and the turns until the connection has to end."""
        client = self._client = handshake.socket([])
        client.occupy = self._occupy
        self._scope["extensions"][UPGRADE_EXTENSION]["call"].to(client)
        self._status = 101
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + LONGEST_S
        reading = loop.create_task(self._read(client))
        leaving = loop.create_task(self._services.draining.wait())
        try:
            while not self._left.is_set() and self._end is None:
                if leaving.done():
                    self._end = _LEAVING, _STOPPING
                elif loop.time() >= ends_at:
                    await self._send_event(_error_of(400, _TOO_OLD))
                    self._end = _NORMAL, ""
                elif self._pending:
                    await self._turn(client, self._pending.popleft())
                else:
                    await self._idle(leaving, ends_at - loop.time())
        finally:
            for task in (reading, leaving):
                task.cancel()
            await asyncio.wait({reading, leaving})
        if not reading.cancelled():
            reading.result()
        if self._end is not None:
            await sockets.close(client, self._end[0], self._end[1])

    async def _idle(self, leaving: asyncio.Task[Any], within_s: float) -> None:
        """Wait for a turn, the end of the time, or an event of the provider, which is passed on; if
        the provider closes its side, close the client's."""
        loop = asyncio.get_running_loop()
        self._news.clear()
        news = loop.create_task(self._news.wait())
        unasked = loop.create_task(self._provider.unasked())
        try:
            await asyncio.wait(
                {news, unasked, leaving}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for task in (news, unasked):
                task.cancel()
            await asyncio.wait({news, unasked})
        if unasked.cancelled():
            return
        try:
            event = unasked.result()
        except ConnectionClosed as closed:
            await self._provider.close()
            if not self._pending:
                frame = closed.rcvd
                self._end = (_LOST, "") if frame is None else (frame.code, frame.reason)
            return
        await self._send_event(event.decode("utf-8", "replace"))

    async def _read(self, client: sockets.ClientSocket) -> None:
        """Read the client's messages until it disconnects: turns are put in line, all else is
        answered."""
        try:
            while True:
                message = await client.recv()
                try:
                    event = await aside(len(message), partial(TurnRequest.of, message))
                except InvalidRequest as error:
                    await self._send_event(_error_event(error))
                    continue
                if isinstance(event, SteerRequest):
                    await self._send_event(_not_steered(event))
                elif isinstance(event, ProcessedNotice):
                    await self._provider.processed(event)
                elif len(self._pending) >= MOST_PENDING:
                    await self._send_event(_error_event(_too_many(), event.stream_id))
                else:
                    self._pending.append(event)
                    self._news.set()
        except ConnectionClosed:
            pass
        finally:  # in any case: nobody reads the client any more
            self._left.set()
            self._news.set()

    def _occupy(self, read_bytes: int) -> None:
        """Count what the client's socket has read, and the turns in line. Raises QueueFull."""
        self._read_bytes = read_bytes
        self._hold.occupy(read_bytes + sum(len(one.body) for one in self._pending))

    async def _send_event(self, event: str) -> None:
        """Send an event, unless the client reads too slowly: then it is disconnected."""
        client = self._client
        assert client is not None
        try:
            async with asyncio.timeout(self._services.config.stalled_reader_ms / 1000):
                await client.send(event)
        except TimeoutError:
            sockets.cut(client)
        except ConnectionClosed:
            pass

    # A turn

    async def _turn(self, client: sockets.ClientSocket, request: TurnRequest) -> None:
        """Answer a turn as a request over HTTP, to its end."""
        self._occupy(self._read_bytes)  # from here on, its body counts as that of a request
        out = _TurnOut(self._send_event, request.stream_id)
        self._provider.stream_id = request.stream_id
        scope = {
            **self._scope,
            "method": "POST",
            "path": _PATH,
            "raw_path": _PATH.encode(),
            "headers": _headers_of_turn(self._scope["headers"]),
            "extensions": {
                SOCKET_EXTENSION: self._provider,
                ABORT_EXTENSION: {"call": partial(sockets.cut, client)},
            },
        }
        receive = _Received(request.body, self._left)
        turn = asyncio.create_task(native(self._services, scope, receive, out.send))
        try:
            await asyncio.shield(turn)
        except asyncio.CancelledError:  # the process stops: the turn reports it to the client
            turn.cancel()
            await asyncio.wait({turn})
            raise

    def log_answered(self) -> None:
        took_s = time.monotonic() - self._received
        self._services.tally.answered(NATIVE, self._status, took_s)
        log_request(
            {
                "method": self._scope["method"],
                "path": self._scope["path"],
                "status": self._status,
                "took_ms": round(took_s * 1000, 1),
                **({} if self._caller is ANYBODY else who(self._caller)),
            }
        )


def _headers_of_turn(headers: Headers) -> Headers:
    kept = [
        pair
        for pair in headers
        if pair[0] not in _NOT_OF_TURNS and not pair[0].startswith(_OF_HANDSHAKE)
    ]
    return [*kept, (b"content-type", b"application/json")]


class _Received:
    """The `receive` of a turn: its body, and later the client's disconnect."""

    def __init__(self, body: bytes, left: asyncio.Event) -> None:
        self._body: bytes | None = body
        self._left = left

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}


class _TurnOut:
    """The answer to a turn: a stream, of which each event becomes a message, or a refusal, which
    becomes an event `error`."""

    def __init__(self, send_event: Any, stream_id: str | None) -> None:
        self._send_event = send_event
        self._stream_id = stream_id
        self._status = 0
        self._headers: dict[str, str] = {}
        self._rest = b""

    async def send(self, message: Message) -> None:
        """Send what a part of the answer over HTTP means. Raises no error of the client's side."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            for name, value in message["headers"]:
                self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")
            return
        data = self._rest + message["body"]
        if self._status >= 300:
            self._rest = data
            if not message.get("more_body", False):
                await self._send_event(self._refused(data))
            return
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    await self._send_event(self._message_of(line[5:].strip()))

    def _refused(self, body: bytes) -> str:
        """Return the event for a refusal with this body."""
        try:
            found = orjson.loads(body)
        except orjson.JSONDecodeError:
            found = None
        error = found.get("error") if type(found) is dict else None
        if type(error) is not dict:
            message = body[:1_000].decode("utf-8", "replace")
            error = {"type": "server_error", "code": None, "message": message, "param": None}
        headers = {
            name: value for name, value in self._headers.items() if name.startswith(_ERROR_HEADERS)
        }
        status = 400 if error.get("code") == _NOT_FOUND else self._status
        return _error_of(status, error, headers, self._stream_id)

    def _message_of(self, data: bytes) -> str:
        """Return an event of a stream as a message: an error of ours has no type there."""
        if data.startswith(b'{"error":'):
            error = orjson.loads(data)["error"]
            return _error_of(status_of(error), error, {}, self._stream_id)
        return data.decode("utf-8", "replace")


def _error_of(
    status: int,
    error: dict[str, Any],
    headers: dict[str, str] | None = None,
    stream_id: str | None = None,
) -> str:
    """Return an event `error`. OpenAI's SDK reads the headers within the error, Codex beside it."""
    event: dict[str, Any] = {"type": "error", "status": status, "error": error}
    if headers:
        event |= {"error": {**error, "headers": headers}, "headers": headers}
    if stream_id is not None:
        event["stream_id"] = stream_id
    return orjson.dumps(event).decode()


def _too_many() -> QueueFull:
    message = f"{MOST_PENDING} turns of this connection wait already"
    return QueueFull(message, limit="turns", retry_after_ms=_RETRY_AFTER_MS)


def _error_event(error: TidegateError, stream_id: str | None = None) -> str:
    """Return the event for a message that begins no turn."""
    status = native_status_of(error)
    problem = DIALECTS[Dialect.OPENAI].problem(error, status, error.retry_after_ms)
    return _error_of(status, problem["error"], stream_id=stream_id)


def _not_steered(event: SteerRequest) -> str:
    """Return the rejection of input for a response in progress, in the provider's form: the
    response that it begins would be a call without a permit."""
    message = "Tidegate does not relay response.steer: send response.create after the response."
    error = {"type": "invalid_request_error", "code": "steering_not_supported", "message": message}
    steer = {"input": event.input, "previous_response_id": event.previous_response_id}
    failed = {"type": "response.steer.failed", "sequence_number": 0, "error": error, "steer": steer}
    return orjson.dumps(failed).decode()
