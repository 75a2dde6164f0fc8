"""Exchange of a request and its answer with an upstream under a permit, async and in threads.

The transports of `httpx` and of its fork `httpx2` are at the end. Neither is imported here: the
modules of those names set their classes.

Invariants: nothing is sent without a permit; the permit is released once, when the answer's body
has been read, closed or dropped; if the permit is lost or overdue, the reader is interrupted and
the answer closed before the permit is released (a thread notices at its next bytes). The usage of
an unreadable answer is unknown, never an error. An answer is read through a body of ours, so that
its end is seen.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

from tidegate.errors import (
    DemandImpossible,
    LimiterUnavailable,
    ShuttingDown,
    TidegateError,
    UpstreamTimeout,
)
from tidegate.limiter import (
    Demand,
    DetachedPermit,
    Limiter,
    Outcome,
    SyncLimiter,
    SyncPermit,
    ThreadPermit,
    Tokens,
    tokens_of,
)

# Reads the used tokens from the decoded body of a 2xx answer; None means unknown.
Usage = Callable[[bytes], int | Tokens | None]

THROTTLED = 429
# Statuses of an overloaded upstream. 529 is Anthropic's.
OVERLOADED = frozenset({THROTTLED, 503, 529})
MAX_PAUSE_MS = 86_400_000
# Bytes of a body that are kept to read its usage; that of a larger one is unknown.
MAX_KEPT_BYTES = 4_000_000
# google.rpc.RetryInfo in JSON: https://github.com/googleapis/googleapis, error_details.proto
_RETRY_INFO = re.compile(rb'"retryDelay"\s*:\s*"(\d{1,9}(?:\.\d{1,9})?)s"')


def outcome_of_status(status: int) -> Outcome:
    return "dropped" if status in OVERLOADED else "success"


def outcome_of_error(error: BaseException, overload: tuple[type[Exception], ...]) -> Outcome:
    """Return the outcome of a call that ended with `error`: `dropped` only for errors of
    overload."""
    return "dropped" if isinstance(error, (UpstreamTimeout, *overload)) else "ignored"


def retry_after_ms(headers: Mapping[str, str], now: datetime) -> int | None:
    """Return the wait that a 429 requests: `retry-after-ms`, or `retry-after` in seconds or as a
    date.

    Azure sends 0 milliseconds beside whole seconds, which count. A date is compared with the
    server's clock, as in its header Date, or with `now` without one. None if no wait is stated.
    """
    exact = _number(headers.get("retry-after-ms"))
    value = headers.get("retry-after")
    if exact or (exact is not None and not value):
        return _bounded(exact)
    seconds = _number(value)
    if seconds is not None:
        return _bounded(seconds * 1000)
    at = _date(value)
    if at is None:
        return None
    answered = _date(headers.get("date")) or now
    return _bounded((at - answered).total_seconds() * 1000)


def retry_info_ms(body: bytes) -> int | None:
    """Return the wait in the RetryInfo of an error's body of Google's APIs."""
    found = _RETRY_INFO.search(body)
    return None if found is None else _bounded(float(found[1]) * 1000)


def _number(text: str | None) -> float | None:
    if text is None or not re.fullmatch(r"\s*\d{1,9}(\.\d{1,9})?\s*", text):
        return None
    return float(text)


def _date(text: str | None) -> datetime | None:
    """Parse a date; None if it is invalid or has no zone."""
    try:
        at = parsedate_to_datetime(text or "")
    except (ValueError, OverflowError):
        return None
    return None if at.tzinfo is None else at


def _bounded(pause_ms: float) -> int | None:
    return None if pause_ms <= 0 else min(MAX_PAUSE_MS, -int(-pause_ms // 1))


class Review:
    """Reads an answer as it passes. Call `take` with every chunk, then `end`."""

    __slots__ = ("_chunks", "_decode", "_due_in_body", "_size_bytes", "_usage", "pause_ms")

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        *,
        now: datetime,
        usage: Usage | None,
        pauses: bool,
        decode: Callable[[bytes], bytes],
    ) -> None:
        """`decode` undoes the content encoding. `pauses`: a 429 pauses a limit."""
        throttled = pauses and status == THROTTLED
        self.pause_ms = retry_after_ms(headers, now) if throttled else None
        self._due_in_body = throttled and self.pause_ms is None
        self._usage = usage if 200 <= status < 300 else None
        self._decode = decode
        self._chunks: list[bytes] = []
        self._size_bytes = 0

    @property
    def wants_body(self) -> bool:
        return self._usage is not None or self._due_in_body

    def take(self, chunk: bytes) -> None:
        if not self.wants_body:
            return
        self._size_bytes += len(chunk)
        if self._size_bytes <= MAX_KEPT_BYTES:
            self._chunks.append(chunk)
        else:
            self._chunks.clear()

    def end(self) -> int | Tokens | None:
        """Return the tokens that the call used, after the end of the body; None if unknown.

        `pause_ms` is final from here on.
        """
        if self._size_bytes == 0 or self._size_bytes > MAX_KEPT_BYTES:
            return None
        content = b"".join(self._chunks)
        self._chunks.clear()
        try:
            body = self._decode(content)
            if self._due_in_body:
                self.pause_ms = retry_info_ms(body)
            tokens = None if self._usage is None else self._usage(body)
            if tokens is not None:
                tokens_of(tokens)  # raises for values that cannot be counted
            return tokens
        except Exception:
            # The answer is valid and paid for: neither a faulty reader of its usage nor a broken
            # content encoding, which possibly no other code undoes, must lose it.
            logger.exception("reading the usage of an answer failed: its reservation is kept")
            return None


logger = logging.getLogger("tidegate.integrations")


@dataclass(slots=True, eq=False, repr=False)
class LimitedExchange:
    """An exchange under a permit: call `begin`, send within `using`, call `answered`, read within
    `using`, and always end it by `complete`, `fail`, `abandon` or `closed`.

    penalised: the limit that `pause` pauses. overload: the client's errors that mean an overloaded
    upstream.
    """

    _limiter: Limiter
    _demand: Demand
    penalised: str | None
    _overload: tuple[type[Exception], ...]
    _hold: DetachedPermit = field(init=False)
    _scopes: set[asyncio.Timeout] = field(default_factory=set)
    _users: int = 0
    _unused: asyncio.Event = field(default_factory=asyncio.Event)
    _close: Callable[[], Awaitable[None]] | None = None
    _outcome: Outcome = "ignored"

    def __post_init__(self) -> None:
        limiter, demand = self._limiter, self._demand
        self._hold = DetachedPermit(
            lambda: limiter.acquire_for(demand), self._stop, hard_ms=demand.hard_ms
        )
        self._unused.set()

    def __repr__(self) -> str:
        return f"<LimitedExchange {self._demand.limits} {self._hold!r}>"

    async def begin(self) -> None:
        """Wait for the permit, immediately before sending. Raises the errors of `Limiter.acquire`,
        or LeaseLost; then nothing may be sent. Cancellation releases the ticket or the permit."""
        await self._hold.take()
        try:
            await self._hold.confirm()
        except BaseException:  # for cancellation too: nothing is sent, so the permit is released
            self._release("ignored", None)
            raise

    @asynccontextmanager
    async def using(self) -> AsyncIterator[None]:
        """Send or read within the block, in any task. If the permit is lost or overdue, the block
        is cancelled, and LeaseLost or UpstreamTimeout raised."""
        self._check()
        scope = asyncio.timeout(None)
        with self._user():
            try:
                async with scope:
                    self._scopes.add(scope)
                    try:
                        yield
                    finally:
                        self._scopes.discard(scope)
            except TimeoutError:
                if scope.expired():
                    self._check()
                raise

    @contextmanager
    def _user(self) -> Iterator[None]:
        """Count a user of the connection: `_stop` waits until none is left."""
        self._users += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    @property
    def failure(self) -> TidegateError | None:
        """Return why the permit is no longer valid; None while it is."""
        return self._hold.failure

    def _check(self) -> None:
        if self._hold.failure is not None:
            raise self._hold.failure

    def answered(self, status: int, close: Callable[[], Awaitable[None]]) -> None:
        """Note the beginning of the answer; `close` closes it, and may be called more than once."""
        self._outcome = outcome_of_status(status)
        self._close = close

    async def _stop(self) -> None:
        """Interrupt the users of the connection, then close the answer: the permit is lost, overdue
        or dropped.

        Runs in the task that holds the permit.
        """
        now = asyncio.get_running_loop().time()
        for scope in self._scopes:
            scope.reschedule(now)
        # An interrupted user may be closing the answer already.
        while self._users:
            await self._unused.wait()
        if self._close is not None:
            await self._close()

    async def complete(self, tokens: int | Tokens | None) -> None:
        """End the exchange after the whole answer was read; `tokens` is its usage, None if unknown.

        Raises LeaseLost if the permit was lost meanwhile.
        """
        await self._end(self._outcome, tokens)
        self._check()

    async def fail(self, error: BaseException) -> None:
        """End the exchange after sending or reading failed with `error`."""
        await self._end(outcome_of_error(error, self._overload), None)

    async def abandon(self) -> None:
        """End the exchange without reading the rest of the answer. Does nothing after `complete` or
        `fail`."""
        await self._end(self._outcome_of(whole=False), None)

    def closed(self, *, whole: bool) -> None:
        """Release the permit after other code has closed the answer. Only the first call has an
        effect.

        whole: the answer was read to its end.
        """
        self._release(self._outcome_of(whole=whole), None)

    def _outcome_of(self, *, whole: bool) -> Outcome:
        return self._outcome if whole or self._outcome != "success" else "ignored"

    async def _end(self, outcome: Outcome, tokens: int | Tokens | None) -> None:
        close, self._close = self._close, None
        try:
            if close is not None:
                with self._user():
                    await close()
        finally:
            self._release(outcome, tokens)
        await self._hold.ended()

    def _release(self, outcome: Outcome, tokens: int | Tokens | None) -> None:
        if not self._hold.released:
            if self._hold.permit is not None:
                self._hold.permit.settle(outcome, tokens=tokens)
            self._hold.release()

    def drop(self) -> bool:
        """Close an answer that was garbage-collected and release the permit, soon.

        Return True if it was still open. May be called in any thread.
        """
        return self._hold.drop()

    async def pause(self, for_ms: int) -> None:
        """Pause a limit in all processes, for the time that the upstream's 429 stated."""
        if self.penalised is None:
            return
        try:
            await self._limiter.penalise(self.penalised, for_ms=for_ms, reason="429", by="upstream")
        except (LimiterUnavailable, DemandImpossible) as error:
            # The answer is still returned, and the next 429 tries again.
            logger.warning("a 429 could not pause %s: %s", self.penalised, error)


