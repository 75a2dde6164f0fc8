"""A described load: streams of arrivals, from which a trace is drawn by chance. Pure.

    lasts = "10m"

    [[arrivals]]
    tenant = "acme"
    kind = "text_only"
    per_minute = 120                             # poisson, unless pattern says otherwise
    duration_ms = { median = 800, p95 = 3000 }
    output_tokens = 300
    deadline_ms = 30_000

    [[arrivals]]
    tenant = "globex"
    pattern = "bursts"                           # so many at once, every so often
    burst = 200
    every = "60s"
    duration_ms = 500

Invariant: the same description and seed give the same trace, and a stream's calls do not change
with those of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

from tidegate.errors import ConfigError
from tidegate.policy.words import ms_of
from tidegate.rehearse.amounts import Amount, amount_of
from tidegate.rehearse.trace import MOST_CALLS, MOST_MS, Arrival, Usual, from_zero

_RATES_S = {"per_second": 1.0, "per_minute": 60.0, "per_hour": 3600.0}
_AMOUNTS = ("duration_ms", "input_tokens", "output_tokens", "deadline_ms")
_PLAIN = ("tenant", "kind", "model", "images", "priority")
_KEYS = (*_PLAIN, *_AMOUNTS, *_RATES_S, "pattern", "burst", "every", "from", "until")
_PATTERNS = ("poisson", "constant", "bursts")


@dataclass(frozen=True, slots=True)
class Stream:
    """One table of a load: moments of arrival, and what is the same or drawn anew for each."""

    moments: Callable[[Random], Iterator[float]]
    same: Mapping[str, Any]
    drawn: Mapping[str, Amount]


@dataclass(frozen=True, slots=True)
class Load:
    lasts_ms: float
    streams: tuple[Stream, ...]

    def draw(self, usual: Usual, seed: int) -> list[Arrival]:
        """A trace. Raises ConfigError for a call that can't be."""
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
            raise ConfigError("arrivals", "(none)", "no call arrives in that time")
        return from_zero(found)


def load_of(described: Mapping[str, Any]) -> Load:
    """The load that TOML describes. Raises ConfigError with the path of the key."""
    _check_keys("", described, ("lasts", "arrivals"))
    lasts_ms = span_ms("lasts", described.get("lasts", "10m"))
    tables = described.get("arrivals")
    if not isinstance(tables, list) or not tables:
        raise ConfigError("arrivals", "(not set)", "must be one or more tables, [[arrivals]]")
    streams = [_stream(f"arrivals[{n}]", table, lasts_ms) for n, table in enumerate(tables)]
    return Load(lasts_ms, tuple(streams))


def span_ms(path: str, text: object) -> float:
    """`30s`, `10m`, `2h` in ms; a bare number is seconds. Raises ConfigError."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        text = f"{text}s"
    found_ms = ms_of(text) if isinstance(text, str) else None
    if found_ms is None or found_ms > MOST_MS:
        raise ConfigError(path, str(text), "must be a number and ms, s, m, h or d, such as 10m")
    return found_ms


def _stream(path: str, table: object, lasts_ms: float) -> Stream:
    if not isinstance(table, Mapping):
        raise ConfigError(path, str(table), "must be a table")
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
