"""Shares in virtual time, with at least 2,000 calls of each tenant."""

from __future__ import annotations

import sys

import pytest

from tests.property.backlog import random_backlog
from tidegate.limiter import MEASURES_OF_SHARES, FairBy

CASES = 100
CALLS = 2000


@pytest.mark.parametrize("fair_by", MEASURES_OF_SHARES)
def test_shares_are_within_five_percent_of_the_weights(fair_by: FairBy) -> None:
    worst = (0.0, 0)
    for number in range(CASES):
        shares = random_backlog(number, fair_by).shares(calls=CALLS)
        worst = max(worst, (max(abs(share - 1) for share in shares.values()), number))
    sys.stdout.write(f"\n  the worst of {CASES} cases is {worst[0]:.2%} off: case {worst[1]}\n")
    assert worst[0] < 0.05
