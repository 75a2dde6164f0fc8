"""What the commands on a running pool share: how they reach it, who does it, how they show it."""

from __future__ import annotations

import getpass
import shutil
import socket
import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from tidegate.cli.legible import legible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tidegate.config import Config
    from tidegate.policy.control import Control
    from tidegate.store.tenants import Tenants

T = TypeVar("T")
_chosen: ContextVar[str | None] = ContextVar("tidegate_pool", default=None)

PLAIN_WIDTH = 160
Json = Annotated[bool, typer.Option("--json", help="Show it as JSON.")]
Reason = Annotated[str, typer.Option(help="Why; it goes on record.")]


AnyPool = Annotated[
    str | None,
    typer.Option(
        "--pool",
        help="Whose limits: the name of an upstream; gemini, or the first of all where that has no "
        "account.",
    ),
]


def choose_pool(pool: AnyPool = None) -> None:
    """What `--pool` before a command does."""
    _chosen.set(pool)


def with_pool_option(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes `--pool` too, behind its name as well as before it."""

    @wraps(command)
    def run(*arguments: object, pool: str | None = None, **options: object) -> None:
        if pool is not None:
            _chosen.set(pool)
        command(*arguments, **options)

    behind = Parameter("pool", Parameter.KEYWORD_ONLY, default=None, annotation=AnyPool)
    parameters = [*signature(command, eval_str=True).parameters.values(), behind]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return run


def chosen_pool(config: Config) -> str:
    """The pool that the command is about."""
    from tidegate.policy.file import default_pool

    return _chosen.get() or default_pool(config)


def in_pool(work: Callable[[Control], Awaitable[T]]) -> T:
    """Run `work` on the chosen pool of the deployment that the settings describe."""
    from tidegate import telemetry
    from tidegate.config import load
    from tidegate.supervisor.control import in_pool as run

    config = load()
    telemetry.configure_logging(config.log_format, "error", process="command")
    return run(config, work, chosen_pool(config))


def with_tenants(work: Callable[[Tenants], Awaitable[T]]) -> T:
    """Run `work` on the record of tenants and keys, which needs no Valkey."""
    from tidegate import telemetry
    from tidegate.config import load
    from tidegate.supervisor.control import with_tenants as run

    config = load()
    telemetry.configure_logging(config.log_format, "error", process="command")
    return run(config, work)


def who() -> str:
    """The person at the terminal, as it goes on record."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        name = "somebody"
    return f"{name}@{socket.gethostname()}"


def show_json(value: object) -> None:
    import orjson

    typer.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def show_table(
    title: str,
    columns: tuple[str, ...],
    rows: list[tuple[str, ...]],
    *,
    whole: tuple[str, ...] = (),
) -> None:
    """A table on the terminal; numbers to the right, and columns that stay `whole` on one line.
    Without a terminal it is plain text."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=None, header_style="bold")
    for number, column in enumerate(columns):
        figures = bool(rows) and all(row[number].replace("-", "0").isdecimal() for row in rows)
        side: Literal["left", "right"] = "right" if figures else "left"
        table.add_column(column, justify=side, overflow="fold", no_wrap=column in whole)
    for row in rows:
        table.add_row(*(Text(legible(cell)) for cell in row))
    show(table)


def show(what: RenderableType) -> None:
    """On a terminal as it fits; elsewhere without colours, and without blanks at the ends of lines,
    which programs would stumble over."""
    from rich.console import Console

    console = Console(highlight=False, width=terminal_width())
    if sys.stdout.isatty():
        console.print(what)
        return
    with console.capture() as captured:
        console.print(what)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def terminal_width() -> int:
    """In characters; wide where there is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else PLAIN_WIDTH
