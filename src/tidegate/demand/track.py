"""What has been learned of one sort of figure: by how much first guesses are off. Pure.

Owns, for each modality, the ratio of actual to guessed tokens as a logarithm with its variance,
and the last surprises. A diagonal Kalman filter in logarithms (Kalman, "A New Approach to Linear
Filtering and Prediction Problems", 1960): a ratio that is not known yet takes all of a surprise,
one that is well known a tenth. Invariant: ratios stay within `MOST_OFF`; the size is bounded.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, exp, isfinite, log, sqrt
from typing import Any

from tidegate.demand.pieces import Modality, Pieces

MOST_OFF = 1_000.0
REMEMBERED = 64
QUANTILE = 0.95
# Before anything is known a guess may well be off by 2: its upper estimate is about 3 times it.
_UNKNOWN_VARIANCE = log(2.0) ** 2
_NOISE = 0.04
_GAIN = 0.1  # of a surprise, once a ratio is known: what drifts is followed within about 25 calls
_KNOWN_VARIANCE = _GAIN * _NOISE / (1 - _GAIN)
_DRIFT = _GAIN * _KNOWN_VARIANCE
_DEVIATIONS = 1.645  # of the 95th percentile
_MODALITIES = frozenset(modality.value for modality in Modality)
_LARGEST_STEP = log(4.0)
# Enough surprises for a quantile of them; until then a margin fades that covers usual noise.
_ENOUGH = 20
_EARLY_MARGIN = 1.3


@dataclass(slots=True)
class Ratio:
    """The logarithm of actual over guessed, and the variance of what we know of it."""

    log_ratio: float = 0.0
    variance: float = _UNKNOWN_VARIANCE


@dataclass(frozen=True, slots=True)
class Prediction:
    """`expected` is the middle, `upper` is rarely exceeded; both in LLM tokens."""

    expected: float
    upper: float


class Track:
    """One sort of figure, such as the input tokens of one model."""

    def __init__(self) -> None:
        self.calls = 0
        self.ratios: dict[Modality, Ratio] = {}
        # actual / expected of the last calls, in order of time and of size; and whether the
        # reserved tokens were too few.
        self._surprises: deque[float] = deque(maxlen=REMEMBERED)
        self._sorted: list[float] = []
        self._short: deque[bool] = deque(maxlen=REMEMBERED)

    @property
    def margin(self) -> float:
        """What the middle is multiplied by for the upper estimate of a call of known pieces."""
        known = len(self._sorted)
        place = min(known, ceil(QUANTILE * (known + 1)))  # of few, rather the largest
        seen = self._sorted[place - 1] if known else 1.0
        early = _EARLY_MARGIN ** max(0.0, 1 - known / _ENOUGH)
        return max(1.0, seen) if known >= _ENOUGH else max(seen, early)

    @property
    def error(self) -> float | None:
        """Mean absolute error of the middle in parts of the actual; None before any is known."""
        if not self._surprises:
            return None
        return sum(abs(1 / surprise - 1) for surprise in self._surprises) / len(self._surprises)

    @property
    def short(self) -> float | None:
        """The share of the last calls that used more than was reserved."""
        return sum(self._short) / len(self._short) if self._short else None

    def shown(self) -> dict[str, float]:
        """Actual tokens over first guess, by modality."""
        return {modality.value: exp(ratio.log_ratio) for modality, ratio in self.ratios.items()}

    def predict(self, pieces: Pieces) -> Prediction:
        expected, shares = self._shares(pieces)
        doubt = max(0.0, self._doubt(shares) - _KNOWN_VARIANCE)
        return Prediction(expected, expected * self.margin * exp(_DEVIATIONS * sqrt(doubt)))

    def learn(self, pieces: Pieces, actual_tokens: int, reserved_tokens: float) -> None:
        """Take in one call. A figure of 0 or less teaches nothing: no call is free of tokens."""
        if actual_tokens <= 0:
            return
        expected, shares = self._shares(pieces)
        surprise = actual_tokens / expected
        doubt = self._doubt(shares)
        self.calls += 1
        self._short.append(actual_tokens > reserved_tokens)
        if doubt <= 4 * _KNOWN_VARIANCE:
            self._remember(min(max(surprise, 1 / MOST_OFF), MOST_OFF))
        spread = doubt + _NOISE
        most = max(_LARGEST_STEP, 3 * sqrt(spread))
        step = min(max(log(surprise), -most), most)
        for modality, share in shares.items():
            ratio = self.ratios.setdefault(modality, Ratio())
            gain = ratio.variance * share / spread
            ratio.log_ratio = _bounded(ratio.log_ratio + gain * step)
            # Only what was seen can have drifted.
            ratio.variance += share * share * _DRIFT - gain * share * ratio.variance

    def _shares(self, pieces: Pieces) -> tuple[float, dict[Modality, float]]:
        """The middle, and what part of it each modality is."""
        parts = {
            modality: tokens * exp(self._ratio(modality).log_ratio)
            for modality, tokens in pieces.items()
        }
        expected = sum(parts.values())
        return expected, {modality: part / expected for modality, part in parts.items()}

    def _doubt(self, shares: dict[Modality, float]) -> float:
        return sum(
            self._ratio(modality).variance * share * share for modality, share in shares.items()
        )

    def _ratio(self, modality: Modality) -> Ratio:
        return self.ratios.get(modality) or Ratio()

    def _remember(self, surprise: float) -> None:
        if len(self._surprises) == REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._surprises[0])]
        self._surprises.append(surprise)
        insort(self._sorted, surprise)

    def export(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "calls": self.calls,
            "ratios": {
                modality.value: [ratio.log_ratio, ratio.variance]
                for modality, ratio in self.ratios.items()
            },
            "surprises": list(self._surprises),
            "short": [int(short) for short in self._short],
        }

    @classmethod
    def restore(cls, exported: Mapping[str, Any]) -> Track:
        """The inverse of `export`; modalities that are not known here are left out.

        Raises ValueError, TypeError or KeyError for what `export` has not made.
        """
        track = cls()
        track.calls = int(exported["calls"])
        for name, (log_ratio, variance) in exported["ratios"].items():
            if name in _MODALITIES:
                known = Ratio(_bounded(float(log_ratio)), float(variance))
                if not isfinite(known.log_ratio) or not 0 < known.variance <= 1:
                    raise ValueError(f"the ratio of {name} is out of range")
                track.ratios[Modality(name)] = known
        for surprise in exported["surprises"]:
            if not 1 / MOST_OFF <= surprise <= MOST_OFF:
                raise ValueError("a surprise is out of range")
            track._remember(float(surprise))
        track._short.extend(bool(short) for short in exported["short"])
        return track


def _bounded(log_ratio: float) -> float:
    return min(max(log_ratio, -log(MOST_OFF)), log(MOST_OFF))
