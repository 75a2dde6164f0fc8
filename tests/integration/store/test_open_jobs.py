"""Which open jobs come before one that is due at a time, as the choice of a tier counts them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from tests.integration.store.jobs import new_job, now
from tidegate.call import DEFAULT_POOL, Kind, Tier
from tidegate.store import statistics
from tidegate.store.statistics import OpenJobs
from tidegate.store.store import Store

TEXT = Kind.TEXT_ONLY


async def ahead_of(store: Store, due_in_s: float | None) -> int:
    due = None if due_in_s is None else now() + timedelta(seconds=due_in_s)
    return await OpenJobs(store.connections, DEFAULT_POOL).of(TEXT, due)


async def submit(store: Store, *due_in_s: float | None, **more: Any) -> None:
    for one in due_in_s:
        due = None if one is None else now() + timedelta(seconds=one)
        await store.jobs.submit(new_job(deadline_at=due, **more))


async def test_those_that_are_due_earlier_and_those_that_wait_now(
    store: Store, peek: asyncpg.Connection
) -> None:
    assert await ahead_of(store, 60) == 0
    await submit(store, 60, 600, 86_400, None)
    assert [await ahead_of(store, due) for due in (30, 300, 90_000, None)] == [4, 4, 4, 4]
    # Of those that are put off or in a batch only those count that are due earlier.
    await peek.execute("UPDATE requests SET not_before = now() + interval '9 s'")
    assert [await ahead_of(store, due) for due in (30, 300, 90_000, None)] == [0, 1, 3, 0]
    await peek.execute(
        "UPDATE requests SET status = 'running', claimed_by = NULL, not_before = NULL, tier = $1",
        Tier.BATCH,
    )
    assert [await ahead_of(store, due) for due in (30, 300, 90_000, None)] == [0, 1, 3, 0]
    await peek.execute("UPDATE requests SET tier = 'live', claimed_by = 'w'")
    assert await ahead_of(store, 90_000) == 0, "it has its permit"


async def test_other_kinds_and_pools_are_not_counted(
    store: Store, peek: asyncpg.Connection
) -> None:
    await submit(store, 60)
    assert await OpenJobs(store.connections, "other").of(TEXT, None) == 0
    assert await OpenJobs(store.connections, DEFAULT_POOL).of(Kind.MULTI_MODAL, None) == 0


async def test_it_is_read_again_only_after_a_while(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = OpenJobs(store.connections, DEFAULT_POOL)
    await submit(store, 60)
    assert await jobs.of(TEXT, None) == 1
    await submit(store, 60)
    assert await jobs.of(TEXT, None) == 1
    monkeypatch.setattr(statistics, "_AHEAD_FRESH_S", 0.0)
    monkeypatch.setattr(statistics, "_SHARE", 0.0)
    jobs = OpenJobs(store.connections, DEFAULT_POOL)
    assert await jobs.of(TEXT, None) == 2
    await submit(store, 60)
    assert await jobs.of(TEXT, None) == 3
