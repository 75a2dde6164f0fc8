"""`POST /admin/requests/requeue`: failed jobs of all tenants, queued again in bulk."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from tidegate.errors import InvalidRequest
from tidegate.http.admin import Signed
from tidegate.http.admin_body import described, read_json
from tidegate.http.admin_gate import admit_admin
from tidegate.http.jobs import problem_responses
from tidegate.http.requests import in_utc
from tidegate.http.services import services_of
from tidegate.store.requeues import MOST_REQUEUED, Requeue, RequeueReport
from tidegate.store.states import Status
from tidegate.telemetry import Log, get_logger

_TEXT = Field(default=None, min_length=1, max_length=200)

log = get_logger()
router = APIRouter(
    prefix="/admin/requests",
    tags=["admin"],
    dependencies=[Depends(admit_admin)],
    responses=problem_responses(400, 401, 403, 503),
)


class NewRequeue(Signed):
    """Which jobs to queue again. Without `"dry_run": false` they are only counted."""

    since: datetime = Field(description="The earliest end; a time without a zone is in UTC")
    until: datetime | None = Field(default=None, description="The first end that is too late")
    status: list[Literal["failed", "dead"]] = Field(default=["failed"], min_length=1, max_length=2)
    error_code: str | None = Field(default=None, min_length=1, max_length=100)
    tenant: str | None = _TEXT
    limit: int = Field(default=1_000, ge=1, le=MOST_REQUEUED)
    dry_run: bool = Field(default=True, description="Only count")

    def order(self) -> Requeue:
        now = datetime.now(UTC)
        since, until = in_utc("since", self.since), in_utc("until", self.until)
        assert since is not None
        if until is not None and until <= since:
            raise InvalidRequest("until", "until is not after since", allowed="a later time")
        return Requeue(
            since=since,
            until=min(until or now, now),  # what fails again meanwhile is not meant
            statuses=tuple(Status(status) for status in self.status),
            tenant_id=self.tenant,
            error_code=self.error_code,
            limit=self.limit,
        )


@router.post(
    "/requeue",
    responses=problem_responses(408, 413, 415),
    openapi_extra=described(NewRequeue),
    summary="Queue failed jobs again, under their own ids",
)
async def requeue(request: Request) -> RequeueReport:
    """Jobs that match, those that ended first, with all their attempts and as long a deadline as
    they had. Their webhooks are sent again when they end. While `has_more` is true, repeat it; a
    repeat changes nothing for jobs that are queued already."""
    asked = await read_json(request, NewRequeue)
    requeues = services_of(request).store.stuck.requeues
    if asked.dry_run:
        return await requeues.preview(asked.order())
    report = await requeues.run(asked.order())
    log.warning(
        Log.JOBS_REQUEUED,
        jobs=report.requeued,
        by=asked.by,
        reason=asked.reason,
        filter=asked.model_dump(
            mode="json", exclude={"by", "reason", "dry_run"}, exclude_none=True
        ),
    )
    return report
