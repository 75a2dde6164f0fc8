"""Routes `/admin/upstreams`: the upstreams of the running deployment, and their changes.

Invariants: every route requires an admin; a change is recorded with its author and reason, and
answered when every process has applied it, or with those that have not; no answer contains a
secret.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

from fastapi import Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from tidegate.admission.charges import ListedPrice, listed_prices
from tidegate.errors import InvalidRequest, LimiterUnavailable, NotFound, UpstreamInUse
from tidegate.http.admin.limits import By, config_errors_refused, described, read_json
from tidegate.http.guards import admin_router
from tidegate.http.problems import problem_responses
from tidegate.http.services import Services, services_of
from tidegate.http.views import view_of
from tidegate.metrics.process import Note
from tidegate.metrics.verdict import found_by
from tidegate.policy.deployment import Upstream
from tidegate.policy.live import (
    LiveEdit,
    added,
    as_deployed,
    changed_lines,
    changes_of,
    drained,
    read_again,
    removed,
    shown,
    with_keys,
)
from tidegate.policy.providers import LIST_BASE_MODELS, PROVIDERS
from tidegate.prices.rates import Price
from tidegate.spine.upstreams import UpstreamChange, check_tested
from tidegate.store.provider.upstreams import UpstreamProcess
from tidegate.upstream.fetch import UpstreamTest

router = admin_router(400, 408, 413, 415, 503, tag="upstreams")
UpstreamName = Annotated[str, Path(description="An upstream's name", max_length=100)]
MOST_REVISION = 2**62  # the largest that PostgreSQL's type can hold
Expected = Annotated[
    int | None, Query(description="The revision that must be in force", ge=0, le=MOST_REVISION)
]
_READ_WITHIN_S = 2.0
_MOST_MODELS = 20

State = Literal["in service", "out", "draining", "drained", "missing"]


class SignedChange(BaseModel):
    """Author and reason of a change, which are recorded."""

    model_config = ConfigDict(extra="forbid")

    by: str = Field(default="admin", min_length=1, max_length=100)
    reason: str = Field(default="", max_length=500)
    expected: int | None = Field(
        default=None, ge=0, description="The revision that must be in force, or nothing is changed"
    )
    dry_run: bool = Field(default=False, description="Only report what would change")


class NewUpstream(SignedChange):
    """A new upstream, or one that was removed at run time."""

    table: dict[str, Any] = Field(
        default_factory=dict,
        description="As in `[upstreams.NAME]` of tidegate.toml",
        examples=[{"provider": "groq", "key": "GROQ_API_KEY", "models": ["llama-*"]}],
    )
    test: bool = Field(default=True, description="Whether it must answer for its models first")


class UpstreamKeys(SignedChange):
    """Keys to set, as in `[upstreams.NAME]`; `aliases.fast` is one entry of a table."""

    set: dict[str, Any] = Field(default_factory=dict, examples=[{"weight": 3}])
    remove: list[str] = Field(default_factory=list, max_length=100)
    deployed: bool = Field(default=False, description="Alone: restore the settings of the file")
    read_again: bool = Field(default=False, description="Alone: read its secrets and files again")


class RollBack(SignedChange):
    revision: int = Field(
        ge=0, le=MOST_REVISION, description="The revision to restore; 0: that of the file"
    )


class ChangeView(BaseModel):
    """The effect of a change."""

    revision: int = Field(description="The revision in force")
    changes: list[str]
    took_ms: float
    in_force_ms: float = Field(
        description="Time from the decision until every process had applied it"
    )
    processes: int
    unreached: list[str] = Field(description="Processes that have not applied it yet")
    dry_run: bool
    tests: list[UpstreamTestView] = Field(default_factory=list)


class UpstreamTestView(BaseModel):
    """An upstream's response to a request for its models, in one dialect."""

    dialect: str
    url: str
    status: int | None = Field(description="HTTP status; null if there was no response")
    took_ms: float
    models: list[str] = Field(description="The first 20 models")
    model_count: int
    unlisted: list[str] = Field(description="Configured models that are not in the upstream's list")
    problem: str = Field(description="Empty if the test passed")
    load: str = Field(description="Load that a self-hosted server reports, such as its slots")


