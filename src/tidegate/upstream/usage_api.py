"""Usage and cost APIs of the providers, read for one day: OpenAI's and Anthropic's.

Both need an admin key, which is no key for calls. Usage is grouped by model, costs by what they are
for; costs of no model are kept under their own names.

    https://platform.openai.com/docs/api-reference/usage
    https://platform.claude.com/docs/en/api/admin-api/usage-cost

Invariants: an answer is followed page by page to its end, within `MOST_PAGES`; the key goes to the
upstream's own base URL only.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Any, Literal, get_args
from urllib.parse import urlencode

from tidegate.errors import UpstreamGarbled, UpstreamRejected, UpstreamUnauthorized
from tidegate.policy.access import Access, Network
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
_MICROS_A_CENT = 10_000

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, repr=False)
class UsageAccount:
    """Whose usage is read. base_url: of the upstream, with OpenAI's version and without
    Anthropic's. key_variable: that has the key, for errors; the usual one if empty. network: the
    upstream's, such as its proxy."""

    provider: UsageProvider
    base_url: str
    admin_key: str
    key_variable: str = ""
    network: Network | None = None


async def usage_of_day(wire: RelayWire, account: UsageAccount, day: date) -> dict[str, UsageSum]:
    """What the provider counts and charges by model, on a day of UTC.

    Raises UpstreamError: UpstreamUnauthorized where the key is refused.
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
        # Such as "gpt-5-2025-08-07, cached input".
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
        named = str(row.get("model") or row.get("description") or "")
        costs[named] += _decimal(row.get("amount")) * _MICROS_A_CENT
    return _priced(sums, costs)


_WRITES = ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")


def _priced(sums: Mapping[str, UsageSum], costs: Mapping[str, Decimal]) -> dict[str, UsageSum]:
    """Sums with their costs, rounded once; a cost of no model stands alone."""
    found = dict(sums)
    for name, micros in costs.items():
        whole = int(micros.to_integral_value(ROUND_HALF_UP))
        found[name] = replace(found.get(name, UsageSum()), cost_micros=whole)
    return found


class _Reader:
    def __init__(self, wire: RelayWire, account: UsageAccount, day: date) -> None:
        begin = datetime.combine(day, time(), UTC)
        self.bounds = begin, begin + timedelta(days=1)
        self._wire = wire
        self._account = account

    async def rows(self, path: str, query: Mapping[str, Any]) -> Any:
        """The results of all buckets on all pages."""
        page: str | None = None
        for _ in range(MOST_PAGES):
            asked = query if page is None else {**query, "page": page}
            answer = await read_admin_page(self._wire, self._account, f"{path}?{urlencode(asked)}")
            for bucket in json_objects(answer.get("data")):
                for row in json_objects(bucket.get("results")):
                    yield row
            page = answer.get("next_page")
            if not answer.get("has_more") or not isinstance(page, str):
                return
        raise UpstreamGarbled(f"the usage API has more than {MOST_PAGES} pages")


async def read_admin_page(
    wire: RelayWire, account: UsageAccount, target: str, api: str = "usage API"
) -> Json:
    """One page of an API that needs an admin key; `target` is its path with its query, `api` its
    name in errors. Raises UpstreamError: UpstreamUnauthorized where the key is refused."""
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
    except ValueError:
        raise UpstreamGarbled(f"the {api} did not answer with JSON") from None
    if not isinstance(value, dict):
        raise UpstreamGarbled(f"the {api} did not answer with an object")
    return value


def json_objects(value: object) -> Iterable[Json]:
    """The objects of a list; nothing where it is none."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _part(row: Json, name: str) -> Json:
    value = row.get(name)
    return value if isinstance(value, dict) else {}


def _count(row: Json, name: str) -> int:
    value = row.get(name)
    return value if type(value) is int and value >= 0 else 0


def _decimal(value: object) -> Decimal:
    """An amount; OpenAI's costs are numbers or texts, Anthropic's are texts."""
    try:
        amount = Decimal(str(value if value is not None else 0))
    except InvalidOperation:
        raise UpstreamGarbled("the usage API has an amount that is no number") from None
    if not amount.is_finite():
        raise UpstreamGarbled("the usage API has an amount that is no number")
    return amount


def _rfc3339(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")
