"""A whole deployment for one test: real servers, real processes, and an emulated provider.

What the provider saw is the truth: `Fleet.truth()` and `Fleet.calls_by_marker()` come from the
emulator's own counters, never from ours.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import asyncpg

from tests.clusters import FAST, copied
from tests.forked import started
from tests.waiting import promised_s, wait_until, work_for
from tidegate.embedded.servers import ValkeyServer, free_port
from tidegate.emulator.client import EmulatorControl, Stats
from tidegate.emulator.state import LoggedCall

ROOT = Path(__file__).parent.parent
LIMITS = {"text_only": 5, "multi_modal": 3, "image_generation": 2}
LEASE_S = 2.0
_SETTINGS = {
    "SEMAPHORE_TIMEOUT": f"{LEASE_S}",
    "CLAIM_LEASE_MS": "2000",
    "SHUTDOWN_GRACE_MS": "10000",
    "CLASSIFIER": "auto",
    "LOG_FORMAT": "json",
    "GEMINI_API_KEY": "test-key",
    "ADMIN_TOKEN": "of-the-operator-of-a-fleet",
}


class Child:
    """One process of ours."""

    def __init__(self, name: str, arguments: list[str], env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self.process = started(arguments, cwd=log.parent, env=env, stdout=output, stderr=output)

    def __repr__(self) -> str:
        return f"<{self.name} pid={self.process.pid} ended={self.process.poll()}>"

    def signal(self, how: signal.Signals) -> None:
        self.process.send_signal(how)

    def kill(self) -> None:
        """kill -9, and reap."""
        self.process.kill()
        self.process.wait(10)

    async def ended(self, timeout_s: float = 30) -> int:
        """The exit status, once it has one."""
        await wait_until(lambda: self.process.poll() is not None, timeout_s, f"end of {self}")
        status = self.process.poll()
        assert status is not None
        return status


class Fleet:
    """`async with Fleet(folder, apis=2, workers=2) as fleet`: everything is up inside the block.

    Not `migrated`: the first process of ours makes the schema.
    """

    def __init__(
        self,
        folder: Path,
        *,
        apis: int = 2,
        workers: int = 2,
        settings: Mapping[str, str] | None = None,
        migrated: bool = True,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.valkey = ValkeyServer(folder / "valkey")
        self.postgres = copied(folder / "postgres", FAST, migrated=migrated)
        self.apis: dict[str, Child] = {}
        self.workers: list[Child] = []
        self._counts = (apis, workers)
        self.settings = {**_SETTINGS, **(settings or {})}
        self._children: list[Child] = []
        self.http: aiohttp.ClientSession
        self.control: EmulatorControl

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stop()

    @property
    def as_operator(self) -> dict[str, str]:
        """The header that opens what operators alone may see; `http` shows it."""
        return {"Authorization": f"Bearer {self.settings['ADMIN_TOKEN']}"}

    async def _start(self) -> None:
        self.http = aiohttp.ClientSession(
            headers={} if self.settings.get("AUTH") == "on" else self.as_operator,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=120),
        )
        await asyncio.to_thread(self.valkey.start)
        await asyncio.to_thread(self.postgres.start)
        port_file = self.folder / "emulator.port"
        module = "tidegate.emulator"
        arguments = [module, "--host", "127.0.0.1", "--port", "0", "--port-file", str(port_file)]
        self._children.append(
            Child("emulator", arguments, self._environment(""), self.folder / "emulator.log")
        )
        await wait_until(lambda: port_file.exists() and port_file.read_text().strip(), 20)
        self.control = EmulatorControl(f"http://127.0.0.1:{port_file.read_text().strip()}")
        apis, workers = self._counts
        for _ in range(apis):
            self.start_api()
        for _ in range(workers):
            self.start_worker()
        for url in self.apis:
            await self.ready(url)

    def _environment(self, upstream_url: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return {
            **kept,
            "PYTHONPATH": str(ROOT / "src"),
            "DATABASE_URL": self.postgres.url(),
            "REDIS_URL": self.valkey.url,
            "GEMINI_BASE_URL": upstream_url,
            "DATA_DIR": str(self.folder / "data"),
            **self.settings,
        }

    def environment(self) -> dict[str, str]:
        """The variables of its processes, for a command beside them."""
        return self._environment(self.control.url)

    def start_api(self) -> str:
        """Start an API process; its URL."""
        port = free_port()
        env = {**self._environment(self.control.url), "PORT": str(port)}
        name = f"api-{port}"
        child = Child(name, ["tidegate", "serve"], env, self.folder / f"{name}.log")
        url = f"http://127.0.0.1:{port}"
        self.apis[url] = child
        self._children.append(child)
        return url

    def start_worker(self) -> Child:
        name = f"worker-{len(self._children)}"
        env = self._environment(self.control.url)
        child = Child(name, ["tidegate", "worker"], env, self.folder / f"{name}.log")
        self.workers.append(child)
        self._children.append(child)
        return child

    async def ready(self, url: str, child: Child | None = None) -> None:
        """Wait for the API at `url`, its process `child` where it is not among `apis`. Raises
        AssertionError with the end of its log where it is not ready."""
        child, answer = child or self.apis[url], "none"

        async def is_ready() -> bool:
            nonlocal answer
            try:
                async with self.http.get(f"{url}/health/ready") as response:
                    answer = f"{response.status} {await response.text()}"
                    return response.status == 200
            except aiohttp.ClientError as failed:
                answer = repr(failed)
                return child.process.poll() is not None

        try:
            await wait_until(is_ready, max(30, promised_s(15)), f"{child} ready")
            assert child.process.poll() is None, f"{child}"
        except AssertionError as late:
            said = child.log.read_text(errors="replace")[-2_000:]
            raise AssertionError(f"{late}; its last answer: {answer}\n{said}") from None

    @property
    def url(self) -> str:
        """Some API that is alive."""
        return next(url for url, child in self.apis.items() if child.process.poll() is None)

    async def _stop(self) -> None:
        for child in self._children:
            if child.process.poll() is None:
                child.signal(signal.SIGCONT)
                child.kill()
        if hasattr(self, "control"):
            await self.control.close()
        await self.http.close()
        await asyncio.to_thread(self.valkey.stop)
        await asyncio.to_thread(self.postgres.stop)

    @asynccontextmanager
    async def record(self) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """A connection to its PostgreSQL."""
        connection = await asyncpg.connect(self.postgres.url())
        try:
            yield connection
        finally:
            await connection.close()

    async def claimed_by(
        self, worker: Child, record: asyncpg.Connection[asyncpg.Record]
    ) -> set[str]:
        """The requests that a worker has claimed, as the record says."""
        name = f"worker-%-{worker.process.pid}-%"
        rows = await record.fetch("SELECT id FROM requests WHERE claimed_by LIKE $1", name)
        return {str(row["id"]) for row in rows}

    async def truth(self) -> Stats:
        return await self.control.stats()

    async def calls_by_marker(self) -> defaultdict[str, list[LoggedCall]]:
        """The provider's calls for each marked prompt (`[m17]`), all outcomes, oldest first."""
        found: defaultdict[str, list[LoggedCall]] = defaultdict(list)
        for call in await self.control.calls():
            if call.kind != "classifier" and "[" in call.prompt:
                found[call.prompt.split("[", 1)[1].split("]", 1)[0]].append(call)
        return found

    async def assert_never_over(self, *, reached: bool = False) -> None:
        """The provider never saw more in flight than allowed; `reached`: it did see that many."""
        truth = await self.truth()
        for kind, limit in LIMITS.items():
            highest = truth[kind].max_in_flight
            assert highest <= limit, f"{kind}: {highest} in flight, {limit} allowed"
            assert not reached or highest == limit, f"{kind}: only {highest} of {limit} used"

    async def status(self, request_id: str, wait_s: float = 0) -> dict[str, Any]:
        """The request's status from any live API; asks again when one dies under the question."""
        while True:
            try:
                url = f"{self.url}/status/{request_id}?wait={wait_s:g}"
                async with self.http.get(url) as response:
                    if response.status == 503:
                        await work_for(0.1)
                        continue
                    body: dict[str, Any] = await response.json()
                    assert response.status == 200, body
                    return body
            except (aiohttp.ClientError, ConnectionError):
                await work_for(0.05)

    async def end_of(self, request_id: str, timeout_s: float = 90) -> dict[str, Any]:
        """The request's status once it has ended."""
        async with asyncio.timeout(timeout_s):
            while True:
                body = await self.status(request_id, wait_s=10)
                if body["status"] not in ("queued", "running"):
                    return body
