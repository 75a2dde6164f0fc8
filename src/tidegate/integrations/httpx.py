"""Transports for `httpx`: put any SDK that uses it under the limiter.

    transport = AsyncLimitedTransport(limiter, Demand(("kind:text_only",)))
    async with httpx.AsyncClient(transport=transport) as client:
        ...

Invariant: see `exchange.py`. Importing this imports `httpx`.
"""

import httpx

from tidegate.integrations.exchange import AsyncBody, AsyncTransport, SyncBody, SyncTransport

UNBOUNDED = httpx.Limits(max_connections=None, max_keepalive_connections=100)
OVERLOAD = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)


class _AsyncBody(AsyncBody, httpx.AsyncByteStream):
    pass


class _SyncBody(SyncBody, httpx.SyncByteStream):
    pass


class AsyncLimitedTransport(
    AsyncTransport[httpx.Request, httpx.Response, httpx.AsyncBaseTransport],
    httpx.AsyncBaseTransport,
):
    """For `httpx.AsyncClient(transport=...)`, over a `Limiter`."""

    _overload, _unbounded = OVERLOAD, UNBOUNDED
    _response, _body, _sender = httpx.Response, _AsyncBody, httpx.AsyncHTTPTransport


class LimitedTransport(
    SyncTransport[httpx.Request, httpx.Response, httpx.BaseTransport], httpx.BaseTransport
):
    """For `httpx.Client(transport=...)`, over a `SyncLimiter`."""

    _overload, _unbounded = OVERLOAD, UNBOUNDED
    _response, _body, _sender = httpx.Response, _SyncBody, httpx.HTTPTransport
