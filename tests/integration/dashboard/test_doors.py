"""Who gets the dashboard's files, and who its data."""

from __future__ import annotations

from tests.gateway import Gateway, Opener

TOKEN = "the-admin-token-of-this-test"


async def seen(gateway: Gateway, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    url = gateway.url + path
    async with gateway.http.get(url, headers=headers, allow_redirects=False) as answer:
        return answer.status, dict(answer.headers), await answer.read()


async def test_the_files_are_for_everybody_and_the_data_for_the_token(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, admin_token=TOKEN)
    status, headers, _ = await seen(gateway, "/dashboard")
    assert (status, headers["Location"]) == (307, "dashboard/")
    for prefix in ("", "/llm"):
        for file in ("", "static/main.js", "static/tokens.css"):
            status, headers, body = await seen(gateway, f"{prefix}/dashboard/{file}")
            assert status == 200
            assert b"<script>" not in body
            policy = headers["Content-Security-Policy"].split("; ")
            assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(
                policy
            )
            assert headers["Cache-Control"] == "no-cache"
        for data in ("session", "stuck", "feed"):
            assert (await seen(gateway, f"{prefix}/dashboard/{data}"))[0] == 401
        shown = {"Authorization": f"Bearer {TOKEN}"}
        status, _, body = await seen(gateway, f"{prefix}/dashboard/session", **shown)
        assert status == 200
        assert b'"asks_for":"operator_key"' in body


async def test_addresses_as_people_type_them_lead_to_the_page(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    for typed, page in (
        ("/", "dashboard/"),
        ("/dashboard/requests", "./#/requests"),
        ("/dashboard/requests?status=dead", "./#/requests?status=dead"),
        ("/llm/dashboard/requests/17", ".././#/requests/17"),
        ("/dashboard//evil.example", ".././#/evil.example"),
    ):
        status, headers, _ = await seen(gateway, typed, **browser)
        assert (status, headers["Location"]) == (307, page), typed
    status, headers, _ = await seen(gateway, "/")
    assert (status, headers["Location"]) == (307, "/docs")
    for path in ("/dashboard/requests", "/dashboard/none"):
        status, headers, _ = await seen(gateway, path)
        assert (status, headers["Content-Type"]) == (404, "application/problem+json")
