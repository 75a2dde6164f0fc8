"""Loops that look for batches ask the database once a second while there are none."""

from __future__ import annotations

import asyncpg
import pytest

from tests.integration.store.conftest import MakeStore
from tests.waiting import wait_until
from tidegate.call import new_id
from tidegate.store.batches import OpenBatches
from tidegate.store.notifications import BATCHES
from tidegate.store.store import Store

ADD = """
INSERT INTO batches (id, tenant_id, endpoint, input_file_id, input_blob, input_bytes,
    completion_window, status, total, expires_at)
VALUES ($1, 'default', '/v1/chat/completions', $1, 'blob', 10, '24h', $2, 1,
    now() + interval '1 day')
"""


class _Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing", "cancelling"])
async def test_a_batch_is_seen_within_a_second_and_until_it_is_over(
    store: Store, peek: asyncpg.Connection, status: str
) -> None:
    clock = _Clock()
    batches = OpenBatches(store.connections, store.notifications, clock)
    assert not await batches.has_own()
    await peek.execute(ADD, batch := new_id(), status)
    clock.now_s += 0.9
    assert not await batches.has_own()  # it was not asked again
    clock.now_s += 0.1
    assert await batches.has_own()
    assert not await batches.has_provider()
    await peek.execute("UPDATE batches SET status = 'completed' WHERE id = $1", batch)
    clock.now_s += 1
    assert not await batches.has_own()


async def test_a_batch_of_which_another_process_tells_is_seen_at_once(
    store: Store, make_store: MakeStore, database_url: str, peek: asyncpg.Connection
) -> None:
    batches = OpenBatches(store.connections, store.notifications, _Clock())
    store.notifications.listen()
    await wait_until(lambda: store.notifications.work_mark(BATCHES) > 0, 10, "a connected listener")
    assert not await batches.has_own()
    await peek.execute(ADD, new_id(), "validating")
    other = await make_store(database_url)
    other.notifications.work(["default"], [BATCHES])
    await wait_until(batches.has_own, 10, "a batch that is open")


async def test_what_this_process_parks_for_a_provider_is_seen_at_once(
    store: Store, peek: asyncpg.Connection
) -> None:
    batches = OpenBatches(store.connections, store.notifications, _Clock())
    assert not await batches.has_provider()
    await peek.execute(
        "INSERT INTO provider_batches (id, pool, upstream, dialect, endpoint, model, key_digest,"
        " lines, size_bytes, state) VALUES ($1, 'default', 'gemini', 'gemini', '/x', 'm', '', 1, 1,"
        " 'made')",
        new_id(),
    )
    assert not await batches.has_provider()
    batches.changed()
    assert await batches.has_provider()
