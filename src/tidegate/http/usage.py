"""`GET /usage` and `GET /admin/usage`: what was used, and what it cost.

Invariant: `/usage` shows a tenant its own totals alone; money is whole millionths, never a float.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field

from tidegate.errors import InvalidRequest
from tidegate.http.admin_gate import RecordReader, admit_admin
from tidegate.http.jobs import problem_responses
from tidegate.http.services import services_of
from tidegate.store.usage import COUNTS, MOST_ROWS, Total

_APART = ("tenant", "model", "day")

router = APIRouter(tags=["usage"])
By = Annotated[
    str,
    Query(max_length=100, description="What to tell apart, with commas: tenant, model, day"),
]
Since = Annotated[date | None, Query(description="The first day, of UTC; else the month's first")]
Until = Annotated[date | None, Query(description="The last day, of UTC; else today")]


class Amounts(BaseModel):
    """Requests that ended, with what they used. LLM tokens that nobody knows add nothing."""

    requests: int
    input_tokens: int = Field(description="The cached ones included")
    output_tokens: int = Field(description="Without the thoughts")
    cached_tokens: int
    thoughts_tokens: int
    images: int = Field(description="Pictures made, where they were counted")
    cost_micros: int = Field(description="In millionths of the currency of the prices")
    unpriced: int = Field(description="Requests without a price; they add nothing to the cost")
    partial: int = Field(description="Requests that were cut, charged as far as the provider told")
    estimated: int = Field(description="Requests that were cut, charged for what came")
    unknown: int = Field(description="Requests of which nothing is known; they add nothing")
    cache_write_tokens: int = Field(description="Of the input: written to the provider's cache")
    input_audio_tokens: int = Field(description="This and what follows: where it was reported")
    input_image_tokens: int
    input_video_tokens: int
    output_audio_tokens: int
    output_image_tokens: int
    output_video_tokens: int
    searches: int = Field(description="Of the web, by the provider")
    provider_cost_micros: int = Field(
        description="What providers themselves charged, as far as they report it, in millionths of "
        "a dollar"
    )


class UsageRow(Amounts):
    tenant: str | None = None
    model: str | None = Field(default=None, description="Empty: no upstream was chosen for it")
    day: date | None = None


class UsageView(BaseModel):
    """Totals from the day `since` to the day `until`, both included."""

    since: date
    until: date
    rows: list[UsageRow]
    total: Amounts = Field(description="Of the rows that are shown")
    cut: bool = Field(description=f"There are more than the {MOST_ROWS} rows that are shown")


@router.get(
    "/usage",
    response_model_exclude_none=True,
    responses=problem_responses(400, 401, 403, 503),
    summary="What you used, and what it cost",
)
async def own_usage(
    request: Request,
    caller: RecordReader,
    by: By = "model,day",
    since: Since = None,
    until: Until = None,
) -> UsageView:
    """Requests count on the day of UTC on which they ended, once they are on record."""
    return await _view(request, by, since, until, caller.tenant_id)


@router.get(
    "/admin/usage",
    dependencies=[Depends(admit_admin)],
    response_model_exclude_none=True,
    responses=problem_responses(400, 401, 403, 503),
    summary="What all tenants used, and what it cost",
)
async def usage(
    request: Request,
    by: By = "tenant,model,day",
    since: Since = None,
    until: Until = None,
    tenant: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
) -> UsageView:
    return await _view(request, by, since, until, tenant)


async def _view(
    request: Request, by: str, since: date | None, until: date | None, tenant: str | None
) -> UsageView:
    apart = [name.strip() for name in by.split(",") if name.strip()]
    allowed = ", ".join(_APART)
    for name in apart:
        if name not in _APART:
            raise InvalidRequest("by", f"by: {name[:50]!a} is not known", allowed=allowed)
    last = until or datetime.now(UTC).date()
    first = since or last.replace(day=1)
    if first > last:
        raise InvalidRequest("since", "since is after until", allowed=f"a day up to {last}")
    if tenant is not None and "\0" in tenant:
        raise InvalidRequest("tenant", "tenant has a NUL character in it")
    totals = await services_of(request).store.usage.totals(apart, first, last, tenant)
    rows = [UsageRow.model_validate(one, from_attributes=True) for one in totals]
    cut = len(rows) == MOST_ROWS
    return UsageView(since=first, until=last, rows=rows, total=_sum(totals), cut=cut)


def _sum(totals: Sequence[Total]) -> Amounts:
    return Amounts(**{name: sum(getattr(one, name) for one in totals) for name in COUNTS})
