"""Tenants and a backlog over two API processes, small: what depends on a quiet machine, which is
how exact shares and times are, is judged in `make chaos`."""

from __future__ import annotations

from pathlib import Path

from tests import tenancy
from tests.fleet import Fleet


async def test_tenants_and_a_backlog_are_never_over_and_totals_are_exact(tmp_path: Path) -> None:
    settings = tenancy.policy_in(tmp_path / "policy")
    async with Fleet(tmp_path, settings=settings) as fleet:
        seen = await tenancy.run(fleet, seconds=4, backlog=60)
        await tenancy.assert_never_over(fleet)
        await tenancy.assert_totals_are_exact(fleet)
    assert seen.shares["small"] < seen.shares["middle"] < seen.shares["large"]
