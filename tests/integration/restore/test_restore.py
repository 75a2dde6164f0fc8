"""The record is dumped while jobs run, restored into a server that knows nothing, and goes on."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from tests.clusters import copied
from tests.gateway import PNG, Gateway, Opener
from tests.waiting import wait_until
from tidegate.embedded import servers as place
from tidegate.embedded.servers import PostgresServer, ValkeyServer

_AFTER_RESTORE = "UPDATE requests SET ready_xid = 0 WHERE status = 'queued'"
_DOCUMENT = Path(__file__).parents[3] / "docs" / "operating.md"


def _program(name: str) -> str:
    """One of PostgreSQL's own, of the version that the server has."""
    return str(place.binaries_of(None) / name)


async def _run(*command: str) -> None:
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


async def _once(gateway: Gateway, key: str) -> str:
    """A job under an idempotency key."""
    body = {"data": f"Explain the tide [{key}]"}
    headers = {"Idempotency-Key": key}
    async with gateway.http.post(f"{gateway.url}/submit", json=body, headers=headers) as answer:
        assert answer.status in (200, 202)
        return str((await answer.json())["request_id"])


@pytest.fixture
async def new_server(tmp_path: Path) -> AsyncIterator[PostgresServer]:
    server = copied(tmp_path / "new")
    await asyncio.to_thread(server.start)
    yield server
    await asyncio.to_thread(server.stop)


async def _restored(dump: Path, into: str) -> None:
    """Into a server whose counter of transactions is far behind."""
    program = (_program("pg_restore"), "--exit-on-error", "--no-owner")
    await _run(*program, f"--dbname={into}", str(dump))
    connection = await asyncpg.connect(into)
    ahead = await connection.fetchval("SELECT max(ready_xid) FROM requests")
    assert ahead > await connection.fetchval("SELECT pg_current_xact_id()::text::bigint")
    await connection.close()


async def test_a_dump_of_a_working_record_is_restored_and_goes_on(
    new_server: PostgresServer,
    own_valkey: ValkeyServer,
    open_gateway: Opener,
    database_url: str,
    tmp_path: Path,
) -> None:
    dump, blobs = tmp_path / "tidegate.dump", tmp_path / "blobs"
    before = await open_gateway(rate_limits={"text_only": 1})
    await before.database.execute(
        "DO $$ BEGIN FOR i IN 1..3000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$"
    )
    done = await before.submit(data="Describe this", file=PNG)
    record = await before.end_of(done)
    named = await _once(before, "named")
    await before.end_of(named)
    await before.upstream.set_fault("hang", match="[running]")
    running = await before.submit(data="Explain the tide [running]")
    await wait_until(lambda: before.calls("[running]"), 20)
    waiting = [await before.submit(data=f"Explain the tide [waiting{n}]") for n in range(3)]
    # The order of the document: first the record, and then the files that it names.
    await _run(_program("pg_dump"), "--format=custom", f"--file={dump}", database_url)
    await asyncio.to_thread(shutil.copytree, tmp_path / "data" / "blobs", blobs)
    lost = await before.submit(data="Explain the tide [after the dump]")

    await _restored(dump, new_server.url())
    await asyncio.to_thread(shutil.copytree, blobs, tmp_path / "restored" / "blobs")
    after = await open_gateway(
        database_url=new_server.url(), redis_url=own_valkey.url, data_dir=tmp_path / "restored"
    )
    old = await after.status(done)
    assert (old["status"], old["text"]) == ("succeeded", record["text"])
    async with after.http.get(after.url + old["files"][0]["url"]) as answer:
        assert await answer.read() == PNG
    for request_id in (*waiting, running):
        assert (await after.end_of(request_id))["status"] == "succeeded"
    assert len(await after.calls("[running]")) == 1, "its claim had lapsed: it ran once more"
    assert await _once(after, "named") == named, "keys are remembered"
    new = await after.submit(data="Explain the tide [new]")
    assert (await after.end_of(new))["status"] == "succeeded"
    for marker in ("waiting0", "waiting1", "waiting2", "new"):
        assert len(await after.calls(f"[{marker}]")) == 1
    assert not await after.calls("[named]")
    assert (await after.get(f"/status/{lost}"))[0] == 404, "what came after the dump is gone"
    assert _AFTER_RESTORE in _DOCUMENT.read_text()
    await after.database.execute(_AFTER_RESTORE)
