"""Calls whose cost no bound on their tokens bounds."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.dialects import DIALECTS, endpoint_of
from tidegate.dialects.spec import Dialect
from tidegate.spine.models import why_unbounded

MESSAGES = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({}, ""),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, ""),
        ({"context_management": {"edits": [7, {"type": ["compact"]}]}}, ""),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "compaction"),
        ({"context_management": [{"type": "compaction"}]}, "compaction"),
        ({"models": ["m"]}, ""),
        ({"models": ["m", "n"]}, "another model"),
        ({"fallbacks": [{"model": "n"}]}, "another model"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
    ],
)
def test_a_call_that_may_cost_more_than_its_tokens_says_why(more: dict[str, Any], why: str) -> None:
    endpoint = endpoint_of("POST", "/v1/messages", Dialect.OPENAI)
    assert endpoint is not None
    body = MESSAGES | more
    facts = DIALECTS[endpoint.dialect].request_facts(endpoint, body)
    found = why_unbounded(body, facts, "m")
    assert why in found
    assert bool(why) is bool(found)
