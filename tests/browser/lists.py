"""What lists show in a row, and do with more rows, and more saved filters, than they take."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

from playwright.async_api import Locator, Page, Route, expect

from tests.browser.stage import Seen, Stage
from tests.waiting import wait_until
from tidegate.prices.budgets import Budget

FILTERS = """() => localStorage.setItem("tidegate.filters", JSON.stringify(
    Object.fromEntries(Array.from({ length: 20 }, (_, at) => [`Number ${at}`, {}]))))"""


async def cancelled_beyond_a_page(stage: Stage, page: Page, job: str) -> None:
    """A list shows that a job has ended though pages of requests hold one row, of a newer one."""

    async def a_row_a_page(route: Route) -> None:
        await route.continue_(url=re.sub(r"limit=\d+", "limit=1", route.request.url))

    await page.route("**/admin/requests?*", a_row_a_page)
    await stage.gateway.http.delete(f"{stage.gateway.url}/requests/{job}")
    row = page.locator("tr", has=page.get_by_role("link", name=job[:18]))
    await expect(row.locator(".c-status")).to_have_text("Cancelled")
    await page.unroute("**/admin/requests?*", a_row_a_page)


async def twenty_filters_are_kept(page: Page) -> None:
    """One more is refused, instead of the oldest being dropped."""
    await page.evaluate(FILTERS)
    await page.get_by_role("button", name="Save filters").click()
    dialog = page.get_by_role("dialog", name="Save filters")
    await dialog.get_by_label("Name").fill("One more")
    await dialog.get_by_role("button", name="Save").click()
    await expect(dialog.get_by_role("alert")).to_contain_text("Delete one first")
    await page.keyboard.press("Escape")
    assert await page.evaluate("localStorage.getItem('tidegate.filters').includes('Number 19')")


async def ten_thousand_rows_are_all(page: Page) -> None:
    """A file of as many rows as it may have is not said to be cut where there are no more."""
    number = count(1)

    async def a_page(route: Route) -> None:
        cursor = "more" if next(number) < 50 else None
        await route.fulfill(json={"items": [{}] * 200, "next_cursor": cursor})

    await page.route("**/admin/requests?*limit=200*", a_page)
    async with page.expect_download():
        await page.get_by_role("button", name="Export CSV").click()
    await expect(page.locator(".toast").last).to_have_text(
        re.compile("^10,000 requests exported\\.")
    )
    await page.unroute("**/admin/requests?*limit=200*", a_page)


def row(number: int) -> dict[str, Any]:
    """Of a call that was received as the one of this number."""
    request_id = f"01a2298c-{number:04x}-7000-8000-000000000000"
    ended = {"status": "succeeded", "source": "relay", "submitted_at": "2026-11-29T12:00:00Z"}
    return ended | {"request_id": request_id, "tenant": "acme", "attempts": 1}


async def those_that_end_later_come_into_the_list(page: Page, mode: str) -> None:
    """Calls have a row once they have ended, which may be after those that were received later."""
    answers = [[4, 2], [4, 3, 2], [4, 3, 2, 1]] if mode == "" else [[4], [2, 4], [3, 1, 2, 4]]
    shown = [answers[0]]

    async def as_they_end(route: Route) -> None:
        await route.fulfill(json={"items": [row(one) for one in shown[-1]]})

    await page.route("**/admin/requests?*", as_they_end)
    if mode:
        await page.get_by_label("Search", exact=True).fill(mode)
    ids = page.locator(".list-card tbody a.mono")
    for answer in answers:
        shown.append(answer)
        await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        await expect(ids).to_have_text([row(one)["request_id"][:18] for one in answer])
    await page.unroute("**/admin/requests?*", as_they_end)


async def more_than_a_page_into_an_empty_list(page: Page) -> None:
    """What came at a time into a list without rows is found by going on from its first page."""

    async def pages(route: Route) -> None:
        if "cursor=" in route.request.url:
            return await route.fulfill(json={"items": [row(1)]})
        items = [row(one) for one in range(51, 1, -1)]
        return await route.fulfill(json={"items": items, "next_cursor": items[-1]["request_id"]})

    ids = page.locator(".list-card tbody a.mono")
    await expect(page.get_by_text("No requests match")).to_be_visible()
    await page.route("**/admin/requests?*", pages)
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(ids).to_have_count(50)
    await page.get_by_role("button", name="Older requests").click()
    await expect(ids).to_have_count(51)
    await page.unroute("**/admin/requests?*", pages)


async def a_row_says_whose_it_is_what_it_asks_and_costs(stage: Stage, page: Page) -> None:
    """The key, how the prompt begins, as text, and the cost; in a narrow window too."""
    said = "<b>tide</b> \u202eebb\u202c of Oostende"
    await stage.gateway.end_of(await stage.gateway.submit(data=said, type="text_only"))
    found = page.locator(".list-card tbody tr", has_text="Oostende")
    for width in (1360, 400):
        await page.set_viewport_size({"width": width, "height": 900})
        await expect(found).to_have_count(1)
        for text in (f"tg_{stage.key.removeprefix('tg_')[:10]}", said, "default", "gemini"):
            await expect(found.get_by_text(text).locator("visible=true").first).to_be_visible()
        await expect(found.get_by_text("$0.0").locator("visible=true")).to_have_count(1)
    cut = "(row) => [...row.cells].filter((one) => one.scrollWidth > one.clientWidth)"

    async def nothing_is_cut() -> bool:  # once the row is drawn for its width, and has its end
        return not await found.evaluate(f"(row) => ({cut})(row).length")

    await wait_until(nothing_is_cut, 20, "cells as wide as what they say")


@asynccontextmanager
async def a_named_budget(stage: Stage) -> AsyncIterator[None]:
    records = stage.gateway.services.budgets.records
    named = Budget("team-bar/named", "usd", 3_000_000, "month", tenant="team-bar")
    await records.set(named, by="test")
    yield
    await records.remove(named.name, by="test")


async def bars_of_what_is_spent(seen: Seen) -> None:
    """Of each budget of a tenant; in a narrow window there is room for what acts on it too."""
    row = seen.page.locator("[data-tenant='team-bar']")
    day, tokens, month, named = (row.locator(".spent-of").nth(place) for place in range(4))
    for budget, words, share in (
        (day, "$1.50 of $2.00", 75),
        (tokens, "912k tokens of 2M tokens", 46),
        (month, "$1.50 of $1.50", 100),
        (named, "$1.50 of $3.00", 50),
    ):
        bar = budget.get_by_role("meter")
        await expect(bar).to_have_attribute("aria-valuetext", words)
        await expect(bar).to_have_attribute("aria-valuenow", str(share))
        assert (await budget.get_attribute("data-full") is not None) == (share == 100)
    for part in (day, tokens, month, row.get_by_role("button", name="Change")):
        box = await part.bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= 400
    await seen.is_accessible()
    assert await seen.is_within()
    await seen.page.set_viewport_size({"width": 1360, "height": 900})
    await expect(row).to_contain_text("5 concurrent")


async def another_operator_sets_the_weight(stage: Stage, seen: Seen, dialog: Locator) -> None:
    """What was set while the dialog was open is not overwritten; opened again, it has that."""
    url = f"{stage.gateway.url}/admin/tenants/default"
    async with stage.gateway.http.put(url, json={"weight": 3}) as answer:
        assert answer.status == 200, await answer.text()
    await dialog.get_by_label("Weight").fill("7")
    seen.expected = ("409",)
    await dialog.get_by_role("button", name="Change the weight").click()
    await expect(dialog).to_contain_text("another change came first")
    await dialog.get_by_role("button", name="Cancel").click()
    assert stage.gateway.services.limiter.policy.weights == {"default": 3}
    await expect(seen.page.locator("[data-tenant='default'] td").nth(2)).to_have_text("3")
    await seen.page.get_by_role("button", name="Change the weight of default").click()


async def a_body_poses_as_no_request(stage: Stage, seen: Seen) -> None:
    """A link to what a tenant has sent shows it as no request, whose actions would be the tenant's
    choice: its webhook would be delivered again by a new key."""
    at = "2026-11-29T12:00:00Z"
    hook = {"id": "../keys?", "state": "given_up", "url": "https://example.com", "tries": 9}
    request = row(1) | {"type": "text_only", "files": [], "images": []}
    shown: dict[str, Any] = {"request": request, "actions": ["cancel"], "now": at}
    step = {"what": "submitted", "words": "submitted", "at": at, "goes_on": False}
    shown |= {"timeline": [step], "attempts": [], "bodies": [], "webhooks": [hook]}
    asked = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": "Pose"}]}
    url = f"{stage.gateway.url}/v1/chat/completions"
    async with stage.gateway.http.post(url, json=asked | shown) as answer:
        assert answer.status == 200, await answer.text()
        request_id = answer.headers["x-tidegate-request-id"]
    await stage.gateway.audit(request_id)
    body = f"{request_id}%2Frequest"
    for address in (f"#/requests/{body}", f"#/requests?open={body}"):
        await seen.page.evaluate("(one) => { location.hash = one; }", address)
        await expect(seen.page.get_by_text(f"{request_id}/request is not a")).to_be_visible()
        await expect(seen.page.get_by_role("button", name="Redeliver")).to_have_count(0)


async def calls_that_do_not_count_are_named(page: Page, request_id: str) -> None:
    """Of three calls of a job two were failures of the upstream, which count for no attempt."""

    async def called_thrice(route: Route) -> None:
        view = await (response := await route.fetch()).json()
        failed = {"outcome": "failed", "process": "worker-1", "model": "gemini-2.5-flash"}
        view["attempts"] = [failed | {"number": number} for number in (1, 2, 3)]
        view["request"]["attempts"] = 1
        await route.fulfill(response=response, json=view)

    address = f"**/admin/requests/{request_id}"
    await page.route(address, called_thrice)
    await expect(page.locator(".facts")).to_contain_text("Counted attempts1 of 3")
    await expect(page.locator(".part-attempts")).to_contain_text("1 of 3 count for MAX_ATTEMPTS.")
    await page.unroute(address, called_thrice)
