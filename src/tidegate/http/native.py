"""Native routes: the paths of OpenAI, Gemini and Anthropic as one raw ASGI application.

Invariants: bodies are forwarded as bytes; errors are in the client's dialect; every authenticated
call is recorded; when the client disconnects, the upstream call is closed and its permit returned
immediately; an invalid header value is reported with the allowed ones; a client's key is never sent
upstream.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from operator import itemgetter
from typing import Any
from urllib.parse import parse_qsl, unquote_plus
from uuid import UUID

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from tidegate.call import ANYBODY, Caller, Status, new_id
from tidegate.dialects import DIALECTS, METHODS, endpoint_in, methods_at
from tidegate.dialects.forms import is_form
from tidegate.dialects.headers import as_data, as_private, content_type_in, to_send
from tidegate.dialects.parsing import LARGE_BYTES, skimmed
from tidegate.dialects.spec import Dialect, Endpoint, Headers, Operation
from tidegate.errors import (
    DeadlineExceeded,
    InvalidRequest,
    RequestTimeout,
    ShuttingDown,
    StoreUnavailable,
    TidegateError,
    UnsupportedMedia,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamUnauthorized,
)
from tidegate.http.body import (
    WITH_ITS_HEAD_BYTES,
    BodyBudget,
    Incoming,
    Pace,
    Spool,
    announced_bytes,
    check_announced,
    check_size,
    read_form,
)
from tidegate.http.guards import (
    CALLER_BY_OPERATOR,
    MARK,
    PASS,
    admit_upload,
    own_urls,
    upload_secret,
    upload_upstream,
)
from tidegate.http.idempotency import HEADER as IDEMPOTENCY_HEADER
from tidegate.http.idempotency import LOST_HEADER, Once, has_key, idempotency_in
from tidegate.http.problems import REQUEST_ID_HEADER, error_event, is_far, not_relayed, refusal
from tidegate.http.services import (
    CACHEABLE,
    NATIVE,
    SHOW_WAIT_EVERY_S,
    SHOW_WAIT_HEADER,
    Opening,
    Services,
    log_request,
    shows_wait,
    who,
)
from tidegate.http.sse import Presence, abort
from tidegate.http.uvicorn_protocol import DIRECT_EXTENSION, Direct
from tidegate.record import (
    KEPT_BYTES,
    REFUSED,
    TAIL_BYTES,
    CallRecord,
    Failure,
    Lineage,
    PieceDecoder,
    coding_of,
)
from tidegate.spine.bodies import FormBody, NativeCall, aside
from tidegate.spine.native import AT_UPSTREAM, MAX_BYTES
from tidegate.spine.out import client_left
from tidegate.spine.run import CallFailed, Terms
from tidegate.store.idempotency import KeyState
from tidegate.store.records import Idempotency
from tidegate.telemetry.logging import Log, get_logger
from tidegate.telemetry.tracing import HEADER, Tracing, parent_of
from tidegate.upstream.transport import SizedBody

# Credentials of clients; `%` since a name can be percent-encoded.
_KEYS_IN_QUERY = frozenset(
    ("key", "$key", "api_key", "api-key", "access_token", "oauth_token", PASS, MARK, AT_UPSTREAM)
)
# Google reads headers and the method from these, which clients on web pages send
# (`goog.net.rpc.HttpCors` of its Closure library): a header that is not forwarded could be passed
# in them.
_OVERRIDES_IN_QUERY = frozenset(("$httpheaders", "$httpmethod"))
_NOT_SENT_IN_QUERY = _KEYS_IN_QUERY | _OVERRIDES_IN_QUERY
# Azure's version of its paths; an upstream at Azure has its own.
_VERSION_IN_QUERY = frozenset(("api-version",))
_AZURE, _CLAUDE_AT_VERTEX = b"/openai/", b"/publishers/anthropic/"
# Vertex's own value, `vertex-2023-10-16`, does not match this date format.
_BODY_VERSION = re.compile(rb'"anthropic_version"\s*:\s*"(\d{4}-\d\d-\d\d)"')
_END_BYTES = 4_096
_MAYBE_NOT_SENT = re.compile(r"key|token|tidegate|\$http|%", re.IGNORECASE)
# Parameters by which Google changes the form of its answer: to one without a usage, or to one that
# is not JSON.
_FORMS = ("fields", "callback", "alt")
_MAYBE_FORM = re.compile(r"fields|callback|alt=(?!(?:sse|json)(?:&|$))|[%;]", re.IGNORECASE)
_READ_FORMS = ("json", "sse")
_MOST_WAIT_MS = 86_400_000
_LONGEST_TAG = 200
# Session headers of Claude Code, of opencode (a subagent's parent, then two for its own), of Codex,
# in three spellings, and of Cline and other clients of LiteLLM's proxy. The first of these names
# the conversation of a call without `x-tidegate-conversation`.
_SESSIONS = {
    name: rank
    for rank, name in enumerate(
        (
            *(b"x-claude-code-session-id", b"x-parent-session-id"),
            *(b"x-session-id", b"x-session-affinity"),
            *(b"session_id", b"session-id", b"conversation_id"),
            *(b"x-litellm-session-id", b"x-litellm-trace-id"),
        )
    )
}
_SHOW_WAIT, _ONCE = SHOW_WAIT_HEADER.encode(), IDEMPOTENCY_HEADER.lower().encode()
# Headers that `call_of` reads; all others are forwarded or dropped.
_READ = frozenset(
    (
        *(b"x-tidegate-deadline-ms", b"x-tidegate-priority", b"x-tidegate-subject"),
        *(b"x-tidegate-conversation", HEADER, _SHOW_WAIT, _ONCE, *_SESSIONS),
    )
)


def call_of(
    scope: Mapping[str, Any],
    endpoint: Endpoint,
    body: bytes,
    caller: Caller,
    *,
    request_id: UUID,
    received: tuple[float, datetime],
    usual_wait_ms: int,
    tracing: Tracing,
) -> NativeCall:
    """Return the call that a request makes. `received`: by the monotonic clock and by the calendar.
    Raises InvalidRequest."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    wait_ms, priority, subject, conversation = usual_wait_ms, 0, None, None
    parent, show, has_deadline, has_session, has_key = None, False, False, False, False
    for name, value in headers:
        if name not in _READ:
            continue
        if name == b"x-tidegate-deadline-ms":
            wait_ms, has_deadline = _whole(name, value, 1, _MOST_WAIT_MS), True
        elif name == b"x-tidegate-priority":
            priority = _whole(name, value, -100, 100)
        elif name == b"x-tidegate-subject":
            subject = _tag(name, value)
        elif name == b"x-tidegate-conversation":
            conversation = _tag(name, value)
        elif name == HEADER:
            parent = parent_of(value.decode("latin-1"))
        elif name == _SHOW_WAIT:
            show = shows_wait(value.decode("latin-1"))
        elif name == _ONCE:
            has_key = True
        else:
            has_session = True
    if conversation is None:
        conversation = _session_in(headers if has_session else [], endpoint, body)
    is_traced = tracing.on or parent is not None
    trail = tracing.trail(request_id, parent) if is_traced else None
    raw_path: bytes = scope.get("raw_path") or b""
    query = _query(endpoint, scope["query_string"], raw_path) if scope["query_string"] else ""
    received_s, received_at = received
    priority = min(priority, caller.most_priority)
    terms = Terms(request_id, caller, received_s, wait_ms, priority, trail)
    terms.subject, terms.conversation = subject, conversation
    terms.has_own_deadline = has_deadline
    if endpoint.operation is Operation.OTHER and scope["method"] in _NOT_REPEATED:
        terms.most_tries = 1
    return NativeCall(
        terms,
        endpoint,
        scope["method"],
        query,
        _sent_on(headers if trail is None else _without_parent(headers), raw_path, body),
        body if endpoint.is_counted or endpoint.operation.has_body else b"",
        received_at,
        show,
        has_key,
    )


