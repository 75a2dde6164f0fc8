"""Tenants of weights 1:2:4 over two API processes, with and without a backlog of jobs."""

from __future__ import annotations

import sys
from pathlib import Path

from tests import tenancy
from tests.fleet import Fleet


async def test_a_backlog_of_jobs_takes_nothing_from_interactive_calls(tmp_path: Path) -> None:
    settings = tenancy.policy_in(tmp_path / "policy")
    async with Fleet(tmp_path, settings=settings) as fleet:
        await tenancy.run(fleet, seconds=3, backlog=0)  # warms up
        await tenancy.settled(fleet)
        alone = await tenancy.run(fleet, seconds=30, backlog=0)
        await tenancy.settled(fleet)
        beside = await tenancy.run(fleet, seconds=30, backlog=1_000)
        await tenancy.assert_never_over(fleet)
        await tenancy.assert_totals_are_exact(fleet)
    for name, seen in (("alone", alone), ("with a backlog", beside)):
        shares = ", ".join(f"{tenant} {share:.3f}" for tenant, share in seen.shares.items())
        sys.stdout.write(
            f"\n  {name}: {seen.calls} calls, {shares}, {seen.low} jobs beside them, "
            f"p95 queue {seen.p95_ms:.0f} ms\n"
        )
    assert alone.furthest_off <= 0.05
    assert beside.furthest_off <= 0.05
    assert beside.p95_ms <= 1.3 * alone.p95_ms
    assert beside.low > 0, "the least share of the band below"
