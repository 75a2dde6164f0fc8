"""What operators did, on record: every change, once, with its author, and nothing secret."""

from __future__ import annotations

import re
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import ask, submitted
from tidegate.call import Scope
from tidegate.embedded.servers import ValkeyServer
from tidegate.errors import StoreUnavailable
from tidegate.http.guards import ROLES
from tidegate.http.submission import MOST_IN_ROW_BYTES


async def actions_of(gateway: Gateway) -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {gateway.operator_key}"}
    status, page = await ask(gateway, "GET", "/admin/actions", headers)
    assert status == 200
    found: list[dict[str, Any]] = page["items"]
    return found


async def test_every_route_that_changes_something_leaves_one_action(open_gateway: Opener) -> None:
    alerts = SecretStr("https://alerts.example/of-ours")
    gateway = await open_gateway(
        worker=False, webhook_secret="whsec_" + "A" * 32, alert_webhook_url=alerts
    )
    tenants = gateway.services.store.tenants
    _, made = await tenants.create_key("default", scopes=[Scope.ADMIN])
    admin = {"Authorization": f"Bearer {made.text}", "X-Forwarded-For": "203.0.113.9"}
    admin["X-Tidegate-As-Tenant"] = "default"
    other, _ = await tenants.create_key("default")
    database = gateway.database
    assert await actions_of(gateway) == [], "what was not an operator's is not recorded"
    ended, dead, discarded = [await submitted(gateway, {}) for _ in range(3)]
    await database.execute("UPDATE requests SET status = 'dead' WHERE id <> $1", ended)
    hook = await database.fetchval(
        "INSERT INTO webhooks (id, request_id, tenant_id, pool, event, url, state)"
        " VALUES (gen_random_uuid(), $1, 'default', 'gemini', 'request.failed', 'https://a.example',"
        " 'given_up') RETURNING id",
        ended,
    )
    batch = await database.fetchval(
        "INSERT INTO batches (id, tenant_id, endpoint, input_file_id, input_blob, input_bytes,"
        " completion_window, total, expires_at) VALUES (gen_random_uuid(), 'default',"
        " '/v1/chat/completions', gen_random_uuid(), 'a', 0, '24h', 1, now() + interval '1 day')"
        " RETURNING id"
    )
    alert = await database.fetchval(
        "INSERT INTO alerts (id, kind, data, state) VALUES"
        " (gen_random_uuid(), 'test', '{}', 'delivered') RETURNING id"
    )
    batches = f"/admin/batches/batch_{batch.hex}"
    limit = "kind:text_only"
    session = (await open_gateway(worker=False)).services.store.instance_id
    steps: list[tuple[str, str, dict[str, Any] | None, str]] = [
        ("PUT", "/admin/tenants/acme", {"most_priority": 5, "disabled": True}, "tenant.set"),
        ("DELETE", "/admin/tenants/acme", None, "tenant.remove"),
        ("POST", "/admin/keys", {"name": "ci", "role": "viewer"}, "key.create"),
        ("DELETE", f"/admin/keys/{other.prefix}", None, "key.revoke"),
        ("PATCH", "/admin/limits", {"set": {"limits.rpm:x": 5}}, "limits.change"),
        ("PUT", f"/admin/limits/{limit}", {"limit": 7}, "limits.change"),
        ("DELETE", "/admin/limits/rpm:x", None, "limits.change"),
        ("POST", f"/admin/limits/{limit}/pause", {"for_ms": 5, "reason": "why"}, "limit.pause"),
        ("POST", f"/admin/limits/{limit}/resume", {}, "limit.resume"),
        ("DELETE", f"/admin/permits/{session}", None, "permits.revoke"),
        ("PUT", "/admin/budgets/b", {"usd": 5, "period": "day"}, "budget.set"),
        ("POST", "/admin/budgets/b/resume", {"extra_usd": 1}, "budget.resume"),
        ("DELETE", "/admin/budgets/b", None, "budget.remove"),
        ("POST", f"/admin/requests/{ended}/cancel", {}, "job.cancel"),
        ("POST", f"/admin/requests/{ended}/retry", {"reason": "again"}, "job.retry"),
        ("POST", f"/admin/requests/{ended}/replay", {"upstream": "gemini"}, "job.retry"),
        ("POST", f"/admin/dead/{dead}/requeue", {}, "job.requeue"),
        ("POST", f"/admin/dead/{discarded}/discard", {}, "job.discard"),
        (
            "POST",
            "/admin/requests/requeue",
            {"since": "2020-01-01T00:00:00Z", "dry_run": False},
            "jobs.requeue",
        ),
        ("POST", "/admin/alerts/test", {}, "alert.test"),
        ("POST", f"/admin/alerts/{alert}/redeliver", {}, "alert.redeliver"),
        ("POST", f"{batches}/pause", {}, "batch.pause"),
        ("POST", f"{batches}/resume", {}, "batch.resume"),
        ("POST", f"{batches}/cancel", {}, "batch.cancel"),
        ("POST", f"/admin/webhooks/{hook}/redeliver", {}, "webhook.redeliver"),
        ("POST", "/admin/upstreams/gemini/test", {}, "upstream.test"),
        ("POST", "/admin/upstreams/gemini/drain", {}, "upstreams.change"),
        ("POST", "/admin/upstreams/gemini/resume", {}, "upstreams.change"),
        ("PATCH", "/admin/upstreams/gemini", {"set": {"weight": 3}}, "upstreams.change"),
        ("POST", "/admin/upstreams/rollback", {"revision": 0}, "upstreams.change"),
        (
            "PUT",
            "/admin/upstreams/more",
            {"table": {"base_url": "http://127.0.0.1:9", "dialect": "openai"}, "test": False},
            "upstreams.change",
        ),
        ("DELETE", "/admin/upstreams/more?force=true", None, "upstreams.change"),
        ("DELETE", "/admin/subjects/ann%20of%20acme", None, "subject.erase"),
        ("POST", "/admin/calls/stream", {"data": "Explain the tide"}, "tenant.call"),
    ]
    for method, path, body, what in steps:
        before = len(await actions_of(gateway))
        status, answer = await ask(gateway, method, path, admin, body)
        assert status < 300, (method, path, answer)
        found = await actions_of(gateway)
        assert len(found) == before + 1, (method, path, found[: len(found) - before])
        assert found[0]["what"] == what
        assert found[0]["operator"] == f"the key tg_{made.prefix}"
        assert found[0]["role"] == "admin"
        assert found[0]["address"] == "127.0.0.1, forwarded for 203.0.113.9"
    done = {
        (method, pattern)
        for pattern, methods in ROLES.items()
        for method in methods
        if any(m == method and fits(pattern, p.partition("?")[0]) for m, p, _, _ in steps)
    }
    changing = {(m, path) for path, methods in ROLES.items() for m in methods if m != "GET"}
    learned = {("POST", "/admin/limits/accept")}  # needs a provider's headers; as PATCH
    simulated = {("POST", "/admin/limits/rehearse")}  # changes nothing
    assert changing - done - learned - simulated == set()
    by_what = {one["what"]: one for one in await actions_of(gateway)}
    assert by_what["tenant.set"]["after"] == {"most_priority": 5, "disabled": True}
    assert by_what["tenant.set"]["before"]["disabled"] is False
    assert by_what["key.create"]["after"]["scopes"] == ["viewer"]
    assert by_what["limits.change"]["revision"] >= 2
    assert "after" not in by_what["limits.change"], "the history has it"
    assert by_what["limit.pause"]["after"]["reason"] == "why"
    changes = []
    for dollars in (50.5, 75, None):
        new = {"budget_day_money": dollars}
        status, answer = await ask(gateway, "PUT", "/admin/tenants/acme", admin, new)
        assert status == 200, answer
        newest = (await actions_of(gateway))[0]
        changes.append((*newest["before"].values(), *newest["after"].values()))
    assert changes == [(None, 50.5), (50.5, 75), (75, None)]
    assert "ann" not in by_what["subject.erase"]["target"]
    everything = str(await database.fetch("SELECT * FROM operator_actions"))
    for secret in (made.text, gateway.operator_key, "tg_" + made.text.split("_")[2], "whsec_"):
        assert secret not in everything
    assert "ann of acme" not in everything


