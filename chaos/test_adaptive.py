"""An adaptive limit of 2 to 40 before a provider that takes ten calls at a time.

Thirty callers over two API processes. From ten seconds on the provider refuses at most one call in
twenty, has seven tenths of its places in use, and the callers hear of next to no refusal.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections import Counter
from pathlib import Path

from tests.fleet import Fleet
from tests.waiting import work_for

TAKES = 10
CALLERS = 30
SECONDS = 60.0
LEARNS_S = 10.0
POLICY = '[limits]\n"kind:text_only" = { bound = 40, adaptive = { minimum = 2 } }\n'
CALL = "/v1beta/models/gemini-2.5-flash:generateContent"


async def test_an_adaptive_limit_finds_what_the_provider_takes(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    settings = {"TIDEGATE_POLICY": str(policy)}
    answers: Counter[int] = Counter()
    async with Fleet(tmp_path / "fleet", settings=settings) as fleet:
        await fleet.control.set_behaviour(concurrency={"total": TAKES}, first_byte_ms=300)
        began_ns, until = time.time_ns(), time.monotonic() + SECONDS

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
        calls = await fleet.control.calls()
    later = [call for call in calls if call.started_ns - began_ns > LEARNS_S * 1e9]
    refused = sum(call.limit is not None for call in later)
    worked_s = sum((call.ended_ns or call.started_ns) - call.started_ns for call in later) / 1e9
    used = worked_s / (SECONDS - LEARNS_S) / TAKES
    sys.stdout.write(
        f"\n  from {LEARNS_S:.0f} s on {len(later)} calls, {refused / len(later):.1%} refused, "
        f"{used:.0%} of what the provider takes; callers were answered {dict(answers)}\n"
    )
    assert refused <= 0.05 * len(later)
    assert used >= 0.7
    assert answers[200] >= 0.99 * answers.total()
