"""`GET /requests`: the caller's own, newest first."""

from __future__ import annotations

from typing import Any

from tests.gateway import Gateway, Opener
from tests.integration.spine.test_openapi import broken

SHORT = {
    *("request_id", "source", "status", "type", "model", "priority", "attempts", "submitted_at"),
    *("admitted_at", "finished_at", "queue_ms", "upstream_ms", "total_tokens", "status_url"),
}


async def _list(gateway: Gateway, query: str = "", prefix: str = "") -> dict[str, Any]:
    status, body = await gateway.get(f"{prefix}/requests{query}")
    assert status == 200, body
    return body


async def test_requests_are_listed_in_short_and_their_links_work(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    request_id = await gateway.submit(data="Explain the tide")
    record = await gateway.end_of(request_id)
    streamed = await gateway.stream(text="Explain the moon")
    await gateway.recorded(streamed.request_id)
    for prefix in ("", "/llm"):
        page = await _list(gateway, prefix=prefix)
        assert [item["request_id"] for item in page["items"]] == [streamed.request_id, request_id]
        assert "next_cursor" not in page
        item = page["items"][1]
        assert set(item) == SHORT, "no text, and nothing of how it was classified"
        shared = SHORT - {"status_url", "total_tokens"}
        assert {name: item[name] for name in shared} == {name: record[name] for name in shared}
        assert item["total_tokens"] == record["usage"]["total_tokens"]
        assert (await gateway.get(item["status_url"]))[1] == record
        _, document = await gateway.get("/openapi.json")
        assert broken(page, document["components"]["schemas"]["RequestPage"], document) == ""


async def test_pages_are_gone_through_by_cursor_and_filters_hold(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    ids = [await gateway.submit(data=f"Explain {number}") for number in range(5)]
    await gateway.submit(data="Generate an image of a fox")
    query = "?type=text_only&limit=2&status=queued&source=job&since=2020-01-01T00:00:00"
    found, cursor = [], ""
    while True:
        page = await _list(gateway, query + cursor)
        found += [item["request_id"] for item in page["items"]]
        if "next_cursor" not in page:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert found == list(reversed(ids))
    assert (await _list(gateway, "?until=2020-01-01T00:00:00Z"))["items"] == []
    assert len((await _list(gateway, "?limit=1"))["items"]) == 1
    await gateway.database.execute("UPDATE requests SET tenant_id = 'other'")
    assert (await _list(gateway))["items"] == []


BAD = (
    *("limit=0", "limit=201", "limit=x", "status=done", "type=video", "source=batch"),
    *("since=yesterday", "until=9999-12-31T23:59:59-10:00", "model=", "cursor=x"),
    *("cursor=AAAA", f"cursor=f{'_' * 31}", "colour=red"),
)


async def test_a_bad_query_is_refused_by_name(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    for query in BAD:
        status, problem = await gateway.get(f"/requests?{query}")
        assert (status, problem.get("code")) == (400, "invalid_request"), query
        assert problem["field"] == query.partition("=")[0]


async def test_odd_but_sound_queries_find_nothing(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.submit(data="Explain the tide")
    for query in ("model=%20", "model=%EF%BF%BD", "since=9999-12-31T00:00:00Z", "until=0001-01-01"):
        assert (await _list(gateway, f"?{query}"))["items"] == []
