"""Connections that come together are accepted together, whatever the loop's rounds take."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, cast

import pytest
import uvicorn
import uvloop

from tests.waiting import wait_until
from tidegate.http.uvicorn_protocol import Acceptor, bounded
from tidegate.supervisor.api import QuietServer

CLIENTS = 64


class Counted(asyncio.Protocol):
    """Says how many connections there have been, and answers each with a word."""

    made = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        type(self).made += 1
        cast(asyncio.WriteTransport, transport).write(b"hello")


@pytest.fixture
def counted() -> type[Counted]:
    return type("CountedHere", (Counted,), {})


def on_uvloop(main: Callable[[], Coroutine[None, None, None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def listening() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2 * CLIENTS)
    listener.setblocking(False)
    return listener


def connected(stack: ExitStack, listener: socket.socket, count: int) -> list[socket.socket]:
    at = listener.getsockname()
    return [stack.enter_context(socket.create_connection(at)) for _ in range(count)]


async def rounds_until(done: Callable[[], bool], most: int) -> int:
    for number in range(most):
        if done():
            return number
        await asyncio.sleep(0)
    return most


def test_many_that_connect_together_are_accepted_in_a_few_rounds(counted: type[Counted]) -> None:
    async def main() -> None:
        with ExitStack() as stack:
            listener = stack.enter_context(listening())
            clients = connected(stack, listener, CLIENTS)
            acceptor = Acceptor(asyncio.get_running_loop(), listener, counted)
            stack.callback(acceptor.close)
            rounds = await rounds_until(lambda: counted.made == CLIENTS, 10 * CLIENTS)
            assert rounds < CLIENTS / 2
            for client in clients:
                client.settimeout(10)
                assert client.recv(5) == b"hello"

    on_uvloop(main)


def test_a_closed_acceptor_takes_no_more_and_keeps_what_it_has(counted: type[Counted]) -> None:
    async def main() -> None:
        with ExitStack() as stack:
            listener = stack.enter_context(listening())
            acceptor = Acceptor(asyncio.get_running_loop(), listener, counted)
            (first,) = connected(stack, listener, 1)
            await wait_until(lambda: counted.made == 1)
            acceptor.close()
            await acceptor.wait_closed()
            connected(stack, listener, 1)
            assert await rounds_until(lambda: counted.made > 1, 50) == 50
            first.settimeout(10)
            assert first.recv(5) == b"hello"

    on_uvloop(main)


def test_a_process_without_descriptors_accepts_again_later(
    counted: type[Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.http.uvicorn_protocol._AGAIN_S", 0.2)
    tries, lacks = 0, True

    class Failing(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            nonlocal tries
            tries += 1
            if lacks:
                raise OSError(errno.EMFILE, "none left")
            return super().accept()

    async def main() -> None:
        with ExitStack() as stack:
            plain = stack.enter_context(listening())
            listener = stack.enter_context(Failing(fileno=plain.detach()))
            acceptor = Acceptor(asyncio.get_running_loop(), listener, counted)
            stack.callback(acceptor.close)
            connected(stack, listener, 1)
            await wait_until(lambda: tries > 0)
            assert await rounds_until(lambda: tries > 1, 20) == 20
            nonlocal lacks
            lacks = False
            await wait_until(lambda: counted.made == 1)

    on_uvloop(main)


def test_the_server_accepts_by_it() -> None:
    async def app(_scope: object, _receive: object, _send: object) -> None:
        """Answers nothing: only its connections count."""

    async def main() -> None:
        with ExitStack() as stack:
            listener = stack.enter_context(listening())
            connected(stack, listener, CLIENTS)
            server = QuietServer(uvicorn.Config(app, lifespan="off", log_config=None))
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            connections = server.server_state.connections
            rounds = await rounds_until(lambda: len(connections) == CLIENTS, 10 * CLIENTS)
            assert rounds < CLIENTS / 2
            server.end()
            await serving

    on_uvloop(main)


def test_the_first_client_after_a_silence_gets_the_date_of_now() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def main() -> None:
        with listening() as listener:
            protocol = bounded(receive_timeout_ms=5_000, stalled_reader_ms=5_000)
            config = uvicorn.Config(app, http=protocol, lifespan="off", log_config=None)
            server = QuietServer(config)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            await wait_until(lambda: server.started)
            server.server_state.default_headers = [(b"date", b"of long ago")]
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            date = parsedate_to_datetime(head.partition("date: ")[2].partition("\r\n")[0])
            assert abs((datetime.now(UTC) - date).total_seconds()) < 60
            writer.close()
            server.end()
            await serving

    on_uvloop(main)