def begin_record(record: CallRecord, call: NativeCall, scope: Mapping[str, Any]) -> None:
    """Fill in the facts of the request before its call is made."""
    terms, endpoint = call.terms, call.endpoint
    caller = terms.caller
    record.request_id = terms.request_id
    record.tenant_id, record.key_id = caller.tenant_id, caller.key_id
    record.endpoint, record.dialect = scope["path"], str(endpoint.dialect)
    record.operation = endpoint.name
    record.request, record.priority, record.subject = call.body, terms.priority, terms.subject
    record.request_type = content_type_in(scope["headers"])
    record.trail = terms.trail
    if terms.conversation is not None or terms.trail is not None:
        record.lineage = Lineage.of(terms.conversation, terms.trail)


def _without_parent(headers: Headers) -> Headers:
    """Return the headers without the trace parent: the call sends its own."""
    return [pair for pair in headers if pair[0] != HEADER]


_NAME = itemgetter(0)


def check_content(headers: Headers, *, may_be_coded: bool = False) -> None:
    """Raise InvalidRequest for more than one Content-Type: a server may go by either of them; and
    UnsupportedMedia for a compressed or otherwise encoded body, unless it may be encoded."""
    names = [*map(_NAME, headers)]
    if b"content-encoding" in names and not may_be_coded and _is_coded(headers):
        raise UnsupportedMedia("Content-Encoding", _CODED, allowed="identity")
    if names.count(b"content-type") > 1:
        message = "there is more than one Content-Type"
        raise InvalidRequest("Content-Type", message, allowed="one Content-Type")


