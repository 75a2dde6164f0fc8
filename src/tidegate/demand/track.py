"""What has been learned of one sort of figure: by how much first guesses are off. Pure.

Owns, for each sort of content and for what the provider adds, the ratio of actual to guessed tokens
as a logarithm with its variance; for each set of tools a constant; and the last errors.

A diagonal Kalman filter in logarithms (Kalman, "A New Approach to Linear Filtering and Prediction
Problems", 1960) finds the middle: a ratio that is not known yet takes all of a surprise, one that
is well known a tenth or less. What the provider adds is a piece of the guess like any other: a
surprise goes to the pieces by their shares, so that small calls teach the constants and large ones
the ratios. What is reserved over the middle is a quantile of the last errors, in units that grow
with the root of the middle, of calls of about the same size (Vovk, "Conditional Validity of
Inductive Conformal Predictors", 2012). Invariants: ratios stay within `MOST_OFF`; the size is
bounded.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, inf, isfinite, log, sqrt
from typing import Any

from tidegate.demand.pieces import Modality, Pieces
from tidegate.demand.window import REMEMBERED, Window

__all__ = ["MOST_OFF", "MOST_TOOL_SETS", "REMEMBERED", "Prediction", "Track"]

MOST_OFF = 1_000.0
MOST_TOOL_SETS = 64
QUANTILE = 0.95
# Before anything is known a guess may well be off by 2, and what a provider adds by 3: the upper
# estimate of a text is about 3 times its guess.
_CONSTANTS = frozenset((Modality.CALL, Modality.TOOLS, Modality.HOSTED, Modality.STATE))
_UNKNOWN_VARIANCE = log(2.0) ** 2
_UNKNOWN_CONSTANT = log(3.0) ** 2
_NOISE = 0.04
_NOISE_OF_OTHERS = 1.0  # of calls whose content is not in the request
_NOISE_TOKENS = 4.0  # a call of few tokens says little of a ratio
_GAIN = 0.1  # of a surprise, once a ratio is known: what drifts is followed within about 25 calls
_DRIFT = _GAIN * _GAIN * _NOISE / (1 - _GAIN)
_KNOWN = 0.1  # the variance of a middle that is known; the errors cover it
_DOUBTED = 0.2  # that of one whose errors say nothing yet
_DEVIATIONS = 1.645  # of the 95th percentile
_DEVIATIONS_BESIDE = 1.2  # beside the quantile of errors, which covers a part of the same doubt
_MODALITIES = frozenset(modality.value for modality in Modality)
_LARGEST_STEP = log(4.0)
# Enough errors for a quantile of them; until ten calls are known what is reserved untaught fades.
_ENOUGH = 20
_FEW_CALLS = 10
_EARLY_ERROR = 8.0
_SIZES = 4  # below 128 tokens, 2,048, 32,768, and above
# Of a set of tools: half a call stands for what is usual, and a tenth of a surprise is taken in
# after so many.
_USUAL_CALLS = 0.5
_STEADY_AFTER = 10
_LARGEST_CONSTANT = 2_000.0


class Ratio:
    """Actual over guessed, and the variance of what we know of its logarithm."""

    __slots__ = ("log_ratio", "ratio", "variance")

    def __init__(self, log_ratio: float, variance: float) -> None:
        self.log_ratio = log_ratio
        self.ratio = exp(log_ratio)
        self.variance = variance


@dataclass(frozen=True, slots=True)
class Prediction:
    """`expected` is the middle, `upper` is rarely exceeded; both in LLM tokens."""

    expected: float
    upper: float


_UNKNOWN = {
    modality: Ratio(0.0, _UNKNOWN_CONSTANT if modality in _CONSTANTS else _UNKNOWN_VARIANCE)
    for modality in Modality
}


class Track:
    """One sort of figure, such as the input tokens of one model."""

    def __init__(self, *, is_told_little: bool = False) -> None:
        """`is_told_little`: the request says little of how many tokens there will be."""
        self.calls = 0
        self.ratios: dict[Modality, Ratio] = {}
        self._noise = _NOISE_OF_OTHERS if is_told_little else _NOISE
        self._doubted = inf if is_told_little else _DOUBTED
        self._usual = 0.0  # the middle of the last calls
        # actual / expected of the last calls, and whether the reserved tokens were too few.
        self._surprises: deque[float] = deque(maxlen=REMEMBERED)
        self._short: deque[bool] = deque(maxlen=REMEMBERED)
        # (actual - middle) / root of the middle: of the last calls, and of those of each size.
        self._errors = Window()
        self._errors_by_size: dict[int, Window] = {}  # of the only size: the same object
        self._early_error = 0.0  # the largest while the middle was doubted
        # Calls with a set of tools, and what they used over the middle.
        self._tool_sets: OrderedDict[int, tuple[int, float]] = OrderedDict()

    @property
    def margin(self) -> float:
        """What the middle is multiplied by for the upper estimate of a usual call of known
        pieces."""
        if not self._errors:
            return 1.0
        return 1.0 + max(0.0, self._errors.upper(QUANTILE)) / sqrt(self._usual)

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
        return {modality.value: ratio.ratio for modality, ratio in self.ratios.items()}

    def predict(self, pieces: Pieces, tools: int = 0) -> Prediction:
        """`tools`: those of the call, as `InputPieces` has them."""
        middle, doubt = self._middle(pieces, self.ratios)
        upper = middle * exp(_DEVIATIONS_BESIDE * sqrt(max(0.0, doubt - _KNOWN)))
        constant = self._constant(tools)
        expected = max(1.0, middle + constant)
        known = len(self._errors)
        error = max(0.0, self._error(middle)) if known else 0.0
        if known < _ENOUGH:
            fading = max(0.0, 1 - self.calls / _FEW_CALLS)
            error = max(error, self._early_error * fading)
            upper = max(upper + error * sqrt(middle), _unlearned(pieces) * fading)
        else:
            upper += error * sqrt(middle)
        upper += constant
        return Prediction(expected, max(expected, upper))

    def learn(
        self, pieces: Pieces, actual_tokens: int, reserved_tokens: float, tools: int = 0
    ) -> None:
        """Take in one call. A figure of 0 or less teaches nothing: no call is free of tokens."""
        if actual_tokens <= 0:
            return
        middle, doubt = self._middle(pieces, self.ratios)
        constant = self._constant(tools)
        self.calls += 1
        self._short.append(actual_tokens > reserved_tokens)
        surprise = actual_tokens / max(1.0, middle + constant)
        self._surprises.append(min(max(surprise, 1 / MOST_OFF), MOST_OFF))
        self._usual += (middle - self._usual) * max(_GAIN, 1 / self.calls)
        error_tokens = min(actual_tokens, MOST_OFF * middle) - middle - constant
        self._note_error(middle, error_tokens / sqrt(middle), doubt)
        if tools:
            self._note_tools(tools, middle, actual_tokens - middle)
        spread = doubt + self._noise + _NOISE_TOKENS / max(1.0, middle)
        most = max(_LARGEST_STEP, 3 * sqrt(spread))
        step = min(max(log(actual_tokens / middle), -most), most) / spread
        ratios = self.ratios
        for modality, tokens in pieces.items():
            known = ratios.get(modality)
            if known is None:
                known = ratios[modality] = Ratio(0.0, _UNKNOWN[modality].variance)
            share = tokens * known.ratio / middle
            gain = known.variance * share
            known.log_ratio = _bounded(known.log_ratio + gain * step)
            known.ratio = exp(known.log_ratio)
            # Only what was seen can have drifted.
            known.variance += share * (share * _DRIFT - gain * known.variance / spread)

    @staticmethod
    def _middle(pieces: Pieces, ratios: Mapping[Modality, Ratio]) -> tuple[float, float]:
        """The middle without the constant of its tools, and the variance of its logarithm."""
        middle = doubt = 0.0
        for modality, tokens in pieces.items():
            known = ratios.get(modality) or _UNKNOWN[modality]
            part = tokens * known.ratio
            middle += part
            doubt += known.variance * part * part
        if not middle:  # of a request without a body; no call is free of tokens
            return 1.0, 0.0
        return middle, doubt / (middle * middle)

    def _error(self, middle: float) -> float:
        """What 95 % of the errors of calls of this size are below."""
        own = self._errors_by_size.get(_size(middle))
        if own is not None and len(own) >= _ENOUGH:
            return own.upper(QUANTILE)
        return self._errors.upper(QUANTILE)

    def _note_error(self, middle: float, error: float, doubt: float) -> None:
        if doubt > self._doubted:
            self._early_error = max(self._early_error, error)
            return
        size, by_size = _size(middle), self._errors_by_size
        own = by_size.get(size)
        if own is None:
            for other, errors in by_size.items():
                if errors is self._errors:
                    by_size[other] = Window(errors.ordered())
            own = by_size[size] = Window() if by_size else self._errors
        self._errors.add(error)
        if own is not self._errors:
            own.add(error)

    def _constant(self, tools: int) -> float:
        """What calls with the same tools use over the middle; two thirds of it after the first."""
        calls, over = self._tool_sets.get(tools, (0, 0.0))
        return over / (calls + _USUAL_CALLS)

    def _note_tools(self, tools: int, middle: float, over: float) -> None:
        most = _LARGEST_CONSTANT + 4 * middle
        over = min(max(over, -middle), most)
        calls, before = self._tool_sets.pop(tools, (0, 0.0))
        if calls < _STEADY_AFTER:
            self._tool_sets[tools] = (calls + 1, before + over)
        else:
            self._tool_sets[tools] = (calls, before + over - before / calls)
        if len(self._tool_sets) > MOST_TOOL_SETS:
            self._tool_sets.popitem(last=False)

    def export(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "calls": self.calls,
            "usual": self._usual,
            "ratios": {
                modality.value: [ratio.log_ratio, ratio.variance]
                for modality, ratio in self.ratios.items()
            },
            "surprises": list(self._surprises),
            "short": [int(short) for short in self._short],
            "early_error": self._early_error,
            "errors": self._errors.ordered(),
            "errors_by_size": [
                [size, errors.ordered()] for size, errors in self._errors_by_size.items()
            ],
            "tools": [[tools, *known] for tools, known in self._tool_sets.items()],
        }

    @classmethod
    def restore(cls, exported: Mapping[str, Any], *, is_told_little: bool = False) -> Track:
        """The inverse of `export`; modalities that are not known here are left out.

        Raises ValueError, TypeError or KeyError for what `export` has not made.
        """
        track = cls(is_told_little=is_told_little)
        track.calls = int(exported["calls"])
        track._usual = _sound(exported["usual"])
        for name, (log_ratio, variance) in exported["ratios"].items():
            if name in _MODALITIES:
                if not isfinite(log_ratio) or not 0 < variance <= 2:
                    raise ValueError(f"the ratio of {name} is out of range")
                track.ratios[Modality(name)] = Ratio(_bounded(float(log_ratio)), float(variance))
        for surprise in exported["surprises"]:
            if not 1 / MOST_OFF <= surprise <= MOST_OFF:
                raise ValueError("a surprise is out of range")
            track._surprises.append(float(surprise))
        track._short.extend(bool(short) for short in exported["short"])
        track._early_error = _sound(exported["early_error"])
        track._errors = Window(map(_sound, exported["errors"]))
        for size, errors in exported["errors_by_size"]:
            if size not in range(_SIZES):
                raise ValueError("a size is out of range")
            track._errors_by_size[size] = Window(map(_sound, errors))
        for tools, calls, over in exported["tools"][-MOST_TOOL_SETS:]:
            track._tool_sets[int(tools)] = (int(calls), _sound(over))
        return track


def _unlearned(pieces: Pieces) -> float:
    """What is reserved before anything is known."""
    middle, doubt = Track._middle(pieces, _UNKNOWN)
    return middle * exp(_DEVIATIONS * sqrt(doubt)) + _EARLY_ERROR * sqrt(middle)


def _size(middle: float) -> int:
    return min(max(0, (int(middle).bit_length() >> 2) - 1), _SIZES - 1)


def _sound(figure: float) -> float:
    if not isfinite(figure):
        raise ValueError("a figure is no number")
    return float(figure)


def _bounded(log_ratio: float) -> float:
    return min(max(log_ratio, -log(MOST_OFF)), log(MOST_OFF))
