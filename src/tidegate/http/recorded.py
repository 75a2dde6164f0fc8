"""`GET /requests/{request_id}/request` and `/response`: the bodies in the record.

Invariant: they are sent as data, whatever they say they are: no browser shows one as a page.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from tidegate.errors import NotFound
from tidegate.http.admin_gate import RecordReader
from tidegate.http.jobs import problem_responses
from tidegate.http.services import services_of
from tidegate.store.recorded import Body, Role

OMITTED_HEADER = "X-Tidegate-Omitted-Bytes"
BODY_RESPONSES: dict[int | str, dict[str, Any]] = {
    **problem_responses(400, 401, 403, 404, 503),
    200: {
        "content": {"*/*": {}},  # whatever travelled
        "description": "The body, with the content type that it came with",
        "headers": {
            OMITTED_HEADER: {
                "description": "How much of the middle of a long answer is not in the record",
                "schema": {"type": "integer"},
            }
        },
    },
}

router = APIRouter(tags=["jobs"])


@router.get(
    "/requests/{request_id}/request",
    response_class=StreamingResponse,
    responses=BODY_RESPONSES,
    summary="What was asked, as it is in the record",
)
async def asked(request: Request, request_id: UUID, caller: RecordReader) -> Response:
    """Of a native call, the body as it travelled; of a job or a stream, what the record has of it,
    as JSON. 404 where it is not (yet) kept, or was erased."""
    return await _body(request, request_id, caller.tenant_id, "request")


@router.get(
    "/requests/{request_id}/response",
    response_class=StreamingResponse,
    responses=BODY_RESPONSES,
    summary="What was answered, as it is in the record",
)
async def answered(request: Request, request_id: UUID, caller: RecordReader) -> Response:
    """As for `/request`. Of a stream that was cut, what had come."""
    return await _body(request, request_id, caller.tenant_id, "response")


async def _body(request: Request, request_id: UUID, tenant_id: str, role: Role) -> Response:
    body = await services_of(request).store.recorded.body(request_id, tenant_id, role)
    return await body_response(body, request_id, role)


async def body_response(body: Body, request_id: UUID, role: Role) -> Response:
    """A body as data to be kept, whatever it says it is. Raises NotFound, StoreUnavailable."""
    try:
        # Before the head goes out: a blob that is gone must not become a broken 200.
        first = await anext(body.pieces, b"")
    except NotFound:
        raise NotFound(f"no {role} body of request {request_id} is kept") from None
    headers = {
        "Content-Type": body.content_type,
        "Content-Length": str(body.size_bytes),
        "Content-Disposition": f'attachment; filename="{request_id}-{role}"',
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "private, no-store",
    }
    if body.omitted_bytes:
        headers[OMITTED_HEADER] = str(body.omitted_bytes)
    return StreamingResponse(_after(first, body.pieces), headers=headers)


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece
