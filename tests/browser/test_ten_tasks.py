"""Ten tasks of an operator, each walked from the Overview in a real browser in five clicks at most.

With TIDEGATE_SCREENSHOTS set, the pictures of each step in docs/tasks.md are taken anew.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from csv import DictReader
from datetime import UTC, datetime, time, timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from playwright.async_api import Page, async_playwright, expect
from redis.asyncio import Redis

from tests.batching import begin, content
from tests.browser.stage import (
    ARGUMENTS,
    CHROMIUM,
    POLICY,
    REHEARSAL_MS,
    Stage,
    opened,
    shoot,
    unless_pictured,
)
from tests.browser.walks import (
    EDGE,
    NAMES,
    OUTLINE_IS_CUT,
    WAITING_CUT,
    Walk,
    as_of,
    midnight,
    slow_monday,
)
from tests.databases import Databases
from tests.gateway import ENDS, gateway
from tests.rehearsal import put_on_record
from tests.waiting import wait_until
from tidegate.call import Scope
from tidegate.embedded.servers import ValkeyServer
from tidegate.http import own_requests
from tidegate.store.statistics import latency_by_hour

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = unless_pictured(gettempdir(), "/tmp")
IMAGES = Path(__file__).parents[2] / "docs" / "images" / "tasks"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(
    valkey_server: ValkeyServer,
    databases: Databases,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Stage]:
    """One gateway with a worker, a second upstream and the record of days, and one browser."""
    name = await asyncio.to_thread(databases.take)
    redis_url = f"{valkey_server.url.rpartition('/')[0]}/13"
    async with Redis.from_url(redis_url) as client:
        await client.flushdb()
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "tidegate.toml").write_text(POLICY)
    settings: dict[str, Any] = {
        "redis_url": redis_url,
        "database_url": databases.server.url(name),
        "auth": "on",
        "tidegate_policy": folder / "tidegate.toml",
        "key_folder": KEYS,
    }
    async with gateway(folder / "data", **settings) as running, async_playwright() as playwright:
        tenants = running.services.store.tenants
        _, made = await tenants.create_key("default", scopes=list(Scope), name="operators")
        running.http.headers["x-api-key"] = made.text
        chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield Stage(running, valkey_server, databases.server, chromium, made.text)
        await chromium.close()
    await asyncio.to_thread(databases.give_back, name)


async def as_acme(stage: Stage) -> dict[str, str]:
    """The header of a call of acme's."""
    tenants = stage.gateway.services.store.tenants
    await tenants.set("acme", {}, by="test")
    return {"x-api-key": (await tenants.create_key("acme", name="backend"))[1].text}


async def submitted(stage: Stage, text: str, headers: dict[str, str], **more: str) -> str:
    body = {"data": text, "type": "text_only", **more}
    url = f"{stage.gateway.url}/submit"
    async with stage.gateway.http.post(url, json=body, headers=headers) as answer:
        assert answer.status == 202, await answer.text()
        return str((await answer.json())["request_id"])


async def ended(stage: Stage, request_id: str) -> str:
    """How a request of any tenant has ended."""

    async def end() -> str:
        _, found = await stage.gateway.get(f"/admin/requests/{request_id}")
        status = str(found["request"]["status"])
        return status if status in ENDS else ""

    return str(await wait_until(end, 20, f"the end of {request_id}"))


async def test_an_operator_does_each_of_ten_tasks_in_five_clicks_from_the_overview(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path
    if os.environ.get("TIDEGATE_SCREENSHOTS"):
        folder = IMAGES
        folder.mkdir(exist_ok=True)
    acme = await as_acme(stage)
    async with opened(stage, "/", width=1000) as seen:
        page = seen.page

        async def walk(name: str) -> Walk:
            return await Walk(page, name, folder, tmp_path).begin()

        await find_what_blocks_a_tenant(stage, await walk("blocked"), acme)
        with TemporaryDirectory(prefix="secrets-", dir=KEYS) as secrets:
            await rotate_a_key(stage, await walk("key"), Path(secrets))
        await cap_a_tenant(stage, await walk("cap"))
        await replay_a_failed_call(stage, walk, acme)
        await drain_an_upstream(stage, await walk("drain"))
        await export_a_month(stage, walk)
        await see_what_a_limit_would_have_done(stage, walk)
        await stop_a_batch(stage, walk)
        key = await let_a_colleague_in(await walk("colleague"))
        await find_why_monday_was_slow(stage, walk)
        await see_a_sample_of_monday(page, monkeypatch)
        for width, colours in (1280, "dark"), (400, "light"):
            await page.set_viewport_size({"width": width, "height": 900})
            await page.emulate_media(color_scheme=colours)  # type: ignore[arg-type]
            await seen.is_accessible()
            assert await seen.is_within(), width
            await shoot(page, tmp_path / f"latency-{width}.png", full_page=True)
    stage.key = key
    async with opened(stage, "/upstreams") as seen:
        await expect(seen.page.locator("#who")).to_have_text("viewer")
        await expect(seen.page.get_by_role("button", name="Add an upstream")).to_be_disabled()


async def find_what_blocks_a_tenant(stage: Stage, walk: Walk, acme: dict[str, str]) -> None:
    running, page = stage.gateway, walk.page
    limit = "kind:text_only"
    await running.services.limiter.penalise(limit, for_ms=3_600_000, by="ann", reason="quota")
    jobs = [await submitted(stage, f"Explain tide {n}", acme) for n in range(3)]
    tenant = page.locator("tr[data-tenant='acme']")
    why = tenant.get_by_role("button", name=f"Show the limit {limit}")
    await walk.click(why, page.get_by_role("region", name="Tenants"))
    paused = page.locator(f"[data-limit='{limit}']")
    for width in (400, 700, 1360, 1000):
        await page.set_viewport_size({"width": width, "height": 900})
        assert await paused.evaluate(WAITING_CUT) <= 0, width
        assert await paused.evaluate(EDGE) < 20, width
    await walk.click(
        paused.get_by_role("button", name=f"Resume {limit}"),
        page.get_by_role("region", name="Limits"),
    )
    dialog = page.get_by_role("dialog")
    await walk.click(dialog.get_by_role("button", name="Resume"), dialog)
    await walk.end(page.locator(".toast").last)
    for one in jobs:
        assert await ended(stage, one) == "succeeded"


async def rotate_a_key(stage: Stage, walk: Walk, folder: Path) -> None:
    running, page = stage.gateway, walk.page
    (folder / "reserve-key").write_text("sk-of-last-year-0001")
    table = {
        "provider": "vllm",
        "base_url": f"{running.config.gemini_base_url}/v1",
        "key_file": str(folder / "reserve-key"),
        "models": ["spare-*"],
    }
    url = f"{running.url}/admin/upstreams/reserve"
    async with running.http.put(url, json={"table": table, "test": False}) as answer:
        assert answer.status == 200, await answer.text()
    (folder / "reserve-key").write_text("sk-of-this-year-0002")
    await walk.click(page.get_by_role("link", name="Upstreams", exact=True))
    card = page.locator("[data-upstream='reserve']")
    await walk.click(card.get_by_role("button", name="Rotate the key of reserve"), card)
    dialog = page.get_by_role("dialog")
    await walk.click(dialog.get_by_role("button", name="Read the new key"), dialog)
    await walk.click(card.get_by_role("button", name="Test reserve"), card)
    await walk.end(card.get_by_text("models: "))
    assert running.services.spine.targets.upstreams["reserve"].key == "sk-of-this-year-0002"


async def cap_a_tenant(stage: Stage, walk: Walk) -> None:
    page = walk.page
    await walk.click(page.get_by_role("navigation").get_by_role("link", name="Keys and tenants"))
    row = page.get_by_role("region", name="Tenants").locator("tr[data-tenant='acme']")
    await walk.click(row.get_by_role("button", name="Change acme"))
    dialog = page.get_by_role("dialog")
    await walk.type(dialog.get_by_label("Daily budget (USD)"), "5")
    await walk.click(dialog.get_by_role("button", name="Change the tenant"), dialog)
    await walk.end(row.get_by_text("$5.00"))
    status, acme = await stage.gateway.get("/admin/tenants/acme")
    assert (status, float(acme["budget_day_money"])) == (200, 5.0)


async def replay_a_failed_call(
    stage: Stage, begin_walk: Callable[[str], Awaitable[Walk]], acme: dict[str, str]
) -> None:
    running = stage.gateway
    await running.upstream.set_fault("safety", match="salty")
    failed = await submitted(stage, "Why is the sea salty?", acme, subject="ann@example.com")
    assert await ended(stage, failed) == "failed"
    await running.upstream.clear_faults()
    await running.audit(failed)
    for minute in range(3):
        at = midnight(-1) + timedelta(hours=14, minutes=minute)
        await as_of(running.database, failed, at)
    walk = await begin_walk("replay")
    page = walk.page
    tiles = page.locator(".tiles")
    await walk.click(tiles.get_by_role("link", name="Failed"), tiles)
    await walk.click(page.get_by_role("button", name="Yesterday"))
    await page.keyboard.press("/")
    await walk.type(page.get_by_label("Search", exact=True), "ann@example")
    rows = page.locator(".requests tbody tr")
    await expect(rows).to_have_count(3)
    await walk.click(rows.first.get_by_role("link").first)
    await walk.click(page.get_by_role("button", name="Replay"))
    dialog = page.get_by_role("dialog")
    await expect(dialog.get_by_label("Upstream").locator("option")).to_have_text(
        ["gemini", "reserve"]
    )
    await walk.click(dialog.get_by_role("button", name="Replay"), dialog)
    await walk.end(page.locator(".badge", has_text="Succeeded"))
    await expect(page.locator(".facts").get_by_role("link", name=re.compile("^01"))).to_be_visible()


async def drain_an_upstream(stage: Stage, walk: Walk) -> None:
    page = walk.page
    await walk.click(page.get_by_role("link", name="Upstreams", exact=True))
    card = page.locator("[data-upstream='reserve']")
    await expect(card.get_by_text("In progress", exact=True)).to_be_visible()
    assert len(set(await card.evaluate(NAMES))) == 1, "each in one line"
    await walk.click(card.get_by_role("button", name="Drain reserve"), card)
    dialog = page.get_by_role("dialog")
    await walk.type(dialog.get_by_label("Reason"), "maintenance until noon")
    await walk.click(dialog.get_by_role("button", name="Drain"), dialog)
    await walk.end(card.get_by_text("Drained", exact=True))
    await page.get_by_role("link", name="Overview", exact=True).click()
    await expect(page.get_by_role("heading", name="Overview", exact=True)).to_be_visible()
    shown = page.get_by_role("region", name="Upstreams").locator("[data-upstream='reserve'] .badge")
    await expect(shown).to_have_text("Drained")
    await expect(shown).to_have_class("badge ")  # not red: an operator wants it


async def export_a_month(stage: Stage, begin_walk: Callable[[str], Awaitable[Walk]]) -> None:
    first = datetime.now(UTC).date().replace(day=1) - timedelta(days=1)
    for back in range(20):
        for place, tenant in enumerate(("acme", "globex", "initech")):
            await stage.gateway.database.execute(
                "INSERT INTO usage_days (tenant_id, day, model, pool, requests, input_tokens,"
                " cached_tokens, output_tokens, cost_micros, unpriced)"
                " VALUES ($1, $2, 'gemini-2.5-flash', 'gemini', 40, 900000, 0, 12000, $3, 0)"
                " ON CONFLICT (tenant_id, day, model, pool) DO UPDATE SET cost_micros = $3",
                *(tenant, first - timedelta(days=back), 1_500_000 // (place + 1)),
            )
    walk = await begin_walk("export")
    page = walk.page
    await walk.click(page.get_by_role("link", name="Usage", exact=True))
    await walk.choose(page.get_by_label("Days"), "last")
    await expect(page.locator("[aria-busy='true']")).to_have_count(0)
    table = page.get_by_role("region", name="By tenant")
    await expect(table.locator("tbody tr")).to_have_count(3)
    async with page.expect_download() as coming:
        await walk.click(table.get_by_role("button", name="CSV", exact=True), table)
    await walk.end(page.locator(".toast").last)
    with (await (await coming.value).path()).open(encoding="utf-8", newline="") as lines:
        costs = {row["tenant"]: row["cost_usd"] for row in DictReader(lines)}
    assert costs == {"acme": "30.000000", "globex": "15.000000", "initech": "10.000000"}


async def see_what_a_limit_would_have_done(
    stage: Stage, begin_walk: Callable[[str], Awaitable[Walk]]
) -> None:
    # Yesterday has the calls of another task.
    database, day = stage.gateway.database, datetime.now(UTC).date() - timedelta(days=2)
    while day.weekday() != 1:
        day -= timedelta(days=1)
    await put_on_record(database, datetime.combine(day, time(9), UTC), 1_200)
    await database.execute(
        "INSERT INTO usage_days (tenant_id, day, model, pool, requests, input_tokens,"
        " cached_tokens, output_tokens, cost_micros, unpriced)"
        " VALUES ('globex', $1, 'gemini-2.5-flash', 'gemini', 1200, 900000, 0, 12000, 1000, 0)"
        " ON CONFLICT (tenant_id, day, model, pool) DO UPDATE SET requests = 1200",
        day,
    )
    walk = await begin_walk("what-if")
    page = walk.page
    await walk.click(page.get_by_role("link", name="What if", exact=True))
    days = page.get_by_role("group", name="Days with requests")
    await walk.click(days.get_by_role("button", name=f"Tue {day.day} {day:%b}"))
    new = page.get_by_label("New value of kind:text_only")
    await walk.click(new)
    await walk.type(new, "20")
    assert not await new.evaluate(OUTLINE_IS_CUT)
    await walk.click(page.get_by_role("button", name="Rehearse"))
    result = page.locator(".what-if-result")
    await expect(result).to_contain_text("of 1,200 calls would have waited", timeout=REHEARSAL_MS)
    await expect(result.locator(".chart canvas").first).to_be_visible()
    await walk.end(result.locator(".what-if-said"), result)


async def stop_a_batch(stage: Stage, begin_walk: Callable[[str], Awaitable[Walk]]) -> None:
    running = stage.gateway
    client = AsyncOpenAI(base_url=f"{running.url}/v1", api_key=stage.key, max_retries=0)
    await stage.slow(400)
    batch = await begin(client, content(400), metadata={"run": "nightly, by mistake"})
    await client.close()
    walk = await begin_walk("batch")
    page = walk.page
    await walk.click(page.get_by_role("link", name="Batches", exact=True))
    row = page.locator(f"[data-batch='{batch.id}']")
    await walk.click(row.get_by_role("button", name="Cancel"), row)
    dialog = page.get_by_role("dialog")
    await walk.click(dialog.get_by_role("button", name="Cancel the batch"), dialog)
    await walk.end(row.get_by_text("Cancelled", exact=True))
    await stage.slow(0)


async def let_a_colleague_in(walk: Walk) -> str:
    page = walk.page
    await walk.click(page.get_by_role("navigation").get_by_role("link", name="Keys and tenants"))
    await walk.click(page.get_by_role("button", name="New dashboard key"))
    dialog = page.get_by_role("dialog")
    await walk.type(dialog.get_by_label("Name of the person"), "ann")
    role = dialog.get_by_label("Role").locator("option:checked")
    await expect(role).to_contain_text("Viewer")  # as the task has it
    await walk.click(dialog.get_by_role("button", name="Create the key"), dialog)
    made = page.get_by_role("dialog", name="Key created")
    key = await made.locator(".made-key").inner_text()
    await page.context.grant_permissions(["clipboard-write"])
    await walk.click(made.get_by_role("button", name="Copy"), made)
    await expect(made.get_by_role("button", name="Copied")).to_be_visible()
    await walk.click(made.get_by_role("button", name="Done"), made)
    await walk.end(page.get_by_role("region", name="API keys").get_by_text("ann", exact=True))
    return key


async def find_why_monday_was_slow(
    stage: Stage, begin_walk: Callable[[str], Awaitable[Walk]]
) -> None:
    monday = await slow_monday(stage.gateway.database)
    walk = await begin_walk("slow")
    page = walk.page
    await walk.click(page.get_by_role("link", name="Earlier days"))
    await walk.click(page.get_by_role("button", name=f"{monday:%a} {monday.day}", exact=True))
    why = page.get_by_role("region", name="Why")
    await expect(why).to_contain_text("from 09:00 to 11:00")
    await expect(why).to_contain_text("waiting for admission 10.4 s, at other hours 24 ms")
    await expect(why).to_contain_text("tenant acme 91 %")
    await expect(why).to_contain_text("type text_only 100 %")
    await walk.end(why, page.locator("#main"))
    hours = page.get_by_role("region", name="Hours").locator("tbody tr")
    await expect(hours).to_have_count(24)
    await expect(hours.nth(9)).to_contain_text("slow")
    await expect(page.get_by_role("link", name="Requests of this time")).to_be_visible()
    whose = page.get_by_role("region", name="Breakdown").get_by_role(
        "link", name="acme", exact=True
    )
    href = str(await whose.get_attribute("href"))
    for part in ("tenant=acme", f"since={monday:%Y-%m-%d}T09", f"until={monday:%Y-%m-%d}T11"):
        assert part in href


async def see_a_sample_of_monday(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of which few requests were read is not judged, and counts are marked as estimates."""
    monkeypatch.setattr(own_requests, "latency_by_hour", partial(latency_by_hour, most_pages=30))
    await page.reload()
    await expect(page.get_by_text(re.compile(r"^From \d+ of about \d+ requests"))).to_be_visible()
    await expect(page.get_by_role("region", name="Why")).to_contain_text("As usual")
    first = page.get_by_role("region", name="Hours").locator("tbody tr").first
    await expect(first.get_by_role("cell").first).to_contain_text(re.compile(r"^about \d+$"))
