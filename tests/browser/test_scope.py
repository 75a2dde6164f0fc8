"""One choice of the upstream, which every page follows that is about one; others are of all."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Page, async_playwright, expect

from tests.browser.stage import ARGUMENTS, CHROMIUM, SHIFTS, Stage, assert_still, drawn, opened
from tests.gateway import gateway
from tests.waiting import wait_until
from tidegate import __version__
from tidegate.call import Scope
from tidegate.dashboard import feed
from tidegate.embedded.servers import PostgresServer, ValkeyServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

PRESSED = ("aria-pressed", "true")
CUT = """(row) => [...row.cells].filter((one) => one.scrollWidth > one.clientWidth)
    .map((one) => one.textContent)"""
OF_GEMINI, OF_SPARE = "gemini-2.5-flash", "spare-1"
POLICY = """
[upstreams.gemini.prices]
"*" = { input = 0.30, output = 2.50, tiers = { flex = { share = 0.5 } } }
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(
    stores: tuple[ValkeyServer, PostgresServer], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stage]:
    """A gateway with the upstreams gemini and spare, which one provider stands behind: three
    calls of spare have ended, two of gemini, one of each a job."""
    valkey, postgres = stores
    folder = tmp_path_factory.mktemp("scope")
    (folder / "tidegate.toml").write_text(POLICY)
    settings: dict[str, Any] = {"redis_url": valkey.url, "database_url": postgres.url()}
    settings |= {"auth": "on", "tidegate_policy": folder / "tidegate.toml"}
    settings |= {"first_byte_timeout_ms": 60_000, "idle_timeout_ms": 60_000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "LIVE_EVERY_S", 0.25)
        patch.setattr(feed, "PAST_EVERY_S", 0.25)
        patch.setattr(feed, "RECORD_EVERY_S", 0.2)
        patch.setattr(feed, "BUDGETS_EVERY_S", 0.2)
        patch.setenv("SPARE_KEY", "sk-spare")
        async with (
            gateway(folder / "data", **settings) as running,
            async_playwright() as playwright,
        ):
            _, made = await running.services.store.tenants.create_key("default", scopes=list(Scope))
            running.http.headers["x-api-key"] = made.text
            chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            found = Stage(running, valkey, postgres, chromium, made.text)
            await add_spare(found)
            for model in (OF_GEMINI, OF_SPARE):
                assert await called(found, model) == 200
                job = await running.submit(data=f"Ask {model}", type="text_only", model=model)
                assert (await running.end_of(job))["status"] == "succeeded"
            assert await called(found, OF_SPARE) == 200
            count = "SELECT count(*) = 5 FROM audit"
            await wait_until(lambda: running.database.fetchval(count), 20)
            yield found
            await chromium.close()


async def add_spare(stage: Stage) -> None:
    running = stage.gateway
    table: dict[str, Any] = {"provider": "vllm", "base_url": f"{running.upstream.url}/v1"}
    table |= {"models": ["spare-*"], "key": "SPARE_KEY", "limits": {"pool:total": 1}}
    table |= {"prices": {"*": {"input": 1.0, "output": 4.0}}}
    url = f"{running.url}/admin/upstreams/spare"
    async with running.http.put(url, json={"table": table, "test": False}) as answer:
        assert answer.status == 200, await answer.text()


async def called(stage: Stage, model: str) -> int:
    url = f"{stage.gateway.url}/v1/chat/completions"
    body = {"model": model, "messages": [{"role": "user", "content": "Why?"}]}
    async with stage.gateway.http.post(url, json=body) as response:
        await response.read()
        return response.status


async def choose(page: Page, upstream: str) -> None:
    await page.get_by_label("Upstream", exact=True).select_option(upstream)


async def go(page: Page, name: str) -> None:
    await page.get_by_role("navigation", name="Pages").get_by_role("link", name=name).click()
    await expect(page.get_by_role("heading", level=1)).to_have_text(name)


async def ended(stage: Stage, upstream: str) -> int:
    """How many requests count for an upstream, or for all."""
    count = "SELECT count(*) FROM audit WHERE $1 IN ('', coalesce(upstream, pool))"
    return int(await stage.gateway.database.fetchval(count, upstream))


