"""Pages of lists: how many entries a client may request."""

from __future__ import annotations

import pytest

from tidegate.dialects.resources import anthropic_page, gemini_page, openai_page
from tidegate.errors import InvalidRequest


@pytest.mark.parametrize("number", ["0" * 9 + "101", "0" * 8 + "1" + "9" * 30, "1" * 5_000, "-1"])
def test_a_limit_is_checked_as_the_number_that_it_is(number: str) -> None:
    for page, query in (
        (openai_page, f"limit={number}"),
        (anthropic_page, f"limit={number}"),
        (gemini_page, f"pageSize={number}"),
    ):
        with pytest.raises(InvalidRequest, match="a whole number from"):
            page("file", query)
