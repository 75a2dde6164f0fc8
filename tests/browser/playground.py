"""Helpers of the playground's tests: upstreams, scripts for the page, and the code it shows."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from shutil import which
from typing import Any

import orjson
import pytest
from playwright.async_api import Page, Route, expect

from tests.browser.stage import Stage
from tests.gateway import KEY

SYNTAX = "code => void new (async () => {}).constructor(code.replaceAll(/^import .*$/gm, ''))"
# Python and TypeScript of a call with all options, in each API: as a tenant, and with a bound.
OPTIONS = """async () => {
    const at = (file) => import(new URL(`static/pages/${file}`, document.baseURI));
    const { APIS } = await at("try_dialects.js");
    const [{ callOf }, { codeOf }] = [await at("try_answer.js"), await at("try_code.js")];
    const [system, priority, deadline_ms] = ["Be \\"brief\\"", 5, 900];
    const options = { tenant: "acme", system, most: 100, priority, deadline_ms };
    return Object.keys(APIS).map((api) => {
        const call = callOf({ api, text: "Hi", files: [], options }, "m-1", []);
        return [api, codeOf("curl", call), codeOf("python", call), codeOf("typescript", call)];
    });
}"""

# Messages of bytes that come in pieces of a size, as the page reads them.
FRAMED = """async ([bytes, size]) => {
    const { framed } = await import(new URL("static/api.js", document.baseURI));
    const cut = (at) => Uint8Array.from(bytes.slice(at, at + size));
    let at = 0;
    const pull = (way) => (at < bytes.length ? way.enqueue(cut((at += size) - size)) : way.close());
    const read = [];
    for await (const { type, problem, data } of framed(new Response(new ReadableStream({ pull }))))
        read.push([type, problem ?? null, data]);
    return read;
}"""


# Answers that break, end too early, or are none of the API's; the others are the gateway's own.
BREAKS = """async () => {
    const real = window.fetch;
    const piece = 'event: delta\\ndata: {"text":"Half"}\\n\\n';
    const bytes = (text) => new TextEncoder().encode(text);
    const answers = [
        (way) => (way.said ? way.error(new TypeError("network error")) : way.enqueue(bytes(piece))),
        (way) => (way.said ? way.close() : way.enqueue(bytes(piece))),
        (way) => (way.said ? way.close() : way.enqueue(bytes("event: delta\\ndata: Half\\n\\n"))),
    ];
    window.fetch = async (url, more) => {
        if (!answers.length || !String(url).endsWith("/stream")) return real(url, more);
        const answer = answers.shift();
        const pull = (way) => { answer(way); way.said = true; };
        return new Response(new ReadableStream({ pull }));
    };
}"""


@asynccontextmanager
async def more_dialects(stage: Stage) -> AsyncIterator[None]:
    """Upstreams for OpenAI's, Anthropic's and Bedrock's APIs, until the end of the block."""
    running, headers = stage.gateway, {"x-api-key": stage.key}
    tables: dict[str, dict[str, Any]] = {
        "gpt": {"dialect": "openai", "base_url": f"{running.upstream.url}/v1"},
        "claude": {"dialect": "anthropic", "base_url": running.upstream.url},
        "nova": {"dialects": {"bedrock": running.upstream.url}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMULATED_KEY", KEY)
        for name, table in tables.items():
            table |= {"key": "EMULATED_KEY", "models": [f"{name}-5", f"{name}-6"]}
            table |= {"prices": {"*": {"input": 1, "output": 5}}}
            url, body = f"{running.url}/admin/upstreams/{name}", {"table": table, "test": False}
            async with running.http.put(url, json=body, headers=headers) as answer:
                assert answer.status == 200, await answer.text()
        yield
        for name in tables:
            url = f"{running.url}/admin/upstreams/{name}?force=true"
            async with running.http.delete(url, headers=headers) as answer:
                assert answer.status == 200, await answer.text()


async def curl_of(page: Page, path: str, body: str) -> str:
    """The command that `Copy as curl` copies."""
    command: str = await page.evaluate(
        """async ([path, body]) => {
            const url = new URL("static/pages/request_curl.js", document.baseURI);
            return (await import(url)).command(path, body);
        }""",
        [path, body],
    )
    return command


async def output_of(*command: str, folder: Path, key: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={**os.environ, "TIDEGATE_API_KEY": key},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def code_runs(stage: Stage, page: Page, said: str, folder: Path) -> None:
    """The code that the page shows does what the page did; none of it has a key in it."""
    code = page.get_by_role("region", name="Code")
    for language, begin in (("curl", ("bash", "-c")), ("Python", (sys.executable, "-c"))):
        await page.get_by_role("button", name=language, exact=True).click()
        text = await code.inner_text()
        assert stage.key not in text
        assert "TIDEGATE_API_KEY" in text
        out = await output_of(*begin, text, folder=folder, key=stage.key)
        if language == "curl":  # which prints what comes: JSON, and of a job its id
            said_there = orjson.dumps(said)[1:-1].decode() in out
            assert said_there or '"status_url":' in out, (text, out)
        else:
            assert said in out, (text, out)
    await page.get_by_role("button", name="TypeScript").click()
    text = await code.inner_text()
    assert stage.key not in text
    blank = await page.context.new_page()
    await blank.evaluate(SYNTAX, text)
    await blank.close()
    node, needs = which("node"), re.findall(r'^import .* from "(.+)";$', text, re.MULTILINE)
    if node and all(one.startswith("node:") for one in needs):  # no SDK, which npm would install
        command = (node, "--input-type=module", "--eval", text)
        assert said in await output_of(*command, folder=folder, key=stage.key), text


async def what_is_written_meanwhile_is_kept(stage: Stage, page: Page) -> None:
    """While an answer comes, and where it is stopped. A call waits for its own tenant's limit."""
    prompt, state = page.get_by_label("Prompt"), page.locator(".try-state").first
    send, stop = (page.get_by_role("button", name=name, exact=True) for name in ("Send", "Stop"))
    limiter = stage.gateway.services.limiters["gpt"]

    async def beside_another(route: Route) -> None:
        found = await (response := await route.fetch()).json()
        others = {"tenant": "other", "held_up_by": "tenant:other", "waiting": 9}
        found["queues"] += [one | others for one in found["queues"]]
        await route.fulfill(response=response, json=found)

    await page.route("**/admin/limits?pool=gpt", beside_another)
    await limiter.penalise("pool:total", for_ms=30_000, by="ann")
    await prompt.fill("The first")
    await send.click()
    await expect(state).to_contain_text("Waiting for pool:total: paused by ann")
    await page.unroute("**/admin/limits?pool=gpt", beside_another)
    await prompt.fill("The second")
    await limiter.resume("pool:total", by="ann")
    await expect(state).to_contain_text("Done")
    await expect(send).to_be_enabled()
    await expect(prompt).to_have_value("The second")
    await limiter.penalise("pool:total", for_ms=30_000, by="ann")
    await send.click()
    await stop.click()
    await expect(send).to_be_enabled()
    await expect(prompt).to_have_value("The second")
    await limiter.resume("pool:total", by="ann")


async def an_upstream_is_named(page: Page) -> None:
    """Only models are offered, and sent, that no other upstream serves."""
    upstream, model = page.get_by_label("Upstream"), page.get_by_label("Model", exact=True)
    await page.get_by_label("Compare with").fill("")
    choices = await upstream.locator("option").all_inner_texts()
    assert choices == ["Chosen by Tidegate", "gemini", "gpt"]
    await page.get_by_label("API", exact=True).select_option("prompt")
    await expect(upstream.locator("option")).to_have_count(4)
    await upstream.select_option("claude")
    await expect(model).to_have_value("claude-5")
    offered = page.locator("#try-models option")
    names = await offered.evaluate_all("all => all.map((one) => one.value)")
    assert sorted(names) == ["claude-5", "claude-6"]
    await model.fill("gpt-5")
    await page.get_by_label("Prompt").fill("Explain where the tide goes")
    await page.get_by_role("button", name="Send").click()
    await expect(page.get_by_text("gpt serves this model too")).to_be_visible()
    await model.fill("claude-6")
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator(".try-state").first).to_contain_text("Done")
    await expect(page.locator(".try-figures dd").nth(5)).to_have_text("claude")
    await page.get_by_label("API", exact=True).select_option("chat")
    await expect(upstream).to_have_value("")


async def what_a_call_has_cost_comes_late(page: Page) -> None:
    """Then it is no longer looked up once the next call is sent: it would change its figures."""
    upstream, send = page.locator(".try-figures dd").nth(5), page.get_by_role("button", name="Send")

    async def unanswered(_: Route) -> None:
        """The look at the record of the first call."""

    async def ask(api: str, model: str) -> None:
        await page.get_by_label("API", exact=True).select_option(api)
        await page.get_by_label("Model", exact=True).fill(model)
        await page.get_by_label("Prompt").fill(f"Explain {model} where the tide goes")
        await send.click()
        await expect(page.locator(".try-state").first).to_contain_text("Done")
        await expect(page.get_by_text(f"You asked: “Explain {model}")).to_be_visible()
        await expect(send).to_be_enabled()

    await page.route("**/admin/requests?id=*", unanswered, times=1)
    await ask("chat", "gpt-5")
    async with page.expect_event("requestfailed", lambda one: "requests?id=" in one.url):
        await ask("messages", "claude-6")
    await expect(upstream).to_have_text("claude")
    await page.get_by_label("API", exact=True).select_option("chat")


async def a_broken_answer_is_reported(page: Page, folder: Path) -> None:
    """And what was written can be sent again; so where a file can't be read."""
    send, state = page.get_by_role("button", name="Send"), page.locator(".try-state").first
    await page.get_by_label("Prompt").fill("Explain where the tide goes")
    await page.evaluate(BREAKS)
    for said in (
        "The connection closed before the response was complete.",
        "The stream ended before the answer was complete.",
        "The answer can't be read",
    ):
        await send.click()
        await expect(state).to_contain_text(said)
        await expect(send).to_be_enabled()
    gone = folder / "gone.txt"
    gone.write_text("Here")
    await page.locator("#try-files").set_input_files(gone)
    gone.unlink()
    await send.click()
    await expect(page.get_by_text("gone.txt can't be read")).to_be_visible()
    await page.get_by_role("button", name="Remove gone.txt").click()
    await send.click()
    await expect(state).to_contain_text("Done")


async def the_operators_key_calls_no_model(page: Page, operator_key: str, key: str) -> None:
    """What opens the page alone is said to, beside the field for a tenant's key."""
    await page.evaluate("(one) => sessionStorage.setItem('tidegate.key', one)", operator_key)
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator(".try-state")).to_contain_text("is for the dashboard only")
    field = page.get_by_label("API key")
    await expect(field).to_have_attribute("aria-invalid", "true")
    await field.fill("tg_none")  # Options are unfolded
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator(".try-state")).to_contain_text("This API key is not valid")
    await field.fill(key)
    await page.get_by_role("button", name="Send").click()
