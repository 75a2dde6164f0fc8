"""What one ended call adds to the rollup."""

from __future__ import annotations

from datetime import UTC, datetime

from tidegate.dashboard.rollup import count
from tidegate.record import CallRecord


def test_a_429_counts_for_the_upstream_that_gave_it() -> None:
    """The call went on to another one, which is not to be taken for the one that throttles."""
    record = CallRecord("relay", "acme", datetime.now(UTC), model="m", upstream="second", pool="b")
    record.note_throttled("first", "a")
    record.note_throttled("first", "a")
    record.end("succeeded", None)
    tally = count(record)
    assert tally.counts["throttled"] == 2
    upstreams = {name: tuple(amounts[:3]) for name, amounts in tally.by_group["upstream"].items()}
    assert upstreams == {"first": (0, 0, 2), "second": (1, 0, 0)}
    assert tuple(tally.by_group["tenant"]["acme"][:3]) == (1, 0, 2)
    assert tuple(tally.by_group["model"]["m"][:3]) == (1, 0, 2)
