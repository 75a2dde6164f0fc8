"""Loads of a rehearsal: described streams of arrivals, and traces of calls. Pure.

A described load (TOML):

    lasts = "10m"
    [[arrivals]]
    tenant = "acme"
    kind = "text_only"
    per_minute = 120               # Poisson, unless `pattern` says otherwise
    duration_ms = { median = 800, p95 = 3000 }
    output_tokens = 300
    deadline_ms = 30_000
    [[arrivals]]
    tenant = "globex"
    pattern = "bursts"
    burst = 200
    every = "60s"
    duration_ms = 500

A trace (CSV with a header line, or JSON lines):

    time_ms,tenant,kind,model,duration_ms,input_tokens,output_tokens,priority,deadline_ms
    0,acme,text_only,gemini-2.5-flash,830,1200,300,0,30000

Further columns: `images`, `cached_tokens` and `cache_write_tokens` (parts of the input),
`max_output_tokens`, `cost_usd`, `key`, `subject` and `conversation` (for limits and budgets),
`gives_way` (true or false), and `tiers` of a job (`flex,batch`).

An amount is a number, `{ median, p95 }`, `{ lognormal = [median, sigma] }`, `{ uniform = [a, b]
}` or `{ percentiles = { 50 = 800, 90 = 2000 } }`, which is interpolated between its points.

Invariants: the same description and seed give the same trace; a trace is ordered by time from 0.
"""

from __future__ import annotations

import csv
import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, date, datetime, time, timedelta
from io import StringIO
from itertools import islice, pairwise
from random import Random
from typing import Any, Literal

from tidegate.call import DEFAULT_TENANT, Kind, Tier
from tidegate.errors import ConfigError
from tidegate.limiter import CallUse, Tokens, check_tenant
from tidegate.policy.format import KIND_NAMES, ms_of

