"""Commands on budgets: `tidegate budgets`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.terminal import (
    Json,
    confirm,
    given,
    legible,
    show_json,
    show_result,
    show_table,
    who,
    with_budgets,
    with_tenants,
)
from tidegate.errors import ConfigError, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tidegate.prices.budgets import Budget
    from tidegate.store.budgets import BudgetBook, BudgetRecords
    from tidegate.store.tenants import Tenants

app = typer.Typer(help="List and change budgets.", no_args_is_help=True)
BudgetName = Annotated[str, typer.Argument(help="The name of a budget.", metavar="BUDGET")]
Period = Annotated[
    str | None,
    typer.Option(
        help="day, week, month, or a rolling period such as 5h. Default of a new one: month.",
        metavar="PERIOD",
    ),
]
Zone = Annotated[
    str | None, typer.Option(help="Time zone of day, week and month. Default of a new one: UTC.")
]
Fallback = Annotated[
    str | None,
    typer.Option(
        help="A cheaper model for calls that do not fit; none removes it.",
        metavar="MODEL|none",
    ),
]
Doubt = Annotated[
    str | None,
    typer.Option(
        help="bound: reject calls of unknown price or bound, and charge calls that are cut off "
        "their bound. estimate: charge both an estimate. Default of a new one: bound.",
        metavar="bound|estimate",
    ),
]
Alerts = Annotated[
    list[str] | None,
    typer.Option(
        help="A share in percent at which to alert; replaces earlier shares. none: no alerts.",
        metavar="SHARE|none",
    ),
]
_SHOWN = 20
_NONE = "none"


@app.command("list")
def list_(
    name: Annotated[
        str | None, typer.Argument(help="Only this budget, with each of its amounts.")
    ] = None,
    json: Json = False,
) -> None:
    """List all budgets with what is spent, or one with each of its amounts."""
    from tidegate.prices.budgets import plain_budget
    from tidegate.store.budgets import MOST_BOOKS, plain_book

    async def read(records: BudgetRecords) -> tuple[list[Budget], list[BudgetBook]]:
        _, found = await records.all()
        books = await records.books(name)
        if name is None and len(books) >= MOST_BOOKS:
            with_book = {book.budget for book in books}
            for one in found:
                books += await records.books(one.name) if one.name not in with_book else []
        return found, books

    budgets, books = with_budgets(read)
    if name is not None and name not in {one.name for one in budgets}:
        raise NotFound(f"there is no budget {name}: `tidegate budgets list` has all")
    budgets = [one for one in budgets if name in (None, one.name)]
    if json:
        show_json(
            [
                plain_budget(one)
                | {"books": [plain_book(book) for book in books if book.budget == one.name]}
                for one in budgets
            ]
        )
        return
    _show_books(budgets, books, MOST_BOOKS if name else _SHOWN)


def _show_books(budgets: list[Budget], books: list[BudgetBook], most: int) -> None:
    """Show the books of each budget, up to `most`, and all budgets without any yet."""
    if not budgets:
        typer.echo("no budget is set: `tidegate budgets set NAME` adds one")
        return
    of_budget: dict[str, list[BudgetBook]] = {}
    for book in books:
        of_budget.setdefault(book.budget, []).append(book)
    by_name = {one.name: one for one in budgets}
    rows = [
        _row(by_name[name], book)
        for name, found in of_budget.items()
        if name in by_name
        for book in found[:most]
    ]
    rows += [_row(one, None) for one in budgets if one.name not in of_budget]
    show_table("", ("budget", "binds", "spent", "held", "of", "in", "resets"), rows)
    for name, found in of_budget.items():
        if len(found) > most:
            more = f"{len(found) - most:,} more books, which are used less"
            typer.echo(f"{name} has {more}: tidegate budgets list {name}", err=True)


def _row(budget: Budget, book: BudgetBook | None) -> tuple[str, ...]:
    from tidegate.prices.budgets import scope_values, whom, window

    if book is None:
        amounts = (budget.shown(0), budget.shown(0), budget.shown(budget.amount))
        return (budget.name, ", ".join(whom(budget)) or "all", *amounts, window(budget), "")
    whose = [*whom(budget), *(one or "none" for one in scope_values(book.scope))]
    resets = f"{book.reset_at:%Y-%m-%d %H:%M}Z" if book.reset_at else ""
    if book.paused_since:  # until a person resumes it
        resets = "paused"
    elif book.spent >= book.amount:
        resets = f"{resets} spent".lstrip()
    return (
        budget.name,
        ", ".join(whose) or "all",
        budget.shown(book.spent),
        budget.shown(book.held),
        budget.shown(book.amount),
        window(budget),
        resets,
    )


@app.command("set")
def set_(
    name: BudgetName,
    usd: Annotated[str | None, typer.Option(help="The amount in USD, such as 250.")] = None,
    tokens: Annotated[int | None, typer.Option(min=0, help="The amount in tokens.")] = None,
    period: Period = None,
    zone: Zone = None,
    tenant: Annotated[str | None, typer.Option(help="Applies to one tenant, or to each.")] = None,
    key: Annotated[
        str | None, typer.Option(help="Applies to one API key, by its prefix, or to each.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Applies to models of this pattern.")] = None,
    subject: Annotated[str | None, typer.Option(help="Applies to one user, or to each.")] = None,
    conversation: Annotated[
        str | None, typer.Option(help="Applies to one conversation, or to each.")
    ] = None,
    pause: Annotated[
        bool | None,
        typer.Option(
            "--pause/--no-pause", help="Pause it once it is used up, until a person resumes it."
        ),
    ] = None,
    fallback: Fallback = None,
    doubt: Doubt = None,
    alert: Alerts = None,
    json: Json = False,
) -> None:
    """Create a budget, or change its amount, its end, its doubt and its alerts.

    Options that are not given keep the values of an existing budget. `each` gives every tenant,
    key, user or conversation the whole amount. A new budget starts with the recorded spend of its
    period. Takes effect everywhere within a second.
    """
    from tidegate.prices.budgets import plain_budget, whom, window, with_changes

    if pause and fallback is not None:
        raise ConfigError("--pause", "(set)", "not with --fallback")
    if usd is not None and tokens is not None:
        raise ConfigError("--usd", usd, "must not be given together with --tokens")
    if doubt not in (None, "bound", "estimate"):
        raise ConfigError("--doubt", doubt, "bound or estimate")
    values = given(usd=usd, tokens=tokens, model=model, doubt=doubt, zone=zone)
    values |= {} if period is None else _period(period)
    values |= {} if alert is None else {"alerts": _alerts(alert)}
    dimensions = given(tenant=tenant, key=key, subject=subject, conversation=conversation)

    def edit(before: Budget | None) -> Budget:
        if before is None and usd is None and tokens is None:
            raise ConfigError(name, None, "is a new budget: it needs --usd or --tokens")
        bound = _binding(dimensions, () if before is None else before.each)
        return with_changes(before, name, values | bound | _end(pause, fallback, before))

    with _named_by_option(period):
        budget, is_new = with_budgets(lambda records: records.change(name, edit, by=who()))
    note = _note_unused if is_new else _note_paused
    note(budget)
    binds = ", ".join(whom(budget)) or "all calls"
    verb = "is set" if is_new else "is changed"
    text = f"{name} {verb}: {budget.shown(budget.amount)} {window(budget)} for {binds}"
    show_result(json, plain_budget(budget), text)


def _note_unused(budget: Budget) -> None:
    """Note that a budget applies to nothing yet: with a misspelt name it never would."""

    async def missing(tenants: Tenants) -> list[str]:
        found = []
        if budget.tenant and not await tenants.knows(budget.tenant):
            found.append(f"tenant {budget.tenant}")
        if budget.key and not (await tenants.find([budget.key]))[1]:
            found.append(f"key {budget.key}")
        return found

    for one in with_tenants(missing) if budget.tenant or budget.key else ():
        message = f"tidegate: note: there is no {one}, so {budget.name} binds nobody yet"
        typer.echo(legible(message), err=True)


def _note_paused(budget: Budget) -> None:
    """Note that calls are still rejected after a change, such as to a larger amount."""
    pauses = budget.at_end == "pause"
    books = with_budgets(lambda records: records.books(budget.name)) if pauses else []
    if any(one.paused_since for one in books):
        message = f"{budget.name} is still paused: tidegate budgets resume {budget.name}"
        typer.echo(f"tidegate: note: {message}", err=True)


def _binding(dimensions: dict[str, str], before: Sequence[str]) -> dict[str, Any]:
    """Return the dimensions that a budget applies to, and those with an amount for each value."""
    each = [one for one, value in dimensions.items() if value == "each" and one not in before]
    named = {one: value for one, value in dimensions.items() if value != "each"}
    return {**named, "each": [*(one for one in before if one not in named), *each]}


def _end(pause: bool | None, fallback: str | None, before: Budget | None) -> dict[str, Any]:
    """Return what happens when the budget is spent, if an option states it."""
    if pause:
        return {"at_end": "pause"}
    if fallback not in (None, _NONE):
        return {"at_end": "fall_back", "fallback": fallback}
    now = "refuse" if before is None else before.at_end
    removed = {"pause": pause is False, "fall_back": fallback == _NONE, "refuse": False}
    return {"at_end": "refuse"} if removed[now] else {}


def _alerts(texts: list[str]) -> list[int]:
    if [one.strip().lower() for one in texts] == [_NONE]:
        return []
    try:
        return [int(one) for one in texts]
    except ValueError:
        allowed = f"shares from 1 to 100 percent, or {_NONE} alone"
        raise ConfigError("--alert", ", ".join(texts), allowed) from None


@contextmanager
def _named_by_option(period: str | None) -> Iterator[None]:
    """Have an error about a field that `--period` has set name the option."""
    try:
        yield
    except ConfigError as wrong:
        if wrong.variable not in ("period", "window_s") or period is None:
            raise
        raise ConfigError("--period", period, wrong.allowed) from None


def _period(period: str) -> dict[str, Any]:
    from tidegate.policy.format import ms_of
    from tidegate.prices.budgets import LONGEST_WINDOW_S

    if period in ("day", "week", "month"):
        return {"period": period}
    window_ms = ms_of(period) or 0.0
    if window_ms % 1000 or not 1000 <= window_ms <= LONGEST_WINDOW_S * 1000:
        allowed = f"day, week, month, or whole seconds up to {LONGEST_WINDOW_S // 86_400}d"
        raise ConfigError("--period", period, allowed)
    return {"period": "rolling", "window_s": int(window_ms) // 1000}


@app.command()
def remove(
    name: BudgetName,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    json: Json = False,
) -> None:
    """Remove a budget with its recorded spend."""
    if not yes:
        confirm(f"Remove the budget {name} and what it has counted?")
    with_budgets(lambda records: records.remove(name, by=who()))
    show_result(json, {"budget": name, "removed": True}, f"{name} is removed")


@app.command()
def resume(
    name: BudgetName,
    of: Annotated[
        list[str] | None,
        typer.Option(
            help="Only for these values of `each`, in their order; '' is no value. Default: all."
        ),
    ] = None,
    extra_usd: Annotated[
        str,
        typer.Option(help="Extra USD for the current period, or for the length of a rolling one."),
    ] = "0",
    extra_tokens: Annotated[int, typer.Option(min=0, help="Extra tokens, in the same way.")] = 0,
    json: Json = False,
) -> None:
    """Resume a paused budget, or allow more spend in its current period."""
    from tidegate.prices.budgets import extra_of, scope_text, scope_values

    extra, unit = extra_of(extra_usd, extra_tokens)
    scope = None if of is None else scope_text([one or None for one in of])
    scopes = with_budgets(
        lambda records: records.resume(name, scope=scope, extra=extra, unit=unit, by=who())
    )
    values = [scope_values(one) for one in scopes]
    text = f"{name} is resumed for {len(scopes)}" if scopes else f"{name} was not paused"
    if extra and not scopes:
        text += ", and has no book in this period that could be allowed more"
    show_result(json, {"budget": name, "scopes": values}, text)
