"""What is written after `tidegate limits`, before anything is asked of a pool."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.invoked import invoke
from tidegate.errors import ConfigError
from tidegate.policy.inspection import InForce, Overview, ShownLimit


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Nothing here may reach a pool; what would is kept."""
    calls: list[object] = []

    def ask(work: object) -> bool:
        calls.append(work)
        return True

    monkeypatch.setattr("tidegate.cli.limits.in_pool", ask)
    return calls


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["set"], "needs either changes, such as"),
        (["set", "--deployed", "kind:text_only=1"], "needs either changes, such as"),
        (["set", "--deployed", "--remove", "rpm:x"], "needs either changes, such as"),
        (["set", "kind:text_only"], "must be KEY=VALUE"),
        (["set", "=5"], "must be KEY=VALUE"),
        (["set", "kind:x=5", " kind:x=7"], "must name kind:x once"),
        (["set", "bands=[{name = high}]"], "in a shell it stands in single quotes"),
        (["set", "rpm:x={bound = }"], "rpm:x={bound = }: is no TOML"),
        (["pause", "kind:text_only", "--for", "soon"], "such as 10m"),
        (["pause", "kind:text_only", "--for", "0s"], "such as 10m"),
        (["pause", "kind:text_only", "--for", "10"], "such as 10m"),
        (["pause", "kind:text_only", "--for", "367d"], "--for=367d: must be up to 366d"),
        (["pause", "kind:text_only", "--for", "9" * 400 + "d"], "--for is too long a time"),
    ],
)
def test_a_mistake_is_found_at_once(arguments: list[str], said: str, asked: list[object]) -> None:
    with pytest.raises(ConfigError) as raised:
        invoke("limits", *arguments)
    assert said in str(raised.value)
    assert asked == []


@pytest.mark.parametrize(
    ("span", "said"),
    [
        (["--for", "30s"], "is paused for 30s"),
        (["--for", "1.5h"], "is paused for 1.5h"),
        ([], "is paused until it is resumed"),
    ],
)
def test_a_pause_says_how_long_it_is(span: list[str], said: str, asked: list[object]) -> None:
    done = invoke("limits", "pause", "kind:text_only", *span)
    assert done == (0, f"kind:text_only {said}\n")
    assert len(asked) == 1


def test_a_flag_has_no_type_in_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    _, told = invoke("verify", "--help")
    assert "--json" in told
    assert "--help" in told
    assert "bool" not in told
    assert "<str>" in told


def test_a_shadow_limit_that_holds_nothing_up_is_not_full(monkeypatch: pytest.MonkeyPatch) -> None:
    common: dict[str, Any] = {"unit": "calls", "bound": 5, "current": 5, "used": 5, "waiting": 0}
    rest: dict[str, Any] = {"lapsing": 0, "paused_ms": 0, "paused_by": "", "room_in_ms": 0}
    rows = [
        ShownLimit(name, "5", shadow=shadow, shadowed=int(shadow), source="set", **common, **rest)
        for name, shadow in (("kind:a", False), ("kind:b", True))
    ]
    overview = Overview("p", InForce(1), 0, rows, [], [], [], {}, [])
    monkeypatch.setattr("tidegate.cli.limits.in_pool", lambda _work: overview)
    _, said = invoke("limits", "show")
    of = {line.split()[0]: line.split()[4:] for line in said.splitlines() if "kind:" in line}
    assert of == {"kind:a": ["full"], "kind:b": ["would", "have", "held", "up", "1"]}
