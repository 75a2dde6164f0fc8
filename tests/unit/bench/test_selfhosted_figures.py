"""The bar of a quiet tenant at a server of one's own."""

from __future__ import annotations

import pytest

from bench.selfhosted.__main__ import ALONE, Measured, judged

AT_SLOTS = Measured("4", [1.7], [5.0] * 3, [1.9] * 3, [1.5] * 3, tokens=100)


@pytest.mark.parametrize(
    ("found", "bar"),
    [
        ([AT_SLOTS], "2.20"),
        ([AT_SLOTS, Measured("6", [1.7], [5.0], [3.9], [1.5], tokens=100)], "2.20"),
        ([Measured("6", [1.7], [5.0], [3.9], [1.5], tokens=100)], "1.80"),
    ],
    ids=["slots", "more than slots", "without it"],
)
def test_a_slot_is_taken_from_the_beginning_of_a_prompt(found: list[Measured], bar: str) -> None:
    """Where more calls are admitted than there are slots, some of the time is the server's queue:
    the time of the limit that equals the slots is that of all."""
    table, holds = judged([Measured(ALONE, [0.2]), *found])
    row = dict(zip(table.headers, table.rows[-1], strict=True))
    assert row["bar s"] == bar
    assert row[""] == ("holds" if float(bar) >= 1.7 else "missed")
    assert holds
