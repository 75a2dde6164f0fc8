"""`tidegate config check`: what the settings come to, and where each comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.call import DEFAULT_POOL
from tidegate.cli.pool import Json, show_json, show_table

if TYPE_CHECKING:
    from tidegate.config import Config
    from tidegate.limiter import PoolPolicy
    from tidegate.policy.upstreams import Deployment

app = typer.Typer(help="Look at the settings.", no_args_is_help=True)


@app.callback()
def _config() -> None:
    pass


def load_sound() -> Config:
    """The settings, where all that `config check` checks is sound. Raises ConfigError."""
    from tidegate.config import load
    from tidegate.policy import deployed, deployed_upstreams

    config = load()
    deployed(config)
    deployed_upstreams(config)
    return config


def load_to_run() -> Config:
    """The same for a process that is to run, unless its supervisor has done it; what may be a
    mistake is said. Raises ConfigError."""
    from tidegate.supervisor.ground import is_child

    config = load_sound()
    if not is_child():
        say_doubtful(config)
    return config


def say_doubtful(config: Config) -> None:
    """One line for each variable whose name is nearly a setting's, and for each configured model
    that prompts can't reach."""
    from tidegate.errors import InvalidRequest
    from tidegate.policy import deployed_upstreams
    from tidegate.policy.file import doubtful
    from tidegate.relay.targets import Targets

    for one in doubtful(config):
        typer.echo(f"tidegate: {one}", err=True)
    targets = Targets(deployed_upstreams(config))
    for name in _MODELS if DEFAULT_POOL in targets.upstreams else ():
        try:
            targets.check_prompt(getattr(config, name.lower()))
        except InvalidRequest as refused:
            typer.echo(f"tidegate: {name}: {refused.message}", err=True)


@app.command()
def check(
    defaults: Annotated[
        bool, typer.Option("--defaults", help="Show settings that are not given, too.")
    ] = False,
    json: Json = False,
) -> None:
    """Say whether the settings are sound, what they come to, and where each comes from."""
    from tidegate.policy import deployed, deployed_upstreams
    from tidegate.policy.file import doubtful, policy_file

    config = load_sound()
    policy, deployment = deployed(config), deployed_upstreams(config)
    rows = [row for row in _settings(config) if defaults or row[2] != _DEFAULT]
    file = policy_file(config)
    if json:
        show_json(
            {
                "settings": {
                    name: {"value": None if value == _NOT_SET else value, "from": place}
                    for name, value, place in rows
                },
                "policy_file": None if file is None else str(file),
                "doubtful": {one.name: one.near for one in doubtful(config)},
                "upstreams": _plain(deployment, policy),
            }
        )
        return
    typer.echo("The settings are sound.")
    _say_what_they_come_to(config)
    typer.echo(f"  limits              {file or 'RATE_LIMITS and the defaults; no tidegate.toml'}")
    _say_upstreams(config, deployment, policy)
    if rows:
        typer.echo()
        show_table("", ("setting", "value", "from"), rows)
    say_doubtful(config)


_MODELS = ("TEXT_MODEL", "MULTI_MODAL_MODEL", "IMAGE_MODEL", "CLASSIFIER_MODEL")
_DEFAULT, _NOT_SET = "the default", "not set"


def _settings(config: Config) -> list[tuple[str, ...]]:
    """Name, value as it may be shown, and origin."""
    import json

    from tidegate.config import SECRETS
    from tidegate.config.environment import origins, shown

    given = origins()
    rows: list[tuple[str, ...]] = []
    for field, value in config:
        name = field.upper()
        text = json.dumps(value) if isinstance(value, dict) else _as_text(value)
        is_secret = name in SECRETS and value is not None
        rows.append((name, shown(name, text) if is_secret else text, given.get(name, _DEFAULT)))
    return rows


def _as_text(value: object) -> str:
    if value is None:
        return _NOT_SET
    return str(int(value)) if isinstance(value, bool) else str(value)


def _say_what_they_come_to(config: Config) -> None:
    servers = "bundled, in DATA_DIR" if config.embedded else "yours"
    typer.echo(f"  listens on          {config.host} port {config.port}")
    typer.echo(f"  PostgreSQL, Valkey  {servers}")
    typer.echo(f"  account of Gemini   {_gemini(config)}")
    typer.echo(f"  API keys            {'asked for' if config.asks_for_keys else 'not asked for'}")


def _gemini(config: Config) -> str:
    from tidegate.policy import emulates

    if config.gemini_api_key is not None:
        return "yours"
    return "emulated" if emulates(config) else "none: prompts (/submit, /stream) have no upstream"


def _say_upstreams(config: Config, deployment: Deployment, policy: PoolPolicy) -> None:
    from tidegate.policy.words import in_words

    for upstream in deployment.upstreams:
        places = "; ".join(f"{one} at {url}" for one, url in upstream.base_urls.items())
        if config.emulated and upstream.name == DEFAULT_POOL:
            places = "the emulator"
        typer.echo(f"  upstream {upstream.name}: {', '.join(upstream.models)} ({places})")
        for name, limit in deployment.policies.get(upstream.name, policy).limits.items():
            typer.echo(f"    {name:<21} {in_words(limit)}")
    for route in deployment.routes:
        chain = ", then ".join(f"{name}/{model or route.model}" for name, model in route.targets)
        typer.echo(f"  route {route.model}: {chain}")


def _plain(deployment: Deployment, policy: PoolPolicy) -> list[dict[str, Any]]:
    from tidegate.policy.plain import to_plain

    return [
        {
            "name": one.name,
            "models": one.models,
            "base_urls": dict(one.base_urls),
            "policy": to_plain(deployment.policies.get(one.name, policy)),
        }
        for one in deployment.upstreams
    ]
