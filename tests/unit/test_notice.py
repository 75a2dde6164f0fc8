"""What a process tells systemd, which listens at a datagram socket that it names."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidegate.supervisor.supervisor import READY_PIPE, living, report_ready, report_stopping


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """An abstract address: the path of a test's folder can be too long for a socket."""
    name = f"tidegate-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        listening.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        yield listening


def test_systemd_is_told_of_the_beginning_and_of_the_end(systemd: socket.socket) -> None:
    report_ready()
    report_stopping()
    assert [systemd.recv(100), systemd.recv(100)] == [b"READY=1", b"STOPPING=1"]


async def test_a_watchdog_hears_from_the_loop_again_and_again(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    with living():
        heard = [await asyncio.to_thread(systemd.recv, 100) for _ in range(3)]
    assert heard == [b"WATCHDOG=1"] * 3


@pytest.mark.parametrize("given", [{}, {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"}])
async def test_a_watchdog_that_is_not_there_or_is_our_parents_hears_nothing(
    given: dict[str, str], systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with living():
        await asyncio.sleep(0)
    systemd.setblocking(False)
    with pytest.raises(BlockingIOError):
        systemd.recv(100)


@pytest.mark.parametrize("address", ["", "nowhere", "/gone/notify"])
def test_nobody_listens(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    report_ready()
    report_stopping()


def test_a_supervisor_is_told_once_by_its_pipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hears, says = os.pipe()
    monkeypatch.setenv(READY_PIPE, str(says))
    report_ready()
    report_ready()
    with os.fdopen(hears, "rb") as pipe:
        assert pipe.read() == b"1"
