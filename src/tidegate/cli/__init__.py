"""Command line. A command imports its modules when it runs, so that `--help` is fast."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from io import TextIOWrapper
from typing import Annotated

import typer
from typer.main import get_command_name
from typer.models import CommandInfo

from tidegate import __version__
from tidegate.cli import (
    batch,
    budgets,
    limits,
    operate,
    rehearse,
    submit,
    tenants,
    upstreams,
)
from tidegate.cli.operate import check_daily, load_to_run
from tidegate.cli.terminal import (
    EPILOGUE,
    FAILED,
    INTERRUPTED,
    CommandGroup,
    Json,
    code_of,
    command_config,
    legible,
    show_flags_without_type,
    show_result,
    with_pool_option,
    with_url_option,
)
from tidegate.embedded.servers import ServerFailed
from tidegate.errors import ConfigError, LimiterUnavailable, StoreUnavailable, TidegateError
from tidegate.supervisor import OF_FASTAPI, OF_REDIS, OF_STRUCTLOG, without

app = typer.Typer(
    name="tidegate",
    cls=CommandGroup,
    help="LLM gateway with distributed rate limits and fair queueing. Settings come from the "
    "environment and from .env: see .env.example.",
    no_args_is_help=True,
    epilog=EPILOGUE,
    pretty_exceptions_enable=False,
)
show_flags_without_type()
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_USE, _RUN, _OPERATE = "Use it", "Run it", "Operate it"


def main() -> None:
    """Run the command line. Its exit codes are `EXITS`."""
    for output in (sys.stdout, sys.stderr):
        # An output of another encoding than UTF-8 shows other characters as escapes.
        if isinstance(output, TextIOWrapper) and output.errors == "strict":
            output.reconfigure(errors="backslashreplace")
    with failures_shown():
        _check_text(sys.argv[1:])
        command_line(sys.argv[1:])()


@contextmanager
def failures_shown() -> Iterator[None]:
    """Show a failure of the block in one line, and exit with its code."""
    try:
        yield
    except TidegateError as failed:
        _leave(_with_way_out(failed), code_of(failed))
    except ServerFailed as failed:
        _leave(str(failed), FAILED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as failed:
        if failed.errno not in _NO_ROOM:
            raise
        _leave(f"output or files cannot be written: {failed.strerror}", FAILED)


def _check_text(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an argument that is not text, unless it is the name of a file."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            if not os.path.lexists(argument):
                raise ConfigError("argument", ascii(argument), "must be text in UTF-8") from None


def command_line(arguments: Sequence[str]) -> typer.Typer:
    """Return the command line for these arguments, with only the command that comes first in
    them, if it is one. Building all commands takes a tenth of a start, and longer than most
    commands run."""
    named = arguments[0] if arguments else ""
    commands = [one for one in app.registered_commands if _name_of(one) == named]
    groups = [one for one in app.registered_groups if one.name == named]
    if not commands and not groups:
        return app
    alone = copy(app)
    alone.registered_commands, alone.registered_groups = commands, groups
    return alone


def _name_of(command: CommandInfo) -> str:
    assert command.callback is not None
    return command.name or get_command_name(command.callback.__name__)


def _with_way_out(failed: TidegateError) -> str:
    """Return the message, with advice for an unavailable server if it has none."""
    text = str(failed)
    if isinstance(failed, StoreUnavailable | LimiterUnavailable) and "`tidegate" not in text:
        return f"{text.rstrip('.')}; `tidegate doctor` looks at both servers"
    return text


def _leave(message: str, code: int) -> None:
    from tidegate.telemetry.logging import redact

    sys.stderr.write(f"tidegate: {legible(redact(message))}\n")
    sys.exit(code)


def _show_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"tidegate {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=_RUN)
def up(
    api: Annotated[int, typer.Option(min=1, max=256, help="API processes, which serve HTTP.")] = 1,
    workers: Annotated[
        int, typer.Option(min=0, max=256, help="Worker processes, which run jobs.")
    ] = 1,
) -> None:
    """Start everything; Ctrl-C stops it."""
    config = load_to_run(with_jobs=workers > 0)
    check_daily(config)
    with without(OF_REDIS):
        from tidegate.supervisor.up import up as run

    raise typer.Exit(run(config, api, workers))


@app.command(rich_help_panel=_RUN)
def serve(
    fd: Annotated[
        int | None, typer.Option(min=0, help="A listening socket that was inherited.")
    ] = None,
) -> None:
    """Serve HTTP in this process only."""
    with without(OF_REDIS, OF_STRUCTLOG):
        from tidegate.supervisor.api import serve as run

    with without(OF_FASTAPI):
        run(load_to_run(with_jobs=False), fd)


@app.command(rich_help_panel=_RUN)
def worker() -> None:
    """Run jobs in this process only."""
    with without(OF_REDIS, OF_STRUCTLOG):
        from tidegate.supervisor.roles import work

    with without(OF_FASTAPI):
        work(load_to_run())


@app.command(
    rich_help_panel=_RUN,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def emulator(context: typer.Context) -> None:
    """Run only the emulated provider (-- --help shows its options)."""
    program = (sys.executable, "-P", "-m", "tidegate.emulator", *context.args)
    os.execv(program[0], program)


def migrate(json: Json = False) -> None:
    """Migrate the database to the current schema."""
    from tidegate.store.database import HEAD
    from tidegate.supervisor.services import migrate as run
    from tidegate.supervisor.services import prepared

    config = command_config("migrate", "warning")
    with prepared(config, only={"postgres"}) as ground:
        revision = run(ground.config, lambda why: typer.echo(f"tidegate: {why}", err=True))
    show_result(
        json,
        {"changed": revision is not None, "revision": revision or HEAD},
        f"schema brought to revision {revision}" if revision else "schema is up to date",
    )


def prune(
    days: Annotated[
        int | None,
        typer.Option(
            min=1, max=100_000, help="The number of days to keep, instead of RETENTION_DAYS."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Delete requests, answers and files that are older than RETENTION_DAYS."""
    from tidegate.supervisor.maintenance import prune as run

    report = run(command_config("prune", "warning"), days)
    show_result(
        json,
        report,
        f"deleted {report.requests} requests, {report.blobs} files, {report.partitions} partitions"
        f" ({report.skipped} left for the next run)",
    )


