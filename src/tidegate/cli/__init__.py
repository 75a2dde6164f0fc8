"""The command line. What a command needs is imported when it runs: `--help` is quick."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tidegate import __version__
from tidegate.call import DEFAULT_POOL
from tidegate.cli import erase, inside, keys, limits, tenants
from tidegate.cli.pool import choose_pool
from tidegate.embedded.process import ServerFailed
from tidegate.errors import ConfigError, TidegateError

if TYPE_CHECKING:
    from tidegate.config import Config
    from tidegate.limiter import PoolPolicy

app = typer.Typer(
    name="tidegate",
    help="One admission in front of large language models. Settings come from the environment "
    "and from .env: see .env.example.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
settings = typer.Typer(help="Look at the settings.", no_args_is_help=True)
app.add_typer(settings, name="config")
app.add_typer(limits.app, name="limits")
app.add_typer(inside.app, name="permits")
app.add_typer(tenants.app, name="tenants")
app.add_typer(keys.app, name="keys")
app.command()(inside.why)
app.command()(erase.erase)
for _of_a_pool in (limits.app, inside.app, tenants.app):
    _of_a_pool.callback()(choose_pool)

_INTERRUPTED = 130


def main() -> None:
    """Run the command line. Exit codes: 1 what failed, 2 a setting or an argument is wrong."""
    try:
        app()
    except ConfigError as wrong:
        _leave(str(wrong), 2)
    except (TidegateError, ServerFailed) as failed:
        _leave(str(failed), 1)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _leave(message: str, code: int) -> None:
    from tidegate.telemetry import redact

    sys.stderr.write(f"tidegate: {redact(message)}\n")
    sys.exit(code)


def _load() -> Config:
    """The settings, with a policy file that is sound."""
    from tidegate.config import load
    from tidegate.policy import deployed

    config = load()
    deployed(config)
    return config


def _show_version(wanted: bool) -> None:
    if wanted:
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


@app.command()
def up(
    api: Annotated[int, typer.Option(min=1, max=256, help="Processes that serve HTTP.")] = 1,
    workers: Annotated[int, typer.Option(min=0, max=256, help="Processes that do jobs.")] = 1,
) -> None:
    """Start everything, and stop it on Ctrl-C."""
    from tidegate.supervisor.up import up as run

    raise typer.Exit(run(_load(), api, workers))


@app.command()
def serve(
    fd: Annotated[int | None, typer.Option(help="A listening socket that was inherited.")] = None,
) -> None:
    """Serve HTTP in this process alone."""
    from tidegate.supervisor.roles import serve as run

    run(_load(), fd)


@app.command()
def worker() -> None:
    """Do jobs in this process alone."""
    from tidegate.supervisor.roles import work

    work(_load())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def emulator(context: typer.Context) -> None:
    """Run the emulated provider alone (-- --help shows its options)."""
    program = (sys.executable, "-m", "tidegate.providers.emulator", *context.args)
    os.execv(program[0], program)


@app.command()
def migrate() -> None:
    """Bring the database's schema up to date."""
    from tidegate import telemetry
    from tidegate.supervisor.ground import migrate as run
    from tidegate.supervisor.ground import prepared

    config = _load()
    telemetry.configure_logging(config.log_format, "warning", process="migrate")
    with prepared(config, only={"postgres"}) as ground:
        revision = run(ground.config, lambda why: typer.echo(f"tidegate: {why}", err=True))
    typer.echo(f"schema brought to revision {revision}" if revision else "schema is up to date")


@app.command()
def prune(
    days: Annotated[int | None, typer.Option(min=1, help="Instead of RETENTION_DAYS.")] = None,
) -> None:
    """Delete requests, answers and files that ended too long ago."""
    from tidegate import telemetry
    from tidegate.supervisor.roles import prune as run

    config = _load()
    telemetry.configure_logging(config.log_format, "warning", process="prune")
    report = run(config, days)
    typer.echo(
        f"deleted {report.requests} requests, {report.blobs} files, {report.partitions} partitions"
        f" ({report.skipped} left for the next run)"
    )


@settings.command("check")
def check() -> None:
    """Say whether the settings are sound, and what they come to; start nothing."""
    from tidegate.policy import deployed, deployed_upstreams

    config = _load()
    policy, deployment = deployed(config), deployed_upstreams(config)
    servers = "bundled, in DATA_DIR" if config.embedded else "yours"
    typer.echo("The settings are sound.")
    typer.echo(f"  listens on          {config.host} port {config.port}")
    typer.echo(f"  PostgreSQL, Valkey  {servers}")
    typer.echo(f"  provider            {'emulated' if config.emulated else 'real'}")
    typer.echo(f"  API keys            {'asked for' if config.asks_for_keys else 'not asked for'}")
    for upstream in deployment.upstreams:
        places = "; ".join(f"{one} at {url}" for one, url in upstream.base_urls.items())
        if config.emulated and upstream.name == DEFAULT_POOL:
            places = "the emulator"
        typer.echo(f"  upstream {upstream.name}: {', '.join(upstream.models)} ({places})")
        _say_limits(deployment.policies.get(upstream.name, policy))
    for route in deployment.routes:
        chain = ", then ".join(f"{name}/{model or route.model}" for name, model in route.targets)
        typer.echo(f"  route {route.model}: {chain}")


def _say_limits(policy: PoolPolicy) -> None:
    from tidegate.policy.words import in_words

    for name, limit in policy.limits.items():
        typer.echo(f"    {name:<21} {in_words(limit)}")
