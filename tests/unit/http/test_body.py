"""A body that arrives slowly, or stops arriving."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.requests import Request
from starlette.types import Message

from tests.unit.http.asgi import Sender, request
from tidegate.errors import InvalidRequest, RequestTimeout
from tidegate.http.body import Pace, incoming_of
from tidegate.settings import Config


class DrippingSender(Sender):
    """Sends a piece every `gap_s`."""

    def __init__(self, count: int, gap_s: float, size: int = 1) -> None:
        super().__init__(b"x" * size for _ in range(count))
        self._gap_s = gap_s

    async def receive(self) -> Message:
        await asyncio.get_running_loop().run_in_executor(None, asyncio.Event)
        waiting = asyncio.Event()
        asyncio.get_running_loop().call_later(self._gap_s, waiting.set)
        await waiting.wait()
        return await super().receive()


async def pieces(incoming: Request, pace: Pace) -> AsyncIterator[bytes]:
    body = incoming_of(incoming, Config(), pace=pace)
    while (piece := await body.next()) is not None:
        yield piece


async def test_silence_in_the_middle_of_a_body_ends_it() -> None:
    sender = Sender([b"x"], then="silence")
    with pytest.raises(RequestTimeout):
        _ = [piece async for piece in pieces(request(sender), Pace(silence_ms=50))]
    assert sender.taken == 1


async def test_a_drip_that_is_never_silent_for_long_is_ended_all_the_same() -> None:
    sender = DrippingSender(count=1000, gap_s=0.01)
    pace = Pace(silence_ms=1000, grace_ms=100, min_bytes_per_s=100_000)
    with pytest.raises(RequestTimeout):
        _ = [piece async for piece in pieces(request(sender), pace)]
    assert sender.taken <= 12


async def test_a_slow_client_that_keeps_the_pace_is_heard_to_its_end() -> None:
    """Longer than the grace all in all, and never as late as the pace would let it be."""
    sender = DrippingSender(count=30, gap_s=0.02, size=1000)
    pace = Pace(silence_ms=5000, grace_ms=500, min_bytes_per_s=2000)
    assert len([piece async for piece in pieces(request(sender), pace)]) == 30


async def test_our_own_time_does_not_count_against_the_client() -> None:
    body = incoming_of(
        request(DrippingSender(count=5, gap_s=0)),
        Config(),
        pace=Pace(silence_ms=1000, grace_ms=100, min_bytes_per_s=1000),
    )
    for _ in range(5):
        assert await body.next() == b"x"
        busy = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, busy.set)
        await busy.wait()
    assert await body.next() is None


@pytest.mark.parametrize("length", ["-1", "1e9", "0x10", "", "9" * 40])
async def test_a_content_length_that_is_no_number_is_refused(length: str) -> None:
    with pytest.raises(InvalidRequest):
        incoming_of(request(b"", headers=[("content-length", length)]), Config())
