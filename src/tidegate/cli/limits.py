"""Commands on a running pool: `tidegate limits`, `tidegate why` and `tidegate permits`."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.terminal import (
    AnyPool,
    Json,
    Reason,
    choose_pool,
    chosen_pool,
    chosen_pool_or,
    command_config,
    confirm,
    counted,
    in_pool,
    is_short_id,
    legible,
    show_json,
    show_result,
    show_table,
    who,
    whole_id,
    with_keeper,
)
from tidegate.errors import ConfigError, LimiterUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from uuid import UUID

    from tidegate.limiter import Limiter
    from tidegate.policy.deployment import Upstream
    from tidegate.policy.imported import LimitImport
    from tidegate.policy.inspection import Control, Overview, ShownLimit, ShownPermit
    from tidegate.policy.inspection import Reason as InspectedReason
    from tidegate.policy.learned import LearnedLimit
    from tidegate.policy.rollout import PolicyKeeper, Revision
    from tidegate.settings import Config
    from tidegate.store.database import Connections
    from tidegate.store.records import PolicyRecord
    from tidegate.upstream.usage_api import ReportedLimits, UsageAccount, UsageProvider

app = typer.Typer(
    help="Show and change the limits of the running deployment.", no_args_is_help=True
)

_IN_FORCE_WITHIN_S = 5.0
LimitId = Annotated[str, typer.Argument(help="A limit's id, such as kind:text_only.")]


@app.command()
def show(json: Json = False) -> None:
    """Show all limits with their usage and their waiting calls."""
    overview = in_pool(lambda control: control.overview(without_us=True))
    if json:
        show_json(overview)
        return
    _show_heading(overview)
    show_table(
        "",
        ("limit", "", "used", "waiting", "remark"),
        [
            (
                one.limit,
                one.words,
                f"${one.used / 1_000_000:,.2f}" if one.unit == "usd" else f"{one.used:,}",
                f"{one.waiting:,}",
                _remark(one, overview),
            )
            for one in overview.limits
        ],
        styles=[_style(one) for one in overview.limits],
    )
    _show_learned(overview)
    if overview.queues:
        typer.echo()
        show_table(
            "Waiting",
            ("process", "tenant", "held up by", "tickets", "first (for tidegate why)"),
            [
                (
                    queue.process,
                    queue.tenant,
                    queue.held_up_by or "its process, which accepts no permits",
                    str(queue.waiting),
                    f"{queue.process}/{queue.first_ticket}",
                )
                for queue in overview.queues
            ],
        )


def _show_learned(overview: Overview) -> None:
    """Show limits in headers of answers that differ from the limits in force."""
    rows: list[tuple[str, ...]] = [
        (one.limit, one.model, f"{one.bound:,}", _in_force(one), one.at.replace("+00:00", ""))
        for one in overview.learned
        if one.drift != "same"
    ]
    if rows:
        typer.echo()
        columns = ("limit", "model", "bound", "in force", "at (UTC)")
        show_table("Learned from answers (tidegate limits accept [ID])", columns, rows)


def _in_force(one: LearnedLimit) -> str:
    return "none" if one.in_force is None else f"{one.in_force:,}: it {one.drift}"


def _show_heading(overview: Overview) -> None:
    now = overview.in_force
    line = f"Revision {now.revision}"
    if now.set_by is not None:
        line += f", {now.origin}, set by {now.set_by}"
    if now.since is not None:
        line += f" at {now.since:%Y-%m-%d %H:%M:%S} UTC"
    if now.reason:
        line += f": {now.reason}"
    typer.echo(line)
    typer.echo(
        f"{counted(len(overview.processes), 'process', 'processes')} in the pool {overview.pool}"
    )
    if (fair_by := overview.policy.get("pool", {}).get("fair_by")) is not None:
        typer.echo(f"Tenants share by {fair_by}")
    if overview.recovering_ms:
        typer.echo(f"No call is admitted for {overview.recovering_ms} ms: Valkey lost its data")
    typer.echo()


_TENANTS_SHOWN = 3


def _is_full(one: ShownLimit) -> bool:
    return not one.shadow and one.used >= min(one.bound, one.current) > 0


def _style(one: ShownLimit) -> str:
    """Return the style of a limit's row: paused, full with waiting calls, full, in use, idle."""
    if one.paused_ms:
        return "red"
    if _is_full(one):
        return "bold yellow" if one.waiting else "yellow"
    return "" if one.used or one.waiting else "bright_black"


