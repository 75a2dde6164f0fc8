"""`tidegate tenants` and `tidegate keys` beside a running deployment, as a person runs them."""

from __future__ import annotations

import asyncio

from tests.commands import tidegate
from tests.gateway import Opener
from tests.integration.tenants.asking import ask
from tests.waiting import wait_until


async def test_a_tenant_and_a_key_from_the_terminal(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, auth="on")
    made = await tidegate(
        *(gateway, "tenants", "set", "acme", "--weight", "4", "--limit", "tenant:acme=5"),
        *("--limit", "rpm:tenant/acme=60", "--priority-cap", "0", "--model", "gemini-2.5-*"),
        *("--queued-jobs", "1000", "--day-money", "12.5", "--reason", "a new customer"),
        AUTH="on",
    )
    assert (made.code, made.complained) == (0, "")
    assert "  limits  rpm:tenant/acme: 60 requests a minute" in made.said
    assert "  may     ask gemini-2.5-*" in made.said
    assert "  may     day money: $12.50\n" in made.said
    await wait_until(lambda: gateway.services.limiter.policy.weights == {"acme": 4}, 20, "weights")

    created = await tidegate(gateway, "keys", "create", "--tenant", "acme", "--name", "ci")
    assert created.code == 0
    key = created.said.strip()
    assert created.said == f"{key}\n", "the key alone, for scripts"
    assert key.startswith("tg_")
    assert key not in created.complained
    assert "a key of acme for infer and read" in created.complained
    headers = {"x-api-key": key}
    assert (await ask(gateway, "POST", "/submit", headers, {"data": "Explain"}))[0] == 202

    shown, listed, keys = await asyncio.gather(
        tidegate(gateway, "tenants", "show", "acme", "--json"),
        tidegate(gateway, "tenants", "list"),
        tidegate(gateway, "keys", "list", "--json"),
    )
    assert shown.json["most_queued_jobs"] == 1000
    assert shown.json["budget_day_money"] == 12.5
    assert (shown.json["weight"], shown.json["models"]) == (4, ["gemini-2.5-*"])
    assert shown.json["limits"] == {"tenant:acme": 5, "rpm:tenant/acme": 60}
    assert "default" in listed.said
    assert "queued jobs: 1000" in listed.said
    assert [(one["tenant"], one["state"]) for one in keys.json] == [("acme", "works")]
    assert key not in keys.said

    revoked = await tidegate(gateway, "keys", "revoke", key)
    assert (revoked.code, revoked.said) == (0, f"{keys.json[0]['prefix']} of acme is revoked\n")

    async def is_refused() -> bool:
        return (await ask(gateway, "POST", "/submit", headers, {"data": "Explain"}))[0] == 401

    await wait_until(is_refused, 20, "the end of the key")
    assert "revoked" in (await tidegate(gateway, "keys", "list", "--tenant", "acme")).said
    done, table = await asyncio.gather(
        tidegate(gateway, "actions", "--json"), tidegate(gateway, "actions", "--what", "tenant.set")
    )
    assert [one["what"] for one in done.json] == [
        *("key.revoke", "key.create", "tenant.set", "limits.change"),
    ]
    assert {one["address"] for one in done.json} == {"a terminal"}
    assert all("@" in one["operator"] for one in done.json)
    assert "most_priority: 100 -> 0" in table.said
    assert key not in done.said + table.said


async def test_bounds_are_taken_away_and_tenants_removed(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    setting = ("tenants", "set", "acme", "--json")
    some = await tidegate(
        *(gateway, *setting, "--streams", "3", "--model", "m", "--disable", "--limit"),
        "tenant:acme=2",
    )
    assert (some.json["most_streams"], some.json["models"]) == (3, ["m"])
    assert some.json["disabled_at"]
    assert some.complained == (
        "tidegate: note: API keys are not asked for (AUTH=auto, HOST=127.0.0.1), "
        "so nobody is bound by --streams, --model\n"
    )
    none = await tidegate(
        *(gateway, *setting, "--streams", "none", "--all-models", "--enable", "--limit"),
        "tenant:acme=none",
    )
    assert none.json["most_streams"] is none.json["models"] is none.json["disabled_at"] is None
    assert none.json["limits"] == {}
    unsure = await tidegate(gateway, "tenants", "remove", "acme")
    assert unsure.code == 1, "asked, nobody said yes"
    removed = await tidegate(gateway, "tenants", "remove", "acme", "--yes")
    assert (removed.code, removed.said) == (0, "acme is removed\n")
    left = (await tidegate(gateway, "tenants", "list", "--json")).json
    assert [one["tenant"] for one in left] == ["default"]


MISTAKES: dict[tuple[str, ...], tuple[int, str]] = {
    ("tenants", "show", "nobody"): (1, "there is no tenant nobody"),
    ("tenants", "remove", "default", "--yes"): (2, "cannot be removed; disable it instead"),
    ("keys", "create", "--tenant", "nobody"): (1, "there is no tenant nobody"),
    ("keys", "revoke", "0123456789"): (1, "there is no key"),
}


async def test_mistakes_are_told_in_one_line(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    all_done = await asyncio.gather(*(tidegate(gateway, *arguments) for arguments in MISTAKES))
    for done, (arguments, (code, said)) in zip(all_done, MISTAKES.items(), strict=True):
        assert (done.code, done.said) == (code, ""), arguments
        assert done.complained.startswith("tidegate: ")
        assert said in done.complained
        assert done.complained.count("\n") == 1


async def test_keys_need_no_valkey(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    away = {"REDIS_URL": "redis://127.0.0.1:1"}
    assert (await tidegate(gateway, "keys", "create", **away)).code == 0
    assert len((await tidegate(gateway, "keys", "list", "--json", **away)).json) == 1
