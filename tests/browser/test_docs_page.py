"""The page /docs in a real browser: it works from our own files alone."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import UUID

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Response, async_playwright, expect

from tests.browser.stage import CHROMIUM, PATIENCE_MS, shoot

if TYPE_CHECKING:
    from tests.product import Product

pytest_plugins = ["tests.product"]
pytestmark = pytest.mark.asyncio(loop_scope="module")

# A name that is not localhost, for which Swagger UI would ask an outside service by default.
NAME = "gateway.example"
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--in-process-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    f"--host-resolver-rules=MAP {NAME} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@dataclass(slots=True)
class Seen:
    """What the page asked for and complained about."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def strangers(self) -> set[str]:
        parts = [urlsplit(url) for url in self.asked]
        return {part.netloc for part in parts if part.scheme != "data" and part.hostname != NAME}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        await browser.close()


@asynccontextmanager
async def opened(chromium: Browser, product: Product, path: str) -> AsyncIterator[Seen]:
    """The page in a fresh profile, loaded until nothing more comes."""
    page = await chromium.new_page(viewport={"width": 1280, "height": 1400})
    try:
        seen = Seen(page)
        page.on("console", lambda said: _keep(seen, said.type, said.text))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("request", lambda request: seen.asked.append(request.url))
        page.on("requestfailed", lambda request: seen.complaints.append(request.url))
        port = urlsplit(product.base_url).port
        await page.goto(f"http://{NAME}:{port}{path}", wait_until="networkidle")
        yield seen
    finally:
        await page.close()


def _keep(seen: Seen, kind: str, text: str) -> None:
    if kind in ("error", "warning"):
        seen.complaints.append(text)


async def test_the_page_shows_every_operation_and_hands_in_a_request_that_is_tried_out(
    chromium: Browser, product: Product, tmp_path: Path
) -> None:
    """On one load of the page, as that takes two seconds of a core."""
    async with opened(chromium, product, "/docs") as seen:
        page = seen.page
        await expect(page.locator(".opblock").first).to_be_visible(timeout=PATIENCE_MS)
        shown = await page.locator(".opblock-summary-path").all_inner_texts()
        paths = {path.replace("\u200b", "") for path in shown}
        expected = {"/submit", "/status/{request_id}", "/stream", "/files/{file_id}"}
        assert expected | {"/health/live", "/health/ready", "/health/dependencies"} <= paths
        icon = page.locator("link[rel='shortcut icon']")
        assert await icon.get_attribute("href") == "/static/favicon.svg"
        picture = await page.screenshot(path=tmp_path / "docs.png")
        assert len(picture) > 20_000
        assert seen.complaints == []
        assert seen.strangers() == set()
        assert any(url.endswith("/swagger-ui-bundle.js") for url in seen.asked)

        answer = await tried_out(page)
        assert answer.status == 202
        accepted = json.loads(await answer.text())
        assert UUID(accepted["request_id"]).version == 7
        live = page.locator(".live-responses-table")
        await expect(live.locator(".response-col_status").last).to_contain_text("202")
        await expect(live).to_contain_text(accepted["request_id"])
        await live.scroll_into_view_if_needed()
        await shoot(page, tmp_path / "tried.png")
        assert seen.complaints == []
        assert seen.strangers() == set()


async def tried_out(page: Page) -> Response:
    """The answer to a request that is handed in on the page."""
    block = page.locator(".opblock", has=page.locator("[data-path='/submit']"))
    await block.locator(".opblock-summary-control").click()
    execute = block.get_by_role("button", name="Execute")
    if not await execute.is_visible():
        await block.get_by_role("button", name="Try it out").click()
    await block.locator("textarea.body-param__text").fill('{"data": "What is a tide?"}')
    async with page.expect_response(lambda answer: answer.url.endswith("/submit")) as coming:
        await execute.click()
    return await coming.value


async def test_the_icon_is_ours_and_drawn(chromium: Browser, product: Product) -> None:
    async with opened(chromium, product, "/static/favicon.svg") as seen:
        assert await seen.page.locator("svg path").count() >= 3
        assert seen.strangers() == set()
