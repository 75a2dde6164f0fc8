"""`POST /submit` and what becomes of it: by the record, the database and what the provider saw."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import asyncpg
import orjson
import pytest

from tests.gateway import PNG, Gateway, Opener, payload_of

ENCODINGS: dict[str, dict[str, Any]] = {
    "JSON data": {"json": {"data": "Explain the tide"}},
    "JSON text": {"json": {"text": "Explain the tide"}},
    "multipart data": payload_of({"data": "Explain the tide", "file": PNG}),
    "multipart text": payload_of({"text": "Explain the tide", "files": PNG}),
    "urlencoded": {"data": {"data": "Explain the tide"}},
}


async def _accepted(gateway: Gateway, path: str = "/submit", **payload: Any) -> dict[str, Any]:
    async with gateway.http.post(gateway.url + path, **payload) as response:
        body: dict[str, Any] = orjson.loads(await response.read())
        assert response.status == 202, body
        assert response.headers["x-tidegate-request-id"] == body["request_id"]
        return body


async def test_a_prompt_is_taken_in_every_encoding_and_reaches_the_provider(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway()
    for name, payload in ENCODINGS.items():
        body = await _accepted(gateway, **payload)
        record = await gateway.end_of(body["request_id"])
        expected = "multi_modal" if name.startswith("multipart") else "text_only"
        assert (record["status"], record["type"]) == ("succeeded", expected), name
        assert record["text"].startswith("You asked: “Explain the tide”."), name
        assert len(record["files"]) == (expected == "multi_modal"), name
    calls = await gateway.calls("Explain the tide")
    kinds = ["text_only", "text_only", "multi_modal", "multi_modal", "text_only"]
    assert [call.kind for call in calls] == kinds


async def test_the_answer_comes_after_the_commit_and_its_link_works(
    open_gateway: Opener, database_url: str
) -> None:
    gateway = await open_gateway(worker=False)
    other = await asyncpg.connect(database_url)
    for prefix in ("", "/llm"):
        payload = {"json": {"data": "Explain the tide"}}
        body = await _accepted(gateway, f"{prefix}/submit", **payload)
        # On a connection of its own, at once: it sees only what is committed.
        row = await other.fetchrow(
            "SELECT status, prompt FROM requests WHERE id = $1::uuid", body["request_id"]
        )
        assert tuple(row) == ("queued", "Explain the tide")
        assert UUID(body["request_id"]).version == 7
        assert body["status_url"] == f"{prefix}/status/{body['request_id']}"
        assert (body["status"], body["type"], body["classified_by"]) == (
            *("queued", "text_only", "rules"),
        )
        assert (await gateway.get(body["status_url"]))[0] == 200
    await other.close()


async def test_type_model_priority_and_deadline_are_honoured(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    body = await _accepted(
        gateway,
        json={
            "data": "Draw me a fox",
            "type": "text_only",
            "model": "gemini-2.5-pro",
            "priority": 7,
            "deadline_ms": 60_000,
        },
    )
    assert (body["type"], body["classified_by"]) == ("text_only", "caller")
    queued = await gateway.status(body["request_id"])
    assert (queued["priority"], queued["model"]) == (7, "gemini-2.5-pro")
    assert queued["deadline_at"] > queued["submitted_at"]
    gateway.start_worker()
    record = await gateway.end_of(body["request_id"])
    (call,) = await gateway.calls("Draw me a fox")
    assert (call.kind, call.model) == ("text_only", "gemini-2.5-pro")
    assert (record["type"], record["model"]) == ("text_only", "gemini-2.5-pro")


async def test_jobs_go_by_priority_then_in_order_of_arrival(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1})
    order = {"low": -5, "first": 0, "second": 0, "high": 9}
    ids = {
        name: await gateway.submit(data=f"Explain {name}", priority=priority)
        for name, priority in order.items()
    }
    places = {name: (await gateway.status(request_id))["place"] for name, request_id in ids.items()}
    assert places == {"high": 1, "first": 2, "second": 3, "low": 4}
    gateway.start_worker()
    for request_id in ids.values():
        assert (await gateway.end_of(request_id))["status"] == "succeeded"
    prompts = [call.prompt.removeprefix("Explain ") for call in await gateway.calls()]
    assert prompts == ["high", "first", "second", "low"]


async def test_a_deadline_that_passes_in_the_queue_expires_the_job_without_a_call(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(rate_limits={"text_only": 1}, shutdown_grace_ms=100)
    await gateway.upstream.set_fault("hang", match="Explain forever")
    await gateway.submit(data="Explain forever")
    await gateway.in_flight(1)
    late = await gateway.submit(data="Explain too late", deadline_ms=150)
    record = await gateway.end_of(late)
    assert (record["status"], record["attempts"]) == ("expired", 0)
    assert record["error"]["code"] == "deadline_exceeded"
    assert await gateway.calls("too late") == []
    audit = await gateway.audit(late)
    assert (audit["status"], audit["admitted_at"]) == ("expired", None)
    assert audit["request"]["prompt"] == "Explain too late"


async def test_a_limit_of_zero_fails_its_kind_and_names_the_limit(open_gateway: Opener) -> None:
    gateway = await open_gateway(rate_limits={"image_generation": 0})
    record = await gateway.end_of(await gateway.submit(data="Generate an image of a fox"))
    assert (record["status"], record["error"]["code"]) == ("failed", "impossible")
    assert "kind:image_generation" in record["error"]["message"]
    refused = await gateway.stream(text="Generate an image of a fox")
    assert (refused.status, refused.problem["limit"]) == (422, "kind:image_generation")
    assert (await gateway.upstream.stats())["image_generation"].arrived == 0


async def test_the_audit_has_a_jobs_request_and_response_with_usage(open_gateway: Opener) -> None:
    gateway = await open_gateway()
    request_id = await gateway.submit(data="Describe this picture", file=PNG)
    record = await gateway.end_of(request_id)
    audit = await gateway.audit(request_id)
    assert (audit["source"], audit["status"], audit["kind"]) == ("job", "succeeded", "multi_modal")
    assert audit["request"]["prompt"] == "Describe this picture"
    assert audit["request"]["files"][0]["mime_type"] == "image/png"
    assert audit["response"]["text"] == record["text"]
    assert audit["total_tokens"] == record["usage"]["total_tokens"] > 0
    (attempt,) = await gateway.attempts(request_id)
    assert (attempt["outcome"], attempt["number"]) == ("succeeded", 1)
    assert attempt["fence_sequence"] >= 1


@pytest.mark.parametrize("large", [False, True])
async def test_bodies_of_any_size_are_kept(large: bool, open_gateway: Opener) -> None:
    gateway = await open_gateway()
    words = [f"{number * 7919 % 100_003:x}" for number in range(20_000 if large else 1)]
    await gateway.upstream.set_behaviour(answer=" ".join(words))
    request_id = await gateway.submit(data="Explain " + " ".join(words))
    record = await gateway.end_of(request_id)
    audit = await gateway.audit(request_id)
    assert audit["request"]["prompt"] == "Explain " + " ".join(words)
    assert audit["response"]["text"] == record["text"] == " ".join(words)


async def test_a_slash_too_much_leads_to_the_same_place_and_to_no_other_scheme_or_host(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    for path in ("/submit/?a=b", "/llm/submit/?a=b"):
        async with gateway.http.post(
            gateway.url + path, json={"data": "Say hello"}, allow_redirects=False
        ) as response:
            assert response.status == 307
            assert response.headers["Location"] == path.replace("/?", "?")
    async with gateway.http.post(f"{gateway.url}/submit/", json={"data": "Say hello"}) as response:
        assert response.status == 202
