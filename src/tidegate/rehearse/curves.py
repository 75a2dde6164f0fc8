"""What is drawn of a rehearsal, whatever on: curves over time, scales and ticks. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, log10

from tidegate.rehearse.findings import Findings, LimitUse
from tidegate.rehearse.tally import Sample

OTHERS = "all others"
MOST_CURVES = 5
_STEPS = (1.0, 2.0, 5.0, 10.0)
_TIME_STEPS_MS = tuple(
    seconds * 1000
    for seconds in (
        *(0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600),
        *(7200, 10800, 21600, 43200, 86400, 172800, 604800),
    )
)


@dataclass(frozen=True, slots=True)
class Curve:
    """`values` belong to the moments of a drawing."""

    name: str
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Drawing:
    """One policy: its moments in ms, who waits by tenant, and the use of limits as parts of 1."""

    name: str
    moments: Sequence[float]
    waiting: Sequence[Curve]
    used: Sequence[Curve]

    @property
    def waiting_at_once(self) -> list[float]:
        """Over all tenants."""
        whole = [0.0] * len(self.moments)
        for curve in self.waiting:
            whole = [one + more for one, more in zip(whole, curve.values, strict=True)]
        return whole


def drawing_of(found: Findings) -> Drawing:
    """The tenants that wait most, and the limits that matter most, apart; the rest together."""
    samples = found.samples
    return Drawing(
        found.name, [sample.at_ms for sample in samples], _waiting(samples), _used(found, samples)
    )


def _waiting(samples: Sequence[Sample]) -> list[Curve]:
    total: Counter[str] = Counter()
    for sample in samples:
        total.update(sample.waiting)
    named = [tenant for tenant, waits in total.most_common() if waits]
    if len(named) > MOST_CURVES:
        named = named[: MOST_CURVES - 1]
    curves = [_curve(one, samples, lambda s, one=one: s.waiting.get(one, 0)) for one in named]  # type: ignore[misc]
    if len(named) < sum(waits > 0 for waits in total.values()):
        few = set(named)

        def rest(sample: Sample) -> float:
            return sum(waits for tenant, waits in sample.waiting.items() if tenant not in few)

        curves.append(_curve(OTHERS, samples, rest))
    return curves


def _used(found: Findings, samples: Sequence[Sample]) -> list[Curve]:
    limits = [one for one in found.limits if one.bound and one.peak]
    limits.sort(key=lambda one: (-one.held_up, -one.used, one.limit))

    def curve(one: LimitUse) -> Curve:
        return _curve(one.limit, samples, lambda sample: sample.used[one.limit] / one.bound)

    return [curve(one) for one in limits[:MOST_CURVES]]


def _curve(name: str, samples: Sequence[Sample], value: Callable[[Sample], float]) -> Curve:
    return Curve(name, [value(sample) for sample in samples])


def round_up(value: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is no less."""
    if value <= 1:
        return 1.0
    power = 10.0 ** int(log10(value))
    return next(step * power for step in _STEPS if step * power >= value * (1 - 1e-9))


def time_ticks_ms(end_ms: float, most: int) -> list[float]:
    """Moments from 0 on, evenly apart and easy to read, at most so many and one more."""
    step_ms = next((one for one in _TIME_STEPS_MS if end_ms / one <= most), None)
    if step_ms is None:
        step_ms = ceil(end_ms / most / 604_800_000) * 604_800_000.0
    return [number * step_ms for number in range(int(end_ms / step_ms) + 1)]


def moment_in_words(at_ms: float) -> str:
    """`0`, `500 ms`, `45 s`, `10 min`, `1 h 30`, `2 d`."""
    if at_ms < 1000:
        return f"{at_ms:.0f} ms" if at_ms else "0"
    if at_ms < 120_000:
        return f"{at_ms / 1000:g} s"
    minutes = round(at_ms / 60_000, 1)
    if minutes < 120:
        return f"{minutes:g} min"
    hours, minutes = divmod(round(at_ms / 60_000), 60)
    if hours < 48:
        return f"{hours} h {minutes:02}" if minutes else f"{hours} h"
    return f"{hours / 24:g} d"
