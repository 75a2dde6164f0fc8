"""Rate-limit APIs of the providers: the limits of an account, OpenAI's and Anthropic's.

    https://platform.openai.com/docs/api-reference/project-rate-limits
    https://platform.claude.com/docs/en/api/admin-api/rate-limits

Both need an admin key; a key that may only read is enough. OpenAI lists each model of a project by
itself, although some share a limit; a limit of 0 is none in that unit. Anthropic lists classes of
models; a workspace lists only what it overrides.

Invariants: an answer is followed page by page to its end, within `MOST_LIMIT_PAGES`; the key goes
to the given base URL only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, urlencode

from tidegate.errors import ConfigError, UpstreamGarbled, UpstreamRejected
from tidegate.limiter import Unit
from tidegate.policy.imported import ModelClass
from tidegate.upstream.transport import RelayWire
from tidegate.upstream.usage_api import UsageAccount, json_objects, read_admin_page

MOST_LIMIT_PAGES = 100
_PAGE = 100
_API = "rate-limit API"
_OF_OPENAI: Mapping[str, str] = {
    "max_requests_per_1_minute": "rpm",
    "max_tokens_per_1_minute": "tpm",
    "max_images_per_1_minute": "ipm",
    "max_requests_per_1_day": "rpd",
}
# A unit where it is another than that of the scope by the preset.
_OF_ANTHROPIC: Mapping[str, tuple[str, Unit | None]] = {
    "requests_per_minute": ("rpm", None),
    "input_tokens_per_minute": ("itpm", "input_tokens"),
    "input_tokens_per_minute_cache_aware": ("itpm", None),
    "output_tokens_per_minute": ("otpm", None),
}


@dataclass(frozen=True, slots=True)
class ReportedLimits:
    """The limits of an account. skipped: names of those that no limit of a policy can be."""

    classes: tuple[ModelClass, ...]
    skipped: tuple[str, ...]


async def reported_limits(
    wire: RelayWire,
    account: UsageAccount,
    *,
    project: str | None = None,
    workspace: str | None = None,
) -> ReportedLimits:
    """All limits of an account. Of OpenAI those of a project, by default the only one.

    Raises UpstreamError (UpstreamUnauthorized where the key is refused) and ConfigError where there
    is no such project or workspace, or more than one project and none is named.
    """
    if account.provider == "openai":
        return await _of_project(wire, account, project or await _only_project(wire, account))
    found, skipped = await _of_organization(wire, account, "/v1/organizations/rate_limits")
    if workspace is not None:
        path = f"/v1/organizations/workspaces/{quote(workspace, safe='')}/rate_limits"
        with_name = ("--workspace", workspace)
        overrides, _ = await _of_organization(wire, account, path, with_name)
        by_models = {one.models: one for one in overrides}
        found = [_overridden(one, by_models.get(one.models)) for one in found]
    return ReportedLimits(tuple(found), skipped)


async def _of_project(wire: RelayWire, account: UsageAccount, project: str) -> ReportedLimits:
    path = f"/organization/projects/{quote(project, safe='')}/rate_limits"
    classes: dict[str, ModelClass] = {}
    skipped: dict[str, None] = {}
    async for row in _rows(wire, account, path, {"limit": _PAGE}, ("--project", project)):
        model = _text(row, "model")
        bounds = {scope: _bound(row, name) for name, scope in _OF_OPENAI.items()}
        skipped |= {
            name: None
            for name, value in row.items()
            if name.startswith(("max_", "batch_")) and name not in _OF_OPENAI and value
        }
        of_id = str(row.get("id") or model)
        known = {scope: bound for scope, bound in bounds.items() if bound}
        other = classes.get(of_id)
        models = (model,) if other is None else (*other.models, model)
        classes[of_id] = ModelClass(models, known)
    return ReportedLimits(tuple(one for one in classes.values() if one.bounds), tuple(skipped))


async def _only_project(wire: RelayWire, account: UsageAccount) -> str:
    names = [
        _text(row, "id")
        async for row in _rows(
            wire, account, "/organization/projects", {"limit": _PAGE}, ("--project", "(not set)")
        )
        if row.get("status", "active") == "active"
    ]
    if len(names) == 1:
        return names[0]
    known = ", ".join(names) or "the account has none"
    raise ConfigError("--project", "(not set)", f"must be a project: {known}")


async def _of_organization(
    wire: RelayWire, account: UsageAccount, path: str, named: tuple[str, str] | None = None
) -> tuple[list[ModelClass], tuple[str, ...]]:
    found: list[ModelClass] = []
    skipped: dict[str, None] = {}
    async for row in _rows(wire, account, path, {"limit": _PAGE}, named):
        if row.get("group_type", "model_group") != "model_group":
            skipped[str(row["group_type"])] = None
            continue
        bounds: dict[str, int] = {}
        units: dict[str, Unit] = {}
        for limit in json_objects(row.get("limits")):
            kind = _text(limit, "type")
            if kind not in _OF_ANTHROPIC:
                skipped[kind] = None
                continue
            scope, unit = _OF_ANTHROPIC[kind]
            bounds[scope] = _bound(limit, "value")
            if unit is not None:
                units[scope] = unit
        models = tuple(str(one) for one in row.get("models") or ())
        if models and bounds:
            found.append(ModelClass(models, bounds, units))
    return found, tuple(skipped)


def _overridden(one: ModelClass, by: ModelClass | None) -> ModelClass:
    return one if by is None else replace(one, bounds={**one.bounds, **by.bounds})


async def _rows(
    wire: RelayWire,
    account: UsageAccount,
    path: str,
    query: Mapping[str, Any],
    named: tuple[str, str] | None,
) -> AsyncIterator[dict[str, Any]]:
    """The entries of all pages. `named`: the option, and its value, that a 404 is about."""
    more: dict[str, Any] = {}
    for _ in range(MOST_LIMIT_PAGES):
        try:
            answer = await read_admin_page(
                wire, account, f"{path}?{urlencode({**query, **more})}", _API
            )
        except UpstreamRejected as rejected:
            if rejected.status == 404 and named is not None:
                raise ConfigError(*named, "is not known to the provider") from None
            raise
        for row in json_objects(answer.get("data")):
            yield row
        # Anthropic's cursor, and OpenAI's.
        if answer.get("next_page"):
            more = {"page": answer["next_page"]}
        elif answer.get("has_more") and answer.get("last_id"):
            more = {"after": answer["last_id"]}
        else:
            return
    raise UpstreamGarbled(f"the {_API} has more than {MOST_LIMIT_PAGES} pages")


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise UpstreamGarbled(f"the {_API} has an entry without {name}")
    return value


def _bound(row: Mapping[str, Any], name: str) -> int:
    value = row.get(name, 0)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UpstreamGarbled(f"the {_API} has a {name} that is no whole number")
    return value
