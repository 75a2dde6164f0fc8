"""A clock that the tests move."""

from __future__ import annotations


class ManualClock:
    def __init__(self) -> None:
        self.ns = 1_780_000_000 * 10**9

    def __call__(self) -> int:
        return self.ns

    def pass_s(self, seconds: float) -> None:
        self.ns += round(seconds * 1e9)
