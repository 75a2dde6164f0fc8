"""Client middleware for `aiohttp`: puts any SDK that uses it under the limiter.

    limit = LimitMiddleware(limiter, Demand(("kind:text_only",), deadline_ms=30_000))
    async with aiohttp.ClientSession(middlewares=(limit,)) as session:
        ...

Invariant: a permit is held until `aiohttp` lets go of the connection of its answer. Importing this
imports `aiohttp`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from weakref import ref

from aiohttp import (
    ClientConnectionError,
    ClientHandlerType,
    ClientPayloadError,
    ClientRequest,
    ClientResponse,
)

from tidegate.integrations.exchange import (
    Demanded,
    LimitedExchange,
    Penalised,
    Review,
    Usage,
    demand_of,
    penalised_by,
)

if TYPE_CHECKING:
    from tidegate.limiter import Limiter

OVERLOAD = (ClientConnectionError, ClientPayloadError, TimeoutError)
STREAMED = frozenset({"text/event-stream", "application/x-ndjson"})


class LimitMiddleware:
    """For `aiohttp.ClientSession(middlewares=(...,))`; the last of several, which sends.

    The `total` of aiohttp's timeout counts the wait for the permit too.
    """

    def __init__(
        self,
        limiter: Limiter,
        demand: Demanded[ClientRequest],
        *,
        usage: Usage | None = None,
        penalise: Penalised = None,
    ) -> None:
        """demand: what each request needs, or a function of the request; None is nothing.
        usage: reads from the body of a 2xx answer the tokens that it used. The middleware
            reads the body for it, unless it is streamed: then the usage is unknown.
        penalise: the limit that a 429 pauses in all processes, when it says for how long; or a
            function of the demand.
        """
        self._limiter = limiter
        self._demand = demand
        self._usage = usage
        self._penalise = penalise

    async def __call__(self, request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        """Raises what `Limiter.acquire` raises, before anything is sent; LeaseLost or
        UpstreamTimeout when the permit is lost or overdue while sending. Cancellation returns the
        permit."""
        demand = demand_of(self._demand, request)
        if demand is None:
            return await handler(request)
        exchange = LimitedExchange(
            self._limiter, demand, penalised_by(self._penalise, demand), OVERLOAD
        )
        await exchange.begin()
        try:
            async with exchange.using():
                response = await handler(request)
                exchange.answered(response.status, _closer(exchange, response))
            await self._watch(exchange, response)
        except BaseException as error:  # cancellation too: the permit is returned with the outcome
            await exchange.fail(error)
            raise
        return response

    async def _watch(self, exchange: LimitedExchange, response: ClientResponse) -> None:
        """Return the permit when the answer ends."""
        review = Review(
            response.status,
            response.headers,
            now=datetime.now(UTC),
            usage=None if response.content_type in STREAMED else self._usage,
            pauses=exchange.penalised is not None,
            decode=bytes,  # aiohttp has done it
        )
        if review.pause_ms is not None:
            await exchange.pause(review.pause_ms)
        if not review.wants_body:
            _when_let_go(exchange, response)
            return
        async with exchange.using():
            # Kept by the response: a later reader gets these bytes.
            review.take(await response.read())
        tokens = review.end()
        await exchange.complete(tokens)
        if review.pause_ms is not None:
            await exchange.pause(review.pause_ms)


def _closer(exchange: LimitedExchange, response: ClientResponse) -> Callable[[], Awaitable[None]]:
    seen = ref(response)  # a response that nobody has any more must be collected

    async def close() -> None:
        response = seen()
        if response is None or response.closed:
            return
        if exchange.failure is not None and response.content.exception() is None:
            response.content.set_exception(exchange.failure)
        response.close()

    return close


def _when_let_go(exchange: LimitedExchange, response: ClientResponse) -> None:
    seen = ref(response)

    def let_go() -> None:
        response = seen()
        exchange.closed(whole=response is not None and response.content.is_eof())

    if response.connection is None:
        let_go()
    else:
        # Called at the end of the body, by close, and when the response is collected.
        response.connection.add_callback(let_go)
