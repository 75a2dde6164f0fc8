"""The file for HAProxy in `deploy/`, in a real HAProxy before servers that are slow to answer."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from tests.waiting import wait_until
from tidegate.embedded.servers import free_port

FILE = Path(__file__).parents[3] / "deploy/haproxy/haproxy.cfg"
SLOW_S = 0.9  # longer than the time between two checks
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nOK"


@contextmanager
def haproxy(port: int, place: str, log: Path) -> Iterator[None]:
    env = {**os.environ, "LISTEN": f"127.0.0.1:{port}", "API_1": place, "API_2": place}
    env["PATH"] = f"{env['PATH']}:/usr/sbin"
    with log.open("wb") as out:
        command = ["haproxy", "-db", "-f", str(FILE)]
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


async def test_a_busy_process_whose_checks_are_answered_late_stays_in_service(
    tmp_path: Path,
) -> None:
    port, late = free_port(), 0

    def answer(writer: asyncio.StreamWriter) -> None:
        nonlocal late
        late += not writer.is_closing()
        writer.write(ANSWER)
        writer.close()

    async def busy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        after_s = SLOW_S if b"/health/ready" in head else 0.0
        asyncio.get_running_loop().call_later(after_s, answer, writer)

    async with await asyncio.start_server(busy, "127.0.0.1", 0) as server:
        place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        log = tmp_path / "haproxy.log"
        with haproxy(port, place, log):
            await wait_until(lambda: late >= 6 or " is DOWN" in log.read_text(), 20, "checks")
            assert " is DOWN" not in log.read_text()
            async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}") as got:
                assert got.status == 200
