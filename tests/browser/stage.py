"""A gateway and a browser for the tests of the dashboard, and a page that remembers complaints."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from axe_playwright_python.base import AXE_SCRIPT, AxeResults
from playwright.async_api import Browser, Locator, Page, expect

from tests.gateway import Gateway
from tidegate.embedded.servers import PostgresServer, ValkeyServer

# The same engine without windows, which takes a third less of a core's time, where it is there.
CHROMIUM = shutil.which("chromium-headless-shell") or "/usr/bin/chromium"
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--in-process-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PATIENCE_MS = 20_000
# At its beginning, and without messages.
PAGE_ALONE = """() => {
    scrollTo(0, 0);
    for (const one of document.querySelectorAll(".toast button")) one.click();
}"""
REHEARSAL_MS = 60_000  # in a process that gives way to all others
TEXT = "[data-limit='kind:text_only']"
POLICY = """
[limits]
"kind:text_only" = 2
"rpm:total" = 1200
"tpm:total" = 400_000

[upstreams.gemini.prices]
"*" = { input = 0.30, output = 2.50, image = 0.04 }
"""
# Contrast takes four fifths of the time of axe, mostly for rows that are drawn alike: of the texts
# of one style on one ground it looks at three. What is disabled has another style, and what is
# positioned another ground.
_VIOLATIONS = """async () => {
    const grounds = new Map();
    const ground = (one) => {
        if (one === null) return "";
        if (!grounds.has(one)) {
            const drawn = getComputedStyle(one);
            const { backgroundColor, backgroundImage, opacity, filter, mixBlendMode } = drawn;
            const own = [backgroundColor, backgroundImage, opacity, filter, mixBlendMode].join();
            const placed = drawn.position === "static" ? "" : grounds.size;
            grounds.set(one, `${ground(one.parentElement)}/${own}${placed}`);
        }
        return grounds.get(one);
    };
    const alike = new Map();
    const fields = "input, select, textarea";
    const isText = (node) => node.nodeType === Node.TEXT_NODE && node.data.trim();
    for (const one of document.body.querySelectorAll("*")) {
        if (!one.matches(fields) && ![...one.childNodes].some(isText)) continue;
        if (!one.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
        const { color, fontSize, fontWeight, textShadow } = getComputedStyle(one);
        const disabled = one.closest(":disabled, [aria-disabled='true']") !== null;
        const style = [color, fontSize, fontWeight, textShadow, disabled, ground(one)].join(";");
        alike.set(style, [...(alike.get(style) ?? []), one]);
    }
    const include = [...alike.values()].flatMap((all) => all.slice(0, 3));
    const resultTypes = ["violations"];
    const rules = { "color-contrast": { enabled: false } };
    const { violations } = await axe.run({ resultTypes, rules });
    if (include.length === 0) return { violations };
    const contrast = await axe.run({ include }, { resultTypes, runOnly: ["color-contrast"] });
    return { violations: [...violations, ...contrast.violations] };
}"""
# Adds up how far what is visible moves without an action of the user, in the browsers' own measure.
SHIFTS = """() => {
    [window.shifted, window.moved] = [0, []];
    const spot = ({ y, height }) => `${Math.round(y)}+${Math.round(height)}`;
    const words = ({ node, previousRect, currentRect }) => `${node?.nodeName} .${node?.className}: `
        + `${(node?.textContent ?? "").slice(0, 40)} ${spot(previousRect)} to ${spot(currentRect)}`;
    new PerformanceObserver((list) => {
        for (const one of list.getEntries().filter((one) => !one.hadRecentInput)) {
            window.shifted += one.value;
            window.moved.push([one.value, Math.round(one.startTime), ...one.sources.map(words)]);
        }
    }).observe({ type: "layout-shift", buffered: true });
}"""
Colours = Literal["light", "dark"]


@dataclass(slots=True)
class Stage:
    """A gateway whose stores a test may pause, and a browser. `key` opens the dashboard, and `kept`
    is the page of the last view."""

    gateway: Gateway
    valkey: ValkeyServer
    postgres: PostgresServer
    browser: Browser
    key: str
    pictured: bool = False
    kept: Page | None = None

    async def submit(self, count: int) -> list[str]:
        return [await self.gateway.submit(data=f"Explain tide {n}") for n in range(count)]

    async def native(self, text: str, deadline_ms: int = 20_000) -> int:
        """The status of a native call's answer."""
        url = f"{self.gateway.url}/v1/chat/completions"
        body = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": text}]}
        within = {"x-tidegate-deadline-ms": str(deadline_ms)}
        async with self.gateway.http.post(url, json=body, headers=within) as response:
            await response.read()
            return response.status

    async def turn(self, conversation: str, system: str, turns: int) -> None:
        """A call of an agent: one more turn of what begins with `system`."""
        url = f"{self.gateway.url}/v1/chat/completions"
        said = [{"role": "assistant", "content": "Go on."}, {"role": "user", "content": "Then?"}]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "Begin"}]
        body = {"model": "gemini-2.5-flash", "messages": [*messages, *said * turns]}
        headers = {"x-tidegate-conversation": conversation}
        async with self.gateway.http.post(url, json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
            await response.read()

    async def slow(self, ms: int) -> None:
        """How long the provider thinks before it answers, from now on."""
        await self.gateway.upstream.set_behaviour(first_byte_ms=ms)


@dataclass(slots=True)
class Seen:
    """A page, and what it complained about."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()

    def keep(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not any(one in text for one in self.expected):
            self.complaints.append(text)

    async def is_within(self) -> bool:
        """Whether nothing is wider than the window."""
        return bool(
            await self.page.evaluate(
                "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
            )
        )

    async def cut_tables(self) -> list[str]:
        """The tables that are wider than their place, whose last column is cut."""
        found: list[str] = await self.page.evaluate(
            "[...document.querySelectorAll('.scroll')]"
            ".filter((one) => one.scrollWidth > one.clientWidth).map((one) => one.ariaLabel)"
        )
        return found

    async def is_accessible(self) -> None:
        """axe finds nothing."""
        if not await self.page.evaluate("'axe' in window"):
            await self.page.evaluate(AXE_SCRIPT)
        # Alone: to bring what axe has passed out of the browser takes as long as to look at it.
        found = AxeResults(await self.page.evaluate(_VIOLATIONS))
        assert found.violations_count == 0, found.generate_report()

    def limit(self, part: str, limit: str = TEXT) -> Any:
        return self.page.locator(f"{limit} .limit-{part}")


async def look_no_more(page: Page) -> None:
    """Have no view refreshed by itself, as while its tab is hidden."""
    await page.evaluate(
        "Object.defineProperty(document, 'hidden', {configurable: true, value: true})"
    )


async def look_from_now_on(page: Page) -> None:
    await page.evaluate("delete document.hidden")


async def drawn(page: Page) -> None:
    """Return once the page has drawn twice: what it was about to do is done."""
    twice = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    await page.evaluate(twice)


async def assert_still(page: Page, most: float) -> None:
    """Since `SHIFTS` it has jumped by no more than that; otherwise say what has moved, and when."""
    assert await page.evaluate("shifted") < most, await page.evaluate("moved")


def unless_pictured(hostile: str, plain: str) -> str:
    """What a test writes: a hostile text, or a plain one in the pictures of the documents."""
    return plain if os.environ.get("TIDEGATE_SCREENSHOTS") else hostile


async def shoot(shown: Page | Locator, path: Path, **how: Any) -> None:
    """Take a picture that no assertion reads, where TIDEGATE_SCREENSHOTS asks for pictures."""
    if os.environ.get("TIDEGATE_SCREENSHOTS"):
        await shown.screenshot(path=path, **how)


@asynccontextmanager
async def opened(
    stage: Stage,
    path: str = "/",
    *,
    width: int = 1360,
    colours: Colours = "light",
    signed_in: bool = True,
    zone: str | None = None,
    expected: tuple[str, ...] = (),
) -> AsyncIterator[Seen]:
    """A view in an empty profile; its console says nothing but what is `expected`."""
    expect.set_options(timeout=PATIENCE_MS)
    page = await _emptied(stage, zone)
    await page.set_viewport_size({"width": width, "height": 900})
    await page.emulate_media(color_scheme=colours, forced_colors="none")
    if signed_in:
        await page.evaluate("(key) => sessionStorage.setItem('tidegate.key', key)", stage.key)
    seen = Seen(page, expected=expected)
    listeners: dict[Any, Callable[[Any], None]] = {
        "console": lambda said: seen.keep(said.type, said.text),
        "pageerror": lambda error: seen.complaints.append(str(error)),
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    try:
        await page.goto(f"{stage.gateway.url}/dashboard/#{path}")
        yield seen
        assert seen.complaints == [], seen.complaints
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
        if zone is None and stage.kept is None:
            await page.goto(_nothing(stage))  # no view is refreshed until the next one opens
            stage.kept = page
    finally:
        if stage.kept is not page:
            await page.context.close()


async def _emptied(stage: Stage, zone: str | None) -> Page:
    """A page of a profile in which nothing is kept but the files of the dashboard: the one of the
    last view, as a new one takes half as much of a core again to open a view."""
    page, nothing = stage.kept if zone is None else None, _nothing(stage)
    if page is None:
        profile = await stage.browser.new_context(timezone_id=zone)
        profile.set_default_timeout(PATIENCE_MS)
        page = await profile.new_page()
        await page.goto(nothing)
        return page
    stage.kept = None
    await page.unroute_all()
    for other in page.context.pages:
        if other is not page:
            await other.close()
    await page.context.clear_cookies()
    await page.context.clear_permissions()
    await page.evaluate("localStorage.clear(); sessionStorage.clear();")
    return page


def _nothing(stage: Stage) -> str:
    """A page of the dashboard's origin without a script."""
    return f"{stage.gateway.url}/dashboard/static/icon.svg"
