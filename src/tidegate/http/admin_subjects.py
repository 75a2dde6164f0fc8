"""`/admin/subjects`: erasing all that is on record about somebody."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request

from tidegate.errors import InvalidRequest
from tidegate.http.admin_gate import admit_admin
from tidegate.http.fields import MAX_SUBJECT_CHARS
from tidegate.http.jobs import problem_responses
from tidegate.http.services import services_of
from tidegate.store.erase import EraseReport, Whose

_WITHIN_S = 20.0

router = APIRouter(
    prefix="/admin/subjects",
    tags=["admin"],
    dependencies=[Depends(admit_admin)],
    responses=problem_responses(400, 401, 403, 404, 503),
)


@router.delete("/{subject:path}", summary="Erase all that is on record about a subject")
async def erase_subject(
    request: Request,
    subject: Annotated[str, Path(description="As requests named it")],
    tenant: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
    dry_run: Annotated[bool, Query(description="Only count")] = False,
) -> EraseReport:
    """Rows, bodies, files and answers, also those that wait on this host's disk; totals stay.
    Takes up to 20 s: while `done` is false, ask again. It can't be undone."""
    for field, text in (("subject", subject), ("tenant", tenant or "-")):
        if not 1 <= len(text) <= MAX_SUBJECT_CHARS or not text.isprintable():
            allowed = f"1 to {MAX_SUBJECT_CHARS} printable characters"
            raise InvalidRequest(field, f"{field} must be {allowed}", allowed=allowed)
    store = services_of(request).store
    return await store.erase(Whose(tenant, subject), dry_run=dry_run, within_s=_WITHIN_S)
