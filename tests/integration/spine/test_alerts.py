"""Alerts for operators: of budgets, posted once each, signed or as Slack takes them."""

from __future__ import annotations

import hmac
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any
from uuid import uuid4

import pytest

from tests.gateway import Gateway, Opener
from tests.integration.spine.receiver import SECRET, Receiver, receiving
from tests.integration.tenants.asking import ask
from tests.waiting import wait_until
from tidegate.errors import UpstreamUnauthorized
from tidegate.jobs import webhooks
from tidegate.prices.budgets import Budget
from tidegate.spine.routing import Suspect


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "_ALERTS_EVERY_S", 0.02)
    monkeypatch.setattr(webhooks, "webhook_wait_ms", lambda tries: 20 if tries < 4 else None)


async def spend(gateway: Gateway) -> None:
    """Reach half of a budget of a person, and then the end of another."""
    budgets = gateway.services.budgets
    for one in (
        Budget("half", "tokens", 400, "day", each=("subject",), alerts=(1, 90)),
        Budget("out", "tokens", 500, "day", tenant="acme"),
    ):
        await budgets.records.set(one, by="test")
    await budgets.refresh()
    url = f"{gateway.url}/v1/chat/completions"
    message = {"role": "user", "content": "Hi"}
    body: dict[str, Any] = {"model": "m", "messages": [message], "max_tokens": 20}
    headers = {"x-tidegate-subject": "ann"}
    async with gateway.http.post(url, json=body, headers=headers) as response:
        assert response.status == 200
    for _ in range(2):
        acme = {"x-tidegate-tenant": "acme"}
        async with gateway.http.post(url, json=body | {"max_tokens": 700}, headers=acme) as out:
            assert out.status == 429


async def test_alerts_of_budgets_are_signed_and_posted_once(
    open_gateway: Opener, receiver: Receiver
) -> None:
    receiver.answers = [500]  # then it works
    gateway = await open_gateway(alert_webhook_url=f"{receiver.url}/alerts", webhook_secret=SECRET)
    await spend(gateway)
    done = "SELECT count(*) FROM alerts WHERE state = 'delivered'"

    async def both() -> bool:
        return bool(await gateway.database.fetchval(done) == 2)

    await wait_until(both, 20, "both alerts")
    told = {one.event["type"]: one for one in receiver.received}
    assert set(told) == {"budget_share", "budget_out"}
    share = told["budget_share"].event["data"]
    assert (share["budget"], share["scope"], share["share"]) == ("half", ["ann"], 1)
    assert share["text"].startswith("Budget half of ann: ")
    assert share["text"].endswith(" of 400 tokens spent, which is 1 % or more.")
    assert "a call was rejected" in told["budget_out"].event["data"]["text"]
    key = b64decode(SECRET.removeprefix("whsec_"))
    for one in told.values():
        signed = f"{one.headers['webhook-id']}.{one.headers['webhook-timestamp']}.".encode()
        digest = hmac.digest(key, signed + one.body, sha256)
        assert one.headers["webhook-signature"] == f"v1,{b64encode(digest).decode()}"
    assert len(receiver.received) == 3


async def test_what_lasts_beside_budgets_is_posted_once_however_many_workers_look(
    open_gateway: Opener, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "_CAUSES_EVERY_S", 0.05)
    monkeypatch.setattr(webhooks, "_HELD_S", 0.2)
    gateway = await open_gateway(alert_webhook_url=receiver.url, webhook_secret=SECRET)
    await gateway.start_ready_worker()
    as_operator = {"Authorization": f"Bearer {gateway.operator_key}"}
    pauses = {"for_ms": 600_000, "reason": "a test"}
    for limit in ("kind:text_only", "kind:multi_modal"):
        status, _ = await ask(gateway, "POST", f"/admin/limits/{limit}/pause", as_operator, pauses)
        assert status == 200
    gate = gateway.services.spine.health["gemini"]
    error = UpstreamUnauthorized("not a key", status=401)
    await gate.failed(error, "m", suspect=Suspect(None, 1), tried=False)
    expected = {
        ("limit_paused", "kind:text_only"),
        ("limit_paused", "kind:multi_modal"),
        ("key_refused", "gemini"),
    }

    def told() -> list[tuple[str, str | None]]:
        return [(one.event["type"], one.event["data"]["subject"]) for one in receiver.received]

    await wait_until(lambda: expected <= set(told()), 20, "three alerts")
    # Once all processes have heard of the key, there is no other upstream.
    assert Counter(told()) <= Counter([*expected, ("upstreams_out", None)])


