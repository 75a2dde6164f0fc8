"""Client middleware for `aiohttp`: puts any SDK that uses it under the limiter.

    limit = LimitMiddleware(limiter, Demand(("kind:text_only",), deadline_ms=30_000))
    async with aiohttp.ClientSession(middlewares=(limit,)) as session:
        ...

Invariant: a permit is held until `aiohttp` releases the connection of its answer. Importing this
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
    """Middleware for `aiohttp.ClientSession(middlewares=(...,))`; it must be the last one, which
    sends.

    The `total` of aiohttp's timeout includes the wait for the permit.
    """

    def __init__(
        self,
        limiter: Limiter,
        demand: Demanded[ClientRequest],
        *,
        usage: Usage | None = None,
        penalise: Penalised = None,
    ) -> None:
        """demand: of each request, or a function of the request; None needs no permit.
        usage: reads the used tokens from the body of a 2xx answer. The middleware reads the body
            for it, unless it is streamed: then the usage is unknown.
        penalise: the limit that a 429 with a stated wait pauses in all processes; or a function
            of the demand.
        """
        self._limiter = limiter
        self._demand = demand
        self._usage = usage
        self._penalise = penalise

    async def __call__(self, request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        """Admit and send a request. Raises the errors of `Limiter.acquire` before anything is sent;
        LeaseLost or UpstreamTimeout if the permit is lost or overdue while sending. Cancellation
        releases the permit."""
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
        except BaseException as error:  # cancellation too: the permit is released with the outcome
            await exchange.fail(error)
            raise
        return response

    async def _watch(self, exchange: LimitedExchange, response: ClientResponse) -> None:
        """Release the permit when the answer ends."""
        review = Review(
            response.status,
            response.headers,
            now=datetime.now(UTC),
            usage=None if response.content_type in STREAMED else self._usage,
            pauses=exchange.penalised is not None,
            decode=bytes,  # aiohttp has decoded it
        )
        if review.pause_ms is not None:
            await exchange.pause(review.pause_ms)
        if not review.wants_body:
            _when_let_go(exchange, response)
            return
        async with exchange.using():
            # The response keeps them: a later reader gets these bytes.
            review.take(await response.read())
        tokens = review.end()
        await exchange.complete(tokens)
        if review.pause_ms is not None:
            await exchange.pause(review.pause_ms)


def _closer(exchange: LimitedExchange, response: ClientResponse) -> Callable[[], Awaitable[None]]:
    weak = ref(response)  # a weak reference, so that an unused response is collected

    async def close() -> None:
        response = weak()
        if response is None or response.closed:
            return
        if exchange.failure is not None and response.content.exception() is None:
            response.content.set_exception(exchange.failure)
        response.close()

    return close


def _when_let_go(exchange: LimitedExchange, response: ClientResponse) -> None:
    weak = ref(response)

    def let_go() -> None:
        response = weak()
        exchange.closed(whole=response is not None and response.content.is_eof())

    if response.connection is None:
        let_go()
    else:
        # Called at the end of the body, by close, and when the response is collected.
        response.connection.add_callback(let_go)
