"""Common parts of the transports for `httpx` and its fork `httpx2`.

Neither is imported here: `httpx.py` and `httpx2.py` name the classes of theirs. Invariant: the
answer that is handed on is read through a body of ours, so that its end is seen.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from tidegate.integrations.exchange import (
    Demanded,
    Exchange,
    Penalised,
    Review,
    SyncExchange,
    Usage,
    demand_of,
    penalised_by,
)

if TYPE_CHECKING:
    from tidegate.limiter import Limiter, SyncLimiter

UNCLOSED = "an answer was neither read to its end nor closed"


class AnyResponse(Protocol):
    """The parts of a response that are used here."""

    @property
    def status_code(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def stream(self) -> Any: ...
    @property
    def extensions(self) -> Any: ...


RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT", bound=AnyResponse)


class AsyncBody:
    """An answer's bytes; the permit is released at their end, and when it is closed."""

    def __init__(self, exchange: Exchange, chunks: Any, review: Review) -> None:
        self._exchange = exchange
        self._inner = chunks
        self._review = review

    async def __aiter__(self) -> AsyncIterator[bytes]:
        exchange, review = self._exchange, self._review
        chunks = aiter(self._inner)
        while True:
            try:
                async with exchange.using():
                    chunk = await anext(chunks, None)
            except BaseException as error:
                await exchange.fail(error)
                raise
            if chunk is None:
                break
            review.take(chunk)
            yield chunk
        paused, tokens = review.pause_ms, review.end()
        await exchange.complete(tokens)
        if paused is None and review.pause_ms is not None:
            await exchange.pause(review.pause_ms)

    async def aclose(self) -> None:
        await self._exchange.abandon()

    def __del__(self) -> None:
        if self._exchange.drop():
            warnings.warn(UNCLOSED, ResourceWarning, stacklevel=2)


class SyncBody:
    """As `AsyncBody`, for a thread."""

    def __init__(self, exchange: SyncExchange, chunks: Any, review: Review) -> None:
        self._exchange = exchange
        self._inner = chunks
        self._review = review

    def __iter__(self) -> Iterator[bytes]:
        exchange, review = self._exchange, self._review
        chunks = iter(self._inner)
        while True:
            try:
                with exchange.using():
                    chunk = next(chunks, None)
            except BaseException as error:
                exchange.fail(error)
                raise
            if chunk is None:
                break
            review.take(chunk)
            yield chunk
        paused, tokens = review.pause_ms, review.end()
        exchange.complete(tokens)
        if paused is None and review.pause_ms is not None:
            exchange.pause(review.pause_ms)

    def close(self) -> None:
        self._exchange.abandon()

    def __del__(self) -> None:
        if self._exchange.drop():
            warnings.warn(UNCLOSED, ResourceWarning, stacklevel=2)


class _Transport(Generic[RequestT, ResponseT]):
    """What both transports know. `_response`, `_body` and `_overload` are the library's."""

    _overload: ClassVar[tuple[type[Exception], ...]]
    _response: ClassVar[Callable[..., Any]]
    _body: ClassVar[Callable[..., Any]]

    def __init__(
        self, demand: Demanded[RequestT], inner: Any, usage: Usage | None, penalise: Penalised
    ) -> None:
        self._demand = demand
        self._inner = inner
        self._usage = usage
        self._penalise = penalise

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self._inner!r}>"

    def _review(self, response: ResponseT, pauses: bool) -> Review:
        make, headers, status = type(self)._response, response.headers, response.status_code

        def decode(raw: bytes) -> bytes:
            content: bytes = make(status, headers=headers, content=raw).content
            return content

        return Review(
            status,
            headers,
            now=datetime.now(UTC),
            usage=self._usage,
            pauses=pauses,
            decode=decode,
        )

    def _handed_on(self, response: ResponseT, exchange: Any, review: Review) -> ResponseT:
        body = type(self)._body(exchange, response.stream, review)
        made: ResponseT = type(self)._response(
            response.status_code,
            headers=response.headers,
            stream=body,
            extensions=response.extensions,
        )
        return made


class AsyncTransport(_Transport[RequestT, ResponseT]):
    """Lets each request in by what `demand` says, and sends it through `inner`."""

    _limiter: Limiter

    async def handle_async_request(self, request: RequestT) -> ResponseT:
        """Raises what `Limiter.acquire` raises, before anything is sent; LeaseLost or
        UpstreamTimeout when the permit is lost or overdue while sending. Cancellation gives the
        permit back."""
        response: ResponseT
        demand = demand_of(self._demand, request)
        if demand is None:
            response = await self._inner.handle_async_request(request)
            return response
        penalised = penalised_by(self._penalise, demand)
        exchange = Exchange(self._limiter, demand, penalised, self._overload)
        await exchange.begin()
        try:
            async with exchange.using():
                response = await self._inner.handle_async_request(request)
                exchange.answered(response.status_code, response.stream.aclose)
            review = self._review(response, penalised is not None)
            if review.pause_ms is not None:
                await exchange.pause(review.pause_ms)
            return self._handed_on(response, exchange, review)
        except BaseException as error:
            await exchange.fail(error)
            raise

    async def aclose(self) -> None:
        """Close the inner transport. The limiter stays open."""
        await self._inner.aclose()


class SyncTransport(_Transport[RequestT, ResponseT]):
    """As `AsyncTransport`, for threads."""

    _limiter: SyncLimiter

    def handle_request(self, request: RequestT) -> ResponseT:
        """Raises what `SyncLimiter.acquire` raises before anything is sent; LeaseLost or
        UpstreamTimeout, as soon as `inner` returns, when the permit is lost or overdue."""
        response: ResponseT
        demand = demand_of(self._demand, request)
        if demand is None:
            response = self._inner.handle_request(request)
            return response
        penalised = penalised_by(self._penalise, demand)
        exchange = SyncExchange(self._limiter, demand, penalised, self._overload)
        exchange.begin()
        try:
            with exchange.using():
                response = self._inner.handle_request(request)
                exchange.answered(response.status_code, response.stream.close)
            review = self._review(response, penalised is not None)
            if review.pause_ms is not None:
                exchange.pause(review.pause_ms)
            return self._handed_on(response, exchange, review)
        except BaseException as error:
            exchange.fail(error)
            raise

    def close(self) -> None:
        """Close the inner transport. The limiter stays open."""
        self._inner.close()
