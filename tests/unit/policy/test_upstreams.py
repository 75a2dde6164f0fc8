"""Upstreams as the policy's file states them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from tidegate.errors import ConfigError
from tidegate.policy.deployment import Deployment, Preempt, deployment_of, stated_by
from tidegate.prices.rates import Price
from tidegate.settings import Config
from tidegate.spine.resources import account_of
from tidegate.usual_models import EMULATORS_KEY

CONFIG = Config.model_validate({"gemini_api_key": "AIzaSecret"})
WHOLE = """
[upstreams.openai]
provider = "openai"
key = "OPENAI_API_KEY"
models = ["gpt-*"]
aliases = { fast = "gpt-mini" }
weight = 2
connect_timeout_ms = 20_000
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


def deployment(text: str, config: Config = CONFIG, **secrets: str) -> Deployment:
    known = {"OPENAI_API_KEY": "sk-1", "LOCAL_KEY": "k"} | secrets
    return deployment_of(tomllib.loads(text), config, lambda name: known.get(name, ""))


def with_keys(**keys: object) -> Config:
    """Settings of a gateway that others reach, where no emulator takes the place of Gemini."""
    stores = {"database_url": "postgresql://db/x", "redis_url": "redis://valkey"}
    return Config.model_validate({"host": "0.0.0.0", **stores, **keys})


def names(found: Deployment) -> list[str]:
    return [one.name for one in found.upstreams]


def test_without_a_file_there_is_the_account_of_the_environment() -> None:
    (gemini,) = deployment("").upstreams
    assert gemini.name == "gemini"
    assert set(gemini.base_urls) == {"gemini", "openai"}
    assert gemini.base_urls["openai"].endswith("/v1beta/openai")


def test_all_that_can_be_said() -> None:
    found = deployment(WHOLE)
    _, openai, local = found.upstreams
    assert (openai.key, openai.weight, openai.fit("fast")) == ("sk-1", 2, 1000)
    assert openai.timeouts == {"connect_timeout_ms": 20_000, "idle_timeout_ms": 5_000}
    assert openai.access("openai").connect_ms == 20_000
    assert local.access("openai").connect_ms is None
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
        ("[upstreams.a]\nkey = 'LOCAL_KEY'", "upstreams.a.base_url"),
        ("[upstreams.a]\nprovider = 'gemini'", "upstreams.a.key"),
        ("[upstreams.a]\nprovider = 'anthropic'", "ANTHROPIC_API_KEY"),
        ("[upstreams.a]\nkey = ''\nbase_url = 'http://x'", "upstreams.a.key"),
        ("[upstreams.a]\nbase_url = 'gpu:8000'", "upstreams.a.base_url"),
        ("[upstreams.a]\nbase_url = 'http://g pu:8000'", "upstreams.a.base_url"),
        ("[upstreams.a]\nbase_url = 'http://gpu:8000/v1 '", "upstreams.a.base_url"),
        ("[upstreams.a]\nbase_url = 'http://gpu:8000/v1#a'", "upstreams.a.base_url"),
        ("[upstreams.a]\nbase_url = 'http://gpu:8000/v1?'", "upstreams.a.base_url"),
        ("[upstreams.a]\nbase_url = 'http://x'\ndialect = 'morse'", "upstreams.a.dialect"),
        ("[upstreams.a]\nprovider = 'openai'\ndialect = 'openai'", "upstreams.a.dialect"),
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
        (
            "[upstreams.gemini]\npassthrough = ['/v1/x']\npassthrough_tenants = ['a b']",
            "upstreams.gemini.passthrough_tenants",
        ),
        ("[upstreams.gemini]\npassthrough_tenants = ['a']", "gemini.passthrough_tenants"),
        ("[upstreams.gemini]\nadopt = true", "upstreams.gemini.adopt"),
        ("[upstreams.gemini]\nadopt = 'a|b'", "upstreams.gemini.adopt"),
        (
            "[upstreams.gemini]\nadopt = 'a'\n[upstreams.b]\nbase_url = 'http://b'\nadopt = 'a'",
            "upstreams.b.adopt",
        ),
        ("[upstreams.gemini]\npreempt = 'yes'", "upstreams.gemini.preempt"),
        ("[upstreams.gemini]\npreempt = true\nabandoned = 'wait'", "upstreams.gemini.preempt"),
        ("[upstreams.a]\nprovider = 'llama.cpp'\npreempt = true", "upstreams.a.preempt"),
        ("[upstreams.a]\nprovider = 'vllm'\nabandoned = true", "upstreams.a.abandoned"),
        ("[upstreams.a]\nprovider = 'vllm'\nmedia_hosts = 'any'", "upstreams.a.media_hosts"),
        ("[upstreams.a]\nprovider = 'vllm'\nmedia_hosts = [1]", "upstreams.a.media_hosts"),
        ("[upstreams.gemini.preempt]\nafter = 5", "upstreams.gemini.preempt.after"),
        ("[upstreams.gemini.preempt]\nafter_ms = 0", "upstreams.gemini.preempt.after_ms"),
        ("[upstreams.gemini.preempt]\ntimes = 0", "upstreams.gemini.preempt.times"),
        ("[upstreams.gemini.prices]\nx = {input = -1}", "prices.x.input"),
        (
            "[upstreams.gemini.prices]\nx = {input = 1_000_001}",
            "prices.x.input=1000001: must be a number from 0 to 1000000",
        ),
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


