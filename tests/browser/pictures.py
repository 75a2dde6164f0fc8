"""The traffic that the pictures of docs/dashboard.md show, and how a chart's picture is read."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.browser.stage import Stage
from tests.waiting import work_for

# The traffic before the first picture lasts longer than a test usually may.
pictured = pytest.mark.timeout(900 if os.environ.get("TIDEGATE_SCREENSHOTS") else 120)

# What the page says of a prompt.
PROMPT_OF = """async (request) => {
    const at = new URL("static/pages/request_parts.js", document.baseURI);
    const { fill, h } = await import(new URL("static/dom.js", document.baseURI));
    return fill(h("div"), (await import(at)).prompt(request, null)).textContent;
}"""

# Whether a chart of these values, some of them none, has anything in its colour.
DRAWS = """async (values) => {
    const { chart } = await import(new URL("static/chart.js", document.baseURI));
    const one = chart("Waits", [["p50", "--accent"]], String, { signal: AbortSignal.any([]) });
    document.getElementById("main").replaceChildren(one.element);
    one.update(values.map((_, at) => at * 60), [values]);
    const isColoured = (pixel) => pixel[3] > 200 && pixel[2] - pixel[0] > 60;
    for (let frame = 0; frame < 60; frame += 1) {
        await new Promise(requestAnimationFrame);
        const canvas = one.element.querySelector("canvas");
        if (canvas === null) continue;
        const { width, height } = canvas;
        const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
        for (let at = 0; at < data.length; at += 4)
            if (isColoured(data.subarray(at, at + 4))) return true;
    }
    return false;
}"""

# Of two upstreams, where one tenant weighs another in each: in the frame, and as they are shown.
# Then of one whose weight was changed, once its last waiting call is admitted: what the past says
# is older, and a dialog that opened with it would be refused.
WEIGHTS = """async () => {
    const at = (file) => import(new URL(`static/${file}`, document.baseURI));
    const { within } = await at("scope.js");
    const { tenantsCard } = await at("pages/overview/tenants.js");
    const pools = [3, 1].map((weight, place) => ({
        pool: String(place), limits: [], learned: [], processes: [],
        tenants: [{ tenant: "a", weight, waiting: 1 }, { tenant: "b", weight: 2, waiting: 1 }],
    }));
    const live = within({ pools, all_tenants: 2, all_processes: 0 }, "");
    const table = tenantsCard(() => "", () => null);
    const row = (name, weight, used) => ({ name, weight, upstream_ms: used });
    table.trend({ words: "hour", tenants: [row("a", null, 6), row("b", 2, 4)] });
    table.live(live);
    const shown = table.element.querySelector("[data-tenant='a']");
    const texts = [...shown.querySelectorAll("td.number, .figures")].map((one) => one.textContent);
    table.trend({ words: "hour", tenants: [row("c", 1, 4)] });
    table.live({ tenants: [{ tenant: "c", weight: 3, waiting: 1 }] });
    table.live({ tenants: [] });
    const changed = table.element.querySelectorAll("[data-tenant='c'] td.number")[1].textContent;
    return [live.tenants.map((one) => one.weight), texts.slice(1), changed];
}"""

# What a chart of lengths up to so many ms writes beside its vertical axis.
MARKS = """async (longest) => {
    const at = (file) => import(new URL(`static/${file}`, document.baseURI));
    const [{ chart }, { length }] = [await at("chart.js"), await at("format.js")];
    const written = new Set();
    const context = CanvasRenderingContext2D.prototype;
    const fillText = context.fillText;
    context.fillText = function (text, ...rest) {
        written.add(text);
        fillText.call(this, text, ...rest);
    };
    const one = chart("Waits", [["p50", "--accent"]], length, { signal: AbortSignal.any([]) });
    document.getElementById("main").replaceChildren(one.element);
    one.update([0, 60], [[0, longest]]);
    const marks = () => [...written].filter((text) => /[a-z]/.test(text));
    for (let frame = 0; frame < 60 && !marks().length; frame += 1)
        await new Promise(requestAnimationFrame);
    context.fillText = fillText;
    return marks();
}"""


@asynccontextmanager
async def under_traffic(stage: Stage) -> AsyncIterator[None]:
    """Several tenants' calls, some of which go wrong, and a limit that somebody has paused, for the
    pictures: minutes of it at first."""
    running = stage.gateway
    tenants = running.services.store.tenants
    await running.upstream.set_behaviour(
        first_byte_ms={"lognormal": [250, 0.5]}, between_ms={"uniform": [5, 30]}
    )
    for fault, probability in (("throttled_bare", 0.02), ("unavailable", 0.03)):
        await running.upstream.set_fault(fault, probability=probability)
    changes = {"kind:text_only": 5, "weights.acme": 4, "weights.globex": 2}
    admin = {"x-api-key": stage.key}
    async with running.http.patch(
        f"{running.url}/admin/limits", json={"set": changes}, headers=admin
    ) as answer:
        assert answer.status == 200
    await running.services.limiter.penalise(
        "kind:image_generation", for_ms=560_000, by="ann", reason="quota is used up"
    )
    names = ("acme", "globex", "initech", "umbrella")
    keys = []
    for name in names:
        await tenants.set(name, {}, by="pictures")
        keys.append((await tenants.create_key(name))[1].text)

    async def calls() -> None:
        for number in range(1_000_000):
            body = {"data": f"Explain tide {number}"}
            if number % 60 == 7:
                body = {"data": f"Generate an image of a fox {number}"}
            headers = {"x-api-key": keys[(0, 0, 0, 0, 1, 1, 2, 2, 3, 1)[number * 7 % 10]]}
            async with running.http.post(
                f"{running.url}/submit", json=body, headers=headers
            ) as answer:
                assert answer.status == 202
            await work_for(0.02 if number // 150 % 2 else 0.13)

    calling = asyncio.create_task(calls())
    await work_for(8 if stage.pictured else 240)
    stage.pictured = True
    try:
        yield
    finally:
        calling.cancel()
        await running.upstream.clear_faults()