def _waiting(limit: str, overview: Overview) -> str:
    """Return the tenants that wait for a limit, those with the most calls first."""
    calls: Counter[str] = Counter()
    for queue in overview.queues:
        if queue.held_up_by == limit:
            calls[queue.tenant] += queue.waiting
    named = [f"{tenant} {count}" for tenant, count in calls.most_common(_TENANTS_SHOWN)]
    more = len(calls) - len(named)
    others = [counted(more, "more tenant", "more tenants")] if more > 0 else []
    return ", ".join([*named, *others])


def _remark(one: Any, overview: Overview) -> str:
    from tidegate.policy.format import pause_in_words
    from tidegate.policy.learned import kept_free

    remarks = [] if one.source == "set" else [one.source]
    if _is_full(one):
        remarks.append("full")
    if waiting := _waiting(one.limit, overview):
        remarks.append(f"waiting: {waiting}")
    remarks += [text[0].lower() + text[1:] for text in kept_free(overview.learned, one.limit)]
    if one.paused_ms:
        remarks.append(pause_in_words(one.paused_by, one.paused_ms))
    if one.current != one.bound:
        remarks.append(f"now {one.current:,} concurrent")
    if one.lapsing:
        remarks.append(f"{one.lapsing} held for processes that are gone")
    if one.shadowed:
        remarks.append(f"would have held up {one.shadowed:,}")
    return "; ".join(remarks)


