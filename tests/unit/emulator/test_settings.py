"""Behaviour from JSON: what is taken, and that what is sent is what is meant."""

from __future__ import annotations

import json
from random import Random
from statistics import median
from typing import Any

import pytest

from tidegate.emulator.client import _plain
from tidegate.emulator.settings import Behaviour, Distribution, RateLimit
from tidegate.errors import InvalidRequest


def test_a_behaviour_survives_its_own_json() -> None:
    behaviour = Behaviour().changed(
        {
            "first_byte_ms": {"text_only": {"lognormal": [200, 0.5]}, "*": 10},
            "between_ms": {"uniform": [5, 20]},
            "concurrency": {"text_only": 5, "total": 9},
            "rates": [{"scope": "total", "limit": 60, "mode": "fixed_window"}],
            "classifier_answer": {"kind": "text_only"},
        }
    )
    sent = json.loads(json.dumps(behaviour.to_json(), default=_plain))
    assert Behaviour().changed(sent) == behaviour


def test_a_kind_that_is_not_named_takes_the_star_and_other_calls_do_not() -> None:
    behaviour = Behaviour().changed({"first_byte_ms": {"text_only": 5, "*": 7}})
    drawn = {kind: behaviour.first_byte(kind).first for kind in ("text_only", "classifier")}
    assert drawn == {"text_only": 5, "classifier": 7}
    assert behaviour.first_byte("other").first == 0


def test_delays_follow_their_distribution() -> None:
    random = Random(7)
    uniform = Distribution.parse("x", {"uniform": [20, 80]})
    drawn = [uniform.draw_ms(random) for _ in range(500)]
    assert 20 <= min(drawn) < 25
    assert 75 < max(drawn) <= 80
    lognormal = Distribution.parse("x", {"lognormal": [200, 0.5]})
    drawn = [lognormal.draw_ms(random) for _ in range(2000)]
    assert 185 < median(drawn) < 215
    assert max(drawn) > 600


WRONG: list[dict[str, Any]] = [
    {"first_byte_ms": -1},
    {"first_byte_ms": {"gamma": [1, 2]}},
    {"between_ms": {"uniform": [1, "2"]}},
    {"chunks": True},
    {"concurrency": 5},
    {"rates": [{"scope": "total", "limit": 1, "mode": "leaky"}]},
    {"rates": [{"scope": "total", "limit": 1, "per": 5}]},
    {"rates": 5},
    {"image_size": 100_000},
    {"strict_models": 1},
    {"works_on": 1},
]


@pytest.mark.parametrize("changes", WRONG, ids=str)
def test_a_value_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Behaviour().changed(changes)


def test_a_limit_is_named_by_what_it_bounds() -> None:
    assert RateLimit("total", 5, 60).name == "requests:total:60s"
    assert RateLimit("total", 5, 86_400).per_day
