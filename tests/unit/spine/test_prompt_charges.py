"""What a prompt is charged that Google's SDK has called: as the same call over the wire."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from tidegate.admission.charges import Prices
from tidegate.admission.estimator import Estimator, pieces_of_text
from tidegate.call import Answer, Call, Kind, Usage, UsageState, new_id
from tidegate.errors import UpstreamError, UpstreamUnavailable
from tidegate.policy.deployment import Upstream
from tidegate.prices.rates import PeakHours, Price
from tidegate.record import CallRecord
from tidegate.spine.prompt import PromptExchange
from tidegate.spine.routing import Target
from tidegate.spine.run import CallFailed

UPSTREAM = Upstream("up", {}, "key", prices={"gemini-2.5-*": Price(input=1, output=10)})


def settled(answer: Answer, model: str, error: UpstreamError | None = None) -> CallRecord:
    record = CallRecord("stream", "default", datetime.now(UTC))
    record.answer = answer
    nothing: Any = None
    made = PromptExchange(nothing, nothing, Call(new_id(), "Hi", Kind.TEXT_ONLY, model), record)
    lane: Any = SimpleNamespace(demands=SimpleNamespace(prices=Prices(UPSTREAM)))
    estimate = Estimator().of_pieces(model, "text_only", pieces_of_text("Hi"))
    target = Target(UPSTREAM, model)
    failed = None if error is None else CallFailed(error, target)
    demand: Any = SimpleNamespace(estimate=estimate)
    made.settle(target, lane, demand, whole=error is None, failed=failed)
    return record


@pytest.mark.parametrize(
    ("model", "version", "micros"),
    [
        ("gemini-2.5-flash", "gemini-2.5-flash-001", 7 + 30),
        ("gemini-flash-latest", "gemini-2.5-flash", 7 + 30),
        ("gemini-flash-latest", None, None),
    ],
)
def test_an_alias_is_charged_by_the_model_that_has_answered(
    model: str, version: str | None, micros: int | None
) -> None:
    answer = Answer(["A tide."], usage=Usage(7, 3, total_tokens=10), model_version=version)
    assert settled(answer, model).charge.cost_micros == micros


@pytest.mark.parametrize(
    ("answer", "state", "micros"),
    [
        (Answer(["A tide."], usage=Usage(7, 3)), UsageState.PARTIAL, 7 + 30),
        (Answer(usage=Usage(7, 0, 20)), UsageState.PARTIAL, 7 + 200),
        (Answer(), UsageState.NONE, 0),
    ],
)
def test_an_error_after_a_part_of_an_answer_leaves_that_part_to_be_paid(
    answer: Answer, state: UsageState, micros: int
) -> None:
    failed = UpstreamUnavailable("the model is overloaded", status=503)
    charge = settled(answer, "gemini-2.5-flash", failed).charge
    assert (charge.state, charge.cost_micros or 0) == (state, micros)


def test_a_prompt_reserves_at_the_dearest_hour_that_it_may_run_into() -> None:
    """A Saturday's call may end on Sunday, as that of a job which waits may begin then."""
    always = PeakHours(2.0, ((0, 24),), frozenset({7}))
    urls = {"gemini": "https://generativelanguage.googleapis.com"}
    price = Price(input=1, output=0, peak=always)
    upstream = Upstream("up", urls, "key", provider="gemini", prices={"gemini-2.5-flash": price})
    saturday = datetime(2026, 11, 28, 23, 59, tzinfo=UTC)
    nothing: Any = None
    model, record = "gemini-2.5-flash", CallRecord("stream", "default", saturday)
    made = PromptExchange(nothing, nothing, Call(new_id(), "Hi", Kind.TEXT_ONLY, model), record)
    prices = Prices(upstream, now=saturday.timestamp)
    lane: Any = SimpleNamespace(demands=SimpleNamespace(prices=prices))
    estimate = Estimator().of_pieces("m", "text_only", pieces_of_text("Hi"))
    demand: Any = SimpleNamespace(estimate=estimate, images=0)
    cost = made.cost(Target(upstream, model), lane, demand)
    assert cost.most_micros == 2 * (len("Hi") + 50)
