"""What a list of requests does with more rows, and more saved filters, than it takes."""

from __future__ import annotations

import re
from itertools import count

from playwright.async_api import Page, Route, expect

from tests.browser.stage import Stage

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
    dialog = page.get_by_role("dialog", name="Keep these filters")
    await dialog.get_by_label("Name").fill("One more")
    await dialog.get_by_role("button", name="Keep").click()
    await expect(dialog.get_by_role("alert")).to_contain_text("forget one")
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
        re.compile("^10,000 requests written\\.")
    )
    await page.unroute("**/admin/requests?*limit=200*", a_page)
