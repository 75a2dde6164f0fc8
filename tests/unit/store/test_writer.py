"""Group commit, with a `commit` that the tests hold in their hands."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from tests.waiting import wait_until
from tidegate.errors import StoreUnavailable
from tidegate.store import database as writer
from tidegate.store.database import GroupWriter
from tidegate.store.notifications import until_quick


class Commits:
    """Records batches; each waits for `gate`."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.bad: set[int] = set()
        self.unavailable = False

    async def __call__(self, rows: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(rows))
        await self.gate.wait()
        if self.unavailable:
            raise StoreUnavailable("away")
        if self.bad & set(rows):
            raise ValueError("a bad row")
        return [row * 10 for row in rows]


async def test_what_arrives_during_a_commit_shares_the_next_one() -> None:
    commits = Commits()
    group: GroupWriter[int, int] = GroupWriter(commits)
    first = asyncio.create_task(group.write(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    rest = [asyncio.create_task(group.write(number)) for number in range(2, 50)]
    await asyncio.sleep(0)
    commits.gate.set()
    assert await asyncio.gather(first, *rest) == [number * 10 for number in range(1, 50)]
    assert commits.batches == [[1], list(range(2, 50))]


async def test_a_bad_row_fails_alone_and_an_outage_fails_all() -> None:
    commits = Commits()
    commits.gate.set()
    commits.bad = {2}
    group: GroupWriter[int, int] = GroupWriter(commits)
    results = await asyncio.gather(*(group.write(row) for row in (1, 2, 3)), return_exceptions=True)
    assert results[0] == 10
    assert isinstance(results[1], ValueError)
    assert results[2] == 30
    commits.unavailable = True
    results = await asyncio.gather(*(group.write(row) for row in (4, 5)), return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailable] * 2


async def test_batches_are_bounded_by_rows_and_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_ROWS", 10)
    monkeypatch.setattr(writer, "MAX_BATCH_BYTES", 100)
    commits = Commits()
    commits.gate.set()
    small: GroupWriter[int, int] = GroupWriter(commits)
    await asyncio.gather(*(small.write(row, 1) for row in range(25)))
    assert [len(batch) for batch in commits.batches] == [10, 10, 5]
    commits.batches.clear()
    large: GroupWriter[int, int] = GroupWriter(commits)
    await asyncio.gather(*(large.write(row, 60) for row in range(4)))
    assert [len(batch) for batch in commits.batches] == [2, 2]


async def test_too_many_waiting_writes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_WAITING", 3)
    commits = Commits()
    group: GroupWriter[int, int] = GroupWriter(commits)
    first = asyncio.create_task(group.write(0))
    await wait_until(lambda: commits.batches)
    waiting = [asyncio.create_task(group.write(row)) for row in range(1, 4)]
    await asyncio.sleep(0)
    with pytest.raises(StoreUnavailable):
        await group.write(4)
    commits.gate.set()
    await asyncio.gather(first, *waiting)


async def test_a_cancelled_write_does_not_disturb_its_neighbours() -> None:
    commits = Commits()
    group: GroupWriter[int, int] = GroupWriter(commits)
    tasks = [asyncio.create_task(group.write(row)) for row in range(3)]
    await wait_until(lambda: commits.batches)
    tasks[1].cancel()
    await asyncio.sleep(0)
    commits.gate.set()
    assert [await tasks[0], await tasks[2]] == [0, 20]
    assert await group.write(5) == 50


async def test_a_claim_whose_replies_stay_slow_is_not_taken_for_held() -> None:
    asked = 0

    async def ask() -> None:
        nonlocal asked
        asked += 1

    await until_quick(ask, lease_ms=60_000)
    assert asked == 1
    with pytest.raises(StoreUnavailable):
        await until_quick(ask, lease_ms=0)
    assert asked == 4
