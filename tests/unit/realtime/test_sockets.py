"""What is read of a provider while its client reads slowly."""

from __future__ import annotations

from typing import Any, cast

from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri
from websockets.utils import accept_key

from tidegate.realtime.sockets import MAX_MESSAGE_BYTES, UpstreamSocket

MEGABYTE = 1024 * 1024


class _Transport:
    """Of a socket."""

    reading = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_read(self) -> bool:
        return self.reading

    def set_write_buffer_limits(self, *_: object) -> None:
        pass


def opened() -> tuple[UpstreamSocket, _Transport]:
    protocol = ClientProtocol(parse_uri("ws://provider/"), max_size=MAX_MESSAGE_BYTES)
    socket, transport = UpstreamSocket(protocol), _Transport()
    socket.connection_made(cast(Any, transport))
    protocol.send_request(protocol.connect())
    protocol.data_to_send()
    accepted = f"Sec-WebSocket-Accept: {accept_key(protocol.key)}"
    upgraded = "Upgrade: websocket\r\nConnection: Upgrade"
    head = f"HTTP/1.1 101 Switching Protocols\r\n{upgraded}\r\n{accepted}\r\n\r\n"
    socket.data_received(head.encode())
    return socket, transport


def piece(size_bytes: int, *, begins: bool = True, ends: bool = True) -> bytes:
    kind = Opcode.BINARY if begins else Opcode.CONT
    return Frame(kind, b"x" * size_bytes, fin=ends).serialize(mask=False)


async def test_a_provider_is_not_read_while_a_megabyte_waits_for_its_client() -> None:
    socket, transport = opened()
    half = MEGABYTE // 2
    socket.data_received(piece(half))
    assert transport.is_read()
    socket.data_received(piece(half + 1))
    assert not transport.is_read()
    assert socket.is_blocked
    assert len(await socket.recv()) == half
    assert transport.is_read()
    assert len(await socket.recv()) == half + 1


async def test_a_message_that_is_longer_comes_through_and_nothing_behind_it() -> None:
    socket, transport = opened()
    long = piece(3 * MEGABYTE)
    socket.data_received(long[:-1])
    assert transport.is_read(), "else its end would never come"
    socket.data_received(long[-1:] + piece(1))
    assert not transport.is_read()
    assert len(await socket.recv()) == 3 * MEGABYTE
    assert transport.is_read()


async def test_a_long_message_in_pieces_is_read_as_its_client_takes_it() -> None:
    socket, transport = opened()
    socket.data_received(piece(2 * MEGABYTE, ends=False))
    assert not transport.is_read()
    reading = socket.recv()
    coming = cast(Any, reading.send)
    coming(None)  # it has taken the first, and waits for the next
    assert transport.is_read()
    reading.close()


async def test_many_short_messages_are_bounded_by_their_number() -> None:
    socket, transport = opened()
    socket.data_received(piece(1) * 1_000)
    assert not transport.is_read()
    for left in reversed(range(1_000)):
        assert await socket.recv() == b"x"
        assert transport.is_read() is (left <= 1)
