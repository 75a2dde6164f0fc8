"""Routes `/admin/tenants`, `/admin/keys` and `/admin/subjects`.

Invariants: every change requires the role admin; an answer contains a key once, when the key is
created; a change is in force in this process when it is answered, in all others within a second.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import Depends, Path, Query, Request, Response
from fastapi import Query as FromQuery
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from tidegate.call import DEFAULT_TENANT, OperatorRole, Scope, Tier
from tidegate.errors import InvalidRequest
from tidegate.http.admin.limits import (
    EXPECTED,
    By,
    Signed,
    config_errors_refused,
    control_of,
    described,
    in_pool,
    read_json,
)
from tidegate.http.guards import admin_router, operator_of
from tidegate.http.own_requests import in_utc
from tidegate.http.problems import problem_responses
from tidegate.http.services import services_of
from tidegate.http.submission import MAX_TAG_CHARS
from tidegate.http.views import view_of
from tidegate.policy import tenants
from tidegate.policy.tenants import ShownTenant, TenantChange
from tidegate.store.retention import EraseReport, Whose
from tidegate.store.tenants import MOST_KEYS, SETTABLE, prefix_in, scopes_of

router = admin_router(400, 408, 413, 415, 503, tag="tenants", depends=[Depends(in_pool)])
subjects_router = admin_router(400, 404, 503)
actions_router = admin_router(400, 503)
TenantId = Annotated[str, Path(description="A tenant's name", min_length=1, max_length=200)]
_LAST = datetime(9999, 1, 1, tzinfo=UTC)  # in year 9999 in any zone
_COUNT: Any = Field(default=None, ge=0, description="null: without a bound")
_BUDGET: Any = Field(
    default=None,
    ge=0,
    description="In USD or tokens; sets the budget TENANT/FIELD of /admin/budgets, null removes it",
)


class ActionQuery(BaseModel):
    """Filters of a list of actions; without a filter all are listed."""

    model_config = ConfigDict(extra="forbid")

    operator: str | None = Field(default=None, min_length=1, max_length=300)
    what: str | None = Field(default=None, min_length=1, max_length=100, examples=["key.create"])
    target: str | None = Field(default=None, min_length=1, max_length=500)
    since: datetime | None = Field(
        default=None, description="At or after this time; UTC without a time zone"
    )
    until: datetime | None = None
    limit: int = Field(default=100, ge=1, le=500)
    cursor: int | None = Field(default=None, ge=0, le=2**62)


class NewTenant(Signed):
    """Fields of a tenant. Absent fields keep their values; those of a new tenant get the
    defaults."""

    weight: int = Field(default=1, ge=1, le=1_000, description="Its share against other tenants")
    limits: dict[str, Any] = Field(
        default_factory=dict,
        description="Its own limits, as in tidegate.toml; null removes one",
        examples=[{"tenant:acme": 5, "rpm:tenant/acme": 60}],
    )
    most_priority: int = Field(
        default=100, ge=-100, le=100, description="A higher priority is lowered to it"
    )
    models: list[str] | None = Field(
        default=None,
        max_length=200,
        description="Models that it may call, or patterns; null: all",
        examples=[["gemini-2.5-*"]],
    )
    most_queued_jobs: int | None = _COUNT
    most_queued_bytes: int | None = _COUNT
    most_streams: int | None = Field(
        default=None, ge=0, le=1_000_000, description="Concurrently open in each process; null: any"
    )
    most_long_polls: int | None = Field(
        default=None, ge=0, le=1_000_000, description="Concurrently open in each process; null: any"
    )
    budget_day_money: float | None = _BUDGET
    budget_month_money: float | None = _BUDGET
    budget_day_tokens: int | None = _BUDGET
    budget_month_tokens: int | None = _BUDGET
    retention_days: int | None = Field(
        default=None, ge=1, le=100_000, description="null: RETENTION_DAYS"
    )
    tiers: list[Literal["live", "flex", "batch"]] | None = Field(
        default=None,
        min_length=1,
        max_length=10,
        description="Processing tiers of its jobs that name none, and of its batch lines, "
        "which use live and flex; null: only live",
        examples=[["live", "flex", "batch"]],
    )
    disabled: bool = Field(default=False, description="All of its keys are then rejected")
    expected: dict[str, Any] = Field(
        default_factory=dict, description=EXPECTED, examples=[{"weight": 1}]
    )


class AdminTenant(BaseModel):
    """A tenant with its current fields."""

    tenant: str
    weight: int
    limits: dict[str, Any]
    most_priority: int
    models: list[str] | None
    most_queued_jobs: int | None
    most_queued_bytes: int | None
    most_streams: int | None
    most_long_polls: int | None
    budget_day_money: float | None
    budget_month_money: float | None
    budget_day_tokens: int | None
    budget_month_tokens: int | None
    retention_days: int | None
    tiers: list[Tier] | None
    disabled: bool
    created_at: datetime
    disabled_at: datetime | None = None
    keys: int = Field(description="Number of valid keys")
    webhook_secret: str | None = Field(
        default=None,
        description="Signs this tenant's webhooks. Only for a single tenant and the role admin; "
        "null if WEBHOOK_SECRET is not set",
    )


class NewKey(Signed):
    """A key to create."""

    tenant: str = Field(default=DEFAULT_TENANT, min_length=1, max_length=200)
    name: str = Field(default="", max_length=200, description="Description of the setting")
    scopes: list[Literal["infer", "read", "viewer", "operator", "admin"]] | None = Field(
        default=None,
        min_length=1,
        max_length=10,
        description="What it opens: calls of models, its tenant's own requests, or /admin and the "
        "dashboard as a role. null: infer and read, or with `role` nothing else",
    )
    role: OperatorRole | None = Field(default=None, description="The same as the scope of its name")
    expires_at: AwareDatetime | None = Field(default=None, description="null: it never expires")


class KeyView(BaseModel):
    """An API key as lists show it, without the key itself."""

    prefix: str
    tenant: str
    name: str
    scopes: list[Scope]
    role: OperatorRole | None = Field(description="The highest operator role among its scopes")
    state: str = Field(description="works, revoked or expired")
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = Field(default=None, description="To within about a minute")
    made_by: str | None = Field(
        description="Credential of its creator; null if none was required, or if the key was "
        "created before this was recorded"
    )


class MadeKey(KeyView):
    key: str = Field(
        description="The key itself, shown only this once: Tidegate stores only its digest."
    )


class Removed(BaseModel):
    removed: bool = True


@router.get("/tenants", summary="All tenants with their limits and caps")
async def list_tenants(request: Request) -> list[AdminTenant]:
    return [_view(one) for one in await tenants.list_tenants(control_of(request))]


@router.get("/tenants/{tenant_id:path}", responses=problem_responses(404), summary="One tenant")
async def show_tenant(request: Request, response: Response, tenant_id: TenantId) -> AdminTenant:
    with config_errors_refused():
        view = _view(await tenants.show_tenant(control_of(request), tenant_id))
    is_admin = (await operator_of(request)).role is OperatorRole.ADMIN
    if is_admin and (secret := services_of(request).config.webhook_secret) is not None:
        view.webhook_secret = tenants.webhook_secret_of(secret.get_secret_value(), tenant_id)
        response.headers["Cache-Control"] = "no-store"
    return view


@router.put(
    "/tenants/{tenant_id:path}",
    responses=problem_responses(404, 409),
    openapi_extra=described(NewTenant),
    summary="Create a tenant, or change the named fields",
)
async def set_tenant(request: Request, tenant_id: TenantId) -> AdminTenant:
    new = await read_json(request, NewTenant)
    given = new.model_fields_set
    change = TenantChange(
        changes={name: getattr(new, name) for name in SETTABLE if name in given},
        weight=new.weight if "weight" in given else None,
        limits=new.limits if "limits" in given else None,
        disabled=new.disabled if "disabled" in given else None,
        expected=new.expected,
    )
    control = control_of(request)
    with config_errors_refused():
        entry = await tenants.set_tenant(control, tenant_id, change, by=new.by, reason=new.reason)
    await services_of(request).gate.refresh()
    await services_of(request).budgets.refresh()
    return _view(entry)


@router.delete(
    "/tenants/{tenant_id:path}",
    responses=problem_responses(404),
    summary="Remove a tenant, its keys and its limits in all pools; its requests stay on record",
)
async def remove_tenant(request: Request, tenant_id: TenantId, by: By = "admin") -> Removed:
    services = services_of(request)
    with config_errors_refused():
        keepers = services.keepers.values()
        await tenants.remove_tenant(services.store.tenants, keepers, tenant_id, by=by)
    await services.gate.refresh()
    await services.budgets.refresh()
    return Removed()


@router.get(
    "/keys",
    responses=problem_responses(404),
    summary="API keys, oldest first; for the next page pass the last key's prefix as `after`",
)
async def list_keys(
    request: Request,
    tenant: Annotated[str | None, Query(max_length=200)] = None,
    prefix: Annotated[str, Query(max_length=100, description="The beginning of the prefix")] = "",
    after: Annotated[
        str | None,
        Query(max_length=100, description="Only keys created after the one with this prefix"),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_KEYS)] = MOST_KEYS,
) -> list[KeyView]:
    behind = None if after is None else prefix_in(after)
    if after is not None and behind is None:
        raise InvalidRequest("after", "not a key's prefix", allowed="10 letters and digits")
    found = await services_of(request).store.tenants.list_keys(
        tenant, prefix.removeprefix("tg_").partition("_")[0], after=behind, limit=limit
    )
    return [KeyView(**tenants.plain_key(key)) for key in found]


@router.post(
    "/keys",
    status_code=201,
    responses=problem_responses(404),
    openapi_extra=described(NewKey),
    summary="Create an API key; it is shown only this once",
)
async def make_key(request: Request, response: Response) -> MadeKey:
    new = await read_json(request, NewKey)
    if new.expires_at is not None and new.expires_at <= datetime.now(UTC):
        raise InvalidRequest("expires_at", "expires_at is in the past", allowed="a future time")
    if new.expires_at is not None and new.expires_at.replace(tzinfo=UTC) > _LAST:
        raise InvalidRequest("expires_at", "expires_at is out of range", allowed=f"up to {_LAST}")
    with config_errors_refused():
        tenants.check_new_name(new.tenant)
    services = services_of(request)
    key, made = await services.store.tenants.create_key(
        new.tenant,
        name=new.name,
        scopes=scopes_of(map(Scope, new.scopes or ()), new.role),
        expires_at=new.expires_at,
        made_by=(await operator_of(request)).name,
    )
    await services.gate.refresh()
    response.headers["Cache-Control"] = "no-store"
    return MadeKey(**tenants.plain_key(key), key=made.text)


@router.delete(
    "/keys/{prefix}",
    responses=problem_responses(404),
    summary="Revoke an API key permanently",
)
async def revoke_key(
    request: Request,
    prefix: Annotated[str, Path(description="The key's prefix", max_length=100)],
    by: By = "admin",
) -> KeyView:
    meant = prefix_in(prefix)
    if meant is None:
        raise InvalidRequest("prefix", "not a key's prefix", allowed="10 letters and digits")
    services = services_of(request)
    key = await services.store.tenants.revoke_key(meant, by=by)
    await services.gate.refresh()
    return KeyView(**tenants.plain_key(key))


def _view(entry: ShownTenant) -> AdminTenant:
    disabled = entry.tenant.disabled_at is not None
    return AdminTenant(**tenants.plain_tenant(entry), disabled=disabled)


class ActionView(BaseModel):
    """An action of an operator."""

    number: int = Field(description="Increases with each action")
    at: datetime
    operator: str = Field(description="The key, the person or the command that acted")
    role: str
    address: str = Field(
        description="Address of the client; a proxy's statement of it is not verified"
    )
    what: str
    target: str = Field(description="The object of the action; for an erased person a digest")
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    revision: int | None = Field(
        default=None, description="The revision of the limits or upstreams that has the change"
    )


class ActionPage(BaseModel):
    """One page of actions. `next_cursor` is absent on the last page."""

    items: list[ActionView]
    next_cursor: int | None = None


@actions_router.get("/actions", response_model_exclude_none=True, summary="Actions of operators")
async def list_actions(request: Request, query: Annotated[ActionQuery, FromQuery()]) -> ActionPage:
    """Newest first. Kept for `OPERATOR_LOG_DAYS`."""
    found = await services_of(request).store.tenants.actions.page(
        operator=query.operator,
        what=query.what,
        target=query.target,
        since=in_utc("since", query.since),
        until=in_utc("until", query.until),
        before=query.cursor,
        limit=query.limit + 1,
    )
    items = [view_of(ActionView, one) for one in found[: query.limit]]
    more = len(found) > query.limit
    return ActionPage(items=items, next_cursor=items[-1].number if more else None)


_WITHIN_S = 20.0


@subjects_router.delete(
    "/subjects/{subject:path}", summary="Erase everything recorded about a subject"
)
async def erase_subject(
    request: Request,
    subject: Annotated[str, Path(description="The subject as requests named it")],
    tenant: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
    dry_run: Annotated[bool, Query(description="Only count, erase nothing")] = False,
) -> EraseReport:
    """Erases rows, bodies, files and answers, also those that wait on this host's disk; totals
    stay. A request takes up to 20 s: repeat it while `done` is false. It cannot be undone."""
    for field, text in (("subject", subject), ("tenant", tenant or "-")):
        if not 1 <= len(text) <= MAX_TAG_CHARS or not text.isprintable():
            allowed = f"1 to {MAX_TAG_CHARS} printable characters"
            raise InvalidRequest(field, f"{field} must be {allowed}", allowed=allowed)
    store = services_of(request).store
    return await store.retention.erase(Whose(tenant, subject), dry_run=dry_run, within_s=_WITHIN_S)
