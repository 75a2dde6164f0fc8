"""Access guards: the caller of a request, operators and their roles, and upload passes.

An operator sends the operator's key, an API key with a role, or the cookie of a signed-in browser.
One of them is required on loopback too, because no header proves whether there is a proxy. Google's
SDK sends the bytes of an upload without a key, so that the upload URL contains a signed pass.

Invariants: an operators' route admits only roles that `ROLES` names for it; no body is read before
its caller is known; the cookie is accepted only in requests that no page of another site sent; a
pass is valid for one upload, while its key is valid, and is never sent upstream.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Depends
from pydantic import SecretStr
from starlette.requests import Request

from tidegate.call import Caller, Classification, Kind, OperatorRole, Scope
from tidegate.dialects.prompts import Files
from tidegate.errors import (
    Forbidden,
    InvalidRequest,
    TidegateError,
    Unauthenticated,
    UpstreamMissing,
)
from tidegate.http.auth import Authenticator, credentials_in, in_headers
from tidegate.http.browsers import checked, cookie_name
from tidegate.http.problems import problem_responses
from tidegate.http.services import CALLER_IN_SCOPE, Services, services_of
from tidegate.policy.deployment import Upstream
from tidegate.settings import Config
from tidegate.spine.models import check_model
from tidegate.spine.native import AT_UPSTREAM
from tidegate.spine.routing import Targets
from tidegate.store.records import acting
from tidegate.store.tenants import digest_of, prefix_of

# The Caller of a call that an operator makes as a tenant, in the scope of a request: set only by
# `admin/tenant_calls`, after it has authenticated the operator.
CALLER_BY_OPERATOR = "tidegate.caller_by_operator"


async def caller_of(request: Request, scope: Scope = Scope.INFER) -> Caller:
    """Return the caller of a request and set it for the access log. Raises the errors of
    `Authenticator.identify`."""
    by_operator: Caller | None = request.scope.get(CALLER_BY_OPERATOR)
    if by_operator is not None and scope is Scope.INFER:
        return by_operator
    gate = services_of(request).gate
    headers, query = request.scope["headers"], request.scope["query_string"]
    caller = gate.known(headers, query) if scope is Scope.INFER else None
    if caller is None:
        caller = await gate.identify(headers, query, scope)
    request.scope[CALLER_IN_SCOPE] = caller
    return caller


async def _reader(request: Request) -> Caller:
    return await caller_of(request, Scope.READ)


Reader = Annotated[Caller, Depends(_reader)]


def check_models(
    caller: Caller, model: str | None, classification: Classification, config: Config
) -> None:
    """Check that a caller may use the named model, or else every model that the request may turn
    out to need."""
    if caller.models is None:
        return
    for one, _ in _models(model, classification, config):
        check_model(caller, one)


def check_prompt(
    targets: Targets,
    model: str | None,
    classification: Classification,
    config: Config,
    files: Files,
    *,
    is_queued: bool = False,
) -> None:
    """Raise InvalidRequest if no upstream can answer a prompt, whatever its kind turns out to be;
    UpstreamMissing if none can from this process, unless it is queued."""
    refusals: list[InvalidRequest] = []
    models = _models(model, classification, config)
    for one, kind in models:
        try:
            targets.of_prompt(one, kind, files)
        except InvalidRequest as refused:
            refusals.append(refused)
        except UpstreamMissing:
            if not is_queued:  # otherwise a worker that can reach the upstream claims it
                raise
    if len(refusals) == len(models):
        raise refusals[0]


def _models(
    model: str | None, classification: Classification, config: Config
) -> list[tuple[str, Kind]]:
    """Return each model with the kind that it would be called for."""
    kinds = (classification.kind,) if classification.kind is not None else tuple(Kind)
    return [(model or config.model_for(kind), kind) for kind in kinds]


OPERATOR, SIGNED_IN = "the operator's key", "the dashboard"
_HOW = (
    "send the operator's key (ADMIN_TOKEN, else the file operator.key in DATA_DIR) or an API key "
    "with the role viewer, operator or admin as Authorization: Bearer"
)
_V, _O, _A = OperatorRole.VIEWER, OperatorRole.OPERATOR, OperatorRole.ADMIN

# The least role for each route of operators, or that shows data of others: a test checks that the
# table is complete. A route that is missing here requires admin. The first five are restricted only
# where callers need no API key; with keys they show a tenant its own data.
ROLES: Mapping[str, Mapping[str, OperatorRole]] = {
    "/requests": {"GET": _V},
    "/requests/running": {"GET": _V},
    "/requests/{request_id}/request": {"GET": _V},
    "/requests/{request_id}/response": {"GET": _V},
    "/usage": {"GET": _V},
    "/metrics": {"GET": _V},
    "/dashboard/session": {"GET": _V},
    "/dashboard/stuck": {"GET": _V},
    "/dashboard/feed": {"GET": _V},
    "/dashboard/limits": {"GET": _V},
    "/dashboard/revisions": {"GET": _V},
    "/admin/usage": {"GET": _V},
    "/admin/latency": {"GET": _V},
    "/admin/reconciliations": {"GET": _V},
    "/admin/process": {"GET": _V},
    "/admin/settings": {"GET": _V},
    "/admin/alerts": {"GET": _V},
    "/admin/alerts/test": {"POST": _O},
    "/admin/alerts/{alert_id}/redeliver": {"POST": _O},
    "/admin/actions": {"GET": _A},  # contains addresses of people
    "/admin/estimates": {"GET": _V},
    "/admin/why/{what:path}": {"GET": _V},
    "/admin/conversations": {"GET": _V},
    "/admin/limits": {"GET": _V, "PATCH": _O},
    "/admin/limits/history": {"GET": _V},
    "/admin/limits/accept": {"POST": _O},
    "/admin/limits/rehearse": {"POST": _V},  # changes nothing
    "/admin/limits/{limit_id:path}": {"PUT": _O, "DELETE": _O},
    "/admin/limits/{limit_id:path}/pause": {"POST": _O},
    "/admin/limits/{limit_id:path}/resume": {"POST": _O},
    "/admin/permits": {"GET": _V},
    "/admin/permits/{process:path}": {"DELETE": _O},
    "/admin/budgets": {"GET": _V},
    "/admin/budgets/books": {"GET": _V},
    "/admin/budgets/{name:text}": {"PUT": _O, "DELETE": _O},
    "/admin/budgets/{name:text}/resume": {"POST": _O},
    "/admin/requests": {"GET": _V},
    "/admin/requests/running": {"GET": _V},
    "/admin/requests/requeue": {"POST": _V},  # counts only; a real run requires operator
    "/admin/requests/{request_id}": {"GET": _V},
    "/admin/requests/{request_id}/request": {"GET": _V},
    "/admin/requests/{request_id}/response": {"GET": _V},
    "/admin/requests/{request_id}/files/{file_id}": {"GET": _V},
    "/admin/requests/{request_id}/cancel": {"POST": _O},
    "/admin/requests/{request_id}/retry": {"POST": _O},
    "/admin/requests/{request_id}/replay": {"POST": _O},
    "/admin/dead": {"GET": _V},
    "/admin/dead/{request_id}/requeue": {"POST": _O},
    "/admin/dead/{request_id}/discard": {"POST": _O},
    "/admin/webhooks": {"GET": _V},
    "/admin/webhooks/{webhook_id}/redeliver": {"POST": _O},
    "/admin/batches": {"GET": _V},
    "/admin/batches/{batch_id}/pause": {"POST": _O},
    "/admin/batches/{batch_id}/resume": {"POST": _O},
    "/admin/batches/{batch_id}/cancel": {"POST": _O},
    "/admin/batches/{batch_id}/results/{which}": {"GET": _V},
    "/admin/upstreams": {"GET": _V},
    "/admin/upstreams/history": {"GET": _V},
    "/admin/upstreams/providers": {"GET": _V},
    "/admin/upstreams/rollback": {"POST": _A},
    "/admin/upstreams/{name}/prices": {"GET": _V},
    "/admin/upstreams/{name}": {"PUT": _A, "PATCH": _A, "DELETE": _A},
    "/admin/upstreams/{name}/test": {"POST": _O},
    "/admin/upstreams/{name}/drain": {"POST": _O},
    "/admin/upstreams/{name}/resume": {"POST": _O},
    "/admin/calls/{path:path}": {"POST": _O},
    "/admin/tenants": {"GET": _V},
    "/admin/tenants/{tenant_id:path}": {"GET": _V, "PUT": _A, "DELETE": _A},
    "/admin/keys": {"GET": _V, "POST": _A},
    "/admin/keys/{prefix}": {"DELETE": _A},
    "/admin/subjects/{subject:path}": {"DELETE": _A},
}
# Prompts, answers and files: open to viewers only with VIEWERS_READ_BODIES.
BODY_ROUTES = frozenset(
    (
        "/requests/{request_id}/request",
        "/requests/{request_id}/response",
        "/admin/requests/{request_id}/request",
        "/admin/requests/{request_id}/response",
        "/admin/requests/{request_id}/files/{file_id}",
        "/admin/batches/{batch_id}/results/{which}",
    )
)


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator: a description of the credential, and the role."""

    name: str
    role: OperatorRole

    def check(self, needed: OperatorRole, why: str = "") -> None:
        """Raise Forbidden, which names the needed role, if the role does not include it."""
        if not self.role.includes(needed):
            has = f"{self.name} has the role {self.role}"
            raise Forbidden(
                f"this needs the role {needed}{why}; {has}",
                allowed=" or ".join(one for one in OperatorRole if one.includes(needed)),
            )


