"""The file for nginx in `deploy/`, in a real nginx before a gateway."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
from websockets.asyncio.client import connect

from tests.gateway import Gateway
from tests.integration.native.conftest import MODEL
from tests.waiting import wait_until
from tidegate.embedded.servers import free_port
from tidegate.policy.format import edit

BODY = {"contents": [{"parts": [{"text": "Say hello"}]}]}
FILE = Path(__file__).parents[3] / "deploy/nginx/tidegate.conf"
MAIN = """
daemon off; worker_processes 1; pid {folder}/pid; error_log stderr;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    include {folder}/tidegate.conf;
}}
"""


@contextmanager
def nginx(folder: Path, upstream: str, other: int | None = None, **times: str) -> Iterator[str]:
    """The URL of one before `upstream`, and before the port of another process, or one that is not
    there. times: of other lengths than in the file."""
    port = free_port()
    text = FILE.read_text().replace("listen 8080;", f"listen 127.0.0.1:{port};")
    text = text.replace("127.0.0.1:8000 ", f"{upstream} ")
    text = text.replace(":8001 ", f":{other or free_port()} ")
    for name, time in times.items():
        text, count = re.subn(rf"{name} \w+;", f"{name} {time};", text)
        assert count == 1, name
    (folder / "tidegate.conf").write_text(text)
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder))
    command = ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    subprocess.run([*command, "-t"], check=True)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


async def listening(gateway: Gateway, url: str) -> None:
    async def ready() -> bool:
        try:
            async with gateway.http.get(f"{url}/health/ready") as answer:
                return answer.status == 200
        except OSError:
            return False

    await wait_until(ready, 20, "nginx")


async def test_large_bodies_and_streams_pass_as_they_come(gateway: Gateway, tmp_path: Path) -> None:
    path = f"/v1beta/models/{MODEL}"
    with nginx(tmp_path, gateway.url.removeprefix("http://")) as url:
        await listening(gateway, url)
        large = {"contents": [{"parts": [{"text": "x" * 3_000_000}]}]}
        for _ in range(4):  # each second one meets the process that is not there
            async with gateway.http.post(f"{url}{path}:generateContent", json=large) as answer:
                assert answer.status == 200, await answer.text()
        assert (await gateway.upstream.stats())["text_only"].arrived == 4
        await gateway.upstream.set_fault("hang_mid_stream", count=1)
        stream = f"{url}{path}:streamGenerateContent?alt=sse"
        async with gateway.http.post(stream, json=BODY) as answer:
            # The provider never sends more than the first event: it came without the rest.
            first = await asyncio.wait_for(answer.content.readuntil(b"\r\n\r\n"), 30)
            assert first.startswith(b"data: ")


async def test_realtime_sessions_pass(gateway: Gateway, tmp_path: Path) -> None:
    await gateway.services.keeper.change(edit({"kind:realtime": 2}), set_by="test")
    with nginx(tmp_path, gateway.url.removeprefix("http://")) as url:
        await listening(gateway, url)
        path = f"{url.replace('http', 'ws', 1)}/v1/realtime?model={MODEL}"
        for _ in range(2):  # one of them meets the process that is not there
            async with connect(path) as session:
                assert orjson.loads(await session.recv())["type"] == "session.created"


async def test_a_call_to_a_host_that_drops_packets_is_made_elsewhere(
    gateway: Gateway, tmp_path: Path
) -> None:
    upstream = gateway.url.removeprefix("http://")
    with socket.create_server(("127.0.0.1", 0), backlog=0) as other:
        port = other.getsockname()[1]
        with nginx(tmp_path, upstream, port, proxy_connect_timeout="50ms") as url:
            await listening(gateway, url)
            # Its queue is full now: the kernel drops the packets of further connections.
            with socket.create_connection(("127.0.0.1", port)):
                for _ in range(2):  # one of them meets it
                    path = f"{url}/v1beta/models/{MODEL}:generateContent"
                    async with gateway.http.post(path, json=BODY) as answer:
                        assert answer.status == 200, await answer.text()
    assert (await gateway.upstream.stats())["text_only"].arrived == 2


async def test_a_call_that_went_out_is_not_made_twice(gateway: Gateway, tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readline()).startswith(b"GET"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.read()
        writer.close()

    upstream = gateway.url.removeprefix("http://")
    async with await asyncio.start_server(silent, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        with nginx(tmp_path, upstream, port, proxy_read_timeout="1s") as url:
            await listening(gateway, url)
            statuses = []
            for _ in range(2):
                path = f"{url}/v1beta/models/{MODEL}:generateContent"
                async with gateway.http.post(path, json=BODY) as answer:
                    statuses.append(answer.status)
    assert sorted(statuses) == [200, 504]
    assert (await gateway.upstream.stats())["text_only"].arrived == 1
