"""What is counted before a call, and for whom: requests and tokens."""

from __future__ import annotations

import asyncio
import os
from base64 import b64encode
from typing import Any

from tests.gateway import Gateway, Opener
from tests.integration.rivals.routes import ASKED, GEMINI
from tests.unit.admission.pictures import png
from tests.waiting import wait_until
from tidegate.policy.format import edit


async def opened(open_gateway: Opener, limits: dict[str, Any], **settings: Any) -> Gateway:
    gateway = await open_gateway(worker=False, **settings)
    await gateway.services.keeper.change(edit(limits), set_by="test")
    return gateway


async def ask(gateway: Gateway, body: dict[str, Any], within_ms: int = 100) -> int:
    url = f"{gateway.url}/v1beta/models/{GEMINI}:generateContent"
    headers = {"x-tidegate-deadline-ms": str(within_ms)}
    async with gateway.http.post(url, json=body, headers=headers) as response:
        await response.read()
        return response.status


async def test_who_is_refused_for_concurrency_has_spent_no_rate(open_gateway: Opener) -> None:
    """LiteLLM 39309: a request that finds all places taken is counted against the rate as well."""
    gateway = await opened(open_gateway, {"rpm:total": 3}, rate_limits={"text_only": 1})
    await gateway.upstream.set_fault("hang", count=1)
    holding = asyncio.create_task(ask(gateway, ASKED, 5_000))
    await gateway.in_flight(1)
    assert set(await asyncio.gather(*(ask(gateway, ASKED, 30) for _ in range(20)))) == {429}
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
    await wait_until(lambda: gateway.held == 0, 20)
    assert [await ask(gateway, ASKED) for _ in range(3)] == [200, 200, 429]


async def test_a_small_limit_on_tokens_lets_its_first_call_in(open_gateway: Opener) -> None:
    """LiteLLM PR 28805: an estimate above the limit is refused, however often it is asked."""
    gateway = await opened(open_gateway, {"tpm:total": 5})
    long = {"contents": [{"parts": [{"text": "tide " * 2_000}]}]}
    assert await ask(gateway, long) == 200
    assert await ask(gateway, long) == 429, "what it used counts"


async def test_calls_at_once_do_not_all_see_an_empty_count(open_gateway: Opener) -> None:
    """LiteLLM PR 23775, Envoy AI Gateway 680: all that come at once read nothing used, and pass."""
    gateway = await opened(open_gateway, {"tpm:total": 3_000}, rate_limits={"text_only": 50})
    await gateway.upstream.set_fault("hang")
    text = {"contents": [{"parts": [{"text": "tide " * 200}]}]}
    asking = [asyncio.create_task(ask(gateway, text, 1_000)) for _ in range(30)]

    async def judged() -> bool:
        in_flight = (await gateway.upstream.stats()).in_flight
        return in_flight + sum(task.done() for task in asking) == len(asking)

    await wait_until(judged, 20, "each is under way or refused")
    running = [task for task in asking if not task.done()]
    assert {task.result() for task in asking if task.done()} == {429}
    assert 1 <= len(running) <= 15, "as many as 3,000 tokens are enough for"
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_a_picture_in_base64_is_not_counted_as_text(open_gateway: Opener) -> None:
    """LiteLLM 32865: 633,912 tokens for a picture of 1,049."""
    gateway = await opened(open_gateway, {"tpm:total": 50_000})
    data = b64encode(png(768, 768) + os.urandom(1_500_000)).decode()
    part = {"inlineData": {"mimeType": "image/png", "data": data}}
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    await gateway.upstream.set_fault("hang")
    bodies: list[tuple[str, dict[str, Any]]] = [
        (f"/v1beta/models/{GEMINI}:generateContent", {"contents": [{"parts": [part]}]}),
        ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": [url]}]}),
    ]
    asking = [
        asyncio.create_task(gateway.http.post(gateway.url + path, json=body))
        for path, body in bodies
    ]
    await gateway.in_flight(2)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
