"""Routes that an API adds after it is ready: a request that comes before them waits for them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from tests.gateway import Gateway, Opener
from tidegate.app import create_app
from tidegate.http.server import Gateway as Application
from tidegate.http.uvicorn_protocol import bounded
from tidegate.supervisor.api import QuietServer, uvicorn_config

EARLY = (("GET", "/health/live"), ("GET", "/status/nothing"), ("POST", "/submit"))
LATE = (
    ("GET", "/admin/process"),
    ("GET", "/admin/nothing"),
    ("GET", "/requests"),
    ("GET", "/llm/usage"),
    ("GET", "/docs"),
    ("GET", "/dashboard/"),
    ("DELETE", "/health/live"),
    ("OPTIONS", "/admin/limits"),
    ("OPTIONS", "/nothing"),
    ("GET", "/nothing"),
)


@asynccontextmanager
async def incomplete(gateway: Gateway) -> AsyncIterator[tuple[Application, str]]:
    """The services of a gateway behind an application that has only the routes of its start."""
    app = create_app(lambda: gateway.config)
    app.state = gateway.app.state
    protocol = bounded(
        receive_timeout_ms=gateway.config.receive_timeout_ms,
        stalled_reader_ms=gateway.config.stalled_reader_ms,
    )
    server = QuietServer(uvicorn_config(app, http=protocol, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield app, f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.end()
            await serving


async def asked(gateway: Gateway, url: str, method: str, path: str) -> tuple[int, str | None]:
    """The status and the methods of an answer to an operator."""
    headers = {"Authorization": f"Bearer {gateway.operator_key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.request(method, url + path) as answer,
    ):
        await answer.read()
        return answer.status, answer.headers.get("Allow")


async def test_a_request_before_the_routes_are_added_is_answered_as_after(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway()
    for method, path in LATE:
        after = await asked(gateway, gateway.url, method, path)
        async with incomplete(gateway) as (app, url):
            first = len(app.router.routes)
            several = await asyncio.gather(*(asked(gateway, url, method, path) for _ in range(5)))
            assert set(several) == {after}, path
            assert len(app.router.routes) == len(gateway.app.routes) > 5 * first
            assert await asked(gateway, url, method, path) == after


async def test_calls_and_probes_do_not_wait_for_them(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    async with incomplete(gateway) as (app, url):
        first = len(app.router.routes)
        for method, path in EARLY:
            after = await asked(gateway, gateway.url, method, path)
            assert await asked(gateway, url, method, path) == after
        assert len(app.router.routes) == first


async def test_a_description_built_first_has_all_routes(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    whole = await asyncio.to_thread(gateway.app.openapi)
    app = create_app(lambda: gateway.config)
    assert (await asyncio.to_thread(app.openapi))["paths"].keys() == whole["paths"].keys()
