"""The promises of a whole deployment, over two API processes and two workers.

The same scenarios run at full size, and over and over, under `make chaos`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import scenarios
from tests.fleet import Fleet

pytestmark = pytest.mark.slow


async def test_a_mixed_load_uses_every_limit_fully_and_is_never_over(tmp_path: Path) -> None:
    async with Fleet(tmp_path) as fleet:
        await scenarios.mixed_load(fleet, submits=72, streams=12)


async def test_a_killed_worker_and_api_lose_no_job_and_never_go_over(tmp_path: Path) -> None:
    async with Fleet(tmp_path) as fleet:
        await scenarios.kill_worker_and_api(fleet, submits=48, streams=8)


async def test_valkey_restarted_empty_loses_no_job_and_calls_nothing_twice(tmp_path: Path) -> None:
    async with Fleet(tmp_path) as fleet:
        await scenarios.valkey_restarts_empty(fleet, submits=48, streams=6)


async def test_while_valkey_is_away_closed_waits_and_health_tells(tmp_path: Path) -> None:
    async with Fleet(tmp_path) as fleet:
        await scenarios.valkey_away_closed(fleet, submits=40, away_s=3)


async def test_while_valkey_is_away_local_goes_on_within_the_share(tmp_path: Path) -> None:
    async with Fleet(tmp_path, settings={"WHEN_VALKEY_AWAY": "local"}) as fleet:
        await scenarios.valkey_away_local(fleet, submits=48, away_s=3)


async def test_postgres_away_refuses_submits_and_records_what_ran(tmp_path: Path) -> None:
    async with Fleet(tmp_path) as fleet:
        await scenarios.postgres_away(fleet, submits=48, away_s=2)


async def test_cancelled_streams_leave_no_permit_and_no_upstream_call(tmp_path: Path) -> None:
    async with Fleet(tmp_path, workers=0) as fleet:
        await scenarios.cancelled_streams(fleet, streams=100, seed=7)


async def test_sigterm_under_load_fails_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    async with Fleet(tmp_path) as fleet:
        await scenarios.sigterm_under_load(fleet, submits=48, streams=8)


async def test_a_paused_worker_that_comes_back_stores_nothing_that_is_not_its(
    tmp_path: Path,
) -> None:
    async with Fleet(tmp_path, apis=1, settings={"ON_EXPIRY": "hold"}) as fleet:
        await scenarios.paused_worker(fleet, submits=48, paused_s=4, over=False)