async def admit_admin(request: Request) -> AsyncIterator[None]:
    """Admit operators with the role that the route requires, and record changes as theirs. A
    dependency of all routes of operators. Raises as `checked_operator`."""
    operator = await checked_operator(request)
    if request.method == "GET":
        yield
        return
    with acting(operator.name, operator.role, address_of(request)):
        yield


def address_of(request: Request) -> str:
    """Return the address of a request: that of the connection, and the one that a proxy reports."""
    peer = "" if request.client is None else request.client.host
    forwarded = request.headers.get("x-forwarded-for", "")[:200]
    return f"{peer}, forwarded for {forwarded}" if forwarded.isprintable() and forwarded else peer


async def checked_operator(request: Request) -> Operator:
    """Return the operator, who has the role that the route requires. Raises Unauthenticated,
    Forbidden, StoreUnavailable."""
    operator = await operator_of(request)
    path = getattr(request.scope.get("route"), "path", "")
    needed = ROLES.get(path, {}).get(request.method, OperatorRole.ADMIN)
    operator.check(needed)
    if path in BODY_ROUTES and not reads_bodies(request, operator):
        operator.check(OperatorRole.OPERATOR, ", unless VIEWERS_READ_BODIES is set")
    return operator


def reads_bodies(request: Request, operator: Operator) -> bool:
    """Return whether an operator may see prompts and answers of tenants."""
    is_open = services_of(request).config.viewers_read_bodies
    return is_open or operator.role.includes(OperatorRole.OPERATOR)


