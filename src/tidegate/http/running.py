"""`GET /requests/running` and `GET /admin/requests/running`: streams and native calls under way.

Invariant: a tenant is told of its own calls alone, and not by which process they are made.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from tidegate.call import Kind
from tidegate.http.admin_gate import RecordReader, admit_admin
from tidegate.http.jobs import problem_responses
from tidegate.http.services import Services, services_of
from tidegate.limiter import Snapshot
from tidegate.metrics.board import Notes
from tidegate.relay.under_way import CallUnderWay

MOST_SHOWN = 500

router = APIRouter(tags=["jobs"])
admin = APIRouter(
    prefix="/admin/requests",
    tags=["admin"],
    dependencies=[Depends(admit_admin)],
    responses=problem_responses(401, 403),
)


class RunningItem(BaseModel):
    """A stream or a native call that has not ended."""

    request_id: str
    source: Literal["stream", "relay"]
    status: Literal["queued", "running"] = Field(
        description="queued: it waits, for its first try or for another one"
    )
    type: Kind | None = None
    model: str | None = None
    endpoint: str | None = Field(default=None, description="The native path that was called")
    submitted_at: datetime
    admitted_at: datetime | None = None
    waits_for: str | None = Field(
        default=None, description="The limit that holds its queue up, where one does"
    )


class AdminRunningItem(RunningItem):
    """One of any tenant, and where it is."""

    tenant: str
    process: str = Field(description="Which process has it open")
    pool: str = Field(description="Empty while no upstream was chosen for it")
    upstream: str | None = None


class RunningPage(BaseModel):
    """Those of yours, the oldest first."""

    items: list[RunningItem]
    complete: bool = Field(
        description="Whether these are all. The 500 oldest are told, and of each process its 200 "
        "oldest; while Valkey is away, only the one that answers tells of its own"
    )


class AdminRunningPage(BaseModel):
    """Those of all tenants, the oldest first."""

    items: list[AdminRunningItem]
    complete: bool = Field(description="As for /requests/running")
    under_way: int = Field(description="How many there are, told or not")


@router.get(
    "/requests/running",
    response_model_exclude_none=True,
    responses=problem_responses(401, 403, 503),
    summary="Your streams and native calls that are under way",
)
async def running(request: Request, caller: RecordReader) -> RunningPage:
    """They come into `/requests` once they have ended. As of a second or two ago; jobs are in
    `/requests` from the beginning."""
    services = services_of(request)
    notes = await services.board.notes()
    items = await _items(services, notes, caller.tenant_id)
    return RunningPage(
        items=[RunningItem(**one.model_dump(include=_OWN)) for one in items[:MOST_SHOWN]],
        complete=notes.whole and len(items) <= MOST_SHOWN,
    )


@admin.get(
    "/running",
    response_model_exclude_none=True,
    summary="Streams and native calls of all tenants that are under way",
)
async def all_running(request: Request) -> AdminRunningPage:
    """They come into `/admin/requests` once they have ended. As of a second or two ago; jobs are
    there from the beginning."""
    services = services_of(request)
    notes = await services.board.notes()
    items = await _items(services, notes, None)
    return AdminRunningPage(
        items=items[:MOST_SHOWN],
        complete=notes.whole and len(items) <= MOST_SHOWN,
        under_way=sum(one.under_way for one in notes.notes),
    )


_OWN = set(RunningItem.model_fields)


async def _items(services: Services, notes: Notes, tenant_id: str | None) -> list[AdminRunningItem]:
    """The oldest calls of a tenant, or of all, with what each waits for; one more than is shown,
    where there is one."""
    found = [
        (note.process, call)
        for note in notes.notes
        for call in note.calls
        if tenant_id is None or call.tenant == tenant_id
    ]
    found.sort(key=lambda each: (each[1].received_at, each[1].request_id))
    del found[MOST_SHOWN + 1 :]
    waiting = {call.pool for _, call in found if call.admitted_at is None}
    looks = {
        pool: await services.looks.of(services.limiters[pool])
        for pool in waiting & services.limiters.keys()
    }
    return [_item(process, call, looks.get(call.pool)) for process, call in found]


def _item(process: str, call: CallUnderWay, look: Snapshot | None) -> AdminRunningItem:
    waits = call.admitted_at is None
    return AdminRunningItem(
        request_id=call.request_id,
        source=call.source,
        status="queued" if waits else "running",
        type=Kind(call.kind) if call.kind in _KINDS else None,
        model=call.model,
        endpoint=call.endpoint,
        submitted_at=call.received_at,
        admitted_at=call.admitted_at,
        waits_for=_held_up_by(process, call, look) if waits and look is not None else None,
        tenant=call.tenant,
        process=process,
        pool=call.pool,
        upstream=call.upstream,
    )


_KINDS = {kind.value for kind in Kind}


def _held_up_by(process: str, call: CallUnderWay, look: Snapshot) -> str | None:
    """The limit that holds up the queue in which the call stands."""
    if not call.limits:
        return None
    for queue in look.queues:
        mine = queue.process == process and queue.tenant == call.tenant
        if mine and set(call.limits) <= set(queue.limits):
            return queue.held_up_by
    return None
