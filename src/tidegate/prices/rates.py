"""Prices of models, and the cost of a usage: whole micro-dollars, rounded once per call.

A `Price` is stated in USD as providers publish it: per million tokens, per picture, per thousand
searches, per minute of audio. `Rates` are the same in whole picos, which makes sums exact. A part
of the input or output without a price of its own costs as much as the input or output.

Public prices are in one TOML file per provider in `data/`. Each row names its source and date, and
states what models cost from one day on. Several rows of a model are its price history; a call is
charged by the row of its day. A file is read when its provider is first needed; later lookups are
cached in a dictionary.

Invariants: a cost is never negative; the parts of an input or output never add up to more tokens
than it has; unknown usage or an unknown price makes the cost unknown, never zero; a model or day
that no row covers has no price, never the price of another.
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
# Names of the usual tier in providers' requests and answers.
STANDARD_TIERS = frozenset(
    {"", "standard", "default", "auto", "on_demand", "standard_only", "unspecified"}
)
# OpenAI's name since July 2026 of the tier `priority`, beside the former one:
# https://developers.openai.com/api/docs/guides/fast-mode
_FAST, _FORMERLY = "fast", "priority"


@dataclass(frozen=True, slots=True)
class PeakHours:
    """Hours in which a price is `share` times the usual one.

    days: days of the week, 1 is Monday. hours: spans of hours in UTC, each without its end.
    """

    share: float
    hours: tuple[tuple[int, int], ...]
    days: frozenset[int]

    def holds(self, hour: int) -> bool:
        """Return whether an hour is a peak hour; hours count from the start of 1970, a Thursday."""
        day, of_day = divmod(hour, 24)
        return (day + 3) % 7 + 1 in self.days and any(a <= of_day < b for a, b in self.hours)


@dataclass(frozen=True, slots=True)
class Price:
    """A price in USD per million tokens; None where unknown.

    image: per picture. search, file_search: per thousand searches of the web and of stored files.
    cache_write, cache_write_1h: for input written to a cache, in the latter for an hour.
    input_audio to output_image: for audio, image and video tokens of the input and output.
    audio_minute: per minute of input audio, if the provider reports its length; its tokens are then
    free. characters: per million characters of synthesized speech. video_second: per second of
    generated video.
    above, long: `long` applies to a whole call whose input has more than `above` tokens.
    tiers: prices in other processing tiers, such as `flex`.
    peak: hours in which the price is higher.
    """

    input: float | None = None
    output: float | None = None
    cached: float | None = None
    image: float | None = None
    cache_write: float | None = None
    cache_write_1h: float | None = None
    input_audio: float | None = None
    input_image: float | None = None
    input_video: float | None = None
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
        """Return the price multiplied by `share`, long inputs included; searches keep their
        price.
        """
        scaled: dict[str, Any] = {name: _product(getattr(self, name), share) for name in _SCALED}
        return replace(self, **scaled, long=self.long and self.long.times(share), tiers={})

    def in_hour(self, hour: int | None) -> Price:
        """Return the price in an hour, counted as by `PeakHours.holds`; None: in the dearest
        hour.
        """
        if self.peak is None or not (hour is None or self.peak.holds(hour)):
            return self
        return self.times(max(1.0, self.peak.share) if hour is None else self.peak.share)

    def of_tier(self, name: str) -> Price | None:
        """Return the price in a tier; None if the tier's own price is unknown."""
        if name in STANDARD_TIERS:
            return self
        found = self.tiers.get(name)
        return self.tiers.get(_FORMERLY) if found is None and name == _FAST else found


AMOUNTS = tuple(
    one.name for one in fields(Price) if one.name not in ("above", "long", "tiers", "peak")
)
_SCALED = tuple(name for name in AMOUNTS if name not in ("search", "file_search"))
_LONG, _TIERS, _SHARE, _ABOVE, _PEAK = "long_context", "tiers", "share", "above", "peak"
PRICE_KEYS = (*AMOUNTS, _LONG, _TIERS, _PEAK)


