"""Benchmarks that no other test runs a part of: they start, and their calls are answered."""

from __future__ import annotations

from bench.submit import AT_ONCE, measure


async def test_submits_are_accepted_that_come_together() -> None:
    """They name a host that a gateway on loopback serves."""
    taken_ms = await measure(apis=1, rounds=1)
    assert len(taken_ms) == AT_ONCE
    assert taken_ms[0] > 0