async def test_the_record_is_narrowed_by_the_upstream_that_was_chosen(stage: Stage) -> None:
    said = {one: f"{await ended(stage, one)} requests" for one in ("", "gemini", "spare")}
    assert len(set(said.values())) > 1
    async with opened(stage) as seen:
        page = seen.page
        spend = page.get_by_role("region", name="Spend")
        await expect(spend).to_contain_text(said[""])
        state = page.get_by_role("region", name="State")
        await expect(state.get_by_text("Of all upstreams")).to_be_hidden()
        await choose(page, "spare")
        await expect(spend).to_contain_text(said["spare"])
        await expect(spend).not_to_contain_text(OF_GEMINI)
        await expect(spend).to_contain_text(OF_SPARE)
        await expect(state.get_by_text("Of all upstreams")).to_be_visible()
        await expect(page.locator("[data-upstream]")).to_have_count(1)

        await go(page, "Requests")
        rows = page.locator(".list-card tbody tr")
        of_gemini, of_spare = (rows.filter(has_text=one) for one in (OF_GEMINI, OF_SPARE))
        await expect(of_spare).not_to_have_count(0)
        await expect(of_gemini).to_have_count(0)
        assert "upstream=spare" in await page.evaluate("location.hash")
        await choose(page, "")
        await expect(rows).to_have_count(await ended(stage, ""))
        await choose(page, "gemini")
        await expect(of_spare).to_have_count(0)
        await expect(of_gemini).not_to_have_count(0)
        await seen.is_accessible()

        await go(page, "Usage")
        total = page.locator(".usage-total")
        await expect(total).to_contain_text(said["gemini"])
        assert "upstream=gemini" in await page.evaluate("location.hash")
        by = page.get_by_role("group", name="Group by")
        for group in ("Model", "Key", "Upstream", "Day"):
            await by.get_by_role("button", name=group).click()
            await expect(by.get_by_role("button", name=group)).to_have_attribute(*PRESSED)
            await expect(page.locator(".usage[aria-busy]")).to_have_count(0)
            await expect(total).to_contain_text(said["gemini"])
        await choose(page, "")
        await expect(total).to_contain_text(said[""])
        await by.get_by_role("button", name="Upstream").click()
        await page.get_by_role("link", name="spare").click()
        await expect(total).to_contain_text(said["spare"])
        await expect(page.get_by_label("Upstream", exact=True)).to_have_value("spare")

        await page.goto(f"{stage.gateway.url}/dashboard/#/latency?upstream=gemini")
        await expect(page.get_by_role("heading", level=1)).to_have_text("Latency")
        today = page.get_by_role("group", name="Day").get_by_role("button").last
        async with page.expect_request(re.compile(r"/admin/latency\?.*upstream=gemini")):
            await today.click()
        await expect(page.locator(".usage[aria-busy]")).to_have_count(0)
        await seen.is_accessible()


async def test_what_waits_for_its_first_call_is_of_the_upstreams_that_it_may_go_to(
    stage: Stage,
) -> None:
    running = stage.gateway
    await running.upstream.set_fault("hang", match="hold it")
    holder = await running.submit(data="hold it", type="text_only", model=OF_SPARE)

    async def holds() -> bool:
        return bool((await running.status(holder))["status"] == "running")

    await wait_until(holds, 20, "the job that holds the permit")
    waiter = await running.submit(data="Wait for it", type="text_only", model=OF_SPARE)
    try:
        async with opened(stage, "/requests?status=open&upstream=spare") as seen:
            waiting = seen.page.get_by_role("link", name=waiter[:18])
            await expect(waiting).to_be_visible()
            await choose(seen.page, "gemini")
            await expect(seen.page.get_by_text("No requests match")).to_be_visible()
            await seen.page.get_by_role("button", name="Clear all filters").click()
            await expect(seen.page.get_by_label("Upstream", exact=True)).to_have_value("")
            await expect(waiting).to_be_visible()
    finally:
        for job in (waiter, holder):
            async with running.http.delete(f"{running.url}/requests/{job}") as answer:
                assert answer.status in (200, 202)
            await running.end_of(job)
        await running.upstream.clear_faults()


async def test_an_upstream_that_is_gone_is_found_by_its_address_and_then_left(stage: Stage) -> None:
    async with opened(stage, "/usage?upstream=gone") as seen:
        choice = seen.page.get_by_label("Upstream", exact=True)
        await expect(choice.locator("option:checked")).to_have_text("gone (removed)")
        await expect(seen.page.get_by_text("No usage in these days")).to_be_visible()
        await go(seen.page, "Overview")
        await expect(choice).to_have_value("")


