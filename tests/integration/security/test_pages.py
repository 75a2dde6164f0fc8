"""Web pages that may call the gateway from a browser, where an operator names them."""

from __future__ import annotations

import pytest

from tests.gateway import Gateway, Opener

PAGE = "https://chat.example"
CHAT = "/v1/chat/completions"
BODY = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": "Say hello"}]}
ALLOWS = "access-control-allow-origin"


def of_page(page: str = PAGE) -> dict[str, str]:
    return {"origin": page, "sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}


@pytest.fixture
async def gateway(open_gateway: Opener) -> Gateway:
    return await open_gateway(worker=False, cors_origins=f"{PAGE}, http://localhost:3000")


async def test_its_browser_is_told_that_it_may_ask(gateway: Gateway) -> None:
    asks = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    for path in (CHAT, "/submit", "/v1beta/models/m:generateContent"):
        async with gateway.http.options(gateway.url + path, headers=of_page() | asks) as answer:
            assert (answer.status, answer.headers[ALLOWS]) == (200, PAGE)
            assert "POST" in answer.headers["access-control-allow-methods"]
            assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
    other = of_page("https://other.example")
    async with gateway.http.options(gateway.url + CHAT, headers=other | asks) as answer:
        assert answer.status == 400
        assert ALLOWS not in answer.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_it_is_answered_and_may_read_what_it_is_told(gateway: Gateway, stream: bool) -> None:
    body = BODY | {"stream": stream}
    async with gateway.http.post(gateway.url + CHAT, json=body, headers=of_page()) as answer:
        assert (answer.status, answer.headers[ALLOWS]) == (200, PAGE)
        exposed = answer.headers["access-control-expose-headers"]
        assert "x-tidegate-request-id" in exposed
        assert {"idempotency-replayed", "idempotency-lost"} <= {*exposed.split(", ")}
        assert {"x-should-retry", "retry-after-ms"} <= {*exposed.split(", ")}, "SDKs obey them"
        assert await answer.read()
    data = {"data": "Say hello", "type": "text_only"}
    async with gateway.http.post(f"{gateway.url}/submit", json=data, headers=of_page()) as answer:
        assert (answer.status, answer.headers[ALLOWS]) == (202, PAGE)
    async with gateway.http.post(f"{gateway.url}/v1/none", json={}, headers=of_page()) as answer:
        assert (answer.status, answer.headers[ALLOWS]) == (404, PAGE)


async def test_no_other_page_is_and_none_reads_what_is_for_operators(gateway: Gateway) -> None:
    other = of_page("https://other.example")
    async with gateway.http.post(gateway.url + CHAT, json=BODY, headers=other) as answer:
        assert answer.status == 403
        assert ALLOWS not in answer.headers
    as_operator = {"x-api-key": gateway.operator_key}
    for path in ("/admin/limits", "/metrics"):
        url, headers = gateway.url + path, of_page() | as_operator
        async with gateway.http.get(url, headers=headers) as answer:
            assert ALLOWS not in answer.headers


async def test_without_the_setting_no_page_is_told_anything(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    async with gateway.http.post(gateway.url + CHAT, json=BODY, headers=of_page()) as answer:
        assert answer.status == 403
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
