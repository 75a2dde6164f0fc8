"""How well the input of native calls is estimated, of providers that count in ways of their own.

Two figures judge it: how often too little is reserved, and how much is reserved over what is used.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from tidegate.admission.demand import CallDemand, Demands
from tidegate.admission.estimator import MOST_TOOL_SETS, Modality, Track
from tidegate.call import Usage
from tidegate.dialects import DIALECTS, endpoint_of
from tidegate.dialects.spec import Dialect
from tidegate.policy.format import of_plain

POLICY = of_plain({"limits": {"kind:text_only": 5, "kind:multi_modal": 5, "itpm:m": 1_000_000}})
WEB_SEARCH = {"type": "web_search_20250305", "name": "web_search"}
Body = dict[str, Any]


def tool(name: str, *properties: str) -> Body:
    schema = {"type": "object", "properties": {one: {"type": "string"} for one in properties}}
    return {"name": name, "description": f"Looks up {name}", "input_schema": schema}


def demand(demands: Demands, body: Body, tenant: str = "acme") -> CallDemand:
    endpoint = endpoint_of("POST", "/v1/messages", Dialect.ANTHROPIC)
    assert endpoint is not None
    asked = DIALECTS[endpoint.dialect].request_facts(
        endpoint, {"model": "m", "max_tokens": 50, **body}
    )
    return demands.of_native(
        *(asked.model, asked.kind.value, asked.pieces, POLICY),
        tenant=tenant,
        priority=0,
        max_output_tokens=asked.max_output_tokens,
    )


def input_of(one: CallDemand) -> int:
    assert one.tokens is not None
    return one.tokens.input


def guess(one: CallDemand) -> int:
    assert one.estimate is not None
    return one.estimate.guessed_input_tokens


def judged(
    calls: int, ask: Callable[[Random], Body], count: Callable[[Body, int], float]
) -> tuple[float, float]:
    """The share of calls of which too little was reserved, and reserved over used; of the last half
    of them. `count`: what the provider counts of a body, and of our guess."""
    rng, demands = Random(1), Demands()
    short = reserved = used = 0
    for number in range(calls):
        body = ask(rng)
        one = demand(demands, body)
        actual = max(1, round(count(body, guess(one)) * rng.lognormvariate(0, 0.05)))
        demands.learn(one, Usage(actual, 10), whole=True)
        if 2 * number >= calls:
            short += actual > input_of(one)
            reserved += input_of(one)
            used += actual
    return 2 * short / calls, reserved / used


def text(rng: Random, most: int = 4) -> str:
    return "word " * max(1, round(rng.lognormvariate(most, 1.5)))


def test_a_constant_is_learned_beside_the_ratio() -> None:
    """A prompt of the provider's own for tools, of more tokens than most requests have."""

    def ask(rng: Random) -> Body:
        tools = {"tools": [tool("weather", "city")]} if rng.random() < 0.5 else {}
        return {"messages": [{"role": "user", "content": text(rng)}], **tools}

    short, over = judged(400, ask, lambda body, guess: guess + 1_500 * ("tools" in body))
    assert short <= 0.08
    assert over < 1.3


def test_each_set_of_tools_has_a_constant_of_its_own() -> None:
    sets = [[tool(f"tool{number}" * (number + 1), "a", "b")] for number in range(8)]

    def ask(rng: Random) -> Body:
        return {"messages": [{"role": "user", "content": "hello"}], "tools": rng.choice(sets)}

    def count(body: Body, guess: int) -> float:
        return guess + 150 * (1 + sets.index(body["tools"]))

    short, over = judged(400, ask, count)
    assert short <= 0.08
    assert over < 1.2


def test_what_is_read_on_the_provider_s_side_teaches_nothing_of_other_calls() -> None:
    demands, rng = Demands(), Random(1)
    plain = {"messages": [{"role": "user", "content": "word " * 100}]}
    pdf = {"type": "document", "source": {"type": "file", "file_id": "file_1"}}
    others: list[Body] = [
        {**plain, "tools": [WEB_SEARCH]},
        {**plain, "container": "container_1"},
        {"messages": [{"role": "user", "content": [pdf]}]},
    ]
    for _ in range(60):
        one = demand(demands, plain)
        demands.learn(one, Usage(round(guess(one) * rng.uniform(0.9, 1.1)), 10), whole=True)
        for body in others:
            usage = Usage(round(rng.lognormvariate(10, 1)), 10)
            demands.learn(demand(demands, body), usage, whole=True)
    one = demand(demands, plain)
    assert input_of(one) < 1.3 * guess(one)
    assert all(input_of(demand(demands, body)) > 20_000 for body in others)


@pytest.mark.parametrize(
    ("body", "at_least"),
    [
        ({"tools": [tool("weather", "city")]}, 800),  # the provider's prompt: up to 804
        ({"tools": [WEB_SEARCH]}, 10_000),  # some pages of a search
        ({"container": "container_1"}, 10_000),
    ],
)
def test_first_calls_reserve_what_the_provider_may_add(body: Body, at_least: int) -> None:
    one = demand(Demands(), {"messages": [{"role": "user", "content": "hi"}], **body})
    assert input_of(one) >= at_least
    assert guess(one) < 30


