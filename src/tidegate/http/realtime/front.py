"""Front of realtime sessions: OpenAI's `/v1/realtime` and Gemini Live.

The caller is identified, and web pages are checked, before the handshake is answered. OpenAI's
model is in the URL: the answer waits for admission, and a refusal is an HTTP answer in the
dialect's form. Gemini's model is in the first message: the handshake is answered first, and a
refusal is a close code with its reason.

Invariants: every session is recorded, with one row at its end; a client's key is never sent
upstream, neither in a header nor in a subprotocol; a session of a process that stops is closed with
1001.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlencode

import orjson
from starlette.types import Receive, Scope, Send
from websockets.asyncio.connection import Connection
from websockets.exceptions import ConnectionClosed

from tidegate.call import ANYBODY, REALTIME_KIND, Caller, Status, new_id
from tidegate.dialects import DIALECTS, native_path
from tidegate.dialects.resources import Reference
from tidegate.dialects.spec import Dialect, Endpoint, Headers, Operation
from tidegate.errors import (
    DeadlineExceeded,
    InvalidRequest,
    IssuerUnavailable,
    RealtimeIdle,
    RealtimeStalled,
    RequestTimeout,
    ShuttingDown,
    StoreUnavailable,
    TidegateError,
    UpstreamUnauthorized,
)
from tidegate.http.native import call_of
from tidegate.http.problems import REQUEST_ID_HEADER, native_status_of, refusal
from tidegate.http.services import NATIVE, Opening, Services, log_request, who
from tidegate.http.sse import Presence, abort
from tidegate.http.uvicorn_protocol import UPGRADE_EXTENSION
from tidegate.realtime import sockets
from tidegate.realtime.events import Message, Setup, references_in, transcribing
from tidegate.realtime.exchange import (
    End,
    RealtimeBounds,
    RealtimeExchange,
    RealtimeRefused,
    SessionRequest,
    code_of,
)
from tidegate.realtime.resumption import resumed
from tidegate.record import REFUSED, CallRecord, Failure, Lineage
from tidegate.spine.bodies import NativeCall, aside
from tidegate.spine.models import check_model
from tidegate.spine.run import CallFailed
from tidegate.telemetry.logging import Log, get_logger

_OPENAI = "/v1/realtime"
_GEMINI = re.compile(
    r"/ws/google\.ai\.generativelanguage\.(?:v1beta|v1alpha)"
    r"\.GenerativeService\.BidiGenerateContent"
)
# The same of Google's SDK for Vertex, and what it is to an upstream.
_VERTEX = re.compile(
    r"/ws/google\.cloud\.aiplatform\.v1(?:beta1)?\.LlmBidiService/BidiGenerateContent"
)
_LIVE = "/ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent"
_SLASHES = re.compile(r"/{2,}")
_KEY_PROTOCOL = "openai-insecure-api-key."
_SUBPROTOCOL = "realtime"
_PROTOCOLS = b"sec-websocket-protocol"
_ALLOWED_QUERY = "model and intent"
_TRANSCRIBES = ("intent", "transcription")
_REQUEST_ID = REQUEST_ID_HEADER.encode()
_LOST = 1006

log = get_logger()


def is_realtime(path: str) -> bool:
    """Return whether a path is one of a realtime session."""
    plain = _SLASHES.sub("/", path)
    return _is_openai(path) or any(one.fullmatch(plain) for one in (_GEMINI, _VERTEX))


def _is_openai(path: str) -> bool:
    return path == _OPENAI or native_path(path) == _OPENAI


async def realtime(services: Services, scope: Scope, receive: Receive, send: Send) -> None:
    """Open the realtime session of a request, relay it, and log it when it has ended."""
    front = _SessionFront(services, scope, receive, send)
    try:
        await front.answer()
    except Exception:  # the top of a request's task: logged only here
        log.exception(Log.INTERNAL_ERROR, method=scope["method"], path=scope["path"])
        await front.report(TidegateError("an internal error; it has been logged"))
    finally:
        front.log_answered()


class _SessionFront:
    """A request, until its session has ended and is recorded."""

    def __init__(self, services: Services, scope: Scope, receive: Receive, send: Send) -> None:
        self._services = services
        self._scope = scope
        self._send = send
        self._receive = receive
        self._dialect = Dialect.OPENAI if _is_openai(scope["path"]) else Dialect.GEMINI
        self._request_id = new_id()
        self._received = time.monotonic()
        self._record = CallRecord("relay", ANYBODY.tenant_id, datetime.now(UTC))
        self._caller: Caller = ANYBODY
        self._headers = _with_key_of_protocol(scope["headers"])
        self._handshake: sockets.Handshake | None = None
        self._transcribes = False
        self._exchange: RealtimeExchange | None = None
        self._client: sockets.ClientSocket | None = None
        self._presence: Presence | None = None
        self._hold = services.hold(ANYBODY)
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[Any] = task

    async def answer(self) -> None:
        services = self._services
        services.streams.add(self._task)
        self._presence = Presence(self._scope, self._receive, self._task)
        try:
            await self._answer()
        finally:
            services.streams.discard(self._task)
            if self._client is not None:
                self._client.occupy = None
                sockets.cut(self._client)
            self._hold.release()

    async def _answer(self) -> None:
        services, record = self._services, self._record
        try:
            call, opened = await self._call()
        except TidegateError as error:
            await self._refuse_unheard(error)
            return
        except asyncio.CancelledError:
            self._task.uncancel()
            return
        self._begin_record(call)
        services.board.active_calls.enter(record)
        try:
            status, failure = await self._ended(call)
        finally:
            services.board.active_calls.leave(record)
            opened.close()
            if self._presence is not None:
                await self._presence.end()
        self._end_record(status, failure)

    async def _call(self) -> tuple[NativeCall, Opening]:
        """Return the call, and the count of its open stream. Raises TidegateError."""
        services = self._services
        if (foreign := services.origins.socket_refusal(self._scope["headers"])) is not None:
            raise foreign
        is_openai = self._dialect is Dialect.OPENAI
        chosen = _SUBPROTOCOL if is_openai else None
        self._handshake = sockets.Handshake(self._scope["headers"], chosen)
        self._caller = await self._identified()
        self._hold = services.hold(self._caller)
        if is_openai:
            self._record.model = self._model_of_query()
        call = call_of(
            {**self._scope, "headers": self._headers},
            _endpoint(self._dialect),
            b"",
            self._caller,
            request_id=self._request_id,
            received=(self._received, self._record.received_at),
            usual_wait_ms=services.config.stream_wait_ms,
            tracing=services.spine.tracing,
        )
        if services.store.audit.is_full_for(0):
            await services.store.audit.room(0, call.terms.left_ms())
        return call, services.openings.stream(self._caller)

    async def _ended(self, call: NativeCall) -> tuple[Status, Failure | None]:
        """Open the session, relay it to its end, and report a failure to the client."""
        error: TidegateError
        status = Status.FAILED
        try:
            await self._relayed(call)
            return _outcome(None if self._exchange is None else self._exchange.ended)
        except CallFailed as failed:
            error, reporting = failed.error, self._report_failed(failed)
        except RealtimeRefused as refused:
            error, reporting = refused.error, self.report(refused.error)
        except TidegateError as failure:
            error, reporting = failure, self.report(failure)
            if isinstance(failure, DeadlineExceeded):
                status = Status.EXPIRED
        except ConnectionClosed:
            return Status.CANCELLED, _client_left()
        except asyncio.CancelledError:
            self._task.uncancel()
            if self._presence is not None and self._presence.is_disconnected:
                return Status.CANCELLED, _client_left()
            error = ShuttingDown("this process is stopping; connect again")
            reporting = self.report(error)
        except Exception:  # an unforeseen error: logged here, and the session is recorded
            log.exception(Log.INTERNAL_ERROR, request_id=str(self._request_id))
            error = TidegateError("an internal error; it has been logged")
            reporting = self.report(error)
        try:
            await reporting
        except asyncio.CancelledError:  # disconnected meanwhile, or the grace is over
            self._task.uncancel()
            abort(self._scope)
        return status, Failure.of(error)

    async def _relayed(self, call: NativeCall) -> None:
        services, record = self._services, self._record
        path = "/realtime"
        query: Callable[[str], str] = _openai_query
        first: Callable[[str], str] | None = None
        setup: Setup | None = None
        references: Sequence[Reference] = ()
        if self._transcribes:  # the provider then accepts no model in the query
            query, first = _transcription_query, transcribing
        if self._dialect is Dialect.GEMINI:
            setup, references = await self._setup()
            record.model, first = setup.model, setup.message
            record.request = orjson.dumps(setup.body)
            path, query = _SLASHES.sub("/", self._scope["path"]), _no_query
            path = path if _VERTEX.fullmatch(path) is None else _LIVE
        model = record.model or ""
        check_model(self._caller, model)
        resources, targets = services.relay.resources, services.spine.targets
        left, homes = targets.of(self._dialect, model), None
        if references:
            left = await resources.among(self._caller, self._dialect, references, left)
        context_tokens, handle = 0, None if setup is None else setup.handle
        if setup is not None and handle is not None:
            session, left = resumed(handle, left, self._caller.tenant_id)
            first = partial(setup.message, handle=session.handle)
            context_tokens = session.context_tokens
        if references or handle is not None:
            homes = frozenset(one.upstream.name for one in left)
        self._exchange = RealtimeExchange(
            services.spine,
            services.relay.wire,
            call.terms,
            SessionRequest(
                self._dialect,
                model,
                path,
                query,
                call.headers,
                first,
                self._transcribes,
                homes,
                context_tokens,
            ),
            record,
            self._bounds(call.terms.wait_ms),
            resources,
            answer=self._accept,
            check=self._check,
            problem=self._problem,
        )
        await services.spine.run(self._exchange, record, left)

    # The caller, and the request

    async def _identified(self) -> Caller:
        gate, query = self._services.gate, self._scope["query_string"]
        caller = gate.known(self._headers, query)
        return await gate.identify(self._headers, query) if caller is None else caller

    async def _check(self) -> None:
        """Raise Unauthenticated or Forbidden if the key is no longer valid for the session."""
        try:
            caller = await self._identified()
        except (StoreUnavailable, IssuerUnavailable):  # open sessions continue; no new one begins
            return
        check_model(caller, self._record.model or "")

    def _model_of_query(self) -> str:
        """Return the model in the query. Raises InvalidRequest."""
        query = self._scope["query_string"].decode("latin-1")
        found = [
            pair
            for pair in parse_qsl(query, keep_blank_values=True)
            if pair[0].lower() not in ("key", "api_key", "api-key")
        ]
        self._transcribes = _TRANSCRIBES in found
        if self._transcribes:
            found = [pair for pair in found if pair != _TRANSCRIBES]
        for name, _ in found:
            if name != "model":
                message = f"{name[:64]!a} is not supported in the URL of a realtime session"
                raise InvalidRequest(name[:64], message, allowed=_ALLOWED_QUERY)
        models: set[str] = {value for _, value in found}
        if len(models) != 1 or not (model := models.pop()) or not model.isprintable():
            intent = "intent=transcription&" if self._transcribes else ""
            message = f"a realtime session names one model, as /v1/realtime?{intent}model=<model>"
            raise InvalidRequest("model", message, allowed="a model's name")
        return model

    async def _setup(self) -> tuple[Setup, Sequence[Reference]]:
        """Answer the handshake, wait for the first message, and return it with the resources that
        it names. Raises InvalidRequest and NotFound."""
        client = await self._accept([])
        within_s = self._services.config.receive_timeout_ms / 1000
        try:
            async with asyncio.timeout(within_s):
                message: Message = await client.recv()
        except TimeoutError:
            raise RequestTimeout(f"no setup came within {within_s:g} s") from None
        return await aside(len(message), partial(_setup_in, message))

    def _bounds(self, wait_ms: int | None) -> RealtimeBounds:
        config = self._services.config
        return RealtimeBounds(
            stalled_ms=config.stalled_reader_ms,
            wait_ms=wait_ms or config.stream_wait_ms,
        )

    async def _accept(self, headers: Headers) -> Connection:
        """Answer the handshake, unless it is answered already."""
        if self._client is None:
            assert self._handshake is not None
            if self._presence is not None:
                await self._presence.end()
            named = [(_REQUEST_ID, str(self._request_id).encode()), *headers]
            self._client = self._handshake.socket(named)
            self._client.occupy = self._hold.occupy
            self._scope["extensions"][UPGRADE_EXTENSION]["call"].to(self._client)
            self._record.http_status = 101
        return self._client

    # Answers to the client

    def _problem(self, error: TidegateError) -> dict[str, Any]:
        spec = DIALECTS[self._dialect]
        return spec.problem(error, native_status_of(error), error.retry_after_ms)

    async def report(self, error: TidegateError) -> None:
        """Report an error: as an HTTP answer, or by closing an open socket."""
        if self._client is None:
            await self._respond(*refusal(self._dialect, error))
            return
        code = 1001 if isinstance(error, ShuttingDown) else code_of(error)
        await sockets.close(self._client, code, error.message_with_allowed)

    async def _report_failed(self, failed: CallFailed) -> None:
        """Report a failure with the upstream's own answer, as for any call."""
        if failed.reported:
            return
        if isinstance(failed.error, UpstreamUnauthorized) and failed.error.of_key:
            await self.report(failed.error.for_clients())
        elif self._client is not None or not failed.status:
            await self.report(failed.error)
        else:
            length = (b"content-length", str(len(failed.body)).encode())
            await self._respond(failed.status, [*failed.headers, length], failed.body)

    async def _respond(self, status: int, headers: Headers, body: bytes) -> None:
        self._record.http_status = status
        headers = [*headers, (_REQUEST_ID, str(self._request_id).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _refuse_unheard(self, error: TidegateError) -> None:
        """Reject a request that is not recorded."""
        if self._presence is not None:
            await self._presence.end()
        await self.report(error)
        record = self._record
        record.tenant_id, record.dialect = self._caller.tenant_id, self._dialect.value
        record.operation = REALTIME_KIND
        record.end(REFUSED, Failure.of(error))
        self._services.store.listeners.note(record)

    # The record

    def _begin_record(self, call: NativeCall) -> None:
        record, caller, terms = self._record, self._caller, call.terms
        record.request_id = self._request_id
        record.tenant_id, record.key_id = caller.tenant_id, caller.key_id
        record.endpoint, record.dialect = self._scope["path"], self._dialect.value
        record.operation, record.kind = REALTIME_KIND, REALTIME_KIND
        record.priority, record.subject, record.trail = terms.priority, terms.subject, terms.trail
        record.request_type, record.streamed = "application/json", True
        record.lineage = Lineage.of(terms.conversation, terms.trail)

    def _end_record(self, status: Status, failure: Failure | None) -> None:
        record, exchange = self._record, self._exchange
        turns = None if exchange is None else exchange.turns
        end = None if exchange is None else exchange.ended
        summary = {
            "turns": 0 if turns is None else turns.count,
            "seconds": round((record.upstream_ms or 0.0) / 1000, 3),
            "closed_by": "gateway" if end is None else end.by,
            "code": None if end is None else end.code,
            "reason": None if end is None else end.reason[:200],
        }
        record.keep(orjson.dumps(summary))
        record.response_type = "application/json"
        record.end(status, failure)
        self._services.store.audit.put(record)

    def log_answered(self) -> None:
        took_s = time.monotonic() - self._received
        self._services.tally.answered(NATIVE, self._record.http_status, took_s)
        fields = {
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self._record.http_status,
            "took_ms": round(took_s * 1000, 1),
            "request_id": str(self._request_id),
            **({} if self._caller is ANYBODY else who(self._caller)),
        }
        log_request(fields)


def _outcome(end: End | None) -> tuple[Status, Failure | None]:
    """Return the status of a session that was opened."""
    error = TidegateError("the session did not begin") if end is None else end.error
    if error is None:
        left = end is not None and end.by == "client" and end.code == _LOST
        return (Status.CANCELLED, _client_left()) if left else (Status.SUCCEEDED, None)
    if isinstance(error, RealtimeIdle):
        return Status.SUCCEEDED, None
    stalled = isinstance(error, RealtimeStalled)
    return Status.CANCELLED if stalled else Status.FAILED, Failure.of(error)


def _client_left() -> Failure:
    return Failure("client_left", "the client disconnected")


def _endpoint(dialect: Dialect) -> Endpoint:
    """Return the endpoint of the request that opens a session, which itself calls no model."""
    return Endpoint(dialect, Operation.MODELS, _OPENAI)


def _setup_in(message: Message) -> tuple[Setup, Sequence[Reference]]:
    return Setup.of(message), references_in(Dialect.GEMINI, message)


def _openai_query(model: str) -> str:
    return urlencode({"model": model})


def _transcription_query(_model: str) -> str:
    return urlencode([_TRANSCRIBES])


def _no_query(_model: str) -> str:
    return ""


def _with_key_of_protocol(headers: Headers) -> Headers:
    """Return the headers, with the key that a browser sends as a subprotocol, unless there is
    another key."""
    for name, value in headers:
        if name == _PROTOCOLS:
            for one in value.decode("latin-1").split(","):
                if one.strip().startswith(_KEY_PROTOCOL):
                    key = one.strip().removeprefix(_KEY_PROTOCOL).encode("latin-1")
                    return [*headers, (b"authorization", b"Bearer " + key)]
    return headers
