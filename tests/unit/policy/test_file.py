"""The policy that a deployment states: file over environment over defaults."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from tidegate.errors import ConfigError
from tidegate.limiter import Concurrency, PoolPolicy, Quota, Rate
from tidegate.policy.deployment import deployed
from tidegate.policy.format import AT_ONCE, of_plain
from tidegate.settings import Config, load

EXAMPLE = Path(__file__).parents[3] / "tidegate.example.toml"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(**environ: str) -> Config:
    return load(environ, dotenv=None)


def test_without_a_file_the_environment_says_it_all() -> None:
    config = given(RATE_LIMITS='{"text_only": 7}', SEMAPHORE_TIMEOUT="1.5", ON_EXPIRY="hold")
    assert deployed(config) == PoolPolicy(
        {
            "kind:text_only": 7,
            "kind:multi_modal": 3,
            "kind:image_generation": 2,
            "kind:classifier": 2,
        },
        lease_ms=1500,
        on_expiry="hold",
    )


def test_a_file_comes_before_the_environment_which_fills_in_the_rest(folder: Path) -> None:
    (folder / "tidegate.toml").write_text(
        '[limits]\n"kind:text_only" = 9\n"rpm:m" = 60\n[pool]\nlease_ms = 800\n'
    )
    policy = deployed(given(RATE_LIMITS='{"text_only": 7, "multi_modal": 8}', ON_LOST="cancel"))
    assert policy == PoolPolicy(
        {
            "kind:text_only": 9,
            "kind:multi_modal": 8,
            "kind:image_generation": 2,
            "kind:classifier": 2,
            "rpm:m": Rate(60, 60_000),
        },
        lease_ms=800,
        on_lost="cancel",
    )


def test_a_file_is_read_that_an_editor_has_marked_as_utf_8(folder: Path) -> None:
    (folder / "tidegate.toml").write_bytes(b'\xef\xbb\xbf[limits]\n"kind:text_only" = 9\n')
    assert deployed(given()).limits["kind:text_only"] == 9


def test_the_setting_names_another_file(folder: Path) -> None:
    (folder / "tidegate.toml").write_text('[limits]\n"kind:text_only" = 9\n')
    other = folder / "other.toml"
    other.write_text('[limits]\n"kind:text_only" = 11\n')
    assert deployed(given(TIDEGATE_POLICY=str(other))).bound("kind:text_only") == 11
    assert deployed(given()).bound("kind:text_only") == 9


def test_a_file_that_is_named_must_be_there(folder: Path) -> None:
    with pytest.raises(ConfigError) as missing:
        given(TIDEGATE_POLICY=str(folder / "nowhere.toml"))
    assert str(missing.value).startswith("TIDEGATE_POLICY=")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[limits", "must be TOML: "),
        (b"x = " + b"[" * 5000, "must be TOML: "),
        (b"x = " + b"9" * 5000, "must be TOML: "),
        (b"\xff\xfe", "must be UTF-8 text"),
        (b"#" * 1_000_001, "at most 1000000 bytes"),
        (b'[limits]\n"kind:text_only" = "5"', "limits.kind:text_only=5: must be a whole number"),
        (b"limits = 5", "limits=5: must be a table"),
        (b'[limits]\n"tenant:*" = 5', "limits.tenant:* must name one tenant"),
        (b'[limits]\n"rpm:tenant/a,b" = 5', "limits.rpm:tenant/a,b must name one tenant"),
        (b"pool = 5", "pool=5: must be a table"),
        (b'[pool]\nwhen_away = "open"', "pool.when_away=open: must be one of closed, local"),
        (b'[pool]\nwhen_away = "a\\nb"', r"pool.when_away=a\nb: must be one of"),
        (b'[limits]\n"a\\r\\nb" = 5', r"limits.a\r\nb has an unknown scope"),
        (b'[pool]\nwhen_away = "%b"' % (b"x" * 9_000), f"{'x' * 500}...: must be one of"),
    ],
)
def test_a_mistake_names_the_file_and_the_key(folder: Path, text: bytes, said: str) -> None:
    (folder / "tidegate.toml").write_bytes(text)
    with pytest.raises(ConfigError) as wrong:
        deployed(given())
    line = str(wrong.value)
    assert line.startswith("tidegate.toml")
    assert said in line
    assert "\n" not in line


def test_the_example_is_sound_and_shows_every_section_scope_and_option() -> None:
    stated = tomllib.loads(EXAMPLE.read_text())
    policy = of_plain(stated)
    assert set(stated) == {"limits", "weights", "bands", "pool"}
    scopes = {name.partition(":")[0] for name in policy.limits}
    assert scopes >= {*AT_ONCE, "rpm", "tpm", "itpm", "ipm", "rpd"}
    options = {one.name for one in fields(PoolPolicy) if one.init}
    options -= {"limits", "weights", "bands", "revision"}
    assert set(stated["pool"]) == options
    # Its bands are the default ones: copying the file changes no priorities.
    assert policy.bands[1:] == PoolPolicy({}).bands[1:]


def test_the_example_shows_every_key_of_a_limit() -> None:
    """Some in comments, so that copying the file puts none of these in force."""
    text = EXAMPLE.read_text()
    lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith('# "')]
    policy = lines[: lines.index('"pool:total" = 50')]  # the rest is of other upstreams
    further = tomllib.loads("\n".join(policy))
    limits = {**tomllib.loads(text)["limits"], **further}
    assert set(of_plain({"limits": limits}).limits) == set(limits)
    shown = {key for value in limits.values() if isinstance(value, dict) for key in value}
    known = {one.name for kind in (Concurrency, Rate, Quota) for one in fields(kind)}
    assert shown == known | {"type"}
    assert {name.partition(":")[0] for name in further} >= {"tif", "uitpm", "aspm", "usdpm"}