@dataclass(slots=True, eq=False, repr=False)
class SyncExchange:
    """`LimitedExchange` for threads."""

    _limiter: SyncLimiter
    _demand: Demand
    penalised: str | None
    _overload: tuple[type[Exception], ...]
    _held: ThreadPermit = field(init=False)
    _permit: SyncPermit | None = None
    # Held to send, read or close; a thread of the limiter only tries to take it.
    _in_use: threading.RLock = field(default_factory=threading.RLock)
    _open: bool = True
    _close: Callable[[], None] | None = None
    _outcome: Outcome = "ignored"

    def __post_init__(self) -> None:
        self._held = self._limiter.hold(self._demand, self._close_unused)

    def __repr__(self) -> str:
        return f"<SyncExchange {self._demand.limits} open={self._open}>"

    def begin(self) -> None:
        """Wait for the permit, immediately before sending. Raises the errors of
        `SyncLimiter.acquire`, or LeaseLost; then nothing may be sent. An interrupt releases the
        ticket or the permit."""
        self._permit = self._held.enter()
        assert self._permit is not None
        try:
            self._permit.confirm()
        except BaseException:  # for an interrupt too: nothing is sent, so the permit is released
            self._shut("ignored", None)
            raise

    @contextmanager
    def using(self) -> Iterator[None]:
        """Send or read within the block. Raises LeaseLost or UpstreamTimeout before and after it if
        the permit is lost or overdue."""
        with self._in_use:
            self._check()
            yield
            self._check()

    def _check(self) -> None:
        if self._held.failure is not None:
            raise self._held.failure

    def answered(self, status: int, close: Callable[[], None]) -> None:
        """Note the beginning of the answer; `close` closes it."""
        self._outcome = outcome_of_status(status)
        self._close = close

    def _close_unused(self) -> None:
        """Close the answer, unless it is in use: the permit is lost, overdue or dropped. In another
        thread."""
        if self._in_use.acquire(blocking=False):
            try:
                self._shut("ignored", None)
            finally:
                self._in_use.release()

    def complete(self, tokens: int | Tokens | None) -> None:
        """End the exchange after the whole answer was read. Raises LeaseLost if the permit was lost
        meanwhile."""
        self._shut(self._outcome, tokens)
        self._held.leave()

    def fail(self, error: BaseException) -> None:
        """End the exchange after sending or reading failed with `error`."""
        self._shut(outcome_of_error(error, self._overload), None)

    def abandon(self) -> None:
        """End the exchange without reading the rest of the answer. Does nothing after `complete` or
        `fail`."""
        self._shut("ignored" if self._outcome == "success" else self._outcome, None)

    def drop(self) -> bool:
        """Close an answer that was garbage-collected and release the permit, soon.

        Return True if it was still open. May be called in any thread.
        """
        return self._open and self._held.drop()

    def pause(self, for_ms: int) -> None:
        """Pause a limit in all processes, for the time that the upstream's 429 stated."""
        if self.penalised is None:
            return
        try:
            self._limiter.penalise(self.penalised, for_ms=for_ms, reason="429", by="upstream")
        except (LimiterUnavailable, DemandImpossible, ShuttingDown) as error:
            # The answer is still returned, and the next 429 tries again.
            logger.warning("a 429 could not pause %s: %s", self.penalised, error)

    def _shut(self, outcome: Outcome, tokens: int | Tokens | None) -> None:
        with self._in_use:
            if not self._open:
                return
            self._open = False
            try:
                if self._close is not None:
                    self._close()
            finally:
                if self._permit is not None:
                    self._permit.settle(outcome, tokens=tokens)
                self._held.release()


