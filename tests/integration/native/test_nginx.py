"""The file for nginx in `deploy/`, in a real nginx before a gateway."""

from __future__ import annotations

import asyncio
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
def nginx(folder: Path, upstream: str) -> Iterator[str]:
    """The URL of one before `upstream`, and before a process that is not there."""
    port = free_port()
    text = FILE.read_text().replace("listen 8080;", f"listen 127.0.0.1:{port};")
    text = text.replace("127.0.0.1:8000 ", f"{upstream} ").replace(":8001 ", f":{free_port()} ")
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
        small = {"contents": [{"parts": [{"text": "Say hello"}]}]}
        stream = f"{url}{path}:streamGenerateContent?alt=sse"
        async with gateway.http.post(stream, json=small) as answer:
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
