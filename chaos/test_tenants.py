"""Tenants of weights 1:2:4 over two API processes, with and without a batch of 5,000 lines."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from openai import AsyncOpenAI

from tests import batching, tenancy
from tests.fleet import Fleet
from tests.waiting import wait_until

LINES = 5_000
SECONDS = 45


async def test_a_batch_takes_its_least_share_of_what_streams_want(tmp_path: Path) -> None:
    settings = tenancy.policy_in(tmp_path / "policy")
    async with Fleet(tmp_path, settings=settings) as fleet:
        keys = await tenancy.keys_of(fleet)
        await tenancy.set_pace(fleet)
        await tenancy.run(fleet, keys, seconds=3)  # warms up
        await tenancy.settled(fleet)
        # Half before and half after: a machine that others use too is never the same for long.
        alone = await tenancy.run(fleet, keys, seconds=SECONDS / 2)
        await tenancy.settled(fleet)
        async with AsyncOpenAI(
            base_url=f"{fleet.url}/v1", api_key=keys[tenancy.BATCH_TENANT], max_retries=0
        ) as client:
            given = batching.content(LINES, model=tenancy.BATCH_MODEL, says=tenancy.BATCH_SAYS)
            batch, begun = await batching.begin(client, given), time.monotonic()
            await wait_until(lambda: batching.completed(client, batch), 30, "the first lines")
            before = await batching.completed(client, batch)
            beside = await tenancy.run(fleet, keys, seconds=SECONDS)
            after = await batching.completed(client, batch)
            done = await batching.end_of(client, batch, 300)
            took_s = time.monotonic() - begun
            await batching.assert_all_succeeded(client, done, LINES)
        alone += await tenancy.run(fleet, keys, seconds=SECONDS / 2)
        await tenancy.settled(fleet)
        most = await tenancy.assert_never_over(fleet)
        await tenancy.assert_totals_are_exact(fleet, keys)
        called = await fleet.control.calls(contains=f"[{tenancy.BATCH_MARK}]")
    for name, seen in (("alone", alone), ("beside the batch", beside)):
        shares = ", ".join(f"{tenant} {share:.4f}" for tenant, share in seen.shares.items())
        sys.stdout.write(
            f"\n  {name}: {seen.calls} streams, {shares} ({seen.furthest_off:.1%} off at most), "
            f"p95 queue {seen.p95_ms:.0f} ms"
        )
    sys.stdout.write(
        f"\n  p95 {beside.p95_ms / alone.p95_ms:.2f} times; {after - before} lines beside the "
        f"streams ({beside.low_share:.1%} of what was let in), all {LINES} in {took_s:.0f} s"
        f"\n  most at once: {most}\n"
    )
    assert len({call.prompt for call in called}) == len(called) == LINES
    assert alone.furthest_off <= 0.05
    assert beside.furthest_off <= 0.05
    assert beside.p95_ms <= 1.3 * alone.p95_ms
    assert after < LINES, "the batch was over too soon to say anything"
    assert beside.low_share >= 0.95 * tenancy.LEAST_SHARE