async def test_slack_gets_a_text_without_a_secret(open_gateway: Opener, receiver: Receiver) -> None:
    gateway = await open_gateway(alert_webhook_url=receiver.url, alert_format="slack")
    text = "Budget a&b of <!channel>, <https://x.example|ann>: $4 of $5 spent."  # a caller's names
    await gateway.services.store.alerts.add("budget_share", {"text": text})
    await wait_until(lambda: receiver.received, 20, "the alert")
    (told,) = receiver.received
    shown = "Budget a&amp;b of &lt;!channel&gt;, &lt;https://x.example|ann&gt;: $4 of $5 spent."
    assert told.event == {"text": shown}
    assert "webhook-signature" not in told.headers


async def test_operators_see_what_was_posted_send_a_test_and_post_again(
    open_gateway: Opener, receiver: Receiver
) -> None:
    receiver.answers = [410]  # given up immediately
    gateway = await open_gateway(
        alert_webhook_url=f"{receiver.url}/of-a-secret", alert_format="slack", auth="on"
    )
    as_operator = {"Authorization": f"Bearer {gateway.operator_key}"}

    async def asked(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return await ask(gateway, method, f"/admin/alerts{path}", as_operator, body)

    status, found = await asked("GET", "")
    assert (status, found["items"], found["health"]) == (200, [], "healthy")
    assert found["channel"] == {"place": "http://127.0.0.1", "format": "slack", "is_signed": False}
    assert (await asked("POST", "/test", {"by": "ada"}))[0] == 202

    async def newest() -> dict[str, Any]:
        return dict((await asked("GET", ""))[1]["items"][0])

    async def is_(state: str) -> bool:
        return bool((await newest())["state"] == state)

    await wait_until(lambda: is_("given_up"), 20, "a refused alert")
    alert = await newest()
    assert (alert["kind"], alert["tries"], alert["due_at"]) == ("test", 1, None)
    assert alert["text"] == "A test alert, requested by ada."
    assert alert["problem"] == "answered with status 410"

    async def causes() -> list[str]:
        found = (await asked("GET", ""))[1]
        assert (found["health"] == "degraded") is bool(found["causes"])
        return [cause["kind"] for cause in found["causes"]]

    async def is_shown() -> bool:
        return await causes() == ["alerts_given_up"]

    await wait_until(is_shown, 20, "a deployment whose alerts go nowhere")
    assert (await asked("POST", f"/{alert['id']}/redeliver", {}))[0] == 202
    await wait_until(lambda: is_("delivered"), 20, "an alert that was posted again")

    async def is_over() -> bool:
        return not await causes()

    await wait_until(is_over, 20, "a deployment whose alerts are posted")
    assert receiver.received[-1].body == b'{"text":"A test alert, requested by ada."}'
    assert (await asked("POST", f"/{uuid4()}/redeliver", {}))[0] == 404


async def test_no_test_is_sent_where_alerts_go_nowhere(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    as_operator = {"Authorization": f"Bearer {gateway.operator_key}"}
    status, problem = await ask(gateway, "POST", "/admin/alerts/test", as_operator, {})
    assert (status, problem["field"]) == (400, "alert_webhook_url")
    assert (await ask(gateway, "GET", "/admin/alerts", as_operator))[1]["channel"]["place"] is None
