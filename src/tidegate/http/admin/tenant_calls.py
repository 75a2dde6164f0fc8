"""Route `/admin/calls`: calls of models that an operator makes as a tenant, as the playground does.

The path of a call follows: `/admin/calls/v1/chat/completions`. The call is answered by the handlers
of that path, with the tenant as its caller: its limits, budgets, allowed models and caps apply.
Only calls that run a model now are possible: neither files, caches, videos and batches, nor paths
without a meaning here.

Invariants: an operator with the role is authenticated before anything of the body is read; each
call is an action on record before it begins; its record names the tenant, and the operator in place
of an API key; what a client sends cannot set the caller.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidegate.call import Caller
from tidegate.dialects import endpoint_in, native_path
from tidegate.dialects.spec import Operation
from tidegate.errors import InvalidRequest, NotFound, TidegateError
from tidegate.http.auth import tenant_named
from tidegate.http.guards import CALLER_BY_OPERATOR, Operator, address_of, checked_operator
from tidegate.http.jobs import submit
from tidegate.http.native import native
from tidegate.http.problems import Handler, problem_responses
from tidegate.http.services import (
    CALLER_IN_SCOPE,
    LOGS_ITSELF,
    Services,
    note_refused,
    services_of,
)
from tidegate.http.stream import stream
from tidegate.record import Source
from tidegate.store.records import acting

AS_TENANT_HEADER = "x-tidegate-as-tenant"
# Without those that make something that stays: caches, videos and batches.
_POSSIBLE = frozenset(
    {
        *(Operation.INFER, Operation.EMBED, Operation.IMAGES, Operation.TRANSCRIBE),
        *(Operation.SPEAK, Operation.MODERATE, Operation.RERANK),
    }
)
_OWN: dict[str, tuple[Handler, Source]] = {
    "/submit": (submit, "job"),
    "/stream": (stream, "stream"),
}

# Not `admin_router`: an action of the call itself, such as a learned limit, is not the operator's.
router = APIRouter(prefix="/admin", tags=["admin"])


class _NativeCall(Response):
    """A native call below the route's path, with its caller in the scope."""

    def __init__(self, services: Services, scope: Scope) -> None:
        super().__init__()
        self._services = services
        self._scope = scope

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[LOGS_ITSELF] = True
        await native(self._services, self._scope, receive, send)


@router.post(
    "/calls/{path:path}",
    responses=problem_responses(400, 401, 403, 404, 503)
    | {200: {"description": "The answer of the path that follows, as a tenant gets it"}},
    openapi_extra={
        "parameters": [
            {
                "name": AS_TENANT_HEADER,
                "in": "header",
                "required": True,
                "description": "The tenant's name",
                "schema": {"type": "string", "maxLength": 200},
            }
        ]
    },
    summary="Call a model as a tenant",
)
async def call_as_tenant(
    request: Request, path: str, operator: Annotated[Operator, Depends(checked_operator)]
) -> Response:
    """Calls `/submit`, `/stream` or a path of a provider's SDK that runs a model, with the tenant's
    limits, budgets and models. The request log shows the operator in place of an API key."""
    services = services_of(request)
    meant = _path_of(request, path)
    named = request.headers.get(AS_TENANT_HEADER)
    if named is None:
        raise InvalidRequest(AS_TENANT_HEADER, f"{AS_TENANT_HEADER} is missing", allowed="a tenant")
    tenant = tenant_named(named.encode("latin-1"), AS_TENANT_HEADER)
    caller = await services.gate.for_operator(tenant, operator.name)
    await _record(request, operator, caller, meant)
    request.scope[CALLER_IN_SCOPE] = request.scope[CALLER_BY_OPERATOR] = caller
    if meant in _OWN:
        handler, source = _OWN[meant]
        try:
            return await handler(request)
        except TidegateError as error:
            note_refused(request.scope, source, error)
            raise
    inner: dict[str, Any] = {**request.scope, "path": meant, "root_path": ""}
    inner["raw_path"] = meant.encode()
    return _NativeCall(services, inner)


def _path_of(request: Request, path: str) -> str:
    """Return the path of a call that runs a model. Raises NotFound."""
    meant = f"/{path}"
    if meant in _OWN:
        return meant
    headers, query = request.scope["headers"], request.scope["query_string"]
    if (native_at := native_path(meant)) is not None:
        endpoint, _ = endpoint_in("POST", native_at, headers, query)
        if endpoint is not None and endpoint.operation in _POSSIBLE:
            return native_at
    raise NotFound("no call of a model has this path; a call as a tenant is one of a model")


async def _record(request: Request, operator: Operator, caller: Caller, path: str) -> None:
    """Record a call as the operator's action. Raises StoreUnavailable."""
    with acting(operator.name, operator.role, address_of(request)):
        actions = services_of(request).store.tenants.actions
        await actions.write("tenant.call", caller.tenant_id, after={"path": path})
