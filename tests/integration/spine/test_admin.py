"""`/admin`: who gets in, what is shown, what a change does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until

TOKEN = "a-token-of-sixteen-or-more"
LOCAL: dict[str, str] = {}


async def ask(
    gateway: Gateway,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] = LOCAL,
) -> tuple[int, Any]:
    async with gateway.http.request(
        method, f"{gateway.url}/admin{path}", json=body, headers=headers
    ) as response:
        if response.status >= 400:
            assert response.content_type == "application/problem+json"
        return response.status, orjson.loads(await response.read())


async def test_with_a_token_only_those_who_show_it_get_in(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, admin_token=TOKEN, host="0.0.0.0")
    for wrong in ("", TOKEN, f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}x", "Bearer \xff"):
        headers = {"Authorization": wrong} if wrong else {}
        status, problem = await ask(gateway, "GET", "/limits", headers=headers)
        assert (status, problem["code"]) == (401, "unauthenticated"), wrong
        assert TOKEN not in str(problem)
    right = {"Authorization": f"bearer {TOKEN}", "X-Forwarded-For": "8.8.8.8"}
    assert (await ask(gateway, "GET", "/limits", headers=right))[0] == 200


async def test_every_route_is_behind_the_gate(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, admin_token=TOKEN)
    paths = gateway.app.openapi()["paths"]
    admin = [
        (path, method) for path in paths if path.startswith("/admin") for method in paths[path]
    ]
    assert len(admin) >= 11
    for prefix in ("", "/llm"):
        for path, method in admin:
            place = gateway.url + prefix + path.replace("{", "").replace("}", "")
            async with gateway.http.request(method.upper(), place, data=b"{") as response:
                assert response.status == 401, (path, method)


async def test_a_body_is_not_read_before_its_sender_is_let_in(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, admin_token=TOKEN)
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"PATCH /admin/limits HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 500000\r\n\r\n{"
    )
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 401")
    writer.close()


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize("body", [b"", b'{"for_ms": 5}'])
async def test_what_a_page_could_send_without_asking_is_not_taken(
    open_gateway: Opener, media: str, body: bytes
) -> None:
    gateway = await open_gateway(worker=False)
    url = f"{gateway.url}/admin/limits/kind:text_only/pause"
    async with gateway.http.post(url, data=body, headers={"Content-Type": media}) as response:
        assert response.status == 415


async def test_limits_are_shown_with_their_use_and_where_they_come_from(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1})
    await gateway.upstream.set_fault("hang", count=2)
    tasks = [
        asyncio.create_task(gateway.stream(text=f"Explain {n}", type="text_only")) for n in range(2)
    ]
    await gateway.in_flight(1)
    await wait_until(lambda: gateway.waiting == 1)

    async def settled() -> dict[str, Any] | None:
        _, body = await ask(gateway, "GET", "/limits")
        shown: dict[str, Any] = body
        is_whole = shown["queues"] and shown["in_force"]["since"]
        return shown if is_whole else None

    shown = await wait_until(settled, 20, "the ticket and the record")
    assert shown["pool"] == "gemini"
    assert shown["in_force"]["origin"] == "deployment"
    assert shown["in_force"]["set_by"].startswith("api-")
    text = next(one for one in shown["limits"] if one["limit"] == "kind:text_only")
    assert (text["words"], text["used"], text["waiting"]) == ("1 concurrent", 1, 1)
    assert [one["held_up_by"] for one in shown["queues"]] == ["kind:text_only"]
    assert shown["policy"]["limits"]["kind:text_only"] == 1
    queue = shown["queues"][0]
    status, reason = await ask(gateway, "GET", f"/why/{queue['process']}/{queue['first_ticket']}")
    assert status == 200
    assert reason["sentence"].startswith("waits for kind:text_only: 1 of 1 are in use, 0 before it")
    assert [one["process"] for one in reason["holders"]] == [queue["process"]]
    _, permits = await ask(gateway, "GET", "/permits")
    assert [(one["limits"], one["request_id"]) for one in permits] == [(["kind:text_only"], None)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_limit_is_set_and_taken_away_and_both_are_on_record(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)

    async def recorded() -> bool:
        return bool((await ask(gateway, "GET", "/limits/history"))[1])

    await wait_until(recorded, 20, "the first revision")
    new = {"limit": 7, "by": "ann", "reason": "more quota"}
    status, now = await ask(gateway, "PUT", "/limits/rpm:kind/text_only", new)
    assert (status, now["revision"], now["set_by"]) == (200, 2, "ann")
    assert gateway.services.limiter.policy.bound("rpm:kind/text_only") == 7
    status, now = await ask(gateway, "DELETE", "/limits/rpm:kind/text_only?by=bob&reason=enough")
    assert (status, now["revision"]) == (200, 3)
    assert "rpm:kind/text_only" not in gateway.services.limiter.policy.limits
    _, rows = await ask(gateway, "GET", "/limits/history?most=2")
    assert [(row["revision"], row["origin"], row["set_by"], row["reason"]) for row in rows] == [
        (3, "live", "bob", "enough"),
        (2, "live", "ann", "more quota"),
    ]


async def test_many_changes_are_one_revision_or_none(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    changes = {"kind:text_only": 9, "weights.acme": 4, "pool.lease_ms": 600, "tpm:total": 50_000}
    status, now = await ask(gateway, "PATCH", "/limits", {"set": changes})
    assert status == 200
    policy = gateway.services.limiter.policy
    assert (policy.bound("kind:text_only"), policy.weights, policy.lease_ms) == (
        *(9, {"acme": 4}, 600),
    )
    wrong = {"set": {"kind:text_only": 1, "weights.acme": 0}}
    status, problem = await ask(gateway, "PATCH", "/limits", wrong)
    assert (status, problem["field"]) == (400, "weights.acme")
    assert gateway.services.limiter.policy.revision == now["revision"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("PUT", "/limits/kind:poems", {"limit": 1}, 400, "unknown type 'poems'; known: text_only"),
        ("PUT", "/limits/kind:text_only", {"limit": -1}, 400, "from 0"),
        ("PUT", "/limits/kind:text_only", {"limit": True}, 400, "whole number or a table"),
        ("PUT", "/limits/kind:text_only", {"limit": "5"}, 400, "whole number or a table"),
        ("PUT", "/limits/kind:text_only", {}, 400, "limit"),
        ("PUT", "/limits/kind:text_only", {"limit": 1, "bye": 1}, 400, "bye"),
        ("PUT", "/limits/kind:text_only", [1], 400, "body"),
        ("DELETE", "/limits/kind:text_only", None, 400, "0 admits no calls"),
        ("DELETE", "/limits/rpm:x", None, 404, "rpm:x"),
        ("PATCH", "/limits", {"set": {"lease": 1}}, 400, "pool.<option>"),
        ("POST", "/limits/rpm:x/pause", {}, 404, "no limit rpm:x"),
        ("POST", "/limits/rpm:x/resume", {}, 404, "no limit rpm:x"),
        ("POST", "/limits/kind:text_only/pause", {"for_ms": 0}, 400, "for_ms"),
        ("DELETE", "/permits/nobody", None, 404, "nobody"),
        ("GET", "/why/nobody", None, 400, "no request, batch or ticket"),
        ("GET", "/why/nobody/17", None, 404, "no ticket 17"),
        ("GET", "/why/01a20eee-3651-7845-959b-24c31459d2c4", None, 404, "on record"),
        ("GET", "/limits/history?most=0", None, 400, "most"),
    ],
)
async def test_mistakes_are_told_and_change_nothing(
    open_gateway: Opener, method: str, path: str, body: Any, status: int, said: str
) -> None:
    gateway = await open_gateway(worker=False)
    found, problem = await ask(gateway, method, path, body)
    assert found == status
    assert said in f"{problem['detail']} {problem.get('allowed')} {problem.get('field')}"
    assert gateway.services.limiter.policy.revision == 1


async def test_a_pause_holds_everybody_up_until_it_is_resumed(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    pause = {"for_ms": 3_600_000, "by": "ann", "reason": "the provider is ill"}
    assert await ask(gateway, "POST", "/limits/kind:text_only/pause", pause) == (
        200,
        {"done": True},
    )
    shorter = {"for_ms": 1_000}
    assert await ask(gateway, "POST", "/limits/kind:text_only/pause", shorter) == (
        *(200, {"done": False}),
    )
    request_id = await gateway.submit(data="Explain", type="text_only")

    async def held_up() -> Any:
        _, reason = await ask(gateway, "GET", f"/why/{request_id}")
        return reason if reason.get("held_up_by") and reason.get("process") else None

    reason = await wait_until(held_up, 20, "the job at the limit")
    assert reason["status"] == "queued"
    assert reason["process"].startswith("worker-")
    assert "is paused by ann: the provider is ill" in reason["sentence"]
    assert await gateway.calls() == []
    assert (await ask(gateway, "POST", "/limits/kind:text_only/resume", {}))[1] == {"done": True}
    assert (await gateway.end_of(request_id))["status"] == "succeeded"
    assert (await ask(gateway, "POST", "/limits/kind:text_only/resume", {}))[1] == {"done": False}
    _, reason = await ask(gateway, "GET", f"/why/{request_id}")
    assert reason["sentence"].startswith("waits for nothing: succeeded")


async def test_why_tells_who_has_the_limit_and_since_when(open_gateway: Opener) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 1})
    await gateway.upstream.set_fault("hang", match="hold it")
    holder = await gateway.submit(data="hold it", type="text_only")
    await gateway.in_flight(1)
    waiter = await gateway.submit(data="after it", type="text_only")

    async def known() -> Any:
        _, reason = await ask(gateway, "GET", f"/why/{waiter}")
        holders = reason.get("holders", [])
        return reason if holders and holders[0]["request_id"] else None

    reason = await wait_until(known, 20, "the holder's name")
    assert reason["held_up_by"] == "kind:text_only"
    assert [one["request_id"] for one in reason["holders"]] == [holder]
    assert reason["holders"][0]["since"] is not None
    _, running = await ask(gateway, "GET", f"/why/{holder}")
    assert (running["status"], len(running["holders"])) == ("running", 1)
    assert running["sentence"].startswith("has run for ")


async def test_a_job_that_nobody_has_taken_says_so(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    sure = await gateway.submit(data="Explain", type="text_only")
    unsure = await gateway.submit(data="A lighthouse at dusk, oil on canvas")
    _, reason = await ask(gateway, "GET", f"/why/{sure}")
    assert "for a worker to take it" in reason["sentence"]
    assert reason["limit"]["limit"] == "kind:text_only"
    _, reason = await ask(gateway, "GET", f"/why/{unsure}")
    assert "classifies" in reason["sentence"]


async def test_a_job_behind_the_workers_window_names_the_limit_that_the_others_wait_for(
    open_gateway: Opener, tmp_path: Path
) -> None:
    """Another limit than its type's: the model's, to which it comes by the default."""
    policy = tmp_path / "policy.toml"
    policy.write_text(
        '[limits]\n"model:gemini-2.5-flash" = { bound = 2, adaptive = { minimum = 1 } }\n'
    )
    gateway = await open_gateway(tidegate_policy=policy, rate_limits={"text_only": 3}, worker=False)
    await gateway.upstream.set_fault("hang", match="hold it")
    answered = await gateway.stream(text="Explain one", type="text_only")  # how long a call takes
    assert answered.names[-1] == "done"
    gateway.start_worker()
    for _ in range(2):
        await gateway.submit(data="hold it", type="text_only")
    await gateway.in_flight(2)
    jobs = [await gateway.submit(data=f"after it {n}", type="text_only") for n in range(40)]

    async def stands() -> Any:
        _, reason = await ask(gateway, "GET", f"/why/{jobs[-1]}")
        return reason if reason.get("held_up_by") == "model:gemini-2.5-flash" else None

    reason = await wait_until(stands, 20, "what the window waits for")
    assert (reason["status"], reason["process"]) == ("queued", None), "no worker has it"
    limit = reason["limit"]
    assert (limit["limit"], limit["used"], limit["bound"]) == ("model:gemini-2.5-flash", 2, 2)
    assert len(reason["holders"]) == 2
    assert 0 < reason["ahead"] <= 39
    assert reason["rate_per_s"] > 0
    assert reason["wait_ms"] > 0
    said = f"; {reason['ahead']} requests are ahead, at "
    assert ": model:gemini-2.5-flash: 2 of 2 are in use" in reason["sentence"]
    assert said in reason["sentence"]
    _, owners = await gateway.get(f"/requests/{jobs[-1]}/why")
    said = "waits for model:gemini-2.5-flash: 2 of 2 are in use; "
    assert owners["sentence"].startswith(said)
    assert owners["wait_ms"] > 0
    assert not owners["is_certain"]
    assert reason["next_action"] in reason["sentence"]
    _, status = await gateway.get(f"/status/{jobs[-1]}")
    assert status["waits_for"] == "model:gemini-2.5-flash"
    assert status["wait_ms"] > 0
    assert 0 < status["ahead"] <= 39


async def test_a_job_that_waits_for_its_next_try_says_so(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    await gateway.upstream.set_fault("throttled", count=1, retry_after_s=30)
    request_id = await gateway.submit(data="Explain", type="text_only")

    async def parked() -> Any:
        _, reason = await ask(gateway, "GET", f"/why/{request_id}")
        return reason if "before its next attempt" in reason["sentence"] else None

    reason = await wait_until(parked, 20, "the retry")
    assert reason["sentence"].endswith("after upstream_throttled")


async def test_a_revoked_process_loses_its_calls(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    await gateway.upstream.set_fault("hang", count=1)
    request_id = await gateway.submit(data="Explain", type="text_only")
    await gateway.in_flight(1)
    _, permits = await ask(gateway, "GET", "/permits")
    assert len(permits) == 1
    status, revoked = await ask(gateway, "DELETE", f"/permits/{permits[0]['process']}?by=ann")
    assert (status, revoked) == (200, {"sessions": 1})
    assert (await gateway.end_of(request_id))["status"] == "succeeded"


async def test_estimates_show_how_good_they_are(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    assert await ask(gateway, "GET", "/estimates") == (200, [])
    for _ in range(6):
        await gateway.stream(text="Explain", type="text_only")
    _, shown = await ask(gateway, "GET", "/estimates")
    assert {(one["part"], one["calls"]) for one in shown} == {("input", 6), ("output:text_only", 6)}
    assert all(one["margin"] >= 1 for one in shown)


async def test_while_valkey_is_away_admin_says_so(open_gateway: Opener, tmp_path: Path) -> None:
    from tidegate.embedded.servers import ValkeyServer

    server = ValkeyServer(tmp_path / "own")
    server.start()
    try:
        gateway = await open_gateway(worker=False, redis_url=server.url)
        server.kill()
        status, problem = await ask(gateway, "GET", "/limits")
        assert (status, problem["code"]) == (503, "limiter_unavailable")
    finally:
        server.stop()


async def test_settings_are_shown_with_their_origin_and_without_a_secret(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_ATEMPTS", "7")
    monkeypatch.setenv("TEXT_MODEL", "gemini-2.5-flash")
    secrets = {
        "admin_token": "the-operators-own-token-of-this-test",
        "alert_webhook_url": "http://127.0.0.1:9/of-a-secret",
        "webhook_secret": "whsec_" + "c2VjcmV0LW9mLXRoZS10ZXN0LW9mLXNldHRpbmdz",
    }
    gateway = await open_gateway(worker=False, auth="on", **secrets)
    headers = {"Authorization": f"Bearer {secrets['admin_token']}"}
    async with gateway.http.get(f"{gateway.url}/admin/settings", headers=headers) as answer:
        assert answer.status == 200
        raw = await answer.text()
    assert gateway.config.database_url is not None
    database_url = gateway.config.database_url.get_secret_value()
    for secret in ("-of-this-test", "of-a-secret", "c2VjcmV0", database_url):
        assert secret not in raw
    found = orjson.loads(raw)
    named = {one["name"]: one for one in found["settings"]}
    assert set(named) == {name.upper() for name in type(gateway.config).model_fields}
    assert named["ADMIN_TOKEN"]["value"] == "(hidden)"
    assert named["WEBHOOK_SECRET"]["value"] == "(hidden)"
    assert named["TEXT_MODEL"]["origin"] == "the environment"
    assert (named["MAX_ATTEMPTS"]["origin"], named["MAX_ATTEMPTS"]["section"]) == (
        *(None, "Jobs and the record"),
    )
    assert named["MAX_ATTEMPTS"]["text"]
    assert [one for one in found["doubts"] if "MAX_ATEMPTS" in one]