async def test_changes_of_limits_are_those_of_one_upstream_or_of_all(stage: Stage) -> None:
    running = stage.gateway
    for pool, limit in (("gemini", "kind:text_only"), ("spare", "rpm:total")):
        url = f"{running.url}/admin/limits/{limit}?pool={pool}"
        async with running.http.put(url, json={"limit": 900, "by": "ann"}) as answer:
            assert answer.status == 200, await answer.text()
    async with opened(stage, "/limits/history") as seen:
        page = seen.page
        revisions = page.locator("[data-revision]")
        await expect(revisions.filter(has_text="of spare").first).to_contain_text("rpm:total")
        of_gemini = revisions.filter(has_text="of gemini").first  # the newest
        await expect(of_gemini).to_contain_text("kind:text_only")
        await choose(page, "spare")
        await expect(revisions.filter(has_text="kind:text_only")).to_have_count(0)
        await expect(revisions.filter(has_text="rpm:total")).to_have_count(1)
        assert "pool=spare" in await page.evaluate("location.hash")
        # What if is of one upstream: a look at another one chooses nothing for the other pages.
        await page.goto(f"{running.url}/dashboard/#/what-if?pool=gemini")
        await expect(page.get_by_label("Upstream", exact=True)).to_have_value("gemini")
        await go(page, "Overview")
        await expect(page.get_by_label("Upstream", exact=True)).to_have_value("spare")


async def test_a_job_shows_the_tier_that_it_was_sent_in_and_why(stage: Stage) -> None:
    running = stage.gateway
    await running.services.store.tenants.set("default", {"tiers": ["live", "flex"]}, by="ann")
    try:
        asked = {"data": "Explain the tide", "type": "text_only", "model": OF_GEMINI}
        job = await running.submit(**asked, tiers=["flex"])
        assert (await running.end_of(job))["tier"] == "flex"
        async with opened(stage, f"/requests?upstream=gemini&open={job}") as seen:
            page = seen.page
            row = page.locator(".list-card tbody tr", has_text=job[:18])
            await expect(row.get_by_text("Flex tier").locator("visible=true")).to_be_visible()
            facts = page.locator(".part-facts")
            await expect(facts).to_contain_text("Flex tier: flex costs 50% of the usual price")
            await expect(facts).to_contain_text("at the price of the tier flex")
            await seen.is_accessible()
            await page.get_by_role("button", name="Close").click()
            await page.set_viewport_size({"width": 1280, "height": 900})
            what = row.locator(".c-what")
            await expect(what).to_contain_text("Flex tier · Job · Text")
            assert await row.evaluate(CUT) == []
            await go(page, "Keys and tenants")
            await expect(page.locator("[data-tenant='default']")).to_contain_text("live, flex")
    finally:
        await running.services.store.tenants.set("default", {"tiers": None}, by="ann")


async def test_what_needs_a_person_is_of_all_upstreams_and_leads_to_the_books(stage: Stage) -> None:
    async with opened(stage, "/attention") as seen:
        await expect(seen.page.get_by_label("Upstream", exact=True)).to_have_count(0)
        costs = seen.page.get_by_role("region", name="Unexplained costs")
        await expect(costs).to_contain_text("No unexplained costs")
        await costs.get_by_role("link", name="All reconciliations").click()
        await expect(seen.page.get_by_role("heading", level=1)).to_have_text("Usage")


WAITS = """async () => {
    const { marked } = await import(new URL("static/ui.js", document.baseURI));
    const said = marked("raise it (`tidegate limits set`) or wait");
    return said.map((part) => part.outerHTML ?? part);
}"""


async def test_a_laptop_names_all_pages_beside_the_state_of_the_feed(stage: Stage) -> None:
    async with opened(stage, width=1280) as seen:
        await expect(seen.page.locator("#live")).to_have_text("Live")
        nav = seen.page.locator("#nav")
        assert await nav.evaluate("(one) => one.scrollWidth <= one.clientWidth")
        command = "<code>tidegate limits set</code>"
        assert await seen.page.evaluate(WAITS) == ["raise it (", command, ") or wait"]


LONG_WAIT = """async () => {
    const at = (file) => import(new URL(`static/${file}`, document.baseURI));
    const element = document.createElement("span");
    const now = Date.now();
    Date.now = () => now;  // of this page alone
    const since = new Date(now - 238_500).toISOString();
    (await at("pages/request_words.js")).goesOn(element, null, since);
    return [element.textContent, element.title];
}"""


