"""What a tenant may keep in files for batches."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI

from tests.batching import ENDPOINT, content, end_of
from tests.gateway import Gateway, Opener
from tests.integration.batches.conftest import MakeSdk
from tests.waiting import wait_until

LEAST = 4_096  # that each file counts for
ROOM = {"max_batch_files_bytes": 3 * LEAST}


async def upload(client: AsyncOpenAI, given: bytes = content(1)) -> str:
    file = await client.files.create(file=("in.jsonl", given), purpose="batch")
    return str(file.id)


async def is_full(client: AsyncOpenAI, given: bytes = content(1)) -> bool:
    try:
        await upload(client, given)
    except openai.APIStatusError as error:
        return (error.status_code, error.code, error.param) == (413, "files_full", "file")
    return False


def blobs(gateway: Gateway) -> list[Path]:
    return [path for path in (gateway.config.data_dir / "blobs").rglob("*") if path.is_file()]


async def test_the_cap_holds_over_two_processes_and_a_deleted_file_makes_room(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateways = [await open_gateway(worker=False, **ROOM) for _ in range(2)]
    clients, other = [sdk(gateway) for gateway in gateways], sdk(gateways[0], "other")
    refused = await asyncio.gather(*(is_full(client) for _ in range(5) for client in clients))
    assert refused.count(False) == 3
    files = (await clients[0].files.list()).data
    assert len(files) == len(blobs(gateways[0])) == 3  # both keep theirs in one place
    assert not await is_full(other)
    await clients[0].files.delete(files[0].id)
    assert not await is_full(clients[1])
    assert await is_full(clients[1])


async def test_what_is_too_large_is_refused_before_it_has_come(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(worker=False, **ROOM)
    client = sdk(gateway)
    reader, writer = await asyncio.open_connection(*gateway.url.removeprefix("http://").split(":"))
    writer.write(
        b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    )
    told = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert told.startswith(b"HTTP/1.1 413")
    assert b"files_full" in told
    # Where the form says nothing of it, as soon as it is known.
    large = content(1).ljust(4 * LEAST)
    assert await is_full(client, large)
    assert not await is_full(client, large[: 3 * LEAST])
    assert len(blobs(gateway)) == 1


@pytest.mark.parametrize("cancels", [True, False])
async def test_a_file_that_is_deleted_before_its_batch_has_read_it_counts_until_then(
    open_gateway: Opener, sdk: MakeSdk, cancels: bool
) -> None:
    gateway = await open_gateway(worker=False, max_batch_files_bytes=LEAST)
    client = sdk(gateway)
    file_id = await upload(client)
    batch = await client.batches.create(
        input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h"
    )
    await client.files.delete(file_id)
    assert await is_full(client)
    assert len(blobs(gateway)) == 1
    (blob,) = blobs(gateway)
    if cancels:
        await client.batches.cancel(batch.id)
    gateway.start_worker()
    done = await end_of(client, batch)
    assert done.status == ("cancelled" if cancels else "completed")
    await wait_until(lambda: not blob.exists(), 20, "its bytes are gone")
    assert not await is_full(client)
