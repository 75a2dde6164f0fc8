"""Client of the SDK over connections of our own, and light types for its requests.

httpx2 examines every connection of its pool for each request, which dominates the cost of a call at
a hundred concurrent calls. Events of a stream without a listener are merged before the SDK parses
them. The SDK's converters look up every field of a model by `name in model`. A pydantic model has
no `__contains__`, so that Python iterates over all fields without a match, and the SDK falls back
to `getattr`: a third of the cost of a call.

Invariants: leaving a `CallScope` returns only after all its exchanges are closed; a phase's timeout
runs only while waiting for the provider; answers are bounded; an answer with unknown fields is
passed to the SDK unchanged; the light types hold exactly the content of a request's dictionaries,
and are never changed. Importing this module costs half a second (httpx2 and the SDK), so only
`GeminiProcessor.start` does, in a thread.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from base64 import urlsafe_b64encode
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from contextvars import ContextVar, Token
from dataclasses import replace
from functools import cache, lru_cache, partial, wraps
from secrets import token_hex
from types import TracebackType
from typing import Any, ClassVar, Self

import httpx2
import orjson
from google.genai import types

from tidegate.call import Media
from tidegate.dialects import refusals
from tidegate.dialects.gemini import tier_at_end
from tidegate.dialects.headers import tier_in
from tidegate.dialects.spec import Dialect
from tidegate.errors import (
    TidegateError,
    UpstreamError,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from tidegate.policy.access import Access, Authentication
from tidegate.telemetry.tracing import HEADER
from tidegate.upstream._compat import Convert, replace_conversion, skip_type_warnings
from tidegate.upstream.transport import (
    Exchange,
    RelayWire,
    RepeatableBody,
    RequestPlace,
    Signer,
    Timeouts,
    out_of_time,
)

_EVENTS = b"text/event-stream"
# The transport sends these itself, with the key as the upstream expects it.
_FRAMING = (
    *("host", "content-length", "connection", "transfer-encoding", "accept-encoding"),
    "x-goog-api-key",
)
_HEADS_KEPT = 64
_WHOLE_BYTES = 65_536  # largest file that is passed to the SDK whole
_FILE_PIECE_BYTES = 3 * 65_536  # a multiple of 3: only the last piece is padded
_MARK_BYTES = 24


class PlainRequest(httpx2.Request):
    """A request in the form that the transport takes: httpx2 would parse it, and the transport
    would join it again. Only the type of its base class is used."""

    def __init__(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None
    ) -> None:
        self.method = method.upper()
        self.whole_url = url
        self.fields, self.is_upload = _fields(tuple(headers.items()))
        self.body = content

    def __repr__(self) -> str:
        return f"<PlainRequest {self.method}>"  # an upload's URL contains the key


@lru_cache(_HEADS_KEPT)
def _fields(headers: tuple[tuple[str, str], ...]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """Return the headers to send, and whether they belong to an upload. Cached: the SDK sends the
    same ones with nearly every call."""
    stated = {name.lower(): value for name, value in headers}
    sent = {name: value for name, value in stated.items() if name not in _FRAMING}
    fields = [(name.encode("ascii"), value.encode("latin-1")) for name, value in sent.items()]
    return [*fields, (b"accept-encoding", b"identity")], "x-goog-upload-command" in stated


_EVENT = frozenset(("candidates", "usageMetadata", "modelVersion", "responseId", "createTime"))
_CANDIDATE = frozenset(("content", "finishReason", "index"))
_CONTENT = frozenset(("parts", "role"))
# Usage fields that the SDK would validate and no caller reads are left out; also modalities if all
# of them are text.
_USAGE = frozenset(
    (
        *("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount"),
        *("cachedContentTokenCount", "totalTokenCount", "toolUsePromptTokenCount"),
    )
)
_MODALITIES = frozenset(
    (
        *("promptTokensDetails", "candidatesTokensDetails", "toolUsePromptTokensDetails"),
        "cacheTokensDetails",
    )
)
_MODALITY = frozenset(("modality", "tokenCount"))
_PART = {"text": str, "thought": bool, "thoughtSignature": str}
_DATA = b"data: "
_TIERS = re.compile(rb'"(?:serviceTier|trafficType)"\s*:\s*("[^"]*"|.)')
_USUAL_TIERS = frozenset((b'"standard"', b'"ON_DEMAND"'))


class _NotPlain(Exception):
    """An event with unknown fields, which the SDK must parse."""


def gathered(stream: bytes) -> bytes | None:
    """Merge all events of `stream` into one. Return None unless all of them have only the fields
    that are listed here."""
    events = stream.replace(b"\r\n", b"\n").split(b"\n\n")
    if events.pop() or not events:
        return None  # it was cut within an event, or has no event
    whole = _WholeAnswer()
    try:
        for event in events:
            if not event.startswith(_DATA) or b"\n" in event:
                return None
            whole.add(orjson.loads(event[len(_DATA) :]))
    except (_NotPlain, orjson.JSONDecodeError):
        return None
    return b"%b%b\n\n" % (_DATA, orjson.dumps(whole.event()))


def whole_events(stream: bytes) -> bytes:
    """Return the complete events of a stream that was cut."""
    ends = (stream.rfind(end) + len(end) for end in (b"\n\n", b"\r\n\r\n") if end in stream)
    return stream[: max(ends, default=0)]


class _WholeAnswer:
    """Merges the content of events. `add` raises _NotPlain."""

    def __init__(self) -> None:
        self._others: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._candidate: dict[str, Any] | None = None
        self._parts: list[dict[str, Any] | list[str]] = []  # a list: pieces of one text

    def add(self, event: Any) -> None:
        if not isinstance(event, dict) or not event or not event.keys() <= _EVENT:
            raise _NotPlain
        for name, value in event.items():
            if name == "candidates":
                self._add_candidates(value)
            elif name == "usageMetadata":
                self._add_usage(value)
            elif not isinstance(value, str) or not value:
                raise _NotPlain
            elif name != "createTime":
                self._others[name] = value

    def _add_candidates(self, candidates: Any) -> None:
        if not isinstance(candidates, list) or len(candidates) != 1:
            raise _NotPlain
        candidate = _gathered_fields(candidates[0], _CANDIDATE)
        if self._candidate is None:
            self._candidate = {}
        if "finishReason" in candidate:
            reason = candidate["finishReason"]
            if not isinstance(reason, str) or not reason:
                raise _NotPlain
            self._candidate["finishReason"] = reason
        if type(candidate.get("index", 0)) is not int:
            raise _NotPlain
        if "content" in candidate:
            self._add_content(_gathered_fields(candidate["content"], _CONTENT))

    def _add_content(self, content: dict[str, Any]) -> None:
        parts = content.get("parts", [])
        if not isinstance(parts, list) or not isinstance(content.get("role", ""), str):
            raise _NotPlain
        for part in parts:
            if not isinstance(part, dict) or "text" not in part:
                raise _NotPlain
            if any(type(value) is not _PART.get(name) for name, value in part.items()):
                raise _NotPlain
            last = self._parts[-1] if self._parts else None
            if len(part) > 1:
                self._parts.append(part)
            elif isinstance(last, list):
                last.append(part["text"])
            else:
                self._parts.append([part["text"]])

    def _add_usage(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            raise _NotPlain
        for name, value in usage.items():
            if type(value) is int and value >= 0:
                if name in _USAGE:
                    self._usage[name] = value
            elif not isinstance(value, list | str) or name in _USAGE:
                raise _NotPlain
            elif name in _MODALITIES:
                self._add_modalities(name, value)

    def _add_modalities(self, name: str, counts: Any) -> None:
        self._usage.pop(name, None)
        for one in counts:
            modality = _gathered_fields(one, _MODALITY).get("modality", "TEXT")
            if type(modality) is not str or type(one.get("tokenCount", 0)) is not int:
                raise _NotPlain
            if modality != "TEXT":
                self._usage[name] = counts

    def event(self) -> dict[str, Any]:
        body = self._others
        if self._candidate is not None:
            parts = [{"text": "".join(p)} if isinstance(p, list) else p for p in self._parts]
            content = {"parts": parts}
            body = {"candidates": [{"content": content, **self._candidate}], **body}
        return {**body, "usageMetadata": self._usage} if self._usage else body


def _gathered_fields(value: Any, known: frozenset[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or not value.keys() <= known:
        raise _NotPlain
    return value


TAIL_BYTES = 65_536
# A longer answer is passed to the SDK as it arrives.
MOST_GATHERED_BYTES = 1_000_000

_scope: ContextVar[CallScope | None] = ContextVar("tidegate_gemini_scope", default=None)


class SdkExchange(httpx2.AsyncByteStream):
    """A request, and the bytes of its response, with a bound on their total.

    When gathering, a stream's events are returned as one. A failure or cancellation that cuts them
    off is kept in `held`, and raised by the next read. `whole`: the exchange was closed after the
    end of its answer, so that its connection is kept. `plain`: the whole answer is one event
    without a field that the SDK does not know.
    """

    def __init__(self, client: SdkClient) -> None:
        self.exchange: Exchange | None = None
        self.tail: deque[bytes] = deque()
        self.whole = False
        self.held: BaseException | None = None
        self.plain = False
        self._client = client
        self._gathers = False
        self._size_bytes = 0
        self._tail_bytes = 0
        client.open_exchanges.add(self)

    def answered(self, exchange: Exchange, *, gathers: bool) -> _SdkResponse:
        self.exchange = exchange
        is_ok = exchange.status == 200
        is_events = is_ok and _header(exchange, b"content-type").lower().startswith(_EVENTS)
        self._gathers = gathers and is_events
        # The SDK copies all headers for each chunk of a stream, and reads none of them.
        headers = () if is_events else exchange.headers
        return _SdkResponse(exchange.status, headers=headers, stream=self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        held, self.held = self.held, None
        if held is not None:
            raise held
        chunk = await (self._all() if self._gathers else self._piece())
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def _all(self) -> bytes:
        self._gathers = False
        pieces: list[bytes] = []
        try:
            while piece := await self._piece():
                pieces.append(piece)
                if self._size_bytes > MOST_GATHERED_BYTES:
                    return b"".join(pieces)
        except (TidegateError, asyncio.CancelledError) as end:
            events = whole_events(b"".join(pieces))
            if not events:
                raise
            self.held = end
            return self._as_one(events)
        return self._as_one(b"".join(pieces))

    def _as_one(self, stream: bytes) -> bytes:
        event = gathered(stream)
        self.plain = event is not None
        return stream if event is None else event

    async def _piece(self) -> bytes:
        assert self.exchange is not None
        chunk = await self.exchange.next()
        if not chunk:
            return chunk
        self._size_bytes += len(chunk)
        max_bytes = self._client.max_answer_bytes
        if self._size_bytes > max_bytes:
            raise UpstreamGarbled(f"the provider's answer is larger than {max_bytes} bytes")
        tail = self.tail
        tail.append(chunk)
        self._tail_bytes += len(chunk)
        while self._tail_bytes - len(tail[0]) >= TAIL_BYTES:
            self._tail_bytes -= len(tail.popleft())
        return chunk

    async def aclose(self) -> None:
        self.whole = self.exchange is not None and self.exchange.close()
        self._client.open_exchanges.discard(self)


def _header(exchange: Exchange, name: bytes) -> bytes:
    """Return the value of a header in lower case; empty if it is missing. `name` is in lower
    case."""
    size = len(name)
    for known, value in exchange.headers:
        if len(known) == size and known.lower() == name:
            return value.lower()
    return b""


class _SdkResponse(httpx2.Response):
    """A response that is read directly from its exchange: httpx2 would put two generators in
    between."""

    stream: SdkExchange

    def aiter_bytes(self, chunk_size: int | None = None) -> SdkExchange:  # type: ignore[override]
        return self.stream


@cache
def tls_context() -> ssl.SSLContext:
    """Return the context of all clients of the process: loading certificates takes as long as
    creating the rest of a client."""
    context = httpx2.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


class SdkClient(httpx2.AsyncClient):
    """The SDK's HTTP/1.1 client of the provider. Its connections are not bounded: the limiter
    bounds the calls.

    It leaves out all that the SDK does not use (cookies, proxies, redirects, credentials, hooks),
    which would cost as much as sending a request. SSL_CERT_FILE and SSL_CERT_DIR are honoured.
    Connections are opened by the first request: the client may be built outside of the event loop.
    """

    def __init__(
        self,
        timeouts: Timeouts,
        max_answer_bytes: int,
        reached: tuple[str, Access],
        signers: Mapping[Authentication, Signer],
    ) -> None:
        """reached: the base URL that the SDK knows, and the access by which the upstream is
        reached."""
        super().__init__(transport=httpx2.MockTransport(_no_other_way), trust_env=False)
        self.max_answer_bytes = max_answer_bytes
        self.open_exchanges: set[SdkExchange] = set()
        self._timeouts = timeouts
        self._base, self._access = reached
        self._signers = signers
        self._wire: RelayWire | None = None

    def build_request(
        self,
        method: str,
        url: httpx2.URL | str,
        *,
        content: Any = None,
        headers: Any = None,
        timeout: Any = None,
        **other: Any,
    ) -> httpx2.Request:
        """Build a request. `content` is bytes or None. `timeout` is ignored: the transport has its
        own."""
        unknown = [name for name, value in other.items() if value]
        if unknown:
            raise TypeError(f"this client does not support what the SDK uses: {unknown}")
        return PlainRequest(method, str(url), headers or {}, content or None)

    async def send(
        self, request: httpx2.Request, *, stream: bool = False, **_other: Any
    ) -> httpx2.Response:
        assert isinstance(request, PlainRequest)
        call, scope = SdkExchange(self), _scope.get()
        if scope is not None:
            scope.exchanges.append(call)
        fields = request.fields
        if scope is not None and scope.traceparent is not None:
            fields = [*fields, (HEADER, scope.traceparent.encode())]
        try:
            wire = self._wire or await self._opened()
            place = self._place(wire, request.whole_url)
            body = request.body if scope is None else scope.with_files(request.body)
            exchange = await wire.open(request.method, place, fields, body)
        except BaseException:  # also for cancellation: the exchange must not stay open
            await call.aclose()
            raise
        response = call.answered(exchange, gathers=scope is not None and scope.gathers)
        response.request = request
        if request.is_upload:
            # Without this header the SDK repeats an upload three times, with sleeps.
            response.headers.setdefault("x-goog-upload-status", "unknown")
        if _header(exchange, b"content-encoding") not in (b"", b"identity"):
            await uninterrupted(call.aclose())
            raise UpstreamGarbled(
                "the provider compressed an answer that was requested uncompressed"
            )
        if not stream:
            await response.aread()
        return response

    async def aclose(self) -> None:
        await super().aclose()
        if self._wire is not None:
            await self._wire.aclose()

    async def _opened(self) -> RelayWire:
        self._wire = RelayWire(self._timeouts, tls_context())
        self._wire.signers = self._signers
        await self._wire.start()
        return self._wire

    def _place(self, wire: RelayWire, url: str) -> RequestPlace:
        """Return the place of a URL. A URL outside of the base URL gets no credentials of the
        upstream."""
        below = url.removeprefix(self._base)
        if below == url or not below.startswith("/"):
            return wire.place(url)
        path, _, query = below.partition("?")
        return wire.place(self._access.url(path, query), self._access)


class CallScope:
    """The exchanges of a call, and its total time.

    Leaving the scope closes its open exchanges, even if cancelled; raises UpstreamTimeout if the
    time has passed. gathers: the SDK gets all events of a stream as one. traceparent: sent with all
    requests. tier: the processing tier that they request.
    """

    def __init__(
        self,
        total_ms: int,
        *,
        gathers: bool = False,
        traceparent: str | None = None,
        tier: str = "",
    ) -> None:
        self.gathers = gathers
        self._tier = tier
        self.traceparent = traceparent
        self.exchanges: list[SdkExchange] = []
        self._total_ms = total_ms
        self._total = asyncio.timeout(total_ms / 1000)
        self._token: Token[CallScope | None] | None = None
        self._files: dict[bytes, bytes] = {}  # by the placeholder of each in a body

    def stand_in(self, media: Media) -> Media:
        """Return a short placeholder for a large file, which `with_files` replaces by the file: the
        SDK would copy the file five times in one step of the event loop."""
        if len(media.data) <= _WHOLE_BYTES:
            return media
        mark = token_hex(_MARK_BYTES).encode()  # random: no client can send it
        self._files[urlsafe_b64encode(mark)] = media.data
        return replace(media, data=mark)

    def with_files(self, body: bytes | None) -> bytes | RepeatableBody | None:
        """Return a body of the SDK with its placeholders replaced by the files."""
        if not self._files or body is None:
            return body
        spans: list[tuple[bytes, bytes]] = []  # the SDK's bytes, and the file that follows them
        size_bytes, rest = len(body), body
        for mark, data in self._files.items():
            before, found, behind = rest.partition(mark)
            if found:
                rest = behind
                spans.append((before, data))
                size_bytes += 4 * ((len(data) + 2) // 3) - len(mark)
        if not spans:  # for example an upload
            return body
        return RepeatableBody(size_bytes, partial(_in_base64, [*spans, (rest, b"")]))

    async def __aenter__(self) -> CallScope:
        await self._total.__aenter__()
        self._token = _scope.set(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._token is not None:
            _scope.reset(self._token)
        late: BaseException | None = None
        try:
            # A task is expensive, and an exchange that has ended is closed already.
            if not all(exchange.whole for exchange in self.exchanges):
                await uninterrupted(self._close())
                for exchange in self.exchanges:
                    if isinstance(exchange.held, asyncio.CancelledError):
                        raise exchange.held  # the SDK failed on the events before the cancellation
        except BaseException as failed:  # noqa: BLE001 -- raised below
            kind, error = type(failed), (late := failed)
        try:
            await self._total.__aexit__(kind, error, trace)
        except TimeoutError:
            raise out_of_time("total", self._total_ms) from None
        if late is not None:
            raise late

    async def _close(self) -> None:
        async with AsyncExitStack() as stack:
            for exchange in self.exchanges:
                stack.push_async_callback(exchange.aclose)

    @property
    def first_byte_ms(self) -> float | None:
        """Return the time from sending the last exchange's request to the first bytes of its
        body."""
        last = self.exchanges[-1].exchange if self.exchanges else None
        return None if last is None else last.first_byte_ms

    def error_of(self, failure: Exception, secret: str) -> UpstreamError:
        """Return the error for `failure`, which the SDK or its client raised in the last exchange.
        `secret` is the API key, which is removed from every message.

        Raise the error `from None`: texts of the SDK contain whole bodies of others, and possibly
        the URL of an upload.
        """
        exchange = self.exchanges[-1].exchange if self.exchanges else None
        if exchange is not None and exchange.status != 200:
            error = refusals.error_of_refusal_in(self._tail())
            headers = httpx2.Headers(exchange.headers)
            return refusals.upstream_error(
                exchange.status, error, headers, secret=secret, tier=self._tier, calls_model=True
            )
        if isinstance(failure, UpstreamTimeout):
            return failure
        if (error_in_answer := self.error_in_answer(secret)) is not None:
            return error_in_answer
        if isinstance(failure, UpstreamError):
            return failure
        return _without_error_body(failure, sent=bool(self.exchanges))

    def error_in_answer(self, secret: str) -> UpstreamError | None:
        """Return the error that the last answer reports under status 200; None if it reports
        none."""
        exchange = self.exchanges[-1].exchange if self.exchanges else None
        if exchange is None or (event := refusals.error_event_in(self._tail())) is None:
            return None
        return refusals.stream_error(
            event, exchange.headers, secret=secret, dialect=Dialect.GEMINI, tier=self._tier
        )

    @property
    def served_tier(self) -> str | None:
        """Return the processing tier of the last answer, which the SDK drops; None for the usual
        tier."""
        exchange = self.exchanges[-1].exchange if self.exchanges else None
        if exchange is None:
            return None
        if (tier := tier_in(exchange.headers)) is not None:
            return tier
        tail = self._tail()
        if _USUAL_TIERS.issuperset(_TIERS.findall(tail)):
            return None  # the usual case
        return tier_at_end(tail)

    def _tail(self) -> bytes:
        return b"".join(self.exchanges[-1].tail)[-TAIL_BYTES:]


def _without_error_body(failure: Exception, *, sent: bool) -> UpstreamError:
    name = type(failure).__name__
    if isinstance(failure, httpx2.ConnectTimeout):
        return UpstreamTimeout("connecting to the provider took too long", phase="connect")
    if isinstance(failure, httpx2.TimeoutException):
        return UpstreamTimeout("the provider was silent for too long", phase="idle")
    if isinstance(failure, httpx2.RemoteProtocolError):
        # One class for two failures, which its text distinguishes.
        if "disconnected" in str(failure) or "peer closed" in str(failure):
            return UpstreamUnavailable("the provider closed the connection in mid-answer")
        return UpstreamGarbled("the provider's answer is not HTTP")
    if isinstance(failure, httpx2.LocalProtocolError | httpx2.UnsupportedProtocol):
        return UpstreamRejected(f"the request could not be sent ({name})")
    if isinstance(failure, httpx2.ConnectError):
        return UpstreamUnavailable("could not connect to the provider", broke="connecting")
    if isinstance(failure, httpx2.TransportError | OSError):
        return UpstreamUnavailable(f"the connection to the provider broke ({name})")
    if not sent:
        return UpstreamRejected(f"the request could not be built ({name})", status=400)
    return UpstreamGarbled(f"the provider's answer violates its protocol ({name})")


def is_plain() -> bool:
    """Return whether the answer that the SDK is reading in this task is plain (see
    `SdkExchange`)."""
    scope = _scope.get()
    return scope is not None and bool(scope.exchanges) and scope.exchanges[-1].plain


def _no_other_way(_request: httpx2.Request) -> httpx2.Response:
    raise RuntimeError("every request goes over connections of our own")


async def uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Finish `work` even if the caller is cancelled meanwhile; then raise the cancellation."""
    task = asyncio.ensure_future(work)
    interrupted: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as cancelled:
            interrupted = cancelled
    if interrupted is not None:
        raise interrupted
    task.result()