async def test_a_long_wait_in_a_list_has_one_unit_and_is_exact_in_its_title(stage: Stage) -> None:
    async with opened(stage, "/requests") as seen:
        assert await seen.page.evaluate(LONG_WAIT) == ["4.0 min", "3 min 58 s so far"]


async def test_j_reaches_the_first_row_of_keys(stage: Stage) -> None:
    async with opened(stage, "/tenants") as seen:
        await expect(seen.page.locator("[data-key]").first).to_be_visible()
        await seen.page.keyboard.press("j")
        await expect(seen.page.locator("[data-key] a").first).to_be_focused()


COVERED = """(row) => {
    const actions = row.querySelector(".actions").getBoundingClientRect();
    const shown = [...row.cells].filter((one) => one.offsetWidth && !one.matches(".actions"));
    return shown.filter((one) => one.getBoundingClientRect().right > actions.left + 1)
        .map((one) => one.textContent);
}"""


async def test_the_actions_of_a_tenant_cover_none_of_its_columns(stage: Stage) -> None:
    running = stage.gateway
    change = {"budget_day_tokens": 5_000_000, "budget_month_tokens": 90_000_000, "tiers": ["flex"]}
    url = f"{running.url}/admin/tenants/department-of-things"
    async with running.http.put(url, json=change) as answer:
        assert answer.status == 200, await answer.text()
    async with opened(stage, "/tenants", width=800) as seen:
        row = seen.page.locator("tr[data-tenant='department-of-things']")
        await expect(row).to_contain_text("5M tokens")
        for width in (1280, 1100, 1000, 900, 800, 700, 641):
            await seen.page.set_viewport_size({"width": width, "height": 900})
            assert await row.evaluate(COVERED) == [], width
            assert await seen.is_within()


async def test_a_list_without_items_has_no_search(stage: Stage) -> None:
    async with opened(stage, "/alerts") as seen:
        posted = seen.page.get_by_role("region", name="Raised")
        await expect(posted).to_contain_text("0")
        await expect(posted.get_by_role("searchbox")).to_be_hidden()
    async with opened(stage, "/tenants") as seen:
        search = seen.page.get_by_role("searchbox", name="Search Tenants")
        await search.fill("no such tenant")
        await expect(seen.page.get_by_text("No matches")).to_be_visible()
        await expect(search).to_be_visible()


async def test_an_alert_without_a_webhook_is_not_posted(stage: Stage) -> None:
    database = stage.gateway.database
    await database.execute(
        "INSERT INTO alerts (kind, data, state, tries) VALUES ('budget_out', $1, 'pending', 0)",
        '{"budget": "all", "scope": "", "spent": 1400, "amount": 2000, "unit": "tokens"}',
    )
    async with opened(stage, "/alerts") as seen:
        await expect(seen.page.get_by_role("region", name="Channel")).to_contain_text("Not set up")
        row = seen.page.get_by_role("region", name="Raised").locator("tr[data-alert]")
        await expect(row.locator(".badge")).to_have_text("Not posted")
        await expect(row).to_contain_text("1,400 tokens of 2,000 tokens spent")
    await database.execute("DELETE FROM alerts")


async def test_a_request_that_no_upstream_was_called_for_has_no_call_time(stage: Stage) -> None:
    limiter = stage.gateway.services.limiter
    await limiter.penalise("kind:text_only", for_ms=600_000, by="test")
    assert await stage.native("Why is it refused?", deadline_ms=50) == 429
    await limiter.resume("kind:text_only", by="test")
    async with opened(stage, "/requests") as seen:
        row = seen.page.locator("tbody tr").filter(has_text="Why is it refused?").first
        await expect(row.locator(".c-number").nth(1)).to_have_text("\N{EN DASH}")


async def test_figures_in_the_list_of_requests_are_whole(stage: Stage) -> None:
    await stage.gateway.end_of((await stage.submit(1))[0])
    async with opened(stage, "/requests") as seen:
        waited = seen.page.locator("tbody .c-number").first
        await waited.locator("span").evaluate("one => (one.textContent = '59.9 min')")
        for width in (1440, 1360, 1280, 1230):
            await seen.page.set_viewport_size({"width": width, "height": 900})
            room, needed = await waited.evaluate("one => [one.clientWidth, one.scrollWidth]")
            assert needed <= room, width
            talk = seen.page.locator("thead .c-talk")
            room, needed = await talk.evaluate("one => [one.clientWidth, one.scrollWidth]")
            assert needed <= room, width


