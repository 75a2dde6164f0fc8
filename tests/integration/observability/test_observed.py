"""Every call that ends is told to those who count, once, whatever ended it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.gateway import Gateway, Opener
from tests.integration.observability.test_metrics import of, scraped
from tests.waiting import wait_until
from tidegate.dashboard.rollup import count
from tidegate.record import CallListeners, CallRecord

MODEL = "gemini-2.5-flash"
FIRST_BYTE_MS = 150
# Counted from the end of sending: by then the upstream may have begun.
LEAST_MS = FIRST_BYTE_MS - 50
PRICES = """
[upstreams.gemini.prices]
"*" = { input = 0.30, output = 2.50 }
"""


def ended() -> CallRecord:
    record = CallRecord("relay", "default", datetime.now(UTC))
    record.end("succeeded")
    return record


class Seen:
    """All that was told by the processes of a gateway."""

    def __init__(self) -> None:
        self.ends: list[CallRecord] = []

    def take(self, batch: Sequence[CallRecord]) -> None:
        self.ends.extend(batch)

    async def told(self, count: int) -> list[CallRecord]:
        """Wait for that many."""
        await wait_until(lambda: len(self.ends) >= count, 20, f"{count} ends")
        return self.ends


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Listens in every process of this event loop, the workers too."""
    found, made = Seen(), CallListeners.__init__

    def listening(listeners: CallListeners) -> None:
        made(listeners)
        listeners.listen(found.take)

    monkeypatch.setattr(CallListeners, "__init__", listening)
    return found


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}]} | more


async def posted(gateway: Gateway, path: str, body: Any, **headers: str) -> int:
    async with gateway.http.post(gateway.url + path, json=body, headers=headers) as response:
        await response.read()
        return response.status


async def test_each_way_to_call_is_told_with_its_first_byte_and_its_cost(
    open_gateway: Opener, seen: Seen, tmp_path: Path
) -> None:
    path = tmp_path / "tidegate.toml"
    path.write_text(PRICES)
    gateway = await open_gateway(tidegate_policy=path)
    await gateway.upstream.set_behaviour(first_byte_ms=FIRST_BYTE_MS)
    plain = await gateway.submit(data="Explain the tide")
    wrapped = await gateway.submit(endpoint="/v1/chat/completions", body=chat("Say hello"))
    streamed = await gateway.stream(data="Explain the ebb")
    assert await posted(gateway, "/v1/chat/completions", chat("Hi", stream=True)) == 200
    assert await posted(gateway, f"/v1beta/models/{MODEL}:generateContent", _gemini("Hi")) == 200
    for job in (plain, wrapped):
        record = await gateway.end_of(job)
        assert LEAST_MS <= record["first_byte_ms"] <= record["upstream_ms"]
        (attempt,) = await gateway.attempts(job)
        assert attempt["first_byte_ms"] == pytest.approx(record["first_byte_ms"], abs=0.1)
    assert (await gateway.recorded(streamed.request_id))["first_byte_ms"] >= LEAST_MS
    ends = await seen.told(5)
    ways = Counter((one.source, one.dialect, one.operation, one.streamed) for one in ends)
    assert ways == {
        ("job", "gemini", "generate_content", False): 1,
        ("job", "openai", "chat", False): 1,
        ("stream", "gemini", "generate_content", True): 1,
        ("relay", "openai", "chat", True): 1,
        ("relay", "gemini", "generate_content", False): 1,
    }
    for one in ends:
        assert (one.status, one.upstream, one.pool, one.model) == (
            *("succeeded", "gemini", "gemini"),
            MODEL,
        )
        assert one.answer.first_byte_ms is not None
        assert one.upstream_ms is not None
        assert LEAST_MS <= one.answer.first_byte_ms <= one.upstream_ms
        assert one.attempts == 1
        assert one.charge.usage.input_tokens is not None
        assert one.charge.usage.output_tokens is not None
        made = one.charge.usage.output_tokens + (one.charge.usage.thoughts_tokens or 0)
        assert one.charge.cost_micros == round(one.charge.usage.input_tokens * 0.30 + made * 2.50)
    row = await gateway.audit(wrapped)
    assert (row["usage_state"], row["cost_micros"] > 0) == ("told", True)


def _gemini(text: str) -> dict[str, Any]:
    return {"contents": [{"role": "user", "parts": [{"text": text}]}]}


