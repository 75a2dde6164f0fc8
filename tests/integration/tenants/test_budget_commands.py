"""Budgets by `/admin/budgets` and by `tidegate budgets`, as people set them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.commands import tidegate
from tests.gateway import Opener
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, ask
from tidegate.prices import budgets

BODY = {"usd": "12.5", "period": "day", "tenant": "acme", "alerts": [50, 100]}


async def test_budgets_over_http(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, admin_token=ADMIN_TOKEN)
    status, made = await ask(gateway, "PUT", "/admin/budgets/acme/day", AS_ADMIN, BODY)
    assert (status, made["name"], made["unit"], made["amount"]) == (
        200,
        "acme/day",
        "usd",
        12_500_000,
    )
    assert (made["at_end"], made["doubt"], made["alerts"]) == ("refuse", "bound", [50, 100])
    assert gateway.services.budgets.any
    assert made["most_used"]["spent"] == 0
    assert made["most_used"]["reset_at"] is not None
    each: dict[str, Any] = {
        "tokens": 0,
        "each": ["subject"],
        "at_end": "pause",
        "period": "rolling",
        "window_s": 60,
    }
    assert (await ask(gateway, "PUT", "/admin/budgets/people", AS_ADMIN, each))[0] == 200
    status, listed = await ask(gateway, "GET", "/admin/budgets", AS_ADMIN)
    assert [one["name"] for one in listed] == ["acme/day", "people"]
    assert listed[1]["each"] == ["tenant", "subject"]
    for seen, code in (({"amount": 12_500_000, "alerts": []}, 409), ({"amount": 12_500_000}, 200)):
        path, stale = "/admin/budgets/acme/day", BODY | {"expected": seen}
        assert (await ask(gateway, "PUT", path, AS_ADMIN, stale))[0] == code
    unseen = BODY | {"expected": {"amount": 1}}
    assert (await ask(gateway, "PUT", "/admin/budgets/new", AS_ADMIN, unseen))[0] == 409
    for again in (["subject"], ["tenant", "subject"]):
        status, _ = await ask(
            gateway, "PUT", "/admin/budgets/people", AS_ADMIN, each | {"each": again}
        )
        assert status == 200
    status, problem = await ask(
        gateway, "PUT", "/admin/budgets/x", AS_ADMIN, BODY | {"zone": "Mars"}
    )
    assert (status, problem["field"]) == (400, "zone")
    for wrong in ({"period": "day"}, BODY | {"tokens": 1}):
        status, problem = await ask(gateway, "PUT", "/admin/budgets/x", AS_ADMIN, wrong)
        assert (status, problem["field"], problem["allowed"]) == (400, "amount", "usd or tokens")
    call = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    url, person = f"{gateway.url}/v1/chat/completions", {"x-tidegate-subject": "ann"}
    async with gateway.http.post(url, json=call, headers=person) as refused:
        assert (await refused.json())["error"]["limit"] == "people"
    status, books = await ask(gateway, "GET", "/admin/budgets/books?budget=people", AS_ADMIN)
    assert [(one["scope"], one["paused_since"] is None) for one in books] == [
        (["default", "ann"], False)
    ]
    for field, extra in (
        ("extra_usd", {"extra_usd": 1}),  # not a million tokens
        ("extra_tokens", {"extra_usd": 1, "extra_tokens": 1}),
    ):
        status, problem = await ask(
            gateway, "POST", "/admin/budgets/people/resume", AS_ADMIN, extra
        )
        assert (status, problem.get("field")) == (400, field)
    status, books = await ask(gateway, "GET", "/admin/budgets/books?budget=people", AS_ADMIN)
    assert [(one["amount"], one["paused_since"] is None) for one in books] == [(0, False)]
    more = {"scope": ["default", "ann"], "extra_tokens": 2_000}
    status, done = await ask(gateway, "POST", "/admin/budgets/people/resume", AS_ADMIN, more)
    assert (status, done) == (200, {"scopes": [["default", "ann"]]})
    async with gateway.http.post(url, json=call, headers=person) as admitted:
        assert admitted.status == 200
    status, _ = await ask(gateway, "DELETE", "/admin/budgets/people", AS_ADMIN)
    assert status == 200
    for method, path in (("DELETE", "people"), ("POST", "people/resume")):
        body = {"by": "me"} if method == "POST" else None
        status, problem = await ask(gateway, method, f"/admin/budgets/{path}", AS_ADMIN, body)
        assert (status, problem["code"]) == (404, "not_found")


async def test_a_name_that_postgresql_cannot_hold_is_refused(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, admin_token=ADMIN_TOKEN)
    for method, path, body in (("PUT", "", BODY), ("POST", "/resume", {}), ("DELETE", "", None)):
        target = f"/admin/budgets/a%00b{path}"
        status, problem = await ask(gateway, method, target, AS_ADMIN, body)
        assert (status, problem["field"]) == (400, "name")


async def test_budgets_from_the_terminal(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    empty = await tidegate(gateway, "budgets", "list")
    assert (empty.code, empty.said) == (
        0,
        "no budget is set: `tidegate budgets set NAME` adds one\n",
    )
    made = await tidegate(
        *(gateway, "budgets", "set", "opus", "--usd", "20", "--period", "5h"),
        *("--model", "claude-opus-*", "--tenant", "each", "--fallback", "claude-haiku-4-5"),
    )
    assert (made.code, made.complained) == (0, "")
    assert made.said == "opus is set: $20.00 in 5 h for model claude-opus-*, each tenant\n"
    day = await tidegate(
        gateway, "budgets", "set", "day", "--usd", "0.79", "--period", "day", "--pause"
    )
    assert day.said == "day is set: $0.79 a day for all calls\n"
    tenant = await tidegate(gateway, "tenants", "set", "acme", "--month-tokens", "900")
    assert (tenant.code, tenant.complained) == (0, "")
    listed = await tidegate(gateway, "budgets", "list")
    assert "acme/budget_month_tokens" in listed.said
    assert "$0.79" in listed.said
    shown = await tidegate(gateway, "budgets", "list", "day", "--json")
    (one,) = shown.json
    assert (one["amount"], one["at_end"], one["books"][0]["spent"]) == (790_000, "pause", 0)
    resumed = await tidegate(gateway, "budgets", "resume", "day", "--extra-usd", "1")
    assert (resumed.code, resumed.said) == (0, "day is resumed for 1\n")
    for name, *more in (
        ("day", "--extra-tokens", "1000"),
        ("acme/budget_month_tokens", "--extra-usd", "1"),
        *(("day", "--extra-usd", text) for text in ("nan", "inf", "-1", "1e30", "much")),
    ):
        refused = await tidegate(gateway, "budgets", "resume", name, *more)
        assert (refused.code, refused.said) == (2, ""), more
        assert refused.complained.startswith(f"tidegate: {more[0][2:].replace('-', '_')}"), more
        assert refused.complained.count("\n") == 1, more
    for wrong in (("x", "--usd", "much"), ("x",), ("day", "--usd", "1", "--tenant", "acme")):
        assert (await tidegate(gateway, "budgets", "set", *wrong)).code == 2
    own = ("people", "--usd", "2", "--period", "day", "--tenant", "acme", "--subject", "each")
    assert (await tidegate(gateway, "budgets", "set", *own)).code == 0
    await gateway.database.execute(
        "INSERT INTO budget_books (budget, scope, period, spent) SELECT name, scope,"
        " budget_period(period, zone, now()), 1 FROM budgets, unnest($1::text[]) AS scope"
        " WHERE name = 'people'",
        ["[null]", '["ann"]'],
    )
    for of, scope in (("", None), ("ann", "ann")):
        whom = ("--of", of, "--extra-usd", "1", "--json")
        resumed = await tidegate(gateway, "budgets", "resume", "people", *whom)
        assert resumed.json == {"budget": "people", "scopes": [[scope]]}
    for budget, nobody, *extra in (("people", "anm"), ("day", "acme", "--extra-usd", "1")):
        missed = await tidegate(gateway, "budgets", "resume", budget, "--of", nobody, *extra)
        assert (missed.code, missed.said) == (1, ""), budget
        assert (
            missed.complained == f'tidegate: the budget {budget} has no amount for ["{nobody}"]\n'
        )
    both = ("both", "--usd", "2", "--subject", "each")
    assert (await tidegate(gateway, "budgets", "set", *both)).code == 0
    for more_usd in ((), ("--extra-usd", "1")):
        missed = await tidegate(gateway, "budgets", "resume", "both", "--of", "ann", *more_usd)
        assert missed.complained.endswith(": it has one for each tenant and subject\n")
    idle = await tidegate(gateway, "budgets", "resume", "people", "--of", "ann")
    assert (idle.code, idle.said) == (0, "people was not paused\n")
    none = await tidegate(gateway, "budgets", "list", "nothing")
    assert none.code == 1
    removed = await tidegate(gateway, "budgets", "remove", "day", "--yes")
    assert (removed.code, removed.said) == (0, "day is removed\n")


async def test_a_budget_of_a_tenant_or_key_that_is_not_there_is_set_with_a_note(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, admin_token=ADMIN_TOKEN)
    whom = ("--tenant", "acmee", "--key", "abcdefghij")
    made = await tidegate(gateway, "budgets", "set", "cap", "--usd", "5", *whom)
    assert (made.code, made.said) == (
        0,
        "cap is set: $5.00 a month for tenant acmee, key abcdefghij\n",
    )
    assert made.complained == (
        "tidegate: note: there is no tenant acmee, so cap binds nobody yet\n"
        "tidegate: note: there is no key abcdefghij, so cap binds nobody yet\n"
    )
    assert (await tidegate(gateway, "tenants", "set", "acme")).code == 0
    made = await tidegate(gateway, "budgets", "set", "other", "--usd", "5", "--tenant", "acme")
    assert (made.code, made.complained) == (0, "")


async def test_the_list_has_every_budget_and_says_of_which_it_leaves_books_out(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False, admin_token=ADMIN_TOKEN)
    for number in range(24):
        body = {"usd": 1, "tenant": f"team-{number}"}
        path = f"/admin/budgets/team-{number}"
        assert (await ask(gateway, "PUT", path, AS_ADMIN, body))[0] == 200
    for name in ("idle", "people"):
        each = {"usd": 2, "each": ["subject"]}
        assert (await ask(gateway, "PUT", f"/admin/budgets/{name}", AS_ADMIN, each))[0] == 200
    await gateway.database.execute(
        "INSERT INTO budget_books (budget, scope, period, spent) SELECT name,"
        " json_build_array('default', 'person-' || n)::text,"
        " budget_period(period, zone, now()), n * 1000 FROM budgets, generate_series(1, 30) AS n"
        " WHERE name = 'people'"
    )
    listed = await tidegate(gateway, "budgets", "list")
    named = [line.split()[0] for line in listed.said.splitlines()[1:]]
    assert [name for name in named if name.startswith("team-")] == [
        *sorted(f"team-{number}" for number in range(24))
    ]
    assert (named.count("people"), named.count("idle")) == (20, 1)
    assert listed.complained == (
        "people has 10 more books, which are used less: tidegate budgets list people\n"
    )
    of_one = await tidegate(gateway, "budgets", "list", "people")
    assert (of_one.said.count("person-"), of_one.complained) == (30, "")


async def test_what_no_option_names_stays_as_it_is(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    assert (await tidegate(gateway, "tenants", "set", "acme")).code == 0

    async def put(*options: str) -> tuple[Any, ...]:
        done = await tidegate(gateway, "budgets", "set", *options, "--json")
        assert (done.code, done.complained) == (0, ""), options
        one = done.json
        end = (one["at_end"], one["fallback"], one["doubt"], one["alerts"])
        return (one["amount"], *end, one["period"], one["window_s"], one["each"], one["tenant"])

    whom = ("--period", "5h", "--tenant", "acme", "--subject", "each")
    bound = ("rolling", 18_000, ["subject"], "acme")
    end = ("--pause", "--doubt", "estimate", "--alert", "80", "--alert", "100")
    ended = ("pause", None, "estimate", [80, 100])
    assert await put("b", "--usd", "20", *whom, *end) == (20_000_000, *ended, *bound)
    assert await put("b", "--usd", "10") == (10_000_000, *ended, *bound)
    assert await put("b", "--no-pause", "--alert", "none") == (
        *(10_000_000, "refuse", None, "estimate", []),
        *bound,
    )
    cheaper: tuple[Any, ...] = (10_000_000, "fall_back", "m", "bound", [], *bound)
    assert await put("b", "--fallback", "m", "--doubt", "bound") == cheaper
    assert await put("b", "--no-pause", "--period", "5h", "--subject", "each") == cheaper
    assert (await put("b", "--pause"))[1:3] == ("pause", None)
    assert (await put("b", "--fallback", "none"))[1:3] == ("pause", None)
    for wrong in (("--period", "day"), ("--tokens", "5"), ("--tenant", "each"), ("--model", "x")):
        assert (await tidegate(gateway, "budgets", "set", "b", *wrong)).code == 2, wrong
    own = ("acme/budget_day_money", "--period", "day", "--tenant", "acme")
    await put(*own, "--usd", "50", "--pause", "--alert", "80")
    again = await tidegate(gateway, "tenants", "set", "acme", "--day-money", "60")
    assert again.code == 0
    assert (await put(own[0]))[:5] == (60_000_000, "pause", None, "bound", [80])


async def test_a_zone_that_postgresql_does_not_know_is_refused(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python knows `localtime` and may have newer zones. A budget in one would fail each of its
    calls, and every list of budgets."""
    monkeypatch.setattr(budgets, "_is_zone", {"UTC", "Moon/Tranquility"}.__contains__)
    gateway = await open_gateway(worker=False, admin_token=ADMIN_TOKEN)
    body = {"usd": 5, "zone": "Moon/Tranquility"}
    for each in (["tenant"], ["tenant", "conversation"]):  # the second has no recorded spend
        status, problem = await ask(
            gateway, "PUT", "/admin/budgets/x", AS_ADMIN, body | {"each": each}
        )
        assert (status, problem["field"]) == (400, "zone")
        assert problem["allowed"] == "a time zone that PostgreSQL knows, such as Europe/Berlin"
    assert (await ask(gateway, "GET", "/admin/budgets", AS_ADMIN)) == (200, [])


