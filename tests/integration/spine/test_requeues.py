"""Failed jobs are queued again in bulk, under their own ids."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.commands import tidegate
from tests.gateway import Gateway, Opener
from tests.integration.spine.receiver import SECRET, Receiver, receiving
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, ask, key_of
from tests.loglines import Lines, lines
from tests.waiting import wait_until
from tidegate.jobs import webhooks as webhook

__all__ = ["lines"]

PATH = "/admin/requests/requeue"
HOUR = timedelta(hours=1)


async def order(gateway: Gateway, **more: Any) -> dict[str, Any]:
    since = (datetime.now(UTC) - HOUR).isoformat()
    async with gateway.http.post(gateway.url + PATH, json={"since": since, **more}) as answer:
        assert answer.status == 200, await answer.text()
        found: dict[str, Any] = await answer.json()
        return found


async def failures(gateway: Gateway, count: int, **more: Any) -> list[str]:
    """Jobs that the provider has refused with 500 as often as they may be tried."""
    await gateway.upstream.set_fault("internal")
    ids = [await gateway.submit(data=f"Explain tide {n}", **more) for n in range(count)]
    ended = await asyncio.gather(*(gateway.end_of(request_id) for request_id in ids))
    assert {one["status"] for one in ended} == {"failed"}
    await gateway.upstream.clear_faults()
    return ids


async def test_failed_jobs_are_previewed_queued_again_and_end_with_a_webhook(
    open_gateway: Opener, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "_POLL_EVERY_S", 0.02)
    async with receiving() as receiver:
        await requeued_with_webhooks(open_gateway, receiver, lines)


async def requeued_with_webhooks(open_gateway: Opener, receiver: Receiver, lines: Lines) -> None:
    gateway = await open_gateway(max_attempts=1, webhook_secret=SECRET, webhook_allow_private=True)
    ids = await failures(gateway, 3, webhook_url=receiver.url)
    other = await gateway.submit(data="Explain", webhook_url=receiver.url)
    assert (await gateway.end_of(other))["status"] == "succeeded"
    await wait_until(lambda: len(receiver.received) == 4)
    counted = await order(gateway)
    assert counted["by_code"] == {"upstream_unavailable": 3}
    assert (counted["matching"], counted["requeued"], counted["has_more"]) == (3, 0, False)
    assert (await gateway.status(ids[0]))["status"] == "failed", "a preview changes nothing"
    first = await order(gateway, dry_run=False, limit=2, by="ann", reason="the provider was out")
    assert (first["requeued"], first["has_more"]) == (2, True)

    async def two_succeeded() -> bool:
        ends = [await gateway.status(request_id) for request_id in ids]
        ends = [one for one in ends if one["status"] == "succeeded" and one["attempts"] == 1]
        return len(ends) == 2

    await wait_until(two_succeeded)
    (line,) = [one for one in lines() if one["event"] == "jobs_requeued"]
    assert (line["jobs"], line["by"]) == (2, "ann")
    rest = await order(gateway, dry_run=False)
    assert (rest["requeued"], rest["has_more"]) == (1, False)
    ends = [await gateway.end_of(request_id) for request_id in ids]
    assert {one["status"] for one in ends} == {"succeeded"}
    again = await order(gateway, dry_run=False)
    assert again["requeued"] == 0, "a repeat finds nothing more"
    # An end is told of each time; the record has both.
    await wait_until(lambda: len(receiver.received) == 7)
    ended = await gateway.database.fetch(
        "SELECT status FROM audit WHERE request_id = $1::uuid ORDER BY created_at", ids[0]
    )
    assert [row["status"] for row in ended] == ["failed", "succeeded"]
    numbers = [(row["number"], row["outcome"]) for row in await gateway.attempts(ids[0])]
    assert numbers == [(1, "failed"), (2, "succeeded")]


async def test_the_command_counts_first_and_queues_again_when_told(open_gateway: Opener) -> None:
    gateway = await open_gateway(max_attempts=1)
    (request_id,) = await failures(gateway, 1)
    wrong = await tidegate(gateway, "requeue", "--since", "yesterday")
    assert (wrong.code, "--since" in wrong.complained) == (2, True)
    counted = await tidegate(gateway, "requeue", "--since", "1h", "--dry-run", "--json")
    assert counted.json == {
        "matching": 1,
        "requeued": 0,
        "has_more": False,
        "by_code": {"upstream_unavailable": 1},
    }
    assert (await gateway.status(request_id))["status"] == "failed"
    done = await tidegate(gateway, "requeue", "--since", "1h", "--yes")
    assert (done.code, "1 of 1 job queued again" in done.said) == (0, True), done
    assert (await gateway.end_of(request_id))["status"] == "succeeded"


async def test_only_what_matches_is_queued_again(open_gateway: Opener) -> None:
    gateway = await open_gateway(max_attempts=1, worker=False)
    ids = [await gateway.submit(data="Explain", deadline_ms=60_000) for _ in range(4)]
    code = '{"code": "%s", "message": "no", "retryable": true}'
    ended = "UPDATE requests SET status = $2, failure = $3, finished_at = $4 WHERE id = $1::uuid"
    now = datetime.now(UTC)
    rows = [
        (ids[0], "failed", code % "upstream_timeout", now - 0.1 * HOUR),
        (ids[1], "failed", code % "upstream_timeout", now - 2 * HOUR),
        (ids[2], "failed", code % "fetch_refused", now - 0.1 * HOUR),
        (ids[3], "dead", code % "worker_died", now - 0.1 * HOUR),
    ]
    await gateway.database.executemany(ended, rows)
    assert (await order(gateway, tenant="acme"))["matching"] == 0
    assert (await order(gateway, status=["failed", "dead"]))["matching"] == 3
    assert (await order(gateway, error_code="upstream_timeout"))["matching"] == 1
    done = await order(gateway, error_code="upstream_timeout", dry_run=False)
    assert done["requeued"] == 1
    statuses = [(await gateway.status(request_id))["status"] for request_id in ids]
    assert statuses == ["queued", "failed", "failed", "dead"]
    await gateway.database.execute(ended, ids[2], "failed", "{}", now - 0.1 * HOUR)
    assert (await order(gateway))["by_code"] == {"": 1}
    assert (await order(gateway, error_code="", dry_run=False))["requeued"] == 1
    left_s = await gateway.database.fetchval(
        "SELECT extract(epoch FROM deadline_at - now()) FROM requests WHERE id = $1::uuid", ids[0]
    )
    assert 0 < left_s <= 60, "as long as it had when it was new"


async def test_a_job_that_is_queued_again_and_again_has_the_same_time(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    job = await gateway.submit(data="Explain", deadline_ms=60_000)
    await gateway.database.execute(
        "UPDATE requests SET created_at = created_at - interval '10 h',"
        " deadline_at = deadline_at - interval '10 h' WHERE id = $1::uuid",
        job,
    )
    for status in ("failed", "dead", "failed"):
        ended = "UPDATE requests SET status = $2, finished_at = now() WHERE id = $1::uuid"
        await gateway.database.execute(ended, job, status)
        since = (datetime.now(UTC) - HOUR).isoformat()
        again = {"since": since, "dry_run": False} if status == "failed" else None
        path = PATH if status == "failed" else f"/admin/dead/{job}/requeue"
        async with gateway.http.post(gateway.url + path, json=again) as answer:
            assert answer.status == 200
        left_s = "SELECT extract(epoch FROM deadline_at - now()) FROM requests WHERE id = $1::uuid"
        assert 0 < await gateway.database.fetchval(left_s, job) <= 60


@pytest.mark.parametrize("status", ["failed", "dead"])
async def test_what_its_earlier_end_has_used_is_not_counted_again(
    open_gateway: Opener, status: str
) -> None:
    gateway = await open_gateway(worker=False)
    job = await gateway.submit(data="Explain")
    await gateway.database.execute(
        "UPDATE requests SET status = $2, finished_at = now(), result = 'The tide', upstream = 'x',"
        " used_model = 'y', input_tokens = 7, output_tokens = 2, total_tokens = 9,"
        " finish_reason = 'STOP' WHERE id = $1::uuid",
        *(job, status),
    )
    path = PATH if status == "failed" else f"/admin/dead/{job}/requeue"
    since = (datetime.now(UTC) - HOUR).isoformat()
    again = {"since": since, "dry_run": False} if status == "failed" else None
    async with gateway.http.post(gateway.url + path, json=again) as answer:
        assert answer.status == 200
    async with gateway.http.delete(f"{gateway.url}/requests/{job}") as answer:
        assert answer.status == 200
    end = await gateway.status(job)
    told = {name: end.get(name) for name in ("status", "text", "finish_reason", "usage", "model")}
    assert told == {
        "status": "cancelled",
        "text": None,
        "finish_reason": None,
        "usage": None,
        "model": None,
    }
    row = await gateway.audit(job)
    assert [row[name] for name in ("input_tokens", "output_tokens", "upstream")] == [None] * 3


async def test_it_is_an_operators_and_its_fields_are_checked(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on", admin_token=ADMIN_TOKEN)
    key = await key_of(gateway, "acme")
    body = {"since": datetime.now(UTC).isoformat()}
    status, _ = await ask(gateway, "POST", PATH, key, body)
    assert status in (401, 403)
    for wrong, field in (
        ({}, "since"),
        (body | {"status": ["succeeded"]}, "status.0"),
        (body | {"limit": 10_001}, "limit"),
        (body | {"until": "2020-01-01T00:00:00Z"}, "until"),
        (body | {"unknown": 1}, "unknown"),
    ):
        status, problem = await ask(gateway, "POST", PATH, AS_ADMIN, wrong)
        assert (status, problem["field"]) == (400, field)
