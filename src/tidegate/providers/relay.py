"""The way to an upstream for native calls: bytes out, bytes back, nothing understood.

Owns the connections. Invariants: one attempt, no redirect, no decompression; an exchange that was
left is closed before its permit goes back; whoever is silent for longer than allowed is cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from tidegate.errors import (
    UpstreamError,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from tidegate.providers.gemini.timeouts import Timeouts

RawHeaders = Iterable[tuple[bytes, bytes]]

_KEEPALIVE_S = 15.0
_SWEEP_S = 0.25
_URLS_KEPT = 2_000
_MOST_HEADER_BYTES = 32_768


class Exchange:
    """One call and its answer. `status` and `headers` are there once it is opened."""

    __slots__ = ("_content", "_due", "_response", "_wire", "status", "timed_out")

    def __init__(self, wire: RelayWire, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.timed_out: str | None = None
        self._wire = wire
        self._response = response
        self._content = response.content
        self._due = (0.0, 0.0)

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """As they came, names in any case."""
        return self._response.raw_headers

    async def next(self) -> bytes:
        """The next bytes of the body as soon as there are some; empty at its end.

        Raises UpstreamError. Cancelling leaves the exchange open: `close` it.
        """
        loop_time = self._wire.time()
        self._due = (loop_time + self._wire.idle_s, self._due[1])
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, OSError) as broken:
            raise self._translated(broken) from None

    @property
    def at_end(self) -> bool:
        """Whether all of the body has been read."""
        return self._content.at_eof()

    async def read(self, max_bytes: int) -> bytes:
        """The whole body, or its first `max_bytes`."""
        whole = bytearray()
        while len(whole) < max_bytes and (piece := await self.next()):
            whole += piece
        return bytes(whole[:max_bytes])

    def close(self) -> bool:
        """End it: the connection is kept, and True returned, only when the answer has come to its
        end. Else it is closed in the event loop's next round. Idempotent."""
        self._wire.exchanges.discard(self)
        whole: bool = self._content.at_eof()
        if whole:
            self._response.release()
        else:
            self._response.close()
        return whole

    def overdue(self, now: float) -> str | None:
        """The phase that has taken too long."""
        idle, total = self._due
        if now > total:
            return "total"
        return "idle" if now > idle else None

    def cut(self, phase: str) -> None:
        self.timed_out = phase
        connection = self._response.connection
        if connection is not None and connection.transport is not None:
            connection.transport.abort()

    def begin(self, now: float) -> None:
        self._due = (now + self._wire.idle_s, now + self._wire.total_s)

    def _translated(self, broken: Exception) -> UpstreamError:
        if self.timed_out is not None:
            return self._wire.ran_out(self.timed_out)
        if isinstance(broken, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError):
            return UpstreamUnavailable("the provider closed the connection in mid-answer")
        return UpstreamUnavailable(
            f"the connection to the provider broke ({type(broken).__name__})"
        )


class _Opening:
    """A request whose answer has not begun; `late` once it is being cancelled for that."""

    __slots__ = ("due", "late", "task")

    def __init__(self, task: asyncio.Task[Any], due: float) -> None:
        self.task = task
        self.due = due
        self.late = False


class RelayWire:
    """One per process. `start` before the first call, `aclose` at the end."""

    def __init__(self, timeouts: Timeouts) -> None:
        self.idle_s = timeouts.idle_ms / 1000
        self.total_s = timeouts.total_ms / 1000
        self.exchanges: set[Exchange] = set()
        self._openings: set[_Opening] = set()
        self._urls: dict[str, URL] = {}
        self.time = asyncio.get_running_loop().time
        self._timeouts = timeouts
        self._sweeper: asyncio.Task[None] | None = None
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                keepalive_timeout=_KEEPALIVE_S,
                ttl_dns_cache=30,
                enable_cleanup_closed=False,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_read=None),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            max_field_size=_MOST_HEADER_BYTES,
            max_line_size=_MOST_HEADER_BYTES,
        )

    async def start(self) -> None:
        self._sweeper = asyncio.create_task(self._sweep())

    async def aclose(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for exchange in list(self.exchanges):
            exchange.close()
        await self._session.close()

    def url(self, text: str) -> URL:
        """A URL that is whole and quoted already; kept, since taking one apart is dear."""
        known = self._urls.get(text)
        if known is None:
            known = URL(text, encoded=True)
            if len(self._urls) < _URLS_KEPT:
                self._urls[text] = known
        return known

    async def open(
        self,
        method: str,
        url: URL,
        headers: list[tuple[str, str]],
        body: bytes | AsyncIterator[bytes] | None,
    ) -> Exchange:
        """Send a request and wait for the head of its answer. Raises UpstreamError.

        Cancelling closes the connection.
        """
        task = asyncio.current_task()
        assert task is not None
        opening = _Opening(task, self.time() + self._timeouts.first_byte_ms / 1000)
        self._openings.add(opening)
        try:
            response = await self._session.request(
                method, url, headers=CIMultiDict(headers), data=body, allow_redirects=False
            )
        except asyncio.CancelledError:
            # A connection is really closed in the loop's next round: its permit goes after that.
            await asyncio.sleep(0)
            if not opening.late:
                raise
            task.uncancel()
            raise self.ran_out("first_byte") from None
        except aiohttp.ClientConnectorError:
            raise UpstreamUnavailable("could not connect to the provider") from None
        except aiohttp.ServerDisconnectedError:
            raise UpstreamUnavailable(
                "the provider closed the connection before its answer"
            ) from None
        except aiohttp.ClientResponseError:
            raise UpstreamGarbled("the provider's answer is not HTTP") from None
        except (aiohttp.InvalidURL, ValueError) as wrong:
            raise UpstreamRejected(
                f"the request could not be sent ({type(wrong).__name__})"
            ) from None
        except (aiohttp.ClientError, OSError) as broken:
            name = type(broken).__name__
            raise UpstreamUnavailable(f"the connection to the provider broke ({name})") from None
        finally:
            self._openings.discard(opening)
        if not 200 <= response.status < 600:  # 101: nobody here speaks another protocol
            response.close()
            raise UpstreamGarbled(f"the provider answered {response.status}, which is no answer")
        exchange = Exchange(self, response)
        exchange.begin(self.time())
        self.exchanges.add(exchange)
        return exchange

    def ran_out(self, phase: str) -> UpstreamTimeout:
        limit_ms = self._timeouts.of(phase)
        return UpstreamTimeout(
            f"the provider took longer than {limit_ms} ms ({phase})", phase=phase
        )

    async def _sweep(self) -> None:
        """One timer for all: a timeout of its own for each read would cost more than the read."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = self.time()
            for exchange in list(self.exchanges):
                if (phase := exchange.overdue(now)) is not None:
                    exchange.cut(phase)
            for opening in list(self._openings):
                if now > opening.due and not opening.late:
                    opening.late = True
                    opening.task.cancel()
