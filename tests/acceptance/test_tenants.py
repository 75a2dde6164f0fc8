"""Tenants' streams and a batch over two API processes, small: what depends on a quiet machine,
which is how exact shares and times are, is judged in `make chaos`."""

from __future__ import annotations

from pathlib import Path

import pytest
from openai import AsyncOpenAI

from tests import batching, tenancy
from tests.fleet import Fleet

pytestmark = pytest.mark.slow

LINES = 60


async def test_tenants_and_a_batch_are_never_over_and_totals_are_exact(tmp_path: Path) -> None:
    settings = tenancy.policy_in(tmp_path / "policy")
    async with Fleet(tmp_path, settings=settings) as fleet:
        keys = await tenancy.keys_of(fleet)
        await tenancy.set_pace(fleet)
        async with AsyncOpenAI(
            base_url=f"{fleet.url}/v1", api_key=keys[tenancy.BATCH_TENANT], max_retries=0
        ) as client:
            given = batching.content(LINES, model=tenancy.BATCH_MODEL, says=tenancy.BATCH_SAYS)
            batch = await batching.begin(client, given)
            seen = await tenancy.run(fleet, keys, seconds=3)
            done = await batching.end_of(client, batch)
            await batching.assert_all_succeeded(client, done, LINES)
        await tenancy.assert_never_over(fleet)
        await tenancy.assert_totals_are_exact(fleet, keys)
    assert seen.shares["small"] < seen.shares["middle"] < seen.shares["large"]
