"""Admin APIs of OpenAI and Anthropic: usage and costs of a day, and rate limits.

All need an admin key, which cannot make calls; a read-only key is enough. Usage is grouped by
model. Costs are grouped by what they are charged for: a cost of no model is kept under its own
name, except web searches, which are assigned to the models that made them. OpenAI lists the limits
of each model of a project separately, although some models share one; a limit of 0 means no limit
in that unit. Anthropic lists classes of models; a workspace lists only its overrides.

    https://platform.openai.com/docs/api-reference/usage
    https://platform.claude.com/docs/en/api/admin-api/usage-cost
    https://platform.openai.com/docs/api-reference/project-rate-limits
    https://platform.claude.com/docs/en/api/admin-api/rate-limits

Invariants: an answer is read page by page to its end, at most `MOST_PAGES` of usage and
`MOST_LIMIT_PAGES` of limits; the key is sent only to the given base URL.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Any, Literal, get_args
from urllib.parse import quote, urlencode

from tidegate.errors import ConfigError, UpstreamGarbled, UpstreamRejected, UpstreamUnauthorized
from tidegate.limiter import MAX_BOUND
from tidegate.policy.access import Access, Network
from tidegate.policy.format import can_be_limited
from tidegate.policy.imported import ModelClass, joined_class
from tidegate.prices.reconciliation import UsageSum
from tidegate.upstream.transport import RelayWire, Timeouts

UsageProvider = Literal["openai", "anthropic"]
USAGE_PROVIDERS: tuple[UsageProvider, ...] = get_args(UsageProvider)
ADMIN_KEYS: Mapping[UsageProvider, str] = {
    "openai": "OPENAI_ADMIN_KEY",
    "anthropic": "ANTHROPIC_ADMIN_KEY",
}
MOST_PAGES = 1_000
_PAGE_BYTES = 16_000_000
USAGE_TIMEOUTS = Timeouts(connect_ms=10_000, first_byte_ms=60_000, idle_ms=60_000, total_ms=120_000)
_MICROS_A_DOLLAR = 1_000_000
_MOST_AMOUNT = 10**12  # of dollars or cents on one line; a sum of some fits into the record
_MICROS_A_CENT = 10_000

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, repr=False)
class UsageAccount:
    """The account whose usage and limits are read.

    base_url: that of the upstream, with OpenAI's version segment and without Anthropic's.
    key_variable: the variable that holds the key, for error messages; empty for the usual one.
    network: that of the upstream, such as its proxy.
    """

    provider: UsageProvider
    base_url: str
    admin_key: str
    key_variable: str = ""
    network: Network | None = None


async def usage_of_day(wire: RelayWire, account: UsageAccount, day: date) -> dict[str, UsageSum]:
    """Return the usage and costs that the provider reports for a UTC day, by model.

    Raises UpstreamError, and its subclass UpstreamUnauthorized if the key is rejected.
    """
    read = _Reader(wire, account, day)
    if account.provider == "openai":
        return await _openai(read)
    return await _anthropic(read)


async def _openai(read: _Reader) -> dict[str, UsageSum]:
    begin, end = read.bounds
    span = {"start_time": int(begin.timestamp()), "end_time": int(end.timestamp())}
    query = {**span, "bucket_width": "1d", "limit": 31}
    sums: defaultdict[str, UsageSum] = defaultdict(UsageSum)
    for kind in ("completions", "embeddings"):
        path = f"/organization/usage/{kind}"
        async for row in read.rows(path, {**query, "group_by": "model"}):
            name = str(row.get("model") or "")
            sums[name] = sums[name].plus(
                UsageSum(
                    requests=_count(row, "num_model_requests"),
                    input_tokens=_count(row, "input_tokens"),
                    cached_tokens=_count(row, "input_cached_tokens"),
                    cache_write_tokens=_count(row, "input_cache_write_tokens"),
                    output_tokens=_count(row, "output_tokens"),
                )
            )
    costs: defaultdict[str, Decimal] = defaultdict(Decimal)
    async for row in read.rows("/organization/costs", {**query, "group_by": "line_item"}):
        amount = row.get("amount")
        value = amount.get("value") if isinstance(amount, dict) else None
        # For example "gpt-5-2025-08-07, cached input".
        named = str(row.get("line_item") or "").partition(",")[0].strip()
        costs[named] += _decimal(value) * _MICROS_A_DOLLAR
    return _priced(sums, costs)


async def _anthropic(read: _Reader) -> dict[str, UsageSum]:
    begin, end = read.bounds
    span = {"starting_at": _rfc3339(begin), "ending_at": _rfc3339(end)}
    query = {**span, "bucket_width": "1d", "limit": 31}
    sums: defaultdict[str, UsageSum] = defaultdict(UsageSum)
    path = "/v1/organizations/usage_report/messages"
    async for row in read.rows(path, {**query, "group_by[]": "model"}):
        cached = _count(row, "cache_read_input_tokens")
        written = sum(_count(_part(row, "cache_creation"), name) for name in _WRITES)
        name = str(row.get("model") or "")
        sums[name] = sums[name].plus(
            UsageSum(
                requests=None,  # not in this report
                input_tokens=_count(row, "uncached_input_tokens") + cached + written,
                cached_tokens=cached,
                cache_write_tokens=written,
                output_tokens=_count(row, "output_tokens"),
                searches=_count(_part(row, "server_tool_use"), "web_search_requests"),
            )
        )
    costs: defaultdict[str, Decimal] = defaultdict(Decimal)
    path = "/v1/organizations/cost_report"
    async for row in read.rows(path, {**query, "group_by[]": "description"}):
        amount = _decimal(row.get("amount")) * _MICROS_A_CENT
        for named, share in _whose(row, sums):
            costs[named] += amount * share
    return _priced(sums, costs)


def _whose(row: Json, sums: Mapping[str, UsageSum]) -> list[tuple[str, Decimal]]:
    """Return the models that a cost belongs to, and the fraction of it for each.

    The price of a web search is the same for all models and its cost names none: it is divided
    among the models by their numbers of searches.
    """
    searches = sum(one.searches for one in sums.values())
    if row.get("model") or row.get("cost_type") != "web_search" or not searches:
        return [(str(row.get("model") or row.get("description") or ""), Decimal(1))]
    return [(name, Decimal(one.searches) / searches) for name, one in sums.items() if one.searches]


_WRITES = ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")


def _priced(sums: Mapping[str, UsageSum], costs: Mapping[str, Decimal]) -> dict[str, UsageSum]:
    """Return the sums with their costs, each rounded once. A cost that belongs to no model gets an
    entry of its own, and so does the cost of a model whose usage another API counts (images,
    speech)."""
    found, alone = dict(sums), UsageSum(requests=None, is_counted=False)
    for name, micros in costs.items():
        whole = int(micros.to_integral_value(ROUND_HALF_UP))
        found[name] = replace(found.get(name, alone), cost_micros=whole)
    return found


class _Reader:
    def __init__(self, wire: RelayWire, account: UsageAccount, day: date) -> None:
        begin = datetime.combine(day, time(), UTC)
        self.bounds = begin, begin + timedelta(days=1)
        self._wire = wire
        self._account = account

    async def rows(self, path: str, query: Mapping[str, Any]) -> Any:
        """Yield the results of all buckets on all pages."""
        page: str | None = None
        for _ in range(MOST_PAGES):
            params = query if page is None else {**query, "page": page}
            answer = await read_admin_page(self._wire, self._account, f"{path}?{urlencode(params)}")
            for bucket in _entries(answer, "usage API"):
                for row in json_objects(bucket.get("results")):
                    yield row
            before, page = page, answer.get("next_page")
            if not answer.get("has_more"):
                return
            if not isinstance(page, str):
                raise UpstreamGarbled("the usage API has more pages and does not name the next")
            if page == before:
                raise UpstreamGarbled("the usage API names one page twice")
        raise UpstreamGarbled(f"the usage API has more than {MOST_PAGES} pages")


async def read_admin_page(
    wire: RelayWire, account: UsageAccount, target: str, api: str = "usage API"
) -> Json:
    """Return one page of an API that needs an admin key.

    target: path and query. api: the API's name in error messages. Raises UpstreamError, and its
    subclass UpstreamUnauthorized if the key is rejected.
    """
    key = account.admin_key.encode()
    headers = [(b"accept", b"application/json")]
    if account.provider == "openai":
        headers.append((b"authorization", b"Bearer " + key))
    else:
        headers += [(b"x-api-key", key), (b"anthropic-version", b"2023-06-01")]
    place = wire.place(account.base_url + target, Access(account.base_url, network=account.network))
    exchange = await wire.open("GET", place, headers, None, None, USAGE_TIMEOUTS)
    try:
        body = await exchange.read(_PAGE_BYTES)
    finally:
        exchange.close()
    if exchange.status in (401, 403):
        variable = account.key_variable or ADMIN_KEYS[account.provider]
        raise UpstreamUnauthorized(
            f"the {api} refuses the key (HTTP {exchange.status}): "
            f"{variable} must be an admin key that may read it",
            status=exchange.status,
        )
    if exchange.status != 200:
        raise UpstreamRejected(f"the {api} answered HTTP {exchange.status}", status=exchange.status)
    try:
        value = json.loads(body, parse_float=Decimal)
    except (ValueError, RecursionError):
        raise UpstreamGarbled(f"the {api} did not answer with JSON") from None
    if not isinstance(value, dict):
        raise UpstreamGarbled(f"the {api} did not answer with an object")
    return value


def json_objects(value: object) -> Iterable[Json]:
    """Return the objects in a list; empty if `value` is not a list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _entries(answer: Json, api: str) -> Iterable[Json]:
    """Return the entries of a page. Raises UpstreamGarbled if it has no list: limits that are
    missing from the list are removed, so that a missing list must not read as an empty one."""
    if not isinstance(answer.get("data"), list):
        raise UpstreamGarbled(f"the {api} did not answer with a list")
    return json_objects(answer["data"])