class UpstreamView(BaseModel):
    """An upstream with its settings in force."""

    name: str
    state: State
    source: str = Field(
        description="deployment (file or environment), live, or both: the keys that were set live"
    )
    table: dict[str, Any] = Field(
        description="Its settings in force, with values of headers hidden"
    )
    base_urls: dict[str, str]
    in_progress: int | None = Field(description="Permits in use; null while Valkey is unavailable")
    waiting: int | None
    problems: dict[str, str] = Field(description="Processes that cannot use it, and why")
    load: str = Field(description="Load that a self-hosted server reports, such as its slots")
    provider: str = Field(description="The preset of its provider; empty if none")
    models: list[str] = Field(description="Patterns of the models that it serves")
    key: str = Field(description="Source of its key: a variable, a file, or its authentication")
    limits: int | None = Field(description="Number of its limits; null while it cannot be used")
    health: UpstreamHealthView


class UpstreamHealthView(BaseModel):
    """Health of an upstream in the process that reports the worst state."""

    state: Literal["ok", "out", "trying"] | None = Field(
        description="Null if no process has the upstream"
    )
    key_refused: bool = Field(
        description="Whether the key was rejected or, if unpaid, the account has no credit"
    )
    unpaid: bool
    detail: str = Field(description="The last failure")
    out_in: int = Field(description="Processes for which it is out of service")
    processes: int


class ProviderView(BaseModel):
    """A provider's preset: the options that a table need not set."""

    name: str
    dialects: list[str]
    base_url: str = Field(description="Base URL of its first dialect; {names} are options")
    key: str | None = Field(description="Default variable of its key")
    models: list[str]
    options: dict[str, str | None] = Field(
        description="Required options with their defaults; null if there is none"
    )
    is_own: bool = Field(description="A self-hosted server, which needs no key")


class PriceView(BaseModel):
    """The price of some models at an upstream, in USD per million tokens; null where unknown."""

    models: list[str] = Field(description="Names or patterns")
    input: float | None
    cached: float | None = Field(description="Input that came from the provider's cache")
    output: float | None
    image: float | None = Field(description="Per picture")
    long_above_tokens: int | None = Field(description="Calls with more input have other prices")
    tiers: list[str] = Field(description="Processing tiers with prices of their own")
    is_known: bool = Field(description="Whether there is a price: otherwise calls have no cost")
    checked: date | None = Field(
        description="Day on which a public price was read; null if the upstream states it"
    )
    source: str = Field(description="Page of a public price")


class UpstreamsView(BaseModel):
    """All upstreams."""

    revision: int = Field(description="Revision of the live changes; 0 if there was none")
    processes: list[ProcessView]
    upstreams: list[UpstreamView]
    differing: list[str] = Field(
        description="Settings that the file has changed after they were set live"
    )


class ProcessView(BaseModel):
    instance_id: str
    role: str
    revision: int


class DrainView(ChangeView):
    in_progress: int | None = Field(description="Permits in use; null while Valkey is unavailable")
    background: int = Field(description="Background calls in progress")
    batches: int = Field(description="Open batches at the provider")


class RevisionView(BaseModel):
    revision: int
    action: str
    set_by: str
    reason: str
    created_at: datetime | None
    changes: list[str]


ChangeView.model_rebuild()
UpstreamView.model_rebuild()
UpstreamsView.model_rebuild()
DrainView.model_rebuild()


@router.get("/upstreams", summary="All upstreams with their source and state")
async def list_upstreams(request: Request) -> UpstreamsView:
    services = services_of(request)
    live, base = services.upstreams, services.upstreams.stated.tables()
    processes = await live.record.processes()
    deployment = live.deployment
    names = [*(one.name for one in deployment.upstreams), *deployment.missing]
    loads, noted, uses = await asyncio.gather(
        live.loads.get(),
        services.board.notes(),
        asyncio.gather(*(_lately_in_use(services, name) for name in names)),
    )
    return UpstreamsView(
        revision=max(0, live.revision),
        processes=[view_of(ProcessView, one) for one in processes],
        upstreams=[
            _view(services, name, use, base, processes, noted.notes, str(loads.get(name, "")))
            for name, use in zip(names, uses, strict=True)
        ],
        differing=deployment.live.differing(base),
    )


