"""The dashboard's pages of requests in a real browser: found, watched, acted upon, tried.

With TIDEGATE_SCREENSHOTS set, their pictures of docs/dashboard.md are taken anew.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from csv import reader
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import orjson
import pytest
import pytest_asyncio
from playwright.async_api import Page, Route, async_playwright, expect
from redis.asyncio import Redis

from tests.browser.lists import (
    calls_that_do_not_count_are_named,
    cancelled_beyond_a_page,
    ten_thousand_rows_are_all,
    twenty_filters_are_kept,
)
from tests.browser.pictures import DRAWS, MARKS, PROMPT_OF
from tests.browser.playground import (
    FRAMED,
    OPTIONS,
    SYNTAX,
    an_upstream_is_named,
    code_runs,
    more_dialects,
    the_operators_key_calls_no_model,
    what_a_call_has_cost_comes_late,
    what_is_written_meanwhile_is_kept,
)
from tests.browser.stage import (
    ARGUMENTS,
    CHROMIUM,
    Colours,
    Stage,
    drawn,
    look_from_now_on,
    look_no_more,
    opened,
    shoot,
    unless_pictured,
)
from tests.databases import Databases
from tests.gateway import PNG, gateway
from tests.waiting import wait_until
from tidegate.call import Scope
from tidegate.dialects.bedrock import BEDROCK
from tidegate.embedded.servers import ValkeyServer
from tidegate.record import frame

pytestmark = pytest.mark.asyncio(loop_scope="module")

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SCRIPT = "<img src=x onerror=\"document.title='taken'\">"
ASKED = unless_pictured(f"{SCRIPT} stays text, again", "Explain tide and ebb again, briefly.")
BOTH: tuple[Colours, ...] = ("light", "dark")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(
    valkey_server: ValkeyServer,
    databases: Databases,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Stage]:
    """One gateway with a worker and one permit for text, and one browser, for all tests."""
    name = await asyncio.to_thread(databases.take)
    redis_url = f"{valkey_server.url.rpartition('/')[0]}/15"
    async with Redis.from_url(redis_url) as client:
        await client.flushdb()
    settings: dict[str, Any] = {
        "redis_url": redis_url,
        "database_url": databases.server.url(name),
        "rate_limits": {"text_only": 1},
        "claim_lease_ms": 20_000,
        "first_byte_timeout_ms": 60_000,
        "idle_timeout_ms": 60_000,
        "auth": "on",
    }
    folder = tmp_path_factory.mktemp("requests") / "data"
    async with gateway(folder, **settings) as running, async_playwright() as playwright:
        tenants = running.services.store.tenants
        _, made = await tenants.create_key("default", scopes=list(Scope))
        running.http.headers["x-api-key"] = made.text
        chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield Stage(running, valkey_server, databases.server, chromium, made.text)
        await chromium.close()
    await asyncio.to_thread(databases.give_back, name)


async def picture(page: Page, name: str, folder: Path) -> None:
    """What the window shows; for docs/dashboard.md where TIDEGATE_SCREENSHOTS is set."""
    taking = os.environ.get("TIDEGATE_SCREENSHOTS") and (IMAGES / f"{name}.png").exists()
    path = (IMAGES if taking else folder) / f"{name}.png"
    assert len(await page.screenshot(path=path)) > 20_000


async def look_again(page: Page) -> None:
    """Have a view refreshed at once, as when its tab comes to the front."""
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


@asynccontextmanager
async def held(stage: Stage) -> AsyncIterator[str]:
    """The one permit is in use by this job, until the end of the block."""
    await stage.gateway.upstream.set_fault("hang", match="hold it")
    holder = await stage.gateway.submit(data="hold it", type="text_only")
    await stage.gateway.in_flight(1)
    yield holder
    async with stage.gateway.http.delete(f"{stage.gateway.url}/requests/{holder}") as answer:
        assert answer.status in (200, 202)
    await stage.gateway.end_of(holder)
    await stage.gateway.upstream.clear_faults()


async def test_one_that_waits_is_found_says_for_what_and_is_cancelled(stage: Stage) -> None:
    async with held(stage) as holder, opened(stage, "/requests") as seen:
        page = seen.page
        oldest = await stage.gateway.submit(data="Explain the ebb", type="text_only")
        spare = await stage.gateway.submit(data="Explain the moon", type="text_only")
        waiter = await stage.gateway.submit(data="Explain the tide", type="text_only")
        await expect(page.get_by_role("link", name=waiter[:18])).to_be_visible()
        await cancelled_beyond_a_page(stage, page, spare)
        await page.get_by_label("Status").select_option("queued")
        await expect(page.get_by_role("link", name=oldest[:18])).to_be_visible()
        await stage.gateway.http.delete(f"{stage.gateway.url}/requests/{oldest}")
        await look_again(page)
        await expect(page.get_by_role("link", name=oldest[:18])).to_have_count(0)
        await page.get_by_role("link", name=waiter[:18]).press("Enter")
        now = page.locator(".now")
        await expect(now).to_contain_text("Waits for kind:text_only: 1 of 1 are in use")
        await expect(now).to_contain_text("It is 1st in its queue.")
        await expect(now.get_by_role("link", name=holder[:18])).to_be_visible()
        await expect(page.locator("[data-what=waiting] .lasted")).to_contain_text("so far")

        async def passed_on(route: Route) -> None:
            view = await (response := await route.fetch()).json()
            view["waiting"]["holders"][0]["request_id"] = waiter
            await route.fulfill(response=response, json=view)

        await page.route(f"**/admin/requests/{waiter}", passed_on)
        await expect(now.get_by_role("link", name=waiter[:18])).to_be_visible()
        await page.unroute(f"**/admin/requests/{waiter}", passed_on)
        await calls_that_do_not_count_are_named(page, waiter)
        await page.get_by_role("button", name="Cancel").click()
        dialog = page.get_by_role("dialog")
        await page.keyboard.press("Escape")
        await expect(dialog).to_have_count(0)
        assert (await stage.gateway.status(waiter))["status"] == "queued", "nothing without a word"
        await page.get_by_role("button", name="Cancel").click()
        await dialog.get_by_label("Reason").fill("a mistake")
        await dialog.get_by_role("button", name="Cancel").last.click()
        await expect(page.locator(".page-head .badge")).to_have_text("Cancelled")
        await expect(page.get_by_role("button", name="Retry")).to_be_visible()
        assert (await stage.gateway.status(waiter))["status"] == "cancelled"
        await page.go_back()
        assert "status=queued" in page.url, "the filter is in the address"
        await expect(page.get_by_text("No requests match")).to_be_visible()


async def test_streams_and_native_calls_are_seen_while_they_are_under_way(
    stage: Stage, tmp_path: Path
) -> None:
    for prompt in ("Explain the tide", "Explain the ebb", "Generate an image of a fox"):
        await stage.gateway.end_of(await stage.gateway.submit(data=prompt))
    await stage.gateway.upstream.set_fault("hang", match="hold it")
    holding = asyncio.create_task(stage.native("hold it"))
    await stage.gateway.in_flight(1)
    streaming = asyncio.create_task(stage.gateway.stream(text="Explain the tide", type="text_only"))
    await wait_until(lambda: stage.gateway.waiting == 1)
    async with opened(stage, "/requests") as seen:
        page = seen.page
        card = page.locator(".running-card")
        await expect(card).to_contain_text("Streams and native calls: 1 running, 1 waiting")
        await card.locator("summary").press("Enter")
        rows = card.locator("tbody tr")
        await expect(rows.first).to_contain_text("/v1/chat/completions")
        await expect(rows.first.locator(".badge")).to_have_text("Running")
        await expect(rows.last).to_contain_text("waits for kind:text_only")
        await seen.is_accessible()
        await page.evaluate("document.activeElement.blur()")
        await picture(page, "requests", tmp_path)
        await page.set_viewport_size({"width": 400, "height": 800})
        assert await seen.is_within()
        await expect(rows.last).to_contain_text("waits for kind:text_only")
        holding.cancel()
        assert (await streaming).status == 200
        await look_again(page)
        await expect(card).to_contain_text("No streams or native calls")
        await page.reload()
        await expect(card.locator("table")).to_be_hidden()
        await expect(card).to_have_attribute("open", "")
    await asyncio.gather(holding, return_exceptions=True)
    await stage.gateway.upstream.clear_faults()


async def test_the_tries_of_one_are_drawn_to_scale_and_what_was_written_stays_text(
    stage: Stage, tmp_path: Path
) -> None:
    await stage.gateway.upstream.set_fault("throttled", count=1, match="again", retry_after_s=0.3)
    job = await stage.gateway.submit(data=ASKED, type="text_only")
    end = await stage.gateway.end_of(job)
    async with opened(stage, f"/requests/{job}") as seen:
        page = seen.page
        called = page.locator("[data-what=calling]")
        await expect(called).to_have_count(2)
        await expect(called.first).to_contain_text("upstream_throttled")
        await expect(page.locator("[data-what=ended]")).to_contain_text("Succeeded")
        track = page.locator(".whole .track")
        whole = await track.bounding_box()
        parked = await track.locator(".parked").bounding_box()
        assert whole is not None
        assert parked is not None
        life = await stage.gateway.get(f"/admin/requests/{job}")
        steps = {step["what"]: step for step in life[1]["timeline"]}
        share = _seconds(steps["parked"]["until"], steps["parked"]["at"]) / _seconds(
            end["finished_at"], end["submitted_at"]
        )
        assert parked["width"] / whole["width"] == pytest.approx(share, abs=0.02)
        await expect(page.locator(".facts")).to_contain_text("Waited (last attempt)")
        await expect(page.get_by_label("Prompt")).to_have_text(ASKED)
        await expect(page.get_by_role("region", name="Answer", exact=True)).to_contain_text(ASKED)
        await page.get_by_role("button", name="Show").last.click()
        await expect(page.get_by_role("region", name="Response", exact=True)).to_contain_text(
            "finish_reason"
        )
        assert "request" in await page.title()
        assert await page.locator("main img").count() == 0
        await page.get_by_role("button", name="Hide").click()
        await page.evaluate("window.scrollTo(0, 0)")
        await picture(page, "request", tmp_path)

        await page.get_by_role("button", name="Retry").click()
        await page.get_by_role("dialog").get_by_role("button", name="Retry").click()
        await expect(page.locator("h1")).not_to_contain_text(job)
        await expect(page.locator(".page-head .badge")).to_have_text("Succeeded")
        await expect(page.get_by_label("Prompt")).to_have_text(ASKED)


@pytest.mark.parametrize("colours", ["light", "dark"])
async def test_a_conversation_is_a_tree_one_click_from_its_calls(
    stage: Stage, colours: Colours, tmp_path: Path
) -> None:
    name = "plan-7b0e4c1e" if colours == "light" else SCRIPT
    await stage.turn(name, "Plan it", 0)
    for turns in range(2):
        await stage.turn(name, "Look for it", turns)
    for turns in (1, 2):
        await stage.turn(name, "Plan it", turns)
    query = urlencode({"conversation": name})
    async with opened(stage, f"/requests?{query}", colours=colours) as seen:
        page = seen.page
        await expect(page.locator("tbody tr")).to_have_count(5)
        await page.get_by_role("link", name="Open conversation", exact=True).first.click()
        rows = page.locator(".calls tbody tr")
        await expect(rows).to_have_count(7)
        heads = page.locator(".calls .thread")
        await expect(heads.first).to_contain_text("Thread 1")
        await expect(heads.last).to_contain_text("2 calls · after the call above, by time")
        depths = [await row.get_attribute("data-depth") for row in await rows.all()]
        assert depths == ["0", "1", "1", "2", "2", "1", "1"]
        await expect(page.locator("[data-figure=calls]")).to_contain_text("all succeeded")
        await expect(page.locator("[data-figure=cost]")).to_contain_text("5 without a price")
        await expect(page.locator("h1")).to_contain_text(name)
        assert "Conversation" in await page.title(), "what a tenant wrote stays text"
        await seen.is_accessible()
        if colours == "light":
            await page.set_viewport_size({"width": 1360, "height": 560})
            await picture(page, "conversation", tmp_path)
        await page.set_viewport_size({"width": 400, "height": 800})
        assert await seen.is_within()
        first = rows.nth(1).get_by_role("link")
        await first.click()
        await expect(page.locator(".facts")).to_contain_text(name)


async def test_a_list_that_is_looked_at_does_not_move_and_tells_of_new_ones(stage: Stage) -> None:
    mine = f"subject-{uuid4().hex[:8]}"
    first = await stage.gateway.submit(data="Say one", type="text_only", subject=mine)
    async with opened(stage, f"/requests?subject={mine}", expected=("400", "ERR_FAILED")) as seen:
        page = seen.page
        rows = page.locator("tbody tr")
        await expect(rows).to_have_count(1)
        await expect(page.get_by_label("Subject")).to_have_value(mine)
        await stage.gateway.end_of(first)
        await look_again(page)
        await expect(rows.first.locator(".c-status .badge")).to_have_text("Succeeded")
        await rows.first.hover()
        second = await stage.gateway.submit(data="Say two", type="text_only", subject=mine)
        await look_again(page)
        fresh = page.get_by_role("button", name="Show 1 new")
        await expect(fresh).to_be_visible()
        await expect(rows).to_have_count(1)
        await fresh.click()
        await expect(rows).to_have_count(2)
        await expect(rows.first).to_contain_text(second[:18])
        await page.mouse.move(5, 5)
        fetched, overtaken = asyncio.Event(), asyncio.Event()

        async def late(route: Route) -> None:
            before_the_third = await route.fetch()
            fetched.set()
            await overtaken.wait()
            await route.fulfill(response=before_the_third)

        await page.route("**/admin/requests?*", late, times=1)
        await look_again(page)
        await fetched.wait()
        third = await stage.gateway.submit(data="Say three", type="text_only", subject=mine)
        await look_again(page)
        await expect(rows.first).to_contain_text(third[:18])
        await look_no_more(page)
        async with page.expect_event("requestfinished", lambda one: "/admin/requests?" in one.url):
            overtaken.set()
        await drawn(page)
        await expect(rows).to_have_count(3)
        await expect(rows.first).to_contain_text(third[:18])
        await look_from_now_on(page)
        await expect(rows.last).to_contain_text(first[:18])
        await page.get_by_label("Id begins with").fill("not an id")
        await expect(page.get_by_text("Allowed: hexadecimal digits").first).to_be_visible()
        await page.get_by_label("Id begins with").fill(second)
        await expect(rows).to_have_count(1)
        await page.get_by_label("Id begins with").fill("ffff")
        await look_again(page)  # before what is typed has been searched for
        await page.get_by_role("button", name="Clear all filters").click()
        await expect(rows.first).to_be_visible()
        await expect(page.get_by_label("Subject")).to_have_value("")
        await page.route("**/admin/requests?*", lambda route: route.abort())
        await page.get_by_label("Tenant").fill("default")
        await expect(page.get_by_text("No connection")).to_be_visible()
        await look_no_more(page)  # a refresh would find the connection, and take the button away
        await page.unroute("**/admin/requests?*")
        await page.get_by_role("button", name="Try again").click()
        await expect(rows.first).to_be_visible()


async def test_try_it_streams_text_takes_files_and_shows_pictures(
    stage: Stage, tmp_path: Path
) -> None:
    async with opened(stage, "/try") as seen:
        page = seen.page
        state = page.locator(".try-state")
        async with held(stage):
            await page.get_by_label("Prompt").fill("Explain the tide")
            await page.keyboard.press("Control+Enter")
            await expect(state).to_contain_text("Waiting for kind:text_only: 1 of 1 in use, 1")
        await expect(state).to_contain_text("Done")
        answer = page.get_by_role("region", name="Answer", exact=True)
        await expect(answer).to_contain_text("You asked: “Explain the tide”.")

        await stage.gateway.upstream.set_behaviour(chunks=4, between_ms=500)
        await page.locator(".drop").evaluate(DROP, list(PNG))
        await expect(page.locator(".picked")).to_contain_text("dropped.png")
        await page.get_by_role("button", name="Send").click()
        await expect(answer).to_contain_text("You asked")
        await expect(state).to_contain_text("Started after")
        await stage.gateway.upstream.set_behaviour(chunks=4, between_ms=0)
        await expect(state).to_contain_text("Done")
        await expect(answer).to_contain_text("1 file: image/png")
        await page.get_by_role("button", name="Remove dropped.png").click()

        await page.get_by_label("API", exact=True).select_option("job")
        await page.get_by_label("Prompt").fill("Generate an image of a lighthouse")
        await page.get_by_role("button", name="Send").click()
        await expect(state).to_have_text("Done")
        assert await _drawn(page) > 1
        await page.mouse.move(5, 5)
        await page.get_by_role("link", name="View details").click()
        await expect(page.locator(".page-head .badge")).to_have_text("Succeeded")
        assert await _drawn(page) > 1


PAGES = ("Playground", "Requests")


async def test_messages_in_awss_framing_are_read_in_whatever_pieces_they_come(
    stage: Stage,
) -> None:
    delta = {"delta": {"text": "“Ebbe” und Flut"}}
    kind = {":content-type": "application/json", ":message-type": "event"}
    assert BEDROCK.error_frame is not None
    stream = [
        BEDROCK.keep_alive,
        frame({**kind, ":event-type": "contentBlockDelta"}, orjson.dumps(delta)),
        BEDROCK.error_frame({"__type": "ThrottlingException", "message": "too many"}),
    ]
    async with opened(stage, "/try") as seen:
        for size in (1, 7, 100_000):
            read = await seen.page.evaluate(FRAMED, [list(b"".join(stream)), size])
            assert read == [
                ["waiting", None, {}],
                ["contentBlockDelta", None, delta],
                ["throttlingException", "too many", {"message": "too many"}],
            ], size


async def test_the_playground_talks_in_every_dialect_and_shows_its_code(
    stage: Stage, tmp_path: Path
) -> None:
    (tmp_path / "dropped.png").write_bytes(PNG)
    async with more_dialects(stage), opened(stage, "/try", width=1440) as seen:
        page = seen.page
        answer = page.get_by_role("region", name="Answer", exact=True)
        state = page.locator(".try-state").first
        await expect(page.get_by_text("The answer appears here")).to_be_visible()
        for api, curl, python, _ in (written := await page.evaluate(OPTIONS)):
            compile(python, api, "exec")
            for text in (curl, python):
                assert "acme" in text, (api, text)
                assert api in ("prompt", "job") or ("brief" in text and "100" in text), text
        blank = await page.context.new_page()
        for *_, typescript in written:
            await blank.evaluate(SYNTAX, typescript)
        await blank.close()
        await page.get_by_text("Code", exact=True).click()
        await expect(page.get_by_role("region", name="Code")).to_contain_text("/stream")
        for api, model, with_file in (
            ("prompt", "", True),
            ("job", "", False),
            ("generate", "gemini-2.5-flash", True),
            ("messages", "claude-5", True),
            ("converse", "nova-5", True),
            ("responses", "gpt-5", True),
            ("chat", "gpt-5", True),
        ):
            await page.get_by_label("API", exact=True).select_option(api)
            await page.get_by_label("Model", exact=True).fill(model)
            if await page.get_by_role("button", name="New conversation").is_visible():
                await page.get_by_role("button", name="New conversation").click()
            if with_file and not await page.get_by_text("dropped.png").count():
                await page.locator(".drop").evaluate(DROP, list(PNG))
            if not with_file and await page.get_by_role("button", name="Remove").count():
                await page.get_by_role("button", name="Remove dropped.png").click()
            prompts = ["Explain the tide's “5 $ 'gate'”"]
            prompts += [] if api in ("prompt", "job") else ["And at \\ night?"]
            for prompt in prompts:
                await page.get_by_label("Prompt").fill(prompt)
                await page.keyboard.press("Control+Enter")
                await expect(answer).to_contain_text(f"You asked: “{prompt}”")
                await expect(state).to_contain_text("Done")
                await expect(page.get_by_role("button", name="Send")).to_be_enabled()
            if len(prompts) > 1:
                await expect(page.locator(".try-turns li")).to_have_count(2)
            await code_runs(stage, page, f"You asked: “{prompts[-1]}”", tmp_path)
            await expect(page.locator(".try-figures dd").nth(5)).to_have_text(
                {"claude-5": "claude", "nova-5": "nova", "gpt-5": "gpt"}.get(model, "gemini")
            )
        # Two models side by side, each with its own turns.
        await page.get_by_role("button", name="New conversation").click()
        await page.get_by_label("Prompt").fill("What is a tidal gate for?")
        await page.keyboard.press("Control+Enter")
        await expect(answer).to_contain_text("You asked: “What is a tidal gate for?”")
        await expect(page.get_by_role("button", name="Send")).to_be_enabled()
        await page.get_by_label("Compare with").fill("gpt-6")
        await page.get_by_label("Prompt").fill("Which of you is faster?")
        await page.keyboard.press("Control+Enter")
        for side, turns in ((0, 2), (1, 0)):
            panel = page.locator(".try-answer").nth(side)
            await expect(panel.locator(".try-state")).to_contain_text("Done")
            await expect(panel.locator("pre")).to_contain_text("You asked: “Which of you")
            await expect(panel.locator(".try-turns li")).to_have_count(turns)
            figures = panel.locator(".try-figures dd")
            await expect(figures.nth(4)).to_contain_text("$0.0")
            for at, shown in ((0, "s"), (1, "s"), (2, "s"), (3, ", ")):
                await expect(figures.nth(at)).to_contain_text(shown)
        await page.get_by_role("button", name="Python", exact=True).click()
        await page.set_viewport_size({"width": 1440, "height": 1180})
        await page.evaluate("scrollTo(0, 0)")
        await page.mouse.move(5, 5)
        await picture(page, "try", tmp_path)
        windows: tuple[tuple[int, Colours], ...] = ((2560, "dark"), (1280, "dark"), (400, "light"))
        for width, colours in windows:
            await page.set_viewport_size({"width": width, "height": 900})
            await page.emulate_media(color_scheme=colours)
            assert await seen.is_within(), width
            await seen.is_accessible()
            await shoot(page, tmp_path / f"try-{width}.png", full_page=True)
        await page.get_by_label("Compare with").fill("")
        await page.get_by_role("button", name="New conversation").click()
        await what_is_written_meanwhile_is_kept(stage, page)
        await an_upstream_is_named(page)
        await what_a_call_has_cost_comes_late(page)
        # What is wrong is said where it is put right.
        await page.get_by_label("Model", exact=True).fill("")
        await page.get_by_label("Prompt").fill("Hello?")
        await page.get_by_role("button", name="Send").click()
        await expect(page.get_by_text("Enter a model")).to_be_visible()
        seen.expected = ("400",)
        await page.get_by_label("Model", exact=True).fill("gpt-5")
        await page.get_by_text("Options", exact=True).click()
        await page.get_by_label("Priority").fill("high")
        await page.get_by_role("button", name="Send").click()
        await expect(page.get_by_text("Must be a whole number")).to_be_visible()
        await page.get_by_label("Priority").fill("1000")
        await page.get_by_role("button", name="Send").click()
        await expect(state).to_have_attribute("data-look", "bad")
        await expect(page.get_by_label("Priority")).to_have_attribute("aria-invalid", "true")
        await expect(page.get_by_label("Prompt")).to_have_value("Hello?")  # to be sent again


async def test_a_key_that_opens_the_page_alone_needs_another_one_to_try_with(
    stage: Stage,
) -> None:
    tenants = stage.gateway.services.store.tenants
    _, operator = await tenants.create_key("default", scopes=[Scope.ADMIN])
    _, caller = await tenants.create_key("default", scopes=[Scope.INFER])
    async with opened(stage, "/try", signed_in=False, expected=("401", "403")) as seen:
        page = seen.page
        await page.get_by_label("Key").fill(operator.text)
        await page.get_by_role("button", name="Sign in").click()
        await page.get_by_label("Prompt").fill("Explain the tide")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator(".try-state")).to_contain_text("lacks the scope infer")
        await the_operators_key_calls_no_model(page, stage.gateway.operator_key, caller.text)
        await expect(page.locator(".try-state")).to_contain_text("Done")
        await page.get_by_role("link", name="View details").click()
        await expect(page.locator("h1")).to_contain_text("Request")
        await expect(page.get_by_label("Prompt")).to_have_text("Explain the tide")


async def test_every_page_is_accessible_in_both_colours_and_fits_a_narrow_window(
    stage: Stage,
) -> None:
    job = await stage.gateway.submit(data="Say it", type="text_only")
    await stage.gateway.end_of(job)
    async with opened(stage, "/requests") as seen:
        page = seen.page
        for path, there in (
            ("/requests", page.locator("tbody tr").first),
            (f"/requests/{job}", page.locator("[data-what=ended]")),
            ("/try", page.get_by_label("Prompt")),
        ):
            await page.goto(f"{stage.gateway.url}/dashboard/#{path}")
            await expect(there).to_be_visible()
            for width in (1280, 400):
                await page.set_viewport_size({"width": width, "height": 800})
                assert await seen.is_within(), (path, width)
            for colours in BOTH:
                await page.emulate_media(color_scheme=colours)
                await seen.is_accessible()


async def test_all_of_it_can_be_done_by_keyboard(stage: Stage) -> None:
    job = await stage.gateway.submit(data="Say it", type="text_only", subject="keyboard")
    await stage.gateway.end_of(job)
    async with opened(stage, "/requests?subject=keyboard") as seen:
        page = seen.page
        await expect(page.locator("tbody tr")).to_have_count(1)
        await page.get_by_label("Conversation").focus()
        await page.keyboard.press("Tab")
        await expect(page.locator(".running-card summary")).to_be_focused()
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("link", name=job[:18])).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(page.locator("h1")).to_contain_text(job)
        await page.get_by_role("button", name="Retry").focus()
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("dialog").get_by_label("Reason")).to_be_focused()
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("button", name="Retry")).to_be_focused()


DROP = """(zone, bytes) => {
    const given = new DataTransfer();
    given.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
    for (const name of ["dragover", "drop"]) {
        zone.dispatchEvent(new DragEvent(name, { dataTransfer: given, bubbles: true }));
    }
}"""


async def _drawn(page: Page) -> int:
    """How wide the first picture is that the page shows, once it is decoded."""
    picture = page.locator("main img").first
    await expect(picture).to_be_visible()

    async def width() -> int:
        return int(await picture.evaluate("one => one.naturalWidth"))

    return int(await wait_until(width, 20, "a picture"))


def _seconds(until: str, since: str) -> float:

    return (datetime.fromisoformat(until) - datetime.fromisoformat(since)).total_seconds()


async def test_the_systems_own_colours_show_which_page_is_open(stage: Stage) -> None:
    async with opened(stage, "/try") as seen:
        await seen.page.emulate_media(forced_colors="active")
        edge = "link => getComputedStyle(link).borderBottomColor"
        here, elsewhere = (seen.page.get_by_role("link", name=name, exact=True) for name in PAGES)
        ground = await seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert await elsewhere.evaluate(edge) == ground != await here.evaluate(edge)


async def test_a_value_between_two_gaps_is_drawn_as_a_dot_and_marks_are_even(stage: Stage) -> None:
    async with opened(stage, "/nowhere", expected=("Canvas2D",)) as seen:
        assert not await seen.page.evaluate(DRAWS, [None, None, None, None])
        assert await seen.page.evaluate(DRAWS, [None, 5, None, None])
        assert await seen.page.evaluate(MARKS, 400_000) == ["2 min", "4 min", "6 min"]
        assert await seen.page.evaluate(MARKS, 100_000) == ["30 s", "1 min", "1.5 min"]


async def test_the_options_of_a_try_are_in_line(stage: Stage) -> None:
    async with opened(stage, "/try") as seen:
        await seen.page.get_by_text("Options", exact=True).click()
        place = "all => all.map((one) => one.getBoundingClientRect()).map((r) => [r.y, r.height])"
        fields = seen.page.locator(".filters .field > :is(input, select)")
        places = [one for one in await fields.evaluate_all(place) if one[1]]
        assert (len(places), places[0]) == (5, places[1])


async def test_what_the_filters_find_is_written_into_a_file(stage: Stage, tmp_path: Path) -> None:
    for number in range(3):
        await stage.gateway.end_of(await stage.gateway.submit(data=f"Export {number}"))
    async with opened(stage, "/requests?source=job&status=succeeded") as seen:
        page = seen.page
        await expect(page.locator(".requests tbody tr").first).to_be_visible()
        async with page.expect_download() as csv:
            await page.get_by_role("button", name="Export CSV").click()
        file = await csv.value
        assert re.fullmatch(r"requests-\d{4}-\d\d-\d\dT\d{6}\.csv", file.suggested_filename)
        await file.save_as(tmp_path / "found.csv")
        rows = list(reader((tmp_path / "found.csv").open(newline="")))
        assert rows[0][:4] == ["request_id", "submitted_at", "finished_at", "status"]
        assert {row[3] for row in rows[1:]} == {"succeeded"}
        assert {row[rows[0].index("upstream")] for row in rows[1:]} == {"gemini"}
        assert {row[rows[0].index("key")] for row in rows[1:]} == {stage.key[3:13]}
        await expect(page.locator(".toast")).to_contain_text(f"{len(rows) - 1} requests exported")
        async with page.expect_download() as lines:
            await page.get_by_role("button", name="Export JSONL").click()
        await (await lines.value).save_as(tmp_path / "found.jsonl")
        found = [
            orjson.loads(line) for line in (tmp_path / "found.jsonl").read_bytes().splitlines()
        ]
        assert [one["request_id"] for one in found] == [row[0] for row in rows[1:]]
        assert not any("prompt" in one for one in found)
        await ten_thousand_rows_are_all(page)
        written = await page.evaluate(
            "async () => (await import(new URL('static/export.js', document.baseURI)))"
            ".csv(['tenant', 'type', 'model', 'attempts'],"
            " [{ tenant: '=1+1', model: 'a \"b\",\\n', attempts: -1 },"
            " { tenant: 'a;=1+1', model: 'gpt-5;\\n+1', type: '\uff1d1' }])"
        )
        first, second = '\'=1+1,,"a ""b"",\n",-1', "a;'=1+1,'\uff1d1,\"gpt-5;\n'+1\","
        assert written == f"tenant,type,model,attempts\r\n{first}\r\n{second}\r\n"


async def test_the_list_stands_still_when_it_is_told_to(stage: Stage) -> None:
    async with opened(stage, "/requests") as seen:
        page = seen.page
        await page.get_by_role("button", name="Live").click()
        paused = page.get_by_role("button", name="Paused")
        await expect(paused).to_have_attribute("aria-pressed", "false")
        request_id = await stage.gateway.submit(data="While it stands still")
        await stage.gateway.end_of(request_id)
        await look_again(page)
        await drawn(page)
        assert await page.get_by_role("link", name=request_id[:18]).count() == 0
        await seen.is_accessible()
        await paused.click()
        await expect(page.get_by_role("link", name=request_id[:18])).to_be_visible()


async def test_filters_are_kept_by_name_and_forgotten(stage: Stage, tmp_path: Path) -> None:
    async with opened(stage, "/requests?status=failed") as seen:
        page = seen.page
        await page.get_by_role("button", name="Save filters").click()
        dialog = page.get_by_role("dialog", name="Save filters")
        await dialog.get_by_label("Name").fill("What failed")
        await dialog.get_by_role("button", name="Save").click()
        await page.get_by_label("Status").select_option("")
        await page.reload()
        await page.get_by_role("link", name="What failed").click()
        await expect(page.get_by_label("Status")).to_have_value("failed")
        await seen.is_accessible()
        await page.set_viewport_size({"width": 400, "height": 800})
        assert await seen.is_within()
        await picture(page, "saved-filters", tmp_path)
        await page.get_by_role("button", name="Delete What failed").click()
        await expect(page.get_by_role("link", name="What failed")).to_have_count(0)
        await twenty_filters_are_kept(page)


async def test_a_request_is_found_by_its_words_and_read_beside_the_list(
    stage: Stage, tmp_path: Path
) -> None:
    jobs = [await stage.gateway.submit(data=f"{SCRIPT} Kattegat {n}") for n in range(2)]
    other = await stage.gateway.submit(data="Skagerrak")  # two rows are what was searched
    for job in (*jobs, other):
        await stage.gateway.end_of(job)
    async with opened(stage, "/requests") as seen:
        page = seen.page
        rows = page.locator(".list-card tbody a.mono")
        await page.get_by_label("Search", exact=True).fill("katte")
        await expect(rows).to_have_count(2)
        shown = [str(await row.get_attribute("href")).split("/")[-1] for row in await rows.all()]
        assert set(shown) == set(jobs)
        beside = page.get_by_role("complementary", name="Request")
        heading = beside.get_by_role("heading", level=2).first
        await rows.first.click()
        await expect(heading).to_contain_text(shown[0])
        await expect(beside).to_contain_text(f"{SCRIPT} Kattegat")
        assert f"open={shown[0]}" in page.url
        assert "text=katte" in page.url
        await page.keyboard.press("j")
        await expect(heading).to_contain_text(shown[1])
        await expect(rows.nth(1)).to_have_attribute("aria-current", "true")
        await page.reload()
        await expect(heading).to_contain_text(shown[1])
        await expect(rows).to_have_count(2)
        await expect(rows.nth(1)).to_have_attribute("aria-current", "true")
        await seen.is_accessible()
        assert await seen.is_within()
        await picture(page, "request-beside", tmp_path)
        await page.keyboard.press("k")
        await expect(heading).to_contain_text(shown[0])
        await page.keyboard.press("Escape")
        await expect(beside).to_be_hidden()
        await expect(rows.first).to_be_focused()
        assert "open=" not in page.url
        await page.keyboard.press("Enter")
        await expect(page.locator("h1")).to_contain_text(shown[0])
        await page.go_back()
        await page.set_viewport_size({"width": 700, "height": 800})
        await rows.nth(1).click()
        await expect(page.locator("h1")).to_contain_text(shown[1])


async def test_pages_rows_and_search_are_reached_by_keys(stage: Stage) -> None:
    for number in range(2):
        await stage.gateway.end_of(await stage.gateway.submit(data=f"Keys {number}"))
    async with opened(stage) as seen:
        page = seen.page
        await expect(page.locator("#live")).to_have_text("Live")
        await page.keyboard.press("g")
        await page.keyboard.press("r")
        rows = page.locator(".requests tbody a.mono")
        await expect(rows.nth(1)).to_be_visible()
        await page.get_by_role("button", name="Live").click()
        for key, row in (("j", 0), ("j", 1), ("k", 0)):
            await page.keyboard.press(key)
            await expect(rows.nth(row)).to_be_focused()
        await page.keyboard.press("/")
        field = page.get_by_label("Search", exact=True)
        await expect(field).to_be_focused()
        await page.keyboard.type("g?j")  # typed, and no keys of the page
        await expect(field).to_have_value("g?j")
        await field.blur()
        await page.keyboard.press("?")
        dialog = page.get_by_role("dialog", name="Keyboard shortcuts")
        await expect(dialog).to_contain_text("g r")
        await seen.is_accessible()
        await page.keyboard.press("Escape")
        await expect(dialog).to_have_count(0)


async def test_a_request_is_copied_as_the_command_that_sends_it(stage: Stage) -> None:
    prompt = 'It\'s "quoted", $HOME and `ls`\nin two lines'
    request_id = await stage.gateway.submit(data=prompt, type="text_only")
    await stage.gateway.end_of(request_id)
    async with opened(stage, f"/requests/{request_id}") as seen:
        page = seen.page
        await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        await page.get_by_role("button", name="Copy as curl").click()
        await expect(page.locator(".toast")).to_contain_text("Set TIDEGATE_API_KEY")
        copied = await page.evaluate("navigator.clipboard.readText()")
    # A shell takes it apart as it was meant: the URL, the headers and the body.
    words = shlex.split(copied.replace("\\\n", " "))
    assert words[:2] == ["curl", f"{stage.gateway.url}/submit"]
    assert "Authorization: Bearer $TIDEGATE_API_KEY" in words
    assert orjson.loads(words[-1]) == {"data": prompt, "type": "text_only"}


async def test_what_is_too_long_for_a_command_is_not_copied_as_one(stage: Stage) -> None:
    request_id = await stage.gateway.submit(data="x" * 131_072, type="text_only")
    await stage.gateway.end_of(request_id)
    async with opened(stage, f"/requests/{request_id}") as seen:
        page = seen.page
        await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        await page.get_by_role("button", name="Copy as curl").click()
        await expect(page.locator(".toast")).to_contain_text("too long for a curl command")
        assert "xxxx" not in await page.evaluate("navigator.clipboard.readText()")
        # Characters are counted as the gateway does, to which a wave is one.
        told = await page.evaluate(PROMPT_OF, {"prompt": "🌊🌊", "prompt_chars": 3, "files": []})
        assert "The first 2 of 3 characters." in told


async def test_a_tenant_and_its_key_are_made_capped_and_taken_back(
    stage: Stage, tmp_path: Path
) -> None:
    running = stage.gateway
    async with opened(stage, "/tenants") as seen:
        page = seen.page
        await page.get_by_role("button", name="New tenant").click()
        dialog = page.get_by_role("dialog", name="New tenant")
        await dialog.get_by_label("Name").fill("team/blue")
        await dialog.get_by_label("Daily budget (USD)").fill("5")
        await seen.is_accessible()
        await dialog.get_by_role("button", name="Create the tenant").click()
        row = page.locator("[data-tenant='team/blue']")
        await expect(row).to_contain_text("$5.00")
        await page.get_by_role("button", name="New key").click()
        dialog = page.get_by_role("dialog", name="New key")
        await dialog.get_by_label("Tenant").select_option("team/blue")
        await dialog.get_by_label("Name").fill("the page's test")
        await dialog.get_by_label("Expires").select_option("30")
        await dialog.get_by_role("button", name="Create the key").click()
        made = page.get_by_role("dialog", name="Key created")
        key = (await made.locator(".made-key").text_content() or "").strip()
        await seen.is_accessible()
        # A page over plain HTTP may not copy.
        await page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        await made.get_by_role("button", name="Copy").click()
        await expect(made.get_by_role("button", name="Selected: press Ctrl + C")).to_be_visible()
        assert await page.evaluate("String(getSelection())") == key
        await made.get_by_role("button", name="Done").click()
        await expect(page.locator(".made-key")).to_have_count(0)
        assert key not in await page.content()  # nowhere any more
        async with running.http.get(
            f"{running.url}/requests", headers={"x-api-key": key}
        ) as answer:
            assert answer.status == 200
        await picture(page, "tenants", tmp_path)
        await page.get_by_label("Search API keys").fill("the page's")
        keys = page.locator("[data-key]")
        await expect(keys).to_have_count(1)
        await expect(keys).to_contain_text("team/blue")
        await keys.get_by_role("button", name="Revoke").click()
        await page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
        await expect(keys).to_contain_text("Revoked")
        async with running.http.get(
            f"{running.url}/requests", headers={"x-api-key": key}
        ) as answer:
            assert answer.status == 401
        await row.get_by_role("button", name="Change").click()
        dialog = page.get_by_role("dialog", name="Change team/blue")
        await expect(dialog.get_by_label("Daily budget (USD)")).to_have_value("5")
        await dialog.get_by_label("Weight").fill("3")
        await dialog.get_by_label("Daily budget (USD)").fill("")
        await dialog.get_by_role("button", name="Change the tenant").click()
        await expect(row.locator("td").first).to_have_text("3")
        await expect(row).not_to_contain_text("$")
        await row.get_by_role("button", name="Disable").click()
        await page.get_by_role("dialog").get_by_role("button", name="Disable").click()
        await expect(row).to_contain_text("Disabled")
        await page.set_viewport_size({"width": 400, "height": 900})
        assert await seen.is_within()
        await seen.is_accessible()


async def test_a_change_of_a_limit_is_seen_with_its_author_and_undone(
    stage: Stage, tmp_path: Path
) -> None:
    running = stage.gateway
    limit = "kind:multi_modal"
    before = running.services.limiter.policy.bound(limit)
    url = f"{running.url}/admin/limits"
    body = {"set": {limit: 9, "weights.blue": 2}, "by": "ann", "reason": "a quiet night"}
    async with running.http.patch(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
    async with opened(stage, "/limits/history") as seen:
        page = seen.page
        newest = page.locator("[data-revision]").first
        await expect(newest).to_contain_text("ann: a quiet night")
        await expect(newest.locator("li").first).to_have_text(f"{limit} {before} → 9")
        await expect(newest.locator("li").last).to_have_text("weights.blue none → 2")
        await seen.is_accessible()
        await picture(page, "changes", tmp_path)
        await newest.get_by_role("button", name="Undo").click()
        await page.get_by_role("dialog").get_by_role("button", name="Undo").click()
        await expect(page.locator(".toast")).to_contain_text("is undone")
        await expect(newest).to_contain_text("dashboard: undo of revision")
        assert running.services.limiter.policy.bound(limit) == before
        assert "blue" not in running.services.limiter.policy.weights
        # What was changed again since is not overwritten.
        seen.expected = ("409",)
        await page.locator("[data-revision]").nth(1).get_by_role("button", name="Undo").click()
        dialog = page.get_by_role("dialog")
        await dialog.get_by_role("button", name="Undo").click()
        await expect(dialog.get_by_role("alert")).to_be_visible()
        await dialog.get_by_role("button", name="Cancel").click()
        await page.set_viewport_size({"width": 400, "height": 900})
        assert await seen.is_within()
