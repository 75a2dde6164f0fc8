"""Sessions of browsers that were signed out, as one process knows them."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from tests.waiting import wait_until
from tidegate.errors import StoreUnavailable
from tidegate.http.browsers import READ_AGAIN_S, SESSION_S, Sessions


class Record:
    """What is on record: the sessions that another process has ended among them."""

    def __init__(self) -> None:
        self.spent: dict[bytes, int] = {}
        self.reads = 0
        self.unavailable = False
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def is_spent(self, nonce: bytes) -> bool:
        self.reads += 1
        is_there = nonce in self.spent
        await self.may_answer.wait()
        self._check()
        return is_there

    async def spend_code(self, nonce: bytes, ends_at: int, spender: bytes) -> bool:
        self._check()
        self.spent[nonce] = ends_at
        return True

    def _check(self) -> None:
        if self.unavailable:
            raise StoreUnavailable("PostgreSQL is away")


class Scene:
    def __init__(self) -> None:
        self.record, self.now = Record(), 1_000.0
        self.here, self.there = (
            Sessions(cast(Any, self.record), clock=lambda: self.now) for _ in range(2)
        )


@pytest.fixture
def scene() -> Scene:
    return Scene()


async def test_an_end_is_noticed_elsewhere_when_the_record_is_read_again(scene: Scene) -> None:
    assert not await scene.there.have_ended("one")
    await scene.here.end("one")
    assert await scene.here.have_ended("one")
    assert not await scene.there.have_ended("one")
    scene.now += READ_AGAIN_S
    assert await scene.there.have_ended("one")
    assert not await scene.there.have_ended("two")


async def test_the_record_is_read_once_in_a_while_and_never_again_after_the_end(
    scene: Scene,
) -> None:
    for _ in range(10):
        assert not await scene.here.have_ended("one")
    assert scene.record.reads == 1
    await scene.here.end("one")
    scene.now += 10 * READ_AGAIN_S
    assert await scene.here.have_ended("one")
    assert scene.record.reads == 1


async def test_while_the_record_is_away_what_was_read_last_stands(scene: Scene) -> None:
    await scene.here.end("one")
    assert await scene.there.have_ended("one")
    scene.record.unavailable = True
    scene.now += READ_AGAIN_S
    assert await scene.there.have_ended("one")
    assert not await scene.there.have_ended("two")
    with pytest.raises(StoreUnavailable):
        await scene.here.end("three")
    assert await scene.here.have_ended("three"), "here at least"


async def test_an_end_during_a_read_stands(scene: Scene) -> None:
    scene.record.may_answer.clear()
    asking = asyncio.create_task(scene.here.have_ended("one"))
    await wait_until(lambda: scene.record.reads == 1)
    await scene.here.end("one")
    scene.record.may_answer.set()
    assert await asking
    assert await scene.here.have_ended("one")


async def test_what_is_remembered_is_bounded_and_on_record_as_long_as_a_session_lasts(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidegate.http.browsers.time.time", lambda: 5_000.0)
    await scene.here.end("one")
    assert set(scene.record.spent.values()) == {5_000 + SESSION_S}
    for number in range(1_000):
        await scene.here.have_ended(f"made {number}")
    assert len(scene.here._read) <= 200
    assert await scene.here.have_ended("one"), "it is read from the record again"
