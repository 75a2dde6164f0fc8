"""Erasing a tenant takes its batches too."""

from __future__ import annotations

import orjson
from openai import AsyncOpenAI

from tests.gateway import Opener
from tests.integration.batches.conftest import MakeSdk
from tests.waiting import wait_until
from tidegate.store.retention import Whose

SECRET = "Rumpelstiltskin"


def lines(count: int) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": SECRET}]}
    return b"\n".join(
        orjson.dumps(
            {
                "custom_id": f"id-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
        )
        for number in range(count)
    )


async def made(client: AsyncOpenAI) -> str:
    file = await client.files.create(file=("lines.jsonl", lines(3)), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    return str(batch.id)


async def test_a_tenants_batches_go_with_it_and_nobody_elses(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway()
    acme, other = sdk(gateway, "acme"), sdk(gateway, "other")
    mine, theirs = await made(acme), await made(other)

    async def ended() -> bool:
        batches = [await acme.batches.retrieve(mine), await other.batches.retrieve(theirs)]
        return {batch.status for batch in batches} == {"completed"}

    await wait_until(ended, 20, "both batches")
    await wait_until(lambda: gateway.database.fetchval("SELECT count(*) = 6 FROM audit"), 20)
    counted = await gateway.services.store.retention.erase(Whose("acme"), dry_run=True, within_s=20)
    assert (counted.batches, counted.calls, counted.done) == (1, 3, False)
    report = await gateway.services.store.retention.erase(Whose("acme"), dry_run=False, within_s=20)
    assert (report.batches, report.calls, report.done) == (1, 3, True)
    for table, left in (("batches", 1), ("batch_files", 2), ("audit", 3)):
        rows = await gateway.database.fetch(f"SELECT DISTINCT tenant_id FROM {table}")
        assert [row["tenant_id"] for row in rows] == ["other"], table
        count = await gateway.database.fetchval(f"SELECT count(*) FROM {table}")
        assert count == left, table
    blobs = [path for path in (gateway.config.data_dir / "blobs").rglob("*") if path.is_file()]
    assert sum(SECRET in path.read_text(errors="replace") for path in blobs) == 2