@router.get("/upstreams/providers", summary="The presets of providers")
async def providers() -> list[ProviderView]:
    return [
        ProviderView(
            name=name,
            dialects=list(one.urls),
            base_url=next(iter(one.urls.values())),
            key=one.key,
            models=list(one.models),
            options=dict(one.options),
            is_own=one.is_own,
        )
        for name, one in PROVIDERS.items()
    ]


@router.get(
    "/upstreams/{name}/prices",
    responses=problem_responses(404),
    summary="The prices by which calls to an upstream are charged today",
)
async def prices(request: Request, name: UpstreamName) -> list[PriceView]:
    upstream = services_of(request).upstreams.deployment.upstream(name)
    if upstream is None:
        raise NotFound(f"there is no upstream {name}", field="name")
    return [_price_view(one) for one in listed_prices(upstream, datetime.now(UTC).date())]


def _price_view(one: ListedPrice) -> PriceView:
    price = one.price or Price()
    return PriceView(
        models=list(one.models),
        input=price.input,
        cached=price.input if price.cached is None else price.cached,
        output=price.output,
        image=price.image,
        long_above_tokens=price.above,
        tiers=sorted(price.tiers),
        is_known=one.price is not None,
        checked=one.checked,
        source=one.source,
    )


@router.get("/upstreams/history", summary="Changes of upstreams: when, and by whom")
async def history(
    request: Request, most: Annotated[int, Query(ge=1, le=1_000)] = 50
) -> list[RevisionView]:
    found = await services_of(request).upstreams.record.history(most + 1)
    changes = [changes_of(one.upstreams) for one in found] + [changes_of({})]
    return [
        view_of(RevisionView, one, changes=changed_lines(changes[place + 1], changes[place]))
        for place, one in enumerate(found[:most])
    ]


@router.post(
    "/upstreams/rollback",
    responses=problem_responses(404, 409),
    openapi_extra=described(RollBack),
    summary="Apply the upstreams of an earlier revision",
)
async def roll_back(request: Request) -> ChangeView:
    requested = await read_json(request, RollBack)
    with config_errors_refused():
        done = await services_of(request).upstreams.roll_back(
            requested.revision,
            by=requested.by,
            reason=requested.reason,
            expected=requested.expected,
            is_dry_run=requested.dry_run,
        )
    return ChangeView(**_values(done))


@router.put(
    "/upstreams/{name}",
    responses=problem_responses(409),
    openapi_extra=described(NewUpstream),
    summary="Add an upstream, in all processes",
)
async def add(request: Request, name: UpstreamName) -> ChangeView:
    """The process that answers tests it first. It takes effect if every process has its key and
    files."""
    new, services = await read_json(request, NewUpstream), services_of(request)
    live, edit, tests = services.upstreams, added(name, new.table), list[UpstreamTestView]()
    with config_errors_refused():
        candidate = live.candidate(edit, name)
        if new.test:
            found = await live.test(candidate)
            check_tested(found)
            tests = _tests(found, candidate)
    done = await _changed(request, f"add {name}", edit, new)
    if "models" not in new.table:
        models = ", ".join(candidate.models)
        whose = "every model that no upstream names" if models == "*" else "those of its preset"
        done["changes"].append(f"{name}.models: {models} (none are stated: {whose})")
    keeper = services.keepers.get(name)
    if not new.dry_run and keeper is not None:
        # A pool of that name may have limits of an upstream that was removed.
        await keeper.adopt_stated(set_by=new.by, reason=new.reason or f"add {name}")
    return ChangeView(**done, tests=tests)


@router.patch(
    "/upstreams/{name}",
    responses=problem_responses(404, 409),
    openapi_extra=described(UpstreamKeys),
    summary="Change keys of an upstream, in all processes",
)
async def set_keys(request: Request, name: UpstreamName) -> ChangeView:
    """Running calls are not affected."""
    keys = await read_json(request, UpstreamKeys)
    edit = with_keys(name, keys.set, keys.remove)
    named = [one for one in ("deployed", "read_again") if getattr(keys, one)]
    if named and (keys.set or keys.remove or len(named) > 1):
        message = f"{named[0]} is given together with another change"
        raise InvalidRequest(named[0], message, allowed="alone, without set and remove")
    if keys.deployed:
        edit = as_deployed(name)
    elif keys.read_again:
        edit = read_again(name)
    return ChangeView(**await _changed(request, f"set {name}", edit, keys))


