"""Routes `/admin/limits`: the limits of the running deployment, and their changes.

Invariants: every route requires an admin; a change is recorded with its author and reason; a body
is read only after its sender is authorised, and at most `MOST_BYTES` of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, TypeVar
from uuid import UUID

import orjson
from fastapi import Depends, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tidegate.admission.charges import TierTimes
from tidegate.admission.estimator import Learned
from tidegate.call import DEFAULT_POOL
from tidegate.errors import ConfigError, InvalidRequest, ShuttingDown, UnsupportedMedia
from tidegate.http.body import incoming_of
from tidegate.http.guards import admin_router
from tidegate.http.problems import in_words, problem_responses
from tidegate.http.services import Services, services_of
from tidegate.http.sse import disconnected
from tidegate.policy.format import Edit, edit, to_plain
from tidegate.policy.inspection import (
    LONGEST_PAUSE_MS,
    Control,
    Overview,
    Reason,
    ShownPermit,
    batch_id_of,
    is_put_back,
    of_batch,
    request_id_of,
    why,
    why_batch,
)
from tidegate.policy.rollout import Revision
from tidegate.rehearse import Comparison, RecordRehearsal
from tidegate.spine.detached import next_line
from tidegate.store.records import PolicyRecord

MOST_BYTES = 1_000_000
_JSON = "application/json"
_NUL = rb"\u0000"  # the only way to write NUL in JSON

ModelT = TypeVar("ModelT", bound=BaseModel)


async def read_json(request: Request, model: type[ModelT]) -> ModelT:
    """Return the body as `model`; an empty one counts as an empty object.

    Raises InvalidRequest with the path of the field, UnsupportedMedia, PayloadTooLarge and
    RequestTimeout.
    """
    config = services_of(request).config
    most_bytes = min(MOST_BYTES, config.max_body_bytes)
    raw = await incoming_of(request, config, max_bytes=most_bytes, in_memory=True).whole()
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if raw and media != _JSON:
        raise UnsupportedMedia("Content-Type", "the body must be JSON", allowed=_JSON)
    if not raw and media not in ("", _JSON):
        raise UnsupportedMedia(
            "Content-Type",
            "an empty body must have the type application/json or none",
            allowed=_JSON,
        )
    try:
        values = model.model_validate_json(raw or b"{}")
    except ValidationError as invalid:
        raise body_error(model, invalid) from None
    if _NUL in raw and (nul := _nul_in(orjson.loads(raw))) is not None:
        where = ".".join(nul) or "body"
        raise InvalidRequest(where, f"{where} has a NUL character")
    return values


def body_error(model: type[BaseModel], invalid: ValidationError) -> InvalidRequest:
    """Return the error for a body that does not fit `model`."""
    first: dict[str, Any] = dict(invalid.errors(include_url=False, include_input=False)[0])
    where = ".".join(str(step) for step in first["loc"]) or "body"
    problem, allowed = in_words(first)
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        allowed = ", ".join(model.model_fields)
    return InvalidRequest(where, f"{where} {problem}", allowed=allowed)


def _nul_in(value: Any, path: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """Return the path of the first text with a NUL, which PostgreSQL cannot store; None without
    one."""
    if isinstance(value, str):
        return path if "\0" in value else None
    if isinstance(value, dict):
        if any("\0" in name for name in value):
            return path
        inner = list(value.items())
    else:
        inner = list(enumerate(value)) if isinstance(value, list) else []
    found = (_nul_in(item, (*path, str(name))) for name, item in inner)
    return next((one for one in found if one is not None), None)


@contextmanager
def config_errors_refused() -> Iterator[None]:
    """Raise InvalidRequest in place of ConfigError: the values are a caller's."""
    try:
        yield
    except ConfigError as error:
        separator = " " if error.value is None else ": "  # the value itself may be a secret
        words = f"{error.variable}{separator}{error.allowed}"
        raise InvalidRequest(error.variable, words, allowed=error.allowed) from None


