"""The dashboard's pages of what operators look after in a real browser: usage, upstreams,
batches, alerts, settings, rehearsals.

With TIDEGATE_SCREENSHOTS set, their pictures of docs/dashboard.md are taken anew.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from csv import DictReader
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from playwright.async_api import Route, async_playwright, expect
from redis.asyncio import Redis

from tests.batching import begin, completed, content
from tests.browser.lists import (
    a_body_poses_as_no_request,
    a_named_budget,
    a_row_says_whose_it_is_what_it_asks_and_costs,
    bars_of_what_is_spent,
    more_than_a_page_into_an_empty_list,
    row,
    those_that_end_later_come_into_the_list,
)
from tests.browser.playground import a_broken_answer_is_reported, curl_of, more_dialects, output_of
from tests.browser.stage import (
    ARGUMENTS,
    CHROMIUM,
    PAGE_ALONE,
    POLICY,
    REHEARSAL_MS,
    Colours,
    Seen,
    Stage,
    drawn,
    look_no_more,
    opened,
    shoot,
    unless_pictured,
)
from tests.databases import Databases
from tests.gateway import gateway
from tests.rehearsal import put_on_record
from tests.waiting import wait_until
from tidegate.call import Scope
from tidegate.embedded.servers import ValkeyServer
from tidegate.policy.format import edit
from tidegate.prices.budgets import Budget

pytestmark = pytest.mark.asyncio(loop_scope="module")

IMAGES = Path(__file__).parents[2] / "docs" / "images"
DOCUMENTED = ("usage", "upstreams", "batches", "alerts", "what-if")
WINDOWS: tuple[tuple[int, Colours], ...] = ((1440, "light"), (1440, "dark"), (400, "light"))

# What is said to be left of 1,000 lines at one a second, looked at every other second, with bursts.
TIME_LEFT = """async () => {
    const { about, paceOf } = await import(new URL("static/pages/batches.js", document.baseURI));
    let now = Date.UTC(2026, 0, 1);
    const pace = paceOf(() => now);
    const began = new Date(now).toISOString();
    const said = [];
    for (let second = 2; second <= 600; second += 2) {
        now += 2_000;
        const ended = Math.max(0, second + (second % 20) - 10);
        const ms = pace({ total: 1_000, completed: ended, failed: 0, in_progress_at: began });
        const words = ms === null ? "unknown" : about(ms);
        if (said.at(-1) !== words) said.push(words);
    }
    return said;
}"""
# The command that sends a body to a path, as the page of a request copies it.
TIMES_LEFT = ["unknown", "about 20 min", "about 15 min", "about 10 min"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(
    valkey_server: ValkeyServer,
    databases: Databases,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Stage]:
    """One gateway with a worker, prices and keys, and one browser, for all tests."""
    name = await asyncio.to_thread(databases.take)
    redis_url = f"{valkey_server.url.rpartition('/')[0]}/14"
    async with Redis.from_url(redis_url) as client:
        await client.flushdb()
    folder = tmp_path_factory.mktemp("operating")
    (folder / "tidegate.toml").write_text(POLICY)
    settings: dict[str, Any] = {
        "redis_url": redis_url,
        "database_url": databases.server.url(name),
        "auth": "on",
        "tidegate_policy": folder / "tidegate.toml",
        "alert_webhook_url": "http://127.0.0.1:9/of-a-secret",
        "alert_format": "slack",
    }
    async with gateway(folder / "data", **settings) as running, async_playwright() as playwright:
        tenants = running.services.store.tenants
        _, made = await tenants.create_key("default", scopes=list(Scope), name="operators")
        running.http.headers["x-api-key"] = made.text
        chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield Stage(running, valkey_server, databases.server, chromium, made.text)
        await chromium.close()
    await asyncio.to_thread(databases.give_back, name)


async def pictured(seen: Seen, ready: str, name: str, folder: Path) -> None:
    """The page in light, dark and a narrow window: within it, accessible, and as a picture."""
    page = seen.page
    await expect(page.locator(ready).first).to_be_visible()
    for width, colours in WINDOWS:
        await page.set_viewport_size({"width": width, "height": 900})
        await page.emulate_media(color_scheme=colours)
        await page.evaluate(PAGE_ALONE)
        if (width, colours) != WINDOWS[0]:  # the narrow one has the same colours
            await seen.is_accessible()
        assert (await seen.is_within(), await seen.cut_tables()) == (True, []), (name, width)
        taking = name in DOCUMENTED and (width, colours) == WINDOWS[0]
        file = f"{name}.png" if taking else f"{name}-{width}-{colours}.png"
        await shoot(page, (IMAGES if taking else folder) / file, full_page=True)
    await page.set_viewport_size({"width": 1360, "height": 900})


async def used(
    stage: Stage, day: date, tenant: str, model: str, micros: int, requests: int = 40
) -> None:
    """Have the totals say what a tenant used on a day."""
    await stage.gateway.database.execute(
        "INSERT INTO usage_days (tenant_id, day, model, pool, requests, input_tokens,"
        " cached_tokens, output_tokens, cost_micros, unpriced)"
        " VALUES ($1, $2, $3, 'gemini', $6, 900000, 300000, 12000, $4, $5)",
        *(tenant, day, model, micros, 0 if micros else requests, requests),
    )


async def downloaded(seen: Seen, button: str) -> list[dict[str, str]]:
    async with seen.page.expect_download() as coming:
        await seen.page.get_by_role("button", name=button).click()
    file = await (await coming.value).path()
    with file.open(encoding="utf-8", newline="") as lines:
        return list(DictReader(lines))


async def test_usage_is_told_apart_by_day_tenant_key_and_model_and_beside_the_books(
    stage: Stage, tmp_path: Path
) -> None:
    database, today = stage.gateway.database, datetime.now(UTC).date()
    async with opened(stage, "/usage?range=own&since=2020-01-01&until=2020-01-02") as seen:
        await expect(seen.page.get_by_text("No usage in these days")).to_be_visible()
        await expect(seen.page.get_by_text("RECONCILE=openai,anthropic")).to_be_visible()
    for back in range(28):
        day = today - timedelta(days=back)
        third = unless_pictured("=initech", "initech")
        for place, tenant in enumerate(("acme", "globex", third, "umbrella")):
            spent = 4_000_000 // (place + 1) * (1 + back % 7)
            await used(stage, day, tenant, "gpt-5-mini", spent)
    await used(stage, today, "acme", "local-1", 0)
    assert await stage.native("Why is the sea salty?") == 200
    await wait_until(lambda: database.fetchval("SELECT count(*) > 0 FROM audit"), 20)
    call = "01a21fb4-8949-7c6a-bfeb-1b235ad8b060"
    await database.execute(
        "INSERT INTO reconciliations (upstream, day, model, provider, ours_micros, theirs_micros,"
        " verdict, reason, calls) VALUES ('openai', $1, 'gpt-5', 'openai', 1233777890, 1234567890,"
        " 'explained', 'calls whose usage was not reported whole: 1 partial', $2),"
        " ('openai', $1, 'gpt-5-mini', 'openai', 790000, 990000, 'unexplained', 'other', '[]')",
        today,
        f'[{{"request_id": "{call}", "state": "partial", "charged_micros": 1, "cost_micros": 2}}]',
    )
    async with opened(stage, "/") as seen:
        page = seen.page
        await expect(page.locator("#live")).to_have_text("Live")
        await page.keyboard.press("g")
        await page.keyboard.press("u")
        total = page.get_by_role("status").filter(has_text="request")
        await expect(total).to_contain_text("$933.3")  # calls of other tests are cheap
        await expect(total).to_contain_text("without a price")
        rows = page.get_by_role("region", name="By tenant").locator("tbody tr")
        await expect(rows.first).to_contain_text("acme")
        await expect(rows.first).to_contain_text("$448.00")
        picture = page.get_by_role("img", name="Cost by day: acme $448.00, globex $224.00")
        named = ("acme", "globex", unless_pictured("'=initech", third), "umbrella")  # no formula
        await expect(picture.locator(".day")).to_have_count(30)
        written = await downloaded(seen, "CSV by day")
        assert len([row for row in written if row["tenant"] in named]) == 28 * 4
        last = [row for row in written if row["tenant"] == named[2]][-1]
        assert (last["day"], last["cost_usd"]) == (str(today), "1.333333")
        books = page.get_by_role("region", name="Reconciliations")
        row = books.locator("tr[data-verdict='explained']")
        for text in ("gpt-5", "$0.79", "$1,234.57", "$1,233.78", "1 partial", call[-12:]):
            await expect(row).to_contain_text(text)
        # Of one tenant, by model, of one day.
        await rows.first.get_by_role("link", name="acme").click()
        models = page.get_by_role("region", name="By model").locator("tbody tr")
        await expect(models).to_have_count(2)
        await expect(models.nth(1)).to_contain_text("no price")
        href = str(await models.first.get_by_role("link").get_attribute("href"))
        query = parse_qs(href.partition("?")[2])
        assert (query["model"], query["tenant"]) == (["gpt-5-mini"], ["acme"])
        began, ended = (datetime.fromisoformat(query[one][0]) for one in ("since", "until"))
        assert round((ended - began) / timedelta(days=1)) == 30
        await page.get_by_role("button", name="Day", exact=True).click()
        await page.get_by_role("link", name=f"{today.day} {today:%b}").click()
        of_tenant = page.get_by_role("region", name="By tenant").locator("tbody tr")
        await expect(of_tenant).to_have_count(1)
        await expect(total).to_contain_text("$4.00")
        assert await page.get_by_label("From").input_value() == str(today)
        await page.get_by_role("button", name="Remove the filter on the tenant acme").click()
        await page.get_by_role("button", name="Key", exact=True).click()
        keys = page.get_by_role("region", name="By key").locator("tbody tr")
        await expect(keys.filter(has_text="operators (tg_")).to_be_visible()
        seen.expected = ("400",)
        await page.get_by_label("Days").select_option("90")
        await expect(page.get_by_role("alert")).to_contain_text("over too many days")
        await expect(page.locator(".usage-total")).to_have_text("")  # nor any other old figure
        await expect(page.get_by_role("region", name="Cost by day")).to_be_hidden()
        await expect(books).to_be_hidden()
        await page.get_by_role("button", name="Upstream", exact=True).click()
        await page.get_by_label("Days").select_option("7")
        await expect(page.get_by_role("region", name="By upstream")).to_contain_text("gemini")
        await expect(total).to_be_visible()
        await expect(books).to_be_visible()
        await page.get_by_role("button", name="Tokens", exact=True).click()
        await expect(page.get_by_role("region", name="Tokens by day")).to_be_visible()
        await page.reload()  # the address has it all
        await expect(page.get_by_role("region", name="Tokens by day")).to_be_visible()
        await expect(page.get_by_role("region", name="By upstream")).to_contain_text("gemini")
        await page.get_by_role("link", name="Attention").click()
        unexplained = page.get_by_role("region", name="Unexplained costs").locator("[data-verdict]")
        await expect(unexplained).to_have_count(1)
        await expect(unexplained).to_contain_text("$0.20")
        await page.goto(f"{stage.gateway.url}/dashboard/#/usage")
        await expect(page.locator("tr[data-group='acme'] .usage-share")).to_have_text("48 %")
        await pictured(seen, "[aria-label='By tenant']", "usage", tmp_path)


async def test_an_amount_that_is_no_number_is_refused_and_changes_nothing(stage: Stage) -> None:
    running = stage.gateway
    url = f"{running.url}/admin/tenants/team%2Fgreen"
    async with running.http.put(url, json={"budget_day_money": 50}) as made:
        assert made.status == 200, await made.text()
    async with opened(stage, "/tenants?tenant=team/green") as seen:
        await seen.page.get_by_role("button", name="Change team/green").click()
        dialog = seen.page.get_by_role("dialog", name="Change team/green")
        amount, change = dialog.get_by_label("Daily budget (USD)"), dialog.get_by_text("Change the")
        for typed in ("$75", "7,50", "none", "Infinity"):
            await amount.fill(typed)
            await change.click()
            await expect(amount).to_have_attribute("aria-invalid", "true")
            await expect(dialog).to_contain_text("Enter a number")
        async with running.http.get(url) as kept:
            assert (await kept.json())["budget_day_money"] == 50
        await amount.fill("1,250.50")
        await change.click()
        await expect(seen.page.locator("[data-tenant='team/green']")).to_contain_text("$1,250.50")
        await seen.page.get_by_role("button", name="Change team/green").click()
        await amount.fill("")
        await change.click()
        await expect(dialog).to_be_hidden()
        await seen.page.get_by_role("link", name="Operator actions").click()
        actions = seen.page.locator("[data-action]").filter(has_text="team/green")
        await expect(actions.first).to_contain_text("budget_day_money: 1250.5 → none")
    async with running.http.delete(url) as gone:
        assert gone.status == 200


async def test_a_tenants_budgets_have_bars_of_what_is_spent(stage: Stage) -> None:
    running = stage.gateway
    await used(stage, datetime.now(UTC).date(), "team-bar", "gpt-5-mini", 1_500_000)
    caps: dict[str, Any] = {
        "budget_day_money": 2,
        "budget_month_money": 1.5,
        "budget_day_tokens": 2_000_000,
    }
    caps |= {"limits": {"tenant:team-bar": 5}}
    async with running.http.put(f"{running.url}/admin/tenants/team-bar", json=caps) as made:
        assert made.status == 200, await made.text()
    async with a_named_budget(stage), opened(stage, "/tenants?tenant=team-bar", width=400) as seen:
        await bars_of_what_is_spent(seen)
    async with running.http.delete(f"{running.url}/admin/tenants/team-bar") as gone:
        assert gone.status == 200
    await running.database.execute("DELETE FROM usage_days WHERE tenant_id = 'team-bar'")


async def test_a_tenants_dialog_sets_what_was_changed_in_it_and_nothing_else(stage: Stage) -> None:
    running = stage.gateway
    url = f"{running.url}/admin/tenants/team%2Fred"

    async def put(**values: Any) -> None:
        async with running.http.put(url, json=values) as made:
            assert made.status == 200, await made.text()

    async def known() -> tuple[int, float | None, float | None]:
        async with running.http.get(url) as answer:
            found = await answer.json()
        return found["weight"], found["budget_day_money"], found["budget_month_money"]

    await put(weight=2, budget_month_money=100)
    async with opened(stage, "/tenants?tenant=team/red") as seen:
        page = seen.page
        await page.get_by_role("button", name="Change team/red").click()
        dialog = page.get_by_role("dialog", name="Change team/red")
        await expect(dialog.get_by_label("Monthly budget (USD)")).to_have_value("100")
        await put(weight=5, budget_month_money=900)  # another operator, meanwhile
        await dialog.get_by_label("Daily budget (USD)").fill("30")
        await dialog.get_by_role("button", name="Change the tenant").click()
        await expect(page.locator("[data-tenant='team/red']")).to_contain_text("$30.00")
        assert await known() == (5, 30, 900)
        # What another operator has changed meanwhile is not overwritten.
        await page.get_by_role("button", name="Change team/red").click()
        dialog = page.get_by_role("dialog", name="Change team/red")
        await expect(dialog.get_by_label("Monthly budget (USD)")).to_have_value("900")
        await put(budget_month_money=800)
        await dialog.get_by_label("Monthly budget (USD)").fill("950")
        seen.expected = ("409",)
        await dialog.get_by_role("button", name="Change the tenant").click()
        await expect(dialog).to_contain_text("another change came first")
        await dialog.get_by_role("button", name="Cancel").click()
        assert await known() == (5, 30, 800)
        # A new tenant is none that is there.
        await page.get_by_role("button", name="New tenant").click()
        dialog = page.get_by_role("dialog", name="New tenant")
        await dialog.get_by_label("Name").fill("team/red")
        await dialog.get_by_role("button", name="Create the tenant").click()
        await expect(dialog).to_contain_text("The tenant team/red already exists")
        assert await known() == (5, 30, 800)
    async with running.http.delete(url) as gone:
        assert gone.status == 200


async def test_an_upstream_is_added_tested_repaired_drained_and_removed(
    stage: Stage, tmp_path: Path
) -> None:
    running = stage.gateway
    async with opened(stage, "/") as seen:
        page = seen.page
        await expect(page.locator("#live")).to_have_text("Live")
        await page.keyboard.press("g")
        await page.keyboard.press("p")
        gemini = page.locator("[data-upstream='gemini']")
        await expect(gemini.locator(".badge")).to_have_text("Healthy")
        await gemini.get_by_role("button", name="Test gemini").click()
        await expect(gemini.locator(".tests")).to_contain_text("models: ")
        # What a dialog needs and can't read is said too.
        seen.expected = ("503",)
        away = {"detail": "Not now."}
        await page.route("**/providers", lambda one: one.fulfill(status=503, json=away), times=1)
        await page.get_by_role("button", name="Add an upstream").click()
        await expect(page.locator(".toast")).to_contain_text("Not now.")
        # What is wrong with a new one is said where it is put right.
        await page.get_by_role("button", name="Add an upstream").click()
        dialog = page.get_by_role("dialog", name="Add an upstream")
        await dialog.get_by_label("Provider").select_option("azure")
        await expect(dialog.get_by_label("Resource")).to_be_visible()
        await dialog.get_by_label("Provider").select_option("groq")
        await expect(dialog.get_by_label("Resource")).to_be_hidden()
        await seen.is_accessible()
        await shoot(page, tmp_path / "upstream-add.png")
        seen.expected = ("400", "409")
        await dialog.get_by_role("button", name="Add", exact=True).click()
        await expect(dialog.locator(".wrong, .notice")).to_contain_text(["GROQ_API_KEY"])
        await dialog.get_by_label("Provider").select_option("vllm")
        await dialog.get_by_label("Name").fill("gpu-1")
        await dialog.get_by_label("Address").fill("http://127.0.0.1:9")
        await dialog.get_by_label("Models", exact=True).fill("spare-*, llama-*")
        await dialog.get_by_label("Concurrent calls").fill("7")
        await dialog.get_by_role("button", name="Add", exact=True).click()
        await expect(dialog.get_by_role("alert")).to_contain_text("127.0.0.1:9")
        await dialog.get_by_label("Test before use").select_option("")
        await dialog.get_by_role("button", name="Add", exact=True).click()
        await expect(dialog).to_be_hidden()
        spare = page.locator("[data-upstream='gpu-1']")
        facts = ["spare-*, llama-*", "openai: http://127.0.0.1:9/v1"]
        await expect(spare.locator("dd")).to_contain_text(facts)
        assert running.services.limiters["gpu-1"].policy.bound("pool:total") == 7
        await spare.get_by_role("button", name="Test gpu-1").click()
        await expect(spare.locator(".tests .bad").first).to_contain_text("no answer")
        await expect(spare.locator(".badge")).to_have_text("Test failed")
        await spare.get_by_role("button", name="Change gpu-1").click()
        dialog = page.get_by_role("dialog", name="Change gpu-1")
        await dialog.get_by_label("Weight").fill("3")
        await dialog.get_by_label("Key variable").fill("HOME")
        await dialog.get_by_role("button", name="Change", exact=True).click()
        changes = page.get_by_role("region", name="Changes")
        await expect(changes).to_contain_text("gpu-1.weight: not set -> 3")
        assert running.services.spine.targets.upstreams["gpu-1"].weight == 3
        await expect(spare).to_contain_text("HOME")
        await spare.get_by_role("button", name="Change gpu-1").click()
        await dialog.get_by_label("Key variable").fill("")
        await dialog.get_by_role("button", name="Change", exact=True).click()
        await expect(dialog).to_be_hidden()
        await expect(spare).not_to_contain_text("HOME")
        await running.upstream.set_fault("unauthorized", count=1)
        assert await stage.native("Hi", 500) == 502
        await expect(gemini.locator(".badge")).to_have_text("Key rejected")
        await expect(gemini.locator(".notice")).to_contain_text("GEMINI_API_KEY")
        await pictured(seen, "[data-upstream='gpu-1']", "upstreams", tmp_path)
        await page.get_by_role("link", name="Overview").click()
        cause = page.locator("[data-cause='key_refused'][data-subject='gemini']")
        await cause.get_by_role("link", name="View upstreams").click()
        await gemini.get_by_role("button", name="Read the key of gemini again").click()
        await page.get_by_role("dialog").get_by_role("button", name="Read again").click()
        await expect(page.locator(".toast").last).to_contain_text("was read again")
        await gemini.get_by_role("button", name="Try gemini now").click()
        await page.get_by_role("dialog").get_by_role("button", name="Try it now").click()
        await expect(gemini.locator(".badge")).to_have_text("Healthy")
        await spare.get_by_role("button", name="Drain gpu-1").click()
        await (dialog := page.get_by_role("dialog")).get_by_label("Reason").fill("it is sold")
        await dialog.get_by_role("button", name="Drain").click()
        await expect(spare.locator(".badge")).to_have_text("Drained")
        await expect(changes).to_contain_text("dashboard: it is sold")
        await spare.get_by_role("button", name="Remove gpu-1").click()
        await page.get_by_role("dialog").get_by_role("button", name="Remove").click()
        await expect(spare).to_have_count(0)
        assert "gpu-1" not in running.services.spine.targets.upstreams


async def test_what_another_operator_has_changed_of_upstreams_is_not_overwritten(
    stage: Stage,
) -> None:
    running = stage.gateway
    url = f"{running.url}/admin/upstreams/twice"
    table = {"provider": "vllm", "base_url": "http://127.0.0.1:9/v1", "models": ["a-*"]}
    async with running.http.put(url, json={"table": table, "test": False}) as answer:
        assert answer.status == 200, await answer.text()
    try:
        async with opened(stage, "/upstreams", expected=("409",)) as seen:
            page = seen.page
            dialog = page.get_by_role("dialog")
            await page.get_by_role("button", name="Change twice").click()
            other = {"set": {"models": ["a-*", "b-*"]}}
            async with running.http.patch(url, json=other) as answer:
                assert answer.status == 200, await answer.text()
            await dialog.get_by_label("Models").fill("a-*, c-*")
            await dialog.get_by_role("button", name="Change", exact=True).click()
            await expect(dialog.get_by_role("alert")).to_contain_text("is in force, not")
            assert running.services.spine.targets.upstreams["twice"].models == ("a-*", "b-*")
            await dialog.get_by_role("button", name="Cancel").click()
            await expect(page.locator("[data-upstream='twice']")).to_contain_text("a-*, b-*")
            await page.get_by_role("button", name="Change twice").click()
            await dialog.get_by_label("Models").fill("a-*, b-*, c-*")
            await dialog.get_by_role("button", name="Change", exact=True).click()
            await expect(page.locator("[data-upstream='twice']")).to_contain_text("a-*, b-*, c-*")
    finally:
        async with running.http.delete(f"{url}?force=true") as answer:
            assert answer.status == 200, await answer.text()


async def test_a_batch_is_watched_paused_resumed_fetched_and_another_cancelled(
    stage: Stage, tmp_path: Path
) -> None:
    running = stage.gateway
    async with opened(stage, "/batches") as seen:
        await expect(seen.page.get_by_text("No batches yet")).to_be_visible()
    client = AsyncOpenAI(base_url=f"{running.url}/v1", api_key=stage.key, max_retries=0)
    await stage.slow(300)
    run = unless_pictured("<b>nightly</b>", "nightly")
    batch = await begin(client, content(40), metadata={"run": run})
    async with opened(stage, "/") as seen:
        page = seen.page
        await expect(page.locator("#live")).to_have_text("Live")
        await page.keyboard.press("g")
        await page.keyboard.press("b")
        row = page.locator(f"[data-batch='{batch.id}']")
        await expect(row.locator(".badge")).to_have_text("In progress")
        await expect(row).to_contain_text(f"run: {run}")
        await expect(row).to_contain_text("kind:text_only")  # what the next line waits for
        await row.get_by_role("button", name="Pause").click()
        dialog = page.get_by_role("dialog")
        await dialog.get_by_label("Reason").fill("not at noon")
        await seen.is_accessible()
        await dialog.get_by_role("button", name="Pause").click()
        await expect(row.locator(".badge")).to_have_text("Paused")
        await expect(row).to_contain_text("Paused by dashboard: not at noon")
        await expect(row).not_to_contain_text("running")
        done = await completed(client, batch)
        assert 0 < done < 40
        meter = row.get_by_role("meter")
        assert await meter.get_attribute("aria-valuetext") == f"{done} of 40"
        await stage.slow(1_500)
        other = await begin(client, content(40))
        await pictured(seen, f"[data-batch='{other.id}']", "batches", tmp_path)
        second = page.locator(f"[data-batch='{other.id}']")
        await second.get_by_role("button", name="Cancel").click()
        await dialog.get_by_role("button", name="Cancel the batch").click()
        await expect(second.locator(".badge")).to_have_text("Cancelled")
        await expect(second.get_by_role("button", name="Errors")).to_be_visible()
        await stage.slow(0)
        await row.get_by_role("button", name="Resume").click()
        await dialog.get_by_role("button", name="Resume").click()
        await expect(row.locator(".badge")).to_have_text("Completed")
        await expect(row).to_contain_text("40 of 40 done")
        async with page.expect_download() as coming:
            await row.get_by_role("button", name="Results").click()
        file = await coming.value
        assert file.suggested_filename == f"{batch.id}-output.jsonl"
        assert len((await file.path()).read_bytes().splitlines()) == 40
        assert await page.evaluate(TIME_LEFT) == TIMES_LEFT
        begun, overtaken = asyncio.Event(), asyncio.Event()

        async def late(route: Route) -> None:
            of_all = await route.fetch()
            begun.set()
            await overtaken.wait()
            await route.fulfill(response=of_all)

        await page.route("**/admin/batches?*", late, times=1)
        await begun.wait()
        await page.get_by_role("button", name="Open", exact=True).click()
        await expect(page.get_by_text("No batches match")).to_be_visible()
        await look_no_more(page)
        async with page.expect_event("requestfinished", lambda one: "/batches?" in one.url):
            overtaken.set()
        await drawn(page)
        await expect(page.get_by_text("No batches match")).to_be_visible(timeout=1)
    await client.close()


async def test_alerts_and_settings_say_what_goes_where_and_show_no_secret(
    stage: Stage, tmp_path: Path
) -> None:
    running = stage.gateway
    await running.services.limiter.penalise("kind:multi_modal", for_ms=600_000, by="ann: quota")
    await running.database.execute("DELETE FROM alerts")
    budget = Budget("all", "usd", 3_000_000_000, "month", doubt="estimate", alerts=(80, 100))
    hours = Budget("globex/tokens-hours", "tokens", 2_000_000, "rolling", window_s=18_000)
    async with opened(stage, "/") as seen:
        page = seen.page
        await expect(page.locator("#live")).to_have_text("Live")
        await page.keyboard.press("g")
        await page.keyboard.press("l")
        now = page.get_by_role("region", name="Now")
        await expect(now.locator("[data-cause='limit_paused']")).to_contain_text("ann: quota")
        await expect(page.get_by_text("No budgets")).to_be_visible()
        channel = page.get_by_role("region", name="Channel")
        await expect(channel).to_contain_text("To http://127.0.0.1, in Slack's format")
        await expect(channel).not_to_contain_text("of-a-secret")
        for one in (budget, hours):
            await running.services.budgets.records.set(one, by="test")
        await running.database.execute(
            "INSERT INTO alerts (kind, data, state, tries, problem) VALUES ('budget_share', $1,"
            " 'given_up', 8, 'answered with status 500')",
            '{"budget": "all", "scope": "", "share": 80, "spent": 2400000000,'
            ' "amount": 3000000000}',
        )
        rules = page.get_by_role("region", name="Budgets that raise alerts")
        await expect(rules.locator("[data-rule='all']")).to_contain_text("at 80 %, 100 %")
        await expect(rules).to_contain_text("2,000,000 tokens in 5 h")
        row = page.get_by_role("region", name="Raised").locator("tr[data-alert]")
        await expect(row).to_contain_text("$2,400.00 of $3,000.00 spent")
        await expect(row).to_contain_text("answered with status 500; 8 tries")
        # Its age goes on, and its row stays the same, with the focus.
        await row.get_by_role("button", name="Post").focus()
        await page.evaluate(
            "const now = Date.now; Date.now = () => now() + 7_200_000;"
            " document.dispatchEvent(new Event('visibilitychange'))"
        )
        await expect(row.locator("time")).to_have_text("2 h ago")
        await expect(row.get_by_role("button", name="Post")).to_be_focused()
        await page.evaluate("Date.now = () => new Date().getTime()")
        await pictured(seen, "tr[data-alert]", "alerts", tmp_path)
        await row.get_by_role("button", name="Post").click()
        await page.get_by_role("dialog").get_by_role("button", name="Post again").click()
        await expect(row.locator(".badge")).to_have_text("Pending")
        await channel.get_by_role("button", name="Send a test").click()
        await page.get_by_role("dialog").get_by_role("button", name="Send").click()
        await expect(row.filter(has_text="A test alert, requested by dashboard")).to_be_visible()
        await page.keyboard.press("g")
        await page.keyboard.press("s")
        names = page.locator(".setting dt")
        await expect(page.get_by_role("heading", name="Settings")).to_be_visible()
        every = await names.count()
        assert every == len(type(running.config).model_fields)  # none is of the environment
        await page.get_by_label("Search settings").fill("alert_")
        await expect(names).to_have_count(2)
        await expect(page.locator(".settings-place")).not_to_contain_text("of-a-secret")
        await page.get_by_label("Search settings").fill("")
        await pictured(seen, ".setting", "settings", tmp_path)
    await running.services.limiter.resume("kind:multi_modal", by="test")
    for one in (budget, hours):
        await running.services.budgets.records.remove(one.name, by="test")


async def test_other_limits_are_rehearsed_on_a_recorded_day_and_applied(
    stage: Stage, tmp_path: Path
) -> None:
    running, day = stage.gateway, datetime.now(UTC).date() - timedelta(days=1)
    await put_on_record(running.database, datetime.combine(day, time(9), UTC), 1_200)
    await used(stage, day, "rehearsed", "gemini-2.5-flash", 1_000, 1_200)
    odd = unless_pictured("tenant:a=b;c%3D", "tenant:hooli")
    await running.services.keeper.change(edit({odd: 5}), set_by="test", reason="")
    async with opened(stage, "/") as seen:
        page = seen.page
        await expect(page.locator("#live")).to_have_text("Live")
        await page.route("**/admin/usage?*", lambda route: route.fulfill(json={"rows": []}))
        await page.keyboard.press("g")
        await page.keyboard.press("i")
        await expect(page.get_by_text("No calls on record yet")).to_be_visible()
        await page.unroute("**/admin/usage?*")
        await page.get_by_role("link", name="Overview").click()
        await page.get_by_role("button", name="Change kind:text_only").click()
        await page.get_by_role("dialog").get_by_label("New limit").fill("7")
        await page.get_by_role("link", name="Simulate the change").click()
        await expect(page.get_by_label("New value of kind:text_only")).to_have_value("7")
        days = page.get_by_role("group", name="Days with requests")
        await days.get_by_role("button", name=f"{day.day} {day:%b}").click()
        assert await page.get_by_label("Day (UTC)").input_value() == str(day)
        go = page.get_by_role("button", name="Rehearse")
        row = page.locator("[data-limit='kind:text_only']")
        await expect(row).to_contain_text("now 2 concurrent")
        new = page.get_by_label("New value of kind:text_only")
        form, result = page.locator(".what-if-form"), page.locator(".what-if-result")
        for typed, told in (("", "at least one limit"), ("few", "must be a whole number")):
            await new.fill(typed)
            await go.click()
            await expect(form.locator(".what-if-change .wrong")).to_contain_text(told)
            await expect(page.locator(":focus")).to_have_attribute("placeholder", "unchanged")
        await new.fill("20")
        await page.get_by_label("From").select_option("17")
        await page.get_by_label("Until").select_option("9")
        await go.click()
        await expect(form).to_contain_text("Must be later than From")
        await page.get_by_label("Until").select_option("18")
        await new.press("Enter")
        await expect(result).to_contain_text("No calls of gemini on record in that time")
        await page.get_by_label("From").select_option("9")
        # One that is cancelled shows nothing.
        await page.route("**/admin/limits/rehearse?*", lambda _: None)
        await go.click()
        await page.get_by_role("button", name="Cancel").click()
        await expect(form.get_by_role("status")).to_have_text("Cancelled.")
        await page.unroute("**/admin/limits/rehearse?*")
        await go.click()
        await expect(result).to_contain_text("With kind:text_only=20", timeout=REHEARSAL_MS)
        await expect(result).to_contain_text("of 1,200 calls would have waited")
        await expect(result.locator(".chart canvas")).to_have_count(4)
        for name in ("Waiting, limits in force", "Waiting, with the change"):
            await expect(result.get_by_role("img", name=name)).to_be_visible()
        await expect(result.locator("[data-tenant='globex'] td").nth(4)).to_have_text("3.00 s")
        before, after = [
            await result.locator("[data-tenant=''] td").nth(at).inner_text() for at in (5, 6)
        ]
        assert (before[:2], after[:2]) == ("36", "1."), (before, after)
        other = page.get_by_label(f"New value of {odd}")
        await other.fill("3")
        await page.reload()  # the address has it all
        await expect(new).to_have_value("20")
        await expect(other).to_have_value("3")
        await other.fill("")
        assert await page.get_by_label("From").input_value() == "9"
        await go.click()
        await expect(result).to_contain_text("With kind:text_only=20", timeout=REHEARSAL_MS)
        await pictured(seen, ".what-if-charts canvas", "what-if", tmp_path)
        await page.set_viewport_size({"width": 2560, "height": 1200})
        assert await seen.is_within()
        await shoot(page, tmp_path / "what-if-2560.png")
        await page.get_by_role("button", name="Apply").click()
        dialog = page.get_by_role("dialog", name="Apply the new kind:text_only?")
        await expect(dialog.get_by_role("list", name="Changes")).to_have_text(
            "kind:text_only 2 → 20"
        )
        await seen.is_accessible()
        await dialog.get_by_role("button", name="Apply").click()
        await expect(row).to_contain_text("now 20 concurrent")
        assert running.services.limiter.policy.bound("kind:text_only") == 20
        [newest, *_] = await running.services.keeper.history(1)
        assert (newest.set_by, newest.reason) == ("dashboard", "rehearsed")
    back = edit({"kind:text_only": 2}, remove=[odd])
    await running.services.keeper.change(back, set_by="test", reason="")


async def test_a_call_that_ends_after_later_ones_comes_into_the_list(stage: Stage) -> None:
    async with opened(stage, "/requests?tenant=without-requests") as seen:
        await more_than_a_page_into_an_empty_list(seen.page)
    async with opened(stage, "/requests?tenant=without-requests") as seen:
        await expect(seen.page.get_by_text("No requests match")).to_be_visible()
        await those_that_end_later_come_into_the_list(seen.page, "")
        await those_that_end_later_come_into_the_list(seen.page, "words")


async def test_a_row_of_the_list_has_key_prompt_and_cost(stage: Stage) -> None:
    async with opened(stage, "/requests") as seen:
        await a_row_says_whose_it_is_what_it_asks_and_costs(stage, seen.page)


async def test_what_a_tenant_has_sent_is_shown_as_no_request(stage: Stage) -> None:
    async with opened(stage, "/settings") as seen:
        await a_body_poses_as_no_request(stage, seen)


async def test_an_answer_that_breaks_is_reported_and_asked_again(
    stage: Stage, tmp_path: Path
) -> None:
    async with opened(stage, "/try", expected=("ERR_FILE_NOT_FOUND",)) as seen:
        await a_broken_answer_is_reported(seen.page, tmp_path)


async def test_a_copied_call_of_messages_has_the_header_that_they_need(
    stage: Stage, tmp_path: Path
) -> None:
    asked = (
        '{"model": "claude-5", "max_tokens": 9, "messages": [{"role": "user", "content": "It\'s"}]}'
    )
    async with more_dialects(stage), opened(stage, "/requests") as seen:
        command = await curl_of(seen.page, "/v1/messages", asked)
        out = await output_of("bash", "-c", command, folder=tmp_path, key=stage.key)
        assert '"type":"message"' in out.replace(" ", ""), out


async def test_times_of_an_address_are_the_same_in_every_zone(stage: Stage) -> None:
    # In Berlin the hour from 02:00 on comes twice on this day: this is the second one.
    hour = "since=2026-10-25T01%3A00%3A00Z&until=2026-10-25T02%3A00%3A00Z"
    async with opened(stage, f"/requests?time=between&{hour}", zone="Europe/Berlin") as seen:
        page = seen.page
        await expect(page.get_by_label("From")).to_have_value("2026-10-25T02:00")
        async with page.expect_request(lambda one: "tenant=acme" in one.url) as coming:
            await page.get_by_label("Tenant").fill("acme")
        assert hour in (await coming.value).url
        assert hour in page.url
        async with page.expect_request(lambda one: "until=2026" in one.url) as coming:
            await page.get_by_label("Until").fill("2026-10-25T04:30")
            await page.get_by_label("Until").blur()
        changed = hour.replace("T02%3A00%3A00Z", "T03%3A30%3A00Z")
        assert changed in (await coming.value).url
        assert changed in page.url


async def test_what_a_viewer_may_not_read_is_not_said_to_be_missing(stage: Stage) -> None:
    job = await stage.gateway.submit(data="Explain tide", type="text_only")
    await stage.gateway.end_of(job)
    scopes = [Scope.VIEWER]
    _, made = await stage.gateway.services.store.tenants.create_key("default", scopes=scopes)
    async with opened(replace(stage, key=made.text), f"/requests/{job}") as seen:
        for name in ("Input", "Output"):
            part = seen.page.get_by_role("region", name=name)
            await expect(part).to_contain_text("Requires the role operator. Your role is viewer.")
        await expect(seen.page.get_by_text("No answer.")).to_have_count(0)
        stored = seen.page.get_by_role("region", name="Stored bodies")
        await expect(stored).to_contain_text("VIEWERS_READ_BODIES")
        ended = dict.fromkeys(("created_at", "in_progress_at", "expires_at", "ended_at"))
        ended |= dict.fromkeys(("completed", "failed", "total", "claimed", "calling"), 1)
        ended |= {"id": f"batch_{job}", "status": "completed", "tenant": "default", "errors": []}
        ended |= {"pause": None, "has_output": True, "has_errors": True}
        answer = {"items": [ended], "next_after": None}
        await seen.page.route("**/admin/batches?*", lambda route: route.fulfill(json=answer))
        await seen.page.evaluate("location.hash = '#/batches'")
        for name in ("Results", "Errors"):
            button = seen.page.get_by_role("button", name=name)
            await expect(button).to_be_disabled()
            await expect(button).to_have_attribute(
                "title", "Requires the role operator. Your role is viewer."
            )


async def test_the_cached_share_of_a_thread_is_of_the_calls_that_report_one(stage: Stage) -> None:
    def call(number: int, **more: int) -> dict[str, Any]:
        return row(number) | {"finished_at": "2026-11-29T12:00:01Z", "input_tokens": 1_000} | more

    threads = [
        {"calls": [call(1), call(2, cached_tokens=500)]},
        {"calls": [call(3)]},
    ]
    sums = dict.fromkeys(("failed", "unpriced", "queue_ms", "upstream_ms", "output_tokens"), 0)
    sums |= {"calls": 3, "cost_micros": 0, "input_tokens": 3_000, "cached_tokens": 500}
    moments = dict.fromkeys(("began_at", "ended_at"), "2026-11-29T12:00:00Z")
    view = {"sums": {**sums, **moments, "cached_share": 0.5}, "complete": True, "threads": threads}
    async with opened(stage) as seen:
        page = seen.page
        await page.route("**/admin/conversations?*", lambda route: route.fulfill(json=view))
        await page.evaluate("location.hash = '#/requests/conversation?conversation=c'")
        await expect(page.locator("[data-figure=cached] .tile-figure")).to_have_text("50 %")
        heads = page.locator("tr.thread")
        await expect(heads.nth(0).locator(".c-number").nth(3)).to_have_text("50 %")
        await expect(heads.nth(1).locator(".c-number").nth(3)).to_have_text("\N{EN DASH}")


async def test_the_newest_of_many_keys_is_on_the_page(stage: Stage) -> None:
    def key(number: int) -> dict[str, Any]:
        made_at = f"2026-01-01T00:{number // 60:02}:{number % 60:02}Z"
        one = {"prefix": f"{number:010}", "name": f"key {number}", "tenant": "default"}
        one |= {"state": "works", "created_at": made_at}
        return {**one, "scopes": ["read"]} | dict.fromkeys(
            ("made_by", "last_used_at", "expires_at", "revoked_at")
        )

    async def pages(route: Route) -> None:
        after = parse_qs(urlsplit(route.request.url).query).get("after", ["0"])[0]
        behind = int(after)
        await route.fulfill(json=[key(n + 1) for n in range(behind, min(behind + 1_000, 1_001))])

    async with opened(stage) as seen:
        await seen.page.route(re.compile("/admin/keys"), pages)
        await seen.page.evaluate("location.hash = '#/tenants'")
        card = seen.page.get_by_role("region", name="API keys")
        await expect(card.locator("tbody tr").first).to_contain_text("key 1001")
        await expect(card.locator(".card-head")).to_contain_text("1,001")
        await expect(card.get_by_label("Revoke tg_0000001001")).to_be_enabled()


ONE_OF_EACH = """async () => {
    const module = new URL("static/pages/overview/figures.js", document.baseURI);
    const strip = (await import(module)).figuresStrip();
    const none = { more_processes: 0, more_tenants: 0, paused_limits: 0, waiting: 0, in_flight: 1 };
    strip.live({ ...none, processes: [{}], tenants: [{}] });
    return strip.element.textContent;
}"""


async def test_the_overview_counts_one_as_one_and_says_why_it_is_not_live(stage: Stage) -> None:
    many = {"status": 503, "code": "too_many_followers", "detail": "too many dashboards are open"}
    async with opened(stage, expected=("503",)) as seen:
        page = seen.page
        live = page.locator("#live")
        await expect(live).to_have_text("Live")
        words = await page.evaluate(ONE_OF_EACH)
        assert "in 1 processW" in words
        assert "1 tenantC" in words
        await page.route("**/dashboard/feed*", lambda one: one.fulfill(status=503, json=many))
        await page.reload()
        await expect(live).to_have_text("Too many viewers")
        await expect(live).to_have_attribute("title", re.compile("^too many dashboards are open"))
        await page.unroute("**/dashboard/feed*")
        await expect(live).to_have_text("Live")
        assert await live.get_attribute("title") is None


async def test_an_older_answer_never_replaces_a_newer_one(stage: Stage) -> None:
    held: list[Route] = []

    async def limits(route: Route) -> None:
        search = parse_qs(urlsplit(route.request.url).query).get("search", [""])[0]
        if search == "a":
            held.append(route)
            return
        await route.fulfill(json=named(search))

    def named(search: str) -> dict[str, Any]:
        one = {"limit": f"rpm:{search}", "pool": "gemini", "unit": "requests", "words": "60"}
        return {"limits": [one], "total": 100, "groups": []}

    async with opened(stage) as seen:
        page = seen.page
        await page.route("**/dashboard/limits?*", limits)
        await page.evaluate("location.hash = '#/what-if?pool=gemini'")
        find, shown = page.get_by_label("Search limits"), page.locator(".what-if-limits li b")
        await expect(shown).to_have_text("rpm:")
        await find.fill("a")
        await wait_until(lambda: held, 20, "the search for a")
        await find.fill("ab")
        await expect(shown).to_have_text("rpm:ab")
        async with page.expect_response(lambda one: one.url.endswith("search=a")):
            await held[0].fulfill(json=named("a"))
        await drawn(page)
        await expect(shown).to_have_text("rpm:ab")


async def test_a_late_look_at_a_request_does_not_undo_a_newer_one(stage: Stage) -> None:
    job = await stage.gateway.submit(data="Explain tide", type="text_only")
    await stage.gateway.end_of(job)
    _, ended = await stage.gateway.get(f"/admin/requests/{job}")
    held: list[Route] = []
    asked = 0

    def view(status: str, actions: list[str]) -> dict[str, Any]:
        return {**ended, "actions": actions, "request": {**ended["request"], "status": status}}

    async def looks(route: Route) -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            held.append(route)
        elif asked == 1:
            await route.fulfill(json=view("queued", ["cancel"]))
        else:
            await route.fulfill(json=view("cancelled", []))

    async with opened(stage) as seen:
        page = seen.page
        await page.route(f"**/admin/requests/{job}", looks)
        await page.route(f"**/admin/requests/{job}/cancel", lambda one: one.fulfill(json={}))
        await page.evaluate(f"location.hash = '#/requests/{job}'")
        await wait_until(lambda: held, 20, "the look that is late")
        await page.get_by_role("button", name="Cancel").click()
        await page.get_by_role("dialog").get_by_role("button", name="Cancel").last.click()
        badge = page.locator(".page-head .badge")
        await expect(badge).to_have_text("Cancelled")
        async with page.expect_response(lambda one: one.url.endswith(job)):
            await held[0].fulfill(json=view("queued", ["cancel"]))
        await drawn(page)
        assert await badge.inner_text() == "Cancelled"
