"""Who is asked for which model, and in which order."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from tidegate.dialects.spec import Dialect
from tidegate.errors import InvalidRequest, NotFound
from tidegate.policy.deployment import Deployment, Route, Upstream
from tidegate.spine.routing import Targets

GEMINI = Upstream("gemini", {"gemini": "http://g", "openai": "http://g/openai"}, "k")
OPENAI = Upstream("openai", {"openai": "http://o"}, "k", ("gpt-*",), {"fast": "gpt-mini"})
TWIN = Upstream("twin", {"openai": "http://t"}, "k", ("gpt-*",), weight=3)


def targets(*routes: Route) -> Targets:
    return Targets(Deployment((GEMINI, OPENAI, TWIN), routes), Random(1))


def names(found: Targets, model: str, dialect: Dialect = Dialect.OPENAI) -> list[tuple[str, str]]:
    return [(one.upstream.name, one.model) for one in found.of(dialect, model)]


def test_who_names_the_model_comes_before_who_takes_any() -> None:
    found = targets()
    assert {name for name, _ in names(found, "gpt-x")} == {"openai", "twin"}
    assert names(found, "gemini-x") == [("gemini", "gemini-x")]
    assert names(found, "models/gemini-x", Dialect.GEMINI) == [("gemini", "gemini-x")]


def test_an_alias_names_the_upstreams_own_model() -> None:
    assert names(targets(), "fast") == [("openai", "gpt-mini")]


def test_equals_are_drawn_by_weight_and_all_stand_in() -> None:
    found = targets()
    firsts = Counter(names(found, "gpt-x")[0][0] for _ in range(4000))
    assert firsts["twin"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert len(names(found, "gpt-x")) == 2


def test_a_route_is_a_chain_in_its_order() -> None:
    route = Route("smart*", (("openai", "gpt-x"), ("gemini", "gemini-pro"), ("twin", None)))
    found = targets(route)
    assert names(found, "smart-1") == [
        ("openai", "gpt-x"),
        ("gemini", "gemini-pro"),
        ("twin", "smart-1"),
    ]
    assert names(found, "smart-1", Dialect.GEMINI) == [("gemini", "gemini-pro")]


def test_a_model_that_nobody_serves_is_not_found() -> None:
    with pytest.raises(NotFound, match="claude"):
        targets().of(Dialect.ANTHROPIC, "claude")


def test_a_call_that_names_no_model_goes_to_who_speaks_that_dialect_first() -> None:
    assert {name for name, _ in names(targets(), "")} == {"openai", "twin"}
    assert names(targets(), "", Dialect.GEMINI) == [("gemini", "")]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("gpt-x", "by the upstream 'openai', which a prompt can't reach: call POST /v1/chat/compl"),
        ("fast", "'fast' is served by the upstream 'openai'"),
    ],
)
def test_a_prompt_for_a_model_of_another_upstream_is_refused(model: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        targets().check_prompt(model)
    assert said in refused.value.message
    assert refused.value.allowed == "gemini: *"
    assert refused.value.field == "model"


def test_a_prompt_for_a_model_of_geminis_account_passes() -> None:
    found = targets(Route("gpt-y", (("openai", None), ("gemini", None))))
    for model in ("gemini-pro", "models/gemini-pro", "whatever", "gpt-y"):
        found.check_prompt(model)


def test_a_prompt_may_name_a_route_to_an_upstream_of_geminis_dialect() -> None:
    smart = Route("smart", (("openai", "gpt-x"), ("gemini", "gemini-pro")))
    found = targets(smart, Route("mine", (("gemini", "gemini-pro"),)))
    for model in ("smart", "mine"):
        found.check_prompt(model)
        assert names(found, model, Dialect.GEMINI) == [("gemini", "gemini-pro")]


def test_without_geminis_account_a_prompt_is_told_what_there_is() -> None:
    with pytest.raises(InvalidRequest, match="GEMINI_API_KEY, and there is none: call") as no:
        Targets(Deployment((OPENAI,))).check_prompt("gemini-2.5-flash")
    assert no.value.allowed == "openai: gpt-*"


@pytest.mark.parametrize(
    ("model", "pools"),
    [
        *(("gpt-x", ["openai", "twin"]), ("gpt-mini", ["openai", "twin"]), ("x", ["gemini"])),
        ("gpt-routed", ["openai", "twin"]),
        ("pro", ["gemini", "openai"]),  # the route's own name for it, at openai
    ],
)
def test_a_limit_on_a_model_belongs_to_the_pools_that_call_it(model: str, pools: list[str]) -> None:
    found = targets(Route("smart", (("openai", "pro"), ("twin", "gpt-routed"))))
    assert found.pools_for(model) == pools
