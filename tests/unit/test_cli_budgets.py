"""Commands `tidegate budgets`: what they refuse before they reach a deployment."""

from __future__ import annotations

import pytest

from tests.unit.invoked import invoke
from tidegate.errors import ConfigError


@pytest.mark.parametrize(
    "period", ["500ms", "1500ms", "400d", "99999999999d", "fortnight", "9" * 400 + "d"]
)
def test_a_period_that_no_budget_can_have_is_refused_by_its_option(period: str) -> None:
    with pytest.raises(ConfigError) as refused:
        invoke("budgets", "set", "b", "--usd", "1", "--period", period)
    assert (refused.value.variable, refused.value.value) == ("--period", period)
    assert refused.value.allowed == "day, week, month, or whole seconds up to 366d"


def test_a_share_that_is_no_number_is_refused_by_its_option() -> None:
    for alerts in (("much",), ("80", "none")):
        options = [text for one in alerts for text in ("--alert", one)]
        with pytest.raises(ConfigError) as refused:
            invoke("budgets", "set", "b", *options)
        assert refused.value.variable == "--alert"
