"""Rate limits as providers report them: headers of answers, refusals, and the rate-limit APIs.

Names and wordings are those of `docs/decisions/0018-how-providers-count.md`. Invariant: a report
has the account's own count at that moment, for the limits of the call's model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from tidegate.emulator.account import (
    DAY_S,
    SECOND_NS,
    AccountLimit,
    AccountRefusal,
    AccountSpec,
    HeaderFamily,
    LimitReading,
)
from tidegate.emulator.dialect import ErrorResponse, Json, Refused, listing

Views = Sequence[LimitReading]
TOKEN_UNITS = ("tokens", "input_tokens", "uncached_input_tokens", "output_tokens")


def rate_limit_headers(family: HeaderFamily, views: Views, now_ns: int) -> dict[str, str]:
    """Return headers that report a client's limits; `now_ns` is the account's clock."""
    return _FAMILIES[family](views, now_ns)


def _no_headers(_views: Views, _now_ns: int) -> dict[str, str]:
    return {}


def _find(views: Views, units: Iterable[str], *, daily: bool | None = None) -> LimitReading | None:
    """Return the limit of one of these units that has the smallest part of its bound left.

    `daily` selects those of a day, or all others; None selects a day's only if there is no other.
    """
    found = [view for view in views if view.limit.unit in units]
    days = [view for view in found if view.limit.window_s >= DAY_S]
    rest = [view for view in found if view.limit.window_s < DAY_S]
    chosen = days if daily else rest or (days if daily is None else [])
    return min(chosen, key=lambda view: view.remaining / max(view.bound, 1), default=None)


def duration(wait_ns: int) -> str:
    """Return a duration in OpenAI's format, cut to milliseconds: `0s`, `350ms`, `1.2s`, `6m0s`,
    `1h0m0s`."""
    if wait_ns < SECOND_NS:
        return f"{wait_ns // 1_000_000}ms" if wait_ns >= 1_000_000 else "0s"
    seconds, rest_ms = divmod(wait_ns // 1_000_000, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{seconds + rest_ms / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def _openai(views: Views, _now_ns: int) -> dict[str, str]:
    named = {
        "requests": _find(views, ["requests"]),
        "tokens": _find(views, TOKEN_UNITS),
        "input-images": _find(views, ["images"]),
    }
    return _spelled("x-ratelimit-{}-{}", named, duration)


def _groq(views: Views, _now_ns: int) -> dict[str, str]:
    """Return Groq's headers: requests are those of a day, tokens those of a minute."""
    named = {
        "requests": _find(views, ["requests"], daily=True) or _find(views, ["requests"]),
        "tokens": _find(views, TOKEN_UNITS),
    }
    return _spelled("x-ratelimit-{}-{}", named, duration)


def _cerebras(views: Views, _now_ns: int) -> dict[str, str]:
    named = {
        "requests-day": _find(views, ["requests"], daily=True),
        "tokens-minute": _find(views, TOKEN_UNITS, daily=False),
    }
    return _spelled("x-ratelimit-{}-{}", named, lambda wait_ns: f"{wait_ns / 1e9:.3f}")


def _spelled(
    pattern: str, named: Mapping[str, LimitReading | None], written: Callable[[int], str]
) -> dict[str, str]:
    headers = {}
    for name, view in named.items():
        if view is not None:
            headers[pattern.format("limit", name)] = str(view.bound)
            headers[pattern.format("remaining", name)] = str(view.remaining)
            headers[pattern.format("reset", name)] = written(view.full_ns)
    return headers


