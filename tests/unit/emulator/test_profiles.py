"""Accounts from JSON: what is taken, what a provider's profile adds, what is refused."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from tidegate.emulator.__main__ import parse
from tidegate.emulator.account import DIALECTS, AccountSpec, Provider
from tidegate.emulator.client import _plain
from tidegate.emulator.settings import Behaviour
from tidegate.errors import ConfigError, InvalidRequest


def parsed(value: Any) -> AccountSpec:
    spec = AccountSpec.parse(value)
    assert spec is not None
    return spec


@pytest.mark.parametrize("provider", get_args(Provider))
def test_a_providers_name_is_an_account(provider: str) -> None:
    spec = parsed(provider)
    assert spec.limits
    assert spec.provider == provider
    assert provider in DIALECTS


def test_an_account_survives_its_own_json() -> None:
    spec = parsed(
        {
            "provider": "bedrock",
            "limits": [
                {"unit": "tokens", "bound": 5, "growth": {"start": 3}, "pace_s": 1},
                {"unit": "requests", "bound": 7, "window_s": 86_400, "zone": "Europe/Berlin"},
            ],
            "cache": 0.9,
            "tier": 1.5,
            "others_share": 0.3,
            "headers": "mistral",
            "workspaces": {"w": 0.5},
        }
    )
    behaviour = Behaviour().changed({"account": spec})
    sent = json.loads(json.dumps(behaviour.to_json(), default=_plain))
    assert Behaviour().changed(sent).account == spec


def test_a_limits_own_fields_come_before_the_profiles() -> None:
    limits = [{"unit": "tokens", "bound": 9, "reserve": "input", "weights": {"output": 1}}]
    (limit,) = parsed({"provider": "bedrock", "limits": limits}).limits
    assert (limit.mode, limit.reserve) == ("fixed_window", "input")
    assert (limit.weights.output, limit.weights.cached) == (1, 1)


def test_geminis_days_are_californias() -> None:
    limits = [{"unit": "requests", "bound": 9, "window_s": 86_400}]
    (limit,) = parsed({"provider": "gemini", "limits": limits}).limits
    assert (limit.mode, limit.zone) == ("calendar_day", "America/Los_Angeles")


def test_the_command_line_takes_a_name_or_json() -> None:
    settings, _ = parse(["--account", "groq"])
    assert settings.behaviour.account == parsed("groq")
    settings, _ = parse(["--account", '{"provider": "groq", "tier": 2}'])
    assert settings.behaviour.account == parsed({"provider": "groq", "tier": 2})
    with pytest.raises(ConfigError, match="llama"):
        parse(["--account", "llama"])


WRONG: list[Any] = [
    5,
    "llama",
    {},
    {"provider": "openai", "speed": 1},
    {"provider": "openai", "limits": 5},
    {"provider": "openai", "limits": [5]},
    {"provider": "openai", "limits": [{"bound": 1}]},
    {"provider": "openai", "limits": [{"unit": "tokens"}]},
    {"provider": "openai", "limits": [{"unit": "tokens", "bound": -1}]},
    {"provider": "openai", "limits": [{"unit": "tokens", "bound": 1, "mode": "leaky"}]},
    {"provider": "openai", "limits": [{"unit": "tokens", "bound": 1, "reserve": "all"}]},
    {"provider": "openai", "limits": [{"unit": "tokens", "bound": 1, "weights": {"x": 1}}]},
    {"provider": "openai", "limits": [{"unit": "tokens", "bound": 1, "growth": {}}]},
    {"provider": "openai", "limits": [{"unit": "tokens", "bound": 1, "zone": "Mars/Base"}]},
    {"provider": "openai", "limits": [{"unit": "tokens", "bound": 1, "pace_s": 0}]},
    {"provider": "openai", "limits": [{"unit": "tokens", "bound": 1, "models": 1}]},
    {"provider": "openai", "cache": "all"},
    {"provider": "openai", "cache": 2},
    {"provider": "openai", "headers": "acme"},
    {"provider": "openai", "others_share": 1.5},
    {"provider": "openai", "counts_failed": 1},
    {"provider": "openai", "workspaces": [1]},
]


@pytest.mark.parametrize("value", WRONG, ids=str)
def test_an_account_without_sense_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Behaviour().changed({"account": value})
    assert refused.value.field.startswith("account")