def described(model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI description of the body."""
    schema = model.model_json_schema()
    whole = _inlined(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": False, "content": {_JSON: {"schema": whole}}}}


def _inlined(value: Any, named: dict[str, Any]) -> Any:
    """Return a schema with each reference replaced by its definition: the references do not resolve
    in the document of the whole API."""
    if isinstance(value, list):
        return [_inlined(one, named) for one in value]
    if not isinstance(value, dict):
        return value
    rest = {key: _inlined(one, named) for key, one in value.items() if key != "$ref"}
    if isinstance(reference := value.get("$ref"), str):
        return _inlined(named[reference.rpartition("/")[2]], named) | rest
    return rest


async def in_pool(
    request: Request,
    pool: Annotated[
        str | None,
        Query(
            description="The upstream whose limits are meant. Default: `gemini`, or the first "
            "upstream"
        ),
    ] = None,
) -> None:
    """Set the pool of a request; a dependency of routes about one pool. Raises InvalidRequest."""
    services = services_of(request)
    pool = services.usual_pool if pool is None else pool
    if pool not in services.limiters:
        names = ", ".join(services.limiters)
        raise InvalidRequest("pool", f"there is no pool {pool}", allowed=f"one of {names}")
    request.state.pool = pool


router = admin_router(400, 408, 413, 415, 503, depends=[Depends(in_pool)])
LimitId = Annotated[str, Path(description="A limit's id, such as `kind:text_only` or `rpm:total`")]

By = Annotated[str, Query(min_length=1, max_length=100)]


class Signed(BaseModel):
    """Author and reason of a change, which are recorded."""

    model_config = ConfigDict(extra="forbid")

    by: str = Field(default="admin", min_length=1, max_length=100)
    reason: str = Field(default="", max_length=500)


EXPECTED = (
    "What some fields must be now, as they are shown, or nothing is changed: so nobody overwrites "
    "a change that they have not seen"
)


class NewLimit(Signed):
    limit: Any = Field(
        description="A number, or a table as in tidegate.toml", examples=[5, {"bound": 60}]
    )


class Changes(Signed):
    """Keys are limits' ids, `weights.<tenant>`, `pool.<option>` and `bands`."""

    set: dict[str, Any] = Field(default_factory=dict, examples=[{"kind:text_only": 5}])
    remove: list[str] = Field(default_factory=list, max_length=10_000)
    expected: dict[str, Any] = Field(
        default_factory=dict,
        description="The values that keys must have; otherwise nothing is changed, so that no "
        "operator overwrites a change that another one has made",
        examples=[{"kind:text_only": 3}],
    )


class NewPause(Signed):
    for_ms: int | None = Field(
        default=None, ge=1, le=LONGEST_PAUSE_MS, description="Without it: until it is resumed"
    )


class AcceptedLimits(BaseModel):
    """Learned limits to put in force, with the author and the reason."""

    model_config = ConfigDict(extra="forbid")

    limits: list[str] = Field(
        default_factory=list, max_length=1_000, description="Ids; all that differ if empty"
    )
    by: str = Field(default="admin", min_length=1, max_length=100)
    reason: str = Field(default="", max_length=500)


class WantedRehearsal(BaseModel):
    """The recorded calls to simulate, and the changes to compare with."""

    model_config = ConfigDict(extra="forbid")

    record: str = Field(
        max_length=100,
        description="The calls of a day (UTC), of hours of a day, or of the last `30m`",
        examples=["2026-11-24", "2026-11-24T09-17", "1h"],
    )
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="Changes, by the keys of `PATCH /admin/limits`, `budgets.<name>.usd` and "
        "`preempt`",
        examples=[{"kind:text_only": 20}],
    )


class InForceNow(BaseModel):
    """The revision that is in force now."""

    revision: int
    set_by: str
    reason: str
    policy: dict[str, Any]


class Done(BaseModel):
    """Whether the request changed anything."""

    done: bool


