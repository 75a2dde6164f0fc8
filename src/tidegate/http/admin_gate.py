"""Who may operate a running deployment: its limits, tenants, keys, metrics and whole record.

The operator's key (`config.operator_key`), an API key of the scope `admin`, or the cookie of a
browser that signed in with a one-time code. One of them is asked for on a loopback address too: no
header tells whether there is a proxy. Where callers show no API key, the record of their requests
(`/requests`, its bodies, `/usage`) is behind this gate as well.

Invariant: the cookie counts only for requests that no other site's page sent.
"""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from tidegate.call import Caller, Scope
from tidegate.errors import TidegateError, Unauthenticated
from tidegate.http.access import CALLER_IN_SCOPE
from tidegate.http.caller import caller_of
from tidegate.http.credentials import in_headers
from tidegate.http.services import Services, services_of
from tidegate.http.signin import checked, cookie_name

OPERATOR, SIGNED_IN = "the operator's key", "the dashboard"
_HOW = (
    "show the operator's key (ADMIN_TOKEN, else the file operator.key in DATA_DIR) or an API key "
    "of the scope admin as Authorization: Bearer"
)


async def admit_admin(request: Request) -> None:
    """A dependency of all admin routes. Raises Unauthenticated, Forbidden, StoreUnavailable."""
    await admitted_as(request)


async def admitted_as(request: Request) -> str:
    """By what a request is admitted, in words. Raises as `admit_admin`."""
    services = services_of(request)
    shown = in_headers(request.scope["headers"])
    if _shows_operator_key(services, shown):
        return OPERATOR
    if not shown and _is_signed_in(request, services):
        return SIGNED_IN
    if not shown and not services.gate.on:
        raise Unauthenticated(_HOW)
    try:
        caller = await caller_of(request, Scope.ADMIN)
    except Unauthenticated as refused:
        raise Unauthenticated(f"{refused.message}; or {_HOW}") from None
    return f"the key tg_{caller.key_id}"


async def is_admitted(request: Request) -> bool:
    """Whether a request may see what only operators see; never raises."""
    try:
        await admitted_as(request)
    except TidegateError:
        return False
    return True


async def _reader_of_record(request: Request) -> Caller:
    services = services_of(request)
    if services.gate.on:
        return await caller_of(request, Scope.READ)
    await admit_admin(request)
    caller = services.gate.unasked(request.scope["headers"])
    request.scope[CALLER_IN_SCOPE] = caller
    return caller


# Of what lists requests, or tells more of them than their status.
RecordReader = Annotated[Caller, Depends(_reader_of_record)]


def _shows_operator_key(services: Services, shown: list[bytes]) -> bool:
    # In time that says nothing of how much of it was right.
    key = services.operator_key.get_secret_value().encode()
    return any(hmac.compare_digest(one, key) for one in shown)


def _is_signed_in(request: Request, services: Services) -> bool:
    key = services.operator_key.get_secret_value()
    value = request.cookies.get(cookie_name(key), "")
    if not value or checked("session", key, value) is None:
        return False
    refused = services.origins.page_refusal(request.scope["headers"], request.method)
    if refused is not None:
        raise refused
    return True