def _part(row: Json, name: str) -> Json:
    value = row.get(name)
    return value if isinstance(value, dict) else {}


def _count(row: Json, name: str) -> int:
    value = row.get(name)
    return value if type(value) is int and value >= 0 else 0


def _decimal(value: object) -> Decimal:
    """Return an amount as a Decimal: OpenAI's costs are numbers or strings, Anthropic's are
    strings."""
    try:
        amount = Decimal(str(value if value is not None else 0))
    except InvalidOperation:
        raise UpstreamGarbled("the usage API has an amount that is not a number") from None
    if not (amount.is_finite() and abs(amount) <= _MOST_AMOUNT):
        raise UpstreamGarbled("the usage API has an amount that is not a number")
    return amount


def _rfc3339(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")


MOST_LIMIT_PAGES = 100
_PAGE = 100
_API = "rate-limit API"
_OF_OPENAI: Mapping[str, str] = {
    "max_requests_per_1_minute": "rpm",
    "max_tokens_per_1_minute": "tpm",
    "max_images_per_1_minute": "ipm",
    "max_requests_per_1_day": "rpd",
}
_ALL_INPUT = "input_tokens_per_minute"
_UNCACHED_INPUT = "input_tokens_per_minute_cache_aware"
_OF_ANTHROPIC: Mapping[str, str] = {
    "requests_per_minute": "rpm",
    _ALL_INPUT: "itpm",
    _UNCACHED_INPUT: "itpm",
    "output_tokens_per_minute": "otpm",
}


@dataclass(frozen=True, slots=True)
class ReportedLimits:
    """The rate limits of an account. A class without bounds has the models that are not limited.

    skipped: names of the limits that a policy cannot express.
    """

    classes: tuple[ModelClass, ...]
    skipped: tuple[str, ...]


async def reported_limits(
    wire: RelayWire,
    account: UsageAccount,
    *,
    project: str | None = None,
    workspace: str | None = None,
) -> ReportedLimits:
    """Return all limits of an account; at OpenAI those of a project, by default the only one.

    Raises UpstreamError (UpstreamUnauthorized if the key is rejected), and ConfigError if the
    project or workspace does not exist, or if there are several projects and none is named.
    """
    if account.provider == "openai":
        return await _of_project(wire, account, project or await _only_project(wire, account))
    groups, skipped = await _of_organization(wire, account, "/v1/organizations/rate_limits")
    if workspace is not None:
        path = f"/v1/organizations/workspaces/{quote(workspace, safe='')}/rate_limits"
        with_name = ("--workspace", workspace)
        overrides, _ = await _of_organization(wire, account, path, with_name)
        groups = [_overridden(one, overrides) for one in groups]
    classes = [_class_of(models, bounds) for models, bounds in groups if models]
    return ReportedLimits(tuple(classes), skipped)


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
        if not can_be_limited(model):
            skipped[model] = None
            continue
        of_id = str(row.get("id") or model)
        known = {scope: bound for scope, bound in bounds.items() if bound}
        one = ModelClass((model,), known)
        classes[of_id] = joined_class(classes[of_id], one) if of_id in classes else one
    return ReportedLimits(tuple(classes.values()), tuple(skipped))


async def _only_project(wire: RelayWire, account: UsageAccount) -> str:
    names = [
        _text(row, "id")
        async for row in _rows(wire, account, "/organization/projects", {"limit": _PAGE}, None)
        if row.get("status", "active") == "active"
    ]
    if len(names) == 1:
        return names[0]
    known = ", ".join(names) or "the account has none"
    raise ConfigError("--project", "(not set)", f"must be a project: {known}")


_Group = tuple[tuple[str, ...], dict[str, int]]


async def _of_organization(
    wire: RelayWire, account: UsageAccount, path: str, named: tuple[str, str] | None = None
) -> tuple[list[_Group], tuple[str, ...]]:
    """Return the groups of models with their bounds by type, and the names of skipped groups."""
    found: list[_Group] = []
    skipped: dict[str, None] = {}
    async for row in _rows(wire, account, path, {"limit": _PAGE}, named):
        if row.get("group_type", "model_group") != "model_group":
            skipped[str(row["group_type"])] = None
            continue
        bounds: dict[str, int] = {}
        for limit in json_objects(row.get("limits")):
            kind = _text(limit, "type")
            if kind not in _OF_ANTHROPIC:
                skipped[kind] = None
            elif limit.get("value") is not None:
                bounds[kind] = _bound(limit, "value")
        models = _models(row)
        skipped |= {model: None for model in models if not can_be_limited(model)}
        found.append((tuple(model for model in models if can_be_limited(model)), bounds))
    return found, tuple(skipped)


def _overridden(group: _Group, overrides: Iterable[_Group]) -> _Group:
    """Return a group with a workspace's lower bounds. A higher bound is stored by the provider but
    not enforced. A bound of 0 means no bound, in both."""
    models, bounds = group
    lower = {kind: bound for kind, bound in bounds.items() if bound}
    for others, stated in overrides:
        if not set(models).isdisjoint(others):
            known = {kind: bound for kind, bound in stated.items() if bound}
            lower |= {kind: min(bound, lower.get(kind, bound)) for kind, bound in known.items()}
    return models, lower


def _class_of(models: tuple[str, ...], bounds: Mapping[str, int]) -> ModelClass:
    """Return a class of models with its limits by unit.

    Anthropic's preset counts `itpm` as uncached input. If only all input is limited, `itpm` counts
    all input; if both are limited, `itpm` counts all input and `uitpm` the uncached part.
    """
    known = {kind: bound for kind, bound in bounds.items() if bound}
    found = {_OF_ANTHROPIC[kind]: bound for kind, bound in known.items()}
    if _ALL_INPUT not in known:
        return ModelClass(models, found)
    if _UNCACHED_INPUT in known:
        found |= {"itpm": known[_ALL_INPUT], "uitpm": known[_UNCACHED_INPUT]}
    return ModelClass(models, found, {"itpm": "input_tokens"})


async def _rows(
    wire: RelayWire,
    account: UsageAccount,
    path: str,
    query: Mapping[str, Any],
    named: tuple[str, str] | None,
) -> AsyncIterator[dict[str, Any]]:
    """Yield the entries of all pages. named: the option and its value that a 404 refers to."""
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
        for row in _entries(answer, _API):
            yield row
        before = more
        # The cursors of Anthropic and of OpenAI.
        if answer.get("next_page"):
            more = {"page": answer["next_page"]}
        elif not answer.get("has_more"):
            return
        elif answer.get("last_id"):
            more = {"after": answer["last_id"]}
        else:
            raise UpstreamGarbled(f"the {_API} has more pages and does not name the next")
        if more == before:
            raise UpstreamGarbled(f"the {_API} names one page twice")
    raise UpstreamGarbled(f"the {_API} has more than {MOST_LIMIT_PAGES} pages")


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise UpstreamGarbled(f"the {_API} has an entry without {name}")
    return value


def _models(row: Mapping[str, Any]) -> Iterable[str]:
    models = row.get("models") or []
    if not isinstance(models, list) or not all(isinstance(one, str) for one in models):
        raise UpstreamGarbled(f"the {_API} has models that are not a list of names")
    return models


def _bound(row: Mapping[str, Any], name: str) -> int:
    """Return a bound; 0 for none. A number above `MAX_BOUND` means none: some APIs report "no
    limit" so."""
    value = row.get(name, 0)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UpstreamGarbled(f"the {_API} has a {name} that is not a whole number")
    return value if value <= MAX_BOUND else 0