RequestT = TypeVar("RequestT")

# The demand of every request, or a function of the request; None needs no permit.
Demanded = Demand | Callable[[RequestT], Demand | None]
# The limit that a 429 pauses, or a function of the demand; None pauses nothing.
Penalised = str | Callable[[Demand], str | None] | None


def demand_of(demanded: Demanded[RequestT], request: RequestT) -> Demand | None:
    """Return the demand of `request`. Raises TypeError for anything else, and for limits that are
    one string."""
    demand = demanded(request) if callable(demanded) else demanded
    if demand is not None or not callable(demanded):
        _check_demand(demand)
    return demand


def _check_demand(demand: object) -> None:
    if not isinstance(demand, Demand):
        raise TypeError(f"a demand is a Demand, such as Demand(('openai',)), not {demand!r}")
    if not isinstance(cast(object, demand.limits), tuple):
        raise TypeError(f"limits are a tuple: ({demand.limits!r},)")


def penalised_by(penalised: Penalised, demand: Demand) -> str | None:
    """Return the limit to pause after a 429 to a call of `demand`."""
    return penalised(demand) if callable(penalised) else penalised


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


ResponseT = TypeVar("ResponseT", bound=AnyResponse)
InnerT = TypeVar("InnerT")
LimiterT = TypeVar("LimiterT", Limiter, SyncLimiter)


