"""The end of a process as its clients see it: none of them loses a request."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.http_input.server import Running, serving, wait_for

_GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
_STREAM = b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n"
_CLOSES = b"\r\nconnection: close\r\n"
_LOOPS = pytest.mark.parametrize("loop", ["uvloop", "asyncio"])


def _leave(running: Running) -> None:
    """What the process does on SIGTERM, before it takes no more."""
    assert running.server is not None
    protocol = running.server.config.http_protocol_class
    protocol.leaving = True  # type: ignore[attr-defined]
    for connection in running.server.server_state.connections:
        connection.leave()  # type: ignore[union-attr]


def _stop(running: Running) -> None:
    assert running.server is not None
    running.server.should_exit = True
    wait_for(lambda: not running.server or not running.server.servers[0].sockets, "stopped")


@_LOOPS
def test_a_process_that_leaves_says_so_on_each_answer(loop: str, tmp_path: Path) -> None:
    with serving(tmp_path, loop=loop) as running, running.connect() as kept:
        kept.send(_GET)
        assert _CLOSES not in kept.read_until(b"hello")
        with running.connect() as asking:
            asking.send(_STREAM)
            asking.read_until(b"begun")
            _leave(running)
            kept.received = b""
            kept.send(_GET)
            assert _CLOSES in kept.read_to_the_end()
            with running.connect() as new:
                new.send(_GET)
                assert _CLOSES in new.read_to_the_end()
            running.go.set()
            # A head that was on its way could say nothing: that connection takes one more.
            assert _CLOSES not in asking.read_until(b"gone on\r\n0\r\n\r\n")
            asking.received = b""
            asking.send(_GET)
            assert _CLOSES in asking.read_to_the_end()


@_LOOPS
def test_a_request_under_way_at_the_end_is_answered(loop: str, tmp_path: Path) -> None:
    with (
        serving(tmp_path, loop=loop) as running,
        running.connect() as idle,
        running.connect() as connected,
        running.connect() as half,
        running.connect() as half_again,
    ):
        for client in (idle, half_again):
            client.send(_GET)
            client.read_until(b"hello")
            client.received = b""
        half.send(_GET[:10])
        half_again.send(_GET[:10])
        wait_for(lambda: running.connections == 4, "all accepted")
        _stop(running)
        assert idle.read_to_the_end() == b""
        for client, rest in ((connected, _GET), (half, _GET[10:]), (half_again, _GET[10:])):
            client.send(rest)
            assert client.read_to_the_end().endswith(b"hello")
            assert _CLOSES in client.received


def test_a_client_that_never_asks_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with serving(tmp_path, UNDER_WAY_S=0.1) as running, running.connect() as connected:
        wait_for(lambda: running.connections == 1, "accepted")
        _stop(running)
        assert connected.read_to_the_end() == b""
