"""One API on a real socket, a worker beside it and an emulated provider, all in this event loop.

A folder of tests takes part by importing the fixture `open_gateway` in its conftest.
What the provider saw is the truth: `gateway.upstream` reads its counters.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import orjson
import pytest
import uvicorn
from fastapi import FastAPI
from redis.asyncio import Redis
from starlette.datastructures import State

from tests.waiting import wait_until
from tidegate.app import create_app, run_worker
from tidegate.emulator.client import EmulatorControl
from tidegate.emulator.server import run_emulator
from tidegate.emulator.state import LoggedCall
from tidegate.http.services import Services
from tidegate.http.uvicorn_protocol import bounded
from tidegate.operator_key import operator_key
from tidegate.settings import Config
from tidegate.store import audit as bodies
from tidegate.store import database, spill, statistics
from tidegate.supervisor.api import NotifyingServer

# What `create_app` imports late is imported here, while the collector rests (`tests/garbage.py`).
for _name in ("tidegate.http.server", "tidegate.dashboard.routes"):
    import_module(_name)

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360f8cfc000000301010018dd8db00000000049454e44ae426082"
)
KEY = "AIzaSyTestKeyThatIsSecret0123456789abcde"
ENDS = ("succeeded", "failed", "cancelled", "expired", "dead")
# A transaction takes longer beside other tests. With the 10 ms of production a test opened seven
# connections instead of four; each is a process of PostgreSQL that costs 15 ms of a core.
_OPEN_AFTER_S = 0.1
# Answers are the same without sums, which cost each start 15 ms of a core.
_FIRST_SUM_S = 3_600.0
# A file of 4 MB of a process's calls under way, in memory as all folders of a run, costs 4 ms.
_SLOTS = 256
_TIMERS: dict[str, Any] = {
    "semaphore_timeout": 2.5,
    "claim_lease_ms": 1_500,
    "shutdown_grace_ms": 1_000,
    "classifier_timeout_ms": 1_000,
    "fetch_timeout_ms": 1_000,
    # A provider that hangs does so until the test ends: one that is given up after seconds frees
    # its permit in the midst of a test on a busy machine.
    "first_byte_timeout_ms": 60_000,
    "idle_timeout_ms": 60_000,
}


@dataclass
class Streamed:
    """What a client saw of one stream. `ended` is false when the connection was cut."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    raw: bytes = b""
    ended: bool = False

    @property
    def request_id(self) -> str:
        return self.headers["x-tidegate-request-id"]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    @property
    def text(self) -> str:
        return "".join(data["text"] for name, data in self.events if name == "delta")

    @property
    def problem(self) -> dict[str, Any]:
        """The body of a refusal, or the data of the `error` event."""
        if self.status != 200:
            found: dict[str, Any] = orjson.loads(self.raw)
            return found
        return dict(self.events)["error"]


class _Room:
    """A built application, to be started again and again: its routes cost more than its start."""

    def __init__(self) -> None:
        self.config: Config | None = None
        self.app = create_app(lambda: self.config or Config())


_rooms: list[_Room] = []


