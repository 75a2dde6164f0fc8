"""Who is asked for which model, and in which order."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from tidegate.errors import NotFound
from tidegate.policy.upstreams import Deployment, Route, Upstream
from tidegate.relay.paths import Dialect
from tidegate.relay.targets import Targets

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
