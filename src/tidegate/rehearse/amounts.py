"""Amounts by chance: how long calls last, how many LLM tokens they take. Pure.

As TOML: a number, `{ median = 800, p95 = 3000 }` or `{ lognormal = [800, 0.6] }` (median and
sigma), `{ uniform = [100, 500] }`, or `{ percentiles = { 50 = 800, 90 = 2000, 99 = 9000 } }`,
between which it is interpolated.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from tidegate.errors import ConfigError

MOST = 1e9
# Of a normal distribution: so many sigmas lie below 95 of 100.
_P95_SIGMAS = 1.6448536269514722
_ALLOWED = (
    "must be a number, { median = .., p95 = .. }, { lognormal = [median, sigma] }, "
    "{ uniform = [low, high] } or { percentiles = { 50 = .., 95 = .. } }"
)


@dataclass(frozen=True, slots=True)
class Amount:
    """`points`: of a constant the value, of `lognormal` median and sigma, of `uniform` its ends, of
    `percentiles` shares from 0 to 1 and values, in turn."""

    shape: Literal["constant", "lognormal", "uniform", "percentiles"]
    points: tuple[float, ...]

    def draw(self, chance: Random) -> float:
        """One amount, never below 0."""
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
            # Below the lowest that is known: from 0 up to it.
            return values[0] * share / shares[0] if shares[0] else values[0]
        if at == len(shares):
            return values[-1]
        low, high = shares[at - 1], shares[at]
        return values[at - 1] + (values[at] - values[at - 1]) * (share - low) / (high - low)


def constant(value: float) -> Amount:
    return Amount("constant", (value,))


def amount_of(path: str, value: Any) -> Amount:
    """The amount that a TOML value describes. Raises ConfigError with `path`."""
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