def _is_coded(headers: Headers) -> bool:
    for name, value in headers:
        if name == b"content-encoding" and value.lower().replace(b"identity", b"").strip(b", "):
            return True
    return False


def _sent_on(headers: Headers, raw_path: bytes, body: bytes) -> Headers:
    """Return the headers to forward. A client of Claude at Vertex sends the version in the body."""
    sent = to_send(headers)
    at_vertex = raw_path.find(_CLAUDE_AT_VERTEX) >= 0
    if at_vertex and all(name != b"anthropic-version" for name, _ in sent):
        # Only the ends of a large body: no client puts the version after a file.
        ends = body
        if len(body) > LARGE_BYTES:
            ends = body[:_END_BYTES] + body[-_END_BYTES:]
        dated = _BODY_VERSION.search(ends)
        usual = DIALECTS[Dialect.ANTHROPIC].headers
        sent += usual if dated is None else [(b"anthropic-version", dated[1])]
    return sent


def _query(endpoint: Endpoint, given: bytes, raw_path: bytes) -> str:
    """Return the query to forward. Raises InvalidRequest."""
    query = given.decode("latin-1")
    if _MAYBE_NOT_SENT.search(query) is not None:
        query = _without(_NOT_SENT_IN_QUERY, query)
    if raw_path.startswith(_AZURE):
        query = _without(_VERSION_IN_QUERY, query)
    if endpoint.is_counted and _MAYBE_FORM.search(query) is not None:
        _check_form(query)
    return query


def _without(names: frozenset[str], query: str) -> str:
    """Return a query without the fields of these names; the rest is unchanged, byte for byte."""
    fields = query.split("&")
    return "&".join(
        [one for one in fields if unquote_plus(one.partition("=")[0]).lower() not in names]
    )


def _check_form(query: str) -> None:
    """Raise InvalidRequest for a form of answer whose usage could not be read."""
    for name, value in parse_qsl(query.replace(";", "&"), keep_blank_values=True):
        plain = name.lower().removeprefix("$")
        form = value.partition(";")[0]  # the rest selects how enumerations are written
        if plain not in _FORMS or (plain == "alt" and form in _READ_FORMS):
            continue
        message = (
            f"{name[:64]!a} asks for an answer whose usage can't be read, which is not relayed"
        )
        allowed = "json or sse" if plain == "alt" else f"a query without {plain}"
        raise InvalidRequest(plain, message, allowed=allowed)


def _whole(name: bytes, value: bytes, least: int, most: int) -> int:
    text = value.decode("latin-1").strip()
    digits = text.removeprefix("-")
    if not digits.isdecimal() or len(digits) > 9 or not least <= int(text) <= most:
        header = name.decode()
        allowed = f"a whole number from {least} to {most}"
        raise InvalidRequest(header, f"{header} must be {allowed}", allowed=allowed)
    return int(text)


def _tag(name: bytes, value: bytes) -> str:
    """Return a subject, which must be equal whether it came in a header or in JSON. Most clients
    send headers in UTF-8; a value that is not UTF-8 is read as Latin-1."""
    try:
        text = value.decode().strip()
    except UnicodeDecodeError:
        text = value.decode("latin-1").strip()
    if not 1 <= len(text) <= _LONGEST_TAG or not text.isprintable():
        header = name.decode()
        allowed = f"1 to {_LONGEST_TAG} printable characters"
        raise InvalidRequest(header, f"{header} must be {allowed}", allowed=allowed)
    return text


