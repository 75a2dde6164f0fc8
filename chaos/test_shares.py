"""Shares of permit-time in virtual time, with at least 2,000 calls of each tenant."""

from __future__ import annotations

import sys

from tests.property.backlog import random_backlog

CASES = 100
CALLS = 2000


def test_shares_are_within_five_percent_of_the_weights() -> None:
    worst = (0.0, 0)
    for number in range(CASES):
        shares = random_backlog(number).shares(calls=CALLS)
        worst = max(worst, (max(abs(share - 1) for share in shares.values()), number))
    sys.stdout.write(f"\n  the worst of {CASES} cases is {worst[0]:.2%} off: case {worst[1]}\n")
    assert worst[0] < 0.05