def price_of(path: str, table: Mapping[str, Any]) -> Price:
    """Return the price that a table states: amounts, `long_context`, `tiers` and `peak`.

    Raises ConfigError, which names the key below `path`.
    """
    _check(path, table, PRICE_KEYS)
    price = Price(**_amounts(path, table), peak=_peak(path, table))
    if (long := _table(path, table, _LONG)) is not None:
        price = _with_long(f"{path}.{_LONG}", price, long)
    tiers = _table(path, table, _TIERS) or {}
    for name in tiers:
        if str(name) in STANDARD_TIERS:
            allowed = "must be another tier: the model's own price is that of the usual tier"
            raise ConfigError(f"{path}.{_TIERS}", str(name), allowed)
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
    """Return a tier's price: a `share` of the usual price, or prices of its own."""
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


def _amount(path: str, amount: Any) -> float:
    is_number = isinstance(amount, int | float) and not isinstance(amount, bool)
    if is_number and 0 <= amount <= _MOST_USD:  # also false for NaN
        return float(amount)
    raise ConfigError(path, str(amount)[:100], f"must be a number from 0 to {_MOST_USD}")


def _product(amount: float | None, share: float) -> float | None:
    # By decimal digits: 0.1 means exactly a tenth.
    return None if amount is None else float(Decimal(repr(amount)) * Decimal(repr(share)))


@dataclass(frozen=True, slots=True)
class Rates:
    """A price in picos (10^-12) of a dollar per unit.

    The unit is one token, picture, search, character, or second of audio or video. above, long:
    `long` applies to a whole call whose input has more than `above` tokens.
    """

    input: int | None
    output: int | None
    cached: int | None
    image: int | None
    cache_write: int | None
    cache_write_1h: int | None
    input_audio: int | None
    input_image: int | None
    input_video: int | None
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
        """Return the rates of a price.

        Searches without a stated price are free, except in a public price: there they may cost
        more, so the cost of a call with searches is unknown.
        """
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
            input_video=_per_token(_first(price.input_video, price.input)),
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

    def dearest(self, other: Rates) -> Rates:
        """Return rates at which no usage costs less than at these or at the other ones; None where
        these are."""
        rates = {name: _greater(getattr(self, name), getattr(other, name)) for name in _RATES}
        aboves = [one.above for one in (self, other) if one.above is not None]
        long = (self.long or self).dearest(other.long or other) if aboves else None
        return Rates(**rates, above=min(aboves, default=None), long=long)


_RATES = tuple(one.name for one in fields(Rates) if one.name not in ("above", "long"))


def _greater(rate: int | None, other: int | None) -> int | None:
    return rate if rate is None or other is None else max(rate, other)


