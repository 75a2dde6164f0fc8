"""Jobs in the flex tier: half the price, put off while it has no capacity, live in time for their
deadline; one id and one record whatever the tier."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until
from tidegate.admission import charges
from tidegate.emulator.server import Emulator, run_emulator

CHAT = "/v1/chat/completions"
SOON = {"flex_within_ms": 500}


@pytest.fixture
async def provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Emulator]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-calls")
    async with run_emulator() as emulator:
        (tmp_path / "tidegate.toml").write_text(
            f"""
            [upstreams.oai]
            provider = "openai"
            base_url = "{emulator.url}/v1"
            key = "OPENAI_API_KEY"
            models = ["gpt-*"]

            [upstreams.oai.prices]
            "gpt-4o" = {{ input = 2.5, output = 10.0, tiers = {{ flex = {{ share = 0.5 }} }} }}

            [upstreams.gemini.prices]
            "gemini-*" = {{ input = 0.3, output = 2.5, tiers = {{ flex = {{ share = 0.5 }} }} }}
            """
        )
        await emulator.control.set_behaviour(answer="word " * 40)
        yield emulator


@pytest.fixture
def policy(tmp_path: Path, provider: Emulator) -> Path:
    return tmp_path / "tidegate.toml"


def wrapped(text: str, model: str = "gpt-5", **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    return {"endpoint": CHAT, "body": body, **more}


async def tiers_called(provider: Emulator) -> list[tuple[str, str | None]]:
    return [(call.tier, call.outcome) for call in await provider.control.calls()]


async def test_a_wrapped_call_and_a_prompt_cost_half_in_flex(
    open_gateway: Opener, provider: Emulator, policy: Path
) -> None:
    gateway = await open_gateway(tidegate_policy=policy)
    usual = await gateway.end_of(await gateway.submit(**wrapped("Why?")))
    record = await gateway.end_of(await gateway.submit(**wrapped("Why?", tiers=["flex"])))
    assert (record["status"], record["tier"]) == ("succeeded", "flex")
    assert record["tier_why"] == "flex costs 50% of the usual price"
    assert record["usage"]["tier"] == "flex"
    assert record["answer"]["service_tier"] == "flex"
    assert abs(2 * record["cost_micros"] - usual["cost_micros"]) <= 1
    assert "tier" not in usual
    assert await tiers_called(provider) == [("", "finished"), ("flex", "finished")]

    asked = {"data": "Explain the tide", "type": "text_only"}
    plain = await gateway.end_of(await gateway.submit(**asked))
    prompt = await gateway.end_of(await gateway.submit(**asked, tiers=["live", "flex", "batch"]))
    assert (prompt["status"], prompt["tier"], prompt["usage"]["tier"]) == (
        *("succeeded", "flex", "flex"),
    )
    assert abs(2 * prompt["cost_micros"] - plain["cost_micros"]) <= 1
    assert [call.tier for call in await gateway.calls()] == ["", "flex"]
    path = f"/admin/requests/{record['request_id']}"
    _, detail = await gateway.get(path)
    assert detail["request"]["tier"] == "flex"
    listed = (await gateway.get("/admin/requests"))[1]["items"]
    assert [one.get("tier") for one in listed] == ["flex", None, "flex", None]
    async with gateway.http.post(f"{gateway.url}{path}/retry", json={}) as answer:
        again = await gateway.end_of((await answer.json())["request_id"])
    assert again["tier"] == "flex", "what is submitted again costs what it was to cost"
    assert again["cost_micros"] == record["cost_micros"]


async def test_the_tier_of_a_job_is_shown_while_it_waits_for_its_permit(
    open_gateway: Opener, provider: Emulator, policy: Path
) -> None:
    gateway = await open_gateway(tidegate_policy=policy)
    limiter = gateway.services.limiters["oai"]
    url, change = f"{gateway.url}/admin/limits?pool=oai", {"set": {"model:gpt-5": 1}}
    async with gateway.http.patch(url, json=change) as answer:
        assert answer.status == 200, await answer.text()
    due: dict[str, Any] = {"deadline_ms": 600_000}
    async with limiter.acquire("model:gpt-5"):
        waiting = [
            await gateway.submit(**wrapped("Wait", tiers=["flex"], **more)) for more in ({}, due)
        ]
        for request_id, tier in zip(waiting, ("flex", "live"), strict=True):

            async def is_shown(request_id: str = request_id) -> Any:
                return (status := await gateway.status(request_id)).get("tier") and status

            status = await wait_until(is_shown, 20, "the tier of a job that waits")
            assert (status["status"], status["tier"]) == ("queued", tier)
            assert tier in status["tier_why"]
    for request_id, tier in zip(waiting, ("flex", "live"), strict=True):
        assert (await gateway.end_of(request_id))["tier"] == tier


async def test_flex_without_capacity_pauses_nothing_and_costs_no_attempt(
    open_gateway: Opener, provider: Emulator, policy: Path
) -> None:
    gateway = await open_gateway(tidegate_policy=policy)
    await provider.control.set_behaviour(flex={"busy_share": 1})
    waiting = await gateway.submit(**wrapped("Patient", tiers=["flex"]))

    async def refused() -> bool:
        return len(await gateway.attempts(waiting)) >= 1 and "error" in await gateway.status(
            waiting
        )

    await wait_until(refused, 20, "a refusal")
    status = await gateway.status(waiting)
    assert (status["status"], status["error"]["code"]) == ("queued", "upstream_tier_busy")
    assert gateway.services.spine.health["oai"].state == "ok"
    for limiter in gateway.services.limiters.values():
        assert not limiter.has_pauses
    live = await gateway.end_of(await gateway.submit(**wrapped("Hurried")))
    assert live["status"] == "succeeded"
    await provider.control.set_behaviour(flex={"busy_share": 0})
    record = await gateway.end_of(waiting)
    assert (record["status"], record["tier"], record["attempts"]) == ("succeeded", "flex", 1)
    assert "error" not in record


async def learned(gateway: Gateway) -> None:
    """Let the worker see how long a live call takes."""
    assert (await gateway.end_of(await gateway.submit(**wrapped("First"))))["status"] == "succeeded"


@pytest.mark.parametrize("flex", [{"busy_share": 1}, {"delay_ms": 60_000}])
async def test_a_job_is_live_in_time_for_its_deadline(
    open_gateway: Opener,
    provider: Emulator,
    policy: Path,
    flex: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(charges, "SLACK_MS", 3_000.0)
    gateway = await open_gateway(tidegate_policy=policy, **SOON)
    await learned(gateway)
    await provider.control.set_behaviour(flex=flex)
    request_id = await gateway.submit(**wrapped("Due", tiers=["flex"], deadline_ms=5_500))
    record = await gateway.end_of(request_id)
    assert (record["status"], record["tier"], record["attempts"]) == ("succeeded", "live", 1)
    assert record["finished_at"] < record["deadline_at"]
    assert "flex may take" in record["tier_why"]
    assert "tier" not in record["usage"]
    called = await tiers_called(provider)
    assert called[0] == called[-1] == ("", "finished")
    assert {tier for tier, _ in called[1:-1]} == {"flex"}


async def test_a_job_that_is_due_soon_is_live_from_the_start(
    open_gateway: Opener, provider: Emulator, policy: Path
) -> None:
    gateway = await open_gateway(tidegate_policy=policy)
    request_id = await gateway.submit(**wrapped("Now", tiers=["flex"], deadline_ms=60_000))
    record = await gateway.end_of(request_id)
    assert (record["status"], record["tier"]) == ("succeeded", "live")
    assert await tiers_called(provider) == [("", "finished")]


async def test_what_flex_refuses_for_itself_is_asked_live(
    open_gateway: Opener, provider: Emulator, policy: Path
) -> None:
    gateway = await open_gateway(tidegate_policy=policy)
    record = await gateway.end_of(await gateway.submit(**wrapped("Why?", "gpt-4o", tiers=["flex"])))
    assert (record["status"], record["tier"], record["attempts"]) == ("succeeded", "live", 1)
    assert record["tier_why"] == "no cheaper tier is allowed and offered for its model"


async def test_a_tenants_tiers_are_those_of_its_jobs_unless_they_say_otherwise(
    open_gateway: Opener, provider: Emulator, policy: Path
) -> None:
    gateway = await open_gateway(tidegate_policy=policy, auth="on")
    tenants = gateway.services.store.tenants
    await tenants.set("acme", {"tiers": ["live", "flex"]}, by="test")
    _, made = await tenants.create_key("acme")
    gateway.http.headers["Authorization"] = f"Bearer {made.text}"
    assert (await gateway.end_of(await gateway.submit(**wrapped("Why?"))))["tier"] == "flex"
    own = wrapped("Why?", tiers=["live"])
    assert "tier" not in await gateway.end_of(await gateway.submit(**own))
    named = wrapped("Why?")
    named["body"]["service_tier"] = "priority"
    assert "tier" not in await gateway.end_of(await gateway.submit(**named))
    assert [tier for tier, _ in await tiers_called(provider)] == ["flex", "", "priority"]
