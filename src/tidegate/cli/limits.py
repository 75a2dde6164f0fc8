"""Commands on a running pool: `tidegate limits`, `tidegate why` and `tidegate permits`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.terminal import (
    AnyPool,
    Json,
    Reason,
    choose_pool,
    chosen_pool,
    in_pool,
    show_json,
    show_table,
    tell,
    who,
    with_keeper,
)
from tidegate.errors import ConfigError, LimiterUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tidegate.limiter import Limiter
    from tidegate.policy.inspection import Control, Overview, ShownPermit
    from tidegate.policy.learned import LearnedLimit
    from tidegate.policy.rollout import PolicyKeeper, Revision
    from tidegate.store.records import PolicyRecord

app = typer.Typer(help="See and change the limits of the running deployment.", no_args_is_help=True)

_IN_FORCE_WITHIN_S = 5.0
LimitId = Annotated[str, typer.Argument(help="A limit's id, such as kind:text_only.")]


@app.command()
def show(json: Json = False) -> None:
    """Show all limits with who uses and who waits for them."""
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
                f"${one.used / 1_000_000:.2f}" if one.unit == "usd" else str(one.used),
                str(one.waiting),
                _remark(one, overview),
            )
            for one in overview.limits
        ],
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
                    queue.held_up_by or "its process, which takes no grants",
                    str(queue.waiting),
                    f"{queue.process}/{queue.first_ticket}",
                )
                for queue in overview.queues
            ],
        )


def _show_learned(overview: Overview) -> None:
    """What headers of answers report that differs from the limits in force."""
    rows: list[tuple[str, ...]] = [
        (one.limit, one.model, str(one.bound), _in_force(one), one.at.replace("+00:00", ""))
        for one in overview.learned
        if one.drift != "same"
    ]
    if rows:
        typer.echo()
        columns = ("limit", "model", "bound", "in force", "at (UTC)")
        show_table("Learned from headers (tidegate limits accept [ID])", columns, rows)


def _in_force(one: LearnedLimit) -> str:
    return "none" if one.in_force is None else f"{one.in_force}: it {one.drift}"


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
    typer.echo(f"{len(overview.processes)} processes in the pool {overview.pool}")
    if overview.recovering_ms:
        typer.echo(f"No call is admitted for {overview.recovering_ms} ms: Valkey lost its data")
    typer.echo()


def _remark(one: Any, overview: Overview) -> str:
    from tidegate.limiter import format_pause

    remarks = [] if one.source == "set" else [one.source]
    for learned in overview.learned:
        if learned.limit == one.limit and learned.others_share:
            remarks.append(f"others on the account take {learned.others_share:.0%}")
    if one.paused_ms:
        by = f" by {one.paused_by}" if one.paused_by else ""
        remarks.append(f"paused{by}, {format_pause(one.paused_ms)}")
    if one.current != one.bound:
        remarks.append(f"now {one.current} concurrent")
    if one.lapsing:
        remarks.append(f"{one.lapsing} held for processes that are gone")
    if one.shadowed:
        remarks.append(f"would have held up {one.shadowed}")
    return "; ".join(remarks)


@app.command()
def accept(
    limits: Annotated[
        list[str] | None, typer.Argument(help="Ids; all that differ if absent.", metavar="[ID]...")
    ] = None,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Put limits in force as headers of the provider's answers report them."""
    from tidegate.policy.format import Plain, to_plain
    from tidegate.policy.rollout import differences

    async def work(control: Control) -> tuple[Plain, Revision]:
        before = to_plain(control.limiter.policy)
        now = await control.accept(limits or (), by=who(), reason=reason)
        await in_force(control.limiter)
        return before, now

    before, now = in_pool(work)
    changes_made = "".join(f"\n  {line}" for line in differences(before, now.policy))
    tell(
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
            metavar="[KEY=VALUE]...",
        ),
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="A key to remove.", metavar="KEY")
    ] = None,
    deployed: Annotated[
        bool,
        typer.Option(
            "--deployed",
            help="Put what the file and the environment say in force. Tenants keep weights and "
            "limits that these do not name.",
        ),
    ] = False,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Change limits, for all processes and for good."""
    from tidegate.policy.format import Plain, edit, to_plain
    from tidegate.policy.rollout import differences

    wanted = dict(parsed(change) for change in changes or [])
    if deployed == bool(wanted or remove):
        raise ConfigError(
            "limits set",
            None,
            "needs either changes, such as kind:text_only=8, or --deployed",
        )

    async def change(keeper: PolicyKeeper) -> tuple[Plain, Revision]:
        before = to_plain(keeper.limiter.policy)
        if deployed:
            now = await keeper.adopt_wanted(set_by=who(), reason=reason)
        else:
            now = await keeper.change(edit(wanted, remove or []), set_by=who(), reason=reason)
        await in_force(keeper.limiter)
        return before, now

    before, now = with_keeper(change)
    for line in _missed(list(wanted)):
        typer.echo(f"tidegate: warning: {line}", err=True)
    changes_made = "".join(f"\n  {line}" for line in differences(before, now.policy))
    tell(
        json,
        {"revision": now.number, "set_by": now.set_by, "policy": now.policy},
        f"revision {now.number} is in force{changes_made}",
    )


def _missed(keys: list[str]) -> list[str]:
    """Of the limits that were set on a model: those that no call of the chosen pool ever meets."""
    from tidegate.policy.deployment import deployed_upstreams
    from tidegate.policy.format import AT_ONCE, TOTAL, whom_it_binds
    from tidegate.settings import load

    models = {key: model for key in keys if (model := whom_it_binds(key)) not in (None, TOTAL)}
    models = {key: one for key, one in models.items() if one.partition("/")[0] not in AT_ONCE}
    if not models:
        return []
    from tidegate.spine.routing import Targets

    config = load()
    try:
        targets, pool = Targets(deployed_upstreams(config)), chosen_pool(config)
    except ConfigError:  # such as a key that only the processes have
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
        typer.Option("--for", help="How long: 30s, 10m, 2h, 1d. Without it until it is resumed."),
    ] = None,
    reason: Reason = "",
    json: Json = False,
) -> None:
    """Pause a limit: it admits no call; running calls go on."""
    for_ms = None if for_ is None else span_ms("--for", for_)
    paused = in_pool(lambda control: control.pause(limit, for_ms, by=who(), reason=reason))
    text = f"{limit} is paused already, and for longer"
    if paused:
        text = f"{limit} is paused {f'for {for_}' if for_ else 'until it is resumed'}"
    tell(json, {"limit": limit, "done": paused, "for_ms": for_ms}, text)


@app.command()
def resume(limit: LimitId, json: Json = False) -> None:
    """End a pause."""
    resumed = in_pool(lambda control: control.resume(limit, by=who()))
    text = f"{limit} is resumed" if resumed else f"{limit} was not paused"
    tell(json, {"limit": limit, "done": resumed}, text)


@app.command()
def history(
    most: Annotated[int, typer.Option(min=1, max=1_000, help="How many, the newest first.")] = 20,
    json: Json = False,
) -> None:
    """Show which policies were in force since when, who set them, and why."""
    records = with_keeper(lambda keeper: keeper.history(most))
    if json:
        show_json(records)
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
            for place, record in enumerate(records)
        ],
    )


def _changes(record: PolicyRecord, before: PolicyRecord | None) -> str:
    from tidegate.policy.rollout import differences

    if before is None:
        return ""
    return "\n".join(differences(before.policy, record.policy)) or "none"


async def in_force(limiter: Limiter) -> None:
    """Wait until Valkey has the policy, so that the command's end does not take it along."""
    try:
        async with asyncio.timeout(_IN_FORCE_WITHIN_S):
            await limiter.in_force()
    except TimeoutError:
        revision = limiter.policy.revision
        message = f"revision {revision} is on record, but Valkey has not taken it yet"
        raise LimiterUnavailable(message, limit="") from None


