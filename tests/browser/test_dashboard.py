"""The dashboard in a real browser, on a real gateway: what it shows, does, and says when it can't.

With TIDEGATE_SCREENSHOTS set, the pictures of docs/dashboard.md are taken anew.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from uuid import UUID

import pytest
import pytest_asyncio
from playwright.async_api import Route, async_playwright, expect

from tests.browser.lists import another_operator_sets_the_weight
from tests.browser.pictures import WEIGHTS, pictured, under_traffic
from tests.browser.stage import ARGUMENTS, CHROMIUM, POLICY, TEXT, Colours, Seen, Stage, opened
from tests.gateway import gateway
from tests.waiting import wait_until
from tidegate.call import Charge, Scope, Usage
from tidegate.dashboard import feed
from tidegate.dashboard.rollup import count
from tidegate.embedded.servers import PostgresServer, ValkeyServer
from tidegate.policy.inspection import Control
from tidegate.prices.budgets import Budget, scope_text
from tidegate.record import CallRecord
from tidegate.spine.routing import FAULTS
from tidegate.store.statistics import CallCounts, TimeSpan

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANY = re.compile(".+")
IMAGES = Path(__file__).parents[2] / "docs" / "images"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(
    stores: tuple[ValkeyServer, PostgresServer], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stage]:
    """One gateway with a worker, two calls of text at once, and one browser, for all tests."""
    valkey, postgres = stores
    folder = tmp_path_factory.mktemp("dashboard")
    (folder / "tidegate.toml").write_text(POLICY)
    settings: dict[str, Any] = {
        "redis_url": valkey.url,
        "database_url": postgres.url(),
        "claim_lease_ms": 20_000,
        "first_byte_timeout_ms": 60_000,
        "idle_timeout_ms": 60_000,
        "auth": "on",
        "tidegate_policy": folder / "tidegate.toml",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "LIVE_EVERY_S", 0.25)
        patch.setattr(feed, "PAST_EVERY_S", 0.25)
        patch.setattr("tidegate.dashboard.feed.RECORD_EVERY_S", 0.2)
        patch.setattr(feed, "BUDGETS_EVERY_S", 0.2)
        async with (
            gateway(folder / "data", **settings) as running,
            async_playwright() as playwright,
        ):
            tenants = running.services.store.tenants
            _, made = await tenants.create_key("default", scopes=list(Scope))
            running.http.headers["x-api-key"] = made.text
            chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            yield Stage(running, valkey, postgres, chromium, made.text)
            await chromium.close()


async def test_the_numbers_move_with_real_traffic(stage: Stage) -> None:
    await stage.slow(1_500)
    async with opened(stage) as seen:
        await expect(seen.page.locator("#live")).to_have_text("Live")
        await expect(seen.limit("used")).to_contain_text("0 / 2")
        ids = await stage.submit(5)
        await expect(seen.limit("used")).to_contain_text("2 / 2")
        await stage.gateway.in_flight(2)
        await expect(seen.limit("waiting").locator(".figures")).to_have_text("3")
        await expect(seen.limit("state").locator(".badge")).to_have_text("Full")
        meter = seen.page.get_by_role("meter", name="kind:text_only")
        assert await meter.get_attribute("aria-valuetext") == "2 of 2 used"
        await expect(seen.page.locator("[data-tenant='default']")).to_contain_text("3")
        tiles = seen.page.locator(".tile")
        await expect(tiles.filter(has_text="Waiting")).to_contain_text("3")
        await stage.slow(0)
        for request_id in ids:
            await stage.gateway.end_of(request_id)
        await expect(seen.limit("used")).to_contain_text("0 / 2")
        await expect(seen.page.locator("[aria-label='Spend']")).to_contain_text("requests")
        process = seen.page.get_by_role("row", name="worker")
        await expect(process.get_by_text("Healthy")).to_be_visible()


async def test_changing_a_limit_takes_effect_at_the_limiter(stage: Stage) -> None:
    async with opened(stage) as seen:
        page = seen.page
        await page.get_by_role("button", name="Change kind:text_only").click()
        dialog = page.get_by_role("dialog", name="Change kind:text_only")
        await dialog.get_by_label("New limit").fill("many")
        await seen.is_accessible()
        await dialog.get_by_role("button", name="Change the limit").click()
        await expect(dialog).to_contain_text("Enter a number")
        seen.expected = ("400",)
        await dialog.get_by_label("New limit").fill("2.5")
        await dialog.get_by_role("button", name="Change the limit").click()
        await expect(dialog.get_by_role("alert")).to_contain_text("must be a whole number")
        await dialog.get_by_label("New limit").fill("4")
        await dialog.get_by_label("Reason").fill("a test")
        await dialog.get_by_role("button", name="Change the limit").click()
        await expect(dialog).to_be_hidden()
        await expect(page.locator(".toast")).to_contain_text("kind:text_only is 4 now")
        await expect(seen.limit("used")).to_contain_text("0 / 4")
        services = stage.gateway.services
        assert services.limiter.policy.bound("kind:text_only") == 4
        (newest,) = await services.keeper.history(1)
        assert (newest.set_by, newest.reason) == ("dashboard", "a test")
        async with stage.gateway.http.put(
            f"{stage.gateway.url}/admin/limits/kind:text_only", json={"limit": 2}
        ) as answer:
            assert answer.status == 200
        await expect(seen.limit("used")).to_contain_text("0 / 2")


A_CAUSE = """async (subject) => {
  const module = new URL("static/pages/overview/verdict.js", document.baseURI);
  const { verdictCard } = await import(module);
  const cause = { pool: "gemini", subject, level: "degraded", words: "", detail: "" };
  const card = verdictCard(() => ({ live: { pools: [{ pool: "gemini", limits: [] }] } }));
  const verdict = { health: "degraded", sentence: "", more: 0 };
  const show = (kind, command) =>
    card.live({ verdict: { ...verdict, causes: [{ ...cause, kind, command }] } });
  show("bottleneck", "tidegate limits show");
  document.body.append(card.element);
  card.element.querySelector("button").click();
  show("upstream_out", "tidegate upstreams test gemini");
  show("upstream_out", "tidegate upstreams resume gemini");
  return [...card.element.querySelectorAll("button")].map((one) => one.title);
}"""


async def test_the_first_line_says_whether_all_is_well_and_what_to_do(stage: Stage) -> None:
    limit = "kind:image_generation"
    async with opened(stage) as seen:
        state = seen.page.get_by_role("region", name="State")
        await expect(state).to_contain_text("Healthy")
        await stage.gateway.services.limiter.penalise(limit, for_ms=600_000, by="ann: quota")
        cause = state.locator(f"[data-cause='limit_paused'][data-subject='{limit}']")
        await expect(state).to_contain_text("Degraded")
        await expect(cause).to_contain_text("By ann: quota.")
        await seen.is_accessible()
        for width in (400, 1360):
            await seen.page.set_viewport_size({"width": width, "height": 900})
            assert await seen.is_within()
        await cause.get_by_role("button", name="Resume").click()
        await seen.page.get_by_role("dialog").get_by_role("button", name="Resume").click()
        await expect(state).to_contain_text("Healthy")
        await expect(cause).to_have_count(0)
        # A limit beyond those that a frame holds opens with its own figures.
        commands = await seen.page.evaluate(A_CAUSE, TEXT.split("'")[1])
        assert commands == ["tidegate upstreams resume gemini"]  # it was drained meanwhile
        dialog = seen.page.get_by_role("dialog", name="Change kind:text_only")
        await expect(dialog.get_by_label("New limit")).to_have_value("2")


async def test_of_many_limits_the_busy_ones_are_shown_and_all_are_found(stage: Stage) -> None:
    named = [f"tenant:many-{number:02}" for number in range(40)]
    running = stage.gateway
    change = f"{running.url}/admin/limits"
    body = {"set": dict.fromkeys(named, 7), "by": "ann", "reason": "a test of many"}
    async with running.http.patch(change, json=body) as answer:
        assert answer.status == 200, await answer.text()
    try:
        async with opened(stage) as seen:
            page = seen.page
            card = page.get_by_role("region", name="Limits")
            rows = card.locator("[data-limit]")
            await expect(card).to_contain_text("idle limits not shown")
            await expect(rows.filter(has_text="many-")).to_have_count(0)
            await expect(page.get_by_label("Changes")).to_contain_text("ann set")
            await page.get_by_label("Search limits").fill("many-07")
            await expect(rows).to_have_count(1)
            await expect(rows).to_contain_text("tenant:many-07")
            await page.get_by_label("Search limits").fill("many")
            await expect(card).to_contain_text("1 to 25 of 40")
            await card.get_by_role("button", name="Next").click()
            await expect(rows.filter(has_text="many-39")).to_be_visible()
            await page.get_by_label("Group limits").select_option("kind")
            await expect(card.locator(".limit-group")).to_contain_text("40 limits")
            await seen.is_accessible()
            await page.set_viewport_size({"width": 400, "height": 900})
            assert await seen.is_within()
            await card.get_by_role("button", name="Busy").click()
            await expect(card).to_contain_text("idle limits not shown")
    finally:
        async with running.http.patch(change, json={"remove": named}) as answer:
            assert answer.status == 200


async def test_limits_of_long_names_are_found_and_rehearsed_and_no_failure_is_silent(
    stage: Stage,
) -> None:
    running, limit = stage.gateway, f"tenant:{'long' * 49}/<b>"
    change = f"{running.url}/admin/limits"
    async with running.http.patch(change, json={"set": {limit: 7}}) as answer:
        assert answer.status == 200, await answer.text()
    try:
        async with opened(stage, expected=("503",)) as seen:
            page = seen.page
            card = page.get_by_role("region", name="Limits")
            await page.get_by_label("Search limits").fill(limit)
            await expect(card.locator("[data-limit]")).to_have_count(1)
            away = {"detail": "Not now."}
            listed = re.compile("/dashboard/limits")
            await page.route(listed, lambda one: one.fulfill(status=503, json=away))
            await page.get_by_label("Search limits").fill("kind")
            await expect(card).to_contain_text("Not refreshed: Not now.")
            await page.unroute(listed)
            await page.get_by_label("Search limits").fill(limit)
            await card.get_by_role("button", name="Change tenant:long").click()
            await page.get_by_role("dialog").get_by_label("New limit").fill("9")
            await page.get_by_role("link", name="Simulate the change").click()
            new = page.get_by_label(f"New value of {limit}")
            await expect(new).to_have_value("9")
    finally:
        async with running.http.patch(change, json={"remove": [limit]}) as answer:
            assert answer.status == 200


async def test_a_change_is_shown_whatever_it_set_and_however_long_its_reason(
    stage: Stage,
) -> None:
    running, link = stage.gateway, f"https://example.com/{'incident' * 55}"
    change = f"{running.url}/admin/limits"
    body = {"set": {"pool.fair_by": "cost"}, "by": "ann", "reason": link}
    tenant = f"{running.url}/admin/tenants/{'wide' * 40}"
    async with running.http.put(tenant, json={}) as answer:
        assert answer.status == 200, await answer.text()
    of_it = {"tenant": "wide" * 40, "name": "of a long name"}
    async with running.http.post(f"{running.url}/admin/keys", json=of_it) as answer:
        assert answer.status == 201, await answer.text()
    async with running.http.patch(change, json=body) as answer:
        assert answer.status == 200, await answer.text()
    try:
        async with opened(stage) as seen:
            page = seen.page
            await expect(page.get_by_label("Changes")).to_contain_text("pool.fair_by: none -> cost")
            for width in (400, 1360):
                await page.set_viewport_size({"width": width, "height": 900})
                assert await seen.is_within(), width
            await page.goto(f"{running.url}/dashboard/#/limits/history")
            newest = page.locator("[data-revision]").first
            await expect(newest.locator("li")).to_have_text("pool.fair_by none → cost")
            for width in (400, 1360):
                await page.set_viewport_size({"width": width, "height": 900})
                assert await seen.is_within(), width
            await page.goto(f"{running.url}/dashboard/#/tenants")
            keys = page.get_by_role("group", name="API keys, a table")
            await expect(keys).to_contain_text("of a long name")
            assert await keys.evaluate("one => one.scrollWidth <= one.clientWidth")
    finally:
        async with running.http.patch(change, json={"remove": ["pool.fair_by"]}) as answer:
            assert answer.status == 200
        async with running.http.delete(tenant) as answer:
            assert answer.status == 200


async def test_a_moment_of_a_chart_leads_to_its_requests(stage: Stage) -> None:
    await stage.gateway.end_of((await stage.submit(1))[0])
    async with opened(stage) as seen:
        chart = seen.page.get_by_role("img", name="Requests, newest")
        await expect(chart).to_be_visible()
        await chart.locator(".u-over").click()
        await expect(seen.page.get_by_role("heading", name="Requests")).to_be_visible()
        query = parse_qs((await seen.page.evaluate("location.hash")).partition("?")[2])
        assert query["time"] == ["between"]
        (since,), (until,) = query["since"], query["until"]
        assert datetime.fromisoformat(until) - datetime.fromisoformat(since) == timedelta(minutes=1)


async def test_one_choice_of_the_upstream_is_kept_and_all_are_added_up(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = stage.gateway
    url = f"{running.url}/admin/upstreams/spare"
    table = {"provider": "vllm", "base_url": "http://127.0.0.1:9/v1", "models": ["spare-*"]}
    body = {"table": table | {"limits": {"pool:total": 9}}, "test": False}
    async with running.http.put(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
    counts = CallCounts(by_group={"limit": {"pool:total": [600], "kind:text_only": [600]}})
    lately = TimeSpan(10, int(datetime.now(UTC).timestamp()) // 10 * 10 - 20, "gemini")
    await running.services.store.history.write([(lately, counts)])
    try:
        async with opened(stage) as seen:
            choice = seen.page.get_by_label("Upstream", exact=True)
            total = seen.page.locator("[data-limit='pool:total']")
            await expect(choice).to_have_value("")  # all of them
            await expect(total).to_contain_text("9 concurrent, spare")
            await expect(seen.page.locator(TEXT)).to_contain_text("2 concurrent, gemini")
            await seen.is_accessible()
            # Another upstream's limit of the same id has another curve.
            await expect(seen.page.locator(f"{TEXT} polyline")).to_have_attribute("points", ANY)
            assert await total.locator("polyline").get_attribute("points") is None
            # What is not shown is counted: a process once, though it has a session in each pool.
            monkeypatch.setattr(feed, "MOST_PROCESSES", 1)
            processes = seen.page.get_by_role("region", name="Processes")
            in_flight = seen.page.locator("[data-figure='flight']")
            await expect(processes).to_contain_text("2 sessions, 1 not shown")
            await expect(in_flight).to_contain_text("in 2 processes")
            await choice.select_option("spare")
            await expect(total).to_have_count(1)
            await expect(seen.page.locator(TEXT)).to_have_count(0)
            assert "pool=spare" in await seen.page.evaluate("location.hash")
            await expect(processes).to_contain_text("2 sessions, 1 not shown")
            await expect(in_flight).to_contain_text("in 2 processes")
            await seen.page.get_by_role("link", name="Attention").click()
            await seen.page.get_by_role("link", name="Overview").click()
            await expect(choice).to_have_value("spare")
            await a_weight_is_of_one_upstream(stage, seen)
            await seen.page.get_by_role("link", name="Overview").click()
            await choice.select_option("")
            await expect(seen.page.locator(TEXT)).to_have_count(1)
    finally:
        async with running.http.post(f"{url}/drain", json={}) as answer:
            assert answer.status == 200, await answer.text()
        async with running.http.delete(url) as answer:
            assert answer.status == 200, await answer.text()


async def a_weight_is_of_one_upstream(stage: Stage, seen: Seen) -> None:
    """Of the one that was chosen on the overview, until another is."""
    running, page = stage.gateway, seen.page
    url = f"{running.url}/admin/tenants/default"
    for pool, weight in (("gemini", 1), ("spare", 4)):
        async with running.http.put(f"{url}?pool={pool}", json={"weight": weight}) as answer:
            assert answer.status == 200, await answer.text()
    await page.get_by_role("navigation").get_by_role("link", name="Keys and tenants").click()
    choice, row = page.get_by_label("Upstream", exact=True), page.locator("[data-tenant='default']")
    await expect(choice).to_have_value("spare")
    await expect(row.locator("td").first).to_have_text("4")
    await row.get_by_role("button", name="Change").click()
    dialog = page.get_by_role("dialog", name="Change default")
    await dialog.get_by_label("Weight").fill("6")
    await dialog.get_by_role("button", name="Change the tenant").click()
    await expect(row.locator("td").first).to_have_text("6")
    weights = {name: one.policy.weights for name, one in running.services.limiters.items()}
    assert (weights["gemini"].get("default", 1), weights["spare"]["default"]) == (1, 6)
    await choice.select_option("gemini")
    await expect(row.locator("td").first).to_have_text("1")
    assert await seen.is_within()

    async def unanswered(_: Route) -> None:
        """The page is left before, which is no error of it."""

    tenants = "**/admin/tenants?pool=spare"
    await page.route(tenants, unanswered, times=1)
    async with page.expect_request(tenants):
        await choice.select_option("spare")


async def test_a_learned_limit_is_accepted_where_it_is_seen(stage: Stage) -> None:
    limit, running = "rpm:gemini-2.5-flash", stage.gateway
    limits = [{"models": "gemini-2.5-flash", "unit": "requests", "bound": 4_321}]
    await running.upstream.set_account(provider="gemini", limits=limits, headers="openai")
    services = running.services
    control = Control(services.keeper, services.store.running_calls, services.store.tenants)

    async def learned(bound: int) -> bool:  # one answer may leave it open what the window is
        assert await stage.native("Why?") == 200
        return (limit, bound) in [(one.limit, one.bound) for one in await control.learned()]

    try:
        await wait_until(lambda: learned(4_321), 20, "what the headers said")
        async with opened(stage, width=400) as seen:
            for width in (400, 1360):
                await seen.page.set_viewport_size({"width": width, "height": 900})
                row = seen.page.locator(f"[data-learned='{limit}']")
                await expect(row).to_contain_text("Answers report 4,321; no such limit")
                await seen.is_accessible()
                assert await seen.is_within()
                await expect(seen.page.get_by_role("region", name="Limits")).to_be_visible()
            await seen.page.get_by_role("button", name=f"Accept {limit}").click()
            dialog = seen.page.get_by_role("dialog", name=f"Accept the reported bound of {limit}?")
            await dialog.get_by_label("Reason").fill("as our tier has it")
            await seen.is_accessible()
            await dialog.get_by_role("button", name="Accept").click()
            await expect(dialog).to_be_hidden()
            await expect(seen.page.locator(".toast")).to_contain_text("The reported bound of")
            await expect(seen.limit("used", f"[data-limit='{limit}']")).to_contain_text("/ 4,321")
            await expect(seen.page.locator(f"[data-learned='{limit}']")).to_have_count(0)
            assert running.services.limiter.policy.bound(limit) == 4_321
            (newest,) = await running.services.keeper.history(1)
            assert (newest.set_by, newest.reason) == ("dashboard", "as our tier has it")
            # Its provider's tier rises: the page says so beside what is in force.
            await running.upstream.set_account(tier=2)
            await wait_until(lambda: learned(8_642), 20, "what the headers say since")
            row = seen.page.locator(f"[data-learned='{limit}']")
            await expect(row).to_contain_text("Answers report 8,642; 4,321 is in force: it rose")
    finally:
        await running.upstream.set_behaviour(account=None)
        async with running.http.delete(f"{running.url}/admin/limits/{limit}") as answer:
            assert answer.status in (200, 404)


async def test_what_another_operator_has_changed_is_not_overwritten(stage: Stage) -> None:
    change = f"{stage.gateway.url}/admin/limits/kind:multi_modal"
    async with opened(stage) as seen:
        await seen.page.get_by_role("button", name="Change kind:multi_modal").click()
        dialog = seen.page.get_by_role("dialog", name="Change kind:multi_modal")
        async with stage.gateway.http.put(change, json={"limit": 7}) as answer:
            assert answer.status == 200
        await dialog.get_by_label("New limit").fill("8")
        seen.expected = ("409",)
        await dialog.get_by_role("button", name="Change the limit").click()
        await expect(dialog.get_by_role("alert")).to_contain_text("is 7 now")
        assert stage.gateway.services.limiter.policy.bound("kind:multi_modal") == 7
    async with stage.gateway.http.put(change, json={"limit": 3}) as answer:
        assert answer.status == 200


async def test_what_was_confirmed_is_told_though_its_dialog_was_closed(stage: Stage) -> None:
    answered = asyncio.Event()

    async def late(route: Route) -> None:
        if route.request.method == "GET":
            await route.continue_()
            return
        await answered.wait()
        if route.request.method == "POST":
            await route.continue_()
        else:
            await route.fulfill(status=503, json={"detail": "Not now."})

    async with opened(stage, "/tenants", expected=("503",)) as seen:
        page = seen.page
        await page.route(re.compile("/admin/keys"), late)
        await page.get_by_role("button", name="New key").click()
        dialog = page.get_by_role("dialog")
        await dialog.get_by_label("Name").fill("closed early")
        await dialog.get_by_role("button", name="Create the key").click()
        await page.keyboard.press("Escape")
        await expect(dialog).to_have_count(0)
        answered.set()
        await expect(dialog.locator(".made-key")).to_contain_text("tg_")  # else nobody ever has it
        await dialog.get_by_role("button", name="Done").click()
        row = page.locator("tr", has_text="closed early")
        answered.clear()
        await row.get_by_role("button", name="Revoke").click()
        await dialog.get_by_role("button", name="Revoke").click()
        await dialog.get_by_role("button", name="Close").click()
        answered.set()
        await expect(page.locator(".toast")).to_contain_text("Revoke closed early? Not now.")


async def test_budgets_show_what_is_spent_and_a_paused_one_is_resumed(stage: Stage) -> None:
    budgets = stage.gateway.services.budgets
    rules = (
        Budget("team/acme", "usd", 5_000_000, "month", tenant="default", doubt="estimate"),
        Budget("people", "tokens", 40, "day", each=("subject",), at_end="pause", doubt="estimate"),
        Budget("hours", "usd", 2_000_000, "rolling", window_s=18_000, model="other-*"),
    )
    async with opened(stage) as seen:
        card = seen.page.get_by_label("Budgets", exact=True)
        await expect(card).to_be_hidden()
        for one in rules:
            await budgets.records.set(one, by="test")
        await budgets.refresh()
        await stage.gateway.database.execute(
            "INSERT INTO budget_books (budget, scope, period, spent) SELECT name, '',"
            " budget_period(period, zone, now()), 790000 FROM budgets WHERE name = 'team/acme'"
            " ON CONFLICT (budget, scope, period) DO UPDATE SET spent = excluded.spent"
        )
        await stage.gateway.database.execute(
            "INSERT INTO budget_books (budget, scope, period, spent) SELECT name, '[null]',"
            " budget_period(period, zone, now()), 40 FROM budgets WHERE name = 'people'"
            " ON CONFLICT (budget, scope, period) DO UPDATE SET spent = excluded.spent"
        )
        assert await stage.native("Why is the sea salty?") == 403
        team = card.locator("[data-budget='team/acme']")
        await expect(team).to_contain_text("$0.79 of $5.00")
        await expect(team).to_contain_text("$4.21 left")
        await expect(team).to_contain_text("tenant default, a month")
        await expect(team.locator(".limit-state")).to_contain_text("resets in ")
        meter = card.get_by_role("meter", name="team/acme")
        assert await meter.get_attribute("aria-valuetext") == "$0.79 of $5.00 spent"
        hours = card.locator("[data-budget='hours']")
        await expect(hours).to_contain_text("model other-*, in 5 h")
        # Without a subject; it stands first, as it is paused.
        first = card.locator(".limits > li").first
        await expect(first).to_contain_text("people: no subject")
        await expect(first.locator(".limit-state")).to_contain_text("Paused")
        await expect(card).to_contain_text("1 paused")
        await seen.is_accessible()
        await first.get_by_role("button", name="Resume people").click()
        dialog = seen.page.get_by_role("dialog", name="Resume people")
        await dialog.get_by_label("Extra amount for this period").fill("5000")
        await dialog.get_by_role("button", name="Resume").click()
        await expect(seen.page.locator(".toast")).to_contain_text("people: no subject is resumed")
        await expect(card).not_to_contain_text("Paused")
        await expect(card).to_contain_text(" of 5,040")  # calls of tests before count too
        await budgets.refresh()
        assert await stage.native("Why is the sea salty?") == 200
    async with opened(stage, width=1000) as seen:
        used = seen.page.locator("[data-budget='team/acme'] .limit-used")
        await expect(used).to_contain_text("of $5.00")
        tenants = seen.page.get_by_role("group", name="Tenants, a table")
        for part in (used, seen.page.locator("#nav"), tenants):
            assert await part.evaluate("(one) => one.scrollWidth <= one.clientWidth")
    async with opened(stage, width=400, colours="dark") as seen:
        await expect(seen.page.get_by_label("Budgets", exact=True)).to_contain_text("$4.2")
        await seen.is_accessible()
        assert await seen.is_within()
    for one in rules:
        await budgets.records.remove(one.name, by="test")
    await budgets.refresh()


async def test_a_spent_budget_is_raised_for_whom_its_cause_names(stage: Stage) -> None:
    budgets, names = stage.gateway.services.budgets, ("a", "ann")
    rule = Budget("teams", "tokens", 40, "day", tenant="crew", each=("subject",), doubt="estimate")
    await budgets.records.set(rule, by="test")
    await budgets.refresh()
    for name, spent in zip(names, (80, 40), strict=True):
        await stage.gateway.database.execute(
            "INSERT INTO budget_books (budget, scope, period, spent) SELECT name, $1,"
            " budget_period(period, zone, now()), $2 FROM budgets WHERE name = 'teams'",
            *(scope_text([name]), spent),
        )
    async with opened(stage) as seen:
        await expect(seen.page.locator("[data-budget='teams']")).to_have_count(2)
        for name in names:
            cause = seen.page.locator("[data-subject='teams']").filter(has_text=f"({name})")
            command = cause.get_by_role("button", name="Copy command")
            await expect(command).to_have_attribute(
                "title", f"tidegate budgets resume teams --of {name}"
            )
            await cause.get_by_role("button", name="Allow more").click()
            dialog = seen.page.get_by_role("dialog")
            await expect(dialog.get_by_role("heading")).to_have_text(f"Allow more of teams: {name}")
            await dialog.get_by_role("button", name="Allow more").click()
            await expect(dialog.locator(".wrong")).to_have_text("Enter an amount above 0.")
            await dialog.get_by_role("button", name="Cancel").click()
    await budgets.records.remove("teams", by="test")
    await budgets.refresh()


LARGE_FIGURES = """async () => {
  const module = new URL("static/pages/overview/figures.js", document.baseURI);
  const strip = (await import(module)).figuresStrip();
  document.querySelector(".overview").replaceChildren(strip.element);
  const faults = { throttled: 9_999, told_429: 0, failed: 9_999 };
  strip.now({ per_second: 999.9, waits: [200_000, 200_000], lengths: [3_599_000, 0], ...faults });
  const tokens = { input_tokens: 1, output_tokens: 1, thoughts_tokens: 1 };
  const total = { ...tokens, cost_micros: 9_999_990_000, unpriced: 0, requests: 1 };
  strip.record({ spent: { day: { total } } });
  const shown = [...strip.element.querySelectorAll(".tile-figure")];
  const cut = shown.filter((one) => one.scrollWidth > one.clientWidth);
  return [cut.map((one) => one.textContent), shown.map((one) => one.title).filter(Boolean)];
}"""


async def test_no_figure_is_cut_and_a_time_of_another_year_has_its_year(stage: Stage) -> None:
    later = datetime.now(UTC) + timedelta(days=366)
    key, _ = await stage.gateway.services.store.tenants.create_key("default", expires_at=later)
    for width in (1280, 1210, 650):
        async with opened(stage, width=width) as seen:
            page = seen.page
            await expect(page.locator("#live")).to_have_text("Live")
            cut, exact = await page.evaluate(LARGE_FIGURES)
            assert (cut, exact) == ([], ["3 min 20 s", "59 min 59 s", "$9,999.99"]), width
    async with opened(stage, "/tenants") as seen:
        badge = seen.page.locator(f"[data-key='{key.prefix}'] .badge")
        wanted = re.compile(rf"expires \d+ \w+ {later.year}, ")
        await expect(badge).to_have_attribute("title", wanted)


async def test_tokens_spent_today_are_those_of_the_usage_page(stage: Stage) -> None:
    await stage.gateway.database.execute(
        "INSERT INTO usage_days (tenant_id, day, model, pool, requests, input_tokens,"
        " output_tokens, thoughts_tokens, cost_micros) VALUES ('thinkers',"
        " (now() AT TIME ZONE 'UTC')::date, 'thinker', '', 1, 1000000, 2000000, 40000000, 1)"
    )
    async with opened(stage) as seen:
        spend = seen.page.get_by_role("group", name="Spend by Tenant, a table")
        await expect(spend.locator("tr", has_text="thinkers")).to_contain_text("43M")
        await expect(seen.page.locator("[data-figure='spent']")).to_contain_text("43M tokens")
        await seen.page.goto(f"{stage.gateway.url}/dashboard/#/usage?measure=tokens&range=7")
        row = seen.page.locator("[data-group='thinkers']")
        await expect(row).to_contain_text("1M")
        await expect(row).to_contain_text("42M")
    await stage.gateway.database.execute("DELETE FROM usage_days WHERE tenant_id = 'thinkers'")


async def test_a_pause_by_keyboard_holds_calls_up_until_it_is_resumed(stage: Stage) -> None:
    async with opened(stage) as seen:
        page = seen.page
        await page.get_by_role("button", name="Pause kind:text_only").focus()
        await page.keyboard.press("Enter")
        await page.keyboard.press("Escape")
        await expect(page.locator("dialog")).to_have_count(0)
        await expect(page.get_by_role("button", name="Pause kind:text_only")).to_be_focused()
        await page.keyboard.press("Enter")
        for _ in range(3):  # past the length and the reason, and over Cancel
            await page.keyboard.press("Tab")
        await page.keyboard.press("Enter")
        await expect(seen.limit("state")).to_contain_text("Paused")
        await expect(seen.limit("state")).to_contain_text("dashboard")
        (request_id,) = await stage.submit(1)
        await expect(seen.limit("waiting").locator(".figures")).to_have_text("1")
        assert (await stage.gateway.upstream.stats()).in_flight == 0
        await page.get_by_role("button", name="Resume kind:text_only").press("Enter")
        await page.get_by_role("dialog").get_by_role("button", name="Resume").click()
        await expect(page.locator(".toast").last).to_contain_text("admits calls again")
        assert (await stage.gateway.end_of(request_id))["status"] == "succeeded"


async def test_a_tenants_weight_is_changed_where_its_queue_is_seen(stage: Stage) -> None:
    await stage.slow(1_500)
    async with opened(stage) as seen:
        ids = await stage.submit(3)
        await seen.page.get_by_role("button", name="Change the weight of default").click()
        dialog = seen.page.get_by_role("dialog")
        await another_operator_sets_the_weight(stage, seen, dialog)
        await dialog.get_by_label("Weight").fill("7")
        await dialog.get_by_role("button", name="Change the weight").click()
        await expect(seen.page.locator("[data-tenant='default'] td").nth(2)).to_have_text("7")
        assert stage.gateway.services.limiter.policy.weights == {"default": 7}
        assert await seen.page.evaluate(WEIGHTS) == [[None, 2], ["\u2013", "60 %"], "3"]
        # What was done is on record, and what was written in it stays text.
        hostile = "<img src=x onerror=alert(1)>"
        made = f"{stage.gateway.url}/admin/keys"
        async with stage.gateway.http.post(made, json={"name": hostile}) as answer:
            assert answer.status == 201
        await seen.page.goto(f"{stage.gateway.url}/dashboard/#/tenants")
        await seen.page.get_by_role("link", name="Operator actions").click()
        rows = seen.page.locator("[aria-label='Actions'] tbody tr")
        await expect(rows.nth(0)).to_contain_text(hostile)
        await expect(rows.filter(has_text="tenant.set").first).to_contain_text("default")
        await seen.page.get_by_label("Search Actions").fill("limits.change")
        await expect(rows.first).to_contain_text("revision")
        for width in (1280, 400):
            await seen.page.set_viewport_size({"width": width, "height": 800})
            assert await seen.is_within()
        await seen.is_accessible()
        await stage.slow(0)
        for request_id in ids:
            await stage.gateway.end_of(request_id)


async def test_an_upstream_that_is_out_is_told_with_the_processes_that_found_it(
    stage: Stage,
) -> None:
    gateway = stage.gateway
    await gateway.upstream.set_fault("unavailable")
    try:
        await asyncio.gather(*(stage.native("Hi", 500) for _ in range(FAULTS)))
        async with opened(stage) as seen:
            upstream = seen.page.locator("[data-upstream=gemini]")
            await expect(upstream.locator(".badge")).to_contain_text("in 2 of 2")
            await expect(upstream).to_contain_text("api ")
            await seen.is_accessible()
            await seen.page.set_viewport_size({"width": 400, "height": 800})
            assert await seen.is_within()
            await gateway.upstream.clear_faults()

            async def answers() -> bool:
                return await stage.native("Hi", 500) == 200

            await wait_until(answers, 15, "it is tried again")
            await expect(upstream.locator(".badge")).to_have_text("Healthy")
    finally:
        await gateway.upstream.clear_faults()


async def test_a_dead_job_is_requeued_and_another_discarded(stage: Stage) -> None:
    await stage.gateway.services.limiter.penalise("kind:text_only", by="test")
    try:
        first, second, *others = await stage.submit(102)
        await stage.gateway.database.execute(
            "UPDATE requests SET status = 'dead', claim = claim + 1, claimed_by = NULL,"
            " finished_at = now(), failure = $1 WHERE status IN ('queued', 'running')",
            '{"code": "worker_lost", "message": "its workers died"}',
        )
    finally:
        await stage.gateway.services.limiter.resume("kind:text_only", by="test")
    async with opened(stage, "/requests") as seen:
        page = seen.page
        await page.get_by_role("link", name="Attention (102)").click()
        row = page.locator(f"[data-request='{first}']")
        dead = page.get_by_role("region", name="Dead jobs")
        await expect(dead).to_contain_text("1 to 25 of 102")
        await page.get_by_label("Search Dead jobs").fill(first)
        await expect(dead.locator("tbody tr")).to_have_count(1)
        await expect(row).to_contain_text("its workers died")
        await page.set_viewport_size({"width": 400, "height": 800})
        assert await seen.is_within()
        await page.set_viewport_size({"width": 1360, "height": 900})
        await seen.is_accessible()
        await stage.gateway.database.execute(
            "UPDATE requests SET status = 'cancelled', claim = claim + 1 WHERE id = ANY($1)",
            [UUID(one) for one in others],
        )
        await page.reload()
        await row.get_by_role("button", name="Requeue").click()
        await page.get_by_role("dialog").get_by_role("button", name="Requeue").click()
        await expect(row).to_have_count(0)
        await expect(page.get_by_role("link", name="Attention (1)")).to_be_visible(timeout=5_000)
        await page.locator(f"[data-request='{second}']").get_by_text("Discard").click()
        await page.get_by_role("dialog").get_by_role("button", name="Discard").click()
        await expect(page.get_by_text("No dead jobs")).to_be_visible()
        counts = {"dead_jobs": 1_000, "webhooks_given_up": 2}  # each is counted up to 1,000
        module = "import(new URL('static/stuck.js', document.baseURI))"
        await page.evaluate(f"async (counts) => (await {module}).told(counts)", counts)
        await expect(page.get_by_role("link", name="Attention (1,002+)")).to_be_visible()
        assert (await stage.gateway.end_of(first))["status"] == "succeeded"
        assert (await stage.gateway.status(second))["status"] == "cancelled"


async def test_nothing_is_shown_without_a_key_and_a_revoked_one_is_asked_for_again(
    stage: Stage,
) -> None:
    tenants = stage.gateway.services.store.tenants
    key, made = await tenants.create_key("default", scopes=[Scope.ADMIN])
    _, weak = await tenants.create_key("default")
    _, viewer = await tenants.create_key("default", scopes=[Scope.VIEWER])
    refused = ("401", "403")
    async with opened(stage, signed_in=False, expected=refused) as seen:
        page = seen.page
        field = page.get_by_label("Key")
        await expect(field).to_be_focused()
        await seen.is_accessible()
        for wrong, why in (
            ("", "Enter a key"),
            ("two words", "no spaces"),
            ("tg_nonsense", "not an API key of this gateway"),
            (weak.text, "has no role of viewer, operator, admin"),
        ):
            await field.fill(wrong)
            await page.keyboard.press("Enter")
            await expect(page.locator(".wrong")).to_contain_text(why)
        assert await page.evaluate("sessionStorage.length") == 0
        await field.fill(viewer.text)
        await page.keyboard.press("Enter")
        pause = page.get_by_role("button", name="Pause kind:text_only")
        await expect(pause).to_be_disabled()
        await expect(pause).to_have_attribute(
            "title", "Requires the role operator. Your role is viewer."
        )
        await expect(page.locator("#who")).to_have_text("viewer")
        await page.get_by_role("button", name="Sign out").click()
        await field.fill(made.text)
        await page.keyboard.press("Enter")
        await expect(seen.limit("used")).to_contain_text("/ 2")
        await expect(pause).to_be_enabled()
        assert await page.evaluate("[document.cookie, localStorage.getItem('tidegate.key')]") == [
            *("", None),
        ]
        await tenants.revoke_key(key.prefix, by="test")
        await expect(page.locator(".wrong")).to_contain_text("was revoked")
        await expect(page.locator(".limit")).to_have_count(0)


async def test_while_a_store_is_away_the_page_says_so_and_recovers(stage: Stage) -> None:
    async with opened(stage) as seen:
        page = seen.page
        await expect(seen.limit("used")).to_contain_text("0 / 2")
        stage.valkey.pause()
        try:
            await expect(page.get_by_text("Valkey does not answer")).to_be_visible()
            await expect(seen.limit("used")).to_contain_text("0 / 2")  # the last that was known
            await seen.is_accessible()
        finally:
            stage.valkey.resume()
        await expect(page.get_by_text("Valkey does not answer")).to_be_hidden()
        stage.postgres.pause()
        try:
            await expect(page.get_by_text("PostgreSQL does not answer")).to_be_visible()
            seen.expected = ("503",)
            await page.goto(f"{stage.gateway.url}/dashboard/#/attention")
            alerts = page.get_by_role("alert").filter(has_text="Could not load")
            await expect(alerts.first).to_be_visible()
        finally:
            stage.postgres.resume()
        await wait_until(lambda: not stage.gateway.services.store.connections.unavailable)
        await alerts.first.get_by_role("button", name="Try again").click()
        await expect(page.get_by_text("No dead jobs")).to_be_visible()
        await wait_until(lambda: stage.gateway.services.limiter.local_state().state == "up")


async def test_what_the_classifier_asked_is_told_beside_the_spend(stage: Stage) -> None:
    now = datetime.now(UTC)
    charge = Charge(usage=Usage(1_200, 34), cost_micros=445_000)
    question = CallRecord("judge", "default", now, charge=charge)
    question.end("succeeded")
    span = TimeSpan(10, int(now.timestamp()) // 10 * 10 - 20, "gemini")
    await stage.gateway.services.store.history.write([(span, count(question))])
    async with opened(stage) as seen:
        told = seen.page.locator("[aria-label='Spend']").get_by_text("of the classifier")
        await expect(told).to_have_text(
            "Not included: 1 question of the classifier in the last 5 minutes, 1,234 tokens, $0.45"
        )
        await seen.page.get_by_role("button", name="1 h", exact=True).click()
        await expect(told).to_be_hidden()


async def test_a_lost_connection_is_told_and_made_again(stage: Stage) -> None:
    async with opened(stage, expected=("ERR_", "Failed to load")) as seen:
        live = seen.page.locator("#live")
        await expect(live).to_have_text("Live")
        await seen.page.route("**/dashboard/feed*", lambda route: route.abort())
        for viewer in list(feed.feed_of(stage.gateway.app)._viewers):
            viewer.leave()
        await expect(live).to_have_text("Reconnecting")
        await expect(seen.page.locator("main")).to_have_css("opacity", "0.55")
        await seen.page.unroute("**/dashboard/feed*")
        await expect(live).to_have_text("Live")
        await expect(seen.page.locator("main")).to_have_css("opacity", "1")


@pictured
async def test_the_overview_is_accessible_and_fits_in_both_colours(
    stage: Stage, tmp_path: Path
) -> None:
    each: list[tuple[int, list[Colours]]] = [(1360, ["light", "dark"]), (400, ["light"])]
    for width, all_colours in each:
        async with opened(stage, width=width) as seen:
            page = seen.page
            await expect(page.locator("#live")).to_have_text("Live")
            for span in ("1 h", "24 h", "5 min"):
                await page.get_by_role("button", name=span, exact=True).click()
                await expect(page.locator(".faults").locator("xpath=..")).to_contain_text("last ")
            for colours in all_colours:
                await looked_at(stage, seen, colours, width, tmp_path)


async def looked_at(stage: Stage, seen: Seen, colours: Colours, width: int, folder: Path) -> None:
    """As the system's colours change, too."""
    await (page := seen.page).emulate_media(color_scheme=colours)
    ground = {"light": "rgb(246, 247, 248)", "dark": "rgb(14, 22, 27)"}[colours]
    await expect(page.locator("body")).to_have_css("background-color", ground)
    await expect(page.locator(".chart canvas")).to_have_count(5)
    await expect(seen.limit("used")).to_contain_text("/")
    taking = bool(os.environ.get("TIDEGATE_SCREENSHOTS"))
    async with under_traffic(stage) if taking else nullcontext():
        await seen.is_accessible()
        assert await seen.is_within()
        look = "narrow" if width == 400 else colours
        path = (IMAGES if taking else folder) / f"dashboard-{look}.png"
        await page.screenshot(path=path, full_page=True)
        assert path.stat().st_size > 20_000