class AsyncBody:
    """An answer's bytes; the permit is released at their end, and when the body is closed."""

    def __init__(self, exchange: LimitedExchange, chunks: Any, review: Review) -> None:
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
                # For cancellation too: the permit is released with the outcome.
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
    """`AsyncBody` for threads."""

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
                # For an interrupt too: the permit is released with the outcome.
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


class _Transport(Generic[RequestT, ResponseT, InnerT, LimiterT]):
    """Common part of both transports; the attributes that begin with an underscore are the
    library's."""

    _overload: ClassVar[tuple[type[Exception], ...]]
    _response: ClassVar[Callable[..., Any]]
    _body: ClassVar[Callable[..., Any]]
    _sender: ClassVar[Callable[..., Any]]
    # The limiter bounds the calls: with a bounded pool, permits would be held by waiting calls.
    _unbounded: ClassVar[Any]

    def __init__(
        self,
        limiter: LimiterT,
        demand: Demanded[RequestT],
        *,
        inner: InnerT | None = None,
        usage: Usage | None = None,
        penalise: Penalised = None,
    ) -> None:
        """limiter: a `Limiter`, or a `SyncLimiter` for a transport of threads.
        demand: of each request, or a function of the request; None needs no permit.
        inner: the transport that sends; by default the library's own, without a bound on its
            connections. Certificates, proxies and HTTP/2 are options of it.
        usage: reads the used tokens from the decoded body of a 2xx answer.
        penalise: the limit that a 429 with a stated wait pauses in all processes; or a function
            of the demand.
        """
        self._limiter: LimiterT = limiter
        self._demand = demand
        self._inner: Any = inner or type(self)._sender(limits=self._unbounded)
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


