"""How long rows of ended calls wait for others, to be written together."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from tests.waiting import wait_until
from tidegate.record import CallRecord
from tidegate.store.spill import WaitingRows

_HOUR_S = 3600.0


def record() -> CallRecord:
    return CallRecord(
        source="relay", request_id=uuid4(), tenant_id="t", received_at=datetime.now(UTC)
    )


class Patient(WaitingRows):
    """Waits until something else than the clock ends it."""

    LINGER_S = MOST_LINGER_S = _HOUR_S


class Growing(WaitingRows):
    """Waits hardly at all before the first batch was written."""

    LINGER_S, MOST_LINGER_S = 0.0, _HOUR_S


def gathering(rows: WaitingRows, *, is_urgent: bool = False) -> asyncio.Task[None]:
    return asyncio.create_task(rows.gather(is_urgent=lambda: is_urgent))


async def test_half_of_a_batch_waits_no_longer() -> None:
    rows = Patient(batch_rows=4)
    written = gathering(rows)
    rows.add(record(), 10)
    await asyncio.sleep(0)
    assert not written.done()
    rows.add(record(), 20)
    await written
    assert rows.size_bytes == 30
    assert [size_bytes for _, size_bytes in rows.take()] == [10, 20]


async def test_a_row_that_is_a_batch_waits_for_nothing() -> None:
    rows = Patient(batch_rows=1)
    rows.add(record(), 10)
    await gathering(rows)


async def test_the_longer_a_batch_took_the_longer_the_next_one_waits() -> None:
    rows = Growing(batch_rows=100)
    rows.add(record(), 1)
    await gathering(rows)  # nothing was written before
    rows.take()
    rows.wrote(took_s=1_000)
    rows.add(record(), 1)
    written = gathering(rows)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(written), 0.01)
    rows.hurry()
    await written


async def test_an_urgent_row_does_not_wait_for_what_a_batch_took() -> None:
    rows = Growing(batch_rows=100)
    rows.wrote(took_s=1_000)
    rows.add(record(), 1)
    await gathering(rows, is_urgent=True)


async def test_rows_that_came_during_a_batch_are_not_forgotten() -> None:
    rows = Growing(batch_rows=100)
    rows.add(record(), 1)
    await gathering(rows)
    rows.take()
    rows.add(record(), 2)
    rows.wrote(took_s=0)
    await gathering(rows)
    assert len(rows.take()) == 1


async def test_a_process_that_ends_makes_no_row_wait() -> None:
    rows = Patient(batch_rows=100)
    rows.hurry()
    for _ in range(2):
        rows.add(record(), 1)
        await gathering(rows)
        assert len(rows.take()) == 1
    idle = gathering(rows)
    await asyncio.sleep(0)
    assert not idle.done()
    idle.cancel()


async def test_a_cancelled_wait_leaves_all_rows() -> None:
    rows = Patient(batch_rows=100)
    rows.add(record(), 1)
    waiting = gathering(rows)
    await asyncio.sleep(0)
    waiting.cancel()
    await wait_until(waiting.done)
    assert len(rows.waiting) == 1