def _session_in(headers: Headers, endpoint: Endpoint, body: bytes) -> str | None:
    """Return the name of a conversation from an agent's own header, or else from Claude Code's
    body; None if it is not a valid name, which is not the client's mistake."""
    named = [pair for pair in headers if pair[0] in _SESSIONS]
    if not named:
        return _session_of_claude(body) if endpoint.dialect is Dialect.ANTHROPIC else None
    text = min(named, key=lambda pair: _SESSIONS[pair[0]])[1].decode("utf-8", "replace").strip()
    return text if 1 <= len(text) <= _LONGEST_TAG and text.isprintable() else None


# Claude Code before 2.1.86 has no header, but a session in `metadata.user_id`: behind the names of
# its user and account, or, from 2.1.78 on, in JSON.
_USER_ID = b'"user_id"'
_CLAUDES_SESSION = re.compile(
    rb'"user_id"\s*:\s*"(?:user_[0-9a-f]{1,128}_account_[0-9a-f-]{0,40}_session_'
    rb'|\{[^{}]{0,400}?\\"session_id\\"\s*:\s*\\")([0-9a-f-]{36})(?:"|\\")',
)
_METADATA_BYTES = 65_536  # it is near the end of a body


def _session_of_claude(body: bytes) -> str | None:
    """Return the session that Claude Code names in the body of a call; None for any other."""
    end = body[-_METADATA_BYTES:]
    place = end.rfind(_USER_ID)
    found = _CLAUDES_SESSION.match(end, place) if place >= 0 else None
    return None if found is None else found[1].decode()


_REQUEST_ID, _LOST = REQUEST_ID_HEADER.encode(), LOST_HEADER.encode()
_TYPE = b"content-type"
# At a path of unknown meaning: a second request could create a second object.
_NOT_REPEATED = ("POST", "PATCH")
# Its answer repeats the request, with the upstream's key in it.
_ECHO = "TRACE"
SOCKET_EXTENSION = "tidegate.socket"  # a `CallSocket`, of a call in a client's WebSocket
_CODED = "compressed request bodies are not supported: send the body uncompressed"

log = get_logger()