async def test_a_tenants_own_limits_are_set_where_it_is_listed(stage: Stage) -> None:
    running = stage.gateway
    url = f"{running.url}/admin/tenants/team%2Fgreen"
    calls, rpm = "tenant:team/green", "rpm:tenant/team/green"

    async def limits(pool: str) -> Any:
        async with running.http.get(url, params={"pool": pool}) as answer:
            return (await answer.json())["limits"]

    async with opened(stage, "/tenants?pool=gemini") as seen:
        page = seen.page
        await page.get_by_role("button", name="New tenant").click()
        dialog = page.get_by_role("dialog", name="New tenant")
        await dialog.get_by_label("Name").fill("team/green")
        await dialog.get_by_label("Concurrent calls").fill("5")
        await dialog.get_by_label("Requests per minute").fill("1,200")
        await seen.is_accessible()
        await dialog.get_by_role("button", name="Create the tenant").click()
        row = page.locator("[data-tenant='team/green']")
        own = row.get_by_title("1,200 requests a minute, 5 concurrent")
        await expect(own).to_have_text("2")
        assert (await limits("gemini"), await limits("spare")) == ({calls: 5, rpm: 1200}, {})
        # A limit with more options than a bound keeps them.
        async with running.http.put(url, json={"limits": {calls: {"bound": 5, "shadow": True}}}):
            pass
        await page.reload()
        await row.get_by_role("button", name="Change").click()
        dialog = page.get_by_role("dialog", name="Change team/green")
        await expect(dialog.get_by_label("Requests per minute")).to_have_value("1200")
        await dialog.get_by_label("Concurrent calls").fill("7")
        await dialog.get_by_label("Requests per minute").fill("")
        await dialog.get_by_role("button", name="Change the tenant").click()
        await expect(row.get_by_title("7 concurrent")).to_have_text("7 concurrent")
        assert await limits("gemini") == {calls: {"bound": 7, "shadow": True}}
        # What another operator has changed meanwhile is not overwritten.
        await row.get_by_role("button", name="Change").click()
        async with running.http.put(url, json={"limits": {calls: 3}}):
            pass
        await dialog.get_by_label("Concurrent calls").fill("9")
        seen.expected = ("409",)
        await dialog.get_by_role("button", name="Change the tenant").click()
        await expect(dialog).to_contain_text("another change came first")
        assert await limits("gemini") == {calls: 3}
    async with running.http.delete(url) as gone:
        assert gone.status == 200


async def test_pauses_changed_upstreams_and_starts_are_marked_in_the_charts(stage: Stage) -> None:
    running = stage.gateway
    steps: tuple[tuple[str, dict[str, Any]], ...] = (
        ("limits/kind:text_only/pause?pool=gemini", {"for_ms": 600_000, "reason": "quota"}),
        ("limits/kind:text_only/resume?pool=gemini", {}),
        ("upstreams/spare/drain", {"reason": "maintenance"}),
        ("upstreams/spare/resume", {}),
    )
    for path, body in steps:
        async with running.http.post(
            f"{running.url}/admin/{path}", json={"by": "ann", **body}
        ) as answer:
            assert answer.status == 200, await answer.text()
    async with opened(stage) as seen:
        page = seen.page
        changes = page.get_by_label("Changes")
        paused = "ann paused kind:text_only in gemini for 10 min: quota"
        for words in (
            paused,
            "ann resumed kind:text_only in gemini",
            "ann drained the upstream spare: maintenance",
            "ann resumed the upstream spare",
        ):
            await expect(changes).to_contain_text(words)
        await choose(page, "spare")
        await expect(changes).not_to_contain_text("kind:text_only")
        await expect(changes).to_contain_text("ann drained the upstream spare")
        await seen.is_accessible()
        await page.set_viewport_size({"width": 400, "height": 900})
        assert await seen.is_within()
    started = "SELECT count(*) > 0 FROM history WHERE pool = '' AND apart->'started' ? $1"
    await wait_until(lambda: running.database.fetchval(started, __version__), 20, "the start")


