"""`/admin/tenants` and `/admin/keys`: what they show, what a change does, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.commands import tidegate
from tests.gateway import Gateway, Opener
from tests.loglines import Lines, lines
from tests.waiting import wait_until

__all__ = ["lines"]


async def admin(gateway: Gateway, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    async with gateway.http.request(method, f"{gateway.url}/admin{path}", json=body) as response:
        if response.status >= 400:
            assert response.content_type == "application/problem+json"
        return response.status, orjson.loads(await response.read())


async def test_a_tenant_is_made_changed_shown_and_removed(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    status, shown = await admin(gateway, "GET", "/tenants")
    assert (status, [one["tenant"] for one in shown]) == (200, ["default"])
    wanted = {
        "weight": 4,
        "limits": {"tenant:acme": 5, "rpm:tenant/acme": 60},
        "most_priority": 0,
        "models": ["gemini-*"],
        "most_streams": 10,
        "budget_day_money": 12.5,
        "budget_month_tokens": 10**9,
        "tiers": ["live", "flex"],
        "by": "ann",
        "reason": "a new customer",
    }
    status, shown = await admin(gateway, "PUT", "/tenants/acme", wanted)
    assert status == 200
    assert {name: shown[name] for name in wanted if name not in ("by", "reason")} == {
        name: value for name, value in wanted.items() if name not in ("by", "reason")
    }
    policy = gateway.services.limiter.policy
    assert policy.weights == {"acme": 4}
    assert policy.bound("tenant:acme") == 5
    newest = (await gateway.services.keeper.history(1))[0]
    assert (newest.set_by, newest.reason) == ("ann", "a new customer")

    change = {"models": None, "tiers": None, "limits": {"tenant:acme": None}, "disabled": True}
    status, shown = await admin(gateway, "PUT", "/tenants/acme", change)
    assert status == 200
    assert (shown["models"], shown["limits"]) == (None, {"rpm:tenant/acme": 60})
    assert shown["tiers"] is None
    assert (shown["most_streams"], shown["weight"]) == (10, 4), "what is not named stays"
    assert shown["disabled"]
    assert shown["disabled_at"]
    assert (await admin(gateway, "GET", "/tenants/acme"))[1] == shown

    # A change of what another operator has changed meanwhile changes nothing.
    expected = {name: shown[name] for name in change | wanted if name in shown}
    for name, seen in (("weight", 3), ("models", ["gemini-*"]), ("budget_day_money", None)):
        stale = {"weight": 9, "most_streams": 9, "expected": expected | {name: seen}}
        status, problem = await admin(gateway, "PUT", "/tenants/acme", stale)
        assert (status, problem["code"], problem["field"]) == (409, "policy_changed", name)
    assert (await admin(gateway, "GET", "/tenants/acme"))[1] == shown
    for tenant, code in (("acme", 200), ("nobody", 409)):
        same = {"disabled": True, "expected": expected}
        assert (await admin(gateway, "PUT", f"/tenants/{tenant}", same))[0] == code
    status, problem = await admin(gateway, "PUT", "/tenants/acme", {"expected": {"keys": 0}})
    assert (status, problem["field"]) == (400, "expected.keys")

    assert (await admin(gateway, "POST", "/keys", {"tenant": "acme"}))[0] == 201
    assert await admin(gateway, "DELETE", "/tenants/acme") == (200, {"removed": True})
    assert (await admin(gateway, "GET", "/tenants/acme"))[0] == 404
    assert (await admin(gateway, "GET", "/keys"))[1] == []
    policy = gateway.services.limiter.policy
    assert dict(policy.weights) == {}
    assert "rpm:tenant/acme" not in policy.limits
    assert (await admin(gateway, "DELETE", "/tenants/acme"))[0] == 404


async def test_a_removed_tenant_has_no_limits_in_any_pool(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789")
    path = tmp_path / "tidegate.toml"
    path.write_text('[upstreams.oai]\nprovider = "openai"\nbase_url = "http://127.0.0.1:9/v1"\n')
    gateway = await open_gateway(worker=False, tidegate_policy=path)
    keepers = gateway.services.keepers
    assert {"gemini", "oai"} <= keepers.keys()

    async def give() -> None:
        change = {"weight": 4, "limits": {"tenant:acme": 5}}
        for pool in ("gemini", "oai"):
            assert (await admin(gateway, "PUT", f"/tenants/acme?pool={pool}", change))[0] == 200

    def pools_that_name_it() -> set[str]:
        policies = {pool: keeper.limiter.policy for pool, keeper in keepers.items()}
        return {
            pool
            for pool, one in policies.items()
            if "acme" in one.weights or "tenant:acme" in one.limits
        }

    await give()
    assert pools_that_name_it() == {"gemini", "oai"}
    assert (await admin(gateway, "DELETE", "/tenants/acme"))[0] == 200
    assert pools_that_name_it() == set()
    await give()
    removed = await tidegate(
        *(gateway, "tenants", "remove", "acme", "--yes"), TIDEGATE_POLICY=str(path)
    )
    assert (removed.code, removed.complained) == (0, "")
    await wait_until(lambda: not pools_that_name_it(), 20, "the end of its limits")


async def test_a_removed_tenant_has_no_limits_where_a_removed_upstream_comes_back(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOX_KEY", "sk-test-0123456789")
    monkeypatch.setattr("tidegate.spine.upstreams._CLOSE_AFTER_S", 0.0)
    gateway = await open_gateway(worker=False)
    keepers, store = gateway.services.keepers, gateway.services.store
    table = {"dialects": {"openai": "http://127.0.0.1:9/v1"}, "key": "BOX_KEY", "models": ["x"]}
    server = {"table": table, "test": False}
    assert (await admin(gateway, "PUT", "/upstreams/box", server))[0] == 200
    await wait_until(lambda: "box" in keepers, 20, "the new upstream")
    change = {"weight": 4, "limits": {"tenant:acme": 5}}
    assert (await admin(gateway, "PUT", "/tenants/acme?pool=box", change))[0] == 200
    assert (await admin(gateway, "DELETE", "/upstreams/box?force=true"))[0] == 200
    await wait_until(lambda: "box" not in keepers, 20, "the end of the upstream")
    assert (await store.policies.in_force())["box"]["weights"] == {"acme": 4}
    assert (await admin(gateway, "DELETE", "/tenants/acme"))[0] == 200
    assert (await admin(gateway, "PUT", "/upstreams/box", server))[0] == 200
    await wait_until(lambda: "box" in keepers, 20, "the upstream again")
    await keepers["box"].settled.wait()
    policy = keepers["box"].limiter.policy
    assert (dict(policy.weights), "tenant:acme" in policy.limits) == ({}, False)


async def test_a_key_is_shown_once_and_listed_by_its_prefix(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    new = {"name": "ci", "scopes": ["infer"], "expires_at": "2999-01-01T00:00:00Z"}
    async with gateway.http.post(f"{gateway.url}/admin/keys", json=new) as response:
        made = orjson.loads(await response.read())
        assert (response.status, response.headers["cache-control"]) == (201, "no-store")
    key = made.pop("key")
    assert key.startswith(f"tg_{made['prefix']}_")
    assert (made["tenant"], made["scopes"], made["state"]) == ("default", ["infer"], "works")
    other = (await admin(gateway, "POST", "/keys", {}))[1]
    assert other["scopes"] == ["infer", "read"]
    _, listed = await admin(gateway, "GET", "/keys")
    assert listed[0] == made
    assert key not in orjson.dumps(listed).decode()
    for start in (made["prefix"][:5], f"tg_{made['prefix']}", key):
        assert (await admin(gateway, "GET", f"/keys?prefix={start}"))[1] == [made]
    assert (await admin(gateway, "GET", "/keys?tenant=nobody"))[1] == []
    status, revoked = await admin(gateway, "DELETE", f"/keys/tg_{made['prefix']}?by=ann")
    assert (status, revoked["state"]) == (200, "revoked")
    again = await admin(gateway, "DELETE", f"/keys/{made['prefix']}")
    assert again == (200, revoked), "revoked once, and then for good"
    row = await gateway.database.fetchrow("SELECT * FROM keys WHERE prefix = $1", made["prefix"])
    assert key.rpartition("_")[2] not in repr(dict(row))


async def test_a_key_behind_the_first_thousand_is_in_the_next_page(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.database.execute(
        "INSERT INTO keys (prefix, tenant_id, digest, scopes, created_at, revoked_at)"
        " SELECT lpad(n::text, 10, '0'), 'default', decode(repeat('00', 32), 'hex'), '{read}',"
        " '2020-01-01', '2020-01-02' FROM generate_series(1, 1000) n"
    )
    made = (await admin(gateway, "POST", "/keys", {}))[1]["prefix"]
    _, first = await admin(gateway, "GET", "/keys")
    assert [one["prefix"] for one in first] == [f"{n:010}" for n in range(1, 1001)]
    _, second = await admin(gateway, "GET", f"/keys?after={first[-1]['prefix']}")
    assert [one["prefix"] for one in second] == [made]
    _, few = await admin(gateway, "GET", "/keys?after=0000000998&limit=2&tenant=default")
    assert [one["prefix"] for one in few] == ["0000000999", "0000001000"]
    assert (await admin(gateway, "GET", f"/keys?after={made}")) == (200, [])
    assert (await admin(gateway, "GET", "/keys?after=nosuchkey0"))[0] == 404
    assert (await admin(gateway, "GET", "/keys?after=x"))[1]["field"] == "after"
    keys = await gateway.services.store.tenants.all_keys()
    assert (len(keys), keys[-1].prefix) == (1001, made)


MISTAKES: list[tuple[str, str, Any, int, str]] = [
    ("PUT", "/tenants/acme", {"weight": 0}, 400, "weight"),
    ("PUT", "/tenants/acme", {"weight": 1001}, 400, "weight"),
    ("POST", "/keys", {"tenant": ".."}, 400, "no part that is . or .."),
    ("PUT", "/tenants/%2E%2E%2Facme", {"weight": 2}, 400, "no part that is . or .."),
    ("PUT", "/tenants/acme", {"limits": {"kind:text_only": 9}}, 400, "limits.kind:text_only"),
    ("PUT", "/tenants/acme", {"limits": {"tenant:other": 9}}, 400, "limits.tenant:other"),
    ("PUT", "/tenants/acme", {"limits": {"tenant:acme": "x"}}, 400, "limits.tenant:acme"),
    ("PUT", "/tenants/acme", {"models": ["a b"]}, 400, "models"),
    ("PUT", "/tenants/acme", {"most_priority": 101}, 400, "most_priority"),
    ("PUT", "/tenants/acme", {"most_streams": -1}, 400, "most_streams"),
    ("PUT", "/tenants/acme", {"retention_days": 0}, 400, "retention_days"),
    ("PUT", "/tenants/acme", {"tiers": []}, 400, "tiers"),
    ("PUT", "/tenants/acme", {"tiers": ["slow"]}, 400, "tiers"),
    ("PUT", "/tenants/acme", {"colour": "red"}, 400, "colour"),
    ("PUT", "/tenants/a%20b", {}, 400, "tenant"),
    ("PUT", "/tenants/a%00b", {}, 400, "tenant"),
    ("DELETE", "/tenants/default", None, 400, "tenant"),
    ("DELETE", "/tenants/nobody", None, 404, "nobody"),
    ("GET", "/tenants/nobody", None, 404, "nobody"),
    ("POST", "/keys", {"tenant": "nobody"}, 404, "nobody"),
    ("POST", "/keys", {"scopes": ["root"]}, 400, "scopes.0"),
    ("POST", "/keys", {"scopes": []}, 400, "scopes"),
    ("POST", "/keys", {"expires_at": "2001-01-01T00:00:00Z"}, 400, "expires_at"),
    ("POST", "/keys", {"expires_at": "2999-01-01T00:00:00"}, 400, "expires_at"),
    ("DELETE", "/keys/nokey", None, 400, "prefix"),
    ("DELETE", "/keys/0123456789", None, 404, "0123456789"),
]


async def test_mistakes_change_nothing_and_are_named(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    for method, path, body, code, said in MISTAKES:
        status, problem = await admin(gateway, method, path, body)
        assert status == code, (path, body, problem)
        assert said in f"{problem.get('field')} {problem['detail']}", (path, body, problem)
    assert gateway.services.limiter.policy.revision == 1
    assert [one["tenant"] for one in (await admin(gateway, "GET", "/tenants"))[1]] == ["default"]


async def test_no_key_is_ever_in_the_log(open_gateway: Opener, lines: Lines) -> None:
    gateway = await open_gateway(auth="on")
    _, made = await gateway.services.store.tenants.create_key("default")
    secret = made.text.rpartition("_")[2]
    url = f"{gateway.url}/submit?key={made.text}"
    async with gateway.http.post(url, json={"data": f"my key is {made.text}"}) as response:
        request_id = (await response.json())["request_id"]
    for headers in ({"x-api-key": made.text}, {"Authorization": f"Bearer {made.text}x"}):
        async with gateway.http.get(f"{gateway.url}/status/x", headers=headers) as response:
            assert response.status in (400, 401)

    def named(event: str) -> list[dict[str, Any]]:
        return [line for line in lines() if line["event"] == event]

    def is_done() -> bool:
        return any(line["request_id"] == request_id for line in named("job_done"))

    await wait_until(is_done, 20, "the job's line")
    done = [line for line in named("request_done") if line["path"] == "/submit"]
    assert (done[0]["key_id"], done[0]["tenant"]) == (made.prefix, "default")
    assert secret not in str(lines())