class Revoked(BaseModel):
    sessions: int


def control_of(request: Request) -> Control:
    return control_in(services_of(request), request.state.pool)


def control_in(services: Services, pool: str) -> Control:
    """Return the control of an existing pool."""
    store = services.store
    return Control(services.keepers[pool], store.running_calls, store.tenants)


async def why_of_batch(services: Services, what: str, batch_id: UUID) -> Reason:
    """Return what the lines of a batch wait for, in the pool by whose limits they are called.
    Raises as `why`."""
    stand = await services.store.batches.stand(batch_id)
    if (line := next_line(stand)) is None:
        return of_batch(what, stand)
    reasons = []
    for place in services.places_of(line):
        reasons.append(await why_batch(control_in(services, place.pool), what, stand, place))
        if reasons[-1].is_of_the_pool is not is_put_back(place):
            return reasons[-1]
    return reasons[0]


async def why_of(services: Services, request_id: UUID) -> Reason:
    """Return why a request waits, in the pool by whose limits it is called. Raises as `why`."""
    found = await services.store.running_calls.whereabouts(request_id)
    reasons = []
    for place in services.places_of(found):
        reasons.append(await why(control_in(services, place.pool), str(request_id), place))
        if reasons[-1].is_of_the_pool is not is_put_back(place):
            return reasons[-1]
    return reasons[0]


@router.get("/limits", summary="All limits, their waiters, and the policy in force")
async def limits(request: Request) -> Overview:
    return await control_of(request).overview()


@router.patch(
    "/limits",
    responses=problem_responses(404, 409),
    openapi_extra=described(Changes),
    summary="Change limits, weights, priorities or options of the pool, in one step",
)
async def change_limits(request: Request) -> InForceNow:
    changes = await read_json(request, Changes)
    return await _changed(request, changes, edit(changes.set, changes.remove, changes.expected))


@router.get("/limits/history", summary="Revisions of the policy: when each was set, and by whom")
async def history(
    request: Request, most: Annotated[int, Query(ge=1, le=1_000)] = 50
) -> list[PolicyRecord]:
    return await control_of(request).keeper.history(most)


@router.post(
    "/limits/accept",
    responses=problem_responses(404),
    openapi_extra=described(AcceptedLimits),
    summary="Apply limits that the provider's answers report",
)
async def accept_learned(request: Request) -> InForceNow:
    chosen = await read_json(request, AcceptedLimits)
    with config_errors_refused():
        now = await control_of(request).accept(chosen.limits, by=chosen.by, reason=chosen.reason)
    return _view_of(now)


@router.post(
    "/limits/rehearse",
    responses=problem_responses(429),
    response_model=Comparison,
    openapi_extra=described(WantedRehearsal),
    summary="Simulate changes of limits on recorded calls; changes nothing",
)
async def rehearse(request: Request) -> Response:
    """A process runs one simulation at a time, and ends it when its client disconnects. `cases` has
    the result under the limits as they are, then with the changes; it is empty if there are no
    recorded calls."""
    requested = await read_json(request, WantedRehearsal)
    services, pool = services_of(request), request.state.pool
    assert services.config.database_url is not None
    upstream = services.spine.targets.upstreams.get(pool)
    rehearsal = RecordRehearsal(
        database_url=services.config.database_url.get_secret_value(),
        pool=pool,
        record=requested.record,
        policy=to_plain(services.limiters[pool].policy),
        changes=requested.set,
        models={kind: services.config.model_for(kind) for kind in services.config.rate_limits},
        upstream=None if upstream is None else replace(upstream, key=""),
        kinds_optional=pool != DEFAULT_POOL,
        tier_times=TierTimes.of(services.config),
    )
    with config_errors_refused():
        return Response(await _while_present(request, rehearsal), media_type=_JSON)


