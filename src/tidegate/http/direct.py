"""A request's body and its answer, past uvicorn's `receive` and `send`: for the relay alone.

Most requests of the relay are there with their head, and most of its answers are there as a whole:
then one look and one write do what six ASGI messages would. Whatever else uvicorn keeps of a
request it finds as its own `send` would have left it. This builds on internals of uvicorn:
`tests/integration/http_input/test_uvicorn_internals.py` pins them.

Invariant: nothing is written that a header or a length could turn into another message.
"""

from __future__ import annotations

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

DIRECT_EXTENSION = "tidegate.direct"
_NO_BODY = (204, 304)

Headers = list[tuple[bytes, bytes]]


class Direct:
    """Of one request. Use it for the whole of an answer, or not at all."""

    __slots__ = ("_cycle", "_flow", "_left_bytes")

    def __init__(self, cycle: RequestResponseCycle, flow: FlowControl) -> None:
        self._cycle = cycle
        self._flow = flow
        self._left_bytes: int | None = None  # of the length that the head has told

    def take_body(self) -> bytes | None:
        """The request's body where all of it is there; None where it must be received."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected or cycle.waiting_for_100_continue:
            return None
        body = bytes(cycle.body)
        cycle.body = bytearray()
        cycle.message_event.clear()
        return body

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """All of an answer; a length among the headers is replaced by its own."""
        if self._must_look and await self._is_lost():
            return
        kept = [pair for pair in headers if pair[0] != b"content-length"]
        if status in _NO_BODY:
            body = b""
        else:
            kept.append((b"content-length", b"%d" % len(body)))
        self._cycle.transport.write(self._head_of(status, kept) + body)
        self._end()

    async def head(self, status: int, headers: Headers) -> None:
        """The head of an answer that comes piece by piece."""
        if self._must_look and await self._is_lost():
            return
        length = next((value for name, value in headers if name == b"content-length"), None)
        if length is not None:
            self._left_bytes = int(length)
        elif status in _NO_BODY:
            self._left_bytes = 0
        else:
            headers = [*headers, (b"transfer-encoding", b"chunked")]
        self._cycle.transport.write(self._head_of(status, headers))

    async def piece(self, piece: bytes, more: bool) -> None:
        """A part of the body. Raises ValueError where it is not as long as was told."""
        if self._must_look and await self._is_lost():
            return
        if self._left_bytes is None:
            data = b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
            if not more:
                data += b"0\r\n\r\n"
        else:
            data = piece
            self._left_bytes -= len(piece)
            if self._left_bytes < 0 or (self._left_bytes and not more):
                raise ValueError("an answer that is not as long as its head has told")
        if data:
            self._cycle.transport.write(data)
        if not more:
            self._end()

    @property
    def _must_look(self) -> bool:
        return self._flow.write_paused or self._cycle.disconnected

    async def _is_lost(self) -> bool:
        """Wait until the client takes more. True once it is gone."""
        if self._flow.write_paused and not self._cycle.disconnected:
            await self._flow.drain()
        return self._cycle.disconnected

    def _head_of(self, status: int, headers: Headers) -> bytes:
        cycle = self._cycle
        lines = [b"%b: %b\r\n" % pair for pair in cycle.default_headers + headers]
        if not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        said = b"".join(lines)
        if said.count(b"\n") != len(lines) or said.count(b"\r") != len(lines) or b"\0" in said:
            raise ValueError("a header holds the end of a line")
        cycle.response_started = True
        return b"%b%b\r\n" % (STATUS_LINE[status], said)

    def _end(self) -> None:
        cycle = self._cycle
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()
