"""The dashboard of a large deployment in a real browser: 50 upstreams and 500 tenants, and messages
that leave every row within reach."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Page, async_playwright, expect
from redis.asyncio import Redis

from tests.browser.playground import curl_of, output_of
from tests.browser.stage import (
    ARGUMENTS,
    CHROMIUM,
    SHIFTS,
    Seen,
    Stage,
    assert_still,
    opened,
    shoot,
)
from tests.databases import Databases
from tests.gateway import gateway
from tidegate.call import Scope
from tidegate.embedded.servers import ValkeyServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

UPSTREAMS, TENANTS, DAYS = 50, 500, 30


def policy() -> str:
    """Accounts of three providers, with routes among them."""
    tables = []
    for number in range(1, UPSTREAMS):
        provider, key = [
            ("openai", "OPENAI_KEY_EU_WEST"),
            ("anthropic", "ANTHROPIC_KEY"),
            ("vllm", ""),
        ][number % 3]
        models = [f"model-{number}-{size}" for size in ("large", "small", "mini-2026-09-01")]
        lines = [f'provider = "{provider}"', f"models = {models}"]
        lines.append(f'base_url = "http://127.0.0.1:9/{number}"' if not key else f'key = "{key}"')
        tables.append(f"[upstreams.{provider}-eu-west-{number}]\n" + "\n".join(lines))
    return "\n".join(tables)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(
    valkey_server: ValkeyServer,
    databases: Databases,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Stage]:
    """One gateway of many upstreams and tenants, and one browser, for all tests."""
    name = await asyncio.to_thread(databases.take)
    redis_url = f"{valkey_server.url.rpartition('/')[0]}/13"
    async with Redis.from_url(redis_url) as client:
        await client.flushdb()
    folder = tmp_path_factory.mktemp("scale")
    (folder / "tidegate.toml").write_text(policy())
    settings: dict[str, Any] = {
        "redis_url": redis_url,
        "database_url": databases.server.url(name),
        "auth": "on",
        "tidegate_policy": folder / "tidegate.toml",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key in ("OPENAI_KEY_EU_WEST", "ANTHROPIC_KEY"):
            patch.setenv(key, "key-of-the-provider")
        async with gateway(folder / "data", **settings) as running, async_playwright() as by:
            tenants = running.services.store.tenants
            _, made = await tenants.create_key("default", scopes=list(Scope), name="operators")
            running.http.headers["x-api-key"] = made.text
            await running.database.execute(
                "INSERT INTO usage_days (tenant_id, day, model, pool, requests, input_tokens,"
                " cached_tokens, output_tokens, cost_micros, unpriced)"
                " SELECT format('department-of-things/team-%s', lpad(t::text, 3, '0')), day,"
                " format('model-%s-large', t % 49 + 1), format('openai-eu-west-%s', t % 49 + 1),"
                " 40 + t, 9000 * t, 3000 * t, 120 * t, 60000000 / (t + 3), 0"
                " FROM generate_series(0, $1::int - 1) t, unnest($2::date[]) AS day",
                TENANTS,
                [(datetime.now(UTC) - timedelta(days=day)).date() for day in range(DAYS)],
            )
            chromium = await by.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            yield Stage(running, valkey_server, databases.server, chromium, made.text)
            await chromium.close()
    await asyncio.to_thread(databases.give_back, name)


# Which elements no click can reach, although each is scrolled into view as by the keyboard.
COVERED = """() => {
    const within = [...document.querySelectorAll("main :is(button, a, input, select)")];
    const shown = within.filter((one) => one.checkVisibility() && !one.disabled);
    const covered = shown.filter((one) => {
        one.focus();
        const { left, top, width, height } = one.getBoundingClientRect();
        const hit = document.elementFromPoint(left + width / 2, top + height / 2);
        return hit !== one && !one.contains(hit);
    });
    return [shown.length, covered.map((one) => one.outerHTML.slice(0, 200))];
}"""
# How a text of names and figures is composed: its text, and the texts of its isolated parts.
COMPOSED = """async (text) => {
    const { sayComposed } = await import(new URL("static/dom.js", document.baseURI));
    const place = document.createElement("p");
    sayComposed(place, text);
    return [place.textContent, ...[...place.querySelectorAll("bdi")].map((one) => one.textContent)];
}"""
# Amounts as the page writes them.
AMOUNTS = """async (amounts) => {
    const { money } = await import(new URL("static/format.js", document.baseURI));
    return amounts.map(money);
}"""
# What a wide chart of so many seconds, and up to so many dollars, writes beside its axes.
AXES = """async ([lasts, dollars]) => {
    const at = (file) => import(new URL(`static/${file}`, document.baseURI));
    const [{ chart }, { money }] = [await at("chart.js"), await at("format.js")];
    const written = [];
    const context = CanvasRenderingContext2D.prototype;
    const { clearRect, fillText } = context;
    context.clearRect = function (...area) {
        written.length = 0; // drawn again
        clearRect.apply(this, area);
    };
    context.fillText = function (text, ...rest) {
        written.push(text);
        fillText.call(this, text, ...rest);
    };
    const one = chart("Cost", [["cost", "--accent"]], money, { signal: AbortSignal.any([]) });
    document.getElementById("main").replaceChildren(one.element);
    const from = Date.UTC(2026, 0, 1) / 1_000;
    one.update([from, from + lasts], [[0, dollars]]);
    const times = () => written.filter((text) => text.includes(":"));
    for (let frame = 0; frame < 60 && !times().length; frame += 1)
        await new Promise(requestAnimationFrame);
    Object.assign(context, { clearRect, fillText });
    return [times(), written.filter((text) => text.includes("$"))];
}"""
# The card of tenants in a time without calls.
TENANTS_WITHOUT_CALLS = """async () => {
    const at = new URL("static/pages/overview/tenants.js", document.baseURI);
    const card = (await import(at)).tenantsCard(() => "", () => null);
    card.live({ tenants: [] });
    card.trend({ words: "5 minutes", tenants: [] });
    return card.element.textContent;
}"""
# How far the bars of a placeholder are apart.
GAPS = """async () => {
    const { loading } = await import(new URL("static/ui.js", document.baseURI));
    const place = document.getElementById("main").appendChild(loading(3));
    const bars = [...place.querySelectorAll(".placeholder")];
    const areas = bars.map((one) => one.getBoundingClientRect());
    place.remove();
    return areas.slice(1).map((one, at) => one.top - areas[at].bottom);
}"""
TELL = """async (texts) => {
    const { toast } = await import(new URL("static/ui.js", document.baseURI));
    for (const [text, kind] of texts) toast(text, kind);
}"""


WIDTHS = (1360, 400)
MESSAGES = [
    ["openai-eu-west-48 takes no new calls.", "good"],
    ["Not in force yet in api-7, worker-3 and worker-4, which do not answer.", "bad"],
    ["Resume openai-eu-west-47? The gateway does not answer.", "bad"],
    ["Not now.", "bad"],
]


async def test_messages_cover_nothing_that_can_be_reached(stage: Stage, tmp_path: Path) -> None:
    async with opened(stage, "/upstreams") as seen:
        for width in WIDTHS:
            await seen.page.set_viewport_size({"width": width, "height": 900})
            await messages_cover_nothing(seen)
            await shoot(seen.page, tmp_path / f"messages-{width}.png")
            await messages_are_dismissed(seen.page)


async def messages_cover_nothing(seen: Seen) -> None:
    page = seen.page
    last = page.get_by_role("button", name="Drain openai-eu-west-48")
    await last.scroll_into_view_if_needed()
    await last.focus()
    await page.evaluate(TELL, MESSAGES)
    toasts = page.locator(".toast.bad")
    await expect(toasts).to_have_count(3)
    await expect(page.locator(".toast.good")).to_have_count(0)  # it has made room
    await expect(last).to_be_in_viewport(ratio=1)
    await last.click(trial=True)
    count, covered = await page.evaluate(COVERED)
    assert (count > 200, covered) == (True, [])
    assert await seen.is_within()
    await seen.is_accessible()
    await expect(page.get_by_role("status").filter(has=toasts)).to_have_count(1)


async def messages_are_dismissed(page: Page) -> None:
    for _ in MESSAGES[1:]:
        await page.get_by_role("button", name="Dismiss").first.press("Enter")
    await expect(page.locator(".toast.bad")).to_have_count(0)
    await expect(page.locator("#toasts")).to_have_css("border-top-width", "0px")


async def test_one_of_many_upstreams_is_found_by_its_name_or_state(
    stage: Stage, tmp_path: Path
) -> None:
    url = f"{stage.gateway.url}/admin/upstreams/anthropic-eu-west-7"
    async with stage.gateway.http.post(f"{url}/drain", json={}) as answer:
        assert answer.status == 200, await answer.text()
    try:
        async with opened(stage, "/upstreams") as seen:
            for width in WIDTHS:
                await seen.page.set_viewport_size({"width": width, "height": 900})
                await one_of_many_is_found(seen, tmp_path, width)
    finally:
        async with stage.gateway.http.post(f"{url}/resume", json={}) as answer:
            assert answer.status == 200, await answer.text()


async def one_of_many_is_found(seen: Seen, folder: Path, width: int) -> None:
    page = seen.page
    shown = page.locator("[data-upstream]:visible")
    await expect(shown).to_have_count(UPSTREAMS)
    card = page.get_by_role("region", name="Upstreams")
    await expect(card).to_contain_text("50 upstreams, 1 not healthy")
    await page.get_by_role("button", name="Not healthy").click()
    await expect(shown).to_have_count(1)
    await expect(shown.locator(".badge")).to_have_text("Drained")
    await shoot(page, folder / f"not-healthy-{width}.png")
    await page.get_by_role("button", name="All", exact=True).click()
    find = page.get_by_role("searchbox", name="Search upstreams")
    await find.fill("MODEL-12-small")
    await expect(shown).to_have_count(1)
    await expect(shown).to_contain_text("openai-eu-west-12")
    await find.fill("vllm")
    await expect(shown).to_have_count(16)
    await seen.is_accessible()
    assert await seen.is_within()
    await find.fill("nowhere")
    await expect(card.get_by_text("No matches")).to_be_visible()
    await find.fill("")
    await page.get_by_role("button", name="Changes").click()
    changes = page.get_by_role("heading", name="Changes")
    await expect(changes).to_be_focused()
    await expect(changes).to_be_in_viewport()
    await shoot(page, folder / f"upstreams-{width}.png", full_page=True)


async def test_the_days_of_many_tenants_show_the_largest_of_them(
    stage: Stage, tmp_path: Path
) -> None:
    async with opened(stage, "/usage?by=tenant&range=30") as seen:
        page = seen.page
        legend = page.locator(".days .legend li")
        await expect(legend).to_have_count(7)
        names = [f"department-of-things/team-{number:03}" for number in range(6)]
        for place, name in enumerate(names):
            await expect(legend.nth(place)).to_contain_text(name)
        widths = await legend.locator("span").evaluate_all(
            "(all) => all.map((one) => [one.scrollWidth, one.clientWidth])"
        )
        assert all(whole <= seen for whole, seen in widths), "no name is cut"
        others = legend.last
        # One more where another test has sent a call.
        await expect(others).to_contain_text(re.compile(r"^49[45] others"))
        drawn = page.locator(".day").first.locator("i")
        await expect(drawn).to_have_count(7)
        sums = await legend.locator("b").all_text_contents()
        total = await page.locator(".usage-total strong").text_content()
        parts = sum(float(text.strip("$").replace(",", "")) for text in sums)
        assert parts == pytest.approx(float((total or "").strip("$").replace(",", "")), abs=0.05)
        await seen.is_accessible()
        await shoot(page, tmp_path / "usage.png")
        await page.get_by_role("button", name="Requests", exact=True).click()
        await expect(legend.first).to_contain_text("department-of-things/team-499")


async def test_a_span_of_many_years_shows_its_last_days(stage: Stage) -> None:
    today = datetime.now(UTC).date()
    async with opened(stage, f"/usage?range=own&since=2012-01-01&until={today}") as seen:
        picture = seen.page.locator("[aria-label='Cost by day, the last 400']")
        await expect(picture.locator(".day")).to_have_count(400)
        await expect(picture.locator(".day").last.locator("i")).to_have_count(7)


async def test_a_copied_command_sends_no_file_that_a_body_names(
    stage: Stage, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text('{"model": "m"}')
    async with opened(stage, "/requests") as seen:
        command = await curl_of(seen.page, "/v1/chat/completions", "@mine")
    sent = await output_of("bash", "-c", command, folder=tmp_path, key=stage.key)
    assert "the body is not JSON" in sent, sent


async def test_names_and_figures_are_read_in_their_order(stage: Stage) -> None:
    async with opened(stage, "/batches") as seen:
        waiting = "Waiting: שלום 5, قسم-ب 4, acme 3 and 1 more tenant."
        composed = await seen.page.evaluate(COMPOSED, waiting)
        assert composed == [waiting, "שלום", "قسم-ب"]
        reason = "By root: מכסה 50% נוצלה. Waiting: acme 2"
        assert await seen.page.evaluate(COMPOSED, reason) == [reason, "מכסה 50% נוצלה"]
        assert await seen.page.evaluate(COMPOSED, "<b>acme</b> 5") == ["<b>acme</b> 5"]


async def test_the_times_below_a_chart_differ(stage: Stage) -> None:
    async with opened(stage, "/batches") as seen:
        for lasts_s in (70, 300, 3_600):
            times, _ = await seen.page.evaluate(AXES, [lasts_s, 1])
            assert len(times) > 2
            assert len(set(times)) == len(times), times


async def test_an_amount_that_is_rounded_to_a_cent_is_written_as_one(stage: Stage) -> None:
    async with opened(stage, "/batches") as seen:
        amounts = [0.009999, 0.00999, 0.0099, 0.000999, 0.01, 0, -0.009999, 0.000001]
        assert await seen.page.evaluate(AMOUNTS, amounts) == [
            *("$0.01", "$0.01", "$0.0099", "$0.0010", "$0.01", "$0.00", "-$0.01", "$0.000001")
        ]


async def test_the_amounts_beside_a_chart_are_exact(stage: Stage) -> None:
    async with opened(stage, "/batches") as seen:
        for most in (0.00031, 0.009, 0.017, 0.03, 0.09, 0.4, 2.6, 7_300):
            _, texts = await seen.page.evaluate(AXES, [300, most])
            amounts = [float(text.strip("$").replace(",", "")) for text in texts]
            steps = {f"{after - before:.6f}" for before, after in pairwise([0, *amounts])}
            assert len(steps) == 1, (most, texts)


async def test_the_actions_of_a_row_are_within_reach_in_every_window(stage: Stage) -> None:
    async with opened(stage, "/tenants", width=800) as seen:
        page = seen.page
        revoke = page.get_by_role("button", name="Revoke tg_")
        for width in (1000, 800, 400):
            await page.set_viewport_size({"width": width, "height": 900})
            await expect(revoke).to_be_in_viewport(ratio=1)
            await revoke.click(trial=True)
            if width <= 800:  # nothing else is below it
                await page.locator("[data-key] .badge").click(trial=True)
            prefix = page.locator("[data-key] .key-name .mono")
            whole, shown = await prefix.evaluate("one => [one.scrollWidth, one.offsetWidth]")
            cell = await prefix.evaluate("one => one.closest('th').clientWidth")
            assert whole <= max(shown, 1) <= cell, "the prefix tells keys apart"
            assert await seen.is_within()


async def test_settings_are_in_cards_apart_and_their_texts_without_marks(stage: Stage) -> None:
    async with opened(stage, "/settings?shown=all") as seen:
        places = seen.page.locator(".settings-place")
        await expect(places.locator("code").first).to_have_text(re.compile(r"^[^`]+$"))
        assert "`" not in (await places.text_content() or "")
        gaps = await places.locator(".card").evaluate_all(
            "all => all.slice(1).map((one, at) => one.getBoundingClientRect().top"
            " - all[at].getBoundingClientRect().bottom)"
        )
        assert min(gaps) >= 8


async def test_a_printed_page_is_dark_on_light_and_without_what_is_clicked(stage: Stage) -> None:
    async with opened(stage, "/usage?by=tenant&range=30", colours="dark") as seen:
        page = seen.page
        await expect(page.locator(".days .legend li")).to_have_count(7)
        for theme in ("auto", "dark"):
            await page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
            await page.emulate_media(media="screen")
            await expect(page.locator("body")).to_have_css("color", "rgb(228, 236, 240)")
            await page.emulate_media(media="print")
            await expect(page.locator("body")).to_have_css("color", "rgb(20, 34, 43)")
            await expect(page.locator("#nav")).to_be_hidden()
            assert await seen.is_within()
        await page.emulate_media(media="screen")


async def test_the_overview_names_the_figures_of_a_limit(stage: Stage) -> None:
    async with opened(stage, "/") as seen:
        limits = seen.page.get_by_role("region", name="Limits", exact=True)
        await limits.get_by_role("button", name="All ").click()
        assert min(await seen.page.evaluate(GAPS)) >= 4
        waiting = limits.locator(".limit .limit-waiting").first
        await expect(waiting).to_match_aria_snapshot("- text: 0 waiting")
        without_calls = await seen.page.evaluate(TENANTS_WITHOUT_CALLS)
        assert without_calls.startswith("Tenantsshares of the last 5 minutesNo calls")


async def test_a_deployment_without_requests_shows_how_to_send_the_first(stage: Stage) -> None:
    """And one with usage of this month does not."""
    running = stage.gateway
    async with opened(stage, "/") as seen:
        page = seen.page
        spend = page.get_by_role("region", name="Spend")
        await expect(spend).to_contain_text("department-of-things")
        steps = page.get_by_role("region", name="First steps")
        await expect(steps).to_be_hidden()
        await running.database.execute("DELETE FROM audit")  # calls of other tests of this stage
        await running.database.execute("UPDATE usage_days SET day = day - 4000")
        try:
            await expect(steps.locator("pre")).to_contain_text("$TIDEGATE_API_KEY")
            await expect(steps.locator("pre")).to_contain_text(running.config.text_model)
            await expect(steps.locator("code").first).to_have_text(f"{running.url}/v1")
            await expect(steps).to_contain_text("Create a key")
            await seen.is_accessible()
            await page.set_viewport_size({"width": 400, "height": 900})
            assert await seen.is_within()
            for width in (1360, 400):  # the steps are there when the cards below them are shown
                await page.set_viewport_size({"width": width, "height": 900})
                await page.reload()
                await page.evaluate(SHIFTS)
                await expect(steps).to_be_visible()
                await expect(page.get_by_role("region", name="Processes")).to_be_visible()
                await assert_still(page, 0.1)
        finally:
            await running.database.execute("UPDATE usage_days SET day = day + 4000")
        await expect(steps).to_be_hidden()
