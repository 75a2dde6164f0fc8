"""10,000 clients that leave at any moment, on native and own paths, over two API processes."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from typing import Any

import aiohttp

from tests.fleet import LIMITS, Fleet
from tests.load import stream
from tests.waiting import wait_until
from tidegate.emulator.state import LoggedCall

LEAVERS = 10_000
AT_ONCE = 100
TEXT = "Say hello [leaver]"
_SAID = [{"role": "user", "content": TEXT}]
_PARTS = {"contents": [{"parts": [{"text": TEXT}]}]}
FRONTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1beta/models/gemini-2.5-flash:generateContent", _PARTS),
    ("/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse", _PARTS),
    ("/v1/chat/completions", {"model": "gemini-2.5-flash", "messages": _SAID}),
    ("/v1/chat/completions", {"model": "gemini-2.5-flash", "messages": _SAID, "stream": True}),
    ("/stream", {"text": TEXT, "type": "text_only"}),
)


def spells_over(calls: list[LoggedCall], limit: int) -> list[float]:
    """How long, each time, the provider saw more than the limit."""
    steps = [(call.started_ns, 1) for call in calls if call.kind == "text_only"]
    steps += [(call.ended_ns, -1) for call in calls if call.kind == "text_only" and call.ended_ns]
    spells, level, since = [], 0, 0
    for at, step in sorted(steps):
        level += step
        if step == 1 and level == limit + 1:
            since = at
        elif step == -1 and level == limit:
            spells.append((at - since) / 1e6)
    return spells


async def leave(url: str, number: int, after_s: float) -> bool:
    """Ask, and be gone so soon; whether the answer came first."""
    path, body = FRONTS[number % len(FRONTS)]
    try:
        async with (
            asyncio.timeout(after_s),
            aiohttp.ClientSession() as session,
            session.post(url + path, json=body) as response,
        ):
            await response.read()
            return True
    except (TimeoutError, aiohttp.ClientError):
        return False


async def test_ten_thousand_leavers_leak_nothing(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    answered = 0
    async with Fleet(tmp_path, workers=0) as fleet:
        await fleet.control.set_behaviour(
            first_byte_ms={"uniform": [5, 40]}, between_ms=5, chunks=4
        )
        urls = list(fleet.apis)
        for start in range(0, LEAVERS, AT_ONCE):
            answers = await asyncio.gather(
                *(
                    leave(urls[number % 2], number, rng.uniform(0.001, 0.4))
                    for number in range(start, start + AT_ONCE)
                )
            )
            answered += sum(answers)

        async def idle() -> bool:
            return (await fleet.truth()).in_flight == 0

        await wait_until(idle, 5, "no upstream call left")
        limit = LIMITS["text_only"]
        over_ms = spells_over(await fleet.control.calls(), limit)
        sys.stdout.write(f"\n  spells over the limit, in ms: {over_ms}\n")
        assert over_ms == []
        ends = await asyncio.gather(
            *(
                stream(fleet, fleet.url, {"data": "free?", "deadline_ms": "500"})
                for _ in range(limit)
            )
        )
        assert [end.end for end in ends] == ["done"] * limit, "every permit can be had at once"
    sys.stdout.write(f"\n  seed {seed}: {LEAVERS - answered} of {LEAVERS} left, 0 leaked\n")
    assert LEAVERS // 10 < answered < LEAVERS * 9 // 10, "some were answered, and most were not"