def _azure(views: Views, _now_ns: int) -> dict[str, str]:
    named = {"requests": _find(views, ["requests"]), "tokens": _find(views, TOKEN_UNITS)}
    headers = _spelled("x-ratelimit-{}-{}", named, lambda wait_ns: str(wait_ns // SECOND_NS))
    for name, view in named.items():
        if view is not None:
            headers[f"x-ratelimit-renewalperiod-{name}"] = f"{view.limit.window_s:g}"
    return headers


def _mistral(views: Views, _now_ns: int) -> dict[str, str]:
    headers = {}
    named = {"req": _find(views, ["requests"]), "tokens": _find(views, TOKEN_UNITS, daily=False)}
    for name, view in named.items():
        if view is not None:
            headers[f"x-ratelimit-limit-{name}-minute"] = str(view.bound)
            headers[f"x-ratelimit-remaining-{name}-minute"] = str(view.remaining)
    if (tokens := named["tokens"]) is not None:
        headers["x-ratelimit-tokens-query-cost"] = str(tokens.charged)
    if (month := _find(views, TOKEN_UNITS, daily=True)) is not None:
        headers["x-ratelimit-limit-tokens-month"] = str(month.bound)
        headers["x-ratelimit-remaining-tokens-month"] = str(month.remaining)
    return headers


def _openrouter(views: Views, now_ns: int) -> dict[str, str]:
    view = _find(views, ["requests"])
    if view is None:
        return {}
    return {
        "X-RateLimit-Limit": str(view.bound),
        "X-RateLimit-Remaining": str(view.remaining),
        "X-RateLimit-Reset": str((now_ns + view.full_ns) // 1_000_000),
    }


def _together(views: Views, _now_ns: int) -> dict[str, str]:
    view = _find(views, ["requests"])
    if view is None:
        return {}
    return {
        "x-ratelimit-limit": str(view.bound),
        "x-ratelimit-remaining": str(view.remaining),
        "x-ratelimit-reset": str(math.ceil(view.full_ns / 1e9)),
    }


def _anthropic(views: Views, now_ns: int) -> dict[str, str]:
    """Return Anthropic's headers. Tokens are rounded to thousands; `tokens` are input and output
    together."""
    headers = {}
    requests = _find(views, ["requests"])
    if requests is not None:
        headers = _of_anthropic("requests", requests.bound, requests.remaining, requests, now_ns)
    read = _find(views, ["input_tokens", "uncached_input_tokens"])
    made = _find(views, ["output_tokens"])
    for name, view in (("input-tokens", read), ("output-tokens", made)):
        if view is not None:
            headers |= _of_anthropic(name, view.bound, _thousands(view), view, now_ns)
    if read is not None and made is not None:
        later = max(read, made, key=lambda view: view.full_ns)
        remaining = _thousands(read) + _thousands(made)
        headers |= _of_anthropic("tokens", read.bound + made.bound, remaining, later, now_ns)
    return headers


def _thousands(view: LimitReading) -> int:
    return min(round(view.remaining / 1000) * 1000, view.bound)


def _of_anthropic(
    name: str, bound: int, remaining: int, view: LimitReading, now_ns: int
) -> dict[str, str]:
    reset = datetime.fromtimestamp((now_ns + view.full_ns) // SECOND_NS, UTC)
    return {
        f"anthropic-ratelimit-{name}-limit": str(bound),
        f"anthropic-ratelimit-{name}-remaining": str(remaining),
        f"anthropic-ratelimit-{name}-reset": reset.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


_FAMILIES: Mapping[HeaderFamily, Callable[[Views, int], dict[str, str]]] = {
    "none": _no_headers,
    "openai": _openai,
    "anthropic": _anthropic,
    "azure": _azure,
    "groq": _groq,
    "mistral": _mistral,
    "cerebras": _cerebras,
    "openrouter": _openrouter,
    "together": _together,
}


_PERIODS = {1: ("sec", "S"), 60: ("min", "M"), 3600: ("hour", "H"), DAY_S: ("day", "D")}
_TOO_MANY_TOKENS = "Too many tokens, please wait before trying again."
_TOO_MANY_REQUESTS = "Too many requests, please wait before trying again."


def _measured(limit: AccountLimit) -> str:
    """Return the limit's name at OpenAI and Groq: `tokens per min (TPM)`."""
    period, letter = _PERIODS.get(round(limit.window_s), ("min", "M"))
    unit = {"requests": "requests", "images": "images"}.get(limit.unit, "tokens")
    return f"{unit} per {period} ({unit[0].upper()}P{letter})"


def _openai_error(status: int, message: str, kind: str, code: str) -> ErrorResponse:
    inner = {"message": message, "type": kind, "param": None, "code": code}
    return ErrorResponse(status, {"error": inner})


def _refused_by_openai(refusal: AccountRefusal, model: str, *, groq: bool) -> ErrorResponse:
    limit = refusal.limit
    of = "`" if groq else ""
    where = f"{of}{model}{of} in organization {of}org-emulated{of}"
    if groq:
        where += " service tier `on_demand`"
    kind = "requests" if limit.unit in ("requests", "images") else "tokens"
    numbers = f"Limit {refusal.bound}, Used {refusal.used}, Requested {refusal.requested}"
    match refusal.reason:
        case "growth":
            message = "Your traffic grew too fast. Reduce your request rate, then raise it slowly."
            return _openai_error(429, message, "rate_limit_error", "slow_down")
        case "too_large":
            numbers = f"Limit {refusal.bound}, Requested {refusal.requested}"
            message = f"Request too large for {where} on {_measured(limit)}: {numbers}."
            status = 413 if groq else 429
            return _openai_error(status, message, kind, "rate_limit_exceeded")
        case "used_up":
            message = (
                f"Rate limit reached for {where} on {_measured(limit)}: {numbers}. "
                f"Please try again in {duration(refusal.wait_ns)}."
            )
            return _openai_error(429, message, kind, "rate_limit_exceeded")


def _refused_by_azure(refusal: AccountRefusal) -> ErrorResponse:
    what = "call" if refusal.limit.unit == "requests" else "token"
    message = (
        "Requests to the ChatCompletions_Create Operation under Azure OpenAI API version "
        f"2024-10-21 have exceeded {what} rate limit of your current OpenAI S0 pricing tier. "
        f"Please retry after {math.ceil(refusal.wait_ns / 1e9)} seconds."
    )
    return ErrorResponse(429, {"error": {"code": "429", "message": message}})


def _of_bedrock(refusal: AccountRefusal) -> str:
    return _TOO_MANY_REQUESTS if refusal.limit.unit == "requests" else _TOO_MANY_TOKENS


def refused_in_openai(spec: AccountSpec, refusal: AccountRefusal, model: str) -> ErrorResponse:
    """Return the refusal of an account in OpenAI's dialect."""
    match spec.provider:
        case "azure":
            return _refused_by_azure(refusal)
        case "bedrock":
            return _openai_error(429, _of_bedrock(refusal), "rate_limit_error", "throttled")
    return _refused_by_openai(refusal, model, groq=spec.provider == "groq")


def refused_in_anthropic(spec: AccountSpec, refusal: AccountRefusal, model: str) -> ErrorResponse:
    """Return the refusal of an account in Anthropic's dialect."""
    unit = refusal.limit.unit
    measure = "input tokens" if unit == "uncached_input_tokens" else unit.replace("_", " ")
    if spec.provider == "bedrock":
        message = _of_bedrock(refusal)
    elif refusal.reason == "growth":
        message = "Your usage has risen too sharply. Raise it gradually (acceleration limit)."
    else:
        message = (
            "This request would exceed the rate limit for your organization of "
            f"{refusal.bound:,} {measure} per minute ({model})."
        )
    inner = {"type": "rate_limit_error", "message": message}
    return ErrorResponse(429, {"type": "error", "error": inner, "request_id": "req_emulated"})


def refused_in_bedrock(_: AccountSpec, refusal: AccountRefusal, __: str) -> ErrorResponse:
    """Return the refusal of an account in Bedrock's dialect."""
    headers = {"x-amzn-errortype": "ThrottlingException:http://aws"}
    return ErrorResponse(429, {"message": _of_bedrock(refusal)}, headers)


def retry_headers(spec: AccountSpec, refusal: AccountRefusal) -> dict[str, str]:
    """Return the headers with the time to retry, for providers that send one."""
    if spec.provider in ("bedrock", "gemini") or refusal.reason == "too_large":
        return {}
    seconds = {"retry-after": str(math.ceil(refusal.wait_ns / 1e9))}
    if spec.provider in ("openai", "azure"):
        seconds["retry-after-ms"] = str(math.ceil(refusal.wait_ns / 1e6))
    return seconds


_ADMIN_KEYS = ("sk-admin", "sk-ant-admin")


def check_admin_key(key: str | None) -> None:
    """Raise Refused 401 or 403, as a provider does for a key that is not an admin key."""
    if not key:
        raise Refused(401, "An admin API key is required.")
    if not key.startswith(_ADMIN_KEYS):
        raise Refused(403, "This API needs an admin key (sk-admin..., sk-ant-admin...).")


def _bounds(
    spec: AccountSpec, models: str, names: Mapping[tuple[str, float], str]
) -> dict[str, int]:
    """Return the bounds of a class of models, by an API's names for unit and seconds."""
    return {
        names[limit.unit, limit.window_s]: spec.bound_of(limit)
        for limit in spec.limits
        if limit.models == models and (limit.unit, limit.window_s) in names
    }


_OF_OPENAI = {
    ("requests", 60.0): "max_requests_per_1_minute",
    ("tokens", 60.0): "max_tokens_per_1_minute",
    ("images", 60.0): "max_images_per_1_minute",
    ("requests", float(DAY_S)): "max_requests_per_1_day",
}
_OF_ANTHROPIC = {
    ("requests", 60.0): "requests_per_minute",
    ("input_tokens", 60.0): "input_tokens_per_minute",
    ("uncached_input_tokens", 60.0): "input_tokens_per_minute_cache_aware",
    ("output_tokens", 60.0): "output_tokens_per_minute",
}
_LONGEST_PAGE = 1000


def _page_size(query: Mapping[str, str], default: int) -> int:
    given = query.get("limit", str(default))
    if not given.isdecimal() or not 1 <= int(given) <= _LONGEST_PAGE:
        raise Refused(400, f"limit: a whole number from 1 to {_LONGEST_PAGE}")
    return int(given)


def _classes(spec: AccountSpec) -> list[str]:
    return list(dict.fromkeys(limit.models for limit in spec.limits))


def _members(models: str, known: Iterable[str]) -> list[str]:
    """Return the models of a class: the known ones that match, and the class itself if it is one
    model."""
    probe = AccountLimit("requests", 0, models)
    found = [name for name in known if probe.binds(name)]
    return found if found or set(models) & set("*?[") else [models]


def openai_page(spec: AccountSpec, known: Iterable[str], query: Mapping[str, str]) -> Json:
    """Return a page of `organization/projects/{id}/rate_limits`: each model with its bounds."""
    bounds: dict[str, dict[str, int]] = {}
    known = tuple(known)
    for models in _classes(spec):
        found = _bounds(spec, models, _OF_OPENAI)
        for model in _members(models, known):
            of_model = bounds.setdefault(model, {})
            of_model |= {
                name: min(bound, of_model.get(name, bound)) for name, bound in found.items()
            }
    nothing = {"max_requests_per_1_minute": 0, "max_tokens_per_1_minute": 0}
    data = [
        {"object": "project.rate_limit", "id": f"rl-{model}", "model": model, **nothing, **of_model}
        for model, of_model in sorted(bounds.items())
    ]
    after, before = query.get("after", ""), query.get("before")
    later = [item for item in data if str(item["id"]) > after]
    if before is not None:
        later = [item for item in later if str(item["id"]) < before]
    return {"object": "list", **listing(later, _page_size(query, 100))}


def anthropic_page(
    spec: AccountSpec, known: Iterable[str], query: Mapping[str, str], workspace: str | None = None
) -> Json:
    """Return a page of `organizations/rate_limits`, or of a workspace's overrides."""
    known = tuple(known)
    share = 1.0
    if workspace is not None:
        if workspace not in spec.workspaces:
            raise Refused(404, f"Workspace {workspace} not found.")
        share = spec.workspaces[workspace]
    entries = [
        _entry(spec, models, _members(models, known), None if workspace is None else share)
        for models in _classes(spec)
    ]
    if (kind := query.get("group_type")) is not None:
        entries = [entry for entry in entries if entry["group_type"] == kind]
    if (model := query.get("model")) is not None:
        entries = [entry for entry in entries if model in entry["models"]]
        if not entries:
            raise Refused(404, f"No rate limits for model {model}.")
    start = query.get("page", "0")
    if not start.isdecimal():
        raise Refused(400, "page: not a cursor of this API")
    size = _page_size(query, _LONGEST_PAGE)
    end = int(start) + size
    page = str(end) if end < len(entries) else None
    return {"data": entries[int(start) : end], "next_page": page}


def _entry(spec: AccountSpec, models: str, members: list[str], share: float | None) -> Json:
    limits: list[dict[str, Any]] = []
    for name, bound in _bounds(spec, models, _OF_ANTHROPIC).items():
        if share is None:
            limits.append({"type": name, "value": bound})
        else:
            limits.append({"type": name, "value": int(bound * share), "org_limit": bound})
    return {
        "type": "rate_limit" if share is None else "workspace_rate_limit",
        "group_type": "model_group",
        "models": members,
        "limits": limits,
    }
