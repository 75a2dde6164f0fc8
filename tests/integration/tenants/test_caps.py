"""What a tenant may do and how much: priorities, models, its queue, streams and long polls."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from tests.gateway import PNG, Opener
from tests.integration.tenants.asking import ask, key_of, submitted
from tests.waiting import wait_until
from tidegate.store import audit as relayed
from tidegate.store import jobs as queued


async def test_a_priority_over_the_cap_is_lowered_to_it(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    headers = await key_of(gateway, "acme", most_priority=-5)
    for given, kept in ((100, -5), (0, -5), (-50, -50)):
        request_id = await submitted(gateway, headers, data="Explain", priority=given)
        _, record = await ask(gateway, "GET", f"/status/{request_id}", headers)
        assert record["priority"] == kept
    body = {"text": "Explain", "priority": 90, "type": "text_only"}
    assert (await ask(gateway, "POST", "/stream", headers, body))[0] == 200

    async def recorded() -> Any:
        return await gateway.database.fetchval(
            "SELECT priority FROM requests WHERE source = 'stream'"
        )

    assert await wait_until(recorded, 20, "the stream's record") == -5


async def test_only_allowed_models_may_be_asked(open_gateway: Opener) -> None:
    gateway = await open_gateway(auth="on")
    headers = await key_of(gateway, "acme", models=["gemini-2.5-flash", "gemini-3-*"])
    for path, field in (("/submit", "data"), ("/stream", "text")):
        for model, code in (("gemini-3-pro", (200, 202)), ("gemini-2.5-pro", (403,))):
            body = {field: "Explain", "type": "text_only", "model": model}
            status, answer = await ask(gateway, "POST", path, headers, body)
            assert status in code, (path, model)
            if status == 403:
                assert (answer["code"], answer["field"]) == ("forbidden", "model")
                assert model in answer["detail"]
                assert answer["allowed"] == "gemini-2.5-flash, gemini-3-*"
        plain = {field: "Explain the tide", "type": "text_only"}
        assert (await ask(gateway, "POST", path, headers, plain))[0] in (200, 202)
        # The model of its kind is not allowed; and one that may turn out to need it.
        for text in ("Generate an image of a fox", "A lighthouse at dusk, oil on canvas"):
            status, answer = await ask(gateway, "POST", path, headers, {field: text})
            assert (status, answer["field"]) == (403, "model")
            assert "gemini-2.5-flash-image" in answer["detail"]
    files = {"data": "Draw over this", "file": PNG, "model": "x"}
    assert (await ask(gateway, "POST", "/submit", headers, files))[0] == 403
    assert [key async for day in _days(gateway) for key in day] == [], "its file is not kept"


async def _days(gateway: Any) -> Any:
    for day in await gateway.services.blobs.days():
        async for keys in gateway.services.blobs.keys_of(day):
            yield keys


async def test_the_cap_on_queued_jobs_holds_over_two_processes(open_gateway: Opener) -> None:
    """With half a second between two counts, as is: a job that the other process has admitted is
    stored by then."""
    first = await open_gateway(worker=False, auth="on")
    second = await open_gateway(worker=False, auth="on")
    acme = await key_of(first, "acme", most_queued_jobs=7)
    other = await key_of(first, "other")

    async def burst(headers: dict[str, str]) -> Counter[int]:
        answers = await asyncio.gather(
            *(
                ask(gateway, "POST", "/submit", headers, {"data": "Explain", "type": "text_only"})
                for _ in range(15)
                for gateway in (first, second)
            )
        )
        for status, answer in answers:
            if status == 429:
                assert (answer["code"], answer["limit"]) == ("quota_exceeded", "most_queued_jobs")
                assert answer["allowed"] == "at most 7 queued jobs at a time"
                assert answer["retry_after_ms"] >= 1
        return Counter(status for status, _ in answers)

    assert await burst(acme) == {202: 7, 429: 23}
    assert await burst(other) == {202: 30}
    assert await burst(acme) == {429: 30}, "counted anew, and still full"
    await first.database.execute(
        "UPDATE requests SET status = 'cancelled', finished_at = now() WHERE id IN ("
        "SELECT id FROM requests WHERE tenant_id = 'acme' LIMIT 3)"
    )

    count = "SELECT count(*) FROM requests WHERE tenant_id = 'acme' AND status = 'queued'"

    async def is_full_again() -> bool:
        await burst(acme)  # each process notices the room by itself
        queued_now = await first.database.fetchval(count)
        assert queued_now <= 7
        return bool(queued_now == 7)

    await wait_until(is_full_again, 20, "a queue that is full again")


async def test_a_count_includes_jobs_that_another_process_has_yet_to_store(
    open_gateway: Opener, database_url: str
) -> None:
    first = await open_gateway(worker=False, auth="on")
    second = await open_gateway(worker=False, auth="on")
    acme = await key_of(first, "acme", most_queued_jobs=7)

    async def burst(gateway: Any) -> list[int]:
        body = {"data": "Explain", "type": "text_only"}
        answers = [ask(gateway, "POST", "/submit", acme, body) for _ in range(7)]
        return [status for status, _ in await asyncio.gather(*answers)]

    async def decided() -> Any:
        return await first.database.fetchval("SELECT jobs FROM queued") == 7

    locker = await asyncpg.connect(database_url)
    async with locker.transaction():
        # Reads go on, and nothing is stored.
        await locker.execute("LOCK TABLE requests IN SHARE ROW EXCLUSIVE MODE")
        storing = asyncio.create_task(burst(first))
        await wait_until(decided, 20, "all of the first are admitted")
        await first.database.execute("UPDATE queued SET counted_at = 'epoch'")
        refused = await burst(second)
    assert refused == [429] * 7
    assert await storing == [202] * 7
    assert await first.database.fetchval("SELECT count(*) FROM requests") == 7
    assert await first.database.fetchval("SELECT count(*) FROM queue_arrivals") == 0
    await locker.close()


async def test_a_process_that_dies_before_it_stores_a_job_holds_no_place_for_long(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    acme = await key_of(gateway, "acme", most_queued_jobs=1)
    add = "INSERT INTO queue_arrivals (id, tenant_id, pool, jobs, size_bytes, admitted_at)"
    add += " VALUES (gen_random_uuid(), 'acme', 'gemini', 1, 10, now() - $1::interval)"
    body = {"data": "Explain", "type": "text_only"}
    await gateway.database.execute(add, timedelta(minutes=1))
    assert (await ask(gateway, "POST", "/submit", acme, body))[0] == 429
    await gateway.database.execute("UPDATE queue_arrivals SET admitted_at = now() - interval '1h'")
    await gateway.database.execute("UPDATE queued SET counted_at = 'epoch'")
    assert (await ask(gateway, "POST", "/submit", acme, body))[0] == 202
    assert await gateway.database.fetchval("SELECT count(*) FROM queue_arrivals") == 0


async def test_bytes_in_the_queue_count_prompts_and_files(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    headers = await key_of(gateway, "acme", most_queued_bytes=1_000)
    await submitted(gateway, headers, data="ä" * 200, file=PNG, type="multi_modal")
    row = await gateway.database.fetchrow("SELECT jobs, size_bytes FROM queued")
    assert tuple(row) == (1, 400 + len(PNG))
    big = {"data": "x" * 900, "type": "text_only"}
    status, answer = await ask(gateway, "POST", "/submit", headers, big)
    assert (status, answer["limit"]) == (429, "most_queued_bytes")
    await submitted(gateway, headers, data="x" * 400, type="text_only")
    # A row that is lost, as after a crash of the server, is counted anew, not begun at nothing.
    await gateway.database.execute("DELETE FROM queued")
    assert (await ask(gateway, "POST", "/submit", headers, big))[0] == 429
    await submitted(gateway, headers, data="x", type="text_only")
    row = await gateway.database.fetchrow("SELECT jobs, size_bytes FROM queued")
    assert tuple(row) == (3, 400 + len(PNG) + 400 + 1)


async def test_a_cap_that_comes_later_counts_what_is_there(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    headers = await key_of(gateway, "acme", most_queued_jobs=3)
    tenants = gateway.services.store.tenants
    await submitted(gateway, headers)
    await tenants.set("acme", {"most_queued_jobs": None}, by="test")
    await gateway.services.gate.refresh()
    for _ in range(5):
        await submitted(gateway, headers)
    await tenants.set("acme", {"most_queued_jobs": 6}, by="test")
    await gateway.services.gate.refresh()
    assert (await ask(gateway, "POST", "/submit", headers, {"data": "Explain"}))[0] == 429


async def test_counting_never_reads_the_queues_of_others(open_gateway: Opener) -> None:
    from tidegate.store.database import sql

    gateway = await open_gateway(worker=False)
    fill = (
        "INSERT INTO requests (id, tenant_id, pool, source, status, kind, classified_by, "
        "classified_reason, prompt, created_at) SELECT gen_random_uuid(), $1, 'gemini', 'job', "
        "'queued', 'text_only', 'rules', '', 'p', now() FROM generate_series(1, $2)"
    )
    await gateway.database.execute(fill, "greedy", 30_000)
    await gateway.database.execute(fill, "acme", 10)
    async with gateway.database.acquire() as connection, connection.transaction():
        await connection.execute("SET LOCAL enable_seqscan = off")
        for name in ("count_queued", "count_queued_bytes"):
            plan = await _plan(connection, sql(name), "acme", "gemini", queued._LANES, 10**6)
            assert "Seq Scan on requests" not in plan
            assert "requests_queue" in plan
            removed = [line for line in plan.splitlines() if "Rows Removed by Filter" in line]
            assert all(int(line.rpartition(" ")[2]) < 100 for line in removed), plan


async def _plan(connection: asyncpg.Connection, statement: str, *arguments: object) -> str:
    lines = await connection.fetch(f"EXPLAIN (ANALYZE, COSTS OFF) {statement}", *arguments)
    return "\n".join(line[0] for line in lines)


async def test_open_streams_are_capped_and_a_closed_one_makes_room(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    headers = await key_of(gateway, "acme", most_streams=1)
    await gateway.upstream.set_fault("hang", count=1)
    body = {"text": "Explain", "type": "text_only"}
    open_one = asyncio.create_task(ask(gateway, "POST", "/stream", headers, body))
    await gateway.in_flight(1)
    status, answer = await ask(gateway, "POST", "/stream", headers, body)
    assert (status, answer["limit"]) == (429, "most_streams")
    assert await submitted(gateway, headers), "jobs are no streams"
    open_one.cancel()
    await asyncio.gather(open_one, return_exceptions=True)

    async def has_room() -> bool:
        return (await ask(gateway, "POST", "/stream", headers, body))[0] == 200

    await wait_until(has_room, 20, "room for a stream")
    for bad in ({"text": ""}, {"nothing": "x"}):
        assert (await ask(gateway, "POST", "/stream", headers, bad))[0] == 400
    assert repr(gateway.services.openings) == "<Openings streams=0 polls=0>"


async def test_a_stream_that_the_record_had_no_room_for_is_not_open(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    headers = await key_of(gateway, "acme", most_streams=1)
    headers |= {"x-tidegate-deadline-ms": "50"}
    words = [{"role": "user", "content": "Hi"}]
    url, body = f"{gateway.url}/v1/chat/completions", {"model": "m", "messages": words}
    monkeypatch.setattr(relayed, "MAX_WAITING", 0)
    async with gateway.http.post(url, json=body | {"stream": True}, headers=headers) as full:
        assert full.status == 503
    assert repr(gateway.services.openings) == "<Openings streams=0 polls=0>"


async def test_long_polls_are_capped_and_plain_looks_are_not(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    headers = await key_of(gateway, "acme", most_long_polls=1)
    request_id = await submitted(gateway, headers)
    polling = asyncio.create_task(ask(gateway, "GET", f"/status/{request_id}?wait=30", headers))
    await wait_until(lambda: "polls=1" in repr(gateway.services.openings), 20, "the long poll")
    status, answer = await ask(gateway, "GET", f"/status/{request_id}?wait=30", headers)
    assert (status, answer["limit"]) == (429, "most_long_polls")
    assert (await ask(gateway, "GET", f"/status/{request_id}", headers))[0] == 200
    polling.cancel()
    await asyncio.gather(polling, return_exceptions=True)
    await wait_until(lambda: "polls=0" in repr(gateway.services.openings), 20, "its end")
