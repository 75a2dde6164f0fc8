"""What is written after `tidegate tenants` and `keys`, before anything is asked of a server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.invoked import invoke
from tidegate.errors import ConfigError
from tidegate.store.operator_actions import OperatorAction


class Asked(Exception):
    """Nothing here may reach a server: what would, ends so."""


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(_work: Callable[[Any], Awaitable[Any]]) -> None:
        raise Asked

    monkeypatch.setattr("tidegate.cli.tenants.in_pool", ask)
    monkeypatch.setattr("tidegate.cli.tenants.in_all_pools", ask)
    monkeypatch.setattr("tidegate.cli.tenants.with_tenants", ask)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tenants", "set", "acme", "--limit", "tenant:acme"], "must be KEY=VALUE"),
        (["tenants", "set", "acme", "--queued-jobs", "many"], "must be a whole number, or none"),
        (["tenants", "set", "acme", "--queued-jobs", "1.5"], "must be a whole number, or none"),
        (["tenants", "set", "acme", "--streams", "-1"], "from 0 up"),
        (["tenants", "set", "acme", "--day-money", "nan"], "must be a number from 0 up"),
        (["tenants", "set", "acme", "--model", "m", "--all-models"], "together with --model"),
        (["tenants", "set", "acme", "--disable", "--enable"], "together with --enable"),
        (["keys", "create", "--expires", "soon"], "such as 10m"),
        (["keys", "create", "--expires", "0d"], "such as 10m"),
        (["keys", "create", "--expires", "3650000d"], "before the year 10000"),
        (["keys", "create", "--expires", "99999999999d"], "before the year 10000"),
        (["keys", "create", "--tenant", "\udcff"], "1 to 200 characters"),
        (["keys", "create", "--tenant", ".."], "no part that is . or .."),
        (["keys", "list", "--tenant", "\udcff"], "1 to 200 characters"),
        (["keys", "list", "--prefix", "\udcff"], "letters and digits"),
        (["keys", "revoke", "x"], "a key's prefix of 10 characters"),
    ],
)
def test_a_mistake_is_found_before_any_server_is_asked(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        invoke(*arguments)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("auth", "scopes", "noted"),
    [
        ("auto", ("infer", "read"), True),
        ("on", ("infer", "read"), False),
        ("auto", ("viewer",), False),
    ],
)
def test_a_new_key_says_where_calls_need_none(
    monkeypatch: pytest.MonkeyPatch, auth: str, scopes: tuple[str, ...], noted: bool
) -> None:
    key = SimpleNamespace(prefix="abcdefghij", scopes=scopes), SimpleNamespace(text="tg_key")
    monkeypatch.setattr("tidegate.cli.tenants.with_tenants", lambda _work: key)
    monkeypatch.setenv("AUTH", auth)
    _, said = invoke("keys", "create", "--tenant", "acme")
    assert said.startswith("tg_key\n")
    assert ("keys are ignored" in said) == noted


@pytest.mark.parametrize(
    "arguments",
    [
        ["tenants", "list"],
        ["tenants", "set", "acme"],
        ["tenants", "set", "acme", "--weight", "3", "--limit", "tenant:acme=none", "--enable"],
        ["tenants", "set", "acme", "--day-money", "1.5", "--day-tokens", "NONE"],
        ["tenants", "remove", "acme", "--yes"],
        ["tenants", "remove", "..", "--yes"],
        ["keys", "create", "--tenant", "team/a..b/.c"],
        ["keys", "create", "--scope", "admin", "--scope", "read", "--expires", "30d"],
        ["keys", "list", "--prefix", "tg_abc"],
        ["keys", "revoke", "tg_0123456789"],
    ],
)
def test_what_is_sound_is_asked_of_a_server(arguments: list[str]) -> None:
    with pytest.raises(Asked):
        invoke(*arguments)


@pytest.mark.parametrize(
    "arguments", [["tenants", "set", "acme", "--weight", "0"], ["keys", "create", "--scope", "x"]]
)
def test_options_of_the_wrong_kind_are_refused_by_name(arguments: list[str]) -> None:
    code, said = invoke(*arguments)
    assert code == 2
    assert arguments[-2] in said


def test_what_was_changed_by_an_operator_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    done = ("ann", "admin", "a terminal", "tenant.set", "acme")
    before = {"tiers": None, "streams": 5, "weight": 1}
    after = {"tiers": ["live", "flex"], "streams": None, "weight": 1, "note": None}
    action = OperatorAction(1, datetime.now(UTC), *done, before, after, None)
    monkeypatch.setattr("tidegate.cli.tenants.with_tenants", lambda _work: [action])
    _, said = invoke("actions")
    assert "tiers: none -> live flex, streams: 5 -> none" in " ".join(said.split())
