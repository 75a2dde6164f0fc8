"""Claiming the lines of batches while their upstream is out, and while a claim hangs."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.waiting import wait_until
from tidegate.errors import UpstreamThrottled
from tidegate.jobs import calls
from tidegate.jobs.batches import LineCaller
from tidegate.jobs.calls import Feeder, LastTries, OwnLimits
from tidegate.jobs.outages import ClaimDepth, Held, Outages, Turn
from tidegate.jobs.worker import of_the_largest


class Lines:
    """Of no batch."""

    def __init__(self) -> None:
        self.claims = 0

    async def held_up(self) -> frozenset[Any]:
        return frozenset()

    async def claim(self, limit: int, most_bytes: int, without: object) -> list[Any]:
        self.claims += 1
        await asyncio.sleep(0)
        return []


async def a_batch_is_open() -> bool:
    return True


def line_caller(store: object, outages: Outages) -> LineCaller:
    used = (None, store, None, Held(outages, {}), LastTries(), OwnLimits(set), None)
    return LineCaller(*cast(Any, used))


async def test_a_process_without_lines_looks_once_for_a_probe_and_waits() -> None:
    now = [1000.0]
    outages = Outages({"gemini"}, clock=lambda: now[0])
    refused = UpstreamThrottled("later", retry_after_ms=1)
    outages.ended(Turn([("gemini", "")]), "gemini", refused)
    now[0] += 60
    assert outages.may_claim(100) == 1, "the next probe is due"
    outages.unclaimed()
    lines, waits = Lines(), asyncio.Event()

    async def wait_work(*_: object) -> None:
        waits.set()
        await asyncio.Event().wait()

    notifications = SimpleNamespace(work_mark=lambda _: 0, wait_work=wait_work)
    open_batches = SimpleNamespace(has_own=a_batch_is_open)
    store = SimpleNamespace(
        batch_lines=lines, notifications=notifications, open_batches=open_batches
    )
    caller = line_caller(store, outages)
    feeding = asyncio.create_task(caller.feed())
    try:
        await wait_until(lambda: waits.is_set() or lines.claims > 50, 20, "it waits for work")
    finally:
        feeding.cancel()
    assert lines.claims == 1


async def test_a_claim_that_hangs_fails_the_loop_which_then_claims_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls, "_LONGEST_CLAIM_S", 0.0)
    lines = Lines()

    async def hang(limit: int, most_bytes: int, without: object) -> list[Any]:
        lines.claims += 1
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(lines, "claim", hang)
    store = SimpleNamespace(
        batch_lines=lines,
        notifications=SimpleNamespace(work_mark=lambda _: 0),
        open_batches=SimpleNamespace(has_own=a_batch_is_open),
    )
    caller = line_caller(store, Outages(set()))
    for claims in (1, 2):
        feeding = asyncio.create_task(caller.feed())
        try:
            await wait_until(feeding.done, 5, "the end of a claim that hangs")
        finally:
            feeding.cancel()
        assert isinstance(feeding.exception(), TimeoutError)
        assert lines.claims == claims


@pytest.mark.parametrize("gather_s", [0.0, 600.0])
async def test_a_free_place_of_a_nearly_full_window_is_filled_after_a_while(
    monkeypatch: pytest.MonkeyPatch, gather_s: float
) -> None:
    monkeypatch.setattr(calls, "_GATHER_S", gather_s)
    claims: list[int] = []
    ends = [asyncio.Event() for _ in range(16)]

    async def claim(most: int) -> list[Any]:
        claims.append(most)
        begun = sum(claims[:-1])
        return [SimpleNamespace(request_id=n) for n in range(begun, begun + most)]

    async def work(job: Any) -> None:
        await ends[job.request_id].wait()

    feeder: Feeder[Any] = Feeder(
        cast(Any, SimpleNamespace(work_mark=lambda _: 0)),
        "text_only",
        Held(Outages(set()), {}),
        ClaimDepth(),
        lambda: 8,
        claim=claim,
        waits_ms=lambda _: {},
        release=cast(Any, None),
        work=work,
        idle_ms=1,
    )
    feeding = asyncio.create_task(feeder.run())
    await wait_until(lambda: claims == [8], 20, "a full window")
    ends[0].set()
    if gather_s:  # a quarter of the window is claimed together
        await wait_until(lambda: len(feeder.tasks) == 7, 20, "a free place")
        ends[1].set()
    await wait_until(lambda: len(claims) == 2, 20, "the next claim")
    assert claims == [8, 2 if gather_s else 1]
    feeder.close()
    for end in ends:
        end.set()
    await feeding


def test_of_a_full_window_the_tenants_with_the_most_give_back_what_is_needed_last() -> None:
    """Of acme three wait and two are called, of globex two wait."""
    soon = datetime(2026, 12, 1, tzinfo=UTC)
    jobs = [
        ("acme", 0, None),
        ("globex", 0, None),
        ("acme", 0, soon),
        ("globex", 5, None),
        ("acme", 0, soon + timedelta(hours=1)),
    ]
    waiting = {
        cast(Any, number): cast(
            Any, SimpleNamespace(tenant_id=tenant, priority=priority, deadline_at=due)
        )
        for number, (tenant, priority, due) in enumerate(jobs)
    }
    count = Counter(acme=5, globex=2)

    def given(most: int) -> list[Any]:
        return [task for task, _ in of_the_largest(waiting, Counter(count), most)]

    assert given(0) == []
    assert given(2) == [0, 4], "without a deadline first, then what is due last"
    assert given(4) == [0, 4, 2, 1]
    assert given(9) == [0, 4, 2, 1, 3], "the highest priority last"


async def test_limits_that_delay_calls_are_read_once_a_second_and_a_tenth_of_the_time() -> None:
    now, looks, took_s = [100.0], list[float](), [0.0]

    async def snapshot() -> Any:
        looks.append(now[0])
        now[0] += took_s[0]
        return SimpleNamespace(queues=[SimpleNamespace(sid="me", held_up_by="rpm:tenant/acme")])

    policy = SimpleNamespace(limits={"kind:text_only": 1, "rpm:tenant/acme": 1})
    limiter = SimpleNamespace(waiters=1, policy=policy, session="me", snapshot=snapshot)
    own = OwnLimits(lambda: cast(Any, [limiter]), clock=lambda: now[0])
    for _ in range(3):
        await own.look()
        now[0] += 0.4
    assert looks == [100.0]
    await own.look()
    assert looks == [100.0, now[0]]
    of_acme, others = [
        cast(Any, SimpleNamespace(tenant_id=tenant, key_id=None)) for tenant in ("acme", "other")
    ]
    assert own.of_line(of_acme) == ("tenant", "acme")
    assert own.of_line(others) is None
    assert own.filling_lines([of_acme, others], 4) == []
    assert own.filling_lines([of_acme, others, of_acme], 4) == ["tenant/acme"]
    now[0], took_s[0] = 200.0, 0.5
    looks.clear()
    for _ in range(60):
        await own.look()
        now[0] += 0.1
    assert looks == [200.0, pytest.approx(205.5, abs=0.15)]
