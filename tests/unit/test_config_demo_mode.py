"""Bundled servers and made-up answers: only on loopback or by name, never by mistake."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from tidegate.errors import ConfigError
from tidegate.policy.deployment import default_pool, deployed_upstreams
from tidegate.settings import PROVIDER_KEYS, Config, load

WHOLE = {
    "DATABASE_URL": "postgresql://db/x",
    "REDIS_URL": "redis://valkey",
    "GEMINI_API_KEY": "k",
}
LOOPBACK = ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost", "LocalHost"]
REACHABLE = ["0.0.0.0", "::", "[::]", "10.0.0.1", "192.168.1.5", "example.org", "127.1", "8.8.8.8"]


def given(**environ: str) -> Config:
    return load(environ, dotenv=None)


@pytest.mark.parametrize("host", LOOPBACK)
def test_on_loopback_nothing_needs_to_be_set(host: str) -> None:
    config = given(HOST=host)
    assert config.is_loopback
    assert config.embedded
    assert config.emulated


@pytest.mark.parametrize("host", REACHABLE)
@pytest.mark.parametrize("missing", ["both URLs", "GEMINI_API_KEY", "all"])
def test_on_any_other_address_a_missing_url_or_key_stops_the_start(host: str, missing: str) -> None:
    urls = ("DATABASE_URL", "REDIS_URL")
    left = {"both URLs": urls, "GEMINI_API_KEY": ("GEMINI_API_KEY",), "all": tuple(WHOLE)}[missing]
    environ = {name: value for name, value in WHOLE.items() if name not in left}
    with pytest.raises(ConfigError) as refused:
        deployed_upstreams(given(HOST=host, **environ))
    line = str(refused.value)
    assert line.startswith(f"{left[0]}=(not set): ")
    assert "TIDEGATE_DEMO=1" in line
    assert "HOST=" in line
    assert "\n" not in line


@pytest.mark.parametrize("host", REACHABLE)
def test_with_everything_set_any_address_will_do(host: str) -> None:
    config = given(HOST=host, **WHOLE)
    assert not config.is_loopback
    assert not config.embedded
    assert not config.emulated


@pytest.mark.parametrize("name", PROVIDER_KEYS)
def test_the_key_of_any_provider_will_do(name: str) -> None:
    urls = {one: WHOLE[one] for one in ("DATABASE_URL", "REDIS_URL")}
    config = given(HOST="0.0.0.0", **urls, **{name: "k"})
    assert not config.emulated
    (upstream,) = deployed_upstreams(config).upstreams
    assert (upstream.name, upstream.key) == (name.partition("_")[0].lower(), "k")
    assert default_pool(config) == upstream.name, "what a command is about that names none"


def test_an_upstream_of_the_file_will_do(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('[upstreams.gpu]\nbase_url = "http://gpu:8000"\n')
    urls = {one: WHOLE[one] for one in ("DATABASE_URL", "REDIS_URL")}
    config = given(HOST="0.0.0.0", TIDEGATE_POLICY=str(file), **urls)
    assert [one.name for one in deployed_upstreams(config).upstreams] == ["gpu"]


@pytest.mark.parametrize("host", REACHABLE)
@pytest.mark.parametrize("count", [0, 1])
def test_demo_mode_may_be_asked_for_by_name(host: str, count: int) -> None:
    for names in combinations(["GEMINI_API_KEY"], count):
        config = given(HOST=host, TIDEGATE_DEMO="1", **{name: WHOLE[name] for name in names})
        assert config.embedded


@pytest.mark.parametrize("beside", [{}, {"TIDEGATE_DEMO": "1"}, {"GEMINI_API_KEY": "k"}])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(
    ("alone", "missing"), [("DATABASE_URL", "REDIS_URL"), ("REDIS_URL", "DATABASE_URL")]
)
def test_one_url_without_the_other_always_stops_the_start(
    beside: dict[str, str], host: str, alone: str, missing: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        given(HOST=host, **{alone: WHOLE[alone]}, **beside)
    assert str(refused.value).startswith(f"{missing}=(not set): {alone} is set")


def test_a_url_set_to_nothing_counts_as_not_set() -> None:
    with pytest.raises(ConfigError, match="DATABASE_URL"):
        given(HOST="0.0.0.0", **WHOLE | {"DATABASE_URL": " ", "REDIS_URL": ""})


def test_a_base_url_without_a_key_stops_the_start_instead_of_being_ignored() -> None:
    with pytest.raises(ConfigError, match=r"^GEMINI_API_KEY=\(not set\): GEMINI_BASE_URL is set"):
        load({"GEMINI_BASE_URL": "https://gateway.example"}, None)
    whole = {"GEMINI_BASE_URL": "https://gateway.example", "GEMINI_API_KEY": "k"}
    assert not load(whole, None).emulated


@pytest.mark.parametrize(
    ("auth", "host", "asked"),
    [
        *(("auto", "127.0.0.1", False), ("auto", "0.0.0.0", True), ("AUTO", "10.0.0.1", True)),
        *(("on", "127.0.0.1", True), ("off", "0.0.0.0", False), ("", "0.0.0.0", True)),
    ],
)
def test_keys_are_asked_for_in_the_open_unless_switched_off_in_so_many_words(
    auth: str, host: str, asked: bool
) -> None:
    config = given(HOST=host, AUTH=auth, TIDEGATE_DEMO="1")
    assert config.requires_keys is asked
