"""Conversations of calls on record: by name, by opening, by the answer continued, by trace."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
from openai import AsyncOpenAI

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import ADMIN_TOKEN, AS_ADMIN, ask, key_of, submitted
from tests.waiting import wait_until

MODEL = "gpt-5-mini"
SYSTEM: Any = {"role": "system", "content": "You are a tide table"}
FIRST: list[Any] = [SYSTEM, {"role": "user", "content": "When is high water?"}]
SECOND = [*FIRST, {"role": "assistant", "content": "At six."}, {"role": "user", "content": "Low?"}]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
async def gateway(open_gateway: Opener) -> Gateway:
    return await open_gateway(auth="on", admin_token=ADMIN_TOKEN)


@pytest.fixture
async def acme(gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    key = (await key_of(gateway, "acme"))["Authorization"].split()[1]
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as client:
        yield client


async def seen(gateway: Gateway, calls: int, **query: str) -> dict[str, Any]:
    """A conversation of acme's, once so many of its calls are on record."""
    found: dict[str, Any] = {}

    async def reached() -> bool:
        nonlocal found
        asked = "&".join(f"{name}={value}" for name, value in query.items())
        path = f"/admin/conversations?tenant=acme&{asked}"
        status, found = await ask(gateway, "GET", path, AS_ADMIN)
        return status == 200 and found["sums"]["calls"] == calls

    await wait_until(reached, 20, f"{calls} calls of {query}")
    return found


def ids(thread: dict[str, Any]) -> list[str]:
    return [one["request_id"] for one in thread["calls"]]


async def test_calls_are_together_by_name_by_opening_by_answer_and_by_trace(
    gateway: Gateway, acme: AsyncOpenAI
) -> None:
    async def chat(messages: list[Any], **headers: str) -> str:
        answer = await acme.chat.completions.with_raw_response.create(
            model=MODEL, messages=messages, extra_headers=headers
        )
        return str(answer.headers["x-tidegate-request-id"])

    traced = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    named = {"x-claude-code-session-id": "session 1", **traced}
    main = [await chat(FIRST, **named), await chat(SECOND, **named)]
    child = await chat([{"role": "user", "content": "Title?"}], **named)
    talk = await seen(gateway, 3, conversation="session%201")
    assert [ids(one) for one in talk["threads"]] == [main, [child]]
    of_calls = [one for thread in talk["threads"] for one in thread["calls"]]
    sums = talk["sums"]
    assert sums["input_tokens"] == sum(one["input_tokens"] for one in of_calls) > 0
    assert sums["output_tokens"] == sum(one["output_tokens"] for one in of_calls) > 0
    assert (sums["failed"], talk["complete"]) == (0, True)
    for words, called in (("high+water", main[0]), ("low", main[1]), ("tide+table", None)):
        page = (await ask(gateway, "GET", f"/admin/requests?text={words}", AS_ADMIN))[1]
        assert [one["request_id"] for one in page["items"]] == [called] * (called is not None)

    alone = [await chat(FIRST), await chat(SECOND)]
    unnamed = f"opening-{talk['threads'][0]['opening']}"
    assert ids((await seen(gateway, 2, conversation=unnamed))["threads"][0]) == alone

    first = await acme.responses.create(
        model=MODEL, input="High water?", extra_headers={"x-tidegate-conversation": "kept"}
    )
    later = await acme.responses.create(
        model=MODEL, input="And low?", previous_response_id=first.id, extra_headers=traced
    )
    # In the background a worker makes the record, from what the API process wrote down.
    last = await acme.responses.create(
        model=MODEL, input="And then?", previous_response_id=later.id, background=True
    )
    while (await acme.responses.retrieve(last.id)).status in ("queued", "in_progress"):
        pass
    (thread,) = (await seen(gateway, 3, conversation="kept"))["threads"]
    assert len(thread["calls"]) == 3
    trace = await seen(gateway, 4, trace=TRACE)
    assert {one["conversation"] for thread in trace["threads"] for one in thread["calls"]} == {
        "session 1",
        "kept",
    }

    headers = {"Authorization": f"Bearer {acme.api_key}"}
    status, page = await ask(gateway, "GET", "/requests?conversation=kept", headers)
    assert status == 200
    assert {one["request_id"] for one in page["items"]} == set(ids(thread))
    status, page = await ask(gateway, "GET", f"/admin/requests?conversation={unnamed}", AS_ADMIN)
    assert {one["conversation"] for one in page["items"]} == {unnamed}
    assert sorted(one["request_id"] for one in page["items"]) == sorted(alone)
    status, one = await ask(gateway, "GET", f"/admin/requests/{main[0]}", AS_ADMIN)
    assert (one["request"]["conversation"], one["request"]["trace_id"]) == ("session 1", TRACE)


async def test_jobs_and_streams_are_in_the_conversation_that_they_name(
    gateway: Gateway, acme: AsyncOpenAI
) -> None:
    headers = {"Authorization": f"Bearer {acme.api_key}"}
    traced = {**headers, "traceparent": f"00-{TRACE}-{SPAN}-01"}
    job = await submitted(gateway, traced, data="Explain", conversation="mixed")
    body = {"model": MODEL, "messages": FIRST}
    wrapped = await submitted(
        gateway, headers, endpoint="/v1/chat/completions", body=body, conversation="mixed"
    )
    stream = {"data": "Explain tide", "conversation": "mixed"}
    async with gateway.http.post(f"{gateway.url}/stream", json=stream, headers=traced) as answer:
        assert answer.status == 200
        await answer.read()
        streamed = answer.headers["x-tidegate-request-id"]
    found = await seen(gateway, 3, conversation="mixed")
    by_source = {one["calls"][0]["source"]: one for one in found["threads"] if "opening" not in one}
    assert ids(by_source["stream"]) == [streamed]
    assert ids(by_source["job"]) == [job]
    (native,) = [one for one in found["threads"] if "opening" in one]
    assert ids(native) == [wrapped]
    traces = await seen(gateway, 2, trace=TRACE)
    assert {UUID(one["calls"][0]["request_id"]) for one in traces["threads"]} == {
        UUID(job),
        UUID(streamed),
    }


async def test_a_conversation_is_its_tenants_alone(gateway: Gateway, acme: AsyncOpenAI) -> None:
    await acme.chat.completions.create(
        model=MODEL, messages=FIRST, extra_headers={"x-tidegate-conversation": "ours"}
    )
    await seen(gateway, 1, conversation="ours")
    other = await key_of(gateway, "other")
    _, page = await ask(gateway, "GET", "/requests?conversation=ours", other)
    assert page["items"] == []
    path = "/admin/conversations?tenant=other&conversation=ours"
    status, problem = await ask(gateway, "GET", path, AS_ADMIN)
    assert (status, problem["field"]) == (404, "conversation")
    assert (await ask(gateway, "GET", path, other))[0] == 403
    for query in ("", "?trace=xyz", f"?trace={TRACE}&conversation=ours"):
        status, _ = await ask(gateway, "GET", f"/admin/conversations{query}", AS_ADMIN)
        assert status == 400
