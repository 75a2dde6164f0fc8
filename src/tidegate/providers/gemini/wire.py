"""The HTTP client that we give to the SDK.

Owns the upstream connections. Invariants: every exchange (request sent, response not yet closed)
is in `open_exchanges`; leaving a `Scope` returns only after all its exchanges are closed, whatever
cancels it; time runs against a phase only while we wait for the provider; an answer is bounded.
Importing this file costs 0.2 s (httpx2): only `GeminiProcessor.start` does, in a thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Self

import httpx2

from tidegate.errors import UpstreamGarbled
from tidegate.providers.gemini.carrier import Asked, Carried, Carrier
from tidegate.providers.gemini.faults import Wreck
from tidegate.providers.gemini.gathering import gathered, whole_events
from tidegate.providers.gemini.timeouts import Timeouts, out_of_time

TAIL_BYTES = 65_536
# A longer answer goes to the SDK as it comes.
MOST_GATHERED_BYTES = 1_000_000

_scope: ContextVar[Scope | None] = ContextVar("tidegate_gemini_scope", default=None)


class Exchange:
    """One request and its response: what is known of it, and how to close it.

    It is `whole` once it is closed after the end of its answer: its connection is kept. `held` is
    what ended its answer, while what came before that is still being read. It is `plain` where all
    of its answer is one event that holds no field which the SDK does not know.
    """

    __slots__ = ("_body", "_carried", "_wire", "held", "plain", "tail", "whole")

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._body: _Body | None = None
        self._carried: Carried | None = None
        self.tail: deque[bytes] = deque()
        self.whole = False
        self.held: BaseException | None = None
        self.plain = False
        wire.open_exchanges.add(self)

    def answered(self, carried: Carried, *, gathers: bool) -> _Answer:
        self._carried = carried
        self._body = _Body(self, carried, self._wire, gathers and carried.is_events)
        # The SDK copies all headers for each chunk of a stream, and reads none of them.
        shown = () if carried.is_events else carried.raw_headers
        return _Answer(carried.status, headers=shown, stream=self._body)

    def wreck(self) -> Wreck:
        carried = self._carried
        tail = b"".join(self.tail)[-TAIL_BYTES:]
        if carried is None:
            return Wreck(None, {}, tail)
        return Wreck(carried.status, httpx2.Headers(carried.raw_headers), tail)

    @property
    def first_byte_ms(self) -> float | None:
        """See `Carried`."""
        return None if self._carried is None else self._carried.first_byte_ms

    async def aclose(self) -> None:
        if self._body is not None:
            await self._body.aclose()

    def closed(self, *, whole: bool = False) -> None:
        self.whole = whole
        if whole:
            self._body = None  # a cycle would wait for the collector
        self._wire.open_exchanges.discard(self)


class _Body(httpx2.AsyncByteStream):
    """A response's bytes, with a bound on all. Where it `gathers`, a stream's events come as one;
    and what cuts them off, a cancellation too, comes out of the read after that one.
    """

    def __init__(self, exchange: Exchange, carried: Carried, wire: Wire, gathers: bool) -> None:
        self._gathers = gathers
        self._exchange = exchange
        self._carried = carried
        self._wire = wire
        self._size_bytes = 0
        self._tail_bytes = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        held, self._exchange.held = self._exchange.held, None
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
        except (Exception, asyncio.CancelledError) as end:
            came = whole_events(b"".join(pieces))
            if not came:
                raise
            self._exchange.held = end
            return self._as_one(came)
        return self._as_one(b"".join(pieces))

    def _as_one(self, stream: bytes) -> bytes:
        event = gathered(stream)
        self._exchange.plain = event is not None
        return stream if event is None else event

    async def _piece(self) -> bytes:
        chunk: bytes = await self._carried.next()
        if not chunk:
            return chunk
        self._size_bytes += len(chunk)
        if self._size_bytes > self._wire.max_answer_bytes:
            raise UpstreamGarbled(
                f"the provider's answer is larger than {self._wire.max_answer_bytes} bytes"
            )
        tail = self._exchange.tail
        tail.append(chunk)
        self._tail_bytes += len(chunk)
        while self._tail_bytes - len(tail[0]) >= TAIL_BYTES:
            self._tail_bytes -= len(tail.popleft())
        return chunk

    async def aclose(self) -> None:
        self._exchange.closed(whole=self._carried.close())


class _Answer(httpx2.Response):
    """Read straight from its body: httpx2 would put two generators in between."""

    stream: _Body

    def aiter_bytes(self, chunk_size: int | None = None) -> _Body:  # type: ignore[override]
        return self.stream


class Wire(httpx2.AsyncClient):
    """HTTP/1.1 to the provider. Not bounded in connections: the limiter bounds the calls.

    Of what a client of httpx2 does it leaves out all that the SDK has no use for (cookies, proxies,
    redirects, credentials, hooks), which costs as much as sending a request.
    """

    def __init__(self, timeouts: Timeouts, max_answer_bytes: int) -> None:
        super().__init__(transport=httpx2.MockTransport(_no_other_way), trust_env=False)
        self.max_answer_bytes = max_answer_bytes
        self.open_exchanges: set[Exchange] = set()
        self._carrier = Carrier(timeouts)

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
        """`content` is bytes or None. The time is ours: `timeout` is not looked at."""
        unknown = [name for name, value in other.items() if value]
        if unknown:
            raise TypeError(f"the SDK asks for what this client does not do: {unknown}")
        return Asked(method, str(url), headers or {}, content or None)

    async def send(
        self, request: httpx2.Request, *, stream: bool = False, **_other: Any
    ) -> httpx2.Response:
        assert isinstance(request, Asked)
        exchange = Exchange(self)
        scope = _scope.get()
        if scope is not None:
            scope.exchanges.append(exchange)
        try:
            traceparent = None if scope is None else scope.traceparent
            carried = await self._carrier.send(request, traceparent)
        except BaseException:
            exchange.closed()
            raise
        gathers = scope is not None and scope.gathers
        response = exchange.answered(carried, gathers=gathers)
        response.request = request
        if request.is_upload:
            # Without this header the SDK repeats an upload three times, sleeping in between.
            response.headers.setdefault("x-goog-upload-status", "unknown")
        if carried.field(b"content-encoding") not in (b"", b"identity"):
            await uninterrupted(exchange.aclose())
            raise UpstreamGarbled("the provider compressed an answer that we asked for plain")
        if not stream:
            await response.aread()
        return response

    async def aclose(self) -> None:
        await super().aclose()
        await self._carrier.aclose()


class Scope:
    """The exchanges of one call, and its total time. Leaving it closes what is still open, even
    when cancelled; raises UpstreamTimeout when the time has run out. Where it `gathers`, the SDK
    gets the events of a stream as one. `traceparent` goes with all its requests.
    """

    def __init__(
        self, total_ms: int, *, gathers: bool = False, traceparent: str | None = None
    ) -> None:
        self.gathers = gathers
        self.traceparent = traceparent
        self.exchanges: list[Exchange] = []
        self._total_ms = total_ms
        self._total = asyncio.timeout(total_ms / 1000)
        self._token: Token[Scope | None] | None = None

    async def __aenter__(self) -> Scope:
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
            # A task is dear; and what has ended well needs no closing.
            if not all(exchange.whole for exchange in self.exchanges):
                await uninterrupted(self._close())
                for exchange in self.exchanges:
                    if isinstance(exchange.held, asyncio.CancelledError):
                        raise exchange.held  # the SDK failed on what had come before it
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
        """Of the last exchange: from its sending to the first bytes of its answer's body."""
        return self.exchanges[-1].first_byte_ms if self.exchanges else None

    def wreck(self) -> Wreck | None:
        """What is known of the last exchange; None when nothing was sent."""
        return self.exchanges[-1].wreck() if self.exchanges else None


def is_plain() -> bool:
    """Of the answer that the SDK is reading in this task."""
    scope = _scope.get()
    return scope is not None and bool(scope.exchanges) and scope.exchanges[-1].plain


def _no_other_way(_request: httpx2.Request) -> httpx2.Response:
    raise RuntimeError("every request goes through the carrier")


async def uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Finish `work` even if the caller is cancelled meanwhile, then let the cancellation go on."""
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
