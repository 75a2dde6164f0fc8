"""Signing in by the address that the start prints, in a real browser."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from playwright.async_api import async_playwright, expect

from tests.browser.stage import ARGUMENTS, CHROMIUM, PATIENCE_MS, TEXT
from tests.waiting import wait_until
from tidegate.http.browsers import make_code

if TYPE_CHECKING:
    from tests.product import Product

pytest_plugins = ["tests.product"]


async def test_the_address_of_the_start_up_page_signs_in_once_and_is_signed_out(
    product: Product,
) -> None:
    key = product.operator_key
    address = re.compile(r"Dashboard +live +http://localhost:\d+/dashboard/\?code=\S+")
    # The page is printed once the supervisor has seen the readiness that the fixture also saw.
    await wait_until(lambda: address.search(product.said()), 20, "the address of the start-up page")
    assert key not in product.said()
    # One of the test's own: that of the start is spent once, and the test may be run again.
    url = f"{product.base_url}/dashboard/?code={make_code(key)}"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            page = await browser.new_page()
            page.set_default_timeout(PATIENCE_MS)
            expect.set_options(timeout=PATIENCE_MS)
            await page.goto(url)
            await expect(page.locator(TEXT)).to_be_visible()
            assert "code" not in page.url
            assert await page.evaluate("[document.cookie, sessionStorage.length]") == ["", 0]
            await page.get_by_role("link", name="Requests").click()
            await expect(page.get_by_role("heading", name="Requests")).to_be_visible()
            await page.get_by_role("button", name="Sign out").click()
            await expect(page.get_by_label("Key")).to_be_focused()
            assert await page.context.cookies() == []
            await page.goto(url)
            await expect(page.get_by_text("works once")).to_be_visible()
            await page.get_by_label("Key").fill(key)
            await page.keyboard.press("Enter")
            await expect(page.locator("#live")).to_have_text("Live")
        finally:
            await browser.close()
