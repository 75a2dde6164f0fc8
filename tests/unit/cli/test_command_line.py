"""The command line that a process builds for its own arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.core import TyperGroup
from typer.main import get_command

from tests.unit.invoked import invoke
from tidegate.cli import app, command_line
from tidegate.errors import ConfigError


def commands_of(line: Typer) -> dict[str, Any]:
    built = get_command(line)
    assert isinstance(built, TyperGroup)
    return dict(built.commands)


def test_a_command_is_built_alone_and_as_in_the_whole_command_line() -> None:
    whole = commands_of(app)
    assert {"serve", "limits", "config"} <= set(whole)
    for name, command in whole.items():
        (alone,) = commands_of(command_line([name, "--help"])).values()
        assert (alone.name, alone.help) == (name, command.help)
        assert [one.name for one in alone.params] == [one.name for one in command.params]


def test_what_names_no_command_gets_the_whole_command_line() -> None:
    for arguments in ([], ["--help"], ["--version"], ["serv"], ["Usage"]):
        assert command_line(arguments) is app


@pytest.mark.parametrize("place", ["missing/report.md", "."])
def test_a_report_that_cannot_be_written_is_refused_before_the_verification(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def verify(*_: object) -> None:
        raise AssertionError("it was begun")

    monkeypatch.setattr("tidegate.verify.run.verify", verify)
    with pytest.raises(ConfigError, match="must be a file that can be written"):
        invoke("verify", "--markdown", str(tmp_path / place))


def test_a_drain_has_no_end_so_that_its_time_needs_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_URL", "http://localhost:1")
    with pytest.raises(ConfigError, match="--for=10m: needs --wait") as refused:
        invoke("upstreams", "drain", "groq", "--for", "10m")
    assert "stays drained until it is resumed" in str(refused.value)