@router.post(
    "/upstreams/{name}/test",
    responses=problem_responses(404),
    summary="Request the models of an upstream, with its credentials, from this process",
)
async def test(request: Request, name: UpstreamName) -> list[UpstreamTestView]:
    live = services_of(request).upstreams
    upstream = live.deployment.upstream(name)
    if upstream is None:
        raise NotFound(f"there is no upstream {name}", field="name")
    await services_of(request).store.tenants.actions.note("upstream.test", name)
    return _tests(await live.test(upstream), upstream)


@router.post(
    "/upstreams/{name}/drain",
    responses=problem_responses(404, 409),
    openapi_extra=described(SignedChange),
    summary="Stop sending new calls to an upstream",
)
async def drain(request: Request, name: UpstreamName) -> DrainView:
    """Waiting calls move to other upstreams, running calls finish, and objects that are stored
    there stay reachable. The response has the number of calls left; repeat the request to get it
    again."""
    signed = await read_json(request, SignedChange)
    done = await _changed(request, f"drain {name}", drained(name), signed, prepares=False)
    services = services_of(request)
    use = await _in_use(services, name)
    at = await services.upstreams.record.at(name)
    return DrainView(
        **done,
        in_progress=None if use is None else use[0],
        background=at.background,
        batches=at.batches,
    )


@router.post(
    "/upstreams/{name}/resume",
    responses=problem_responses(404, 409),
    openapi_extra=described(SignedChange),
    summary="Send calls to a drained upstream again",
)
async def resume(request: Request, name: UpstreamName) -> ChangeView:
    signed = await read_json(request, SignedChange)
    edit = drained(name, is_drained=False)
    return ChangeView(**await _changed(request, f"resume {name}", edit, signed))


@router.delete(
    "/upstreams/{name}",
    responses=problem_responses(404, 409),
    summary="Remove an upstream, in all processes",
)
async def remove(
    request: Request,
    name: UpstreamName,
    by: By = "admin",
    reason: Annotated[str, Query(max_length=500)] = "",
    force: Annotated[
        bool, Query(description="Even if calls are in progress or objects are stored there")
    ] = False,
    expected: Expected = None,
    dry_run: bool = False,
) -> ChangeView:
    """Running calls finish. Objects that are stored there are no longer reachable."""
    services = services_of(request)
    if not force and name in {one.name for one in services.upstreams.deployment.upstreams}:
        await _check_unused(services, name)
    signed = SignedChange(by=by, reason=reason, expected=expected, dry_run=dry_run)
    done = await _changed(request, f"remove {name}", removed(name), signed, prepares=False)
    return ChangeView(**done)


async def _check_unused(services: Services, name: str) -> None:
    """Raise UpstreamInUse with all that still uses the upstream."""
    use, at = await _in_use(services, name), await services.upstreams.record.at(name)
    needs: list[str] = []
    if name not in services.upstreams.deployment.drained:
        needs.append("it is not drained")
    if use is None:
        raise LimiterUnavailable(
            "Valkey does not answer, so its calls in progress are not known", limit=""
        )
    named = {
        "calls in progress": use[0],
        "waiting calls": use[1],
        "calls in the background": at.background,
        "open batches": at.batches,
        "resources of callers": at.resources,
    }
    needs += [f"{count} {what}" for what, count in named.items() if count]
    if needs:
        message = f"the upstream {name} is in use: {', '.join(needs)}"
        raise UpstreamInUse(f"{message}; force removes it anyway")


async def _changed(
    request: Request, action: str, edit: LiveEdit, signed: SignedChange, *, prepares: bool = True
) -> dict[str, Any]:
    """Apply a change and return its effect, in the fields of `ChangeView`. Raises
    InvalidRequest."""
    with config_errors_refused():
        done = await services_of(request).upstreams.change(
            action,
            edit,
            by=signed.by,
            reason=signed.reason,
            expected=signed.expected,
            is_dry_run=signed.dry_run,
            needs_preparation=prepares,
        )
    return _values(done)


