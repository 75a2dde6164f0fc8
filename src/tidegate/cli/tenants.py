"""Commands on tenants and API keys: `tidegate tenants`, `keys` and `erase`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.call import DEFAULT_TENANT, OperatorRole, Scope, Tier
from tidegate.cli.limits import in_force, parsed, span_ms
from tidegate.cli.terminal import (
    Json,
    Reason,
    command_config,
    confirm,
    in_all_pools,
    in_pool,
    show_json,
    show_result,
    show_table,
    who,
    with_tenants,
)
from tidegate.errors import ConfigError, NotFound

if TYPE_CHECKING:
    from tidegate.policy.inspection import Control
    from tidegate.policy.rollout import PolicyKeeper
    from tidegate.policy.tenants import ShownTenant
    from tidegate.store.operator_actions import OperatorAction
    from tidegate.store.tenants import Tenants

app = typer.Typer(help="Show and change tenants of the running deployment.", no_args_is_help=True)

_NONE = "none"
TenantName = Annotated[str, typer.Argument(help="A tenant's name, such as acme.")]
PriorityCap = Annotated[
    int | None,
    typer.Option(
        min=-100,
        max=100,
        help="The highest priority of its requests; higher ones are lowered to it.",
    ),
]
TenantTiers = Annotated[
    str | None,
    typer.Option(
        help="Processing tiers of jobs that name none: live,flex,batch. Batch lines use live,flex. "
        "none: only live.",
        metavar="TIERS|none",
    ),
]
_CAPS = {
    "most_queued_jobs": "--queued-jobs",
    "most_queued_bytes": "--queued-bytes",
    "most_streams": "--streams",
    "most_long_polls": "--long-polls",
    "budget_day_money": "--day-money",
    "budget_month_money": "--month-money",
    "budget_day_tokens": "--day-tokens",
    "budget_month_tokens": "--month-tokens",
    "retention_days": "--retention-days",
}
_OTHERS = {"most_priority": "--priority-cap", "models": "--model", "tiers": "--tiers"}


def _cap(help_: str) -> Any:
    return typer.Option(help=f"{help_}; none removes the bound.", metavar="N|none")


@app.command("list")
def list_(json: Json = False) -> None:
    """List all tenants."""
    from tidegate.policy.tenants import list_tenants, plain_tenant

    found = in_pool(list_tenants)
    if json:
        show_json([plain_tenant(one) for one in found])
        return
    show_table(
        "",
        ("tenant", "weight", "limits", "keys", "may", "created (UTC)"),
        [
            (
                one.tenant.tenant_id,
                str(one.weight),
                "\n".join(_limits(one)),
                str(one.tenant.keys),
                "\n".join(_bounds(one)),
                f"{one.tenant.created_at:%Y-%m-%d %H:%M}",
            )
            for one in found
        ],
    )


@app.command()
def show(tenant: TenantName, json: Json = False) -> None:
    """Show one tenant, with the secret that signs its webhooks."""
    from tidegate.policy.tenants import plain_tenant, show_tenant, webhook_secret_of
    from tidegate.settings import load

    entry = in_pool(lambda control: show_tenant(control, tenant))
    deployments = load().webhook_secret
    secret = deployments and webhook_secret_of(deployments.get_secret_value(), tenant)
    if json:
        show_json({**plain_tenant(entry), "webhook_secret": secret})
        return
    _print(entry, json)
    if secret:
        typer.echo(f"  webhook secret  {secret}")


@app.command("set")
def set_(
    tenant: TenantName,
    weight: Annotated[
        int | None,
        typer.Option(
            min=1, max=1_000, help="Its share under contention, relative to other tenants."
        ),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="A limit of its own: tenant:acme=5, rpm:tenant/acme=60; =none removes it.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    priority_cap: PriorityCap = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="An allowed model or pattern; replaces all that were set before."),
    ] = None,
    all_models: Annotated[bool, typer.Option("--all-models", help="Allow all models.")] = False,
    queued_jobs: Annotated[str | None, _cap("Maximum of jobs in the queue")] = None,
    queued_bytes: Annotated[str | None, _cap("Maximum bytes of queued prompts and files")] = None,
    streams: Annotated[str | None, _cap("Maximum of open streams in each process")] = None,
    long_polls: Annotated[str | None, _cap("Maximum of open long polls in each process")] = None,
    day_money: Annotated[str | None, _cap("Budget per day, in USD")] = None,
    month_money: Annotated[str | None, _cap("Budget per month, in USD")] = None,
    day_tokens: Annotated[str | None, _cap("Budget per day, in tokens")] = None,
    month_tokens: Annotated[str | None, _cap("Budget per month, in tokens")] = None,
    retention_days: Annotated[str | None, _cap("Days that its requests are kept")] = None,
    tiers: TenantTiers = None,
    disable: Annotated[bool, typer.Option("--disable", help="Reject all of its keys.")] = False,
    enable: Annotated[bool, typer.Option("--enable", help="Accept its keys again.")] = False,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Create a tenant, or change the given fields; takes effect everywhere within a second."""
    bounds = (
        *(queued_jobs, queued_bytes, streams, long_polls),
        *(day_money, month_money, day_tokens, month_tokens, retention_days),
    )
    changes = _changed_bounds(bounds)
    if priority_cap is not None:
        changes["most_priority"] = priority_cap
    if model or all_models:
        _one_of("--all-models", all_models, "--model", bool(model))
        changes["models"] = model or None
    changes |= {} if tiers is None else {"tiers": _tiers(tiers)}
    _one_of("--disable", disable, "--enable", enable)
    disabled = True if disable else False if enable else None
    entry = _set(tenant, changes, weight, limit or [], disabled, reason)
    _note_unbound([name for name, value in changes.items() if value is not None])
    _print(entry, json)