# In the order of the help.
for _of_a_gateway in (submit.submit, submit.status, submit.requests):
    app.command(rich_help_panel=_USE)(with_url_option(_of_a_gateway))
app.add_typer(batch.app, name="batch", rich_help_panel=_USE)
app.add_typer(operate.app, name="config", rich_help_panel=_OPERATE)
app.command(rich_help_panel=_OPERATE)(operate.doctor)
app.command(rich_help_panel=_OPERATE)(limits.why)
app.add_typer(limits.app, name="limits", rich_help_panel=_OPERATE)
app.add_typer(limits.permits_app, name="permits", rich_help_panel=_OPERATE)
app.add_typer(upstreams.app, name="upstreams", rich_help_panel=_OPERATE)
app.add_typer(tenants.app, name="tenants", rich_help_panel=_OPERATE)
app.add_typer(budgets.app, name="budgets", rich_help_panel=_OPERATE)
app.add_typer(tenants.keys_app, name="keys", rich_help_panel=_OPERATE)
app.command(rich_help_panel=_OPERATE)(submit.requeue)
app.command(rich_help_panel=_OPERATE)(rehearse.rehearse)
app.command(rich_help_panel=_OPERATE)(operate.verify)
app.command(rich_help_panel=_OPERATE)(operate.reconcile)
app.add_typer(operate.export_app, name="export", rich_help_panel=_OPERATE)
app.command(rich_help_panel=_OPERATE)(migrate)
app.command(rich_help_panel=_OPERATE)(operate.backup)
app.command(rich_help_panel=_OPERATE)(operate.restore)
app.command(rich_help_panel=_OPERATE)(prune)
app.command(rich_help_panel=_OPERATE)(tenants.erase)
app.command(rich_help_panel=_OPERATE)(tenants.actions)
for _groups, _with_option in (
    ((limits.app, limits.permits_app, tenants.app), with_pool_option),
    ((batch.app, upstreams.app), with_url_option),
):
    for _registered in (one for group in _groups for one in group.registered_commands):
        assert _registered.callback is not None
        _registered.callback = _with_option(_registered.callback)
for _group in app.registered_groups:
    _group.cls = CommandGroup
