"""`/admin/requests`: who gets in, what is shown of a request of any tenant, what is done to it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson
import pytest
from openai import AsyncOpenAI

from tests.batching import begin, jsonl, line
from tests.gateway import PNG, Gateway, Opener
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, ask, key_of, submitted
from tests.loglines import Lines, lines
from tests.waiting import wait_until
from tidegate.call import Scope

__all__ = ["lines"]

CHAT = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": "Say hello"}]}


async def listed(gateway: Gateway, query: str = "") -> list[dict[str, Any]]:
    _, page = await ask(gateway, "GET", f"/admin/requests{query}", AS_ADMIN)
    items: list[dict[str, Any]] = page["items"]
    return items


async def life(gateway: Gateway, request_id: str) -> dict[str, Any]:
    status, found = await ask(gateway, "GET", f"/admin/requests/{request_id}", AS_ADMIN)
    assert status == 200, found
    view: dict[str, Any] = found
    return view


async def ended(gateway: Gateway, request_id: str) -> dict[str, Any]:
    async def over() -> dict[str, Any] | None:
        view = await life(gateway, request_id)
        return view if view["request"].get("finished_at") else None

    view: dict[str, Any] = await wait_until(over, 15, f"the end of {request_id}")
    return view


async def test_a_tenants_key_opens_nothing_here_and_admins_see_all_tenants(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(auth="on", admin_token=ADMIN_TOKEN)
    acme, other = [await key_of(gateway, name) for name in ("acme", "other")]
    job = await submitted(gateway, acme, data="Explain the tide", subject="ann")
    status, _ = await ask(gateway, "POST", "/v1/chat/completions", other, CHAT)
    assert status == 200
    await ended(gateway, job)

    async def both() -> list[dict[str, Any]] | None:
        items = await listed(gateway)
        return items if len(items) == 2 else None

    native, of_acme = await wait_until(both, 20, "both on the record")
    assert (native["tenant"], native["source"], native["endpoint"]) == (
        *("other", "relay", "/v1/chat/completions"),
    )
    assert (of_acme["request_id"], of_acme["tenant"], of_acme["subject"]) == (job, "acme", "ann")
    assert [one["tenant"] for one in await listed(gateway, "?tenant=acme&status=succeeded")] == [
        "acme"
    ]
    assert await listed(gateway, "?status=queued&status=failed") == []
    assert [one["source"] for one in await listed(gateway, f"?id={job[:23]}")] == ["job"]
    for method, path in (
        *(("GET", ""), ("GET", f"/{job}"), ("GET", f"/{job}/request"), ("GET", f"/{job}/response")),
        ("GET", f"/{job}/files/{uuid4()}"),
        *(("POST", f"/{job}/{what}") for what in ("cancel", "retry")),
    ):
        for headers in (acme, other):
            assert (await ask(gateway, method, f"/admin/requests{path}", headers))[0] == 403, path
    view = await life(gateway, native["request_id"])
    assert view["actions"] == ["replay"]
    assert view["request"]["key"] == other["Authorization"].removeprefix("Bearer tg_")[:10]
    assert [body["role"] for body in view["bodies"]] == ["request", "response"]
    status, raw = await ask(
        gateway, "GET", f"/admin/requests/{native['request_id']}/request", AS_ADMIN
    )
    assert (status, raw) == (200, CHAT)


async def test_a_list_has_the_key_the_cost_and_how_the_prompt_begins(
    open_gateway: Opener, tmp_path: Path
) -> None:
    policy = tmp_path / "tidegate.toml"
    policy.write_text('[upstreams.gemini.prices]\n"*" = { input = 0.30, output = 2.50 }\n')
    gateway = await open_gateway(auth="on", admin_token=ADMIN_TOKEN, tidegate_policy=policy)
    acme = await key_of(gateway, "acme")
    _, made = await gateway.services.store.tenants.create_key("acme", scopes=[Scope.VIEWER])
    viewer = {"Authorization": f"Bearer {made.text}"}
    said = "Explain the tide of Oostende " * 40
    await ended(gateway, await submitted(gateway, acme, data=said))
    await ended(gateway, await submitted(gateway, acme, endpoint="/v1/chat/completions", body=CHAT))
    assert (await ask(gateway, "POST", "/v1/chat/completions", acme, CHAT))[0] == 200
    key = acme["Authorization"].removeprefix("Bearer ")
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key) as client:
        await begin(client, jsonl([line("a", "Say hello")]))

    async def shown(query: str = "") -> list[dict[str, Any]] | None:
        items = await listed(gateway, query)
        return items if len(items) == 4 and all("finished_at" in one for one in items) else None

    items = await wait_until(shown, 20, "all on the record")
    assert [(one["source"], one.get("prompt")) for one in items] == [
        *(("batch", "Say hello"), ("relay", "Say hello"), ("job", "Say hello")),
        ("job", said[:500]),
    ]
    assert {one["key"] for one in items} == {key.removeprefix("tg_")[:10]}
    for one in items:
        found = (await life(gateway, one["request_id"]))["request"]
        assert one["cost_micros"] == found["cost_micros"] > 0
    by_words = await listed(gateway, "?text=oostende")
    assert [(one["prompt"], one["cost_micros"]) for one in by_words] == [
        (said[:500], items[-1]["cost_micros"])
    ]
    named = key[:13]  # as pages and logs name it, the former with a sign that there is more
    for text in (named, named[3:], named[:9], f"{named}…", key):
        assert await listed(gateway, f"?text={text}") == await listed(gateway, f"?text={named[3:]}")
        assert len(await listed(gateway, f"?text={text}")) == 4, text
    status, page = await ask(gateway, "GET", "/admin/requests", viewer)
    assert (status, [one.get("prompt") for one in page["items"]]) == (200, [None] * 4)
    assert all(one["cost_micros"] > 0 for one in page["items"])
    await ask(gateway, "POST", "/admin/limits/kind:text_only/pause", AS_ADMIN, {"by": "ann"})
    await submitted(gateway, acme, data="Not yet", type="text_only")
    newest = (await listed(gateway))[0]
    assert newest["prompt"] == "Not yet"
    assert "cost_micros" not in newest
    await ask(gateway, "POST", "/admin/limits/kind:text_only/resume", AS_ADMIN, {})


async def test_one_that_waits_says_for_what_and_is_cancelled(
    open_gateway: Opener, lines: Lines
) -> None:
    gateway = await open_gateway(admin_token=ADMIN_TOKEN)
    pause = {"by": "ann", "reason": "the provider is ill"}
    await ask(gateway, "POST", "/admin/limits/kind:text_only/pause", AS_ADMIN, pause)
    job = await gateway.submit(data="Explain", type="text_only")

    async def waits() -> dict[str, Any] | None:
        view = await life(gateway, job)
        return view if (view["waiting"] or {}).get("held_up_by") else None

    view = await wait_until(waits, 20, "the job at the limit")
    assert view["waiting"]["held_up_by"] == "kind:text_only"
    assert "is paused by ann: the provider is ill" in view["waiting"]["sentence"]
    assert view["actions"] == ["cancel"]
    assert [(step["what"], step["goes_on"]) for step in view["timeline"]] == [
        *(("submitted", False), ("classified", False), ("waiting", True)),
    ]
    assert view["request"]["prompt"] == "Explain"
    who = {"by": "ann", "reason": "a mistake"}
    path = f"/admin/requests/{job}"
    status, shown = await ask(gateway, "POST", f"{path}/cancel", AS_ADMIN, who)
    assert (status, shown["status"]) == (200, "cancelled")
    said = [line for line in lines() if line["event"] == "request_cancelled"]
    assert [(line["request_id"], line["by"], line["reason"]) for line in said] == [
        (job, "ann", "a mistake")
    ]
    view = await life(gateway, job)
    assert view["advice"].startswith("It was cancelled.")
    assert "waiting" not in view
    await ask(gateway, "POST", "/admin/limits/kind:text_only/resume", AS_ADMIN, {})


@pytest.mark.parametrize("wraps", [False, True], ids=["prompt", "native"])
async def test_a_job_outlasts_a_pause_that_has_no_end(open_gateway: Opener, wraps: bool) -> None:
    gateway = await open_gateway(admin_token=ADMIN_TOKEN)
    pause = {"by": "ann", "reason": "the provider is ill"}
    await ask(gateway, "POST", "/admin/limits/kind:text_only/pause", AS_ADMIN, pause)
    if wraps:
        job = await gateway.submit(endpoint="/v1/chat/completions", body=CHAT)
    else:
        job = await gateway.submit(data="Explain", type="text_only")

    async def waits() -> bool:
        view = await life(gateway, job)
        return bool((view.get("waiting") or {}).get("held_up_by"))

    await wait_until(waits, 20, "the job at the limit")
    await ask(gateway, "POST", "/admin/limits/kind:text_only/resume", AS_ADMIN, {})
    assert (await ended(gateway, job))["request"]["status"] == "succeeded"


async def test_attempts_are_told_with_what_went_wrong_and_the_wait_between(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(admin_token=ADMIN_TOKEN)
    await gateway.upstream.set_fault("throttled", count=1, retry_after_s=0.2)
    job = await gateway.submit(data="Explain", type="text_only")
    view = await ended(gateway, job)
    assert [(one["number"], one["outcome"]) for one in view["attempts"]] == [
        (1, "failed"),
        (2, "succeeded"),
    ]
    assert view["attempts"][0]["error"]["code"] == "upstream_throttled"
    whats = [step["what"] for step in view["timeline"]]
    assert whats == [
        *("submitted", "classified", "waiting", "calling", "parked", "waiting", "calling"),
        "ended",
    ]
    times = [step["at"] for step in view["timeline"]]
    assert times == sorted(times)
    assert view["request"]["usage_state"] == "told"
    assert view["request"]["text"]


async def test_a_retry_is_a_job_of_its_own_with_files_of_its_own(open_gateway: Opener) -> None:
    gateway = await open_gateway(admin_token=ADMIN_TOKEN)
    first = await gateway.submit(data="What is in it?", file=PNG, priority=3, subject="ann")
    view = await ended(gateway, first)
    status, anew = await ask(gateway, "POST", f"/admin/requests/{first}/retry", AS_ADMIN, {})
    assert (status, anew["status"]) == (202, "queued")
    second = anew["request_id"]
    again = await ended(gateway, second)
    for name in ("prompt", "priority", "subject", "type", "classified_by", "tenant"):
        assert again["request"][name] == view["request"][name], name
    keys = await gateway.database.fetch("SELECT blob_key FROM files WHERE role = 'input'")
    assert len({row["blob_key"] for row in keys}) == 2
    (file,) = again["request"]["files"]
    status, data = await ask(gateway, "GET", file["url"], AS_ADMIN)
    assert (status, data) == (200, PNG)
    assert first in file["url"] or second in file["url"]
    stranger = file["url"].replace(second, first)
    assert (await ask(gateway, "GET", stranger, AS_ADMIN))[0] == 404, "a file of another request"


@pytest.mark.parametrize(
    ("source", "status", "code"), [("job", 409, "not_ended"), ("stream", 400, "invalid_request")]
)
async def test_what_can_not_be_tried_anew_says_why(
    open_gateway: Opener, source: str, status: int, code: str
) -> None:
    gateway = await open_gateway(worker=False, admin_token=ADMIN_TOKEN)
    if source == "job":
        request_id = await gateway.submit(data="Explain", type="text_only")
    else:
        request_id = (await gateway.stream(text="Explain", type="text_only")).request_id
    found, problem = await ask(gateway, "POST", f"/admin/requests/{request_id}/retry", AS_ADMIN, {})
    assert (found, problem["code"]) == (status, code)
    wanted = ["cancel"] if source == "job" else ["replay"]
    assert (await life(gateway, request_id))["actions"] == wanted


async def test_a_dead_job_is_requeued_and_answers(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, admin_token=ADMIN_TOKEN)
    job = await gateway.submit(data="Explain", type="text_only")
    await gateway.database.execute(
        "UPDATE requests SET status = 'dead', lapses = 3, finished_at = now(), failure = $2 "
        "WHERE id = $1::uuid",
        *(job, orjson.dumps({"code": "worker_died", "message": "its workers died"}).decode()),
    )
    view = await life(gateway, job)
    assert view["actions"] == ["requeue", "discard", "retry", "replay"]
    assert "workers' logs" in view["advice"]
    assert [one["request_id"] for one in await listed(gateway, "?error_code=worker_died")] == [job]
    status, _ = await ask(gateway, "POST", f"/admin/dead/{job}/requeue", AS_ADMIN, {})
    assert status == 200
    assert (await life(gateway, job))["actions"] == ["cancel"]
    gateway.start_worker()
    assert (await ended(gateway, job))["request"]["status"] == "succeeded"


async def test_mistakes_are_named(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, admin_token=ADMIN_TOKEN)
    nobody = "01a20eee-3651-7845-959b-24c31459d2c4"
    for query, field in (
        ("id=xyz", "id"),
        ("status=lost", "status"),
        ("cursor=5", "cursor"),
        ("limit=0", "limit"),
        ("since=yesterday", "since"),
        ("colour=red", "colour"),
        ("source=carrier", "source"),
    ):
        status, problem = await ask(gateway, "GET", f"/admin/requests?{query}", AS_ADMIN)
        assert status == 400, query
        assert field in problem["field"], query
    for method, path in (
        *(("GET", ""), ("GET", "/request"), ("GET", f"/files/{nobody}")),
        *(("POST", "/cancel"), ("POST", "/retry")),
    ):
        body = None if method == "GET" else dict[str, Any]()
        path = f"/admin/requests/{nobody}{path}"
        status, _ = await ask(gateway, method, path, AS_ADMIN, body)
        assert status == 404, path
    both = await asyncio.gather(
        *(gateway.stream(text="Explain", type="text_only") for _ in range(3))
    )
    _, page = await ask(gateway, "GET", "/admin/requests?limit=2", AS_ADMIN)
    _, rest = await ask(
        gateway, "GET", f"/admin/requests?limit=2&cursor={page['next_cursor']}", AS_ADMIN
    )
    found = [item["request_id"] for item in page["items"] + rest["items"]]
    assert sorted(found) == sorted(one.request_id for one in both)
    assert "next_cursor" not in rest
