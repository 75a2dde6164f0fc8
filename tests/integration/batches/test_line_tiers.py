"""Lines of batches in the flex tier, where their tenant allows it: half the price, none late."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types import Batch

from tests.batching import assert_all_succeeded, begin, content, end_of, jsonl, line
from tests.gateway import Gateway, Opener
from tests.integration.batches.conftest import MakeSdk
from tests.integration.spine.test_tiers import SOON, policy, provider, tiers_called
from tests.integration.tenants.asking import key_of
from tests.waiting import wait_until
from tidegate.admission import charges
from tidegate.emulator.server import Emulator
from tidegate.jobs import batches

__all__ = ["policy", "provider"]

MODEL = "gpt-5"
FLEX = ["live", "flex", "batch"]


async def client_of(
    gateway: Gateway, sdk: MakeSdk, tenant: str, tiers: list[str] | None
) -> AsyncOpenAI:
    key = (await key_of(gateway, tenant, tiers=tiers))["Authorization"].split()[1]
    return sdk(gateway, api_key=key, default_headers={})


async def costs_of(gateway: Gateway, tenant: str) -> list[int]:
    query = "SELECT cost_micros FROM audit WHERE tenant_id = $1 AND source = 'batch' ORDER BY 1"
    return [row["cost_micros"] for row in await gateway.database.fetch(query, tenant)]


async def called(provider: Emulator) -> Counter[tuple[str, str | None]]:
    return Counter(await tiers_called(provider))


async def test_lines_cost_half_in_flex_unless_they_name_a_tier(
    open_gateway: Opener, sdk: MakeSdk, provider: Emulator, policy: Any
) -> None:
    gateway = await open_gateway(tidegate_policy=policy, auth="on")
    usual = await client_of(gateway, sdk, "usual", None)
    cheap = await client_of(gateway, sdk, "cheap", FLEX)
    for client in (usual, cheap):
        batch = await end_of(client, await begin(client, content(8, model=MODEL)))
        await assert_all_succeeded(client, batch, 8)
    assert await called(provider) == {("", "finished"): 8, ("flex", "finished"): 8}
    full, half = await costs_of(gateway, "usual"), await costs_of(gateway, "cheap")
    assert all(abs(2 * one - other) <= 1 for one, other in zip(half, full, strict=True))

    own = line("own", "Say it", model=MODEL)
    own["body"]["service_tier"] = "priority"
    other = line("other", "Say it", model="gpt-4o")  # flex does not serve it
    done = await end_of(cheap, await begin(cheap, jsonl([own, other])))
    assert done.request_counts is not None
    assert done.request_counts.completed == 2
    now = await called(provider)
    assert (now["priority", "finished"], now["", "finished"]) == (1, 9)


async def test_lines_wait_for_flex_without_an_attempt_and_hold_up_no_others(
    open_gateway: Opener, sdk: MakeSdk, provider: Emulator, policy: Any
) -> None:
    gateway = await open_gateway(tidegate_policy=policy, auth="on")
    cheap = await client_of(gateway, sdk, "cheap", FLEX)
    usual = await client_of(gateway, sdk, "usual", None)
    await provider.control.set_behaviour(flex={"busy_share": 1})
    waiting = await begin(cheap, content(20, model=MODEL))

    async def is_refused() -> bool:
        return any(tier == "flex" for tier, _ in await tiers_called(provider))

    await wait_until(is_refused, 20, "a refusal")
    others = await end_of(usual, await begin(usual, content(5, model=MODEL)))
    await assert_all_succeeded(usual, others, 5)
    assert (await cheap.batches.retrieve(waiting.id)).status == "in_progress"
    assert gateway.services.spine.health["oai"].state == "ok"
    await provider.control.set_behaviour(flex={"busy_share": 0})
    await assert_all_succeeded(cheap, await end_of(cheap, waiting, 60), 20)
    rows = await gateway.database.fetch(
        "SELECT DISTINCT attempts FROM audit WHERE tenant_id = 'cheap' AND source = 'batch'"
    )
    assert [row["attempts"] for row in rows] == [1]


@pytest.mark.parametrize("flex", [{"busy_share": 1}, {"delay_ms": 60_000}])
async def test_lines_are_live_in_time_for_the_end_of_their_batch(
    open_gateway: Opener,
    sdk: MakeSdk,
    provider: Emulator,
    policy: Any,
    flex: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(charges, "SLACK_MS", 3_000.0)
    monkeypatch.setattr(charges, "_UNKNOWN_CALL_MS", 1_000.0)
    monkeypatch.setattr(batches, "EARLY_S", 14.0)
    gateway = await open_gateway(tidegate_policy=policy, auth="on", worker=False, **SOON)
    cheap = await client_of(gateway, sdk, "cheap", FLEX)
    await provider.control.set_behaviour(flex=flex)
    batch: Batch = await begin(cheap, content(4, model=MODEL))
    await gateway.database.execute("UPDATE batches SET expires_at = now() + interval '26 s'")
    gateway.start_worker()
    await assert_all_succeeded(cheap, await end_of(cheap, batch), 4)
    tiers = await called(provider)
    assert tiers["", "finished"] == 4
    assert any(tier == "flex" for tier, _ in tiers)
