"""What waits for an operator's decision, and the decisions."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from tests.gateway import Gateway, Opener
from tests.integration.spine.receiver import SECRET
from tidegate.store.jobs import StuckCounts


async def listed(gateway: Gateway, path: str) -> list[dict[str, Any]]:
    async with gateway.http.get(f"{gateway.url}/admin{path}") as answer:
        assert answer.status == 200
        found: list[dict[str, Any]] = await answer.json()
        return found


async def decided(gateway: Gateway, path: str) -> int:
    async with gateway.http.post(f"{gateway.url}/admin{path}") as answer:
        return answer.status


async def died(gateway: Gateway, prompt: str) -> str:
    """A job as the record has it once its workers have died under it three times."""
    request_id = await gateway.submit(data=prompt, webhook_url="https://example.com/hook")
    failure = '{"code": "worker_lost", "message": "its workers died", "retryable": false}'
    await gateway.database.execute(
        "UPDATE requests SET status = 'dead', lapses = 3, finished_at = now(), failure = $2"
        " WHERE id = $1::uuid",
        *(request_id, failure),
    )
    return request_id


async def test_dead_jobs_are_listed_requeued_and_discarded(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, webhook_secret=SECRET)
    assert await listed(gateway, "/dead") == []
    first, second = [await died(gateway, f"Explain tide {n}") for n in range(2)]
    newest, older = await listed(gateway, "/dead")
    assert (newest["request_id"], older["request_id"]) == (second, first)
    assert (newest["problem"], newest["lapses"]) == ("its workers died", 3)
    assert await decided(gateway, f"/dead/{first}/discard") == 200
    assert (await gateway.status(first))["status"] == "cancelled"
    assert await decided(gateway, f"/dead/{second}/requeue") == 200
    gateway.start_worker()
    assert (await gateway.end_of(second))["status"] == "succeeded"
    assert (await gateway.status(first))["status"] == "cancelled"
    for unknown in (first, second, uuid4()):
        for verb in ("requeue", "discard"):
            assert await decided(gateway, f"/dead/{unknown}/{verb}") == 404


async def test_a_dead_job_is_queued_again_with_all_its_attempts_and_its_whole_time(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, max_attempts=2, webhook_secret=SECRET)
    job = await died(gateway, "Explain the tide")
    await gateway.database.execute(
        "UPDATE requests SET attempts = 2, created_at = now() - interval '2 minutes',"
        " deadline_at = now() - interval '1 minute', admitted_at = now(), queue_ms = 1,"
        " upstream_ms = 2, first_byte_ms = 3 WHERE id = $1::uuid",
        job,
    )
    assert await decided(gateway, f"/dead/{job}/requeue") == 200
    queued = await gateway.status(job)
    calls = queued.keys() & {"admitted_at", "queue_ms", "upstream_ms", "first_byte_ms"}
    assert (queued["status"], calls) == ("queued", set()), "nothing of the call that it died over"
    await gateway.upstream.set_fault("internal", count=1)
    gateway.start_worker()
    record = await gateway.end_of(job)
    assert (record["status"], record["attempts"]) == ("succeeded", 2)


async def test_a_worker_counts_as_alive_for_as_long_as_its_claims(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, claim_lease_ms=9_000)
    await gateway.submit(data="Explain")
    stuck = gateway.services.store.stuck
    for silent_s, workers in ((2, 1), (20, 0)):
        await gateway.database.execute(
            "INSERT INTO workers (instance_id, seen_at)"
            " VALUES ('hung', now() - $1 * interval '1 s')"
            " ON CONFLICT (instance_id) DO UPDATE SET seen_at = excluded.seen_at",
            float(silent_s),
        )
        counts = await stuck.counts()
        assert (counts.ready, counts.workers) == (1, workers)
    seen = await gateway.services.standing.verdict()
    assert [cause.kind for cause in seen.causes] == ["no_workers"]


async def test_jobs_that_wait_for_a_retry_are_counted_and_those_that_wait_for_a_tier_are_not(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    failure = '{"code": "upstream_unavailable", "message": "no answer", "retryable": true}'
    for one in (failure, failure, None):
        await gateway.database.execute(
            "UPDATE requests SET not_before = now() + interval '1 h', failure = $2"
            " WHERE id = $1::uuid",
            *(await gateway.submit(data="Explain"), one),
        )
    counts = await gateway.services.store.stuck.counts()
    assert (counts.ready, counts.retrying) == (0, 2)
    seen = await gateway.services.standing.verdict()
    assert seen.sentence == "Healthy: 2 jobs are queued for a retry."


async def test_webhooks_given_up_are_listed_and_redelivered(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    request_id = await gateway.submit(data="Explain")
    await gateway.database.execute(
        "INSERT INTO webhooks (id, request_id, pool, event, url, state, tries, problem, ended_at)"
        " VALUES ($1, $2::uuid, 'gemini', 'request.succeeded', 'https://example.com/hook',"
        " 'given_up', 8, 'no such host', now())",
        *(uuid4(), request_id),
    )
    (hook,) = await listed(gateway, "/webhooks")
    assert (hook["request_id"], hook["event"]) == (request_id, "request.succeeded")
    assert (hook["problem"], hook["tenant"]) == ("no such host", "default")
    counts = await gateway.services.store.stuck.counts()
    assert counts == StuckCounts(jobs=0, dead_since=None, webhooks=1, ready=1, workers=0)
    told = {"dead_jobs": 0, "webhooks_given_up": 1}
    assert await gateway.get("/dashboard/stuck") == (200, told)
    assert await decided(gateway, f"/webhooks/{hook['webhook_id']}/redeliver") == 200
    assert await listed(gateway, "/webhooks") == []
