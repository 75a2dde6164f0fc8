"""Keys that are revoked while a request that they opened is still waiting for news."""

from __future__ import annotations

import asyncio

import pytest

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import ADMIN_TOKEN, ask, key_of, submitted
from tests.waiting import wait_until

ON = {"auth": "on", "admin_token": ADMIN_TOKEN, "worker": False}
SAID = "nothing for others"


async def revoked(gateway: Gateway, headers: dict[str, str]) -> None:
    prefix = headers["Authorization"].removeprefix("Bearer tg_").partition("_")[0]
    await gateway.services.store.tenants.revoke_key(prefix, by="test")
    await gateway.services.gate.refresh()


async def waited_for(gateway: Gateway) -> None:
    async def waits() -> bool:
        return "polls=2" in repr(gateway.services.openings)

    await wait_until(waits, 20, "two who wait")


@pytest.mark.parametrize("change", ["revoked", "disabled"])
async def test_whoever_waits_is_told_nothing_more(open_gateway: Opener, change: str) -> None:
    gateway = await open_gateway(**ON)
    other = await key_of(gateway, "acme", most_long_polls=10)
    acme = await key_of(gateway, "acme")
    job = await submitted(gateway, acme, data=f"Say {SAID}", type="text_only")
    polling = asyncio.create_task(ask(gateway, "GET", f"/status/{job}?wait=30", acme))
    following = asyncio.create_task(
        ask(gateway, "GET", f"/status/{job}", acme | {"Accept": "text/event-stream"})
    )
    await waited_for(gateway)
    if change == "revoked":
        await revoked(gateway, acme)
    else:
        await gateway.services.store.tenants.set("acme", {}, by="test", disabled=True)
        await gateway.services.gate.refresh()
    gateway.start_worker()
    status, problem = await polling
    assert status == (401 if change == "revoked" else 403)
    assert SAID not in str(problem)
    status, events = await following
    assert status == 200
    assert b'"queued"' in events
    assert b"event: done" not in events
    assert SAID.encode() not in events
    if change == "revoked":  # the tenant's other key goes on
        status, record = await ask(gateway, "GET", f"/status/{job}?wait=30", other)
        assert (status, record["status"]) == (200, "succeeded")
