"""Jobs with near deadlines behind a backlog of their tenant, at a provider with little room."""

from __future__ import annotations

import pytest

from tests.gateway import Gateway, Opener

BACKLOG = """
    INSERT INTO requests (id, tenant_id, pool, source, status, kind, classified_by,
        classified_reason, prompt, created_at)
    SELECT gen_random_uuid(), 'default', 'gemini', 'job', 'queued', 'text_only', 'rules', '',
        'Explain the backlog', now() - interval '1 minute' + n * interval '1 ms'
    FROM generate_series(1, $1) AS n
"""
LEFT = "SELECT count(*) FROM requests WHERE status = 'queued' AND deadline_at IS NULL"


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_job_with_a_near_deadline_is_called_before_thousands_of_its_tenant(
    open_gateway: Opener, workers: int
) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 2})
    await gateway.upstream.set_behaviour(first_byte_ms={"text_only": 100})
    await gateway.database.execute(BACKLOG, 3_000)
    for _ in range(workers):
        await gateway.start_ready_worker()
    await gateway.in_flight(2)
    await all_succeed(gateway, await submit_urgent(gateway))


async def test_a_worker_that_starts_calls_jobs_with_near_deadlines_first(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 2})
    await gateway.upstream.set_behaviour(first_byte_ms={"text_only": 100})
    await gateway.database.execute(BACKLOG, 3_000)
    await gateway.start_ready_worker()
    await gateway.in_flight(2)
    await gateway.stop_worker()
    ids = await submit_urgent(gateway)
    await gateway.start_ready_worker()
    await all_succeed(gateway, ids)


async def submit_urgent(gateway: Gateway) -> list[str]:
    return [await gateway.submit(data="Explain the tide", deadline_ms=20_000) for _ in range(6)]


async def all_succeed(gateway: Gateway, ids: list[str]) -> None:
    """All succeed before their deadlines, while the backlog waits."""
    for request_id in ids:
        record = await gateway.end_of(request_id, 40)
        assert record["status"] == "succeeded", record
    assert await gateway.database.fetchval(LEFT) > 2_000
