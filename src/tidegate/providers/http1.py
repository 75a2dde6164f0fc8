"""HTTP/1.1 to an upstream, one exchange after another on a connection; llhttp reads the answers.

Invariants: an answer ends where its own length says, or it has failed; bytes that nobody has asked
for end the connection, and are never taken for the next answer; what is read ahead of whoever reads
an answer is bounded, and so is a head.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import cast

from httptools import HttpParserCallbackError, HttpParserError, HttpResponseParser

from tidegate.errors import TidegateError, UpstreamGarbled, UpstreamUnavailable

RawHeaders = list[tuple[bytes, bytes]]

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 200
# How much of an answer may lie here unread before its connection is read no further.
READ_AHEAD_BYTES = 256 * 1024
# A larger body is not copied to go out with its head.
_COPIED_BYTES = 64 * 1024
_NO_BODY = (204, 304)
_LENGTH, _CODING = b"content-length", b"transfer-encoding"


class _Unusable(Exception):
    """What came is no answer; the message says why."""


class Answer:
    """What came back of one request, so far. `status` is 0 until its head is there; `ended` once
    all of it is; `failure` says why no more will come."""

    __slots__ = (
        *("_loop", "_waiter", "ended", "failure", "headers", "pieces", "size_bytes", "status"),
        "stirred",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.headers: RawHeaders = []
        self.pieces: list[bytes] = []
        self.size_bytes = 0  # of the pieces
        self.ended = False
        self.failure: TidegateError | None = None
        self.stirred = False  # something has come since whoever looks after it looked
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_awaited(self) -> bool:
        return self._waiter is not None

    async def change(self) -> None:
        """Wait for more. One task at a time."""
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def changed(self) -> None:
        self.stirred = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def fail(self, failure: TidegateError) -> None:
        """Unless it has ended already; the first reason stands."""
        if not self.ended and self.failure is None:
            self.failure = failure
            self.changed()


class Connection(asyncio.Protocol):
    """One connection; `when_lost` is called when it is gone."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, when_lost: Callable[[Connection], None]
    ) -> None:
        self.idle_since = 0.0  # for whoever keeps it
        self.lost = False
        self._loop = loop
        self._when_lost = when_lost
        self._transport: asyncio.Transport
        self._answer: Answer | None = None
        self._parser = HttpResponseParser(self)
        self._begin_head()
        self._may_stay = False
        self._until_close = False
        self._reads = True
        self._hinted: Answer | None = None  # something came before it, such as early hints
        self._sending: asyncio.Task[None] | None = None
        self._room: asyncio.Future[None] | None = None  # set while the upstream takes no more

    # -- one exchange

    def send(self, head: bytes, body: bytes | AsyncIterator[bytes] | None) -> Answer:
        """Send a request; `head` without the empty line at its end, and without a length where
        the body comes in pieces."""
        answer = self._answer = Answer(self._loop)
        self._may_stay = self._until_close = False
        if body is None:
            self._transport.write(head + b"\r\n")
        elif not isinstance(body, bytes):
            self._transport.write(head + b"transfer-encoding: chunked\r\n\r\n")
            self._sending = self._loop.create_task(self._send_pieces(body))
            self._sending.add_done_callback(partial(_sent, answer))
        elif len(body) <= _COPIED_BYTES:
            self._transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        else:
            self._transport.write(b"%bcontent-length: %d\r\n\r\n" % (head, len(body)))
            self._transport.write(body)
        return answer

    async def _send_pieces(self, body: AsyncIterator[bytes]) -> None:
        async for piece in body:
            if piece:
                self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            if self._room is not None:
                await self._room
        self._transport.write(b"0\r\n\r\n")

    def read_on(self) -> None:
        """There is room for more of the answer."""
        if not self._reads:
            self._reads = True
            if not self.lost:
                self._transport.resume_reading()

    def done(self) -> bool:
        """The answer has been read; True if the connection can take the next request."""
        sending, self._sending = self._sending, None
        if self.lost or not self._may_stay or (sending is not None and not sending.done()):
            self.drop()
            return False
        self._answer = None
        return not self._transport.is_closing()

    def drop(self) -> None:
        """End it at once, in the event loop's next round."""
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        if not self.lost:
            self._transport.abort()

    @property
    def is_open(self) -> bool:
        return not self.lost and not self._transport.is_closing()

    # -- what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None or answer.ended or answer.failure is not None:
            self._transport.abort()
            return
        try:
            if not self._in_head:
                self._surplus_bytes += len(data)
                self._parser.feed_data(data)
            else:
                self._read_head(data)
            if self._surplus_bytes > MAX_HEAD_BYTES + 8 * self._body_bytes:
                raise _Unusable("the provider's chunks and trailers are too large")
        except (HttpParserError, _Unusable) as wrong:
            why = wrong.__context__ if isinstance(wrong, HttpParserCallbackError) else wrong
            said = str(why) if isinstance(why, _Unusable) else "the provider's answer is not HTTP"
            answer.fail(UpstreamGarbled(said))
            self._transport.abort()

    def _read_head(self, data: bytes) -> None:
        """In pieces: what is over the bound is never given to the parser."""
        while data:
            room = MAX_HEAD_BYTES - self._head_bytes if self._in_head else len(data)
            piece, data = (data, b"") if len(data) <= room else (data[:room], data[room:])
            self._head_bytes += len(piece)
            self._parser.feed_data(piece)
            if self._in_head and self._head_bytes >= MAX_HEAD_BYTES:
                raise _Unusable(f"the head of the provider's answer is over {MAX_HEAD_BYTES} bytes")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        answer, self._answer = self._answer, None
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        if answer is not None and not answer.ended:
            if exc is None and self._until_close and answer.failure is None:
                answer.ended = True
                answer.changed()
            elif answer.status:
                answer.fail(UpstreamUnavailable("the provider closed the connection in mid-answer"))
            else:
                heard = self._head_bytes or self._hinted is answer
                said = "the provider closed the connection before its answer"
                answer.fail(UpstreamUnavailable(said, broke=None if heard else "unheard"))
        self._when_lost(self)

    def pause_writing(self) -> None:
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    # -- what the parser calls; an error raised here comes out of `feed_data`

    def _begin_head(self) -> None:
        self._in_head = True
        self._interim = False
        self._head_bytes = self._surplus_bytes = self._body_bytes = 0
        self._headers: RawHeaders = []
        self._length: bytes | None = None
        self._coding: bytes | None = None

    def on_message_begin(self) -> None:
        if self._answer is None or self._answer.ended:
            raise _Unusable("there is more behind the provider's answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: nobody here asks for any
        headers = self._headers
        if len(headers) >= MAX_HEADERS:
            raise _Unusable(f"the provider's answer has more than {MAX_HEADERS} headers")
        headers.append((name, value))
        size = len(name)
        if size == 14 and name.lower() == _LENGTH:
            self._length = value
        elif size == 17 and name.lower() == _CODING:
            self._coding = value if self._coding is None else b"several"

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if not 200 <= status < 600:
            if status < 100 or status == 101 or status >= 600:
                # 101: nobody here speaks another protocol.
                raise _Unusable(f"the provider answered {status}, which is no answer")
            if self._coding or self._length not in (None, b"0"):
                # RFC 9112, section 6.3: it has none; but the parser would take what follows for it.
                raise _Unusable(f"the provider answered {status} with a body")
            self._interim = True
            self._hinted = self._answer
            return
        if self._coding is not None and self._coding.lower() != b"chunked":
            raise _Unusable("the provider's answer is in an unknown transfer coding")
        if status in _NO_BODY and (self._coding or self._length not in (None, b"0")):
            raise _Unusable(f"the provider answered {status} with a body")
        framed = self._length is not None or self._coding is not None or status in _NO_BODY
        self._until_close = not framed
        self._may_stay = framed and self._parser.should_keep_alive()
        self._in_head = False
        answer = self._answer
        assert answer is not None
        answer.headers = self._headers
        answer.status = status
        answer.changed()

    def on_body(self, body: bytes) -> None:
        answer = self._answer
        assert answer is not None
        size = len(body)
        self._surplus_bytes -= size
        self._body_bytes += size
        answer.pieces.append(body)
        answer.size_bytes += size
        if answer.size_bytes > READ_AHEAD_BYTES and self._reads:
            self._reads = False
            self._transport.pause_reading()
        answer.changed()

    def on_message_complete(self) -> None:
        interim = self._interim
        self._begin_head()
        answer = self._answer
        if not interim and answer is not None:
            answer.ended = True
            answer.changed()


def _sent(answer: Answer, sending: asyncio.Task[None]) -> None:
    """A body has been sent piece by piece, or whoever it came from has failed."""
    broken = None if sending.cancelled() else sending.exception()
    if isinstance(broken, TidegateError):
        answer.fail(broken)
    elif broken is not None:
        name = type(broken).__name__
        answer.fail(UpstreamUnavailable(f"the request's body broke off ({name})"))
