"""A worker by itself, probed: alive all along, ready only while it takes jobs."""

from __future__ import annotations

import re
import signal
from functools import partial
from pathlib import Path

from tests.gateway import Gateway, Opener
from tests.integration.observability.test_shared import running
from tests.waiting import wait_until
from tidegate.embedded.servers import PostgresServer, ValkeyServer


async def readiness(gateway: Gateway, url: str) -> tuple[int, str]:
    """The status of the answer, and why it is not ready."""
    async with gateway.http.get(f"{url}/health/ready") as response:
        return response.status, (await response.json()).get("reason", "")


async def is_live(gateway: Gateway, url: str) -> bool:
    async with gateway.http.get(f"{url}/health/live") as response:
        return response.status == 200


async def test_a_worker_is_ready_with_both_stores_until_it_is_told_to_stop(
    open_gateway: Opener, own_valkey: ValkeyServer, own_postgres: PostgresServer, tmp_path: Path
) -> None:
    gateway = await open_gateway(
        worker=False, redis_url=own_valkey.url, database_url=own_postgres.url()
    )
    await gateway.upstream.set_fault("hang", match="hang")
    with running(gateway, tmp_path, "worker", WORKER_PORT="0", SHUTDOWN_GRACE_MS="8000") as worker:
        log = tmp_path / "log"

        def told() -> str | None:
            found = re.search(r'"url":"http://localhost:(\d+)"', log.read_text())
            return f"http://127.0.0.1:{found[1]}" if found else None

        url: str = await wait_until(told, 20, "it says where it answers")

        async def is_ready() -> bool:
            return (await readiness(gateway, url))[0] == 200

        await wait_until(is_ready, 20, "it is ready")

        async def lacks(name: str) -> bool:  # a probe may be a quarter of a second old
            status, reason = await readiness(gateway, url)
            return (status, reason.partition(":")[0]) == (503, name)

        for name, store in (("Valkey", own_valkey), ("PostgreSQL", own_postgres)):
            store.pause()
            try:
                await wait_until(partial(lacks, name), 20, f"{name} is missed")
                assert await is_live(gateway, url), f"{name} is not its fault"
            finally:
                store.resume()
            await wait_until(is_ready, 20, f"{name} is back")

        await gateway.submit(data="Explain the tide [hang]")
        await gateway.in_flight(1)
        worker.send_signal(signal.SIGTERM)

        async def drains() -> bool:
            return await readiness(gateway, url) == (503, "draining")

        await wait_until(drains, 20, "it drains")
        assert await is_live(gateway, url), "its last job is still running"
        assert worker.poll() is None
