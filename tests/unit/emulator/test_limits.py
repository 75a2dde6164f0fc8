"""The gate over several limits: all or none."""

from __future__ import annotations

from tidegate.emulator.dialect import LimitGate, LimitRefusal
from tidegate.emulator.settings import RateLimit

MINE = RateLimit("text_only", 2, 60)
ALL = RateLimit("total", 3, 60, "fixed_window")
TOKENS = RateLimit("total", 100, 60, "token_bucket", "input_tokens")


def test_a_refused_demand_has_spent_nothing_of_any_limit() -> None:
    gate = LimitGate({}, [MINE, ALL, TOKENS])
    assert gate.spend("text_only", 101, 0) == LimitRefusal(TOKENS.name, 100, 60 * 10**9, TOKENS)
    assert gate.spend("text_only", 1, 0) is None
    assert gate.spend("text_only", 1, 0) is None
    refused = gate.spend("text_only", 1, 0)
    assert refused is not None
    assert refused.limit == MINE.name
    assert gate.spend("multi_modal", 98, 0) is None
    refused = gate.spend("multi_modal", 0, 0)
    assert refused is not None
    assert refused.limit == ALL.name


def test_calls_that_generate_nothing_are_outside_the_total() -> None:
    gate = LimitGate({"total": 1, "text_only": 5}, [RateLimit("total", 0, 60)])
    assert gate.spend("other", 0, 0) is None
    assert gate.full("other", 9, 9) is None
    full = gate.full("text_only", 0, 1)
    assert full is not None
    assert full.limit == "concurrency:total"
