"""Upstreams as the policy's file states them."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from tidegate.config import Config
from tidegate.errors import ConfigError
from tidegate.policy.upstreams import Deployment, Price, deployment_of

CONFIG = Config.model_validate({"gemini_api_key": "AIzaSecret"})
WHOLE = """
[upstreams.openai]
provider = "openai"
key = "OPENAI_API_KEY"
models = ["gpt-*"]
aliases = { fast = "gpt-mini" }
weight = 2
idle_timeout_ms = 5_000
[upstreams.openai.limits]
"pool:total" = 7
"rpm:gpt-mini" = 60
[upstreams.openai.prices]
"gpt-*" = { input = 1.25, output = 10 }
"gpt-mini" = { input = 0.25, output = 2, cached = 0.025 }

[upstreams.local]
dialects = { openai = "http://127.0.0.1:9000/v1/" }
key = "LOCAL_KEY"

[[routes]]
model = "smart"
try = ["openai/gpt-x", "gemini"]

[weights]
acme = 4
"""


def deployment(text: str, **secrets: str) -> Deployment:
    known = {"OPENAI_API_KEY": "sk-1", "LOCAL_KEY": "k"} | secrets
    return deployment_of(tomllib.loads(text), CONFIG, lambda name: known.get(name, ""))


def test_without_a_file_there_is_the_account_of_the_environment() -> None:
    (gemini,) = deployment("").upstreams
    assert gemini.name == "gemini"
    assert set(gemini.base_urls) == {"gemini", "openai"}
    assert gemini.base_urls["openai"].endswith("/v1beta/openai")


def test_all_that_can_be_said() -> None:
    found = deployment(WHOLE)
    _, openai, local = found.upstreams
    assert (openai.key, openai.weight, openai.fit("fast")) == ("sk-1", 2, 1000)
    assert openai.timeouts == {"idle_timeout_ms": 5_000}
    assert openai.price("gpt-mini") == Price(0.25, 2, 0.025)
    assert openai.price("gpt-x") == Price(1.25, 10)
    assert openai.price("o9") is None
    assert local.base_urls == {"openai": "http://127.0.0.1:9000/v1"}
    assert found.policies["openai"].limits["pool:total"] == 7
    assert found.policies["openai"].weights == {"acme": 4}
    assert found.policies["local"].bound("pool:total") == 64
    assert found.routes[0].targets == (("openai", "gpt-x"), ("gemini", None))


def test_no_key_is_shown() -> None:
    assert "sk-1" not in repr(deployment(WHOLE))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[upstreams.X]\n", "upstreams.X"),
        ("[upstreams.a]\nkey = 'LOCAL_KEY'", "upstreams.a.dialects"),
        ("[upstreams.a]\nprovider = 'openai'", "upstreams.a.key"),
        ("[upstreams.a]\nprovider = 'openai'\nkey = 'sk-live'", "upstreams.a.key"),
        ("[upstreams.a]\nprovider = 'openai'\nkey = 'NOT_SET'", "NOT_SET"),
        ("[upstreams.a]\nprovider = 'other'\nkey = 'LOCAL_KEY'", "upstreams.a.provider"),
        ("[upstreams.a]\nprovider = ['openai']\nkey = 'LOCAL_KEY'", "upstreams.a.provider"),
        ("[upstreams.a]\nprovider = 'openai'\nkey = 'LOCAL_KEY'\nodd = 1", "upstreams.a.odd"),
        (
            "[upstreams.a]\nkey = 'LOCAL_KEY'\ndialects = {openai = 'ftp://x'}",
            "upstreams.a.dialects.openai",
        ),
        ("[upstreams.a]\nkey = 'LOCAL_KEY'\ndialects = {morse = 'http://x'}", "dialects.morse"),
        (
            "[upstreams.a]\nprovider='openai'\nkey='LOCAL_KEY'\n[upstreams.a.limits]\n'x'=1",
            "upstreams.a.limits",
        ),
        ("[upstreams.gemini]\nkey = 'LOCAL_KEY'", "upstreams.gemini.key"),
        ("[upstreams.gemini]\nweight = 0", "upstreams.gemini.weight"),
        ("[upstreams.gemini]\nidle_timeout_ms = 0", "upstreams.gemini.idle_timeout_ms"),
        ("[upstreams.gemini]\ntotal_timeout_ms = 1.5", "upstreams.gemini.total_timeout_ms"),
        ("[upstreams.gemini]\nmodels = []", "upstreams.gemini.models"),
        ("[upstreams.gemini.prices]\nx = {input = -1}", "prices.x.input"),
        ("[[routes]]\nmodel = 'x'\ntry = ['nobody/x']", "routes[0].try"),
        ("[[routes]]\nmodel = 'x'", "routes[0]"),
    ],
)
def test_what_is_wrong_is_named(text: str, names: str) -> None:
    with pytest.raises(ConfigError) as refused:
        deployment(text)
    shown: Any = str(refused.value)
    assert names in shown
    assert "sk-live" not in shown
