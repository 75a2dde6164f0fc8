"""What a process holds of bodies, by tenant; and how slow their clients may be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from anyio import to_thread
from starlette.types import Message

from tidegate.errors import QueueFull, RequestTimeout
from tidegate.http.body import BodyBudget, BodyMemory, Incoming, MemoryBound, Pace, Patience

MB = 1_000_000
SHARED = MemoryBound(250 * MB, 100 * MB, shared=True)


def test_one_tenant_leaves_room_for_all_others() -> None:
    bodies = BodyMemory()
    BodyBudget(bodies, SHARED, "alice").reach(83 * MB)
    for _ in range(100):
        with pytest.raises(QueueFull) as full:
            BodyBudget(bodies, SHARED, "alice").reach(83 * MB)
        assert (full.value.limit, full.value.retry_after_ms) == ("MAX_HELD_BYTES", 1_000)
    assert bodies.of_tenants == {"alice": 83 * MB}
    for tenant in ("bob", "carol", "dave", "erin"):
        hold = BodyBudget(bodies, SHARED, tenant)
        hold.reach(200_000)
        hold.release()
        most = (SHARED.most_bytes - bodies.held_bytes) // 2
        with pytest.raises(QueueFull, match=f"of tenant {tenant}"):
            BodyBudget(bodies, SHARED, tenant).reach(most + 1)
        BodyBudget(bodies, SHARED, tenant).reach(most)
    assert bodies.held_bytes < SHARED.most_bytes


def test_the_largest_body_fits_where_nobody_else_holds_any() -> None:
    bodies, room = BodyMemory(), MemoryBound(100 * MB, 100 * MB, shared=True)
    first = BodyBudget(bodies, room, "alice")
    first.reach(100 * MB)
    with pytest.raises(QueueFull):
        BodyBudget(bodies, room, "alice").reach(70_000)
    first.release()
    first.release()
    assert (bodies.held_bytes, bodies.of_tenants) == (0, {})


def test_without_keys_there_are_no_shares() -> None:
    bodies, room = BodyMemory(), MemoryBound(100 * MB, 60 * MB, shared=False)
    BodyBudget(bodies, room, "default").reach(60 * MB)
    hold = BodyBudget(bodies, room, "default")
    hold.reach(40 * MB)
    with pytest.raises(QueueFull, match="of requests"):
        hold.reach(40 * MB + 1)
    assert bodies.held_bytes == 100 * MB


def test_what_came_fast_pays_for_no_trickle() -> None:
    pace = Pace(silence_ms=15_000)
    patience = Patience(pace, in_memory=False)
    patience.waited(0.5, 83 * MB)
    assert patience.left_s() == 15
    for _ in range(3):
        patience.waited(4, 1)  # a byte every 4 s, as a client that only wants to hold what it has
    assert 2.9 < patience.left_s() < 3.1
    patience.waited(4, 1)
    assert patience.left_s() == 0


def test_a_client_that_keeps_the_pace_is_heard_and_one_in_memory_no_longer_than_ten_minutes() -> (
    None
):
    pace = Pace(silence_ms=15_000)
    on_disk, in_memory = Patience(pace, in_memory=False), Patience(pace, in_memory=True)
    for _ in range(120):
        on_disk.waited(10, 10 * 1024)
        in_memory.waited(10, 10 * 1024)
    assert (on_disk.left_s(), in_memory.left_s()) == (15, 0)


async def test_a_native_body_that_trickles_is_ended() -> None:
    sent = 0

    async def receive() -> Message:
        nonlocal sent
        sent += 1
        if sent == 1:
            return {"type": "http.request", "body": b"x" * MB, "more_body": True}
        waited = asyncio.Event()
        asyncio.get_running_loop().call_later(0.02, waited.set)
        await waited.wait()
        return {"type": "http.request", "body": b"x", "more_body": True}

    task = asyncio.current_task()
    assert task is not None
    pace = Pace(silence_ms=5_000, grace_ms=100)
    incoming = Incoming(receive, task, pace, max_bytes=10 * MB, in_memory=True)
    bodies = BodyMemory()
    with pytest.raises(RequestTimeout):
        await incoming.whole(BodyBudget(bodies, SHARED, "alice"))
    assert bodies.held_bytes >= MB
    assert sent < 50
    incoming.release()
    assert bodies.held_bytes == 0


@pytest.mark.parametrize(("pieces", "copies"), [(1, 0), (3, 1)])
async def test_a_large_body_is_copied_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, pieces: int, copies: int
) -> None:
    left, copied = pieces, 0

    async def receive() -> Message:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": b"x" * (MB // 2), "more_body": left > 0}

    async def run_sync(work: Callable[..., Any], *given: Any) -> Any:
        nonlocal copied
        copied += 1
        return work(*given)

    monkeypatch.setattr(to_thread, "run_sync", run_sync)
    task = asyncio.current_task()
    assert task is not None
    incoming = Incoming(receive, task, Pace(silence_ms=5_000), max_bytes=10 * MB, in_memory=True)
    assert await incoming.whole() == b"x" * (pieces * MB // 2)
    assert copied == copies