def parsed(change: str, command: str = "limits set") -> tuple[str, Any]:
    """`KEY=VALUE`, the value as TOML; what is no TOML is a text."""
    import tomllib

    key, is_there, value = change.partition("=")
    if not is_there or not key.strip():
        raise ConfigError(command, change, "must be KEY=VALUE")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def span_ms(option: str, text: str) -> int:
    """`text` in milliseconds. Raises ConfigError, naming the option."""
    from tidegate.policy.format import ms_of

    found = ms_of(text)
    if not found:
        raise ConfigError(option, text, "must be a number and ms, s, m, h or d, such as 10m")
    return max(1, round(found))


permits_app = typer.Typer(help="Look at the permits in use.", no_args_is_help=True)


def why(
    what: Annotated[str, typer.Argument(help="The id of a request, or a ticket: process/ticket.")],
    json: Json = False,
    pool: AnyPool = None,
) -> None:
    """Show which limit a request is waiting for, who holds it and who paused it."""
    from tidegate.policy.inspection import why as ask

    choose_pool(pool)
    reason = in_pool(lambda control: ask(control, what))
    if json:
        show_json(reason)
        return
    typer.echo(f"{what} {reason.sentence}")
    if reason.holders:
        typer.echo()
        _show_permits("In use", reason.holders)


@permits_app.command("list")
def list_(json: Json = False) -> None:
    """Show every permit in use, by process."""
    permits = in_pool(lambda control: control.permits())
    if json:
        show_json(permits)
    elif permits:
        _show_permits("", permits)
    else:
        typer.echo("no permit is in use")


@permits_app.command()
def revoke(
    process: Annotated[str, typer.Argument(help="Its name or its session, as `list` shows it.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Release all permits of a process whose death is certain.

    One that lives cancels its calls when it finds out, and until then the provider may see more
    calls than allowed.
    """
    if not yes:
        typer.confirm(f"Is {process} certainly dead?", abort=True)
    ended = in_pool(lambda control: control.revoke(process, by=who()))
    text = f"{ended} session{'' if ended == 1 else 's'} of {process} ended"
    tell(json, {"process": process, "sessions": ended}, text)


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
