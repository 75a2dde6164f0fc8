"""How the SDK's requests travel: httpx2's words outside, aiohttp's connections inside.

httpx2 looks at every connection of its pool for each request, which at a hundred calls at once is
most of a call's cost. Invariant: an exchange that is left is closed within milliseconds, whatever
its state; what goes wrong comes out as httpx2's own errors, which the rest of this room knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import lru_cache

import aiohttp
import httpx2
from aiohttp.client_reqrep import ClientRequest
from aiohttp.connector import Connection
from aiohttp.tracing import Trace
from multidict import CIMultiDict
from yarl import URL

MAX_HEAD_BYTES = 65_536
# Shorter than any common server's: a connection reused as the server closes it fails the call.
KEEPALIVE_S = 15.0
_URLS_KEPT = 256

_connected: ContextVar[Callable[[], None]] = ContextVar("tidegate_gemini_connected")


class Asked(httpx2.Request):
    """A request as aiohttp takes it: httpx2 would take it apart, and we put it together again.

    Of what it inherits only the type is used; nobody but the carrier reads it.
    """

    def __init__(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None
    ) -> None:
        self.method = method.upper()
        self.whole_url = url
        self.fields = CIMultiDict(headers)
        self.body = content

    def __repr__(self) -> str:
        return f"<Asked {self.method}>"  # the URL of an upload holds the key


class Carrier:
    """Not bounded in connections. `trust_env` is off: proxies of the environment are not used;
    SSL_CERT_FILE and SSL_CERT_DIR are honoured. The first request makes its session: it may be
    built outside of the event loop.
    """

    def __init__(self) -> None:
        self._tls = httpx2.create_ssl_context()
        self._session: aiohttp.ClientSession | None = None

    async def send(self, request: Asked, connected: Callable[[], None]) -> Carried:
        """Send a request and wait for the head of its answer; `connected` is called when its
        connection is there. Raises httpx2's errors.
        """
        session = self._session or self._opened()
        token = _connected.set(connected)
        try:
            response = await session.request(
                request.method,
                _url(request.whole_url),
                headers=request.fields,
                data=request.body,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as failed:
            raise _translated(failed) from failed
        except ValueError as failed:
            raise httpx2.LocalProtocolError(str(failed)) from failed
        finally:
            _connected.reset(token)
        return Carried(response)

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        self._session = aiohttp.ClientSession(
            connector=_Connector(limit=0, keepalive_timeout=KEEPALIVE_S, ssl=self._tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            max_line_size=MAX_HEAD_BYTES,
            max_field_size=MAX_HEAD_BYTES,
        )
        return self._session


class Carried:
    """An answer whose head is there."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.raw_headers = response.raw_headers
        self._response = response
        self._content = response.content

    @property
    def is_events(self) -> bool:
        return self.status == 200 and self._response.content_type == "text/event-stream"

    def at_hand(self) -> bytes | None:
        """What has come of the body and was not taken yet; empty at its end, None where it has to
        be waited for. Raises httpx2's errors, as `wait` does.
        """
        try:
            return self._content.read_nowait() or (b"" if self._content.at_eof() else None)
        except (aiohttp.ClientError, OSError) as failed:
            raise _translated(failed) from failed

    async def wait(self) -> bytes:
        """The next bytes of the body as soon as there are some; empty at its end."""
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, OSError) as failed:
            raise _translated(failed) from failed

    def close(self) -> bool:
        """End it: the connection is kept, and True returned, only where the answer has come to its
        end. Else it is closed in the event loop's next round.
        """
        whole = self._content.at_eof()
        if whole:
            self._response.release()
        else:
            self._response.close()
        return whole


class _Connector(aiohttp.TCPConnector):
    """Tells when a request has its connection; aiohttp's tracing would cost each call far more."""

    async def connect(
        self, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> Connection:
        connection = await super().connect(req, traces, timeout)
        _connected.get()()
        return connection


@lru_cache(_URLS_KEPT)
def _url(text: str) -> URL:
    return URL(text, encoded=True)


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
