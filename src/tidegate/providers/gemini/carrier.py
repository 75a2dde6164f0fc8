"""How the SDK's requests travel: httpx2's words outside, aiohttp's connections inside.

httpx2 looks at every connection of its pool for each request, which at a hundred calls at once is
most of a call's cost. Invariant: an exchange that is left is closed within milliseconds, whatever
its state; what goes wrong comes out as httpx2's own errors, which the rest of this room knows.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
import httpx2
from multidict import CIMultiDict
from yarl import URL

MAX_HEAD_BYTES = 65_536
# Shorter than any common server's: a connection reused as the server closes it fails the call.
KEEPALIVE_S = 15.0
# The extension of a request: called without arguments when its connection is there.
CONNECTED = "tidegate_connected"
_NOT_SENT = ("transfer-encoding", "connection")


class Carrier(httpx2.AsyncBaseTransport):
    """Not bounded in connections. `trust_env` is off: proxies of the environment are not used;
    SSL_CERT_FILE and SSL_CERT_DIR are honoured. The first request makes its session: it may be
    built outside of the event loop.
    """

    def __init__(self) -> None:
        self._tls = httpx2.create_ssl_context()
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        session = self._session or self._opened()
        headers = CIMultiDict(
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in request.headers.raw
            if name.lower().decode("latin-1") not in _NOT_SENT
        )
        body = await request.aread()
        try:
            response = await session.request(
                request.method,
                URL(str(request.url), encoded=True),
                headers=headers,
                data=body or None,
                allow_redirects=False,
                trace_request_ctx=request.extensions.get(CONNECTED),
            )
        except (aiohttp.ClientError, OSError) as failed:
            raise _translated(failed) from failed
        except ValueError as failed:
            raise httpx2.LocalProtocolError(str(failed)) from failed
        return httpx2.Response(
            response.status, headers=list(response.raw_headers), stream=_Stream(response)
        )

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        tracing = aiohttp.TraceConfig(trace_config_ctx_factory=_Context)
        tracing.on_connection_create_end.append(_connected)
        tracing.on_connection_reuseconn.append(_connected)
        tracing.freeze()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ssl=self._tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            max_line_size=MAX_HEAD_BYTES,
            max_field_size=MAX_HEAD_BYTES,
            trace_configs=[tracing],
        )
        return self._session


class _Context(SimpleNamespace):
    """What a trace is told: who wants to know, as `trace_request_ctx`."""

    def __init__(self, trace_request_ctx: Callable[[], None] | None = None) -> None:
        super().__init__(tell=trace_request_ctx)


async def _connected(_session: object, context: Any, _parameters: object) -> None:
    if context.tell is not None:
        context.tell()


class _Stream(httpx2.AsyncByteStream):
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while piece := await self._response.content.readany():
                yield piece
        except (aiohttp.ClientError, OSError) as failed:
            raise _translated(failed) from failed

    async def aclose(self) -> None:
        """Keep the connection only where the answer has come to its end."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


def _translated(failed: Exception) -> httpx2.TransportError:
    if isinstance(failed, aiohttp.ClientConnectorError):
        return httpx2.ConnectError(str(failed))
    if isinstance(failed, aiohttp.ServerDisconnectedError):
        return httpx2.RemoteProtocolError("Server disconnected without sending a response.")
    if isinstance(failed, aiohttp.ClientPayloadError):
        return httpx2.RemoteProtocolError("peer closed connection in mid-answer")
    if isinstance(failed, aiohttp.ClientResponseError):
        return httpx2.RemoteProtocolError("not HTTP")
    if isinstance(failed, aiohttp.InvalidURL):
        return httpx2.UnsupportedProtocol("not a URL to be asked")
    return httpx2.ReadError(type(failed).__name__)