async def test_a_period_that_cannot_be_changed_is_named_by_its_option(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    assert (
        await tidegate(gateway, "budgets", "set", "b", "--usd", "1", "--period", "5h")
    ).code == 0
    for period in ("6h", "day"):
        refused = await tidegate(gateway, "budgets", "set", "b", "--period", period)
        assert refused.code != 0
        assert f"--period={period}: " in refused.complained, refused.complained
        assert "window_s" not in refused.complained


async def test_a_larger_amount_of_a_paused_budget_is_set_with_a_note(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, admin_token=ADMIN_TOKEN)
    named = ("budgets", "set", "cap", "--usd")
    assert (await tidegate(gateway, *named, "5", "--pause")).code == 0
    assert (await tidegate(gateway, *named, "6")).complained == ""
    await gateway.database.execute("INSERT INTO budget_pauses (budget, scope) VALUES ('cap', '')")
    raised = await tidegate(gateway, *named, "7")
    assert raised.said == "cap is changed: $7.00 a month for all calls\n"
    note = "tidegate: note: cap is still paused: tidegate budgets resume cap\n"
    assert (raised.code, raised.complained) == (0, note)
    ended = await tidegate(gateway, *named, "7", "--no-pause")
    assert (ended.code, ended.complained) == (0, "")