# No name is in a light type. A C function, since the SDK tests sixty names for a call.
_in_none = frozenset[object]().__contains__


async def _in_base64(spans: Sequence[tuple[bytes, bytes]]) -> AsyncIterator[bytes]:
    """Yield the bytes of each span and its file in base64, in pieces."""
    for written, data in spans:
        yield written
        for start in range(0, len(data), _FILE_PIECE_BYTES):
            yield urlsafe_b64encode(data[start : start + _FILE_PIECE_BYTES])


skip_type_warnings()


class Settings(types.GenerateContentConfig):
    """Generation settings that are built once and used for any number of calls."""

    __slots__ = ("converted",)  # their form in a request; a copy has its own

    __contains__ = _in_none
    converted: ClassVar[tuple[dict[str, Any], dict[str, Any]]]

    @property
    def include_all_fields(self) -> bool:
        """The SDK reads this for each chunk, and otherwise removes unknown fields from the chunk:
        half of the cost of reading one, and useless if there can be none."""
        return is_plain()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return these settings unless `update` changes them, and then a shallow copy: the SDK
        requests three copies with every call, one of them deep."""
        if not update or all(getattr(self, name) is value for name, value in update.items()):
            return self
        return super().model_copy(update=update)


def convert_once(convert: Convert) -> Convert:
    """Return a conversion that keeps the result for `Settings`, which must not change after it.

    The SDK looks up each of some thirty fields for every call: a tenth of the cost of a call.
    """

    @wraps(convert)
    def converted(
        api_client: object,
        from_object: Any,
        parent_object: dict[str, Any] | None = None,
        root_object: object = None,
    ) -> dict[str, Any]:
        if type(from_object) is not Settings or parent_object is None:
            return convert(api_client, from_object, parent_object, root_object)
        if (known := getattr(from_object, "converted", None)) is None:
            beside: dict[str, Any] = {}  # what belongs beside the generation settings
            known = convert(api_client, from_object, beside, root_object), beside
            object.__setattr__(from_object, "converted", known)
        within, beside = known
        parent_object.update(beside)
        return dict(within)

    return converted


replace_conversion(convert_once)


class UserTurn(types.Content):
    __contains__ = _in_none


class Piece(types.Part):
    __contains__ = _in_none


# Copied: the constructor checks every field that exists, absent ones too.
_TURN = UserTurn(role="user", parts=[])
_PIECE = Piece(text="")


def turn_of(content: Mapping[str, Any]) -> UserTurn:
    """Return a user turn of the light types. Raises ValueError if the SDK's types reject it."""
    parts: Sequence[Mapping[str, Any]] = content["parts"]
    return _TURN.model_copy(update={"parts": [_piece_of(part) for part in parts]})


def _piece_of(part: Mapping[str, Any]) -> Piece:
    if part.keys() != {"text"}:
        return Piece(**part)
    part["text"].encode()  # raises for text that is not Unicode, as the constructor does
    return _PIECE.model_copy(update=part)
