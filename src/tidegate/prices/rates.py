"""Prices of models, and the cost of a usage: whole micro-dollars, rounded once per call.

A `Price` is stated in USD as providers publish it: for a million tokens, a picture, a thousand
searches, a minute of audio. `Rates` are the same in whole picos, which makes sums exact. What has
no price of its own costs as the input or the output that it is a part of.

Public prices are in one TOML file per provider in `data/`. Each of its rows names its source and
date, and is what models cost from one day on; several rows of a model are its history, and a call
costs what its day says. A file is read once, when its provider is first asked for; after the first
time a lookup is one of a dictionary.

Invariants: a cost is never negative; the parts of an input or an output never come to more tokens
than it has; unknown usage or an unknown price makes the cost unknown, never zero; a model or a
day that no row covers has no price, never that of another.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import date
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from importlib import resources
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from tidegate.call import Usage, UsageDetails, tokens_of
from tidegate.errors import ConfigError

_PICOS = 10**12  # of a dollar
_MICRO = 10**6  # picos in a micro-dollar
_MOST_USD = 1_000_000
_SEARCHES = 1_000
# What providers call their usual tier, in their answers and in requests.
STANDARD_TIERS = frozenset(
    {"", "standard", "default", "auto", "on_demand", "standard_only", "unspecified"}
)


@dataclass(frozen=True, slots=True)
class PeakHours:
    """When a price is `share` times the usual one: on which days of the week, 1 is Monday, from
    which hour of UTC until which."""

    share: float
    hours: tuple[tuple[int, int], ...]
    days: frozenset[int]

    def holds(self, hour: int) -> bool:
        """In an hour, counted from the beginning of 1970, which was a Thursday."""
        day, of_day = divmod(hour, 24)
        return (day + 3) % 7 + 1 in self.days and any(a <= of_day < b for a, b in self.hours)


@dataclass(frozen=True, slots=True)
class Price:
    """In USD per million tokens; `image` per picture, `search` and `file_search` per thousand
    searches of the web and of stored files. None: not known.

    cache_write, cache_write_1h: input that is written to a cache, for an hour in the latter.
    input_audio to output_image: of the tokens of input and output that are audio or images.
    audio_minute: of a minute of audio in the input, where the provider reports its length; its
    tokens then cost nothing. characters: of a million characters that are spoken. video_second: of
    a second of video in the output.
    above, long: what an input of more than so many tokens costs, for all of the call.
    tiers: the price in other processing tiers than the usual one, such as `flex`.
    peak: the hours in which it is dearer.
    """

    input: float | None = None
    output: float | None = None
    cached: float | None = None
    image: float | None = None
    cache_write: float | None = None
    cache_write_1h: float | None = None
    input_audio: float | None = None
    input_image: float | None = None
    output_audio: float | None = None
    output_image: float | None = None
    audio_minute: float | None = None
    characters: float | None = None
    video_second: float | None = None
    search: float | None = None
    file_search: float | None = None
    above: int | None = None
    long: Price | None = None
    tiers: Mapping[str, Price] = field(default_factory=dict)
    peak: PeakHours | None = None

    def times(self, share: float) -> Price:
        """The same with every price but those of searches multiplied, also for long inputs."""
        scaled: dict[str, Any] = {name: _product(getattr(self, name), share) for name in _SCALED}
        return replace(self, **scaled, long=self.long and self.long.times(share), tiers={})

    def in_hour(self, hour: int | None) -> Price:
        """The price in an hour, as `PeakHours.holds` counts it; None: in the dearest one."""
        if self.peak is None or not (hour is None or self.peak.holds(hour)):
            return self
        return self.times(max(1.0, self.peak.share) if hour is None else self.peak.share)

    def of_tier(self, name: str) -> Price | None:
        """The price in a tier; None where the tier is known to have one of its own, but not
        which."""
        if name in STANDARD_TIERS:
            return self
        return self.tiers.get(name)


AMOUNTS = tuple(
    one.name for one in fields(Price) if one.name not in ("above", "long", "tiers", "peak")
)
_SCALED = tuple(name for name in AMOUNTS if name not in ("search", "file_search"))
_LONG, _TIERS, _SHARE, _ABOVE, _PEAK = "long_context", "tiers", "share", "above", "peak"
PRICE_KEYS = (*AMOUNTS, _LONG, _TIERS, _PEAK)


def price_of(path: str, table: Mapping[str, Any]) -> Price:
    """The price that a table states: its amounts, `long_context`, `tiers` and `peak`. Raises
    ConfigError, which names the key below `path`."""
    _check(path, table, PRICE_KEYS)
    price = Price(**_amounts(path, table), peak=_peak(path, table))
    if (long := _table(path, table, _LONG)) is not None:
        price = _with_long(f"{path}.{_LONG}", price, long)
    tiers = _table(path, table, _TIERS) or {}
    named = {str(name): _tier(f"{path}.{_TIERS}.{name}", price, tiers[name]) for name in tiers}
    return replace(price, tiers=named)


def _peak(path: str, table: Mapping[str, Any]) -> PeakHours | None:
    if (stated := _table(path, table, _PEAK)) is None:
        return None
    path = f"{path}.{_PEAK}"
    _check(path, stated, (_SHARE, "hours", "days"))
    if _SHARE not in stated:
        raise ConfigError(f"{path}.{_SHARE}", "(not set)", "must be set: 2 is twice the price")
    hours, days = stated.get("hours"), stated.get("days", [1, 2, 3, 4, 5, 6, 7])
    if not (isinstance(hours, list) and hours and all(map(_is_span, hours))):
        allowed = "must be a list of spans of hours of UTC, such as [[1, 4], [6, 10]]"
        raise ConfigError(f"{path}.hours", str(hours)[:100], allowed)
    if not (isinstance(days, list) and all(type(day) is int and 1 <= day <= 7 for day in days)):
        allowed = "must be a list of days of the week, 1 to 7; 1 is Monday"
        raise ConfigError(f"{path}.days", str(days)[:100], allowed)
    share = _amount(f"{path}.{_SHARE}", stated[_SHARE])
    return PeakHours(share, tuple((first, past) for first, past in hours), frozenset(days))


def _is_span(span: object) -> bool:
    if not (isinstance(span, list) and len(span) == 2):
        return False
    first, past = span
    return type(first) is type(past) is int and 0 <= first < past <= 24


def _with_long(path: str, price: Price, table: Mapping[str, Any]) -> Price:
    _check(path, table, (_ABOVE, *AMOUNTS))
    above = table.get(_ABOVE)
    if isinstance(above, bool) or not isinstance(above, int) or above < 1:
        raise ConfigError(f"{path}.{_ABOVE}", str(above), "must be a number of tokens, 1 or more")
    usual: dict[str, Any] = {name: getattr(price, name) for name in AMOUNTS}
    return replace(price, above=above, long=Price(**usual | _amounts(path, table)))


def _tier(path: str, price: Price, table: object) -> Price:
    """By a `share` of the usual price, or with prices of its own."""
    if not isinstance(table, Mapping):
        raise ConfigError(path, str(table)[:100], "must be a table, such as { share = 0.5 }")
    if _SHARE in table:
        _check(path, table, (_SHARE,))
        return price.times(_amount(f"{path}.{_SHARE}", table[_SHARE]))
    _check(path, table, (*AMOUNTS, _LONG))
    same = {"search": price.search, "file_search": price.file_search}
    tier = Price(**(same | _amounts(path, table)), peak=price.peak)
    if (long := _table(path, table, _LONG)) is not None:
        return _with_long(f"{path}.{_LONG}", tier, long)
    if price.long is not None:
        allowed = "must be set: the model has a price of its own for long inputs"
        raise ConfigError(f"{path}.{_LONG}", "(not set)", allowed)
    return tier


def _check(path: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key, amount in table.items():
        if key not in known:
            raise ConfigError(f"{path}.{key}", str(amount)[:100], f"known: {', '.join(known)}")


def _table(path: str, table: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    found = table.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise ConfigError(f"{path}.{name}", str(found)[:100], "must be a table")
    return found


def _amounts(path: str, table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _amount(f"{path}.{name}", table[name]) for name in AMOUNTS if name in table}


def _amount(path: str, amount: object) -> float:
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise ConfigError(path, str(amount)[:100], "must be an amount of money, 0 or more")
    if not 0 <= amount <= _MOST_USD:
        raise ConfigError(path, str(amount), "must be an amount of money, 0 or more")
    return float(amount)


def _product(amount: float | None, share: float) -> float | None:
    # By their decimal digits: 0.1 means a tenth.
    return None if amount is None else float(Decimal(repr(amount)) * Decimal(repr(share)))


@dataclass(frozen=True, slots=True)
class Rates:
    """A price in picos (10^-12) of a dollar for one token, picture, search, character or second of
    audio or video.

    above, long: for all of a call whose input has more tokens than that.
    """

    input: int | None
    output: int | None
    cached: int | None
    image: int | None
    cache_write: int | None
    cache_write_1h: int | None
    input_audio: int | None
    input_image: int | None
    output_audio: int | None
    output_image: int | None
    audio_second: int | None
    character: int | None
    video_second: int | None
    search: int | None
    file_search: int | None
    above: int | None = None
    long: Rates | None = None

    @classmethod
    def of(cls, price: Price, *, is_public: bool = False) -> Rates:
        """A price that states none for searches leaves them out; of a public one, whose call may
        cost more for them, the cost of such a call is then unknown."""
        search, files = price.search, price.file_search
        if not is_public:
            search, files = search or 0, files or 0
        written = _first(price.cache_write, price.input)
        return cls(
            input=_per_token(price.input),
            output=_per_token(price.output),
            cached=_per_token(_first(price.cached, price.input)),
            image=_picos(price.image, _PICOS),
            cache_write=_per_token(written),
            cache_write_1h=_per_token(_first(price.cache_write_1h, written)),
            input_audio=_per_token(_first(price.input_audio, price.input)),
            input_image=_per_token(_first(price.input_image, price.input)),
            output_audio=_per_token(_first(price.output_audio, price.output)),
            output_image=_per_token(_first(price.output_image, price.output)),
            audio_second=_picos(price.audio_minute, Decimal(_PICOS) / 60),
            character=_per_token(price.characters),
            video_second=_picos(price.video_second, _PICOS),
            search=_picos(search, _PICOS // _SEARCHES),
            file_search=_picos(files, _PICOS // _SEARCHES),
            above=price.above,
            long=None if price.long is None else cls.of(price.long, is_public=is_public),
        )


def micros_by_measure(rates: Rates, details: UsageDetails | None) -> int | None:
    """The cost of a usage by a model that is not charged by tokens: by the characters that it
    speaks, the seconds that it hears or films, or the searches that it ranks. None by any other."""
    if details is None or rates.input is not None or rates.output is not None:
        return None
    for count, rate in (
        (details.input_characters, rates.character),
        (details.input_audio_seconds, rates.audio_second),
        (details.output_video_seconds, rates.video_second),
        (details.searches, rates.search),
    ):
        if count and rate:
            return micros_of(count * rate)
    return None


def cost_micros(rates: Rates | None, usage: Usage, images: int | None) -> int | None:
    """Whole micro-dollars; None where a price or the usage is not known. Pictures that have a price
    of their own are not charged as output once more."""
    if rates is None:
        return None
    if (micros := micros_by_measure(rates, usage.details)) is not None:
        return micros
    taken, given = tokens_of(usage)
    if taken is None or given is None:
        return None
    if rates.above is not None and taken > rates.above and rates.long is not None:
        rates = rates.long
    pictures = images if images and rates.image is not None else 0
    thoughts = usage.thoughts_tokens or 0
    if usage.details is None:
        cached = min(usage.cached_tokens or 0, taken)
        parts: tuple[tuple[int, int | None], ...] = (
            (taken - cached, rates.input),
            (cached, rates.cached),
            (thoughts if pictures else given, rates.output),
            (pictures, rates.image),
        )
    else:
        left = given - min(thoughts, given)
        said = ((thoughts, rates.output), *_of_output(rates, usage.details, left))
        parts = (
            *_of_input(rates, usage, usage.details, taken),
            *(((thoughts, rates.output), (pictures, rates.image)) if pictures else said),
            (usage.details.searches or 0, rates.search),
            (usage.details.file_searches or 0, rates.file_search),
        )
    picos = 0
    for count, rate in parts:
        if count and rate is None:
            return None
        picos += count * (rate or 0)
    return micros_of(picos)


def _of_input(
    rates: Rates, usage: Usage, details: UsageDetails, taken: int
) -> Iterator[tuple[int, int | None]]:
    """The parts of the input: together never more, nor fewer, tokens than `taken`. What was
    written to a cache comes first, since it is the dearest; what is not reported as for an
    hour is for 5 minutes."""
    written = min(details.cache_write_tokens or 0, taken)
    for_an_hour = min(details.cache_write_1h_tokens or 0, written)
    yield for_an_hour, rates.cache_write_1h
    yield written - for_an_hour, rates.cache_write
    cached = min(usage.cached_tokens or 0, taken - written)
    yield cached, rates.cached
    left = taken - written - cached
    audio = min(details.input_audio_tokens or 0, left)
    if details.input_audio_seconds and rates.audio_second is not None:
        yield details.input_audio_seconds, rates.audio_second
    else:
        yield audio, rates.input_audio
    pictures = min(details.input_image_tokens or 0, left - audio)
    yield pictures, rates.input_image
    yield left - audio - pictures, rates.input


def _of_output(rates: Rates, details: UsageDetails, given: int) -> Iterator[tuple[int, int | None]]:
    audio = min(details.output_audio_tokens or 0, given)
    yield audio, rates.output_audio
    pictures = min(details.output_image_tokens or 0, given - audio)
    yield pictures, rates.output_image
    yield given - audio - pictures, rates.output


def micros_of(picos: int) -> int:
    """Whole micro-dollars, rounded half up."""
    return (picos + _MICRO // 2) // _MICRO


def dollars(micros: int | None) -> str:
    """USD as people read it: `$0.79`, with more digits below a cent; `unknown` without a cost."""
    if micros is None:
        return "unknown"
    sign, amount = ("-" if micros < 0 else ""), abs(micros)
    if amount and amount < 10_000:
        digits = f"{amount / 1_000_000:.6f}".rstrip("0")
    else:
        digits = f"{amount / 1_000_000:,.2f}"
    return f"{sign}${digits}"


def _first(price: float | None, other: float | None) -> float | None:
    return other if price is None else price


def _per_token(price: float | None) -> int | None:
    return _picos(price, _PICOS // 10**6)


def _picos(price: float | None, one: int | Decimal) -> int | None:
    # By its decimal digits: 0.1 means a tenth.
    return None if price is None else round(Decimal(repr(price)) * one)


Evidence = Literal["provider", "maps", "map"]

_MODELS_KEPT = 2_000
_FACTS = ("models", "from", "until", "checked", "evidence", "context", "most_output", "note")
_KEYS = (*_FACTS, "source", *PRICE_KEYS)
_OF_ALL = ("source", "tiers", "search", "file_search", "peak")  # of all rows of a file
_FILE_KEYS = ("hosts", "model", *_OF_ALL)
_FIRST_DAY, _LAST_DAY = date(2000, 1, 1), date(9999, 12, 31)


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """A row: the price of `models` (patterns) at a provider on the days from `first_day` to
    `last_day`.

    source: the page it is from, read on `checked`. evidence: `provider` where that page itself was
    read, `maps` where two public maps of prices agree, `map` where there is one alone.
    context_tokens: the most of input and output together; most_output_tokens: of an output. None:
    not known.
    """

    provider: str
    models: tuple[str, ...]
    price: Price
    source: str
    checked: date
    evidence: Evidence
    first_day: date = _FIRST_DAY
    last_day: date = _LAST_DAY
    context_tokens: int | None = None
    most_output_tokens: int | None = None
    note: str = ""

    def fit(self, model: str) -> int:
        """How closely its patterns name `model`: 0 not at all."""
        fits = (len(one) + 1_000 * (one == model) for one in self.models if fnmatchcase(model, one))
        return max(fits, default=0)


class Catalog:
    """Rows of all providers. Immutable once read."""

    def __init__(self, folder: Any = None) -> None:
        """`folder`: with a file for each provider; that of the package by default."""
        self._folder = folder or resources.files(__package__).joinpath("data")
        self._file = cache(self._read)
        self._rows = cache(self._rows_of)
        self.find = lru_cache(_MODELS_KEPT)(self._find)
        self.row = lru_cache(_MODELS_KEPT)(self._row)

    @property
    def providers(self) -> tuple[str, ...]:
        names = (one.name for one in self._folder.iterdir())
        return tuple(sorted(name[:-5] for name in names if name.endswith(".toml")))

    def rows(self, provider: str) -> tuple[ModelPrice, ...]:
        """All of one provider, in the order of its file; none of an unknown one."""
        return self._rows(provider) if provider in self.providers else ()

    def hosts(self, provider: str) -> tuple[str, ...]:
        """Patterns of the hosts at which the provider is called."""
        return tuple(self._file(provider).get("hosts", ()))

    def _find(self, provider: str, model: str, day: date, tier: str = "") -> Price | None:
        """The price of a model in a processing tier on a day of UTC; None where it is not known."""
        row = self.row(provider, model, day)
        return None if row is None else row.price.of_tier(tier)

    def _row(self, provider: str, model: str, day: date) -> ModelPrice | None:
        """The row of the pattern that names `model` most closely, and of them the last that has
        begun on `day`."""
        plain = model.removeprefix("models/")
        rows = [(row.fit(plain), row) for row in self.rows(provider)]
        closest = max((fit for fit, _ in rows), default=0)
        if not closest:
            return None
        begun = [row for fit, row in rows if fit == closest and row.first_day <= day]
        latest = max(begun, key=lambda row: row.first_day, default=None)
        return latest if latest is not None and day <= latest.last_day else None

    def _read(self, provider: str) -> dict[str, Any]:
        path = f"{provider}.toml"
        return tomllib.loads(self._folder.joinpath(path).read_text(encoding="utf-8"))

    def _rows_of(self, provider: str) -> tuple[ModelPrice, ...]:
        """Raises ConfigError, which names the row and the key."""
        path, stated = f"{provider}.toml", self._file(provider)
        for key in stated:
            if key not in _FILE_KEYS:
                raise ConfigError(f"{path}: {key}", "(set)", f"known: {', '.join(_FILE_KEYS)}")
        usual = {key: stated[key] for key in _OF_ALL if key in stated}
        return tuple(
            _model_price(f"{path}: model[{place}]", provider, usual | row)
            for place, row in enumerate(stated["model"])
        )


def _model_price(path: str, provider: str, row: Mapping[str, Any]) -> ModelPrice:
    for key in row:
        if key not in _KEYS:
            raise ConfigError(f"{path}.{key}", "(set)", f"known: {', '.join(_KEYS)}")
    evidence: Any = row.get("evidence")
    if evidence not in get_args(Evidence):
        allowed = f"must be one of {', '.join(get_args(Evidence))}"
        raise ConfigError(f"{path}.evidence", str(evidence), allowed)
    first, last = row.get("from", _FIRST_DAY), row.get("until", _LAST_DAY)
    checked: Any = row.get("checked")
    for name, day in (("from", first), ("until", last), ("checked", checked)):
        if type(day) is not date:
            raise ConfigError(f"{path}.{name}", str(day), "must be a date, such as 2026-11-28")
    price = price_of(path, {key: row[key] for key in PRICE_KEYS if key in row})
    return ModelPrice(
        provider=provider,
        models=tuple(row["models"]),
        price=price,
        source=row["source"],
        checked=checked,
        evidence=evidence,
        first_day=first,
        last_day=last,
        context_tokens=row.get("context"),
        most_output_tokens=row.get("most_output"),
        note=row.get("note", ""),
    )


@cache
def catalog() -> Catalog:
    """The catalog of this package. One per process."""
    return Catalog()


@cache
def provider_of(url: str) -> str | None:
    """The provider whose hosts that of `url` is among; None for another, such as a server of one's
    own."""
    host = urlsplit(url).hostname or ""
    return next((name for name, pattern in _hosts() if fnmatchcase(host, pattern)), None)


def _hosts() -> Iterator[tuple[str, str]]:
    prices = catalog()
    for name in prices.providers:
        for pattern in prices.hosts(name):
            yield name, pattern