def _values(done: UpstreamChange) -> dict[str, Any]:
    return asdict(done) | {"dry_run": done.is_dry_run}


def _tests(found: list[UpstreamTest], upstream: Upstream) -> list[UpstreamTestView]:
    listed = {model for one in found for model in one.models}  # each dialect has its own models
    named = [name for name in (*upstream.named, *upstream.aliases.values()) if name not in listed]
    if upstream.provider in LIST_BASE_MODELS:
        named = []
    return [
        view_of(
            UpstreamTestView,
            one,
            took_ms=one.took_ms,
            models=list(one.models[:_MOST_MODELS]),
            model_count=len(one.models),
            unlisted=named if one.models else [],
        )
        for one in found
    ]


async def _in_use(services: Services, name: str) -> tuple[int, int] | None:
    """Return how many permits are in use and how many calls wait; None if Valkey does not
    answer."""
    limiter = services.limiters.get(name)
    if limiter is None:
        return 0, 0
    try:
        async with asyncio.timeout(_READ_WITHIN_S):
            snapshot = await limiter.snapshot(permits=True)
    except (LimiterUnavailable, TimeoutError):
        return None
    return len(snapshot.permits), sum(one.waiting for one in snapshot.tenants)


async def _lately_in_use(services: Services, name: str) -> tuple[int, int] | None:
    """Return the same from the shared cache of reads, half a second old at most: reading each
    permit of a large pool takes a second."""
    limiter = services.limiters.get(name)
    if limiter is None:
        return 0, 0
    if (snapshot := await services.recent_reads.of(limiter)) is None:
        return None
    return sum(one.held for one in snapshot.processes), sum(one.waiting for one in snapshot.tenants)


def _view(
    services: Services,
    name: str,
    use: tuple[int, int] | None,
    base: Any,
    processes: list[UpstreamProcess],
    notes: list[Note],
    load: str,
) -> UpstreamView:
    deployment = services.upstreams.deployment
    upstream, gate = deployment.upstream(name), services.spine.health.get(name)
    state: State = "in service"
    if upstream is None or gate is None:
        state = "missing"
    elif name in deployment.drained:
        state = "drained" if use is not None and use[0] == 0 else "draining"
    elif gate.state != "ok":
        state = "out"
    problems = {one.instance_id: one.problems[name] for one in processes if name in one.problems}
    if (missing := deployment.missing.get(name)) is not None:
        problems.setdefault(services.board.process, f"{missing.variable} {missing.allowed}")
    table, limiter = deployment.tables[name], services.limiters.get(name)
    provider = (upstream.provider if upstream else table.get("provider")) or ""
    return UpstreamView(
        name=name,
        state=state,
        source=deployment.live.source(name, base),
        table=shown(table),
        base_urls={} if upstream is None else dict(upstream.base_urls),
        in_progress=None if use is None else use[0],
        waiting=None if use is None else use[1],
        problems=problems,
        load=load,
        provider=provider,
        models=list(upstream.models if upstream else table.get("models", ())),
        key=_key_words(name, table, provider),
        limits=None if limiter is None else len(limiter.policy.limits),
        health=_health(name, notes),
    )


def _key_words(name: str, table: Any, provider: str) -> str:
    stated = table.get("key") or table.get("key_file") or table.get("auth")
    preset = PROVIDERS.get(provider)
    usual = "GEMINI_API_KEY" if name == "gemini" else (preset.key if preset else None)
    return str(stated or usual or "")


def _health(name: str, notes: list[Note]) -> UpstreamHealthView:
    found = found_by(name, notes)
    worst = found[0][1] if found else None
    return UpstreamHealthView(
        state=worst.state if worst else None,
        key_refused=any(one.key_refused for _, one in found),
        unpaid=any(one.unpaid for _, one in found),
        detail=worst.why if worst else "",
        out_in=sum(one.state != "ok" or one.key_refused for _, one in found),
        processes=len(found),
    )