def fits(pattern: str, path: str) -> bool:
    if "{" not in pattern:
        return pattern == path
    steps = re.sub(r"\{\w+:(path|text)\}", "[^?]+", pattern)
    return re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", steps), path) is not None


async def test_what_fails_or_is_refused_leaves_none(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    tenants = gateway.services.store.tenants
    _, viewer = await tenants.create_key("default", scopes=[Scope.VIEWER])
    operator = {"Authorization": f"Bearer {gateway.operator_key}"}
    weak = {"Authorization": f"Bearer {viewer.text}"}
    for method, path, headers, body in (
        ("DELETE", "/admin/keys/aaaaaaaaaa", operator, None),
        ("DELETE", "/admin/tenants/nobody", operator, None),
        ("POST", "/admin/limits/no:limit/pause", operator, {}),
        ("DELETE", "/admin/permits/nobody", operator, None),
        ("PATCH", "/admin/limits", operator, {"set": {"limits.kind:text_only": -1}}),
        ("POST", "/admin/keys", weak, {}),
        ("PUT", "/admin/limits/kind:text_only", weak, {"limit": 3}),
    ):
        status, _ = await ask(gateway, method, path, headers, body)
        assert status in (400, 403, 404), (method, path, status)
    assert await actions_of(gateway) == []
    assert (await ask(gateway, "GET", "/admin/actions", weak))[0] == 403


async def test_a_replay_whose_body_is_not_stored_leaves_none(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    operator = {"Authorization": f"Bearer {gateway.operator_key}"}
    messages = [{"role": "user", "content": "x" * MOST_IN_ROW_BYTES}]
    path, body = "/v1/chat/completions", {"model": "gemini-2.5-flash", "messages": messages}
    async with gateway.http.post(gateway.url + path, json=body) as answer:
        assert answer.status == 200, await answer.text()
        request_id = answer.headers["x-tidegate-request-id"]
    await gateway.recorded(request_id)

    async def put(*_: object) -> None:
        raise StoreUnavailable("the blob store failed")

    again = f"/admin/requests/{request_id}/replay"
    with monkeypatch.context() as patch:
        patch.setattr(gateway.services.blobs, "put", put)
        assert (await ask(gateway, "POST", again, operator, {"upstream": "gemini"}))[0] == 503
    assert await actions_of(gateway) == []
    assert (await ask(gateway, "POST", again, operator, {"upstream": "gemini"}))[0] == 202
    assert [one["what"] for one in await actions_of(gateway)] == ["job.retry"]


async def test_what_valkey_did_not_do_leaves_none(
    open_gateway: Opener, own_valkey: ValkeyServer
) -> None:
    gateway = await open_gateway(worker=False, redis_url=own_valkey.url)
    operator = {"Authorization": f"Bearer {gateway.operator_key}"}
    own_valkey.kill()
    for method, path in (
        ("POST", "/admin/limits/kind:text_only/pause"),
        ("POST", "/admin/limits/kind:text_only/resume"),
        ("DELETE", f"/admin/permits/{gateway.services.store.instance_id}"),
    ):
        status, _ = await ask(gateway, method, path, operator, {} if method == "POST" else None)
        assert status == 503, (method, path, status)
    assert await actions_of(gateway) == []


async def test_actions_are_paged_filtered_and_only_ever_added(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    operator = {"Authorization": f"Bearer {gateway.operator_key}"}
    for number in range(7):
        body = {"most_priority": number}
        assert (await ask(gateway, "PUT", f"/admin/tenants/t{number}", operator, body))[0] == 200
    await ask(gateway, "POST", "/admin/keys", operator, {})
    seen: list[str] = []
    cursor = ""
    while True:
        path = f"/admin/actions?limit=3&what=tenant.set{cursor}"
        _, page = await ask(gateway, "GET", path, operator)
        seen += [one["target"] for one in page["items"]]
        if "next_cursor" not in page:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert seen == [f"t{number}" for number in reversed(range(7))]
    _, page = await ask(gateway, "GET", "/admin/actions?target=t3", operator)
    assert [one["target"] for one in page["items"]] == ["t3"]
    _, page = await ask(gateway, "GET", "/admin/actions?until=2020-01-01T00:00:00Z", operator)
    assert page["items"] == []
    assert (await ask(gateway, "GET", "/admin/actions?nothing=1", operator))[0] == 400
    # As a terminal may send bytes that are not UTF-8, and as it would be on record.
    assert await gateway.services.store.tenants.actions.page(operator="\x00\udcff") == []
    for statement in ("UPDATE operator_actions SET operator = 'x'", "DELETE FROM operator_actions"):
        with pytest.raises(asyncpg.RaiseError, match="never changed"):
            await gateway.database.execute(statement)
    # What is over goes, and nothing else.
    await gateway.database.execute("ALTER TABLE operator_actions DISABLE TRIGGER USER")
    await gateway.database.execute(
        "UPDATE operator_actions SET at = now() - interval '400 days' WHERE target < 't4'"
        " AND what = 'tenant.set'"
    )
    await gateway.database.execute("ALTER TABLE operator_actions ENABLE TRIGGER USER")
    await gateway.services.store.retention.prune(30, 365)
    left = [one["target"] for one in await actions_of(gateway) if one["what"] == "tenant.set"]
    assert left == ["t6", "t5", "t4"]


async def test_a_change_and_its_action_are_one_transaction(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    operator = {"Authorization": f"Bearer {gateway.operator_key}"}
    await gateway.database.execute("ALTER TABLE operator_actions ADD CHECK (what <> 'tenant.set')")
    status, _ = await ask(gateway, "PUT", "/admin/tenants/acme", operator, {"most_priority": 5})
    assert status == 500
    found = [one.tenant_id for one in await gateway.services.store.tenants.list_tenants()]
    assert "acme" not in found