async def test_the_prices_by_which_an_upstream_is_charged_are_shown(stage: Stage) -> None:
    async with opened(stage, "/upstreams") as seen:
        page = seen.page
        await page.get_by_role("button", name="Prices of spare").click()
        dialog = page.get_by_role("dialog", name="Prices of spare")
        row = dialog.locator("tbody tr")
        await expect(row.locator("td")).to_have_text(
            ["*", "$1.00", "$1.00", "$4.00", "\u2013", "stated here"]
        )
        await seen.is_accessible()
        await page.set_viewport_size({"width": 400, "height": 900})
        assert await seen.is_within()
        await dialog.get_by_role("button", name="Close").click()
        await expect(page.get_by_role("button", name="Prices of spare")).to_be_focused()
        await page.get_by_role("button", name="Prices of gemini").click()
        row = page.get_by_role("dialog", name="Prices of gemini").locator("tbody tr")
        await expect(row).to_contain_text("own prices for flex")


@pytest.mark.parametrize("path", ["/requests", "/batches", "/upstreams", "/alerts"])
async def test_a_page_does_not_jump_while_it_is_read_and_refreshed(stage: Stage, path: str) -> None:
    async with opened(stage, path) as seen:
        page = seen.page
        await page.evaluate(SHIFTS)
        await expect(page.get_by_role("heading", level=1)).to_be_visible()
        async with page.expect_response(re.compile("/admin/")):
            pass
        await drawn(page)
        await assert_still(page, 0.1)


CARDS = [
    ("/attention", "No unexplained costs"),
    ("/usage", "No day in this range was reconciled"),
    ("/latency", "No requests on record for this day"),
]


@pytest.mark.parametrize("width", [1360, 400])
@pytest.mark.parametrize(("path", "last"), CARDS)
async def test_the_cards_of_a_page_open_without_a_jump(
    stage: Stage, path: str, last: str, width: int
) -> None:
    async with opened(stage, path, width=width) as seen:
        await seen.page.evaluate(SHIFTS)
        await expect(seen.page.get_by_text(last)).to_be_visible()
        await expect(seen.page.locator("[aria-busy='true']")).to_have_count(0)
        await drawn(seen.page)
        await assert_still(seen.page, 0.05)


async def test_the_calls_in_progress_move_no_list(stage: Stage) -> None:
    limiter = stage.gateway.services.limiter
    await limiter.penalise("kind:text_only", for_ms=90_000, by="test")
    calls = [asyncio.create_task(stage.native("Why does it wait?", 180_000)) for _ in range(2)]
    async with opened(stage, "/requests", width=400) as seen:
        await seen.page.evaluate(SHIFTS)
        await expect(seen.page.get_by_text("Streams and native calls: ")).to_be_visible()
        await drawn(seen.page)
        await assert_still(seen.page, 0.01)
    await limiter.resume("kind:text_only", by="test")
    assert await asyncio.gather(*calls) == [200, 200]


@pytest.mark.parametrize("width", [1360, 800, 400])
async def test_the_overview_does_not_jump_while_it_opens(stage: Stage, width: int) -> None:
    """Neither at rest nor with calls that wait, a paused limit and a budget."""
    running = stage.gateway
    budget = f"{running.url}/admin/budgets/people"
    await _opens_without_a_jump(stage, width)
    limiter = running.services.limiters["gemini"]
    await limiter.penalise("kind:text_only", for_ms=600_000, by="ann", reason="quota is used up")
    jobs = await stage.submit(3)
    amount = {"each": ["tenant"], "usd": "50", "period": "day", "model": "of-no-job"}
    async with running.http.put(budget, json=amount) as answer:
        assert answer.status == 200, await answer.text()
    try:
        await _opens_without_a_jump(stage, width)
        async with opened(stage, "/", width=width) as seen:
            await expect(seen.page.locator(".cause").first).to_be_visible()
            await expect(seen.page.get_by_role("region", name="Budgets")).to_be_visible()
    finally:
        async with running.http.delete(budget) as answer:
            assert answer.status == 200
        await limiter.resume("kind:text_only", by="ann")
        for job in jobs:
            await running.end_of(job)
            await running.audit(job)  # other tests count the requests on record


async def _opens_without_a_jump(stage: Stage, width: int) -> None:
    async with opened(stage, "/", width=width) as seen:
        page = seen.page
        await page.evaluate(SHIFTS)
        await expect(page.locator("#live")).to_have_text("Live")
        await expect(page.get_by_role("region", name="Limits")).to_be_visible()
        await expect(page.get_by_role("region", name="Processes")).to_contain_text("sessions")
        await drawn(page)
        await assert_still(page, 0.1)