async def _while_present(request: Request, rehearsal: RecordRehearsal) -> bytes:
    """Return the result of a rehearsal. Raises ShuttingDown if the client disconnects or this
    process drains."""
    services = services_of(request)
    running = asyncio.create_task(services.rehearsals.run(rehearsal))
    ends = [
        asyncio.create_task(services.draining.wait()),
        asyncio.create_task(disconnected(request.receive)),
    ]
    try:
        await asyncio.wait([running, *ends], return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise ShuttingDown("this process is stopping; retry", retry_after_ms=1_000)
        return running.result()
    finally:
        for one in (running, *ends):
            one.cancel()
        await asyncio.wait([running])


@router.put(
    "/limits/{limit_id:path}",
    responses=problem_responses(404),
    openapi_extra=described(NewLimit),
    summary="Set one limit; takes effect everywhere immediately",
)
async def set_limit(request: Request, limit_id: LimitId) -> InForceNow:
    new = await read_json(request, NewLimit)
    return await _changed(request, new, edit({f"limits.{limit_id}": new.limit}))


@router.delete(
    "/limits/{limit_id:path}", responses=problem_responses(404), summary="Remove one limit"
)
async def remove_limit(
    request: Request,
    limit_id: LimitId,
    by: By = "admin",
    reason: Annotated[str, Query(max_length=500)] = "",
) -> InForceNow:
    return await _changed(request, Signed(by=by, reason=reason), edit({}, [f"limits.{limit_id}"]))


@router.post(
    "/limits/{limit_id:path}/pause",
    responses=problem_responses(404),
    openapi_extra=described(NewPause),
    summary="Pause a limit for a time: it admits no call",
)
async def pause(request: Request, limit_id: LimitId) -> Done:
    """`done` is false if a longer pause is in force, which stays."""
    new = await read_json(request, NewPause)
    done = await control_of(request).pause(limit_id, new.for_ms, by=new.by, reason=new.reason)
    return Done(done=done)


@router.post(
    "/limits/{limit_id:path}/resume",
    responses=problem_responses(404),
    openapi_extra=described(Signed),
    summary="End a pause",
)
async def resume(request: Request, limit_id: LimitId) -> Done:
    """`done` is false if there was no pause."""
    signed = await read_json(request, Signed)
    return Done(done=await control_of(request).resume(limit_id, by=signed.by))


@router.get("/permits", summary="All permits in use, by process")
async def permits(request: Request) -> list[ShownPermit]:
    return await control_of(request).permits()


@router.delete(
    "/permits/{process:path}",
    responses=problem_responses(404),
    summary="Release all permits of a dead process",
)
async def revoke(
    request: Request,
    process: Annotated[str, Path(description="The process's name or session")],
    by: By = "admin",
) -> Revoked:
    """Only for a process that is certainly dead: a running process cancels its calls when it
    notices, and until then the provider may get more calls than the limits allow."""
    return Revoked(sessions=await control_of(request).revoke(process, by=by))


@router.get(
    "/why/{what:path}",
    responses=problem_responses(404),
    summary="Why a request, a batch or a ticket waits",
)
async def why_it_waits(
    request: Request,
    what: Annotated[str, Path(description="The id of a request or a batch, or process/ticket")],
) -> Reason:
    if (batch_id := batch_id_of(what)) is not None:
        return await why_of_batch(services_of(request), what, batch_id)
    request_id = request_id_of(what)
    if request_id is None:
        return await why(control_of(request), what)
    return await why_of(services_of(request), request_id)


@router.get("/estimates", summary="Quality of this process's token estimates")
async def estimates(request: Request) -> list[Learned]:
    return list(services_of(request).spine.estimates())


async def _changed(request: Request, signed: Signed, change: Edit) -> InForceNow:
    keeper = control_of(request).keeper
    with config_errors_refused():
        now = await keeper.change(change, set_by=signed.by, reason=signed.reason)
    return _view_of(now)


def _view_of(now: Revision) -> InForceNow:
    return InForceNow(revision=now.number, set_by=now.set_by, reason=now.reason, policy=now.policy)
