"""Routes `/admin/budgets` and `/admin/alerts`: budgets with their spend, and raised alerts.

Invariants: every route requires an admin; a change is in force in this process when it is answered,
in all others within a second. Amounts of money are in USD, decimal in requests and micro-dollars in
books.
"""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from uuid import UUID

import orjson
from fastapi import Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.convertors import Convertor, register_url_convertor

from tidegate.errors import InvalidRequest, NotFound, PolicyChanged
from tidegate.http.admin.limits import (
    EXPECTED,
    By,
    Signed,
    config_errors_refused,
    described,
    read_json,
)
from tidegate.http.guards import admin_router
from tidegate.http.problems import problem_responses
from tidegate.http.services import services_of
from tidegate.prices.budgets import (
    MOST_AMOUNT,
    Budget,
    Dimension,
    budget_alert,
    budget_of,
    extra_of,
    plain_budget,
    scope_text,
    scope_values,
)
from tidegate.settings import Config
from tidegate.store.budgets import BudgetBook, plain_book
from tidegate.store.outbox import AlertRecord

router = admin_router(400, 408, 413, 415, 503, tag="budgets")


class AnyText(Convertor[str]):
    """A name in a path, of any characters: one with a line break is rejected with its field."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("text", AnyText())
BudgetName = Annotated[
    str,
    Path(description="A budget's name", min_length=1, max_length=200, pattern=r"^[^\x00]*$"),
]
_WHOM: Any = Field(default=None, min_length=1, max_length=200, description="null: any")


class NewBudget(BaseModel):
    """A budget. The calls that it applies to, and the amounts that it counts, cannot be changed
    later."""

    model_config = ConfigDict(extra="forbid")

    by: str = Field(default="admin", min_length=1, max_length=100)

    expected: dict[str, Any] = Field(
        default_factory=dict, description=EXPECTED, examples=[{"amount": 250_000_000}]
    )
    usd: Decimal | None = Field(
        default=None, ge=0, le=MOST_AMOUNT // 10**6, description="Its amount; or `tokens`"
    )
    tokens: int | None = Field(default=None, ge=0, le=MOST_AMOUNT)
    period: Literal["day", "week", "month", "rolling"] = "month"
    zone: str = Field(default="UTC", description="Of the calendar", examples=["Europe/Berlin"])
    window_s: int | None = Field(default=None, ge=1, description="Of a rolling period")
    tenant: str | None = _WHOM
    key: str | None = Field(default=None, max_length=100, description="Prefix of an API key")
    model: str | None = Field(
        default=None, max_length=200, description="A pattern", examples=["claude-opus-*"]
    )
    subject: str | None = _WHOM
    conversation: str | None = _WHOM
    each: list[Dimension] = Field(
        default_factory=list,
        max_length=4,
        description="Each value of these has the whole amount for itself. subject and conversation "
        "are a tenant's own: without `tenant` and `key`, `tenant` is added",
    )
    at_end: Literal["refuse", "pause", "fall_back"] = Field(
        default="refuse",
        description="What happens to a call that does not fit: it is refused; with `pause` all "
        "are, once the budget is used up, until a person resumes it; or `fallback` is called",
    )
    fallback: str | None = Field(default=None, max_length=200, examples=["claude-haiku-4-5"])
    doubt: Literal["bound", "estimate"] = Field(
        default="bound",
        description="bound: a call of unknown price or bound is refused, and one that was cut "
        "stays charged with the most that it can have cost, until `tidegate reconcile` corrects "
        "it (OpenAI and Anthropic only). estimate: both are charged what is estimated",
    )
    alerts: list[int] = Field(
        default_factory=list,
        max_length=10,
        description="Shares in percent",
        examples=[[50, 80, 100]],
    )


class BookView(BaseModel):
    """Spend of a budget in its current period. Amounts are micro-dollars or tokens."""

    budget: str
    scope: list[str | None] = Field(description="The values of `each`")
    unit: Literal["usd", "tokens"]
    amount: int
    spent: int
    estimated: int = Field(
        description="The part of `spent` that is an estimate, until it is reconciled (OpenAI and "
        "Anthropic only)"
    )
    held: int = Field(description="Reserved for running calls")
    reset_at: datetime | None = Field(description="Null for a rolling period")
    paused_since: datetime | None


class BudgetView(BaseModel):
    """A budget with its most used amount."""

    name: str
    unit: Literal["usd", "tokens"]
    amount: int
    period: str
    zone: str
    window_s: int | None
    tenant: str | None
    key: str | None
    model: str | None
    subject: str | None
    conversation: str | None
    each: list[str]
    at_end: str
    fallback: str | None
    doubt: str
    alerts: list[int]
    created_at: datetime
    most_used: BookView | None


class ResumeBudget(BaseModel):
    """Values whose spend may continue, and the extra amount in the current period."""

    model_config = ConfigDict(extra="forbid")

    by: str = Field(default="admin", min_length=1, max_length=100)

    scope: list[str | None] | None = Field(
        default=None, description="The values of `each`; null: all"
    )
    extra_usd: Decimal = Field(default=Decimal(0), ge=0, le=MOST_AMOUNT // 10**6)
    extra_tokens: int = Field(default=0, ge=0, le=MOST_AMOUNT)


class Resumed(BaseModel):
    scopes: list[list[str | None]] = Field(
        description="Values of `each` that were resumed or may spend more"
    )


class BudgetRemoved(BaseModel):
    removed: bool = True


@router.get("/budgets", summary="All budgets, each with its most used amount")
async def list_budgets(request: Request) -> list[BudgetView]:
    return await _views(request)


@router.get("/budgets/books", summary="Spend of budgets in their current periods, most used first")
async def list_books(
    request: Request, budget: Annotated[str | None, Query(max_length=200)] = None
) -> list[BookView]:
    """Up to 1,000 rows; with `each` a budget has one row per value."""
    books = await services_of(request).budgets.records.books(budget)
    return [_book(one) for one in books]


@router.put(
    "/budgets/{name:text}",
    responses=problem_responses(409),
    openapi_extra=described(NewBudget),
    summary="Create a budget, or change its amount, end, doubt and alerts",
)
async def set_budget(request: Request, name: BudgetName) -> BudgetView:
    """A new budget starts with the recorded spend of its period. Takes effect everywhere within a
    second."""
    new, budgets = await read_json(request, NewBudget), services_of(request).budgets
    with config_errors_refused():
        budget, _ = await budgets.records.change(name, partial(_stated, name, new), by=new.by)
    await budgets.refresh()
    # The answer shows the budget as set, even if it was removed meanwhile.
    views = await _views(request, name)
    return views[0] if views else _view(replace(budget, created_at=datetime.now(UTC)), None)


@router.post(
    "/budgets/{name:text}/resume",
    responses=problem_responses(404),
    openapi_extra=described(ResumeBudget),
    summary="Resume a paused budget, or allow more spend in its current period",
)
async def resume_budget(request: Request, name: BudgetName) -> Resumed:
    """Without `scope`, for all values of `each`."""
    new, budgets = await read_json(request, ResumeBudget), services_of(request).budgets
    scope = None if new.scope is None else scope_text(new.scope)
    with config_errors_refused():
        extra, unit = extra_of(new.extra_usd, new.extra_tokens)
        scopes = await budgets.records.resume(name, scope=scope, extra=extra, unit=unit, by=new.by)
    await budgets.refresh()
    return Resumed(scopes=[scope_values(one) for one in scopes])


@router.delete(
    "/budgets/{name:text}",
    responses=problem_responses(404),
    summary="Remove a budget with its recorded spend",
)
async def remove_budget(request: Request, name: BudgetName, by: By = "admin") -> BudgetRemoved:
    budgets = services_of(request).budgets
    await budgets.records.remove(name, by=by)
    await budgets.refresh()
    return BudgetRemoved()


def _stated(name: str, new: NewBudget, before: Budget | None) -> Budget:
    """Return the budget of a request. Raises ConfigError and PolicyChanged."""
    nothing = dict.fromkeys(one.name for one in fields(Budget))
    PolicyChanged.check(nothing if before is None else plain_budget(before), new.expected)
    return budget_of(name, new.model_dump(exclude={"by", "expected"}), before)


async def _views(request: Request, name: str | None = None) -> list[BudgetView]:
    records = services_of(request).budgets.records
    _, found = await records.all()
    most_used: dict[str, BudgetBook] = {}
    for book in await records.books(name):
        most_used.setdefault(book.budget, book)
    return [_view(one, most_used.get(one.name)) for one in found if name in (None, one.name)]


def _view(budget: Budget, most_used: BudgetBook | None) -> BudgetView:
    book = None if most_used is None else _book(most_used)
    return BudgetView.model_validate(plain_budget(budget) | {"most_used": book})


def _book(book: BudgetBook) -> BookView:
    return BookView.model_validate(plain_book(book))


_MOST_ALERTS = 100


class AlertChannel(BaseModel):
    """The destination of alerts."""

    place: str | None = Field(
        description="Scheme and host of ALERT_WEBHOOK_URL; null if it is not set"
    )
    format: Literal["standard", "slack"]
    is_signed: bool


class AlertCause(BaseModel):
    """A current problem, as in `tidegate status`."""

    kind: str
    level: Literal["healthy", "degraded", "down"]
    words: str
    detail: str
    command: str


class AlertView(BaseModel):
    """An alert that was raised, and the state of its delivery."""

    id: UUID
    kind: str
    text: str
    created_at: datetime
    state: Literal["pending", "delivered", "given_up"]
    tries: int
    due_at: datetime | None = Field(description="Time of the next attempt; null if there is none")
    problem: str | None = Field(description="The error of the last attempt")


class AlertsView(BaseModel):
    channel: AlertChannel
    health: Literal["healthy", "degraded", "down"]
    causes: list[AlertCause] = Field(description="Current problems, the worst first")
    items: list[AlertView] = Field(description="The last 100 alerts, of at most 30 days")


@router.get("/alerts", summary="Current problems, and the alerts that were raised")
async def alerts(request: Request) -> AlertsView:
    services = services_of(request)
    verdict = await services.standing.verdict()
    found = await services.store.alerts.newest(_MOST_ALERTS)
    return AlertsView(
        channel=_channel(services.config),
        health=verdict.health,
        causes=[AlertCause.model_validate(one, from_attributes=True) for one in verdict.causes],
        items=[_alert_view(one) for one in found],
    )


@router.post(
    "/alerts/test",
    status_code=202,
    openapi_extra=described(Signed),
    summary="Post a test alert",
)
async def test_alert(request: Request) -> AlertChannel:
    """A worker posts it, like every alert."""
    signed, services = await read_json(request, Signed), services_of(request)
    channel = _channel(services.config)
    if channel.place is None:
        message = "no alert can be posted: ALERT_WEBHOOK_URL is not set"
        raise InvalidRequest("alert_webhook_url", message, allowed="a URL in ALERT_WEBHOOK_URL")
    await services.store.tenants.actions.write("alert.test", channel.place)
    await services.store.alerts.add("test", {"text": f"A test alert, requested by {signed.by}."})
    return channel


@router.post(
    "/alerts/{alert_id}/redeliver",
    status_code=202,
    responses=problem_responses(404),
    openapi_extra=described(Signed),
    summary="Post an alert again",
)
async def redeliver_alert(request: Request, alert_id: UUID) -> AlertChannel:
    await read_json(request, Signed)
    services = services_of(request)
    if not await services.store.alerts.redeliver(alert_id):
        raise NotFound(f"there is no alert {alert_id} that was posted or given up")
    return _channel(services.config)


def _channel(config: Config) -> AlertChannel:
    url = config.alert_webhook_url
    place = None if url is None else urlsplit(url.get_secret_value())
    return AlertChannel(
        place=None if place is None else f"{place.scheme}://{place.hostname}",
        format=config.alert_format,
        is_signed=config.webhook_secret is not None,
    )


def _alert_view(one: AlertRecord) -> AlertView:
    data = orjson.loads(one.data)
    if "budget" in data:
        data = budget_alert(one.kind, data, one.unit or "usd", one.fallback)
    return AlertView(
        id=one.alert_id,
        kind=one.kind,
        text=str(data.get("text", "")),
        created_at=one.created_at,
        state=one.state,
        tries=one.tries,
        due_at=one.due_at if one.state == "pending" else None,
        problem=one.problem,
    )
