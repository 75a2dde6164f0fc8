"""Three tenants of different weights, their streams, and a backlog of jobs of low priority.

The clients are a closed loop that always wants more than there is, since a share is that of what
is scarce. What the provider saw is the truth for calls and LLM tokens; the queue's times are those
that the answers tell.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from tests.fleet import Fleet
from tests.load import submit
from tests.waiting import wait_until, work_for

WEIGHTS = {"small": 1, "middle": 2, "large": 4}
LIMIT = 8
CLIENTS = 12  # of each tenant, over all API processes
LOW = -50
_POLICY = """
[limits]
"kind:text_only" = {limit}
[weights]
small = 1
middle = 2
large = 4
[[bands]]
name = "normal"
[[bands]]
name = "low"
min_share = 0.02
"""


def policy_in(folder: Path) -> dict[str, str]:
    """Settings of a fleet with this policy."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "policy.toml"
    path.write_text(_POLICY.format(limit=LIMIT))
    return {"TIDEGATE_POLICY": str(path), "CLASSIFIER": "keywords"}


@dataclass
class Seen:
    """Of the time in which all tenants wanted more: calls that began, and how long they waited."""

    shares: dict[str, float] = field(default_factory=dict)
    waits_ms: list[float] = field(default_factory=list)
    low: int = 0
    calls: int = 0

    @property
    def p95_ms(self) -> float:
        waits = sorted(self.waits_ms)
        return waits[len(waits) * 95 // 100]

    @property
    def furthest_off(self) -> float:
        """How far a share is from what it should be, as a part of that."""
        whole = sum(WEIGHTS.values())
        return max(abs(self.shares[t] * whole / w - 1) for t, w in WEIGHTS.items())


async def run(fleet: Fleet, *, seconds: float, backlog: int) -> Seen:
    """Interactive calls of all tenants for so long; beside them, jobs that wait from the start."""
    await fleet.control.set_behaviour(first_byte_ms={"uniform": [40, 80]}, between_ms=5, chunks=6)
    before = (await fleet.truth()).last_id
    ids = await _backlog(fleet, backlog)
    seen, until = Seen(), time.monotonic() + seconds
    began_ns = time.time_ns() + int(seconds * 0.15e9)
    clients = [
        _client(fleet, tenant, number, until, seen.waits_ms)
        for tenant in WEIGHTS
        for number in range(CLIENTS)
    ]
    await asyncio.gather(*clients)
    ended_ns = time.time_ns() - int(seconds * 0.05e9)
    begun = Counter(
        call.prompt.split("[", 1)[1].split("]", 1)[0]
        for call in await fleet.control.calls(since=before)
        if began_ns <= call.started_ns <= ended_ns and "[" in call.prompt
    )
    seen.low = begun.pop("job", 0)
    seen.calls = sum(begun.values())
    seen.shares = {tenant: begun[tenant] / seen.calls for tenant in WEIGHTS}
    for request_id in ids:
        assert (await fleet.end_of(request_id))["status"] == "succeeded"
    return seen


async def _backlog(fleet: Fleet, count: int) -> list[str]:
    ids: list[str] = []
    urls = list(fleet.apis)
    body = {"data": "Explain why the tide turns [job]", "type": "text_only", "priority": LOW}
    for start in range(0, count, 100):
        answers = await asyncio.gather(
            *(
                submit(fleet, urls[n % len(urls)], body)
                for n in range(start, min(count, start + 100))
            )
        )
        assert {status for status, _ in answers} <= {202}
        ids += [answer["request_id"] for _, answer in answers]
    return ids


async def _client(
    fleet: Fleet, tenant: str, number: int, until: float, waits_ms: list[float]
) -> None:
    """One call after the other; every second client by the native path."""
    url = list(fleet.apis)[number % len(fleet.apis)]
    text = f"Tell me of the tide [{tenant}]"
    native = {"contents": [{"parts": [{"text": text}]}]}
    own = {"text": text, "type": "text_only"}
    is_native = number // len(fleet.apis) % 2 == 0
    path = (
        "/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse" if is_native else "/stream"
    )
    body: dict[str, Any] = native if is_native else own
    warm = time.monotonic() + (until - time.monotonic()) * 0.15
    while time.monotonic() < until:
        async with fleet.http.post(
            url + path, json=body, headers={"x-tidegate-tenant": tenant}
        ) as response:
            said = await response.read()
            assert response.status == 200, said
            assert b"error" not in said
            if time.monotonic() > warm:
                waits_ms.append(float(response.headers["x-tidegate-queue-ms"]))


async def assert_never_over(fleet: Fleet) -> None:
    truth = await fleet.truth()
    assert truth["text_only"].max_in_flight <= LIMIT
    assert truth["text_only"].over == 0


async def assert_totals_are_exact(fleet: Fleet) -> None:
    """What is on record is what the provider billed, to the LLM token."""
    connection = await asyncpg.connect(fleet.postgres.url())
    billed = (await fleet.truth()).billed()
    calls = len(await fleet.control.calls())

    async def recorded() -> bool:
        found: int = await connection.fetchval("SELECT count(*) FROM audit")
        return found == calls

    try:
        await wait_until(recorded, 30, f"{calls} records")
        row = await connection.fetchrow(
            "SELECT sum(input_tokens) AS taken, sum(output_tokens) AS given FROM audit"
        )
        assert (row["taken"], row["given"]) == (billed.input_tokens, billed.output_tokens)
    finally:
        await connection.close()


async def settled(fleet: Fleet) -> None:
    """Between two runs: nothing is in flight any more."""

    async def idle() -> bool:
        return (await fleet.truth()).in_flight == 0

    await wait_until(idle, 30, "an idle provider")
    await work_for(0.2)
