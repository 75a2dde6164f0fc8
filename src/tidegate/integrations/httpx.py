"""Transports of `httpx` that put any SDK which uses it under the limiter.

    transport = AsyncLimitedTransport(limiter, Demand("kind:text_only", deadline_ms=30_000))
    async with httpx.AsyncClient(transport=transport) as client:
        ...

Invariant: see `transport.py`. Importing this imports `httpx`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from tidegate.integrations.answer import Usage
from tidegate.integrations.demand import Demanded
from tidegate.integrations.transport import AsyncBody, AsyncTransport, SyncBody, SyncTransport

if TYPE_CHECKING:
    from tidegate.limiter import Limiter
    from tidegate.limiter.threads import SyncLimiter

# The limiter bounds the calls: a pool that bounds them too would let permits wait in vain.
UNBOUNDED = httpx.Limits(max_connections=None, max_keepalive_connections=100)

OVERLOAD = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)


class _AsyncBody(AsyncBody, httpx.AsyncByteStream):
    pass


class _SyncBody(SyncBody, httpx.SyncByteStream):
    pass


class AsyncLimitedTransport(
    AsyncTransport[httpx.Request, httpx.Response], httpx.AsyncBaseTransport
):
    """For `httpx.AsyncClient(transport=...)`."""

    _overload = OVERLOAD
    _response = httpx.Response
    _body = _AsyncBody

    def __init__(
        self,
        limiter: Limiter,
        demand: Demanded[httpx.Request],
        *,
        inner: httpx.AsyncBaseTransport | None = None,
        usage: Usage | None = None,
    ) -> None:
        """demand: what each request needs, or a function of the request; None is nothing.
        inner: what sends; by default an `AsyncHTTPTransport` without a bound on its connections.
            Certificates, proxies and HTTP/2 are options of it.
        usage: reads from the decoded body of a 2xx answer the LLM tokens that it used.
        """
        super().__init__(
            limiter, demand, inner or httpx.AsyncHTTPTransport(limits=UNBOUNDED), usage
        )


class LimitedTransport(SyncTransport[httpx.Request, httpx.Response], httpx.BaseTransport):
    """For `httpx.Client(transport=...)`, over the limiter for threads."""

    _overload = OVERLOAD
    _response = httpx.Response
    _body = _SyncBody

    def __init__(
        self,
        limiter: SyncLimiter,
        demand: Demanded[httpx.Request],
        *,
        inner: httpx.BaseTransport | None = None,
        usage: Usage | None = None,
    ) -> None:
        """As `AsyncLimitedTransport`; by default it sends through an `HTTPTransport`."""
        super().__init__(limiter, demand, inner or httpx.HTTPTransport(limits=UNBOUNDED), usage)
