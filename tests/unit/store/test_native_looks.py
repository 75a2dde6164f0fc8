"""Callers that wait for one idempotency key share a look at PostgreSQL."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from tidegate.store import idempotency as native_keys
from tidegate.store.database import Connections, Work
from tidegate.store.idempotency import NativeKeys


class Counted:
    """Connections that find nothing. `meanwhile` begins in the middle of the first look."""

    def __init__(self) -> None:
        self.looks = 0
        self.meanwhile: asyncio.Task[Any] | None = None
        self.keys: NativeKeys | None = None

    async def run(self, work: Work[Any], *, timeout_ms: int) -> None:
        self.looks += 1
        if self.meanwhile is None and self.keys is not None:
            self.meanwhile = asyncio.create_task(self.keys.poll("acme", "k-1"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    monkeypatch.setattr(native_keys, "_POLL_S", 0)
    return Counted()


def keys_over(counted: Counted) -> NativeKeys:
    return NativeKeys(cast(Connections, counted), cast(Any, None), lease_ms=1_000)


async def test_all_that_wait_share_a_look(counted: Counted) -> None:
    keys = keys_over(counted)
    await asyncio.gather(*(keys.poll("acme", "k-1") for _ in range(50)))
    assert counted.looks == 1


async def test_a_caller_that_comes_as_a_look_ends_gets_a_new_one(counted: Counted) -> None:
    """What the ended look found is of before: a caller in a loop would see it for ever."""
    counted.keys = keys_over(counted)
    await counted.keys.poll("acme", "k-1")
    assert counted.meanwhile is not None
    await counted.meanwhile
    assert counted.looks == 2
