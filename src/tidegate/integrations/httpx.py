"""Transports for `httpx`: put any SDK that uses it under the limiter.

    transport = AsyncLimitedTransport(limiter, Demand(("kind:text_only",)))
    async with httpx.AsyncClient(transport=transport) as client:
        ...

Invariant: see `transport.py`. Importing this imports `httpx`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from tidegate.integrations.exchange import Demanded, Penalised, Usage
from tidegate.integrations.transport import AsyncBody, AsyncTransport, SyncBody, SyncTransport

if TYPE_CHECKING:
    from tidegate.limiter import Limiter, SyncLimiter

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
        penalise: Penalised = None,
    ) -> None:
        """demand: what each request needs, or a function of the request; None is nothing.
        inner: what sends; by default an `AsyncHTTPTransport` without a bound on its connections.
            Certificates, proxies and HTTP/2 are options of it.
        usage: reads from the decoded body of a 2xx answer the LLM tokens that it used.
        penalise: the limit that a 429 pauses in all processes, when it says for how long; or a
            function of the demand.
        """
        sender = inner or httpx.AsyncHTTPTransport(limits=UNBOUNDED)
        super().__init__(demand, sender, usage, penalise)
        self._limiter = limiter


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
        penalise: Penalised = None,
    ) -> None:
        """As `AsyncLimitedTransport`; by default it sends through an `HTTPTransport`."""
        sender = inner or httpx.HTTPTransport(limits=UNBOUNDED)
        super().__init__(demand, sender, usage, penalise)
        self._limiter = limiter
