"""A real uvicorn with our protocol, in a thread, and a client of raw bytes."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from tidegate.http import problems
from tidegate.http.sse import DISCONNECT_EXTENSION, disconnected
from tidegate.http.submission import read_submission
from tidegate.http.uvicorn_protocol import BoundedProtocol
from tidegate.settings import Config
from tidegate.store.blobs import Blobs

BIG_BYTES = 30_000_000
RECEIVE_BUFFER_BYTES = 262_144


@dataclass
class Running:
    """A server under test. `seen` holds the headers of its requests, `left` those whose
    clients were heard to leave, `faults` what uvicorn logged as errors."""

    config: Config
    port: int = 0
    server: uvicorn.Server | None = None
    go: threading.Event = field(default_factory=threading.Event)
    seen: list[dict[str, str]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def connections(self) -> int:
        assert self.server is not None
        return len(self.server.server_state.connections)

    @property
    def requests(self) -> int:
        """Those that are being worked on."""
        assert self.server is not None
        return len(self.server.server_state.tasks)

    def connect(self) -> Client:
        return Client(socket.create_connection(("127.0.0.1", self.port), timeout=10))


class Client:
    """One connection. `sent` counts the bytes that could be sent."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.sent = 0
        self.received = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)
        self.sent += len(data)

    def send_as_long_as_taken(self, piece: bytes, times: int) -> None:
        """Send until the server ends the connection; fail when it takes all."""
        try:
            for _ in range(times):
                self.send(piece)
        except (ConnectionError, TimeoutError):
            return
        raise AssertionError(f"the server took {self.sent} bytes and did not end the connection")

    def read_until(self, mark: bytes) -> bytes:
        while mark not in self.received:
            data = self.socket.recv(65536)
            assert data, f"ended after {self.received[-500:]!r}"
            self.received += data
        return self.received

    def read_to_the_end(self) -> bytes:
        """All that comes until the server closes; a reset counts as closing."""
        try:
            while data := self.socket.recv(65536):
                self.received += data
        except ConnectionResetError:
            pass
        return self.received

    @property
    def status(self) -> int:
        return int(self.received.split(b" ", 2)[1])


def wait_for(condition: Any, what: str, timeout_s: float = 20) -> None:
    """`wait_until` for tests that block."""
    deadline = time.monotonic() + timeout_s
    waiting = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        waiting.wait(0.005)


@contextmanager
def serving(folder: Path, *, loop: str = "uvloop", **changes: Any) -> Iterator[Running]:
    """Serve; names in capitals change the protocol's bounds, others the settings."""
    bounds = {name: changes.pop(name) for name in list(changes) if name.isupper()}
    running = Running(Config.model_validate({"data_dir": folder, **changes}))
    listening = socket.create_server(("127.0.0.1", 0))
    # Else the kernel takes up to `tcp_rmem` of what a test sends and the server never reads.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    running.port = listening.getsockname()[1]
    config = uvicorn.Config(
        _app(running, Blobs.from_url("", folder)),
        http=type("Bounded", (BoundedProtocol,), bounds),
        ws="none",
        loop=loop,
        log_level="error",
        timeout_graceful_shutdown=1,
    )
    running.server = uvicorn.Server(config)
    listener = logging.Handler(logging.ERROR)
    listener.emit = lambda record: running.faults.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("uvicorn.error").addHandler(listener)
    thread = threading.Thread(target=running.server.run, args=([listening],), daemon=True)
    thread.start()
    wait_for(lambda: running.server is not None and running.server.started, "started")
    try:
        yield running
    finally:
        running.go.set()
        running.server.should_exit = True
        thread.join(10)
        logging.getLogger("uvicorn.error").removeHandler(listener)
        listening.close()
        assert not thread.is_alive()


def _app(running: Running, blobs: Blobs) -> FastAPI:
    app = FastAPI()
    problems.install(app)

    @app.post("/submit")
    async def submit(request: Request) -> Response:
        running.seen.append(dict(request.headers))
        got = await read_submission(request, running.config, blobs)
        files = [[a.name, a.mime_type, a.size_bytes] for a in got.attachments]
        return JSONResponse({"prompt": got.prompt, "files": files}, 202)

    @app.get("/")
    async def root(request: Request) -> Response:
        running.seen.append(dict(request.headers))
        return PlainTextResponse("hello")

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        running.seen.append(dict(request.headers))
        return PlainTextResponse(await request.body())

    @app.get("/big")
    async def big() -> Response:
        return Response(bytes(BIG_BYTES))

    @app.get("/stream")
    async def stream() -> Response:
        return StreamingResponse(_pieces(running))

    @app.get("/deaf")
    async def deaf(request: Request) -> Response:
        """As a native call: it is told, and never reads."""
        told = asyncio.Event()
        request.scope["extensions"][DISCONNECT_EXTENSION]["call"](told.set)
        await told.wait()
        running.left.append("deaf")
        return Response()

    @app.get("/listening")
    async def listening(request: Request) -> Response:
        """As a stream of ours: it listens."""
        await disconnected(request.receive)
        running.left.append("listening")
        return Response()

    return app


async def _pieces(running: Running) -> AsyncIterator[bytes]:
    """Begin, wait for `go`, then send on, without end when the settings ask for it."""
    yield b"begun"
    await asyncio.to_thread(running.go.wait, 10)
    yield b"gone on"
    while running.config.stream_wait_ms == 1:
        yield bytes(10_000)
        await asyncio.sleep(0)  # uvicorn's `send` to a client that has left never suspends