async def native(services: Services, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request to a native path, and log it in any case."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    path, method = scope["path"], scope["method"]
    endpoint, dialect = endpoint_in(method, path, headers, scope["query_string"])
    methods: tuple[str, ...] = ()
    if endpoint is None:
        found = services.spine.targets.passthrough.endpoint(path, dialect)
        methods = methods_at(path, dialect) if found is None else METHODS
        if found is not None and method != _ECHO:
            endpoint, dialect = found, found.dialect
    front = _Front(services, scope, receive, send, dialect)
    try:
        if endpoint is None:
            await front.refuse_unrecorded(not_relayed(method, path, methods, headers), None)
        else:
            await front.answer(endpoint)
    except Exception:  # the top of a request's task: logged only here
        log.exception(Log.INTERNAL_ERROR, method=method, path=path)
        await front.report(TidegateError("an internal error; it has been logged"))
    finally:
        front.log_answered()


class _Front:
    """A request, until it is answered and recorded."""

    __slots__ = (
        *(
            "started",
            "_services",
            "_scope",
            "_receive",
            "_send",
            "_dialect",
            "_request_id",
            "_received",
        ),
        *("_received_at", "_record", "_last", "_task", "_head_sent", "_id_text", "_has_pass"),
        *("_is_replay", "_headers", "_caller", "_direct", "_hold", "_incoming", "_once", "_spool"),
        "_presence",
        "_unpacking",
    )

    def __init__(
        self, services: Services, scope: Scope, receive: Receive, send: Send, dialect: Dialect
    ) -> None:
        self.started = False  # the head of an answer has been sent
        self._services = services
        self._scope = scope
        self._receive = receive
        self._send = send
        self._dialect = dialect
        self._request_id = new_id()
        self._id_text = ""  # as sent in the answer's head
        self._received = time.monotonic()
        self._received_at = datetime.now(UTC)
        self._record = CallRecord("relay", ANYBODY.tenant_id, self._received_at)
        self._last = b""  # the last bytes sent
        self._head_sent = False
        self._unpacking: PieceDecoder | None = None
        self._caller = ANYBODY
        self._has_pass = False  # an upload's pass, which identifies its caller
        self._is_replay = False  # the answer repeats that of an earlier, recorded request
        self._headers: Headers = []  # of the answer
        self._once: Once | None = None  # with an idempotency key
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[Any] = task
        self._incoming: Incoming | None = None
        self._spool: Spool | None = None  # of a form
        self._hold: BodyBudget | None = None
        self._presence: Presence | None = None
        offered = scope.get("extensions", {}).get(DIRECT_EXTENSION)
        # An answer to HEAD has no body, whatever its length says; uvicorn handles that.
        direct = offered is not None and scope["method"] != "HEAD"
        self._direct: Direct | None = offered["answer"] if direct else None

    def has_left(self) -> bool:
        return self._presence is not None and self._presence.is_disconnected

    async def answer(self, endpoint: Endpoint) -> None:
        self._services.streams.add(self._task)
        try:
            await self._answer(endpoint)
        finally:
            self._services.streams.discard(self._task)
            if self._incoming is not None:
                self._incoming.release()
            if self._hold is not None:
                self._hold.release()
            if self._spool is not None:
                await self._spool.close()

    async def _answer(self, endpoint: Endpoint) -> None:
        uploads, scope = endpoint.operation is Operation.UPLOAD, self._scope
        headers, gate = scope["headers"], self._services.gate
        try:
            check_content(headers, may_be_coded=uploads)
            known = scope.get(CALLER_BY_OPERATOR) or gate.known(headers, scope["query_string"])
            self._caller = await self._identified(endpoint) if known is None else known
            form = await self._form(endpoint) if endpoint.takes_form else None
            body = b""
            if not uploads and form is None:
                whole = None if self._direct is None else self._direct.take_body()
                body = await self._whole_body() if whole is None else whole
                if len(body) > (most_bytes := self._services.config.max_body_bytes):
                    check_size(len(body), most_bytes)
            call = call_of(
                self._scope,
                endpoint,
                body,
                self._caller,
                request_id=self._request_id,
                received=(self._received, self._received_at),
                usual_wait_ms=self._services.config.stream_wait_ms,
                tracing=self._services.spine.tracing,
            )
            call.form, call.terms.left = form, self.has_left
            call.socket = self._scope.get("extensions", {}).get(SOCKET_EXTENSION)
            if (audit := self._services.store.audit).is_full_for():  # of the largest body
                await audit.room(call.body_bytes, call.terms.left_ms())
            opening = await self._opening(call)
        except TidegateError as error:
            await self.refuse_unrecorded(error, endpoint)
            return
        except ClientDisconnect:
            return
        begin_record(self._record, call, self._scope)
        self._services.board.active_calls.enter(self._record)
        receive = _never if uploads else self._receive
        presence = self._presence = Presence(self._scope, receive, self._task)
        comfort = self._comforting(endpoint, shows=call.shows_wait)
        try:
            status, failure = await self._run(call, presence)
        finally:
            self._services.board.active_calls.leave(self._record)
            if comfort is not None:
                comfort.cancel()
            if opening is not None:
                opening.close()
            await presence.end()
        if self._record.handed_over:  # a worker records its end
            if self._once is not None and status is Status.SUCCEEDED:
                self._once.ended(self._record, content_type_in(self._headers) or "")
        elif not self._is_replay:
            self._record.response_type = content_type_in(self._headers)
            self._record.end(status, failure)
            if form is not None:
                await self._record_form(form)
            self._services.store.audit.put(self._record)
            if self._once is not None and status is Status.SUCCEEDED:
                self._once.ended(self._record, content_type_in(self._headers) or "")

    async def _whole_body(self) -> bytes:
        most_bytes = self._services.config.max_body_bytes
        check_announced(self._scope["headers"], most_bytes)
        hold = self._services.hold(self._caller)
        return await self._arriving(most_bytes, in_memory=True).whole(hold)

    async def _form(self, endpoint: Endpoint) -> FormBody | None:
        """Return the form in the body, once it is complete; None if the body is not a form."""
        config, headers = self._services.config, self._scope["headers"]
        types = [value for name, value in headers if name == _TYPE]
        if not any(map(is_form, types)):
            return None
        self._spool = Spool(config.data_dir / "tmp", memory_bytes=WITH_ITS_HEAD_BYTES)
        self._hold = self._services.hold(self._caller)
        body = None if self._direct is None else self._direct.take_body()
        if body is None:
            check_announced(headers, config.max_body_bytes)
            pieces = self._arriving(config.max_body_bytes, in_memory=False).pieces()
        else:
            check_size(len(body), config.max_body_bytes)
            pieces = _in_one_piece(body)
        form = await read_form(
            types,
            pieces,
            self._spool,
            self._hold,
            records=endpoint.operation is Operation.TRANSCRIBE,
            digests=has_key(headers),
        )
        if self._spool.path is None:
            return FormBody(form, data=self._spool.data)
        return FormBody(form, path=self._spool.path)

    async def _record_form(self, form: FormBody) -> None:
        """Record the body; only its beginning if it is long, or if the recording falls behind."""
        record, most_bytes = self._record, KEPT_BYTES
        if self._services.store.audit.is_full_for(form.form.size_bytes):
            most_bytes = TAIL_BYTES
        with suppress(StoreUnavailable):  # the disk failed: recorded without a body
            record.request = await form.beginning(most_bytes)
        record.request_omitted_bytes = form.form.size_bytes - len(record.request)

    def _arriving(self, max_bytes: int, *, in_memory: bool) -> Incoming:
        pace = Pace(silence_ms=self._services.config.receive_timeout_ms)
        self._incoming = Incoming(
            self._receive, self._task, pace, max_bytes=max_bytes, in_memory=in_memory
        )
        return self._incoming

    async def _identified(self, endpoint: Endpoint) -> Caller:
        """Return the caller if it is not cached; no byte of the body is read before."""
        gate, caller = self._services.gate, None
        if endpoint.operation is Operation.UPLOAD:
            caller = await admit_upload(gate, self._scope, self._upload_secret(endpoint))
        if caller is not None:
            self._has_pass = True
            return caller
        return await gate.identify(self._scope["headers"], self._scope["query_string"])

    def _upload_secret(self, endpoint: Endpoint) -> str:
        upstreams = self._services.spine.targets.upstreams_of(endpoint.dialect)
        return upload_secret(upstreams, self._services.operator_key)

    async def _opening(self, call: NativeCall) -> Opening | None:
        """Count another open stream of a tenant with a cap on streams. Raises QuotaExceeded."""
        if call.terms.caller.caps.most_streams is None or call.socket is not None:
            return None  # a WebSocket is one open stream, whatever its calls are
        if not await aside(len(call.body), partial(_asks_for_stream, call)):
            return None
        return self._services.openings.stream(call.terms.caller)

    async def _run(self, call: NativeCall, presence: Presence) -> tuple[Status, Failure | None]:
        """Make the call, and report a failure to the client."""
        error: TidegateError
        try:
            if call.endpoint.operation is Operation.UPLOAD:
                await self._upload(call)
            elif call.has_key and (
                idempotency := await idempotency_in(call, self._scope["headers"])
            ):
                await self._run_once(call, idempotency)
            else:
                await self._services.relay.run(call, self, self._record)
            return Status.SUCCEEDED, None
        except CallFailed as failed:
            status, error, reporting = Status.FAILED, failed.error, self._report_failed(failed)
        except TidegateError as refused:
            expired = isinstance(refused, DeadlineExceeded)
            status = Status.EXPIRED if expired else Status.FAILED
            error, reporting = refused, self.report(refused)
        except asyncio.CancelledError:
            # Cancelled here, because the client disconnected; or by the server, which stops.
            self._task.uncancel()
            # The body of an upload is read by the task that forwards it.
            is_slow = self._incoming is not None and self._incoming.is_slow
            if presence.is_disconnected and not is_slow:
                return Status.CANCELLED, client_left(self._record)
            status, error = Status.FAILED, ShuttingDown("this process is stopping; retry")
            if is_slow:
                error = RequestTimeout("the request's body arrives too slowly")
            reporting = self.report(error)
        except Exception:  # an unforeseen error: logged here, and the call is recorded
            log.exception(Log.INTERNAL_ERROR, request_id=str(self._request_id))
            status = Status.FAILED
            error = TidegateError("an internal error; it has been logged")
            reporting = self.report(error)
        try:
            await reporting
        except asyncio.CancelledError:  # disconnected meanwhile, or the grace is over
            self._task.uncancel()
            abort(self._scope)
        return status, Failure.of(error)

    async def _run_once(self, call: NativeCall, idempotency: Idempotency) -> None:
        """Make the call with an idempotency key: a new call only if the one that it waited for has
        failed."""
        once = self._once = Once(self._services.store.native_keys, call, idempotency)
        taken = await once.take()
        if isinstance(taken, KeyState):
            self._request_id, self._is_replay = taken.request_id, True
            self._occupy(len(taken.answer or b""))
            await once.replay(taken, self)
            return
        try:
            await self._services.relay.run(call, self, self._record)
        except BaseException:  # cancellation too: calls that wait for this one must not wait on
            record = self._record
            if record.handed_over and not record.streamed:  # it continues; the answer is whole
                once.ended(record, content_type_in(self._headers) or "")
            else:
                once.failed()
            raise

    def _occupy(self, size_bytes: int) -> None:
        """Count a stored answer in memory until it is sent. Raises QueueFull."""
        if self._hold is None:
            self._hold = self._services.hold(self._caller)
        self._hold.occupy(self._hold.held_bytes + size_bytes)

    async def _upload(self, call: NativeCall) -> None:
        endpoint = call.endpoint
        secret = self._upload_secret(endpoint)
        own = own_urls(self._scope, endpoint.path, secret)
        pieces = self._arriving(MAX_BYTES, in_memory=False).pieces()
        size_bytes = announced_bytes(self._scope["headers"])  # the provider gets the same length
        body = pieces if size_bytes is None else SizedBody(size_bytes, pieces)
        at = upload_upstream(self._scope["query_string"], secret, has_pass=self._has_pass)
        await self._services.relay.upload(call, body, own, self, self._record, at)

    def _comforting(self, endpoint: Endpoint, *, shows: bool) -> asyncio.Task[None] | None:
        """Return a task that sends keep-alive bytes in a waiting stream, or its place in the queue;
        None if neither is wanted."""
        after_ms = self._services.config.keep_alive_after_ms
        if not (after_ms or shows) or not endpoint.is_counted:
            return None
        gemini = endpoint.dialect is Dialect.GEMINI
        events = b"alt=sse" in self._scope["query_string"] if gemini else True
        every_s = SHOW_WAIT_EVERY_S if shows else after_ms / 1000
        return asyncio.create_task(self._comfort(every_s, shows=shows)) if events else None

    async def _comfort(self, every_s: float, *, shows: bool) -> None:
        """Send bytes that clients ignore. From the first of them on the status is 200, and errors
        are reported as events."""
        while True:
            await asyncio.sleep(every_s)
            if self._is_answering():
                return
            waited_ms = (time.monotonic() - self._received) * 1000
            piece = DIALECTS[self._dialect].keep_alive
            if shows and self._record.waits:
                place = await self._services.place_json(self._record, waited_ms)
                piece = DIALECTS[self._dialect].wait_event(place)
                if self._is_answering():
                    return
            elif shows and not 0 < self._services.config.keep_alive_after_ms <= waited_ms:
                continue  # already admitted: a refusal of the provider must keep its status
            if not self._head_sent:
                stream_type = DIALECTS[self._dialect].stream_type
                headers = [(_TYPE, stream_type), (b"cache-control", b"no-store")]
                await self._send_head(200, headers)
            await self.body(piece, True)

    def _is_answering(self) -> bool:
        """Return whether an answer has begun, or the answer will not be a stream."""
        return self.started or not self._record.streamed

    def _with_id(self, headers: Headers) -> Headers:
        self._id_text = str(self._request_id)
        if self._scope["method"] in CACHEABLE:
            headers = as_private(headers)
        headers = as_data(headers)
        headers.append((_REQUEST_ID, self._id_text.encode()))
        if self._once is not None and self._once.lost is not None:
            headers.append((_LOST, str(self._once.lost).encode()))
        return headers

    async def start(self, status: int, headers: Headers) -> None:
        self.started, self._headers = True, headers
        if not self._head_sent:
            await self._send_head(status, headers)
        elif _is_coded(headers):  # the head that was sent does not announce it
            self._unpacking = PieceDecoder(coding_of(headers))

    async def _send_head(self, status: int, headers: Headers) -> None:
        self._head_sent = True
        self._record.http_status = status
        headers = self._with_id(headers)
        if self._direct is not None:
            await self._direct.head(status, headers)
        else:
            head: Message = {"type": "http.response.start", "status": status, "headers": headers}
            await self._send(head)

    def body(self, piece: bytes, more: bool) -> Awaitable[None]:
        if (unpacking := self._unpacking) is not None:
            piece = unpacking.take(piece)
            if not unpacking.reads:
                raise UpstreamGarbled("the provider's answer has an unsupported Content-Encoding")
        self._last = piece
        if self._direct is not None:
            return self._direct.piece(piece, more)
        return self._send({"type": "http.response.body", "body": piece, "more_body": more})

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        if self._direct is None or self._head_sent:
            await self.start(status, headers)
            await self.body(body, False)
            return
        self.started, self._headers, self._head_sent = True, headers, True
        self._record.http_status = status
        await self._direct.whole(status, self._with_id(headers), body)

    async def refuse(self, error: TidegateError) -> None:
        """Answer with an error of ours, which names the upstream if the call was sent to one."""
        record = self._record
        sent_to = record.upstream if record.sent else None
        status, headers, body = refusal(self._dialect, error, sent_to)
        if record.queue_ms is not None and (error.at_upstream or sent_to):
            headers.append((b"x-tidegate-queue-ms", b"%.1f" % record.queue_ms))
        await self.whole(status, headers, body)

    async def _report_failed(self, failed: CallFailed) -> None:
        """Report a failure with the upstream's own body if there is one. Its rejection of our key
        is replaced: clients would take it for theirs."""
        if failed.reported:
            return
        if self._head_sent or not failed.status:
            await self.report(failed.error)
            return
        if isinstance(failed.error, UpstreamUnauthorized) and failed.error.of_key:
            await self.report(failed.error.for_clients())
            return
        headers = [*failed.headers, (b"content-length", str(len(failed.body)).encode())]
        after_ms = failed.paused_ms or failed.error.retry_after_ms
        if after_ms and not any(name == b"retry-after" for name, _ in headers):
            headers.append((b"retry-after", str(-(-after_ms // 1000)).encode()))
        never = failed.status == 429 and isinstance(failed.error, UpstreamRejected)  # too large
        if never or is_far(failed.error.retry_after_ms or after_ms):
            no_retry = DIALECTS[self._dialect].no_retry  # replaces the provider's own
            named = {name for name, _ in no_retry}
            headers = [*(one for one in headers if one[0] not in named), *no_retry]
        self._record.keep(failed.body)
        await self.whole(failed.status, headers, failed.body)

    async def report(self, error: TidegateError) -> None:
        """Report an error in the way that is still possible: as the whole answer, as the last event
        of a stream, or by cutting the connection."""
        if not self._head_sent:
            await self.refuse(error)
        elif self._record.streamed and DIALECTS[self._dialect].ends_whole(self._last):
            self._unpacking = None
            await self.body(error_event(self._dialect, error), False)
        else:
            abort(self._scope)

    def log_answered(self) -> None:
        took_s = time.monotonic() - self._received
        self._services.tally.answered(NATIVE, self._record.http_status, took_s)
        fields = {
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self._record.http_status,
            "took_ms": round(took_s * 1000, 1),
            "request_id": self._id_text or str(self._request_id),
        }
        if self._record.trail is not None:
            fields["trace_id"] = self._record.trail.trace
        if self._caller is not ANYBODY:
            fields |= who(self._caller)
        if log_request.is_text:
            fields |= {
                "model": self._record.model,
                "queue_ms": round(self._record.waited_ms, 1),
            }
        log_request(fields)

    async def refuse_unrecorded(self, error: TidegateError, endpoint: Endpoint | None) -> None:
        """Answer with an error of ours a request that is not recorded."""
        await self.refuse(error)
        record = self._record
        record.tenant_id, record.dialect = self._caller.tenant_id, str(self._dialect)
        record.operation = "unknown" if endpoint is None else endpoint.name
        record.end(REFUSED, Failure.of(error))
        self._services.store.listeners.note(record)


def _asks_for_stream(call: NativeCall) -> bool:
    """Return whether the answer is to be a stream: by the path, the body, or the query, as in a
    request that reads a response still being generated."""
    if call.endpoint.streams:
        return True
    stated = [value for name, value in parse_qsl(call.query) if name == "stream"]
    if call.form is not None:
        stated.append(str(call.form.form.fields.get("stream", "")))
    elif call.endpoint.is_counted or call.endpoint.operation is Operation.OTHER:
        body: dict[str, Any] = {}
        with suppress(InvalidRequest):  # reported when it is called
            body = skimmed(call.body).body if call.body else {}
        if body.get("stream") is True or body.get("stream_format") == "sse":
            return True
    return any(one.lower() not in ("", "0", "false") for one in stated)


async def _in_one_piece(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def _never() -> Message:
    """Replacement of `receive` while another reader reads the body: never returns."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody sets this future")
