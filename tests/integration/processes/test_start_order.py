"""Processes that start before what they need: alive at once, ready later, and nothing is lost."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import redis.asyncio

from tests.fleet import Fleet
from tests.load import submit
from tests.waiting import wait_until
from tidegate.store.database import migrate

_WAITS = "waiting for PostgreSQL: PostgreSQL at 127.0.0.1 does not answer"


class _Backwards(Fleet):
    """API and worker first, on an empty database that nobody but us migrates."""

    def __init__(self, folder: Path) -> None:
        settings = {"MIGRATE_AT_START": "0"}
        super().__init__(folder, apis=0, workers=0, settings=settings, migrated=False)

    async def health(self, path: str) -> int:
        async with self.http.get(f"{self.url}/health/{path}") as answer:
            return answer.status


async def test_api_and_worker_first_then_postgres_then_the_schema_then_valkey(
    tmp_path: Path,
) -> None:
    async with _Backwards(tmp_path) as fleet:
        await asyncio.to_thread(fleet.postgres.stop)
        await asyncio.to_thread(fleet.valkey.stop)
        url, worker = fleet.start_api(), fleet.start_worker()
        api = fleet.apis[url]
        await wait_until(lambda: '"event":"started"' in api.log.read_text(), 30)
        assert [await fleet.health("live"), await fleet.health("ready")] == [200, 503]
        body = {"data": "Explain why the tide turns [early]"}
        assert (await submit(fleet, url, body))[0] == 503, "told at once, and not lost later"
        await asyncio.to_thread(fleet.postgres.start)
        assert await fleet.health("ready") == 503, "a database without a schema"
        await migrate(fleet.postgres.url())
        await fleet.ready(url)
        status, answer = await submit(fleet, url, body)
        assert status == 202, "jobs are taken while Valkey is away"
        await asyncio.to_thread(fleet.valkey.start)
        assert (await fleet.end_of(answer["request_id"], 30))["status"] == "succeeded"
        assert [api.process.poll(), worker.process.poll()] == [None, None]


async def test_a_process_of_its_own_waits_for_postgres_and_migrates(tmp_path: Path) -> None:
    async with Fleet(tmp_path, apis=0, workers=0, migrated=False) as fleet:
        await asyncio.to_thread(fleet.postgres.stop)
        url = fleet.start_api()
        log = fleet.apis[url].log
        await wait_until(lambda: _WAITS in log.read_text(), 30)
        await asyncio.to_thread(fleet.postgres.start)
        await fleet.ready(url)
        async with redis.asyncio.Redis.from_url(fleet.valkey.url) as valkey:
            await valkey.config_set("maxmemory", "100mb")
            await valkey.config_set("maxmemory-policy", "allkeys-lru")
        refused = fleet.apis[fleet.start_api()]
        assert await refused.ended() == 2, "a wrong setting"
        last = refused.log.read_text().splitlines()[-1]
        assert last.startswith("tidegate: maxmemory-policy=allkeys-lru: Valkey must not evict")
        assert "Traceback" not in refused.log.read_text()


async def test_a_process_that_does_not_migrate_ends_at_a_url_that_no_server_accepts(
    tmp_path: Path,
) -> None:
    """It would wait for ever for what no time brings."""
    environment = {
        "PATH": os.environ["PATH"],
        "MIGRATE_AT_START": "0",
        "DATABASE_URL": "postgresql://nobody:word@127.0.0.1:1/nothing?sslmode=nonsense",
        "REDIS_URL": "redis://127.0.0.1:1",
        "GEMINI_API_KEY": "test",
        "DATA_DIR": str(tmp_path),
        "PYTHONPATH": "src",
    }
    command = (sys.executable, "-m", "tidegate", "worker")
    worker = await asyncio.create_subprocess_exec(*command, env=environment, stderr=PIPE)
    try:
        _, said = await asyncio.wait_for(worker.communicate(), 30)
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()
    assert worker.returncode == 2
    (line,) = said.decode().splitlines()
    assert line.startswith("tidegate: DATABASE_URL can't be used: `sslmode` parameter must be")