@app.command()
def accept(
    limits: Annotated[
        list[str] | None,
        typer.Argument(help="Ids of limits. Default: all that differ.", metavar="[ID]..."),
    ] = None,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Apply limits that the provider's answers report."""
    from tidegate.policy.format import Plain, to_plain
    from tidegate.policy.rollout import differences

    async def work(control: Control) -> tuple[Plain, Revision]:
        before = to_plain(control.limiter.policy)
        now = await control.accept(limits or (), by=who(), reason=reason)
        await in_force(control.limiter)
        return before, now

    before, now = in_pool(work)
    changes_made = "".join(f"\n  {line}" for line in differences(before, now.policy))
    show_result(
        json,
        {"revision": now.number, "set_by": now.set_by, "policy": now.policy},
        f"revision {now.number} is in force{changes_made}",
    )


@app.command("set")
def set_(
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            help="KEY=VALUE: a limit's id, weights.TENANT, pool.OPTION or bands, and a value as "
            "in tidegate.toml.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="A key to remove.", metavar="KEY")
    ] = None,
    deployed: Annotated[
        bool,
        typer.Option(
            "--deployed",
            help="Apply the policy of the file and the environment. Tenants keep weights and "
            "limits that these do not name.",
        ),
    ] = False,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Change limits in all processes, permanently."""
    from tidegate.policy.format import Plain, edit, to_plain
    from tidegate.policy.rollout import differences

    values = parsed(changes or [])
    if deployed == bool(values or remove):
        raise ConfigError(
            "limits set",
            None,
            "needs either changes, such as kind:text_only=8, or --deployed",
        )

    async def change(keeper: PolicyKeeper) -> tuple[Plain, Revision]:
        before = to_plain(keeper.limiter.policy)
        if deployed:
            now = await keeper.adopt_stated(set_by=who(), reason=reason)
        else:
            now = await keeper.change(edit(values, remove or []), set_by=who(), reason=reason)
        await in_force(keeper.limiter)
        return before, now

    before, now = with_keeper(change)
    for line in _missed(list(values)):
        typer.echo(f"tidegate: warning: {line}", err=True)
    changes_made = "".join(f"\n  {line}" for line in differences(before, now.policy))
    show_result(
        json,
        {"revision": now.number, "set_by": now.set_by, "policy": now.policy},
        f"revision {now.number} is in force{changes_made}",
    )


def _missed(keys: list[str]) -> list[str]:
    """Return a line for each limit on a model that no upstream of the chosen pool serves."""
    from tidegate.policy.deployment import deployed_upstreams
    from tidegate.policy.format import AT_ONCE, TOTAL, subject_of
    from tidegate.settings import load

    models = {key: model for key in keys if (model := subject_of(key)) not in (None, TOTAL)}
    models = {key: one for key, one in models.items() if one.partition("/")[0] not in AT_ONCE}
    if not models:
        return []
    from tidegate.spine.routing import Targets

    config = load()
    try:
        targets, pool = Targets(deployed_upstreams(config)), chosen_pool(config)
    except ConfigError:  # for example a key that only the processes have
        return []
    if pool not in targets.upstreams:  # it was added at run time
        return []
    lines = []
    for key, model in models.items():
        pools = targets.pools_for(model)
        if pool not in pools:
            meant = f"; did you mean --pool {' or '.join(pools)}?" if pools else ""
            lines.append(f"{key}: no upstream in the pool {pool!r} serves {model!r}{meant}")
    return lines


@app.command()
def pause(
    limit: LimitId,
    for_: Annotated[
        str | None,
        typer.Option("--for", help="Duration: 30s, 10m, 2h, 1d. Default: until it is resumed."),
    ] = None,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Pause a limit: it admits no call; running calls continue."""
    from tidegate.policy.inspection import LONGEST_PAUSE_MS

    for_ms = None if for_ is None else span_ms("--for", for_)
    if for_ms is not None and for_ms > LONGEST_PAUSE_MS:
        allowed = f"must be up to {LONGEST_PAUSE_MS // 86_400_000}d; without it until it is resumed"
        raise ConfigError("--for", for_, allowed)
    paused = in_pool(lambda control: control.pause(limit, for_ms, by=who(), reason=reason))
    text = f"{limit} is paused already, and for longer"
    if paused:
        text = f"{limit} is paused {f'for {for_}' if for_ else 'until it is resumed'}"
    show_result(json, {"limit": limit, "done": paused, "for_ms": for_ms}, text)


@app.command()
def resume(limit: LimitId, json: Json = False) -> None:
    """End the pause of a limit."""
    resumed = in_pool(lambda control: control.resume(limit, by=who()))
    text = f"{limit} is resumed" if resumed else f"{limit} was not paused"
    show_result(json, {"limit": limit, "done": resumed}, text)


@app.command()
def history(
    limit: Annotated[
        int, typer.Option(min=1, max=1_000, help="Maximum number, newest first.")
    ] = 20,
    json: Json = False,
) -> None:
    """List the revisions of the policy: when, by whom and why each was set."""
    # One more, to compare the oldest one shown with.
    records = with_keeper(lambda keeper: keeper.history(limit + 1))
    if json:
        show_json(records[:limit])
        return
    show_table(
        "",
        ("revision", "since (UTC)", "from", "set by", "changes", "reason"),
        [
            (
                str(record.revision),
                "" if record.created_at is None else f"{record.created_at:%Y-%m-%d %H:%M:%S}",
                record.origin,
                record.set_by,
                _changes(record, records[place + 1] if place + 1 < len(records) else None),
                record.reason,
            )
            for place, record in enumerate(records[:limit])
        ],
    )


def _changes(record: PolicyRecord, before: PolicyRecord | None) -> str:
    from tidegate.policy.rollout import differences

    if before is None:
        return ""
    return "\n".join(differences(before.policy, record.policy)) or "none"


async def in_force(limiter: Limiter) -> None:
    """Wait until every process has the policy: later calls are subject to it."""
    try:
        async with asyncio.timeout(_IN_FORCE_WITHIN_S):
            await limiter.known_everywhere()
    except TimeoutError:
        revision = limiter.policy.revision
        message = f"revision {revision} is on record, but not known to every process yet"
        raise LimiterUnavailable(message, limit="") from None


def parsed(changes: Iterable[str], command: str = "limits set") -> dict[str, Any]:
    """Return the values of `KEY=VALUE` by key, each key once. Raises ConfigError."""
    found: dict[str, Any] = {}
    for change in changes:
        key, value = _parsed(change, command)
        if key in found:
            raise ConfigError(command, change, f"must name {key} once")
        found[key] = value
    return found


def _parsed(change: str, command: str) -> tuple[str, Any]:
    """Parse `KEY=VALUE`, with the value as TOML; a value that is not TOML is a text, unless it
    begins as a list, a table or a quoted text. Raises ConfigError."""
    import tomllib

    key, is_there, value = change.partition("=")
    if not is_there or not key.strip():
        raise ConfigError(command, change, "must be KEY=VALUE")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        if value.lstrip().startswith(("[", "{", '"')):  # most likely a shell removed the quotes
            allowed = "is no TOML; in a shell it stands in single quotes: 'models=[\"llama-*\"]'"
            raise ConfigError(command, change, allowed) from None
        return key.strip(), value.strip()


def span_ms(option: str, text: str) -> int:
    """Return `text` in milliseconds. Raises ConfigError, naming the option."""
    from tidegate.policy.format import ms_of

    found = ms_of(text)
    if not found:
        raise ConfigError(option, text, "must be a number and ms, s, m, h or d, such as 10m")
    if math.isinf(found):
        raise ConfigError(option, None, "is too long a time")
    return max(1, round(found))


permits_app = typer.Typer(help="List and revoke permits in use.", no_args_is_help=True)


def why(
    what: Annotated[
        str,
        typer.Argument(
            help="The id of a request or a batch, or its beginning or end among the newest; or a "
            "ticket: process/ticket."
        ),
    ],
    json: Json = False,
    pool: AnyPool = None,
) -> None:
    """Show which limit a request or a batch is waiting for, who holds it and who paused it."""
    choose_pool(pool)
    what = _whole_id(what)
    reason = _why(what, is_of_any_pool=pool is None)
    if json:
        show_json(reason)
        return
    typer.echo(f"{what} {reason.sentence}")
    if reason.holders:
        typer.echo()
        _show_permits("In use", reason.holders)


def _why(what: str, *, is_of_any_pool: bool) -> InspectedReason:
    """Return why a request waits, in the pool by whose limits it is called, or a ticket in the
    chosen pool."""
    from tidegate.policy.inspection import batch_id_of, is_put_back, request_id_of
    from tidegate.policy.inspection import why as ask
    from tidegate.supervisor.services import places_of, with_record

    if (batch_id := batch_id_of(what)) is not None:
        return _why_batch(what, batch_id)
    request_id = request_id_of(what)
    if request_id is None or not is_of_any_pool:
        return in_pool(lambda control: ask(control, what))
    config = command_config()
    reasons = []
    for place in with_record(config, lambda record: places_of(config, record, request_id)):
        choose_pool(place.pool)
        reasons.append(in_pool(partial(ask, what=what, found=place)))
        if reasons[-1].is_of_the_pool is not is_put_back(place):
            return reasons[-1]
    return reasons[0]


def _why_batch(what: str, batch_id: UUID) -> InspectedReason:
    """Return what the lines of a batch wait for, in the pool by whose limits they are called."""
    from tidegate.policy.inspection import is_put_back, of_batch, why_batch
    from tidegate.supervisor.services import batch_of, with_record

    config = command_config()
    stand, places = with_record(config, lambda record: batch_of(config, record, batch_id))
    reasons = []
    for place in places:
        choose_pool(place.pool)
        reasons.append(in_pool(partial(why_batch, what=what, stand=stand, line=place)))
        if reasons[-1].is_of_the_pool is not is_put_back(place):
            return reasons[-1]
    return reasons[0] if reasons else of_batch(what, stand)


_NEWEST = 1_000


def _whole_id(what: str) -> str:
    """Return the whole id for a part of the id of a request or a batch; any other text is
    unchanged."""
    from uuid import UUID

    from tidegate.policy.inspection import batch_id_of
    from tidegate.supervisor.services import with_record

    with suppress(ValueError):
        return str(UUID(what))
    if batch_id_of(what) is not None:
        return what
    part = what.removeprefix("msg")  # the same batch, by whichever API it is named
    if not is_short_id(part.removeprefix("batch_")):
        return what
    return whole_id(part, with_record(command_config(), _newest), f"the newest {_NEWEST:,}")


async def _newest(record: Connections) -> list[str]:
    from tidegate.store.statistics import newest_batches, newest_ids

    requests = await newest_ids(record, _NEWEST)
    batches = await newest_batches(record, _NEWEST)
    return [*map(str, requests), *(f"batch_{one.hex}" for one in batches)]


@permits_app.command("list")
def list_(json: Json = False) -> None:
    """List every permit in use, by process."""
    permits = in_pool(lambda control: control.permits())
    if json:
        show_json(permits)
    elif permits:
        _show_permits("", permits)
    else:
        typer.echo("no permit is in use")


@permits_app.command()
def revoke(
    process: Annotated[
        str, typer.Argument(help="The process's name or session, as `list` shows it.")
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    json: Json = False,
) -> None:
    """Release all permits of a process that is certainly dead.

    A process that is still alive cancels its calls when it notices; until then the provider may
    get more calls than the limits allow.
    """
    if not yes:
        confirm(f"Is {process} certainly dead?")
    ended = in_pool(lambda control: control.revoke(process, by=who()))
    text = f"{ended} session{'' if ended == 1 else 's'} of {process} ended"
    show_result(json, {"process": process, "sessions": ended}, text)


def _show_permits(title: str, permits: Iterable[ShownPermit]) -> None:
    show_table(
        title,
        ("process", "ticket", "tenant", "limits", "since (UTC)", "request"),
        [
            (
                permit.process,
                str(permit.ticket),
                permit.tenant,
                " ".join(permit.limits),
                "" if permit.since is None else f"{permit.since:%H:%M:%S}",
                "" if permit.request_id is None else str(permit.request_id),
            )
            for permit in permits
        ],
    )


_KEPT_SHOWN = 50


@app.command("import")
def import_(
    provider: Annotated[str, typer.Argument(help="openai or anthropic.")],
    apply: Annotated[
        bool, typer.Option("--apply", help="Apply them; otherwise only show what would change.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Also replace limits that a person has set.")
    ] = False,
    project: Annotated[
        str | None, typer.Option(help="OpenAI's project. Default: the account's only one.")
    ] = None,
    workspace: Annotated[
        str | None, typer.Option(help="Anthropic's workspace. Default: the whole organization.")
    ] = None,
    shared: Annotated[
        list[str] | None,
        typer.Option(
            help="A pattern of models that share their limits, such as 'gpt-5*': OpenAI's API does "
            "not report it.",
            metavar="PATTERN",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="The variable with the admin key. Default: OPENAI_ADMIN_KEY or "
            "ANTHROPIC_ADMIN_KEY.",
            metavar="VARIABLE",
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Base URL of the API. Default: the upstream's.")
    ] = None,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Read an account's limits from its provider; --apply puts them in force.

    Needs an admin key, which is only used to read. Limits that a person has set are kept.
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
        places=_places(name, project, workspace),
        shared=shared or (),
        replace=replace,
        reason=reason or f"imported from {name}" if apply else None,
    )
    if json:
        show_json(_import_as_json(found, change, lines, revision))
        return
    _show_import(found, change, lines, revision, upstream.pool)


def _upstream_of(config: Config, provider: UsageProvider) -> Upstream:
    """Return the upstream of the chosen pool, otherwise the provider's only one. Raises as
    `upstream_of`."""
    from tidegate.jobs.reconciliation import upstream_of
    from tidegate.policy.deployment import deployed_upstreams

    return upstream_of(deployed_upstreams(config), provider, chosen_pool_or(None), "--pool")


def _places(
    provider: UsageProvider, project: str | None, workspace: str | None
) -> tuple[str | None, str | None]:
    """Return both. Raises ConfigError for the one that the provider does not have."""
    of = {"--project": (project, "openai"), "--workspace": (workspace, "anthropic")}
    for option, (value, its_provider) in of.items():
        if value is not None and provider != its_provider:
            raise ConfigError(option, value, f"must only be given for {its_provider}")
    return project, workspace


def _account_of(
    upstream: Upstream, provider: UsageProvider, key: str | None, url: str | None
) -> UsageAccount:
    from tidegate.policy.providers import PROVIDERS
    from tidegate.settings import secret
    from tidegate.upstream.usage_api import ADMIN_KEYS, UsageAccount

    variable = key or ADMIN_KEYS[provider]
    value = secret(variable)
    if not value:
        raise ConfigError(variable, "(not set)", "must be set to an admin key of the account")
    base_url = (
        url or upstream.base_urls.get(provider) or PROVIDERS[provider].urls[provider]
    ).rstrip("/")
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError("--url", base_url, "must be an http:// or https:// URL")
    is_its_own = url is None and provider in upstream.base_urls
    network = upstream.access(provider).network if is_its_own else None
    return UsageAccount(provider, base_url, value, variable, network)


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
    """Read the limits, and return them, their changes, the lines of the difference, and the
    revision in force; without a `reason` nothing is put in force. The provider is called before the
    pool is opened."""
    from tidegate.policy.format import of_plain, to_plain
    from tidegate.policy.imported import import_of, limits_of, one_class_each
    from tidegate.policy.rollout import differences
    from tidegate.supervisor.services import with_keeper

    found = asyncio.run(_account_limits(account, *places))
    limits = limits_of(one_class_each(found.classes, shared), account.provider)

    async def work(keeper: PolicyKeeper) -> tuple[LimitImport, list[str], int | None]:
        before = to_plain(keeper.limiter.policy)
        change = import_of(limits, before["limits"], replace=replace)
        if reason is None:
            after = to_plain(of_plain(change.edit(before)))
            return change, differences(before, after), None
        now = await keeper.change(change.edit, set_by=who(), reason=reason)
        await in_force(keeper.limiter)
        return change, differences(before, now.policy), now.number

    change, lines, revision = with_keeper(config, pool, lambda keeper, _: work(keeper))
    return found, change, lines, revision


async def _account_limits(
    account: UsageAccount, project: str | None, workspace: str | None
) -> ReportedLimits:
    from tidegate.upstream.transport import RelayWire
    from tidegate.upstream.usage_api import USAGE_TIMEOUTS, reported_limits

    wire = RelayWire(USAGE_TIMEOUTS)
    await wire.start()
    try:
        return await reported_limits(wire, account, project=project, workspace=workspace)
    finally:
        await wire.aclose()


def _import_as_json(
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


def _show_import(
    found: ReportedLimits, change: LimitImport, lines: list[str], revision: int | None, pool: str
) -> None:
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
