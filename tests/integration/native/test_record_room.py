"""Room in the record: calls wait for it by the size of their own bodies."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until
from tidegate.store import audit
from tidegate.store.blobs import Blobs

MODEL = "gemini-2.5-flash"
CHAT = "/v1/chat/completions"
TEXT = random.Random(1).randbytes(600_000).hex()
ROOM_BYTES = 1_000_000


@asynccontextmanager
async def stopped_blobs(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """A blob store that takes nothing until the end of the block."""
    taking, put = asyncio.Event(), Blobs.put

    async def when_taking(self: Blobs, key: str, source: bytes | Path) -> None:
        await taking.wait()
        await put(self, key, source)

    monkeypatch.setattr(Blobs, "put", when_taking)
    monkeypatch.setattr(audit, "_BLOB_TIMEOUT_S", 120.0)
    monkeypatch.setattr(audit, "MAX_WAITING_BYTES", ROOM_BYTES)
    try:
        yield
    finally:
        taking.set()


async def status_of(gateway: Gateway, text: str, deadline_ms: int = 20_000) -> int:
    body = orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": text}]})
    headers = {"content-type": "application/json", "x-tidegate-deadline-ms": str(deadline_ms)}
    async with gateway.http.post(gateway.url + CHAT, data=body, headers=headers) as answer:
        await answer.read()
        return answer.status


async def until_recorded(gateway: Gateway, count: int) -> None:
    async def is_recorded() -> bool:
        found = await gateway.database.fetchval("SELECT count(*) FROM audit")
        return bool(found == count)

    await wait_until(is_recorded, 20, f"{count} rows")


async def test_small_calls_do_not_wait_for_the_record_of_large_bodies(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    async with stopped_blobs(monkeypatch):
        assert await status_of(gateway, TEXT) == 200
        assert await status_of(gateway, "Hi") == 200
        assert await status_of(gateway, TEXT, deadline_ms=50) == 503
        await until_recorded(gateway, 1)
    await until_recorded(gateway, 2)
    assert await status_of(gateway, TEXT) == 200
    await until_recorded(gateway, 3)


async def test_no_small_record_is_dropped_for_large_bodies(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False, audit_full="drop")
    async with stopped_blobs(monkeypatch):
        for text in (TEXT, "Hi", TEXT):
            assert await status_of(gateway, text) == 200
        await until_recorded(gateway, 1)
        assert gateway.services.store.audit.dropped == 1
    await until_recorded(gateway, 2)


async def test_a_large_body_that_is_written_makes_room_by_itself(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    taken, put = asyncio.Semaphore(0), Blobs.put

    async def one_each(self: Blobs, key: str, source: bytes | Path) -> None:
        await taken.acquire()
        await put(self, key, source)

    monkeypatch.setattr(Blobs, "put", one_each)
    monkeypatch.setattr(audit, "_BLOB_TIMEOUT_S", 120.0)
    for _ in range(3):
        assert await status_of(gateway, TEXT) == 200
    for count in (1, 2, 3):
        taken.release()
        await until_recorded(gateway, count)


async def test_many_large_bodies_make_small_calls_wait_too(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    async with stopped_blobs(monkeypatch):
        monkeypatch.setattr(audit, "MOST_WAITING_BYTES", ROOM_BYTES)
        assert await status_of(gateway, TEXT) == 200
        assert await status_of(gateway, "Hi", deadline_ms=50) == 503
    await until_recorded(gateway, 1)
