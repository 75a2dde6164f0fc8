"""A module of tests that can't be imported."""

from __future__ import annotations


def test_passes() -> None:
    pass


raise RuntimeError("can't be imported")