class AsyncTransport(_Transport[RequestT, ResponseT, InnerT, Limiter]):
    """Admits each request by its demand, and sends it through `inner`."""

    async def handle_async_request(self, request: RequestT) -> ResponseT:
        """Admit and send a request. Raises the errors of `Limiter.acquire` before anything is sent;
        LeaseLost or UpstreamTimeout if the permit is lost or overdue while sending. Cancellation
        releases the permit."""
        response: ResponseT
        demand = demand_of(self._demand, request)
        if demand is None:
            response = await self._inner.handle_async_request(request)
            return response
        penalised = penalised_by(self._penalise, demand)
        exchange = LimitedExchange(self._limiter, demand, penalised, self._overload)
        await exchange.begin()
        try:
            async with exchange.using():
                response = await self._inner.handle_async_request(request)
                exchange.answered(response.status_code, response.stream.aclose)
            review = self._review(response, penalised is not None)
            if review.pause_ms is not None:
                await exchange.pause(review.pause_ms)
            return self._handed_on(response, exchange, review)
        except BaseException as error:  # cancellation too: the permit is released with the outcome
            await exchange.fail(error)
            raise

    async def aclose(self) -> None:
        """Close the inner transport. The limiter stays open."""
        await self._inner.aclose()


class SyncTransport(_Transport[RequestT, ResponseT, InnerT, SyncLimiter]):
    """`AsyncTransport` for threads."""

    def handle_request(self, request: RequestT) -> ResponseT:
        """Admit and send a request. Raises the errors of `SyncLimiter.acquire` before anything is
        sent; LeaseLost or UpstreamTimeout, as soon as `inner` returns, if the permit is lost or
        overdue."""
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
        except BaseException as error:  # an interrupt too: the permit is released with the outcome
            exchange.fail(error)
            raise

    def close(self) -> None:
        """Close the inner transport. The limiter stays open."""
        self._inner.close()
