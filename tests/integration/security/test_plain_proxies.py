"""Behind real proxies in their plainest configuration, which add no mark of their own.

nginx rewrites Host to the address that it proxies to, HAProxy passes what the client chose, a
balancer of TCP connections (and `ssh -R`) passes bytes. None of them may open what the operator's
key guards.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until
from tidegate.embedded.servers import free_port

GUARDED = (
    *("/admin/limits", "/admin/tenants", "/admin/keys", "/admin/requests", "/admin/usage"),
    *("/admin/process", "/metrics", "/requests", "/requests/running", "/usage"),
    *("/dashboard/session", "/dashboard/feed", "/dashboard/stuck"),
)
CHAT = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": "Say hello"}]}
NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log stderr;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://{upstream}; }} }}
}}
"""
HAPROXY = """
defaults
    mode {mode}
    timeout connect 5s
    timeout client 30s
    timeout server 30s
listen gateway
    bind 127.0.0.1:{port}
    server one {upstream}
"""


def program_and_file(proxy: str) -> tuple[list[str], str]:
    if proxy == "nginx":
        return ["nginx", "-e", "stderr", "-p", "{folder}", "-c", "{file}"], NGINX
    mode = proxy.removeprefix("haproxy ")
    return ["haproxy", "-db", "-f", "{file}"], HAPROXY.replace("{mode}", mode)


@contextmanager
def proxied(proxy: str, upstream: str, folder: Path) -> Iterator[str]:
    """The URL at which a proxy passes everything to `upstream`, as its makers ship it."""
    port = free_port()
    command, text = program_and_file(proxy)
    file = folder / "proxy.conf"
    file.write_text(text.format(folder=folder, port=port, upstream=upstream))
    arguments = [one.format(folder=folder, file=file) for one in command]
    process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@asynccontextmanager
async def forwarded(upstream: str) -> AsyncIterator[str]:
    """What `ssh -R` does: connections from elsewhere come from this machine, byte for byte."""
    host, _, port = upstream.partition(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65_536):
            writer.write(piece)
            await writer.drain()
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
        pumps = (pump(reader, inner_writer), pump(inner_reader, writer))
        await asyncio.gather(*pumps, return_exceptions=True)

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def is_open(url: str) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0


async def check(gateway: Gateway, url: str, *, rewrites_host: bool) -> None:
    """What a stranger gets through the proxy, under a name of their choice; and an operator."""
    key = {"Authorization": f"Bearer {gateway.operator_key}"}
    jar = aiohttp.DummyCookieJar()
    async with aiohttp.ClientSession(cookie_jar=jar) as client:

        async def status(method: str, path: str, **headers: str) -> int:
            body = CHAT if method == "POST" else None
            async with client.request(method, url + path, json=body, headers=headers) as answer:
                return answer.status

        for prefix in ("", "/llm"):
            for path in GUARDED:
                for host in ("localhost", "127.0.0.1", "localhost:8000"):
                    assert await status("GET", prefix + path, Host=host) == 401, (path, host)
                assert await status("GET", prefix + path, Host="gate.example") in (401, 403), path
        for method, path in (
            ("PUT", "/admin/limits/kind:text_only"),
            ("POST", "/admin/keys"),
            ("POST", "/admin/limits/kind:text_only/pause"),
        ):
            assert await status(method, path, Host="localhost") == 401
        assert await status("GET", "/admin/limits", Host="localhost", **key) == 200
        assert await status("POST", "/v1/chat/completions", Host="localhost") == 200
        foreign = await status("POST", "/v1/chat/completions", Host="gate.example")
        assert foreign == (200 if rewrites_host else 403)
    assert await gateway.services.store.tenants.list_keys() == []
    assert gateway.services.limiter.policy.revision == 1


@pytest.mark.parametrize("proxy", ["nginx", "haproxy http", "haproxy tcp"])
async def test_a_plain_proxy_opens_nothing_that_the_key_guards(
    open_gateway: Opener, tmp_path: Path, proxy: str
) -> None:
    gateway = await open_gateway(worker=False)
    with proxied(proxy, gateway.url.removeprefix("http://"), tmp_path) as url:
        await wait_until(lambda: is_open(url), 20, f"{proxy} listens")
        await check(gateway, url, rewrites_host=proxy == "nginx")


async def test_neither_does_a_forwarded_port(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    async with forwarded(gateway.url.removeprefix("http://")) as url:
        await check(gateway, url, rewrites_host=False)
