"""Usage and cost APIs of OpenAI and Anthropic, from the emulator's own ledger.

    https://platform.openai.com/docs/api-reference/usage
    https://platform.claude.com/docs/en/api/admin-api/usage-cost

They count what the ledger bills, by the UTC day on which a call ended. Costs are exact, by the
public prices of that day, without rounding. Only an admin key is accepted; pages are by days.

Invariant: no number here comes from the gateway; costs are computed independently of its code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction

from aiohttp import web

from tidegate.emulator.dialect import Json, Refused
from tidegate.emulator.state import EmulatorState, LoggedCall
from tidegate.prices.rates import catalog

_OPENAI, _ANTHROPIC = "/v1/organization/", "/v1/organizations/"
_PATHS = (
    *(f"{_OPENAI}usage/completions", f"{_OPENAI}usage/embeddings", f"{_OPENAI}costs"),
    *(f"{_ANTHROPIC}usage_report/messages", f"{_ANTHROPIC}cost_report"),
)
ADMIN = "admin"  # text in an admin key, as in the providers' own
_MOST_DAYS = 31
_OPENAI_DAYS, _ANTHROPIC_DAYS = 7, 7
_MILLION = 1_000_000
_DIGITS = Decimal("1e-12")


def wants(request: web.BaseRequest) -> bool:
    return request.method == "GET" and request.path in _PATHS


def report(state: EmulatorState, request: web.BaseRequest) -> Json:
    """Return the answer to a request. Raises Refused."""
    name = request.path
    if name.startswith(_ANTHROPIC):
        _check_key(request.headers.get("x-api-key", ""))
        return _anthropic(state, request, costs=name.endswith("cost_report"))
    _check_key(request.headers.get("Authorization", "").removeprefix("Bearer "))
    if name.endswith("costs"):
        return _openai(state, request, _openai_costs)
    embeds = name.endswith("embeddings")
    return _openai(state, request, lambda calls: _openai_usage(calls, embeds=embeds))


def _check_key(key: str) -> None:
    if ADMIN not in key:
        raise Refused(403, "You have insufficient permissions for this operation: use an admin key")


@dataclass(frozen=True, slots=True)
class _Parts:
    """Tokens of a call by their prices."""

    fresh: int
    cached: int
    written: int
    output: int

    @classmethod
    def of(cls, call: LoggedCall) -> _Parts:
        cached = min(call.cached_tokens, call.input_tokens)
        written = min(call.cache_write_tokens, call.input_tokens - cached)
        fresh = call.input_tokens - cached - written
        return cls(fresh, cached, written, call.output_tokens)


def _billed(state: EmulatorState, dialect: str) -> dict[date, list[LoggedCall]]:
    """Return the billed calls by the day on which they ended."""
    days: dict[date, list[LoggedCall]] = {}
    for call in state.ledger.calls():
        billed = call.input_tokens or call.output_tokens
        if call.dialect == dialect and call.ended_ns is not None and billed:
            day = datetime.fromtimestamp(call.ended_ns / 1e9, UTC).date()
            days.setdefault(day, []).append(call)
    return days


def _by_model(calls: Iterable[LoggedCall]) -> Iterator[tuple[str, list[LoggedCall]]]:
    models: dict[str, list[LoggedCall]] = {}
    for call in calls:
        models.setdefault(call.model, []).append(call)
    yield from sorted(models.items())


def _dollars(provider: str, call: LoggedCall, day: date) -> dict[str, Fraction]:
    """Return the cost of a call by line; empty if no public price is known."""
    price = catalog().find(provider, call.model, day, call.tier)
    if price is None:
        return {}
    if price.long is not None and call.input_tokens > (price.above or 0):
        price = price.long
    parts = _Parts.of(call)
    usual = price.input
    lines = (
        ("input", parts.fresh, usual),
        ("cached input", parts.cached, usual if price.cached is None else price.cached),
        ("cache write", parts.written, usual if price.cache_write is None else price.cache_write),
        ("output", parts.output, price.output),
    )
    return {
        name: tokens * Fraction(str(amount)) / _MILLION
        for name, tokens, amount in lines
        if tokens and amount is not None
    }


def _lines(provider: str, calls: Iterable[LoggedCall], day: date) -> dict[str, Fraction]:
    sums: dict[str, Fraction] = {}
    for call in calls:
        for name, amount in _dollars(provider, call, day).items():
            sums[name] = sums.get(name, Fraction()) + amount
    return sums


def _decimal(amount: Fraction) -> Decimal:
    return (Decimal(amount.numerator) / Decimal(amount.denominator)).quantize(_DIGITS).normalize()


def _openai(
    state: EmulatorState,
    request: web.BaseRequest,
    results: Callable[[Mapping[date, Sequence[LoggedCall]]], Callable[[date], list[Json]]],
) -> Json:
    query = request.query
    begin = _moment(query.get("start_time", ""))
    end = _moment(query.get("end_time", "")) if "end_time" in query else datetime.now(UTC)
    of_day = results(_billed(state, "openai"))
    days, more = _days(begin, end, query.get("limit"), query.get("page"), _OPENAI_DAYS)
    return {
        "object": "page",
        "data": [
            {
                "object": "bucket",
                "start_time": _seconds(day),
                "end_time": _seconds(day + timedelta(days=1)),
                "results": of_day(day),
            }
            for day in days
        ],
        "has_more": more is not None,
        "next_page": more,
    }


def _openai_usage(
    calls: Mapping[date, Sequence[LoggedCall]], *, embeds: bool
) -> Callable[[date], list[Json]]:
    kind = "embeddings" if embeds else "completions"

    def of_day(day: date) -> list[Json]:
        counted = [call for call in calls.get(day, ()) if (call.method == "embed") == embeds]
        return [
            {
                "object": f"organization.usage.{kind}.result",
                "input_tokens": sum(call.input_tokens for call in of_model),
                "num_model_requests": len(of_model),
                "project_id": None,
                "model": model,
            }
            | ({} if embeds else _openai_tokens(of_model))
            for model, of_model in _by_model(counted)
        ]

    return of_day


def _openai_tokens(calls: Sequence[LoggedCall]) -> Json:
    parts = [_Parts.of(call) for call in calls]
    return {
        "output_tokens": sum(one.output for one in parts),
        "input_cached_tokens": sum(one.cached for one in parts),
        "input_cache_write_tokens": sum(one.written for one in parts),
        "batch": None,
    }


def _openai_costs(calls: Mapping[date, Sequence[LoggedCall]]) -> Callable[[date], list[Json]]:
    def of_day(day: date) -> list[Json]:
        return [
            {
                "object": "organization.costs.result",
                "amount": {"value": str(_decimal(amount)), "currency": "usd"},
                "line_item": f"{model}, {line}",
                "project_id": None,
            }
            for model, of_model in _by_model(calls.get(day, ()))
            for line, amount in _lines("openai", of_model, day).items()
        ]

    return of_day


def _anthropic(state: EmulatorState, request: web.BaseRequest, *, costs: bool) -> Json:
    query = request.query
    begin = _time(query.get("starting_at", ""))
    end = _time(query["ending_at"]) if "ending_at" in query else datetime.now(UTC)
    calls = _billed(state, "anthropic")
    days, more = _days(begin, end, query.get("limit"), query.get("page"), _ANTHROPIC_DAYS)
    results = _anthropic_costs if costs else _anthropic_usage
    return {
        "data": [
            {
                "starting_at": _midnight(day),
                "ending_at": _midnight(day + timedelta(days=1)),
                "results": results(day, calls.get(day, ())),
            }
            for day in days
        ],
        "has_more": more is not None,
        "next_page": more,
    }


def _anthropic_usage(_day: date, calls: Sequence[LoggedCall]) -> list[Json]:
    found = []
    for model, of_model in _by_model(calls):
        parts = [_Parts.of(call) for call in of_model]
        written = sum(one.written for one in parts)
        found.append(
            {
                "uncached_input_tokens": sum(one.fresh for one in parts),
                "cache_creation": {
                    "ephemeral_1h_input_tokens": 0,
                    "ephemeral_5m_input_tokens": written,
                },
                "cache_read_input_tokens": sum(one.cached for one in parts),
                "output_tokens": sum(one.output for one in parts),
                "server_tool_use": {"web_search_requests": 0},
                "api_key_id": None,
                "workspace_id": None,
                "model": model,
                "service_tier": None,
                "context_window": None,
            }
        )
    return found


def _anthropic_costs(day: date, calls: Sequence[LoggedCall]) -> list[Json]:
    return [
        {
            "currency": "USD",
            "amount": str(_decimal(amount * 100)),  # in cents
            "workspace_id": None,
            "description": f"{model} Usage - {line}",
            "cost_type": "tokens",
            "context_window": None,
            "model": model,
            "service_tier": "standard",
            "token_type": line,
        }
        for model, of_model in _by_model(calls)
        for line, amount in _lines("anthropic", of_model, day).items()
    ]


def _days(
    begin: datetime, end: datetime, limit: str | None, page: str | None, usual: int
) -> tuple[list[date], str | None]:
    """Return the days of a page, and the token of the next page."""
    if limit is not None and not limit.isdecimal():
        raise Refused(400, f"Invalid value for 'limit': {limit}")
    most = min(_MOST_DAYS, max(1, int(limit or usual)))
    first = begin.date()
    count = max(0, (end - timedelta(microseconds=1)).date().toordinal() - first.toordinal() + 1)
    if page is not None and not page.removeprefix("page_").isdecimal():
        raise Refused(400, f"Invalid value for 'page': {page}")
    offset = int((page or "page_0").removeprefix("page_"))
    days = [first + timedelta(days=place) for place in range(offset, min(count, offset + most))]
    return days, f"page_{offset + most}" if offset + most < count else None


def _moment(text: str) -> datetime:
    if not text.isdecimal():
        raise Refused(400, "Invalid value for 'start_time': a time in Unix seconds is expected")
    return datetime.fromtimestamp(int(text), UTC)


def _time(text: str) -> datetime:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise Refused(400, f"starting_at: not an RFC 3339 time: {text}") from None
    return at.astimezone(UTC)


def _seconds(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())


def _midnight(day: date) -> str:
    return f"{day:%Y-%m-%d}T00:00:00Z"
