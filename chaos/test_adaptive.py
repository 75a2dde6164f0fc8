"""An adaptive limit of 2 to 40 before a provider that takes ten calls at a time.

Thirty callers over two API processes, or a queue and two workers. From ten seconds on the provider
refuses at most one call in twenty, has seven tenths of its places in use, and the callers hear of
next to no refusal.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections import Counter
from pathlib import Path

import asyncpg
import pytest

from tests.fleet import Fleet
from tests.waiting import work_for

TAKES = 10
CALLERS = 30
JOBS = 2_500
FAILED = "SELECT count(*) FROM requests WHERE status = 'failed'"
SECONDS = 60.0
LEARNS_S = 10.0
POLICY = '[limits]\n"kind:text_only" = { bound = 40, adaptive = { minimum = 2 } }\n'
CALL = "/v1beta/models/gemini-2.5-flash:generateContent"


@pytest.mark.parametrize("by", ["calls", "jobs"])
async def test_an_adaptive_limit_finds_what_the_provider_takes(tmp_path: Path, by: str) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    settings = {"TIDEGATE_POLICY": str(policy)}
    async with Fleet(tmp_path / "fleet", settings=settings) as fleet:
        await fleet.control.set_behaviour(concurrency={"total": TAKES}, first_byte_ms=300)
        began_ns = time.time_ns()
        answers = await (_called(fleet) if by == "calls" else _queued(fleet))
        calls = await fleet.control.calls()
    later = [call for call in calls if LEARNS_S < (call.started_ns - began_ns) / 1e9 < SECONDS]
    refused = sum(call.limit is not None for call in later)
    worked_s = sum((call.ended_ns or call.started_ns) - call.started_ns for call in later) / 1e9
    used = worked_s / (SECONDS - LEARNS_S) / TAKES
    sys.stdout.write(
        f"\n  {by}: from {LEARNS_S:.0f} s on {len(later)} calls, {refused / len(later):.1%} "
        f"refused, {used:.0%} of what the provider takes; answers: {dict(answers)}\n"
    )
    assert refused <= 0.05 * len(later)
    assert used >= 0.7
    assert answers[200] >= 0.99 * answers.total()


async def _called(fleet: Fleet) -> Counter[int]:
    """Native calls of 30 callers; the statuses that they got."""
    answers: Counter[int] = Counter()
    until = time.monotonic() + SECONDS

    async def caller(url: str) -> None:
        for number in itertools.count():
            if time.monotonic() > until:
                return
            body = {"contents": [{"parts": [{"text": f"Say word{number}."}]}]}
            async with fleet.http.post(f"{url}{CALL}", json=body) as answer:
                await answer.read()
                answers[answer.status] += 1

    urls = itertools.cycle(fleet.apis)
    await asyncio.gather(work_for(SECONDS), *(caller(next(urls)) for _ in range(CALLERS)))
    return answers


async def _queued(fleet: Fleet) -> Counter[int]:
    """More jobs than can be done in time; 200 for each but those that failed."""
    room = asyncio.Semaphore(CALLERS)

    async def submit(number: int) -> None:
        body = {"data": f"Say word{number}.", "type": "text_only"}
        async with room, fleet.http.post(f"{fleet.url}/submit", json=body) as answer:
            assert answer.status == 202, await answer.text()

    await asyncio.gather(work_for(SECONDS), *(submit(number) for number in range(JOBS)))
    connection = await asyncpg.connect(fleet.postgres.url())
    try:
        failed = await connection.fetchval(FAILED)
    finally:
        await connection.close()
    return Counter({200: JOBS - failed, 500: failed})