async def operator_of(request: Request) -> Operator:
    """Return the operator, with any role. Raises Unauthenticated, Forbidden for a key without a
    role, and StoreUnavailable."""
    services = services_of(request)
    credentials = in_headers(request.scope["headers"])
    if _has_operator_key(services, credentials):
        return Operator(OPERATOR, OperatorRole.ADMIN)
    if not credentials and (signed_in := await who_signed_in(request, services)) is not None:
        return signed_in
    if not credentials and not services.gate.on:
        raise Unauthenticated(_HOW)
    try:
        caller, role = await services.gate.operator(
            request.scope["headers"], request.scope["query_string"]
        )
    except Unauthenticated as refused:
        raise Unauthenticated(f"{refused.message}; or {_HOW}") from None
    request.scope[CALLER_IN_SCOPE] = caller
    return Operator(f"the key tg_{caller.key_id}", role)


def admin_router(*statuses: int, tag: str = "admin", depends: Sequence[Any] = ()) -> APIRouter:
    """Return a router below `/admin` that admits only operators. statuses: of its other answers."""
    return APIRouter(
        prefix="/admin",
        tags=[tag],
        dependencies=[Depends(admit_admin), *depends],
        responses=problem_responses(401, 403, *statuses),
    )


async def is_admitted(request: Request) -> bool:
    """Return whether a request is an operator's. Never raises."""
    try:
        await operator_of(request)
    except TidegateError:
        return False
    return True


async def _reader_of_record(request: Request) -> Caller:
    services = services_of(request)
    if services.gate.on:
        return await caller_of(request, Scope.READ)
    await checked_operator(request)
    caller = services.gate.keyless_caller(request.scope["headers"])
    request.scope[CALLER_IN_SCOPE] = caller
    return caller


# For lists of requests, and for details beyond their status.
RecordReader = Annotated[Caller, Depends(_reader_of_record)]


def _has_operator_key(services: Services, credentials: list[bytes]) -> bool:
    # In constant time, which does not reveal how much of a key was right.
    key = services.operator_key.get_secret_value().encode()
    return any(hmac.compare_digest(one, key) for one in credentials)


async def who_signed_in(request: Request, services: Services) -> Operator | None:
    """Return the operator of a browser's cookie; None without a valid session. Raises Forbidden if
    a page of another site sent the request."""
    key = services.operator_key.get_secret_value()
    value = request.cookies.get(cookie_name(key), "")
    if not value:
        return None
    operator = None
    if checked("session", key, value) is not None:
        operator = Operator(SIGNED_IN, OperatorRole.ADMIN)
    elif services.sign_in is not None and (person := services.sign_in.person(value)) is not None:
        operator = Operator(person.name, person.role)
    if operator is not None:
        refused = services.origins.page_refusal(request.scope["headers"], request.method)
        if refused is not None:
            raise refused
        if await services.sessions.have_ended(value):
            return None
    return operator


