"""Transports for `httpx2`: put any SDK that uses it under the limiter.

    transport = AsyncLimitedTransport(limiter, Demand(("kind:text_only",)))
    async with httpx2.AsyncClient(transport=transport) as client:
        ...

Invariant: see `exchange.py`. Importing this imports `httpx2`.
"""

import httpx2

from tidegate.integrations.exchange import AsyncBody, AsyncTransport, SyncBody, SyncTransport

UNBOUNDED = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
OVERLOAD = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)


class _AsyncBody(AsyncBody, httpx2.AsyncByteStream):
    pass


class _SyncBody(SyncBody, httpx2.SyncByteStream):
    pass


class AsyncLimitedTransport(
    AsyncTransport[httpx2.Request, httpx2.Response, httpx2.AsyncBaseTransport],
    httpx2.AsyncBaseTransport,
):
    """For `httpx2.AsyncClient(transport=...)`, over a `Limiter`."""

    _overload, _unbounded = OVERLOAD, UNBOUNDED
    _response, _body, _sender = httpx2.Response, _AsyncBody, httpx2.AsyncHTTPTransport


class LimitedTransport(
    SyncTransport[httpx2.Request, httpx2.Response, httpx2.BaseTransport], httpx2.BaseTransport
):
    """For `httpx2.Client(transport=...)`, over a `SyncLimiter`."""

    _overload, _unbounded = OVERLOAD, UNBOUNDED
    _response, _body, _sender = httpx2.Response, _SyncBody, httpx2.HTTPTransport