def micros_by_measure(rates: Rates, details: UsageDetails | None) -> int | None:
    """Return the cost for a model that is not charged by tokens; None for any other model.

    Such a model is charged by characters spoken, seconds of audio heard, seconds of video made, or
    searches ranked.
    """
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
    """Return the cost in whole micro-dollars; None if a price or the usage is unknown.

    Pictures with a price of their own are not charged as output too.
    """
    if rates is None:
        return None
    if (micros := micros_by_measure(rates, usage.details)) is not None:
        return micros
    if images and rates.image is not None and rates.input is rates.output is None:
        return micros_of(images * rates.image)
    input_tokens, output_tokens = tokens_of(usage)
    if input_tokens is None or output_tokens is None:
        return None
    if rates.above is not None and input_tokens > rates.above and rates.long is not None:
        rates = rates.long
    pictures = images if images and rates.image is not None else 0
    thoughts = usage.thoughts_tokens or 0
    if usage.details is None:
        cached = min(usage.cached_tokens or 0, input_tokens)
        parts: tuple[tuple[int, int | None], ...] = (
            (input_tokens - cached, rates.input),
            (cached, rates.cached),
            (thoughts if pictures else output_tokens, rates.output),
            (pictures, rates.image),
        )
    else:
        left = output_tokens - min(thoughts, output_tokens)
        by_modality = ((thoughts, rates.output), *_of_output(rates, usage.details, left))
        parts = (
            *_of_input(rates, usage, usage.details, input_tokens),
            *(((thoughts, rates.output), (pictures, rates.image)) if pictures else by_modality),
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
    """Yield the parts of the input, as counts and rates; the tokens add up to `taken`.

    Tokens written to a cache come first because they are the dearest; those not reported as
    cached for an hour are cached for 5 minutes.
    """
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
    video = min(details.input_video_tokens or 0, left - audio - pictures)
    yield video, rates.input_video
    yield left - audio - pictures - video, rates.input


def _of_output(
    rates: Rates, details: UsageDetails, output_tokens: int
) -> Iterator[tuple[int, int | None]]:
    audio = min(details.output_audio_tokens or 0, output_tokens)
    yield audio, rates.output_audio
    pictures = min(details.output_image_tokens or 0, output_tokens - audio)
    yield pictures, rates.output_image
    yield output_tokens - audio - pictures, rates.output


def micros_of(picos: int) -> int:
    """Return whole micro-dollars, rounded half up."""
    return (picos + _MICRO // 2) // _MICRO


def dollars(micros: int | None) -> str:
    """Return USD for people to read: `$0.79`, more digits below a cent, `unknown` for None."""
    if micros is None:
        return "unknown"
    sign, amount = ("-" if micros < 0 else ""), abs(micros)
    if amount and amount < 10_000:
        digits = f"{amount / 1_000_000:.6f}".rstrip("0")
    else:
        cents = (amount + 5_000) // 10_000  # half up: a float has no exact half of a cent
        digits = f"{cents // 100:,}.{cents % 100:02}"
    return f"{sign}${digits}"


def _first(price: float | None, other: float | None) -> float | None:
    return other if price is None else price


def _per_token(price: float | None) -> int | None:
    return _picos(price, _PICOS // 10**6)


def _picos(price: float | None, one: int | Decimal) -> int | None:
    # By decimal digits: 0.1 means exactly a tenth.
    return None if price is None else round(Decimal(repr(price)) * one)


Evidence = Literal["provider", "maps", "map"]

_MODELS_KEPT = 2_000
_FACTS = ("models", "from", "until", "checked", "evidence", "context", "most_output", "note")
_KEYS = (*_FACTS, "source", *PRICE_KEYS)
_OF_ALL = ("source", "tiers", "search", "file_search", "peak")  # defaults for all rows of a file
_FILE_KEYS = ("hosts", "model", *_OF_ALL)
_FIRST_DAY, _LAST_DAY = date(2000, 1, 1), date(9999, 12, 31)


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """A row: the price of `models` (patterns) at a provider from `first_day` to `last_day`.

    source: the page that it comes from, read on the day `checked`. evidence: `provider` if that
    page is the provider's, `maps` if two public price lists agree, `map` if only one has it.
    context_tokens: the maximum of input and output together. most_output_tokens: the maximum of an
    output. None: unknown.
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
        """Return how closely the patterns match `model`; 0 if none does."""
        fits = (len(one) + 1_000 * (one == model) for one in self.models if fnmatchcase(model, one))
        return max(fits, default=0)


class Catalog:
    """The rows of all providers. Immutable once read."""

    def __init__(self, folder: Any = None) -> None:
        """`folder`: contains a file per provider; by default the package's own."""
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
        """Return all rows of a provider in the order of its file; none for an unknown provider."""
        return self._rows(provider) if provider in self.providers else ()

    def hosts(self, provider: str) -> tuple[str, ...]:
        """Return patterns of the provider's host names."""
        return tuple(self._file(provider).get("hosts", ()))

    def _find(self, provider: str, model: str, day: date, tier: str = "") -> Price | None:
        """Return a model's price in a processing tier on a day (UTC); None if unknown."""
        row = self.row(provider, model, day)
        return None if row is None else row.price.of_tier(tier)

    def _row(self, provider: str, model: str, day: date) -> ModelPrice | None:
        """Return the row whose pattern matches `model` most closely.

        Of several such rows, the last that began by `day`.
        """
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
        """Return a provider's rows. Raises ConfigError, which names the row and the key."""
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
    """Return this package's catalog, one per process."""
    return Catalog()


@cache
def provider_of(url: str) -> str | None:
    """Return the provider to which the host of `url` belongs; None for a self-hosted server."""
    host = urlsplit(url).hostname or ""
    return next((name for name, pattern in _hosts() if fnmatchcase(host, pattern)), None)


def _hosts() -> Iterator[tuple[str, str]]:
    prices = catalog()
    for name in prices.providers:
        for pattern in prices.hosts(name):
            yield name, pattern
