"""Calls as a tenant on the playground: by who has signed in as an operator, and by nobody else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import Page, async_playwright, expect

from tests.browser.stage import ARGUMENTS, CHROMIUM, PATIENCE_MS, Seen
from tests.gateway import Gateway, Opener, open_gateway
from tidegate.call import Scope
from tidegate.http.browsers import make_code

__all__ = ["open_gateway"]

NARROWEST = """() => Math.min(...[...document.querySelectorAll(".try-target .field")]
    .map((one) => one.getBoundingClientRect().width))"""


@asynccontextmanager
async def playground(gateway: Gateway, key: str = "") -> AsyncIterator[Page]:
    """The page, signed in by the one-time address, or by a key."""
    expect.set_options(timeout=PATIENCE_MS)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            page = await browser.new_page(viewport={"width": 1360, "height": 900})
            page.set_default_timeout(PATIENCE_MS)
            address = f"{gateway.url}/dashboard/"
            if key:
                await page.goto(address)
                await page.get_by_label("Key").fill(key)
                await page.keyboard.press("Enter")
            else:
                await page.goto(f"{address}?code={make_code(gateway.operator_key)}")
            await page.get_by_role("link", name="Playground").click()
            yield page
        finally:
            await browser.close()


@pytest.mark.parametrize("auth", ["on", "off"])
async def test_an_operator_calls_as_a_tenant_of_the_list(open_gateway: Opener, auth: str) -> None:
    gateway = await open_gateway(auth=auth)
    tenants = gateway.services.store.tenants
    await tenants.set("acme", {}, by="test")
    await tenants.set("gone", {}, disabled=True, by="test")
    async with playground(gateway) as page:
        tenant, state = page.get_by_label("Tenant", exact=True), page.locator(".try-state").first
        answer = page.get_by_role("region", name="Answer", exact=True)
        keyed = ["That of the API key"] if auth == "on" else []
        await expect(tenant.locator("option")).to_have_text([*keyed, "acme", "default"])
        await expect(tenant).to_have_value("default")
        await page.get_by_text("Options", exact=True).click()
        await expect(page.get_by_label("Priority")).to_be_visible()
        await expect(page.get_by_label("API key")).to_be_hidden()
        await tenant.select_option("acme")
        for api, model in (("prompt", ""), ("job", ""), ("generate", "gemini-2.5-flash")):
            await page.get_by_label("API", exact=True).select_option(api)
            await page.get_by_label("Model", exact=True).fill(model)
            await page.get_by_label("Prompt").fill(f"Explain {api}")
            await page.get_by_role("button", name="Send").click()
            await expect(answer).to_contain_text(f"You asked: “Explain {api}”")
            await expect(state).to_contain_text("Done")
            await expect(page.get_by_role("button", name="Send")).to_be_enabled()
        await page.get_by_text("Code", exact=True).click()
        code = page.get_by_role("region", name="Code")
        await expect(code).to_contain_text("/v1beta/models")  # as the tenant itself would call
        assert "admin" not in await code.inner_text()
        for width in (400, 1000, 1360):  # no field is too narrow for what it says
            await page.set_viewport_size({"width": width, "height": 900})
            narrowest = await page.evaluate(NARROWEST)
            assert narrowest >= 12 * 16, width
        assert await Seen(page).is_within()
        await Seen(page).is_accessible()
        await page.get_by_role("link", name="View details").click()
        facts = page.locator(".facts")
        await expect(facts).to_contain_text("Called by operatorthe dashboard")
        await expect(facts).to_contain_text("Tenantacme")
        await expect(facts).not_to_contain_text("API key")
    query = "SELECT target FROM operator_actions WHERE what = 'tenant.call'"
    actions = await gateway.database.fetch(query)
    assert [row["target"] for row in actions] == ["acme"] * 3


async def test_a_tenants_own_limit_is_what_the_call_waits_for_and_its_refusal_is_shown(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(auth="on")
    await gateway.services.store.tenants.set("acme", {"models": ["other-*"]}, by="test")
    async with playground(gateway) as page:
        tenant, state = page.get_by_label("Tenant", exact=True), page.locator(".try-state").first
        await tenant.select_option("acme")
        await page.get_by_label("Prompt").fill("Explain the tide")
        await page.get_by_role("button", name="Send").click()
        await expect(state).to_contain_text("gemini-2.5-flash")
        await expect(state).to_have_attribute("data-look", "bad")
        await gateway.services.store.tenants.set("acme", {}, disabled=True, by="test")
        await page.get_by_role("button", name="Send").click()
        await expect(state).to_contain_text("the tenant acme is disabled")


async def test_a_viewer_calls_as_nobody(open_gateway: Opener) -> None:
    gateway = await open_gateway(auth="on", worker=False)
    tenants = gateway.services.store.tenants
    _, viewer = await tenants.create_key("default", scopes=[Scope.VIEWER])
    async with playground(gateway, viewer.text) as page:
        tenant = page.get_by_label("Tenant", exact=True)
        await expect(tenant).to_be_disabled()
        why = "Requires the role operator. Your role is viewer."
        await expect(tenant).to_have_attribute("title", why)
        await page.get_by_label("Prompt").fill("Explain the tide")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator(".try-state")).to_contain_text("lacks the scope infer")
