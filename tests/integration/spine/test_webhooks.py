"""Webhooks: told of each end, signed, tried again, and never more than they should be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any
from uuid import uuid4

import orjson
import pytest
from aiohttp import web

from tests.gateway import Gateway, Opener
from tests.integration.spine.receiver import SECRET, Received, Receiver, receiving
from tests.markdown import blocks
from tests.shapes import differences
from tests.waiting import wait_until
from tidegate.jobs import webhooks as webhook
from tidegate.jobs.webhooks import signature
from tidegate.policy.tenants import webhook_secret_of

SETTINGS: dict[str, Any] = {"webhook_secret": SECRET, "webhook_allow_private": True}


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_POLL_EVERY_S", 0.02)
    monkeypatch.setattr(webhook, "webhook_wait_ms", lambda tries: 20 if tries < 4 else None)


def as_documented(told: Received) -> list[str]:
    """How a webhook differs from the one that docs/jobs.md shows."""
    (shown,) = [block.text for block in blocks("docs/jobs.md") if block.language == "http"]
    head, _, body = shown.partition("\n\n")
    names = {line.partition(":")[0] for line in head.splitlines()[1:]}
    return [*(names - set(told.headers)), *differences(json.loads(body), told.event)]


async def _settled(gateway: Gateway, request_id: str, state: str = "delivered") -> dict[str, Any]:
    async def shown() -> dict[str, Any] | None:
        found: dict[str, Any] = (await gateway.status(request_id))["webhook"]
        return found if found["state"] == state else None

    found: dict[str, Any] = await wait_until(shown, 20, f"a webhook that is {state}")
    return found


async def test_the_end_of_a_wrapped_call_is_told_with_its_answer(
    open_gateway: Opener, receiver: Receiver
) -> None:
    gateway = await open_gateway(**SETTINGS)
    body = {"model": "m", "messages": [{"role": "user", "content": "Grüße, 海"}]}
    request_id = await gateway.submit(
        endpoint="/v1/chat/completions", body=body, webhook_url=receiver.url
    )
    await _settled(gateway, request_id)
    (told,) = receiver.received
    assert told.is_signed()
    assert "text" not in told.event["data"]
    answer = (await gateway.status(request_id))["answer"]
    assert told.event["data"]["answer"] == answer
    assert "Grüße, 海" in answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("fault", [None, "safety"])
async def test_a_webhook_that_waits_tells_of_its_end_though_the_job_is_queued_again(
    fault: str | None, open_gateway: Opener, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "webhook_wait_ms", lambda tries: 600_000)
    gateway = await open_gateway(max_attempts=1, **SETTINGS)
    receiver.answers = [503]
    await gateway.upstream.set_fault("internal")
    request_id = await gateway.submit(data="Explain the tide", webhook_url=receiver.url)
    await wait_until(lambda: receiver.received, 20, "the first try")
    await _settled(gateway, request_id, "pending")
    await gateway.upstream.clear_faults()
    if fault is not None:  # it fails again, otherwise
        await gateway.upstream.set_fault(fault)
    requeue = f"{gateway.url}/admin/requests/requeue"
    since = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    async with gateway.http.post(requeue, json={"since": since, "dry_run": False}) as response:
        assert response.status == 200, await response.text()
    await wait_until(lambda: len(receiver.received) == 2, 20, "the webhook of the second end")
    await gateway.database.execute("UPDATE webhooks SET due_at = now() WHERE state = 'pending'")
    await wait_until(lambda: len(receiver.received) == 3, 20, "the second try")
    first, second, again = (one.event for one in receiver.received)
    assert second["type"] == ("request.failed" if fault else "request.succeeded")
    assert first["data"].pop("text") == "", "what came before it failed, which is not repeated"
    assert again == first
    assert (first["data"]["status"], "error" in first["data"]) == ("failed", True)


async def test_the_end_of_a_job_is_told_once_and_signed(
    open_gateway: Opener, receiver: Receiver
) -> None:
    gateway = await open_gateway(worker=False, **SETTINGS)
    hook = f"{receiver.url}/hooks?from=tidegate"
    request_id = await gateway.submit(data="Explain the tide", webhook_url=hook)
    assert (await gateway.status(request_id))["webhook"] == {"state": "waiting", "tries": 0}
    gateway.start_worker()
    record = await gateway.end_of(request_id)
    shown = await _settled(gateway, request_id)
    (told,) = receiver.received
    assert told.is_signed()
    assert told.headers["content-type"] == "application/json"
    assert told.event["type"] == "request.succeeded"
    assert as_documented(told) == []
    data = told.event["data"]
    assert data["status_url"] == f"/status/{request_id}"
    for name in ("request_id", "status", "type", "model", "attempts", "text", "finish_reason"):
        assert data[name] == record[name], name
    assert data["usage"]["total_tokens"] == record["usage"]["total_tokens"]
    assert shown == {
        "id": told.webhook_id,
        "state": "delivered",
        "tries": 1,
        "answer_status": 204,
    }


async def test_every_kind_of_end_is_told(open_gateway: Opener, receiver: Receiver) -> None:
    gateway = await open_gateway(max_attempts=1, rate_limits={"text_only": 3}, **SETTINGS)
    await gateway.upstream.set_fault("internal", match="failing")
    await gateway.upstream.set_fault("hang", match="forever")
    hook = {"webhook_url": receiver.url}
    ids = {
        "failed": await gateway.submit(data="Explain failing", **hook),
        "cancelled": await gateway.submit(data="Explain forever", **hook),
        "expired": await gateway.submit(data="Draw a fox", deadline_ms=1, **hook),
    }
    await gateway.submit(data="Explain the tide")
    await gateway.in_flight(1)
    await gateway.http.delete(f"{gateway.url}/requests/{ids['cancelled']}")
    await wait_until(lambda: len(receiver.received) == 3, 20)
    told = {each.event["data"]["request_id"]: each.event for each in receiver.received}
    for status, request_id in ids.items():
        assert told[request_id]["type"] == f"request.{status}"
        assert told[request_id]["data"]["error"]["code"]


async def test_what_is_not_taken_is_tried_again_with_the_same_id_until_it_is(
    open_gateway: Opener, receiver: Receiver
) -> None:
    gateway = await open_gateway(**SETTINGS)
    receiver.answers = [500, 302, 404]
    request_id = await gateway.submit(data="Explain the tide", webhook_url=receiver.url)
    shown = await _settled(gateway, request_id)
    assert (shown["tries"], shown["answer_status"], "problem" in shown) == (4, 204, False)
    assert len(receiver.received) == 4, "the redirect was not followed"
    assert len({each.webhook_id for each in receiver.received}) == 1
    assert all(each.is_signed() for each in receiver.received)


async def test_a_receiver_that_names_a_time_is_not_asked_before(
    open_gateway: Opener, receiver: Receiver
) -> None:
    gateway = await open_gateway(**SETTINGS)
    due = (
        "SELECT extract(epoch FROM due_at - now())::int AS s FROM webhooks "
        "WHERE state = 'pending' AND tries = 1 AND answer_status = 429"
    )
    at = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    for header, expected_s in (("90", 90), (at, 3_600), ("99999999", 6 * 3_600), ("soon", None)):
        receiver.answers, receiver.headers = [429], {"Retry-After": header}
        request_id = await gateway.submit(data="Explain the tide", webhook_url=receiver.url)
        if expected_s is None:
            await _settled(gateway, request_id)
            continue
        left_s = await wait_until(lambda: gateway.database.fetchval(due), 20, "it is put off")
        assert expected_s - 20 <= left_s <= expected_s + 2, header
        await gateway.database.execute("UPDATE webhooks SET due_at = now() WHERE tries = 1")
        await _settled(gateway, request_id)


async def test_a_receiver_that_is_gone_or_never_takes_it_is_given_up_and_can_be_asked_again(
    open_gateway: Opener, receiver: Receiver
) -> None:
    gateway = await open_gateway(**SETTINGS)
    for answers, tries in (([410], 1), ([503] * 4, 4)):
        receiver.answers, receiver.received = list(answers), []
        request_id = await gateway.submit(data="Explain the tide", webhook_url=receiver.url)
        shown = await _settled(gateway, request_id, "given_up")
        assert (shown["tries"], shown["answer_status"]) == (tries, answers[-1])
        assert str(answers[-1]) in shown["problem"]
        assert "next_try_at" not in shown
        url = f"{gateway.url}/admin/webhooks/{shown['id']}/redeliver"
        async with gateway.http.post(url) as response:
            assert (response.status, await response.json()) == (200, {"done": True})
        again = await _settled(gateway, request_id)
        assert (again["id"], again["tries"]) == (shown["id"], 1)
        assert len(receiver.received) == tries + 1
    async with gateway.http.post(f"{gateway.url}/admin/webhooks/{uuid4()}/redeliver") as response:
        assert response.status == 404


async def test_a_receiver_that_does_not_answer_or_answers_without_end_holds_nobody_up(
    open_gateway: Opener, receiver: Receiver
) -> None:
    release = asyncio.Event()

    async def silent() -> web.StreamResponse:
        await release.wait()
        return web.Response()

    gateway = await open_gateway(**SETTINGS | {"webhook_timeout_ms": 200})
    receiver.answers = [silent]
    slow = await gateway.submit(data="Explain the tide", webhook_url=receiver.url)
    await wait_until(lambda: receiver.received, 20)
    other = await gateway.submit(data="Explain the moon", webhook_url=receiver.url)
    await _settled(gateway, other)
    shown = await _settled(gateway, slow)
    assert shown["tries"] >= 2
    release.set()


async def test_receivers_of_one_tenant_that_never_answer_hold_up_no_other_tenant(
    open_gateway: Opener, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "MOST_AT_ONCE", 4)
    gateway = await open_gateway(**SETTINGS | {"webhook_timeout_ms": 60_000})
    release = asyncio.Event()

    async def silent() -> web.StreamResponse:
        await release.wait()
        return web.Response()

    async def submit(tenant: str, url: str) -> None:
        body = {"data": "Explain the tide", "webhook_url": url}
        headers = {"x-tidegate-tenant": tenant}
        async with gateway.http.post(f"{gateway.url}/submit", json=body, headers=headers) as got:
            assert got.status == 202, await got.read()

    async with receiving() as tarpit:
        tarpit.answers = [silent] * 8
        for _ in range(8):
            await submit("alice", tarpit.url)
        await wait_until(lambda: len(tarpit.received) == 2, 20, "alice's half")
        await submit("bob", receiver.url)
        await wait_until(lambda: receiver.received, 20, "bob is told")
        assert len(tarpit.received) == 2
        release.set()
        await wait_until(lambda: len(tarpit.received) == 8, 20, "all of alice's")


async def test_an_endless_answer_is_not_read(open_gateway: Opener, receiver: Receiver) -> None:
    gateway = await open_gateway(**SETTINGS)
    sent, closed = [0], asyncio.Event()

    class Endless(web.StreamResponse):
        async def write_eof(self, data: bytes = b"") -> None:
            try:
                while True:
                    await self.write(bytes(65_536))
                    sent[0] += 65_536
            finally:
                closed.set()

    async def endless() -> web.StreamResponse:
        return Endless()

    receiver.answers = [endless]
    request_id = await gateway.submit(data="Explain the tide", webhook_url=receiver.url)
    assert (await _settled(gateway, request_id))["tries"] == 1
    await asyncio.wait_for(closed.wait(), 5)
    assert sent[0] < 50_000_000


@pytest.mark.parametrize("private", [False, True])
async def test_addresses_that_are_not_public_are_refused_unless_allowed(
    private: bool, open_gateway: Opener, receiver: Receiver
) -> None:
    gateway = await open_gateway(**SETTINGS | {"webhook_allow_private": private})
    for url in (receiver.url, "http://10.0.0.1/x", "https://localhost/x", "http://[::1]:8080/"):
        body = {"data": "Explain the tide", "webhook_url": url}
        async with gateway.http.post(f"{gateway.url}/submit", json=body) as response:
            answer = orjson.loads(await response.read())
            assert response.status == (202 if private else 422), answer
            if not private:
                assert (answer["field"], answer["code"]) == ("webhook_url", "fetch_refused")
                assert "webhook_url" in answer["detail"]


async def test_a_name_that_leads_to_a_private_address_is_not_connected_to(
    open_gateway: Opener, receiver: Receiver
) -> None:
    gateway = await open_gateway(**SETTINGS | {"webhook_allow_private": False})
    request_id = await gateway.submit(
        data="Explain the tide", webhook_url="https://example.com/hook"
    )
    # As a name would that was changed after it had been checked.
    rebound = receiver.url.replace("127.0.0.1", "localhost")
    await gateway.database.execute("UPDATE requests SET webhook_url = $1", rebound)
    await gateway.end_of(request_id)
    shown = await _settled(gateway, request_id, "given_up")
    assert "public" in shown["problem"]
    assert receiver.received == []


async def test_where_webhooks_are_off_or_make_no_sense_they_are_refused_by_name(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    hook = {"webhook_url": "https://example.com/hook"}
    body = {"data": "Explain the tide", **hook}
    async with gateway.http.post(f"{gateway.url}/submit", json=body) as response:
        problem = orjson.loads(await response.read())
        assert (response.status, problem["field"]) == (400, "webhook_url")
        assert "WEBHOOK_SECRET" in problem["allowed"]


async def test_a_tenant_that_verifies_its_webhooks_cannot_sign_those_of_another(
    open_gateway: Opener, receiver: Receiver
) -> None:
    changing = f"whsec_{'A' * 32}, {SECRET}"  # receivers still know the one before
    gateway = await open_gateway(**SETTINGS | {"webhook_secret": changing})
    headers = {"x-tidegate-tenant": "acme"}
    body = {"data": "Explain the tide", "webhook_url": receiver.url}
    async with gateway.http.post(f"{gateway.url}/submit", json=body, headers=headers) as response:
        assert response.status == 202
    await wait_until(lambda: receiver.received)
    assert receiver.received[0].is_signed("acme")
    assert not receiver.received[0].is_signed("default")
    assert webhook_secret_of(changing, "acme") == webhook_secret_of(f"whsec_{'A' * 32}", "acme")


async def test_the_secret_of_one_tenant_is_shown_to_the_operator(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, **SETTINGS)
    async with gateway.http.get(f"{gateway.url}/admin/tenants/default") as response:
        shown = await response.json()
    assert shown["webhook_secret"] == webhook_secret_of(SECRET, "default")
    assert shown["webhook_secret"] != SECRET
    async with gateway.http.get(f"{gateway.url}/admin/tenants") as response:
        assert [one["webhook_secret"] for one in await response.json()] == [None]


async def test_a_stream_has_no_webhook(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, **SETTINGS)
    refused = await gateway.stream(text="Explain", webhook_url="https://example.com/hook")
    assert (refused.status, refused.problem["field"]) == (400, "webhook_url")


async def test_a_long_text_is_left_to_the_status(open_gateway: Opener, receiver: Receiver) -> None:
    gateway = await open_gateway(**SETTINGS)
    await gateway.upstream.set_behaviour(answer="x" * 100_001)
    request_id = await gateway.submit(data="Explain the tide", webhook_url=receiver.url)
    await _settled(gateway, request_id)
    assert "text" not in receiver.received[0].event["data"]
    assert len((await gateway.status(request_id))["text"]) == 100_001


def test_the_signature_is_that_of_the_convention() -> None:
    # Computed apart: echo -n 'msg_1.1614265330.{"test":1}' | openssl dgst -sha256 -mac HMAC ...
    expected = "v1,dGhvIbuuuh6sCAEahCNcVz2Ffe++10anA4e/XwzNkyY="
    said = signature([b"n" * 24, b"k" * 24], "msg_1", 1614265330, b'{"test":1}').split(" ")
    assert said[1] == signature([b"k" * 24], "msg_1", 1614265330, b'{"test":1}') == expected
    assert said[0] not in ("", expected)
