"""Command `tidegate limits import`: the limits of an account, read from its provider."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.limits import in_force
from tidegate.cli.terminal import Json, Reason, chosen_pool_or, command_config, show_json, who
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tidegate.policy.deployment import Upstream
    from tidegate.policy.imported import LimitImport
    from tidegate.policy.rollout import PolicyKeeper
    from tidegate.settings import Config
    from tidegate.upstream.limits_api import ReportedLimits
    from tidegate.upstream.usage_api import UsageAccount, UsageProvider

_KEPT_SHOWN = 50


def import_(
    provider: Annotated[str, typer.Argument(help="openai or anthropic.")],
    apply: Annotated[
        bool, typer.Option("--apply", help="Put them in force; else only show what would change.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Also replace limits that a person has set.")
    ] = False,
    project: Annotated[
        str | None, typer.Option(help="Of OpenAI; the account's only one if absent.")
    ] = None,
    workspace: Annotated[
        str | None, typer.Option(help="Of Anthropic; the whole organization if absent.")
    ] = None,
    shared: Annotated[
        list[str] | None,
        typer.Option(
            help="A pattern of models that share their limits, such as 'gpt-5*': OpenAI's API does "
            "not tell which do.",
            metavar="PATTERN",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="The variable that has the admin key: OPENAI_ADMIN_KEY or ANTHROPIC_ADMIN_KEY if "
            "absent.",
            metavar="VARIABLE",
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Of the API; the upstream's own base URL if absent.")
    ] = None,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Read an account's limits from its provider, and put them in force with --apply.

    Needs an admin key, which is only read with. Limits that a person has set are kept.
    """
    from tidegate.jobs.reconciliation import usage_provider

    config = command_config("limits-import", "warning")
    name = usage_provider(provider)
    upstream = _upstream_of(config, name)
    account = _account_of(upstream, name, key, url)
    found, change, lines, revision = _imported(
        config,
        upstream.pool,
        account,
        places=(project, workspace),
        shared=shared or (),
        replace=replace,
        reason=reason or f"imported from {name}" if apply else None,
    )
    if json:
        show_json(_as_json(found, change, lines, revision))
        return
    _show(found, change, lines, revision, upstream.pool)


def _upstream_of(config: Config, provider: UsageProvider) -> Upstream:
    """The upstream of the chosen pool, else the only one of the provider. Raises ConfigError."""
    from tidegate.jobs.reconciliation import upstream_of
    from tidegate.policy.deployment import deployed_upstreams

    deployment = deployed_upstreams(config)
    pool = chosen_pool_or(None)
    if pool is None:
        return upstream_of(deployment, provider, None)
    for one in deployment.upstreams:
        if one.pool == pool:
            return one
    names = ", ".join(one.pool for one in deployment.upstreams)
    raise ConfigError("--pool", pool, f"must be one of {names}")


def _account_of(
    upstream: Upstream, provider: UsageProvider, key: str | None, url: str | None
) -> UsageAccount:
    from tidegate.policy.deployment import PROVIDERS
    from tidegate.settings import secret
    from tidegate.upstream.usage_api import ADMIN_KEYS, UsageAccount

    variable = key or ADMIN_KEYS[provider]
    value = secret(variable)
    if not value:
        raise ConfigError(variable, "(not set)", "must be set to an admin key of the account")
    base_url = (url or upstream.base_urls.get(provider) or PROVIDERS[provider][provider]).rstrip(
        "/"
    )
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError("--url", base_url, "must be an http:// or https:// URL")
    return UsageAccount(provider, base_url, value, variable)


def _imported(
    config: Config,
    pool: str,
    account: UsageAccount,
    *,
    places: tuple[str | None, str | None],
    shared: Sequence[str],
    replace: bool,
    reason: str | None,
) -> tuple[ReportedLimits, LimitImport, list[str], int | None]:
    """What was found, what it changes, the lines of the difference, and the revision that is in
    force; without a `reason` nothing is put in force. The provider is asked before the pool."""
    import asyncio

    from tidegate.policy.format import of_plain, to_plain
    from tidegate.policy.imported import import_of, limits_of, one_class_each
    from tidegate.policy.rollout import differences
    from tidegate.supervisor.services import with_keeper

    found = asyncio.run(_read(account, *places))
    told = limits_of(one_class_each(found.classes, shared), account.provider)

    async def work(keeper: PolicyKeeper) -> tuple[LimitImport, list[str], int | None]:
        before = to_plain(keeper.limiter.policy)
        change = import_of(told, before["limits"], replace=replace)
        if reason is None:
            after = to_plain(of_plain(change.edit(before)))
            return change, differences(before, after), None
        now = await keeper.change(change.edit, set_by=who(), reason=reason)
        await in_force(keeper.limiter)
        return change, differences(before, now.policy), now.number

    change, lines, revision = with_keeper(config, pool, lambda keeper, _: work(keeper))
    return found, change, lines, revision


async def _read(
    account: UsageAccount, project: str | None, workspace: str | None
) -> ReportedLimits:
    from tidegate.upstream.limits_api import reported_limits
    from tidegate.upstream.transport import RelayWire
    from tidegate.upstream.usage_api import USAGE_TIMEOUTS

    wire = RelayWire(USAGE_TIMEOUTS)
    await wire.start()
    try:
        return await reported_limits(wire, account, project=project, workspace=workspace)
    finally:
        await wire.aclose()


def _as_json(
    found: ReportedLimits, change: LimitImport, lines: list[str], revision: int | None
) -> dict[str, Any]:
    return {
        "applied": revision is not None,
        "revision": revision,
        "set": dict(change.set),
        "remove": list(change.remove),
        "kept": dict(change.kept),
        "skipped": list(found.skipped),
        "changes": lines,
    }


def _show(
    found: ReportedLimits, change: LimitImport, lines: list[str], revision: int | None, pool: str
) -> None:
    from tidegate.cli.terminal import legible

    for name, bound in list(change.kept.items())[:_KEPT_SHOWN]:
        typer.echo(legible(f"kept: {name}, which a person has set (the provider's is {bound})"))
    if found.skipped:
        typer.echo(legible(f"not imported: {', '.join(found.skipped)}"))
    for line in lines:
        typer.echo(legible(f"  {line}"))
    if not lines:
        typer.echo(f"the limits of the pool {pool} are those of the account")
    elif revision is None:
        typer.echo(f"nothing is changed yet: --apply puts this in force in the pool {pool}")
    else:
        typer.echo(f"revision {revision} is in force in the pool {pool}")