async def test_colours_are_chosen_and_kept_and_the_keyboard_reaches_everything(
    stage: Stage,
) -> None:
    async with opened(stage) as seen:
        page = seen.page
        await expect(seen.limit("used")).to_contain_text("/ 2")
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
        reached: list[str] = []
        while "Change kind:classifier" not in reached and len(reached) < 60:
            await page.keyboard.press("Tab")
            reached.append(
                await page.evaluate(
                    "document.activeElement.getAttribute('aria-label')"
                    " ?? document.activeElement.textContent"
                )
            )
        wanted = ["Tidegate", "Overview", "Theme: system", "5 min", "1 h"]
        assert [one for one in reached if one in wanted] == wanted
        assert reached[-1] == "Change kind:classifier"
        theme = page.locator("#theme")
        await theme.press("Enter")
        await theme.press("Space")
        ground = "getComputedStyle(document.body).backgroundColor"
        assert await page.evaluate(ground) == "rgb(14, 22, 27)"
        await page.reload()
        assert await page.evaluate(ground) == "rgb(14, 22, 27)"
        for nowhere in ("/nowhere", "/requests/%zz"):
            await page.goto(f"{stage.gateway.url}/dashboard/#{nowhere}")
            await expect(page.locator("#main")).to_contain_text(f"Page not found{nowhere}")


async def test_a_tenants_name_is_not_cut_for_its_figures(stage: Stage) -> None:
    await stage.gateway.end_of((await stage.submit(1))[0])
    async with opened(stage, width=1100) as seen:
        table = seen.page.get_by_label("Spend by Tenant, a table")
        tenant = table.get_by_role("rowheader", name="default")
        room, needed = await tenant.evaluate("cell => [cell.clientWidth, cell.scrollWidth]")
        assert room >= needed
