"""The most telling faults of `python -m chaos.limiter`, once each and in a small size."""

from __future__ import annotations

import random

import pytest

from chaos.limiter import network
from chaos.limiter.play import play
from chaos.limiter.scene import Size

# What depends on a quiet machine, how soon and how well permits are used again, is not judged here.
SMALL = Size(
    workers=3,
    tasks=30,
    limit=6,
    lease_ms=600,
    call_ms=50.0,
    spread_ms=50.0,
    back_share=0.3,
    slack_s=15.0,
)


@pytest.mark.parametrize("name", ["kill", "stop-hold", "restart-empty", "lose-all", "partition"])
async def test_the_promise_is_kept(name: str) -> None:
    if name == "partition" and network.missing():
        name = "cut-off"  # the same by a proxy, where namespaces are not to be had
    outcome = await play(name, SMALL, 0.0, random.Random(name), rounds=1)
    assert outcome.problems == []
    assert outcome.peak == SMALL.limit
    assert len(outcome.rounds) == 1
