"""Signing in by the address that the start prints, in a real browser."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING

from playwright.async_api import async_playwright, expect

from tests.browser.stage import ARGUMENTS, CHROMIUM, PATIENCE_MS, TEXT
from tests.gateway import open_gateway
from tests.issuer import CLIENT, issuer_server
from tests.waiting import wait_until
from tidegate.http.browsers import make_code

if TYPE_CHECKING:
    from tests.gateway import Opener
    from tests.product import Product

__all__ = ["open_gateway"]

pytest_plugins = ["tests.product"]


async def test_the_address_of_the_start_up_page_signs_in_once_and_is_signed_out(
    product: Product,
) -> None:
    key = product.operator_key
    address = re.compile(r"Dashboard +live +http://localhost:\d+/dashboard\n +the address in (\S+)")
    # The page is printed once the supervisor has seen the readiness that the fixture also saw.
    said = await wait_until(lambda: address.search(product.said()), 20, "the start-up page")
    assert key not in product.said()
    written = await asyncio.to_thread(Path(said[1]).read_text)
    assert "/dashboard/?code=" in written
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
            # A cookie that the gateway could not end is not said to be gone.
            await page.route("**/dashboard/sign-out", lambda route: route.abort())
            await page.get_by_role("button", name="Sign out").click()
            await expect(page.locator(".toast")).to_contain_text("You are still signed in.")
            await expect(page.get_by_role("heading", name="Requests")).to_be_visible()
            await page.unroute("**/dashboard/sign-out")
            await page.get_by_role("button", name="Sign out").click()
            await expect(page.get_by_label("Key")).to_be_focused()
            assert await page.context.cookies() == []
            await page.goto(url)
            await expect(page.get_by_text("works once")).to_be_visible()
            assert page.url.endswith("/dashboard/"), (
                "nor does it come back when the page is reloaded"
            )
            await page.get_by_label("Key").fill(key)
            await page.keyboard.press("Enter")
            await expect(page.locator("#live")).to_have_text("Live")
            await page.get_by_role("button", name="Sign out").click()
            await expect(page.get_by_label("Key")).to_be_focused()
            await expect(page.get_by_text("works once")).to_have_count(0)
        finally:
            await browser.close()


async def test_a_dialog_is_left_with_its_page_and_its_person(product: Product) -> None:
    refusal = {"status": 401, "code": "unauthenticated", "detail": "The key was revoked."}
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            page = await browser.new_page()
            page.set_default_timeout(PATIENCE_MS)
            expect.set_options(timeout=PATIENCE_MS)
            await page.goto(f"{product.base_url}/dashboard/")
            await page.get_by_label("Key").fill(product.operator_key)
            await page.keyboard.press("Enter")
            for name in ("Usage", "Keys and tenants"):
                await page.get_by_role("link", name=name).click()
            dialogs = page.locator("dialog[open]")
            await page.get_by_role("button", name="Disable default").click()
            await expect(dialogs).to_have_count(1)
            await page.go_back()
            await expect(page.get_by_role("heading", name="Usage")).to_be_visible()
            await expect(dialogs).to_have_count(0)
            await page.go_forward()
            # A key that is shown once is not lost with its page.
            await page.get_by_role("button", name="New dashboard key").click()
            await page.get_by_label("Name of the person").fill("ann")
            await page.get_by_role("button", name="Create the key").click()
            made = page.get_by_role("dialog", name="Key created")
            await expect(made).to_be_visible()
            await page.go_back()
            await expect(page.get_by_text("By tenant")).to_be_visible()
            await expect(made).to_be_visible()
            await made.get_by_role("button", name="Done").click()
            await page.go_forward()
            await page.get_by_role("button", name="Disable default").click()
            await page.route(
                "**/admin/tenants/*", lambda route: route.fulfill(json=refusal, status=401)
            )
            await dialogs.get_by_role("button", name="Disable").click()
            await expect(page.get_by_text("The key was revoked.")).to_have_count(1)
            await expect(dialogs).to_have_count(0)
            await expect(page.get_by_label("Key")).to_be_focused()
        finally:
            await browser.close()


async def test_a_person_signs_in_by_an_issuer_and_sees_what_their_role_may(
    open_gateway: Opener,
) -> None:
    """The issuer is another site (127.0.0.1 beside localhost), as it is in life."""
    claims = {"sub": "u-1", "email": "ann@example.com", "email_verified": True}
    async with issuer_server(user=claims, secret=None) as issuer, async_playwright() as playwright:
        gateway = await open_gateway(
            worker=False,
            oidc_issuer=issuer.url,
            oidc_client_id=CLIENT,
            oidc_roles={"email=*@example.com": "viewer"},
        )
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            page = await browser.new_page()
            page.set_default_timeout(PATIENCE_MS)
            expect.set_options(timeout=PATIENCE_MS)
            await page.goto(f"{gateway.url.replace('127.0.0.1', 'localhost')}/dashboard/#/tenants")
            await page.get_by_role("link", name="Sign in with single sign-on").click()
            await expect(page.get_by_role("heading", name="Keys and tenants")).to_be_visible()
            assert page.url.endswith("/dashboard/#/tenants")
            await expect(page.locator("#who")).to_have_text("viewer")
            new_key = page.get_by_role("button", name="New key")
            await expect(new_key).to_be_disabled()
            assert await page.evaluate("document.cookie") == ""
            await page.get_by_role("button", name="Sign out").click()
            issuer.user = {"sub": "u-2"}
            await page.get_by_role("link", name="Sign in with single sign-on").click()
            await expect(
                page.get_by_text("Your account has no role on this gateway")
            ).to_be_visible()
        finally:
            await browser.close()
