"""`docs/cli.md`: `cli_head.md`, the exit codes, and a reference of all commands.

Invariant: the reference is what `--help` says, the exit codes are those of `tidegate.cli.terminal`.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args

HEAD = Path(__file__).with_name("cli_head.md")


def cli_document() -> str:
    """The whole document."""
    from typer.main import get_command

    from tidegate.cli import app
    from tidegate.cli.terminal import EXITS

    lines = [HEAD.read_text(encoding="utf-8"), "| code | means |", "|---|---|"]
    lines += [f"| {one.code} | {one.means} |" for one in EXITS]
    lines += [
        "",
        "## Reference",
        "",
        "<!-- Written by scripts/generate_docs.py from the commands themselves. -->",
    ]
    for path, command in _commands("tidegate", get_command(app)):
        lines += ["", f"### {path}", "", _plain(command.help or ""), ""]
        rows = [row for parameter in command.params if (row := _row(parameter))]
        if rows:
            lines += ["| | | |", "|---|---|---|", *rows]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command that does something or has options, in order, with its whole name."""
    inner = getattr(command, "commands", None)
    if inner is None or (path.count(" ") == 1 and any(map(_row, command.params))):
        yield path, command
    for name, one in (inner or {}).items():
        yield from _commands(f"{path} {name}", one)


def _row(parameter: Any) -> str:
    if parameter.name == "help" or getattr(parameter, "hidden", False):
        return ""
    is_option = parameter.param_type_name == "option"
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if not is_option:
        names = f"*{parameter.metavar or parameter.name.replace('_', ' ').strip()}*"
    default = parameter.default
    is_told = is_option and default not in (None, False, "", ()) and not callable(default)
    kind = "" if getattr(parameter, "is_flag", False) else _kind(parameter)
    said = _plain(getattr(parameter, "help", None) or "")
    if is_told:
        said += f" Default: `{getattr(default, 'value', default)}`."
    if parameter.required and is_option:
        said += " Required."
    return f"| {names} | {kind} | {said} |"


def _kind(parameter: Any) -> str:
    """What it takes, in a word; how often, where that is several times."""
    kind = parameter.type_descriptor.annotation
    while inner := [one for one in get_args(kind) if one is not type(None)]:
        kind = inner[0]
    if issubclass(kind, Enum):
        word = ", ".join(str(one.value) for one in kind)
    elif parameter.min is not None:
        word = f"{parameter.min} to {parameter.max}" if parameter.max else f"{parameter.min} up"
    else:
        word = {Path: "a path", int: "a number"}.get(kind, "text")
    return f"{word}, several times" if parameter.multiple or parameter.nargs == -1 else word


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