def test_large_calls_are_not_judged_by_the_errors_of_small_ones() -> None:
    """What a provider adds to small calls can be many times them, and is nothing to large ones."""

    def ask(rng: Random) -> Body:
        large = rng.random() < 0.3
        return {"messages": [{"role": "user", "content": "word " * (30_000 if large else 10)}]}

    def count(_: Body, guess: int) -> float:
        return guess + 40 * (guess % 5) if guess < 1_000 else guess

    short, over = judged(600, ask, count)
    assert short <= 0.08
    assert over < 1.3


@pytest.mark.parametrize("beside", [{}, {"tools": [tool("weather", "city")]}])
@pytest.mark.parametrize("special", [{}, {"tools": [WEB_SEARCH]}, {"container": "c"}])
def test_no_track_can_be_taught_below_the_first_guess_nor_by_another_tenant(
    beside: Body, special: Body
) -> None:
    demands = Demands()
    body = {"messages": [{"role": "user", "content": "word " * 500}], **beside, **special}
    before = input_of(demand(demands, body, "other"))
    for _ in range(100):
        demands.learn(demand(demands, body), Usage(1, 1), whole=True)
    one = demand(demands, body)
    assert input_of(one) == guess(one) >= 625
    assert input_of(demand(demands, body, "other")) == before
    for _ in range(100):
        demands.learn(demand(demands, body), Usage(10**9, 10**9), whole=True)
    assert input_of(demand(demands, body, "other")) == before


def test_one_wild_figure_does_not_throw_a_set_of_tools_off() -> None:
    demands = Demands()
    body = {"messages": "word " * 100, "tools": [tool("weather", "city")]}
    for _ in range(60):
        one = demand(demands, body)
        demands.learn(one, Usage(guess(one) + 500, 10), whole=True)
    before = demand(demands, body)
    demands.learn(before, Usage(10_000_000, 10), whole=True)
    assert input_of(demand(demands, body)) < 2 * input_of(before)


def test_the_sets_of_tools_that_are_known_are_bounded() -> None:
    track = Track()
    for number in range(2 * MOST_TOOL_SETS):
        track.learn({Modality.LATIN: 10.0}, 1_000, 2_000, tools=number + 1)
    oldest = MOST_TOOL_SETS + 1
    plain = track.predict({Modality.LATIN: 10.0}).expected
    for number in range(1, 2 * MOST_TOOL_SETS + 1):
        known = track.predict({Modality.LATIN: 10.0}, tools=number).expected != plain
        assert known == (number >= oldest)


def test_calls_of_each_track_are_shown_by_themselves() -> None:
    demands = Demands()
    plain = {"messages": "word " * 100}
    for body in (plain, {**plain, "tools": [WEB_SEARCH]}, {**plain, "container": "c"}):
        demands.learn(demand(demands, body), Usage(1_000, 10), whole=True)
    assert {one.part for one in demands.estimator.error()} == {
        *("input", "input:hosted", "input:state", "output:text_only"),
    }


@pytest.mark.parametrize(
    ("model", "with_tools", "at_least"),
    [
        ("openai/gpt-oss-20b", False, 65),
        ("meta-llama/Llama-3.3-70B-Instruct", False, 36),
        ("deepseek-chat", True, 300),
        ("anthropic/claude-sonnet-4.6", True, 500),
    ],
)
def test_what_a_model_s_template_adds_is_expected_of_the_first_call(
    model: str, with_tools: bool, at_least: int
) -> None:
    """Models that other providers serve in OpenAI's dialect are not OpenAI's."""
    endpoint = endpoint_of("POST", "/v1/chat/completions", Dialect.OPENAI)
    assert endpoint is not None
    said: Body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    if with_tools:
        said["tools"] = [{"type": "function", "function": {"name": "weather"}}]
    expected = []
    for body in (said, {**said, "model": "gpt-4o"}):
        asked = DIALECTS[Dialect.OPENAI].request_facts(endpoint, body)
        one = Demands().of_native(model, "text_only", asked.pieces, POLICY, tenant="a", priority=0)
        assert one.estimate is not None
        assert guess(one) < 20
        expected.append(one.estimate.expected_input_tokens)
    assert expected[0] >= at_least > expected[1]


def test_of_the_calls_of_a_model_five_in_a_hundred_at_most_use_more_than_is_reserved() -> None:
    """Also where calls follow that are unlike those that are remembered."""
    demands, rng = Demands(), Random(4)
    body: Body = {"messages": [{"role": "user", "content": "word " * 100}]}
    short = 0
    for number in range(3_000):
        one = demand(demands, body)
        spread = 0.2 + 0.1 * (number // 50 % 2)
        actual = round(guess(one) * rng.lognormvariate(0.5, spread))
        short += actual > input_of(one)
        demands.learn(one, Usage(actual, 10), whole=True)
    assert short / 3_000 <= 0.05