MOST_CALLS = 500_000
MOST_MS = 31 * 86_400_000
_KNOWN = (
    *("time_ms", "tenant", "kind", "model", "duration_ms", "input_tokens", "output_tokens"),
    *("images", "priority", "deadline_ms", "cached_tokens", "cache_write_tokens"),
    *("max_output_tokens", "cost_usd", "key", "subject", "conversation", "gives_way"),
    "tiers",
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One call of a load.

    duration_ms: how long the provider takes. deadline_ms: the longest wait, None for any; of a job
    with `tiers`, when it is due. images: those that the call generates. cached_tokens,
    cache_write_tokens: parts of the input. max_output_tokens: the call's own bound. gives_way: the
    call gives way to a higher band if preemption is configured, as jobs and batch lines do. tiers:
    a job's tiers besides the usual one, such as `flex,batch`.
    """

    time_ms: float
    tenant: str = DEFAULT_TENANT
    kind: str = Kind.TEXT_ONLY.value
    model: str = ""
    duration_ms: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    images: int = 0
    priority: int = 0
    deadline_ms: int | None = None
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    max_output_tokens: int | None = None
    cost_usd: float = 0.0
    key: str | None = None
    subject: str | None = None
    conversation: str | None = None
    gives_way: bool = False
    tiers: str = ""

    @property
    def use(self) -> CallUse:
        """What the call uses of limits."""
        cached = min(self.cached_tokens, self.input_tokens)
        written = min(self.cache_write_tokens, self.input_tokens - cached)
        tokens = Tokens(self.input_tokens, self.output_tokens, cached, written)
        return CallUse(tokens, self.images, None, round(self.cost_usd * 1_000_000))


@dataclass(frozen=True, slots=True)
class TokenPace:
    """The pace that gives the duration of a call of which only the tokens are known."""

    first_ms: float = 400.0
    tokens_per_s: float = 150.0

    def duration_ms(self, output_tokens: int) -> float:
        return self.first_ms + output_tokens / self.tokens_per_s * 1000


@dataclass(frozen=True, slots=True)
class Usual:
    """Defaults of a trace: the model of each kind, and the pace of tokens."""

    models: Mapping[str, str]
    pace: TokenPace

    def arrival(self, place: str, row: Mapping[str, Any]) -> Arrival:
        """Return the call of one row. Raises ConfigError, which names `place` and the field."""
        unknown = [key for key in row if key not in _KNOWN]
        if unknown:
            raise ConfigError(
                f"{place}: {unknown[0]}", "", f"is not known; known: {', '.join(_KNOWN)}"
            )
        read = _Row(place, row)
        tenant, kind = read.text("tenant", DEFAULT_TENANT), read.text("kind", Kind.TEXT_ONLY.value)
        try:
            check_tenant(tenant)
        except ConfigError as invalid:
            raise ConfigError(f"{place}: tenant", tenant, invalid.allowed) from None
        if kind not in KIND_NAMES:
            raise ConfigError(f"{place}: kind", kind, f"must be one of {', '.join(KIND_NAMES)}")
        output_tokens = round(read.number("output_tokens", 0.0))
        if not (read.has("duration_ms") or read.has("output_tokens")):
            raise ConfigError(f"{place}: duration_ms", "(not set)", "or output_tokens must be set")
        made = int(kind == Kind.IMAGE_GENERATION)
        return Arrival(
            time_ms=read.number("time_ms"),
            tenant=tenant,
            kind=kind,
            model=read.text("model", self.models.get(kind, "")),
            duration_ms=read.number("duration_ms", self.pace.duration_ms(output_tokens)),
            input_tokens=round(read.number("input_tokens", 0.0)),
            output_tokens=output_tokens,
            images=round(read.number("images", made)),
            priority=round(read.number("priority", 0.0, low=-100, high=100)),
            deadline_ms=read.whole("deadline_ms"),
            cached_tokens=round(read.number("cached_tokens", 0.0)),
            cache_write_tokens=round(read.number("cache_write_tokens", 0.0)),
            max_output_tokens=read.whole("max_output_tokens"),
            cost_usd=read.number("cost_usd", 0.0),
            key=read.text("key", "") or None,
            subject=read.text("subject", "") or None,
            conversation=read.text("conversation", "") or None,
            gives_way=read.flag("gives_way"),
            tiers=read.tiers("tiers"),
        )


@dataclass(frozen=True, slots=True)
class _Row:
    place: str
    row: Mapping[str, Any]

    def has(self, name: str) -> bool:
        return self.row.get(name) not in (None, "")

    def whole(self, name: str) -> int | None:
        return round(self.number(name)) if self.has(name) else None

    def tiers(self, name: str) -> str:
        value = self.row[name] if self.has(name) else ""
        each = [one.strip() for one in value.split(",")] if isinstance(value, str) else value
        if not isinstance(each, list) or not set(map(str, each)) <= {"", *Tier}:
            allowed = f"must be a list of {', '.join(Tier)}"
            raise ConfigError(f"{self.place}: {name}", str(value), allowed)
        return ",".join(tier for tier in Tier if tier in each and tier is not Tier.LIVE)

    def flag(self, name: str) -> bool:
        value = self.text(name, "false").lower()
        if value not in ("true", "false"):
            raise ConfigError(f"{self.place}: {name}", value, "must be true or false")
        return value == "true"

    def text(self, name: str, usual: str) -> str:
        return str(self.row[name]) if self.has(name) else usual

    def number(
        self, name: str, usual: float | None = None, *, low: float = 0, high: float = MOST_MS
    ) -> float:
        value = self.row[name] if self.has(name) else usual
        allowed = f"must be a number from {low:g} to {high:.0f}"
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            text = "(not set)" if value is None else str(value)
            raise ConfigError(f"{self.place}: {name}", text, allowed) from None
        if not low <= number <= high:  # also false for NaN
            raise ConfigError(f"{self.place}: {name}", str(value), allowed)
        return number


def read_trace(name: str, text: str, usual: Usual) -> list[Arrival]:
    """Return the arrivals in a file called `name`, ordered by time, the first at 0.

    The text is JSON lines if it begins with `{`, else CSV. Raises ConfigError with the file, the
    line and the field.
    """
    rows = _json_rows(name, text) if text.lstrip().startswith("{") else _csv_rows(text)
    found: list[Arrival] = []
    for line, row in rows:
        if len(found) >= MOST_CALLS:
            raise ConfigError(name, f"(more than {MOST_CALLS} calls)", "is too long")
        found.append(usual.arrival(f"{name}: line {line}", row))
    if not found:
        raise ConfigError(name, None, "must hold at least one call")
    return from_zero(found)


def from_zero(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """Return the arrivals ordered by time, the first at 0."""
    found = sorted(arrivals, key=lambda arrival: arrival.time_ms)
    first_ms = found[0].time_ms if found else 0.0
    return [replace(arrival, time_ms=arrival.time_ms - first_ms) for arrival in found]


def multiplied(arrivals: Sequence[Arrival], times: float, seed: int) -> list[Arrival]:
    """Return `times` as many calls in the same time.

    Copies of a call are spread evenly up to its tenant's next call; a fraction of a copy is made by
    chance, by `seed`. Raises ConfigError for more than MOST_CALLS.
    """
    if times == 1.0:
        return list(arrivals)
    if len(arrivals) * times > MOST_CALLS:
        raise ConfigError("times", f"{times:g}", f"must result in at most {MOST_CALLS} calls")
    chance, found = Random(f"{seed} times"), list[Arrival]()
    by_tenant: dict[str, list[Arrival]] = {}
    for one in arrivals:
        by_tenant.setdefault(one.tenant, []).append(one)
    for calls in by_tenant.values():
        gaps_ms = [after.time_ms - one.time_ms for one, after in pairwise(calls)]
        for one, gap_ms in zip(calls, [*gaps_ms, *(gaps_ms[-1:] or [0.0])], strict=True):
            copies = math.floor(times) + (chance.random() < times % 1)
            found += (
                replace(one, time_ms=one.time_ms + gap_ms * number / copies)
                for number in range(copies)
            )
    return sorted(found or arrivals[:1], key=lambda one: one.time_ms)


def write_trace(arrivals: Iterable[Arrival]) -> str:
    """Return the arrivals as CSV that `read_trace` accepts."""
    text = StringIO()
    names = [one.name for one in fields(Arrival)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for arrival in arrivals:
        values = [getattr(arrival, name) for name in names]
        places = (9 if name == "cost_usd" else 3 for name in names)  # calls cost fractions of cents
        writer.writerow(
            f"{value:.{digits}f}" if isinstance(value, float) else value
            for value, digits in zip(values, places, strict=True)
        )
    return text.getvalue()


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(StringIO(text), restkey="(too many values)")
    for row in reader:
        yield reader.line_num, row


def _json_rows(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ConfigError(f"{name}: line {number}", line[:40], "must be a JSON object")
        yield number, row


MOST = 1e9
# The 95th percentile of a normal distribution, in standard deviations.
_P95_SIGMAS = 1.6448536269514722
_ALLOWED = (
    "must be a number, { median = .., p95 = .. }, { lognormal = [median, sigma] }, "
    "{ uniform = [low, high] } or { percentiles = { 50 = .., 95 = .. } }"
)


@dataclass(frozen=True, slots=True)
class Amount:
    """A distribution of an amount.

    points: the value of a constant; median and sigma of `lognormal`; both ends of `uniform`; of
    `percentiles` alternating shares from 0 to 1 and values.
    """

    shape: Literal["constant", "lognormal", "uniform", "percentiles"]
    points: tuple[float, ...]

    def draw(self, chance: Random) -> float:
        """Draw one amount, never below 0."""
        if self.shape == "constant":
            return self.points[0]
        if self.shape == "lognormal":
            median, sigma = self.points
            return min(MOST, median * math.exp(chance.gauss(0.0, sigma)))
        if self.shape == "uniform":
            return chance.uniform(*self.points)
        return self._between(chance.random())

    def _between(self, share: float) -> float:
        shares, values = self.points[::2], self.points[1::2]
        at = bisect_left(shares, share)
        if at == 0:
            # Below the lowest known percentile, interpolate from 0.
            return values[0] * share / shares[0] if shares[0] else values[0]
        if at == len(shares):
            return values[-1]
        low, high = shares[at - 1], shares[at]
        return values[at - 1] + (values[at] - values[at - 1]) * (share - low) / (high - low)


def constant(value: float) -> Amount:
    return Amount("constant", (value,))


def amount_of(path: str, value: Any) -> Amount:
    """Return the amount that a TOML value describes. Raises ConfigError with `path`."""
    if _is_number(value):
        return constant(_number(path, value))
    if not isinstance(value, Mapping):
        raise ConfigError(path, str(value), _ALLOWED)
    if set(value) == {"median", "p95"}:
        median, p95 = _number(path, value["median"]), _number(path, value["p95"])
        if not 0 < median <= p95:
            raise ConfigError(
                path, str(dict(value)), "p95 must be at least the median, which is > 0"
            )
        return Amount("lognormal", (median, math.log(p95 / median) / _P95_SIGMAS))
    if len(value) == 1:
        [(shape, given)] = value.items()
        if shape in ("lognormal", "uniform") and isinstance(given, list) and len(given) == 2:
            first, second = _number(path, given[0]), _number(path, given[1])
            if shape == "lognormal" and second > 10:
                raise ConfigError(path, str(given), "its sigma must be at most 10")
            if shape == "uniform" and first > second:
                raise ConfigError(path, str(given), "the lower end comes first")
            return Amount("lognormal" if shape == "lognormal" else "uniform", (first, second))
        if shape == "percentiles" and isinstance(given, Mapping) and given:
            return _percentiles(path, given)
    raise ConfigError(path, str(dict(value)), _ALLOWED)


def _percentiles(path: str, given: Mapping[str, Any]) -> Amount:
    try:
        known = sorted((float(percent) / 100, _number(path, at)) for percent, at in given.items())
    except ValueError:
        raise ConfigError(path, str(dict(given)), "percentiles are numbers, 0 to 100") from None
    values = [value for _, value in known]
    if not all(0 <= share <= 1 for share, _ in known) or values != sorted(values):
        allowed = "percentiles are from 0 to 100, and their values do not fall"
        raise ConfigError(path, str(dict(given)), allowed)
    return Amount("percentiles", tuple(number for pair in known for number in pair))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(path: str, value: Any) -> float:
    if not _is_number(value) or not 0 <= value <= MOST:
        raise ConfigError(path, str(value), f"must be a number from 0 to {MOST:.0e}")
    return float(value)


_RATES_S = {"per_second": 1.0, "per_minute": 60.0, "per_hour": 3600.0}
_AMOUNTS = ("duration_ms", "input_tokens", "output_tokens", "deadline_ms", "cost_usd")
_PLAIN = (
    *("tenant", "kind", "model", "images", "priority", "key", "subject", "conversation"),
    *("gives_way", "tiers"),
)
_KEYS = (*_PLAIN, *_AMOUNTS, *_RATES_S, "pattern", "burst", "every", "from", "until")
_PATTERNS = ("poisson", "constant", "bursts")


@dataclass(frozen=True, slots=True)
class Stream:
    """One table of a load: times of arrival, constant fields, and fields drawn for each call."""

    moments: Callable[[Random], Iterator[float]]
    same: Mapping[str, Any]
    drawn: Mapping[str, Amount]


@dataclass(frozen=True, slots=True)
class Load:
    """A described load: streams of calls for `lasts_ms`."""

    lasts_ms: float
    streams: tuple[Stream, ...]

    def draw(self, usual: Usual, seed: int) -> list[Arrival]:
        """Draw a trace. Raises ConfigError for an invalid call."""
        found: list[Arrival] = []
        for number, stream in enumerate(self.streams):
            room = MOST_CALLS - len(found)
            moments = list(islice(stream.moments(Random(f"{seed} {number} when")), room + 1))
            if len(moments) > room:
                raise ConfigError("arrivals", f"(more than {MOST_CALLS} calls)", "is too much")
            chance = Random(f"{seed} {number}")
            for at_ms in moments:
                drawn = {name: amount.draw(chance) for name, amount in stream.drawn.items()}
                row = {**stream.same, **drawn, "time_ms": at_ms}
                found.append(usual.arrival(f"arrivals[{number}]", row))
        if not found:
            raise ConfigError("arrivals", None, "must have at least one call in that time")
        return from_zero(found)


def load_of(described: Mapping[str, Any]) -> Load:
    """Return the load that TOML describes. Raises ConfigError with the path of the key."""
    _check_keys("", described, ("lasts", "arrivals", "budgets"))
    lasts_ms = span_ms("lasts", described.get("lasts", "10m"))
    tables = described.get("arrivals")
    if not isinstance(tables, list) or not tables:
        raise ConfigError("arrivals", "(not set)", "must be one or more tables, [[arrivals]]")
    streams = [_stream(f"arrivals[{n}]", table, lasts_ms) for n, table in enumerate(tables)]
    return Load(lasts_ms, tuple(streams))


def span_ms(path: str, text: object) -> float:
    """Return `30s`, `10m` or `2h` in ms; a bare number is in seconds. Raises ConfigError."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        text = f"{text}s"
    found_ms = ms_of(text) if isinstance(text, str) else None
    if found_ms is None or found_ms > MOST_MS:
        raise ConfigError(path, str(text), "must be a number and ms, s, m, h or d, such as 10m")
    return found_ms


_DAY = re.compile(r"(\d{4}-\d{2}-\d{2})(?:T(\d{1,2})(?:-(\d{1,2}))?)?", re.ASCII)


def record_span(path: str, text: str, now: datetime) -> tuple[datetime, datetime]:
    """Return the span that a text names.

    `1h`: the hour before `now`. `2026-11-24`: that day, UTC. `2026-11-24T09`: an hour of that day.
    `2026-11-24T09-17`: from nine to five. Raises ConfigError.
    """
    found = _DAY.fullmatch(text)
    if found is None:
        return now - timedelta(milliseconds=span_ms(path, text)), now
    written, first, last = found.groups()
    try:
        day = datetime.combine(date.fromisoformat(written), time(), UTC)
    except ValueError:
        raise ConfigError(path, text, "must be an existing day, such as 2026-11-24") from None
    begin = int(first or 0)
    end = int(last) if last else begin + 1 if first else 24
    if not 0 <= begin < end <= 24:
        raise ConfigError(path, text, "must be hours from 0 to 24, such as 2026-11-24T09-17")
    return day + timedelta(hours=begin), day + timedelta(hours=end)


def table_in(path: str, table: object) -> Mapping[str, Any]:
    if not isinstance(table, Mapping):
        raise ConfigError(path, str(table), "must be a table")
    return table


def _stream(path: str, given: object, lasts_ms: float) -> Stream:
    table = table_in(path, given)
    _check_keys(path, table, _KEYS)
    begin_ms = span_ms(f"{path}.from", table.get("from", 0))
    end_ms = min(lasts_ms, span_ms(f"{path}.until", table.get("until", lasts_ms / 1000)))
    drawn = {name: amount_of(f"{path}.{name}", table[name]) for name in _AMOUNTS if name in table}
    if "duration_ms" not in drawn and "output_tokens" not in drawn:
        raise ConfigError(f"{path}.duration_ms", "(not set)", "or output_tokens must be set")
    return Stream(
        _moments(path, table, begin_ms, end_ms),
        {name: table[name] for name in _PLAIN if name in table},
        drawn,
    )


def _moments(
    path: str, table: Mapping[str, Any], begin_ms: float, end_ms: float
) -> Callable[[Random], Iterator[float]]:
    pattern = table.get("pattern", "poisson")
    if pattern not in _PATTERNS:
        raise ConfigError(f"{path}.pattern", str(pattern), f"must be one of {', '.join(_PATTERNS)}")
    if pattern == "bursts":
        if "burst" not in table or "every" not in table:
            raise ConfigError(f"{path}.burst", "(not set)", "bursts need burst and every")
        many = amount_of(f"{path}.burst", table["burst"])
        every_ms = span_ms(f"{path}.every", table["every"])
        if every_ms <= 0:
            raise ConfigError(f"{path}.every", str(table["every"]), "must be more than 0")
        return lambda chance: _bursts(begin_ms, end_ms, every_ms, many, chance)
    gap_ms = _gap_ms(path, table)
    if pattern == "constant":
        return lambda chance: _spaced(begin_ms, end_ms, lambda: gap_ms)
    return lambda chance: _spaced(begin_ms, end_ms, lambda: chance.expovariate(1 / gap_ms))


def _gap_ms(path: str, table: Mapping[str, Any]) -> float:
    given = [name for name in _RATES_S if name in table]
    if len(given) != 1:
        allowed = f'set one of {", ".join(_RATES_S)}, or pattern = "bursts"'
        raise ConfigError(f"{path}.per_minute", ", ".join(given) or "(not set)", allowed)
    [name] = given
    rate = amount_of(f"{path}.{name}", table[name])
    if rate.shape != "constant" or rate.points[0] <= 0:
        raise ConfigError(f"{path}.{name}", str(table[name]), "must be a number more than 0")
    return _RATES_S[name] * 1000 / rate.points[0]


def _spaced(begin_ms: float, end_ms: float, gap_ms: Callable[[], float]) -> Iterator[float]:
    at_ms = begin_ms + gap_ms()
    while at_ms < end_ms:
        yield at_ms
        at_ms += gap_ms()


def _bursts(
    begin_ms: float, end_ms: float, every_ms: float, many: Amount, chance: Random
) -> Iterator[float]:
    at_ms = begin_ms
    while at_ms < end_ms:
        for _ in range(round(many.draw(chance))):
            yield at_ms
        at_ms += every_ms


def _check_keys(path: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            where = f"{path}.{key}" if path else str(key)
            raise ConfigError(where, str(table[key]), f"is not known; known: {', '.join(known)}")