@pytest.mark.parametrize(
    ("text", "preempt"),
    [
        ("weight = 1", None),
        ("preempt = false", None),
        ("preempt = true", Preempt(1_000, 3)),
        ("preempt = {}", Preempt(1_000, 3)),
        ("preempt = { after_ms = 250, times = 5 }", Preempt(250, 5)),
    ],
)
def test_when_calls_give_way(text: str, preempt: Preempt | None) -> None:
    assert deployment(f"[upstreams.gemini]\n{text}").upstreams[0].preempt == preempt


@pytest.mark.parametrize(
    ("text", "abandoned"),
    [
        ("provider = 'llama.cpp'", "wait"),
        ("provider = 'llama.cpp'\nabandoned = 'release'\npreempt = true", "release"),
        ("provider = 'vllm'", "release"),
        ("provider = 'vllm'\nabandoned = 'wait'", "wait"),
        ("base_url = 'http://gpu:1'", "release"),
    ],
)
def test_what_becomes_of_calls_that_were_left(text: str, abandoned: str) -> None:
    found = deployment(f"[upstreams.a]\n{text}").upstreams
    assert [one.abandoned for one in found if one.name == "a"] == [abandoned]


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("provider = 'vllm'", ()),
        ("provider = 'llama.cpp'\nmedia_hosts = ['cdn.example.com', '*.b.test']", None),
        ("provider = 'vllm'\nmedia_hosts = ['*']", ("*",)),
        ("base_url = 'http://gpu:1'", ("*",)),
        ("base_url = 'http://gpu:1'\nmedia_hosts = []", ()),
        ("provider = 'groq'\nkey = 'LOCAL_KEY'", ("*",)),
    ],
)
def test_where_a_server_may_fetch_what_a_request_names(
    text: str, hosts: tuple[str, ...] | None
) -> None:
    found = deployment(f"[upstreams.a]\n{text}", LOCAL_KEY="k").upstreams
    expected = ("cdn.example.com", "*.b.test") if hosts is None else hosts
    assert [one.media_hosts for one in found if one.name == "a"] == [expected]


def test_a_key_in_the_environment_makes_an_upstream() -> None:
    found = deployment("", with_keys(openai_api_key="sk-2", anthropic_api_key="sk-ant"))
    assert names(found) == ["openai", "anthropic"], "no account of Gemini without its key"
    openai, anthropic = found.upstreams
    assert (openai.key, openai.base_urls) == ("sk-2", {"openai": "https://api.openai.com/v1"})
    assert all(openai.fit(one) > 1 for one in ("gpt-5", "o1", "o3-mini", "chatgpt-4o-latest"))
    assert anthropic.fit("claude-sonnet-5") > 1
    assert openai.fit("claude-sonnet-5") == anthropic.fit("gpt-5") == openai.fit("") == 0
    assert found.policies["openai"].bound("pool:total") == 64


@pytest.mark.parametrize(
    "text",
    [
        "[upstreams.openai]\nbase_url = 'http://mine'",
        "[upstreams.first]\nprovider = 'openai'\nkey = 'LOCAL_KEY'",
        "[upstreams.first]\nbase_url = 'http://mine'\nkey = 'OPENAI_API_KEY'",
    ],
)
def test_a_key_makes_none_where_the_file_has_one_that_uses_it(text: str) -> None:
    assert len(names(deployment(text, with_keys(openai_api_key="sk-2")))) == 1


def test_a_key_of_this_gateway_in_an_sdks_variable_makes_no_upstream() -> None:
    config = with_keys(openai_api_key="tg_abcd_efgh", anthropic_api_key="sk-ant")
    assert names(deployment("", config)) == ["anthropic"]


def test_the_file_may_say_more_of_the_upstream_that_a_key_makes() -> None:
    text = "[upstreams.openai.limits]\n'pool:total' = 7"
    found = deployment(text, with_keys(openai_api_key="sk-2"))
    assert found.upstreams[0].fit("gpt-5") > 1
    assert (names(found), found.policies["openai"].bound("pool:total")) == (["openai"], 7)
    (found_here,) = deployment("[upstreams.openai]\nprovider = 'openai'", with_keys()).upstreams
    assert (found_here.key, found_here.models) == ("sk-1", ("*",))


def test_what_is_said_of_geminis_account_needs_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^GEMINI_API_KEY=\(not set\): must be set"):
        deployment("[upstreams.gemini]\nweight = 2", with_keys(openai_api_key="sk-2"))


