"""Output of the commands: tables, safe text, exit codes, and the pool that a command is about.

Text from other sources is escaped before it is written to a terminal, so that it cannot send
control characters. Without a terminal the output is plain text of a fixed width.
"""

from __future__ import annotations

import getpass
import re
import shutil
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

import typer
from typer.core import TyperGroup, TyperOption

from tidegate.errors import (
    ConfigError,
    GatewayRefused,
    GatewayUnreachable,
    InvalidRequest,
    LimiterUnavailable,
    NotFound,
    StoreUnavailable,
    TidegateError,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from tidegate.policy.inspection import Control
    from tidegate.policy.rollout import PolicyKeeper
    from tidegate.rehearse.report import Table
    from tidegate.settings import Config
    from tidegate.store.budgets import BudgetRecords
    from tidegate.store.tenants import Tenants


def console() -> Console:
    """Return a console as wide as the terminal; without a terminal, wide enough for all tables."""
    from rich.console import Console

    return Console(highlight=False, width=terminal_width())


def show_figures(table: Table, to: Console, styles: Mapping[str, str] | None = None) -> None:
    """Print a table with figures to the right. `styles`: of rows, by their last cell."""
    from rich.table import Table as RichTable
    from rich.text import Text

    rich_table = RichTable(
        title=table.title or None,
        title_justify="left",
        title_style="bold",
        box=None,
        header_style="dim",
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for number, column in enumerate(table.columns):
        justify = "right" if table.holds_figures(number) else "left"
        rich_table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in table.rows:
        style = (styles or {}).get(row[-1], "")
        cells = [*(Text(cell) for cell in row[:-1]), Text(row[-1], style=style)]
        rich_table.add_row(*cells, style="dim" if style == "dim" else "")
    to.print(rich_table)


def show_chart(chart: str, to: Console) -> None:
    """Print a chart of block characters, with titles at the beginning of lines."""
    from rich.text import Text

    text = Text(chart)
    text.highlight_regex(r"[▁▂▃▄▅▆▇█]+", "cyan")
    text.highlight_regex(r"(?m)^\w.*$", "bold")
    to.print(text, no_wrap=True, overflow="crop")


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def legible(text: str) -> str:
    """Escape control characters except line breaks and tabs, as `\\x1b` and the like: a model's
    answer, or a typed reason, could otherwise set a terminal's title, clear it or write its
    clipboard."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\r\n", "\n"))


_FIGURE = re.compile(r"[\d,-]+")
_SHORT_ID = re.compile(r"[0-9a-fA-F-]{4,36}")


def is_short_id(text: str) -> bool:
    """Return whether a text may be a part of an id: its beginning or its end."""
    return _SHORT_ID.fullmatch(text) is not None


def whole_id(text: str, known: Iterable[str], among: str) -> str:
    """Return the only one of the `known` ids that begins or ends with `text`. Raises NotFound, and
    ConfigError if several match."""
    lowered = text.lower()
    found = [one for one in known if one.startswith(lowered) or one.endswith(lowered)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise NotFound(f"{text} is neither the beginning nor the end of an id of {among}")
    some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    raise ConfigError(text, None, f"fits several of {among}: {some}")


T = TypeVar("T")
_chosen: ContextVar[str | None] = ContextVar("tidegate_pool", default=None)

PLAIN_WIDTH = 160
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Reason = Annotated[str, typer.Option(help="The reason, which is recorded.")]


AnyPool = Annotated[
    str | None,
    typer.Option(
        "--pool",
        help="The upstream whose limits are meant. Default: gemini, or the first upstream if "
        "gemini has no account.",
    ),
]


def choose_pool(pool: str | None = None) -> None:
    """Set the pool of the command."""
    _chosen.set(pool)


def with_pool_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option `--pool` to a command."""
    return _with_option(command, "pool", AnyPool, _chosen)


AnyUrl = Annotated[
    str | None, typer.Option("--url", help="The gateway to ask, instead of TIDEGATE_URL.")
]
called_url: ContextVar[str | None] = ContextVar("tidegate_url", default=None)


def with_url_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option `--url` to a command that calls a running gateway."""
    return _with_option(command, "url", AnyUrl, called_url)


def _with_option(
    command: Callable[..., None], name: str, kind: object, chosen: ContextVar[str | None]
) -> Callable[..., None]:
    """Add an option to a command, whose value is stored in `chosen`."""

    @wraps(command)
    def run(*arguments: object, **options: Any) -> None:
        if (value := options.pop(name, None)) is not None:
            chosen.set(value)
        command(*arguments, **options)

    added = Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=kind)
    parameters = [*signature(command, eval_str=True).parameters.values(), added]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return run


class CommandGroup(TyperGroup):
    """Commands whose options may also precede their names: `tidegate --json limits show`.

    An option takes a value in all commands that have it, or in none of them.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._in_order(ctx, args))

    def _in_order(self, ctx: Any, arguments: list[str]) -> list[str]:
        """Return the group's own options, the name of the command, then the options that preceded
        it; unchanged if one of them is unknown."""
        own, moved, rest = list[str](), list[str](), list(arguments)
        names = {name for one in self.get_params(ctx) for name in one.opts}
        known = _options_of(self) if rest and rest[0].startswith("-") else {}
        while rest and rest[0].startswith("-"):
            option, is_whole, _ = rest[0].partition("=")
            if option in names:
                own.append(rest.pop(0))
            elif option in known:
                count = 1 if is_whole or not known[option] else 2
                moved += rest[:count]
                del rest[:count]
            else:
                return arguments
        return [*own, rest[0], *moved, *rest[1:]] if rest else arguments


def _options_of(command: Any) -> dict[str, bool]:
    """Return all options of a command and of its subcommands, by name, with whether they take a
    value."""
    found: dict[str, bool] = {}
    for one in command.params:
        if one.param_type_name == "option":
            takes_value = not (one.is_flag or one.count)
            found |= dict.fromkeys((*one.opts, *one.secondary_opts), takes_value)
    for inner in getattr(command, "commands", {}).values():
        found |= _options_of(inner)
    return found


def chosen_pool(config: Config) -> str:
    """Return the pool of the command."""
    from tidegate.policy.deployment import default_pool

    return _chosen.get() or default_pool(config)


def chosen_pool_or(usual: T) -> str | T:
    """Return the named pool, otherwise `usual`."""
    return _chosen.get() or usual


def command_config(process: str = "command", level: str = "error") -> Config:
    """Return the settings; logs of `level` and above are written to standard error."""
    from tidegate.settings import load
    from tidegate.store.records import ACTING, Acting
    from tidegate.telemetry import logging as telemetry

    config = load()
    telemetry.configure_logging(config.log_format, level, process=process)
    # For the whole command: its changes are recorded under the name of the user.
    ACTING.set(Acting(who(), "admin", "a terminal"))
    return config


def with_keeper(work: Callable[[PolicyKeeper], Awaitable[T]]) -> T:
    """Run `work` on the policy of the chosen pool of the deployment in the settings."""
    from tidegate.supervisor.services import with_keeper as run

    config = command_config()
    return run(config, chosen_pool(config), lambda keeper, _: work(keeper))


def in_pool(work: Callable[[Control], Awaitable[T]]) -> T:
    """Run `work` on the chosen pool, with the record of its calls and tenants."""
    from tidegate.policy.inspection import Control
    from tidegate.store.requests import ActiveRequests
    from tidegate.store.tenants import Tenants
    from tidegate.supervisor.services import with_keeper as run

    config = command_config()
    return run(
        config,
        chosen_pool(config),
        lambda keeper, record: work(Control(keeper, ActiveRequests(record), Tenants(record))),
    )


def in_all_pools(work: Callable[[Sequence[PolicyKeeper], Tenants], Awaitable[T]]) -> T:
    """Run `work` on the policies of all pools and the record of tenants."""
    from tidegate.store.tenants import Tenants
    from tidegate.supervisor.services import with_keepers

    return with_keepers(command_config(), lambda keepers, record: work(keepers, Tenants(record)))


def with_tenants(work: Callable[[Tenants], Awaitable[T]]) -> T:
    """Run `work` on the record of tenants and keys, which needs no Valkey."""
    from tidegate.store.tenants import Tenants
    from tidegate.supervisor.services import with_record

    return with_record(command_config(), lambda record: work(Tenants(record)))


def with_budgets(work: Callable[[BudgetRecords], Awaitable[T]]) -> T:
    """Run `work` on the record of budgets, which needs no Valkey."""
    from tidegate.store.budgets import BudgetRecords
    from tidegate.supervisor.services import with_record

    return with_record(command_config(), lambda record: work(BudgetRecords(record)))


def given(**options: Any) -> dict[str, Any]:
    """Return the options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


def counted(count: int, one: str, several: str) -> str:
    """Return a count with its noun: `1 process`, `2 processes`."""
    return f"{count} {one if count == 1 else several}"


def who() -> str:
    """Return the name of the person at the terminal, for the record."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        name = "somebody"
    return f"{name}@{socket.gethostname()}"


def confirm(question: str) -> None:
    """Ask a person on standard error, since standard output is for data only. Raises typer.Abort
    unless the answer is yes; Ctrl-C ends the command as usual."""
    while True:
        typer.echo(f"{question} [y/N]: ", nl=False, err=True)
        answer = sys.stdin.readline()
        if not answer:
            typer.echo("\nThere is no terminal to ask for confirmation: pass --yes.", err=True)
        match answer.strip().lower():
            case "y" | "yes":
                return
            case "" | "n" | "no":
                raise typer.Abort
        typer.echo("Answer y or n.", err=True)


def show_json(value: object) -> None:
    import orjson

    typer.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def show_result(json: bool, value: object, text: str) -> None:
    """Print a result: `value` as JSON, or `text`."""
    show_json(value) if json else typer.echo(text)


def show_table(
    title: str,
    columns: tuple[str, ...],
    rows: list[tuple[str, ...]],
    *,
    whole: tuple[str, ...] = (),
    styles: Sequence[str] = (),
) -> None:
    """Print a table; numbers to the right, and columns in `whole` on one line. styles: of each row.
    Without a terminal the table is plain text."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=None, header_style="bold")
    for number, column in enumerate(columns):
        figures = bool(rows) and all(_FIGURE.fullmatch(row[number]) for row in rows)
        side: Literal["left", "right"] = "right" if figures else "left"
        table.add_column(column, justify=side, overflow="fold", no_wrap=column in whole)
    for number, row in enumerate(rows):
        style = styles[number] if styles else None
        table.add_row(*(Text(legible(cell)) for cell in row), style=style)
    show(table)


def show(what: RenderableType) -> None:
    """Print for the width of a terminal; otherwise without colours, and without trailing spaces,
    which would disturb programs."""
    to = console()
    if sys.stdout.isatty():
        to.print(what)
        return
    with to.capture() as captured:
        to.print(what)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def terminal_width() -> int:
    """Return the width in characters; wide without a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else PLAIN_WIDTH


DONE = 0
FAILED = 1
INVALID = 2
REFUSED = 3
UNREACHABLE = 4
INTERRUPTED = 130


class Exit(NamedTuple):
    code: int
    means: str


EXITS = (
    Exit(DONE, "success"),
    Exit(
        FAILED,
        "failure: of the request, of lines of a batch, of a check of doctor; or not found: a "
        "limit, tenant, key, upstream (or pool), budget, request, batch, process or revision",
    ),
    Exit(INVALID, "an argument, a setting or an input file is wrong"),
    Exit(REFUSED, "rejected: no key or a wrong one, or a cap or budget is reached"),
    Exit(UNREACHABLE, "Tidegate, Valkey or PostgreSQL is unreachable"),
    Exit(INTERRUPTED, "interrupted by Ctrl-C"),
)

# The help makes a line of each paragraph.
EPILOGUE = "Exit codes:\n\n" + "\n\n".join(f"{one.code}: {one.means}" for one in EXITS)

_INVALID_STATUSES = (400, 405, 409, 413, 415, 422)
_REFUSING_STATUSES = (401, 403, 429)
_UNREACHABLE_STATUSES = (408, 502, 503, 504)


def code_of(error: TidegateError) -> int:
    """Return the exit code for an error that ends a command."""
    match error:
        case ConfigError() | InvalidRequest():
            return INVALID
        case GatewayUnreachable() | LimiterUnavailable() | StoreUnavailable():
            return UNREACHABLE
        case GatewayRefused(status=status):
            return _code_of_status(status)
    return FAILED


def _code_of_status(status: int) -> int:
    if status in _INVALID_STATUSES:
        return INVALID
    if status in _REFUSING_STATUSES:
        return REFUSED
    return UNREACHABLE if status in _UNREACHABLE_STATUSES else FAILED


def show_flags_without_type() -> None:
    """Hide the type of flags: Typer shows the type of every option since it renders types itself;
    earlier versions show none for a flag."""
    usual = getattr(TyperOption, "display_type_rich", None)
    if usual is None:
        return

    def of_options_with_a_value(option: Any, ctx: Any) -> str | None:
        if getattr(option, "is_flag", False) and option.metavar is None:
            return None
        text: str | None = usual(option, ctx=ctx)
        return text

    TyperOption.display_type_rich = of_options_with_a_value  # type: ignore[method-assign,assignment]
