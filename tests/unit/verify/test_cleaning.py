"""What a verification has made is removed also where Valkey answers only after a while."""

from __future__ import annotations

import asyncio

import pytest

from tidegate.errors import LimiterUnavailable
from tidegate.verify import plan as cleaning
from tidegate.verify.plan import Report, clean_pool, finish


class Removal:
    """Fails as often as told, and works then."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.tries = 0

    async def __call__(self) -> None:
        self.tries += 1
        if self.tries <= self.failures:
            raise LimiterUnavailable("no answer in time", limit="")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "_PAUSE_S", 0)


async def test_a_server_that_answers_late_is_asked_again() -> None:
    report, removal = Report(), Removal(failures=20)
    await clean_pool(removal, "pool-1", report)
    assert (removal.tries, report.left, report.is_sound) == (21, [], True)


async def test_what_is_left_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "_WITHIN_S", 0)
    report = Report()
    await clean_pool(Removal(failures=1_000_000), "pool-1", report)
    assert report.left == ["keys of the pool pool-1: no answer in time"]
    assert not report.is_sound


async def test_a_cleaning_that_is_interrupted_is_finished_first() -> None:
    begun, may_end, done = asyncio.Event(), asyncio.Event(), []

    async def clean() -> None:
        begun.set()
        await may_end.wait()
        done.append("all of it")

    cleaning = asyncio.create_task(finish(clean()))
    await begun.wait()
    cleaning.cancel()
    await asyncio.sleep(0)
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await cleaning
    assert done == ["all of it"]
