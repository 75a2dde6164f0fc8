"""Tests for a run of `scripts/suite.py`: no test of the suite is here."""

from tests.waiting import promised_s


def test_holds() -> None:
    assert promised_s(1) in (1, 5)


def test_fails_beside_others() -> None:
    assert promised_s(1) == 1, "beside others"