def _note_unbound(changes: list[str]) -> None:
    """Note that caps have no effect where callers need no API key."""
    from tidegate.settings import load

    bound = [one for one in changes if one != "retention_days" and not one.startswith("budget_")]
    options = [_CAPS.get(one, _OTHERS.get(one)) for one in bound]
    config = load()
    if options and not config.requires_keys:
        why = f"AUTH={config.auth}" + (f", HOST={config.host}" if config.auth == "auto" else "")
        named = ", ".join(map(str, options))
        typer.echo(
            f"tidegate: note: API keys are not asked for ({why}), so nobody is bound by {named}",
            err=True,
        )


@app.command()
def remove(
    tenant: TenantName,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Remove a tenant, its keys, and its limits in all pools; its requests stay on record."""
    from tidegate.policy.tenants import remove_tenant

    if not yes:
        confirm(f"Do all keys of {tenant} stop working now?")

    async def work(keepers: Sequence[PolicyKeeper], tenants: Tenants) -> None:
        await remove_tenant(tenants, keepers, tenant, by=who(), reason=reason)
        for keeper in keepers:
            await in_force(keeper.limiter)

    in_all_pools(work)
    show_result(json, {"tenant": tenant, "removed": True}, f"{tenant} is removed")


def _set(
    tenant: str,
    changes: dict[str, Any],
    weight: int | None,
    limits: list[str],
    disabled: bool | None,
    reason: str,
) -> ShownTenant:
    from tidegate.policy.format import is_of
    from tidegate.policy.tenants import TenantChange, set_tenant

    given = parsed(limits, "--limit")
    values = {name: None if value == _NONE else value for name, value in given.items()}
    change = TenantChange(changes=changes, weight=weight, limits=values, disabled=disabled)

    removed = [name for name, value in values.items() if value is None]

    async def work(control: Control) -> ShownTenant:
        there = control.limiter.policy.limits
        for name in removed:
            if is_of(name, tenant) and name not in there:
                raise NotFound(f"there is no limit {name}")
        entry = await set_tenant(control, tenant, change, by=who(), reason=reason)
        await in_force(control.limiter)
        return entry

    return in_pool(work)


def _print(one: ShownTenant, json: bool) -> None:
    from tidegate.policy.tenants import plain_tenant

    if json:
        show_json(plain_tenant(one))
        return
    tenant = one.tenant
    typer.echo(f"{tenant.tenant_id}{'' if tenant.disabled_at is None else ' (disabled)'}")
    typer.echo(f"  weight  {one.weight}")
    typer.echo(f"  keys    {tenant.keys}")
    for label, lines in (("limits", _limits(one)), ("may", _bounds(one))):
        for line in lines:
            typer.echo(f"  {label:<7} {line}")


def _limits(one: ShownTenant) -> list[str]:
    from tidegate.policy.format import in_words, limit_of

    return [
        f"{name}: {in_words(limit_of(name, value, strict=False))}"
        for name, value in sorted(one.limits.items())
    ]


def _bounds(one: ShownTenant) -> list[str]:
    from tidegate.prices.rates import dollars

    tenant = one.tenant
    lines = [] if tenant.disabled_at is None else ["nothing: it is disabled"]
    if tenant.models is not None:
        lines.append(f"ask {', '.join(tenant.models) or 'no model'}")
    if tenant.most_priority < 100:
        lines.append(f"have priorities up to {tenant.most_priority}")
    if tenant.tiers is not None:
        lines.append(f"put jobs into the tiers {', '.join(tenant.tiers)}")
    for name, option in _CAPS.items():
        if (value := getattr(tenant, name)) is not None:
            shown = dollars(round(value * 10**6)) if option.endswith("-money") else f"{value}"
            lines.append(f"{option.removeprefix('--').replace('-', ' ')}: {shown}")
    return lines


def _changed_bounds(texts: tuple[str | None, ...]) -> dict[str, Any]:
    """Return the caps that were given, in the order of _CAPS."""
    return {
        name: _number(option, text)
        for (name, option), text in zip(_CAPS.items(), texts, strict=True)
        if text is not None
    }


def _number(option: str, text: str) -> int | float | None:
    if text.strip().lower() == _NONE:
        return None
    allowed = "a number" if option.endswith("-money") else "a whole number"
    try:
        value = float(text) if option.endswith("-money") else int(text)
    except ValueError:
        raise ConfigError(option, text, f"must be {allowed}, or {_NONE}") from None
    if not 0 <= value <= 10**12:
        raise ConfigError(option, text, f"must be {allowed} from 0 up, or {_NONE}")
    return value


def _tiers(text: str) -> list[str] | None:
    if text.strip().lower() == _NONE:
        return None
    found = [one.strip() for one in text.split(",")]
    if any(one not in set(Tier) for one in found):
        raise ConfigError("--tiers", text, f"must be some of {', '.join(Tier)}, or {_NONE}")
    return found


def _one_of(option: str, is_given: bool, other: str, other_is_given: bool) -> None:
    if is_given and other_is_given:
        raise ConfigError(option, None, f"must not be given together with {other}")


keys_app = typer.Typer(help="Create, list, keep and revoke API keys.", no_args_is_help=True)
UNKNOWN_MAKER = "unknown"


@keys_app.command()
def create(
    tenant: Annotated[
        str, typer.Option(help="The tenant that the key belongs to.")
    ] = DEFAULT_TENANT,
    name: Annotated[str, typer.Option(help="A name that says what the key is for.")] = "",
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="What the key allows. Default without --role: infer and read."),
    ] = None,
    role: Annotated[
        OperatorRole | None,
        typer.Option(
            help="Opens /admin, the dashboard and /metrics: a viewer reads, an operator also "
            "changes limits, pauses, requeues and drains, an admin does everything."
        ),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="When the key expires: 30d, 12h. Default: never.")
    ] = None,
    json: Json = False,
) -> None:
    """Create a key and print it, only this once: Tidegate stores only its digest."""
    from tidegate.policy.tenants import check_new_name, plain_key
    from tidegate.settings import load
    from tidegate.store.tenants import scopes_of

    expires_at = None
    if expires is not None:
        try:
            expires_at = datetime.now(UTC) + timedelta(milliseconds=span_ms("--expires", expires))
        except OverflowError:
            raise ConfigError("--expires", expires, "must end before the year 10000") from None
    check_new_name(tenant)
    key, made = with_tenants(
        lambda tenants: tenants.create_key(
            tenant,
            name=name,
            scopes=scopes_of(scope or (), role),
            expires_at=expires_at,
            made_by=who(),
        )
    )
    if json:
        show_json({"key": made.text, **plain_key(key)})
        return
    typer.echo(made.text)
    what = f"a key of {tenant} for {' and '.join(key.scopes)}, named by its prefix {key.prefix}"
    sys.stderr.write(f"tidegate: {what}; keep it, it is not shown again\n")
    if "infer" in key.scopes and not load().requires_keys:
        sys.stderr.write(
            "tidegate: calls need no key here (AUTH, HOST), so keys are ignored: a call names its "
            "tenant in the header x-tidegate-tenant\n"
        )


@keys_app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only those of this tenant.")] = None,
    prefix: Annotated[str, typer.Option(help="Only keys whose prefix begins like this.")] = "",
    json: Json = False,
) -> None:
    """List keys by their prefixes, oldest first; the keys themselves are never shown."""
    from tidegate.policy.tenants import check_name, plain_key

    start = prefix.removeprefix("tg_").partition("_")[0]
    if not start.isascii():
        raise ConfigError("--prefix", ascii(start), "must be letters and digits")
    if tenant is not None:
        check_name(tenant)
    keys = with_tenants(lambda tenants: tenants.all_keys(tenant, start))
    if json:
        show_json([plain_key(key) for key in keys])
    elif not keys:
        typer.echo("no key is there: tidegate keys create makes one")
    else:
        show_table(
            "",
            (
                *("prefix", "tenant", "state", "scopes", "last used (UTC)", "expires (UTC)"),
                *("made by", "name"),
            ),
            [
                (
                    key.prefix,
                    key.tenant_id,
                    key.state,
                    " ".join(key.scopes),
                    _minute(key.last_used_at),
                    _minute(key.expires_at),
                    key.made_by or UNKNOWN_MAKER,
                    key.name,
                )
                for key in keys
            ],
        )


@keys_app.command()
def keep(
    prefix: Annotated[str, typer.Argument(help="The key's prefix, or the key itself.")],
    json: Json = False,
) -> None:
    """Confirm a key without a recorded creator, so that `doctor` no longer lists it."""
    from tidegate.policy.tenants import plain_key

    meant = _prefix(prefix)
    key = with_tenants(lambda tenants: tenants.keep_key(meant, by=f"kept by {who()}"))
    show_result(json, plain_key(key), f"{key.prefix} of {key.tenant_id}: {key.made_by}")


@keys_app.command()
def revoke(
    prefix: Annotated[str, typer.Argument(help="The key's prefix, or the key itself.")],
    json: Json = False,
) -> None:
    """Revoke a key permanently; it is rejected everywhere within a second."""
    from tidegate.policy.tenants import plain_key

    meant = _prefix(prefix)
    key = with_tenants(lambda tenants: tenants.revoke_key(meant, by=who()))
    show_result(json, plain_key(key), f"{key.prefix} of {key.tenant_id} is revoked")


def _prefix(text: str) -> str:
    from tidegate.store.tenants import prefix_in

    prefix = prefix_in(text)
    if prefix is None:
        # Not shown: it may be a mistyped key.
        raise ConfigError(
            "PREFIX", None, "must be a key's prefix of 10 characters: see tidegate keys list"
        )
    return prefix


def _minute(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M}"


def actions(
    operator: Annotated[
        str | None, typer.Option(help="Only actions of this operator, as the list names it.")
    ] = None,
    what: Annotated[str | None, typer.Option(help="Only this action, such as key.create.")] = None,
    target: Annotated[str | None, typer.Option(help="Only actions on this target.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="Maximum number.")] = 50,
    json: Json = False,
) -> None:
    """List actions of operators, newest first: who, what, on what, from where."""
    from dataclasses import asdict

    found = with_tenants(
        lambda tenants: tenants.actions.page(
            operator=operator, what=what, target=target, limit=limit
        )
    )
    if json:
        show_json([asdict(one) for one in found])
    elif not found:
        typer.echo("no such action is on record")
    else:
        show_table(
            "",
            ("at (UTC)", "operator", "role", "what", "on", "change", "from"),
            [
                (
                    f"{one.at:%Y-%m-%d %H:%M:%S}",
                    *(one.operator, one.role, one.what, one.target),
                    _change_of(one),
                    one.address,
                )
                for one in found
            ],
        )


def _change_of(one: OperatorAction) -> str:
    """Return a short description of a change: before and after, or its revision in a history."""
    if one.revision is not None:
        return f"revision {one.revision}"
    before, after = one.before or {}, one.after or {}
    return ", ".join(
        f"{name}: {_text_of(before[name])} -> {_text_of(value)}"
        if name in before
        else f"{name}: {_text_of(value)}"
        for name, value in after.items()
        if (before[name] != value if name in before else value is not None)
    )


def _text_of(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def erase(
    subject: Annotated[str | None, typer.Option(help="The subject that requests named.")] = None,
    tenant: Annotated[
        str | None,
        typer.Option(help="Only requests of this tenant; without --subject all of them."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    json: Json = False,
) -> None:
    """Erase requests, answers, files and bodies of a subject or a tenant; totals stay."""
    from tidegate.store.retention import Whose
    from tidegate.supervisor.maintenance import erase as run

    whose = Whose(tenant, subject)
    named = " of ".join(
        [f"subject {subject}"] * (subject is not None) + [f"tenant {tenant}"] * (tenant is not None)
    )
    if not (yes or dry_run):
        confirm(f"Erase all that is on record of {named}, for good?")
    report = run(command_config("erase"), whose, dry_run=dry_run)
    text = (
        f"{'would erase' if dry_run else 'erased'} {report.requests} requests, "
        f"{report.calls} records of calls, {report.blobs} files, "
        f"{report.answers} kept answers, {report.batches} batches, "
        f"{report.spilled} entries on this disk"
    )
    if report.held:
        text += (
            f"\n{report.held} files of entries are held by running processes, "
            "which drop what is erased when they write the rest"
        )
    show_result(json, report, text)