PASS = "tidegate_key"
MARK = "tidegate_upload"
_NOT_MARKED = frozenset((PASS, MARK, "key"))
_PASS = re.compile(r"([a-z0-9]{10})\.([0-9a-f]{64})", re.ASCII)


def own_origin(scope: Any) -> str:
    """Return the origin by which the client of a request reaches us."""
    host = next((value for name, value in scope["headers"] if name == b"host"), b"")
    return f"{own_scheme(scope)}://{host.decode('latin-1')}"


def own_scheme(scope: Any) -> str:
    """Return the scheme by which the client of a request reaches us.

    A proxy that terminates TLS sets a header; of several proxies the first value is that of the
    one that the client reached. A client that sends it falsely misleads only itself.
    """
    stated = (value for name, value in scope["headers"] if name == b"x-forwarded-proto")
    scheme = next(stated, b"").partition(b",")[0].strip().lower()
    return scheme.decode() if scheme in (b"http", b"https") else str(scope["scheme"])


def own_urls(scope: Any, path: str, secret: str) -> Callable[[str], str]:
    """Return a function from the query of an upload's URL to its whole URL with this path, as the
    client reaches us. The URL has a mark that its query is ours and, if the request in `scope`
    shows a key of ours, a pass of that key."""

    def marked(query: str) -> str:
        return f"{query}&{MARK}={_signature(_unmarked(query), b'', secret)}"

    own_url = f"{own_origin(scope)}{path}"
    key = credentials_in(scope["headers"], scope["query_string"]).key
    prefix = None if key is None else prefix_of(key)
    if key is None or prefix is None:
        return lambda query: f"{own_url}?{marked(query)}"
    digest = digest_of(key)

    def passed(query: str) -> str:
        whole = marked(query)
        return f"{own_url}?{whole}&{PASS}={prefix}.{_signature(whole, digest, secret)}"

    return passed


def upload_secret(upstreams: Iterable[Upstream], operator_key: SecretStr) -> str:
    """Return the secret that signs the URLs of uploads to one of these upstreams: a key of theirs,
    which all processes have; without any, a value derived from the operator's key."""
    own = operator_key.get_secret_value().encode()
    keys = (one.key for one in upstreams if one.key)
    return next(keys, None) or hmac.digest(own, b"tidegate uploads 1", sha256).hex()


def upload_upstream(query: bytes, secret: str, *, has_pass: bool = False) -> str:
    """Return the upstream to which an upload continues; empty for a new one. A client cannot choose
    it: the value is accepted only with the mark of the whole query, or with a pass (`has_pass`),
    which covers the whole query too: earlier versions set no mark."""
    pairs = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    if has_pass:
        return pairs.get(AT_UPSTREAM, "")
    mark = _signature(_unmarked(query.decode("latin-1")), b"", secret)
    is_own_mark = hmac.compare_digest(mark.encode(), pairs.get(MARK, "").encode())
    return pairs.get(AT_UPSTREAM, "") if is_own_mark else ""


def _unmarked(query: str) -> str:
    pairs = parse_qsl(query, keep_blank_values=True)
    return urlencode([pair for pair in pairs if pair[0] not in _NOT_MARKED])


async def admit_upload(gate: Authenticator, scope: Any, secret: str) -> Caller | None:
    """Return the caller of an upload by the pass in its URL; None if the request shows a key, or
    has no pass. Raises Unauthenticated, Forbidden, StoreUnavailable."""
    if credentials_in(scope["headers"], scope["query_string"]).key is not None:
        return None
    pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    passes = [_PASS.fullmatch(value) for name, value in pairs if name == PASS]
    if len(passes) != 1 or (found := passes[0]) is None:
        return None
    query = urlencode([pair for pair in pairs if pair[0] != PASS])
    prefix, signature = found.groups()
    return await gate.vouched(
        prefix,
        lambda digest: hmac.compare_digest(_signature(query, digest, secret), signature),
    )


def _signature(query: str, digest: bytes, secret: str) -> str:
    """Sign by the key's digest and the secret of uploads together: neither a copy of the database
    nor a guess of the other is sufficient."""
    message = b"an upload\0" + query.encode()
    return hmac.digest(digest + secret.encode(), message, sha256).hex()
