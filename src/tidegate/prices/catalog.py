"""Catalog of public prices: one TOML file per provider in `data/`, each row with source and date.

A row is what models cost from one day on; several rows of a model are its history, and a call costs
what its day says. A file is read once, when its provider is first asked for; after the first time a
lookup is one of a dictionary.

Invariants: a model or a day that no row covers has no price, never that of another; each row names
the page it is from and the day on which that was read.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from importlib import resources
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from tidegate.errors import ConfigError
from tidegate.prices.rates import PRICE_KEYS, Price, price_of

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
