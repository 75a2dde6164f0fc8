"""What the record has of a batch's lines, at each moment and after a worker was lost."""

from __future__ import annotations

import orjson

from tests.batching import begin, content, end_of, lines_of
from tests.gateway import Gateway, Opener
from tests.integration.batches.conftest import MakeSdk
from tests.waiting import wait_until

LINES = 60
# In one statement, and so in one snapshot.
ENDED = "SELECT completed + failed AS ended, (SELECT count(*) FROM audit) AS recorded FROM batches"
RECORDED = "SELECT status, failure, usage_state, attempts, model FROM audit"
LOST = """
    UPDATE batch_lines SET claimed_by = 'lost', claim = claim + 1 WHERE state = 'calling'
    RETURNING custom_id
"""


async def test_a_line_that_has_ended_is_on_record_at_that_moment(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    """So that no kill comes between the two."""
    gateway = await open_gateway(rate_limits={"text_only": 8})
    await gateway.upstream.set_fault("blocked_prompt", match="word7.")
    await begin(sdk(gateway), content(LINES))

    async def all_ended() -> bool:
        row = await gateway.database.fetchrow(ENDED)
        assert row["ended"] == row["recorded"]
        return bool(row["ended"] == LINES)

    await wait_until(all_ended, 60)
    totals = "SELECT sum(requests) FROM usage_days"
    assert await gateway.database.fetchval(totals) == LINES


async def test_a_call_whose_worker_was_lost_before_its_batch_was_cancelled_is_ambiguous(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 2})
    client = sdk(gateway)
    await gateway.upstream.set_fault("hang")
    batch = await begin(client, content(6))
    await gateway.in_flight(2)
    await _both_marked(gateway)
    await client.batches.cancel(batch.id)
    lost = {row["custom_id"] for row in await gateway.database.fetch(LOST)}
    assert len(lost) == 2
    done = await end_of(client, batch)
    assert done.status == "cancelled"
    rows = await gateway.database.fetch(RECORDED)
    assert [(row["status"], row["usage_state"], row["attempts"]) for row in rows] == [
        ("cancelled", "unknown", 1)
    ] * 2
    assert {orjson.loads(row["failure"])["code"] for row in rows} == {"ambiguous"}
    assert {row["model"] for row in rows} == {"gemini-2.5-flash"}
    said = {one["custom_id"]: one for one in await lines_of(client, done.error_file_id)}
    assert len(said) == 6
    for custom_id, one in said.items():
        assert one["error"]["code"] == "batch_cancelled"
        assert ("is not known" in one["error"]["message"]) is (custom_id in lost)


async def _both_marked(gateway: Gateway) -> None:
    calling = "SELECT count(*) = 2 FROM batch_lines WHERE state = 'calling'"
    await wait_until(lambda: gateway.database.fetchval(calling))