async def test_what_is_refused_cancelled_expired_or_tried_again_is_told_too(
    open_gateway: Opener, seen: Seen
) -> None:
    gateway = await open_gateway(worker=False)
    assert await posted(gateway, "/v1/nothing", {}) == 404
    assert await posted(gateway, "/v1/chat/completions", "no object") == 400
    assert await posted(gateway, "/submit", {"priority": 1}) == 400
    assert await posted(gateway, "/stream", {"data": "x", "priority": 1_000}) == 400
    request_id = await gateway.submit(data="Explain the tide")
    async with gateway.http.delete(f"{gateway.url}/requests/{request_id}") as response:
        assert response.status == 200
    await gateway.submit(data="Explain the ebb", deadline_ms=1)
    gateway.start_worker()
    told = {(one.source, one.status, one.code, one.http_status) for one in await seen.told(6)}
    assert told == {
        ("relay", "refused", "not_found", 404),
        ("relay", "failed", "invalid_request", 400),
        ("job", "refused", "invalid_request", 400),
        ("stream", "refused", "invalid_request", 400),
        ("job", "cancelled", "cancelled", 0),
        ("job", "expired", "deadline_exceeded", 0),
    }
    seen.ends.clear()
    await gateway.upstream.set_fault("throttled", retry_after_s=0.01, count=1)
    await gateway.end_of(await gateway.submit(data="Explain the flood"))
    await gateway.upstream.set_fault("throttled", retry_after_s=0.01, count=1)
    assert await posted(gateway, "/v1/chat/completions", chat("Hi")) == 200
    tries = [(one.source, one.status, one.attempts, one.throttled) for one in await seen.told(3)]
    assert sorted(tries) == [
        ("job", "retried", 1, 1),
        ("job", "succeeded", 1, 0),
        ("relay", "succeeded", 2, 1),
    ]


async def test_a_listener_that_fails_fails_nobody_else(capsys: pytest.CaptureFixture[str]) -> None:
    def failing(_batch: Sequence[CallRecord]) -> None:
        raise ValueError("of a listener")

    seen, listeners = Seen(), CallListeners()
    listeners.listen(failing)
    listeners.listen(seen.take)
    listeners.note(ended())
    listeners.flush()
    listeners.flush()
    assert len(seen.ends) == 1
    assert "of a listener" in capsys.readouterr().out


async def test_a_question_of_the_classifier_is_a_call_of_its_own_and_no_request(
    open_gateway: Opener, seen: Seen, tmp_path: Path
) -> None:
    path = tmp_path / "tidegate.toml"
    path.write_text(PRICES)
    gateway = await open_gateway(
        tidegate_policy=path,
        worker=False,
        classifier="llm",
        classifier_timeout_ms=3_500,  # of which an answer takes little, on a busy machine too
    )
    await gateway.upstream.set_fault("unavailable", count=1)
    for text in ("Explain the tide", "Explain the ebb"):
        assert (await gateway.stream(text=text)).status == 200
    await gateway.upstream.set_behaviour(first_byte_ms={"classifier": 5_000})
    assert (await gateway.stream(text="Explain the flood")).status == 200
    await seen.told(6)
    asked = [one for one in seen.ends if one.source == "judge"]
    assert [(one.status, one.code, one.attempts) for one in asked] == [
        ("failed", "upstream_unavailable", 1),
        ("succeeded", None, 1),
        ("cancelled", None, 1),
    ]
    for one in asked:
        assert (one.pool, one.upstream, one.kind, one.model) == (
            *("gemini", "gemini", "classifier"),
            gateway.config.classifier_model,
        )
    judged = asked[1]
    (call,) = [
        one
        for one in await gateway.upstream.calls()
        if one.kind == "classifier" and one.outcome == "finished" and one.fault is None
    ]
    used = (judged.charge.usage.input_tokens, judged.charge.usage.output_tokens)
    assert used == (call.input_tokens, call.output_tokens)
    assert judged.charge.cost_micros == round(call.input_tokens * 0.30 + call.output_tokens * 2.50)
    await _is_counted_for_no_tenant(gateway, seen.ends)


async def _is_counted_for_no_tenant(gateway: Gateway, ends: Sequence[CallRecord]) -> None:
    answered = [one for one in ends if one.source == "stream"]
    values = await scraped(gateway)
    assert of(values, "tidegate_calls_total", source="judge", kind="classifier") == 3
    assert of(values, "tidegate_failures_total", source="judge") == 2
    assert of(values, "tidegate_tenant_calls_total") == len(answered) == 3
    for name, which in (
        ("tidegate_tokens_total", ends),
        ("tidegate_tenant_tokens_total", answered),
    ):
        assert of(values, name, type="input") == sum(
            one.charge.usage.input_tokens or 0 for one in which
        )
    for name, which in (("tidegate_cost_total", ends), ("tidegate_tenant_cost_total", answered)):
        spent = sum(one.charge.cost_micros or 0 for one in which) / 1e6
        assert of(values, name) == pytest.approx(spent)
    tally = count(*ends)
    assert (tally.counts["calls"], tally.counts["succeeded"], tally.counts["judged"]) == (3, 3, 3)
    assert "failed" not in tally.counts
    judged = [one for one in ends if one.source == "judge"]
    assert (
        tally.counts["judged_cost_micros"] == sum(one.charge.cost_micros or 0 for one in judged) > 0
    )
    assert tally.counts["cost_micros"] == sum(one.charge.cost_micros or 0 for one in ends)
    tenants, models = tally.by_group["tenant"].values(), tally.by_group["model"].values()
    assert sum(row[0] for row in tenants) == 3
    assert sum(row[0] for row in models) == 6
    assert sum(row[4] for row in tenants) == sum(one.charge.cost_micros or 0 for one in answered)
    assert sum(row[4] for row in models) == tally.counts["cost_micros"]
