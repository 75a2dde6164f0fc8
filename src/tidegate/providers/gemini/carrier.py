"""How the SDK's requests travel: httpx2's words outside, connections of our own inside.

httpx2 looks at every connection of its pool for each request, which at a hundred calls at once is
most of a call's cost. Invariant: an exchange that is left is closed in the event loop's next round,
whatever its state.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from functools import lru_cache

import httpx2

from tidegate.providers.gemini.timeouts import Timeouts
from tidegate.providers.relay import Exchange, RelayWire
from tidegate.tracing import HEADER

_EVENTS = b"text/event-stream"
# The connection says these by itself.
_FRAMING = ("host", "content-length", "connection", "transfer-encoding", "accept-encoding")
_HEADS_KEPT = 64


class Asked(httpx2.Request):
    """A request as our connections take it: httpx2 would take it apart, and we put it together.

    Of what it inherits only the type is used; nobody but the carrier reads it.
    """

    def __init__(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None
    ) -> None:
        self.method = method.upper()
        self.whole_url = url
        self.fields, self.is_upload = _fields(tuple(headers.items()))
        self.body = content

    def __repr__(self) -> str:
        return f"<Asked {self.method}>"  # the URL of an upload holds the key


class Carrier:
    """Not bounded in connections. Proxies of the environment are not used; SSL_CERT_FILE and
    SSL_CERT_DIR are honoured. The first request makes its connections' keeper: the carrier may be
    built outside of the event loop.
    """

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._tls = httpx2.create_ssl_context()
        self._tls.set_alpn_protocols(["http/1.1"])
        self._wire: _Wire | None = None

    async def send(self, request: Asked, traceparent: str | None = None) -> Carried:
        """Send a request and wait for the head of its answer. Raises UpstreamError."""
        wire = self._wire or await self._opened()
        place, fields = wire.place(request.whole_url), request.fields
        if traceparent is not None:
            fields = [*fields, (HEADER, traceparent.encode())]
        return Carried(await wire.open(request.method, place, fields, request.body))

    async def aclose(self) -> None:
        if self._wire is not None:
            await self._wire.aclose()

    async def _opened(self) -> _Wire:
        self._wire = _Wire(self._timeouts, self._tls)
        await self._wire.start()
        return self._wire


@lru_cache(_HEADS_KEPT)
def _fields(headers: tuple[tuple[str, str], ...]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """As they are sent, and whether they belong to an upload; the SDK sends the same ones with
    nearly every call."""
    said = {name.lower(): value for name, value in headers}
    sent = {name: value for name, value in said.items() if name not in _FRAMING}
    fields = [(name.encode("ascii"), value.encode("latin-1")) for name, value in sent.items()]
    return [*fields, (b"accept-encoding", b"identity")], "x-goog-upload-command" in said


class _Wire(RelayWire):
    """With the certificates that the SDK's own client trusts."""

    def __init__(self, timeouts: Timeouts, tls: ssl.SSLContext) -> None:
        super().__init__(timeouts)
        self._tls = tls

    def tls_context(self) -> ssl.SSLContext:  # type: ignore[override]
        return self._tls


class Carried:
    """An answer whose head is there."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.status = exchange.status
        self.raw_headers = exchange.headers
        # The next bytes of the body as soon as there are some; empty at its end.
        self.next = exchange.next
        # End it: the connection is kept, and True returned, only where the answer has come to its
        # end. Else it is closed in the event loop's next round.
        self.close = exchange.close

    @property
    def first_byte_ms(self) -> float | None:
        """From sending the request to the first bytes of the body; None until there are some."""
        return self._exchange.first_byte_ms

    def field(self, name: bytes) -> bytes:
        """The value of a header; empty without it. `name` in small letters."""
        size = len(name)
        for known, value in self.raw_headers:
            if len(known) == size and known.lower() == name:
                return value
        return b""

    @property
    def is_events(self) -> bool:
        return self.status == 200 and self.field(b"content-type").lower().startswith(_EVENTS)
