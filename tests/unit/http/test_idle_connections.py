"""How long a connection may be idle: one timer for all its requests, which looks at the clock."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tidegate.http.uvicorn_protocol import BoundedProtocol

GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
KEEP_ALIVE_S = 75.0


class Loop:
    """An event loop's timers and tasks, by a clock that the test moves; no task is ever run."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, after_s: float, call: Callable[..., None], *arguments: Any) -> Any:
        timer = (self.now_s + after_s, lambda: call(*arguments))
        self.timers.append(timer)

        def cancel() -> None:
            if timer in self.timers:
                self.timers.remove(timer)

        return SimpleNamespace(cancel=cancel)

    def create_task(self, coroutine: Any) -> object:
        coroutine.close()
        return object()

    def until(self, now_s: float) -> None:
        while due := [timer for timer in self.timers if timer[0] <= now_s]:
            first = min(due, key=lambda timer: timer[0])
            self.timers.remove(first)
            self.now_s = first[0]
            first[1]()
        self.now_s = now_s


class Transport:
    closed_at_s: float | None = None

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def is_closing(self) -> bool:
        return self.closed_at_s is not None

    def close(self) -> None:
        self.closed_at_s = self._loop.now_s

    def get_extra_info(self, _name: str, default: Any = None) -> Any:
        return default

    def get_write_buffer_size(self) -> int:
        return 0


def _connection() -> tuple[Loop, Transport, BoundedProtocol]:
    async def app(*_: Any) -> None: ...

    config = SimpleNamespace(
        encoded_headers=[],
        loaded=True,
        loaded_app=app,
        ws_protocol_class=None,
        root_path="",
        asgi_version="3.0",
        limit_concurrency=None,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    state = SimpleNamespace(connections=set(), tasks=set(), total_requests=0, default_headers=[])
    loop = Loop()
    transport = Transport(loop)
    protocol = BoundedProtocol(config, state, {}, loop)
    protocol.connection_made(transport)  # type: ignore[arg-type]
    return loop, transport, protocol


def _answer(protocol: BoundedProtocol) -> None:
    protocol.cycle.response_complete = True
    protocol.cycle.on_response()


def test_an_idle_connection_is_closed_so_long_after_its_last_answer() -> None:
    loop, transport, protocol = _connection()
    for at_s in (0.0, 40.0, 60.0):
        loop.until(at_s)
        protocol.data_received(GET)
        _answer(protocol)
    assert len(loop.timers) == 1
    loop.until(1_000.0)
    assert transport.closed_at_s == 60.0 + KEEP_ALIVE_S


def test_a_connection_is_not_idle_while_a_request_is_answered_or_begins() -> None:
    loop, transport, protocol = _connection()
    protocol.data_received(GET)
    _answer(protocol)
    loop.until(10.0)
    protocol.data_received(GET)
    loop.until(300.0)
    assert not transport.is_closing()
    _answer(protocol)
    loop.until(300.0 + KEEP_ALIVE_S - 1)
    assert not transport.is_closing()
    loop.until(300.0 + KEEP_ALIVE_S)
    assert transport.is_closing()


def test_the_timer_of_a_connection_that_is_lost_goes_with_it() -> None:
    loop, _, protocol = _connection()
    protocol.data_received(GET)
    _answer(protocol)
    protocol.connection_lost(ConnectionResetError())
    assert loop.timers == []