@dataclass
class Gateway:
    """The running API; `workers` are the stop events and tasks of its workers."""

    url: str
    app: FastAPI
    config: Config
    server: NotifyingServer
    http: aiohttp.ClientSession
    upstream: EmulatorControl
    database: asyncpg.Pool
    serving: asyncio.Task[None]
    room: _Room
    workers: list[tuple[asyncio.Event, asyncio.Task[None]]] = field(default_factory=list)

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    @property
    def operator_key(self) -> str:
        return self.services.operator_key.get_secret_value()

    @property
    def held(self) -> int:
        """Permits that the API's own limiter holds."""
        return sum(self.services.limiter.local_state().held.values())

    @property
    def waiting(self) -> int:
        return sum(self.services.limiter.local_state().waiting.values())

    def start_worker(self, **settings: Any) -> asyncio.Event:
        """Start a worker; setting the event stops it in order."""
        stop = asyncio.Event()
        config = self.config.model_copy(update=settings)
        self.workers.append((stop, asyncio.create_task(run_worker(config, stop))))
        return stop

    async def start_ready_worker(self) -> None:
        """Start a worker, and wait until its start no longer keeps this event loop busy: beside it,
        what the API or a test asks of PostgreSQL may find no answer in time."""
        ready = asyncio.Event()
        stop = asyncio.Event()
        working = asyncio.create_task(run_worker(self.config, stop, on_ready=ready.set))
        self.workers.append((stop, working))
        await wait_until(lambda: ready.is_set() or working.done(), 20, "a worker that is ready")

    async def stop_worker(self) -> None:
        """Stop the first worker in order, and wait until it has."""
        stop, task = self.workers.pop(0)
        stop.set()
        await task

    def drain(self) -> None:
        """What the process does on SIGTERM."""
        self.server.end()
        self.services.draining.set()

    async def get(self, path: str) -> tuple[int, dict[str, Any]]:
        async with self.http.get(self.url + path) as response:
            return response.status, orjson.loads(await response.read())

    async def submit(self, prefix: str = "", **body: Any) -> str:
        """POST /submit as JSON, or multipart where a value is bytes; the id of the 202."""
        async with self.http.post(f"{self.url}{prefix}/submit", **payload_of(body)) as response:
            answer = orjson.loads(await response.read())
            assert response.status == 202, answer
            return str(answer["request_id"])

    async def status(self, request_id: str) -> dict[str, Any]:
        status, body = await self.get(f"/status/{request_id}")
        assert status == 200, body
        return body

    async def end_of(self, request_id: str, timeout_s: float = 20) -> dict[str, Any]:
        """The request's record once it has ended."""
        async with asyncio.timeout(timeout_s):
            while True:
                code, body = await self.get(f"/status/{request_id}?wait=5")
                assert code == 200, body
                if body["status"] in ENDS:
                    return body

    async def recorded(self, request_id: str) -> dict[str, Any]:
        """The record of a stream, once it is there."""

        async def found() -> dict[str, Any] | None:
            code, body = await self.get(f"/status/{request_id}")
            return body if code == 200 else None

        record: dict[str, Any] = await wait_until(found, 20, f"a record of {request_id}")
        return record

    async def stream(self, *, accept: str = "", prefix: str = "", **body: Any) -> Streamed:
        """POST /stream, read to its end."""
        async with self.open_stream(accept=accept, prefix=prefix, **body) as response:
            return await read_stream(response)

    @asynccontextmanager
    async def open_stream(
        self, *, accept: str = "", prefix: str = "", **body: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Accept": accept} if accept else {}
        url = f"{self.url}{prefix}/stream"
        async with self.http.post(url, headers=headers, **payload_of(body)) as response:
            yield response

    async def calls(self, contains: str = "") -> list[LoggedCall]:
        """What the provider was asked, the classifier's questions left out."""
        calls = await self.upstream.calls(contains=contains)
        return [call for call in calls if call.kind != "classifier"]

    async def in_flight(self, count: int) -> None:
        """Wait until the provider has `count` calls in flight."""

        async def reached() -> bool:
            return (await self.upstream.stats()).in_flight == count

        await wait_until(reached, 20, f"{count} calls in flight")

    async def audit(self, request_id: str, timeout_s: float = 20) -> dict[str, Any]:
        """The one audit row of an ended request, with its bodies as `request` and `response`."""

        query = "SELECT * FROM audit WHERE request_id = $1::uuid"
        found = partial(self.database.fetch, query, request_id)
        rows = await wait_until(found, timeout_s, f"an audit row of {request_id}")
        assert len(rows) == 1
        row = dict(rows[0])
        row["request"] = row["response"] = None
        for body in await self.database.fetch("SELECT * FROM bodies WHERE id = $1", row["id"]):
            packed = body["data"]
            if packed is None:
                packed = await self.services.blobs.get(body["blob_key"])
            row[body["role"]] = bodies.unpack(body["encoding"], packed)
        row["failure"] = None if row["failure"] is None else orjson.loads(row["failure"])
        return row

    async def attempts(self, request_id: str) -> list[asyncpg.Record]:
        query = "SELECT * FROM attempts WHERE request_id = $1::uuid ORDER BY number"
        return list(await self.database.fetch(query, request_id))


def operators_headers(config: Config) -> dict[str, str]:
    """What the tests' own client shows where no API keys are asked for and no other key is set:
    what it is about is not the operator's key. A test that is, opens a session of its own."""
    if config.requires_keys or config.admin_token is not None:
        return {}
    return {"Authorization": f"Bearer {operator_key(config).get_secret_value()}"}


Opener = Callable[..., Awaitable[Gateway]]
_keyspaces = cycle(range(1, 16))


def payload_of(body: dict[str, Any]) -> dict[str, Any]:
    """The arguments of aiohttp for JSON, or for a form where some value is bytes."""
    if not any(isinstance(value, bytes) for value in body.values()):
        return {"json": body}
    form = aiohttp.FormData()
    for name, value in body.items():
        if isinstance(value, bytes):
            form.add_field(name, value, filename="a.png", content_type="image/png")
        else:
            form.add_field(name, str(value))
    return {"data": form}


async def read_stream(response: aiohttp.ClientResponse) -> Streamed:
    """Read to the end, or to where the connection was cut."""
    seen = Streamed(response.status, {k.lower(): v for k, v in response.headers.items()})
    try:
        async for chunk in response.content.iter_any():
            seen.raw += chunk
        seen.ended = True
    except aiohttp.ClientError:
        seen.ended = False
    if seen.headers.get("content-type", "").startswith("text/event-stream"):
        for block in seen.raw.decode("utf-8", "replace").split("\n\n")[:-1]:
            name, data = block.removeprefix("event: ").split("\ndata: ", 1)
            seen.events.append((name, orjson.loads(data)))
    return seen


def small_receive_buffer(name: tuple[Any, ...]) -> socket.socket:
    """A client's socket that soon takes no more when it is not read."""
    family, kind, protocol, *_ = name
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return made


@asynccontextmanager
async def gateway(
    folder: Path,
    *,
    redis_url: str,
    database_url: str,
    direct_url: str | None = None,
    worker: bool = True,
    **settings: Any,
) -> AsyncIterator[Gateway]:
    """Everything up inside the block, stopped in order after it; `settings` are `Config`'s.

    The test itself looks into the database by `direct_url`, where that is another way to it.
    """
    async with AsyncExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(database, "_OPEN_AFTER_S", _OPEN_AFTER_S)
        patch.setattr(statistics, "_FIRST_SUM_S", _FIRST_SUM_S)
        patch.setattr(spill, "_SLOTS", _SLOTS)
        emulator = await stack.enter_async_context(run_emulator())
        config = Config.model_validate(
            _TIMERS
            | {
                "database_url": database_url,
                "redis_url": redis_url,
                "gemini_api_key": KEY,
                "gemini_base_url": emulator.url,
                "data_dir": folder,
            }
            | settings
        )
        pool = await asyncpg.create_pool(direct_url or database_url, min_size=0, max_size=2)
        stack.push_async_callback(pool.close)
        http = await stack.enter_async_context(
            aiohttp.ClientSession(
                headers=operators_headers(config),
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                timeout=aiohttp.ClientTimeout(total=30),
            )
        )
        running = await _serve(config, http, emulator.control, pool)
        try:
            await wait_until(lambda: running.server.started or running.serving.done(), 20)
            if running.serving.done():
                running.serving.result()
            await wait_until(lambda: running.services.limiter.local_state().state == "up", 20)
            if worker:
                await running.start_ready_worker()
            yield running
        finally:
            for stop, _ in running.workers:
                stop.set()
            if hasattr(running.app.state, "services"):
                running.drain()
            ended = [task for _, task in running.workers]
            await asyncio.gather(running.serving, *ended)
            _rooms.append(running.room)


async def _serve(
    config: Config, http: aiohttp.ClientSession, upstream: EmulatorControl, pool: asyncpg.Pool
) -> Gateway:
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    room = _rooms.pop() if _rooms else _Room()
    room.config, app = config, room.app
    app.state = State()
    protocol = bounded(
        receive_timeout_ms=config.receive_timeout_ms, stalled_reader_ms=config.stalled_reader_ms
    )
    server = NotifyingServer(
        uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,  # as in production
            timeout_graceful_shutdown=max(1, round(config.shutdown_grace_ms / 1000)),
        ),
        app.complete,
    )
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    return Gateway(url, app, config, server, http, upstream, pool, serving, room)


@pytest.fixture
async def open_gateway(valkey_url: str, database_url: str, tmp_path: Path) -> AsyncIterator[Opener]:
    """Opens gateways on a database of the test's own: `await open_gateway(...)`.

    The Valkey is shared, with an empty keyspace in it: one that has just started admits nobody for
    a whole lease. A test that pauses or stops Valkey gives `redis_url`, of `own_valkey`.
    """
    redis_url = f"{valkey_url.rpartition('/')[0]}/{next(_keyspaces)}"
    async with Redis.from_url(redis_url) as client:
        await client.flushdb()
    async with AsyncExitStack() as stack:

        async def open_one(**settings: Any) -> Gateway:
            given = {"redis_url": redis_url, "database_url": database_url} | settings
            return await stack.enter_async_context(gateway(tmp_path / "data", **given))

        yield open_one
