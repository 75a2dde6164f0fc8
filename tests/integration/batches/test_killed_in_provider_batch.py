"""A worker killed by -9 at each step of a provider's batch, and PostgreSQL away at the results: no
line is asked for twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.fleet import Fleet
from tests.waiting import wait_until, work_for

pytestmark = pytest.mark.slow

MODEL = "gemini-2.5-flash"
LINES = 20
OUTAGE_S = 2.0
POLICY = """
[upstreams.gemini.prices."*"]
input = 1.0
output = 4.0
tiers = { batch = { share = 0.5 } }
"""
SETTINGS = {"PROVIDER_BATCH_GATHER_MS": "50", "PROVIDER_BATCH_POLL_MS": "200"}


async def test_each_job_is_answered_once_wherever_its_worker_is_killed(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    settings = SETTINGS | {"TIDEGATE_POLICY": str(policy)}
    async with Fleet(tmp_path / "fleet", apis=1, workers=0, settings=settings) as fleet:
        await _killed(fleet, "before the upload", "hang", "/upload/")
        await _killed(fleet, "before the creation", "hang", ":batchGenerateContent")
        # It is created, but by then nobody is there who reads that.
        await _killed(
            fleet, "in the creation", "slow_first_token", ":batchGenerateContent", delay_ms=1_000
        )
        await _killed(fleet, "at the answer", "answer_lost", ":batchGenerateContent")
        await _killed(fleet, "while it polls", "hang", "GET /v1beta/batches/")
        await _killed(fleet, "at the results", "hang", ":download")
        await _without_postgresql(fleet)


async def _without_postgresql(fleet: Fleet) -> None:
    """It is away while the results are read."""
    when = "without PostgreSQL"
    ids = await _begun(fleet, when, "slow_first_token", ":download", delay_ms=1_500)
    fleet.start_worker()
    await _met(fleet, when, "slow_first_token", ":download")
    await asyncio.to_thread(fleet.postgres.stop)
    await work_for(OUTAGE_S)
    await asyncio.to_thread(fleet.postgres.start)
    await fleet.ready(fleet.url)
    await _all_answered_once(fleet, when, ids)


async def _killed(fleet: Fleet, when: str, fault: str, match: str, **more: Any) -> None:
    """Kill the worker once the provider has met a request that matches, and start another."""
    ids = await _begun(fleet, when, fault, match, **more)
    worker = fleet.start_worker()
    await _met(fleet, when, fault, match)
    worker.kill()
    fleet.start_worker()
    await _all_answered_once(fleet, when, ids)
    fleet.workers[-1].kill()


async def _begun(fleet: Fleet, when: str, fault: str, match: str, **more: Any) -> list[str]:
    await fleet.control.reset()
    await fleet.control.set_fault(fault, kind="other", match=match, count=1, **more)
    ids = [await _submitted(fleet, f"Say {when} {number}") for number in range(LINES)]
    await _put_into_batch(fleet, ids)
    return ids


async def _met(fleet: Fleet, when: str, fault: str, match: str) -> None:
    async def has_met_it() -> bool:
        return any(call.fault == fault for call in await fleet.control.calls(contains=match))

    await wait_until(has_met_it, 30, when)


async def _all_answered_once(fleet: Fleet, when: str, ids: list[str]) -> None:
    ends = [await fleet.end_of(one, 60) for one in ids]
    assert {(end["status"], end["attempts"]) for end in ends} == {("succeeded", 1)}, when
    calls = await fleet.control.calls(contains=f"Say {when}")
    asked = Counter((call.prompt, call.tier) for call in calls)
    assert asked == {(f"Say {when} {number}", "batch"): 1 for number in range(LINES)}, when
    assert await _recorded(fleet, ids) == LINES


async def _submitted(fleet: Fleet, text: str) -> str:
    body = {"contents": [{"role": "user", "parts": [{"text": text}]}]}
    job = {"endpoint": f"/v1beta/models/{MODEL}:generateContent", "body": body}
    async with fleet.http.post(f"{fleet.url}/submit", json=job) as response:
        accepted = await response.json()
        assert response.status == 202, accepted
        return str(accepted["request_id"])


async def _put_into_batch(fleet: Fleet, ids: list[str]) -> None:
    connection = await asyncpg.connect(fleet.postgres.url())
    await connection.execute(
        "UPDATE requests SET tier = 'batch', tiers_allowed = '{batch}',"
        " not_before = now() + interval '1 hour' WHERE id = ANY($1::uuid[])",
        ids,
    )
    await connection.close()


async def _recorded(fleet: Fleet, ids: list[str]) -> int:
    """How many rows the audit has of them."""
    connection = await asyncpg.connect(fleet.postgres.url())
    count: int = await connection.fetchval(
        "SELECT count(*) FROM audit WHERE request_id = ANY($1::uuid[]) AND status = 'succeeded'",
        ids,
    )
    await connection.close()
    return count
