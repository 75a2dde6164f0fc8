"""A worker killed by -9 in the worst moment: what it owed is done by another."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.fleet import Fleet
from tests.integration.spine.receiver import SECRET, Receiver, receiving
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

SETTINGS = {
    "WEBHOOK_SECRET": SECRET,
    "WEBHOOK_ALLOW_PRIVATE": "1",
    "WEBHOOK_TIMEOUT_MS": "1000",
}


async def _submit(fleet: Fleet, **body: Any) -> str:
    async with fleet.http.post(f"{fleet.url}/submit", json=body) as response:
        accepted = await response.json()
        assert response.status == 202, accepted
        return str(accepted["request_id"])


async def test_what_a_killed_worker_owed_is_done_by_another(tmp_path: Path) -> None:
    async with (
        receiving() as receiver,
        Fleet(tmp_path / "fleet", apis=1, workers=1, settings=SETTINGS) as fleet,
    ):
        await _cancel_that_was_to_be_heeded(fleet)
        request_id = await _large_call_under_way(fleet)
        await _webhook_that_was_to_be_delivered(fleet, receiver)
        await _large_call_is_made_again(fleet, request_id)


async def _cancel_that_was_to_be_heeded(fleet: Fleet) -> None:
    await fleet.control.set_fault("hang", match="forever")
    request_id = await _submit(fleet, data="Explain forever")

    async def called() -> bool:
        return (await fleet.truth()).in_flight == 1

    await wait_until(called, 15)
    fleet.workers[-1].kill()
    async with fleet.http.delete(f"{fleet.url}/requests/{request_id}") as response:
        assert (response.status, (await response.json())["status"]) == (202, "running")
    fleet.start_worker()
    record = await fleet.end_of(request_id, 30)
    assert (record["status"], record["attempts"]) == ("cancelled", 1)
    assert (await fleet.truth())["text_only"].arrived == 1


async def _webhook_that_was_to_be_delivered(fleet: Fleet, receiver: Receiver) -> None:
    never = asyncio.Event()

    async def silent() -> web.StreamResponse:
        await never.wait()
        return web.Response()

    receiver.answers = [silent]
    request_id = await _submit(fleet, data="Explain the tide", webhook_url=receiver.url)
    await wait_until(lambda: receiver.received, 15, "the first delivery")
    fleet.workers[-1].kill()
    assert (await fleet.status(request_id))["webhook"]["state"] == "pending"
    fleet.start_worker()
    await wait_until(lambda: len(receiver.received) == 2, 15, "the second delivery")
    first, second = receiver.received
    assert second.is_signed()
    assert second.webhook_id == first.webhook_id
    assert second.event == first.event
    assert second.event["data"]["request_id"] == request_id

    async def delivered() -> bool:
        shown = (await fleet.status(request_id))["webhook"]
        return (shown["state"], shown["tries"]) == ("delivered", 2)

    await wait_until(delivered, 20)
    assert len(await fleet.control.calls(contains="the tide")) == 1


async def _large_call_under_way(fleet: Fleet) -> str:
    await fleet.control.set_fault("hang", match="the ebb", count=1)
    text = "Explain the ebb " + "and the flow " * 30_000
    body = {"model": "gemini-2.5-flash", "messages": [{"role": "user", "content": text}]}
    request_id = await _submit(fleet, endpoint="/v1/chat/completions", body=body)

    async def called() -> bool:
        return len(await fleet.control.calls(contains="the ebb")) == 1

    await wait_until(called, 15)
    return request_id


async def _large_call_is_made_again(fleet: Fleet, request_id: str) -> None:
    """Its body is a file: whoever takes it over reads it again."""
    record = await fleet.end_of(request_id, 30)
    assert (record["status"], record["attempts"]) == ("succeeded", 2)
    first, second = await fleet.control.calls(contains="the ebb")
    assert first.prompt_sha == second.prompt_sha
