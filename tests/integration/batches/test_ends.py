"""How batches end that do not come to their end: what is done is kept, and what is not is told."""

from __future__ import annotations

import pytest

from tests import batching
from tests.gateway import Opener
from tests.integration.batches.conftest import MakeSdk
from tests.waiting import wait_until

LINES = 40
_EXPIRE = "UPDATE batches SET expires_at = now()"


@pytest.mark.parametrize("how", ["expired", "cancelled"])
async def test_a_batch_ends_while_none_of_its_lines_may_go(
    open_gateway: Opener, sdk: MakeSdk, how: str
) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 1})
    client = sdk(gateway)
    await gateway.upstream.set_fault("day_quota", match="word5.")  # who meets it waits to midnight
    batch = await batching.begin(client, batching.content(LINES))

    async def refused() -> bool:
        return any(call.outcome is not None for call in await gateway.calls("word5."))

    await wait_until(refused, 20, "the end of the quota")
    if how == "expired":
        await gateway.database.execute(_EXPIRE)
    else:
        await client.batches.cancel(batch.id)
    done = await batching.end_of(client, batch, 10)
    assert done.status == how
    assert (done.expired_at if how == "expired" else done.cancelled_at) is not None
    counts = done.request_counts
    assert counts is not None
    said = await batching.lines_of(client, done.output_file_id)
    errors = await batching.lines_of(client, done.error_file_id)
    assert len(said) == counts.completed < LINES
    assert {one["error"]["code"] for one in errors} == {f"batch_{how}"}
    assert {one["response"] and one["response"]["status_code"] for one in errors} == {None}
    ids = [one["custom_id"] for one in said + errors]
    assert sorted(ids) == sorted(f"id-{number}" for number in range(LINES))
    called = [call for call in await gateway.calls("Say word") if call.outcome == "finished"]
    assert len({call.prompt for call in called}) == len(called) == len(said)


@pytest.mark.parametrize("how", ["expired", "cancelled"])
async def test_a_batch_that_no_worker_has_read_names_each_line_as_well(
    open_gateway: Opener, sdk: MakeSdk, how: str
) -> None:
    gateway = await open_gateway(worker=False)
    client = sdk(gateway)
    batch = await batching.begin(client, batching.content(3))
    if how == "expired":
        await gateway.database.execute(_EXPIRE)
    else:
        await client.batches.cancel(batch.id)
    gateway.start_worker()
    done = await batching.end_of(client, batch, 10)
    assert (done.status, done.output_file_id) == (how, None)
    errors = await batching.lines_of(client, done.error_file_id)
    assert [one["custom_id"] for one in errors] == ["id-0", "id-1", "id-2"]
    assert {one["error"]["code"] for one in errors} == {f"batch_{how}"}
    assert await gateway.calls() == []


async def test_a_line_whose_workers_died_thrice_fails_alone(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(claim_lease_ms=600)
    client = sdk(gateway)
    await gateway.upstream.set_fault("hang", match="word1.")
    batch = await batching.begin(client, batching.content(3))

    async def taken() -> bool:
        """As two workers left it that died, and a third one that is gone now."""
        changed = await gateway.database.execute(
            "UPDATE batch_lines SET lapses = 2, claim = claim + 1, claimed_by = 'gone' "
            "WHERE custom_id = 'id-1' AND state = 'calling'"
        )
        return bool(changed == "UPDATE 1")

    await wait_until(taken, 20, "the call that hangs")
    done = await batching.end_of(client, batch)
    counts = done.request_counts
    assert counts is not None
    assert (done.status, counts.completed, counts.failed) == ("completed", 2, 1)
    (failed,) = await batching.lines_of(client, done.error_file_id)
    assert (failed["custom_id"], failed["response"]) == ("id-1", None)
    assert failed["error"]["code"] == "worker_lost"
    said = await batching.lines_of(client, done.output_file_id)
    assert [one["custom_id"] for one in said] == ["id-0", "id-2"]


async def test_a_worker_makes_one_last_try_of_a_line_at_a_time(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway(claim_lease_ms=600)
    client = sdk(gateway)
    for number in range(3):
        await gateway.upstream.set_fault("hang", match=f"word{number}.")
    batch = await batching.begin(client, batching.content(8))

    async def put_off() -> bool:
        count = "SELECT count(*) FROM batch_lines WHERE lapses = 2 AND not_before IS NOT NULL"
        return bool(await gateway.database.fetchval(count) == 2)

    async def others() -> bool:
        return await batching.completed(client, batch) == 5

    await wait_until(others, 20, "the other lines")
    await gateway.in_flight(3)
    # As a second dead worker left those that hang: all come back in one moment.
    changed = await gateway.database.execute(
        "UPDATE batch_lines SET lapses = 1, claim = claim + 1, claimed_by = 'gone' "
        "WHERE state = 'calling'"
    )
    assert changed == "UPDATE 3"
    await wait_until(put_off, 20, "two that wait for the last try of a third")

    async def called() -> bool:
        calls = [call for number in range(3) for call in await gateway.calls(f"word{number}.")]
        return len(calls) == 4

    await wait_until(called, 20, "the last try of one")
    assert await put_off()


async def test_batches_and_their_files_are_kept_for_their_tenants_days(
    open_gateway: Opener, sdk: MakeSdk
) -> None:
    gateway = await open_gateway()
    store = gateway.services.store
    await store.tenants.set("short", {"retention_days": 3}, by="test")
    await store.tenants.set("long", {"retention_days": 90}, by="test")
    clients = {tenant: sdk(gateway, tenant) for tenant in ("short", "default", "long")}
    for client in clients.values():
        batch = await batching.begin(client, batching.content(1))
        await batching.end_of(client, batch)

    async def left_after(days: int) -> dict[str, tuple[int, int]]:
        await gateway.database.execute(
            "UPDATE batches SET completed_at = now() - make_interval(days => $1)", days
        )
        await gateway.database.execute(
            "UPDATE batch_files SET created_at = now() - make_interval(days => $1)", days
        )
        await store.retention.prune(30)
        return {
            tenant: (len((await client.batches.list()).data), len((await client.files.list()).data))
            for tenant, client in clients.items()
        }

    assert await left_after(2) == {"short": (1, 2), "default": (1, 2), "long": (1, 2)}
    assert await left_after(10) == {"short": (0, 0), "default": (1, 2), "long": (1, 2)}
    assert await left_after(50) == {"short": (0, 0), "default": (0, 0), "long": (1, 2)}
    assert await left_after(100) == {"short": (0, 0), "default": (0, 0), "long": (0, 0)}