def test_the_emulator_takes_only_geminis_models_beside_another_upstream() -> None:
    alone = deployment("", Config()).upstreams[0]
    assert alone.fit("gpt-5") == 1
    config = Config.model_validate({"openai_api_key": "sk-2", "text_model": "mine"})
    for one in (config, config.model_copy(update={"gemini_api_key": SecretStr(EMULATORS_KEY)})):
        gemini = deployment("", one).upstreams[0]
        assert gemini.name == "gemini"
        assert gemini.fit("gemini-2.5-flash") > gemini.fit("gpt-5") == gemini.fit("llama") == 0
        assert gemini.fit("mine")
    theirs = config.model_copy(update={"text_model": "gpt-5"})
    assert deployment("", theirs).upstreams[0].fit("gpt-5") == 0, "it is the other one's"
    gemini, any_model = deployment("[upstreams.x]\nprovider = 'openai'", theirs).upstreams
    assert (gemini.fit("gpt-5"), any_model.fit("gpt-5")) == (0, 1), "one for any model is asked"


def test_a_policy_that_is_a_folder_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as Docker makes of a mount whose file is missing: all limits would be left out."""
    (tmp_path / "tidegate.toml").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"tidegate.toml=\(file\): must be a readable file"):
        stated_by(Config())


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("base_url = 'http://gpu:8000/v1'", {"openai": "http://gpu:8000/v1"}),
        ("base_url = 'http://gpu:8000/'", {"openai": "http://gpu:8000/v1"}),
        ("base_url = 'http://gpu/llm/v1/'", {"openai": "http://gpu/llm/v1"}),
        ("base_url = 'http://g/v1'\ndialect = 'anthropic'", {"anthropic": "http://g"}),
        ("base_url = 'http://g/v1beta'\ndialect = 'gemini'", {"gemini": "http://g"}),
        (
            "base_url = 'http://g'\nprovider = 'anthropic'\nkey = 'LOCAL_KEY'",
            {"anthropic": "http://g"},
        ),
        ("dialects = {openai = 'http://g/v1'}", {"openai": "http://g/v1"}),
    ],
)
def test_a_base_url_is_enough(text: str, url: dict[str, str]) -> None:
    *_, found = deployment(f"[upstreams.gpu]\n{text}").upstreams
    assert found.base_urls == url
    assert found.key == ("k" if "LOCAL_KEY" in text else "")


GOOGLE = """
[upstreams.one]
provider = "vertex"
project = "p"
credentials_file = "{one}"

[upstreams.two]
provider = "vertex"
project = "p"
credentials_file = "{two}"
"""


def test_identities_at_one_url_are_accounts_of_their_own(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("one", "two")}
    for file in files.values():
        file.write_text("{}")
    one, two = deployment(GOOGLE.format(**files), with_keys()).upstreams
    assert (one.key, one.base_urls) == (two.key, two.base_urls) == ("", one.base_urls)
    assert account_of(one, "gemini") != account_of(two, "gemini")
    same = deployment(GOOGLE.format(one=files["one"], two=files["one"]), with_keys()).upstreams
    assert len({account_of(each, "gemini") for each in same}) == 1


def test_the_value_of_a_header_tells_accounts_apart() -> None:
    text = """
    [upstreams.one]
    base_url = "http://127.0.0.1:1/v1"
    headers = { x-account = "env:ONE" }

    [upstreams.two]
    base_url = "http://127.0.0.1:1/v1"
    headers = { x-account = "env:TWO" }
    """
    one, two = deployment(text, with_keys(), ONE="a", TWO="b").upstreams
    assert account_of(one, "openai") != account_of(two, "openai")


def test_the_prices_of_the_first_account_are_read_without_its_key(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('[upstreams.gemini.prices]\n"m" = { input = 3, output = 5 }\n')
    config = with_keys(tidegate_policy=str(path))
    assert config.gemini_api_key is None
    (found,) = stated_by(config).upstreams_without_access()
    assert found.price("m") == Price(input=3, output=5)


@pytest.mark.parametrize(
    ("table", "asks"),
    [
        ('base_url = "https://api.mistral.ai/v1"', False),
        ('base_url = "https://api.mistral.ai/v1"\nasks_usage = true', True),
        ('base_url = "https://proxy/v1"\nprovider = "mistral"\nkey = "OPENAI_API_KEY"', False),
        ('base_url = "https://api.groq.com/openai/v1"', True),
        ('base_url = "http://gpu:8000"', True),
    ],
)
def test_which_upstreams_are_asked_for_the_usage_of_streams(table: str, asks: bool) -> None:
    stated = tomllib.loads(f"[upstreams.one]\n{table}")
    found = deployment_of(stated, CONFIG, lambda _: "sk-1").upstream("one")
    assert found is not None
    assert found.asks_usage is asks
