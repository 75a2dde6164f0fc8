"""The command line that a process builds for its own arguments."""

from __future__ import annotations

from typing import Any

from typer import Typer
from typer.core import TyperGroup
from typer.main import get_command

from tidegate.cli import app, command_line


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
