"""Charts of a rehearsal: curves, SVG, text and an HTML page that loads no other files. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from math import ceil, log10

from tidegate.rehearse import (
    ChartCurve,
    ComparedTenant,
    Comparison,
    RehearsedCase,
    TenantCase,
    TierCase,
)
from tidegate.rehearse.report import (
    Findings,
    Group,
    LimitUse,
    Sample,
    Table,
    difference_of,
    sentence_of,
    waits_of,
)

OTHERS = "all others"
MOST_CURVES = 5
# Maximum moments of a curve, and maximum tenants, on a page.
_MOST_MOMENTS = 240
_MOST_COMPARED = 50
_STEPS = (1.0, 2.0, 5.0, 10.0)
_TIME_STEPS_MS = tuple(
    seconds * 1000
    for seconds in (
        *(0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600),
        *(7200, 10800, 21600, 43200, 86400, 172800, 604800),
    )
)


@dataclass(frozen=True, slots=True)
class Drawing:
    """The curves of one policy.

    moments: in ms. waiting: waiters by tenant. used: use of limits as fractions.
    """

    name: str
    moments: Sequence[float]
    waiting: Sequence[ChartCurve]
    used: Sequence[ChartCurve]

    @property
    def waiting_at_once(self) -> list[float]:
        """Waiters of all tenants together."""
        whole = [0.0] * len(self.moments)
        for curve in self.waiting:
            whole = [one + more for one, more in zip(whole, curve.values, strict=True)]
        return whole


def drawing_of(found: Findings) -> Drawing:
    """Return the curves of the tenants that wait most and of the limits that matter most.

    The remaining tenants share one curve.
    """
    samples = found.samples
    return Drawing(
        found.name, [sample.at_ms for sample in samples], _waiting(samples), _used(found, samples)
    )


def _waiting(samples: Sequence[Sample]) -> list[ChartCurve]:
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


def _used(found: Findings, samples: Sequence[Sample]) -> list[ChartCurve]:
    limits = [one for one in found.limits if one.bound and one.peak]
    limits.sort(key=lambda one: (-one.held_up, -one.used, one.limit))

    def curve(one: LimitUse) -> ChartCurve:
        return _curve(one.limit, samples, lambda sample: sample.used[one.limit] / one.bound)

    return [curve(one) for one in limits[:MOST_CURVES]]


def _curve(name: str, samples: Sequence[Sample], value: Callable[[Sample], float]) -> ChartCurve:
    return ChartCurve(name, [value(sample) for sample in samples])


def comparison_of(
    found: Sequence[Findings], recorded: Sequence[tuple[str, float]], since: datetime
) -> Comparison:
    """Return the comparison; `recorded`: tenant and wait in ms of each recorded call."""
    if not found:
        return Comparison(0, since, 0.0, "No call is on record for that time.", [], [], 0)
    sentence = sentence_of(found[0]) if len(found) == 1 else difference_of(found[0], found[1])
    waits_ms: dict[str, list[float]] = {}
    for tenant, wait_ms in recorded:
        waits_ms.setdefault(tenant, []).append(wait_ms)
    groups = [{group.name: group for group in one.tenants} for one in found]
    tenants = [_compared(name, waits_ms.get(name, ()), groups) for name in groups[0]]
    tenants.sort(key=lambda one: (-max(case.p99_ms or 0 for case in one.cases), one.tenant))
    wholes = [
        {"": Group("", one.calls, one.admitted, one.queued, one.refused, one.waits)}
        for one in found
    ]
    everybody = _compared("", [wait_ms for _, wait_ms in recorded], wholes)
    return Comparison(
        calls=found[0].calls,
        since=since,
        end_ms=max(one.end_ms for one in found),
        sentence=sentence,
        cases=[_case(one) for one in found],
        tenants=[everybody, *tenants[:_MOST_COMPARED]],
        more_tenants=max(0, len(tenants) - _MOST_COMPARED),
    )


def _compared(
    name: str, recorded_ms: Iterable[float], groups: Sequence[Mapping[str, Group]]
) -> ComparedTenant:
    waits = waits_of(recorded_ms)
    each = [group[name] for group in groups]
    return ComparedTenant(
        name,
        each[0].calls,
        waits.p50_ms,
        waits.p99_ms,
        [
            TenantCase(one.queued, sum(one.refused.values()), one.waits.p50_ms, one.waits.p99_ms)
            for one in each
        ],
    )


def _case(found: Findings) -> RehearsedCase:
    """Return the case for a page, with the maximum of neighbouring moments so that peaks remain."""
    drawing = drawing_of(found)
    together = -(-len(drawing.moments) // _MOST_MOMENTS)

    def peaks(values: Sequence[float]) -> list[float]:
        return [max(values[at : at + together]) for at in range(0, len(values), together)]

    def thinned(curves: Sequence[ChartCurve]) -> list[ChartCurve]:
        return [ChartCurve(one.name, peaks(one.values)) for one in curves]

    return RehearsedCase(
        name=found.name,
        queued=found.queued,
        refused=found.refused,
        p50_ms=found.waits.p50_ms,
        p99_ms=found.waits.p99_ms,
        binding=found.binding,
        at_ms=[*drawing.moments[::together]],
        waiting=thinned(drawing.waiting),
        used=thinned(drawing.used),
        gave_way=found.gave_way,
        tiers=[TierCase(one.tier, one.jobs, one.late, one.cost_micros) for one in found.tiers],
    )


def round_up(value: float) -> float:
    """Return the least of 1, 2 and 5 times a power of ten that is not below `value`."""
    if value <= 1:
        return 1.0
    power = 10.0 ** int(log10(value))
    return next(step * power for step in _STEPS if step * power >= value * (1 - 1e-9))


def time_ticks_ms(end_ms: float, most: int) -> list[float]:
    """Return evenly spaced round moments from 0 on, at most `most` and one more."""
    step_ms = next((one for one in _TIME_STEPS_MS if end_ms / one <= most), None)
    if step_ms is None:
        step_ms = ceil(end_ms / most / 604_800_000) * 604_800_000.0
    return [number * step_ms for number in range(int(end_ms / step_ms) + 1)]


def moment_in_words(at_ms: float) -> str:
    """Return a moment as `0`, `500 ms`, `45 s`, `10 min`, `1 h 30` or `2 d`."""
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


_WIDTH, _PANEL_HEIGHT = 960, 220
_LEFT, _RIGHT, _TOP, _GAP, _LEGEND = 64, 24, 78, 72, 24
# More points than this make a line unreadable.
_MOST_POINTS = 120
# Distinguishable with colour blindness (Okabe and Ito).
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
_STYLE = """
.tg{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-size:13px}
.tg .ground{fill:#fff}.tg text{fill:#333}.tg .quiet{fill:#666}
.tg .head{font-size:16px;font-weight:600;fill:#111}.tg .row{font-size:14px;font-weight:600}
.tg .name{font-weight:600}
.tg .grid{stroke:#e4e4e4}.tg .axis{stroke:#999}
@media (prefers-color-scheme:dark){
.tg .ground{fill:#16181c}.tg text{fill:#d5d7da}.tg .quiet{fill:#9aa0a6}.tg .head{fill:#fff}
.tg .grid{stroke:#2c3036}.tg .axis{stroke:#666}}
"""


def svg_of(title: str, drawings: Sequence[Drawing]) -> str:
    """Return an SVG of waiters and of the use of limits, all on the same scales.

    For one policy the two panels are above each other; several policies have a row each, with the
    panels side by side.
    """
    end_ms = max((one.moments[-1] for one in drawings), default=0.0) or 1.0
    top = round_up(max((max(one.waiting_at_once) for one in drawings), default=0.0))
    alone = len(drawings) == 1
    between = (_WIDTH - _LEFT - _RIGHT - _GAP) / 2
    width = _WIDTH - _LEFT - _RIGHT if alone else between
    row = _PANEL_HEIGHT + _LEGEND + _GAP
    parts = []
    for number, one in enumerate(drawings):
        y = _TOP + _LEGEND + number * row
        if not alone:
            parts.append(
                f'<text class="row" x="{_LEFT}" y="{y - 46:.0f}">{escape(one.name)}</text>'
            )
        frame = _Frame(_LEFT, y, width, end_ms, one.moments, top)
        parts += frame.panel("Waiting", "{:,.0f}")
        parts += frame.stacked(one.waiting)
        x, y = (_LEFT, y + row) if alone else (_LEFT + between + _GAP, y)
        frame = _Frame(x, y, width, end_ms, one.moments, 1.0)
        parts += frame.panel("In use", "{:.0%}")
        parts += frame.lines(one.used)
    height = _TOP + row * max(2 if alone else 1, len(drawings))
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="tg" viewBox="0 0 {_WIDTH} {height}" '
        f'role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect class="ground" width="{_WIDTH}" height="{height}"/>',
        f'<text class="head" x="{_LEFT}" y="26">{escape(title)}</text>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


@dataclass(frozen=True, slots=True)
class _Frame:
    """One panel: its place and its scales."""

    left: float
    top: float
    width: float
    end_ms: float
    moments: Sequence[float]
    most: float

    @property
    def bottom(self) -> float:
        return self.top + _PANEL_HEIGHT

    def x(self, at_ms: float) -> float:
        return self.left + at_ms / self.end_ms * self.width

    def y(self, value: float) -> float:
        # A use above the limit is cut off so that it stays within the panel.
        return self.bottom - min(1.08, value / self.most) * (_PANEL_HEIGHT - 8)

    def panel(self, name: str, form: str) -> Iterable[str]:
        """Yield the panel's name, grid and axes."""
        y = self.top - 26
        yield f'<text class="name" x="{self.left:.0f}" y="{y:.0f}">{escape(name)}</text>'
        for part in (0, 0.25, 0.5, 0.75, 1.0):
            y = self.y(self.most * part)
            style = "grid" if part else "axis"
            right = self.left + self.width
            yield (
                f'<line class="{style}" x1="{self.left:.0f}" x2="{right:.0f}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            if part in (0, 0.5, 1.0):
                label = form.format(self.most * part)
                yield (
                    f'<text class="quiet" text-anchor="end" x="{self.left - 8:.0f}" '
                    f'y="{y + 4:.1f}">{label}</text>'
                )
        for at_ms in time_ticks_ms(self.end_ms, max(2, int(self.width / 110))):
            x = self.x(at_ms)
            yield (
                f'<text class="quiet" text-anchor="middle" x="{x:.1f}" '
                f'y="{self.bottom + 18:.0f}">{moment_in_words(at_ms)}</text>'
            )

    def stacked(self, curves: Sequence[ChartCurve]) -> Iterable[str]:
        """Yield areas stacked on one another."""
        below = [0.0] * len(self.moments)
        for number, curve in enumerate(curves):
            above = [one + more for one, more in zip(below, curve.values, strict=True)]
            there = [f"{self.x(at):.1f},{self.y(v):.1f}" for at, v in self._at(above)]
            back = [f"{self.x(at):.1f},{self.y(v):.1f}" for at, v in reversed(self._at(below))]
            yield (
                f'<polygon fill="{_colour(number)}" fill-opacity=".75" '
                f'points="{" ".join([*there, *back])}">'
                f"<title>{escape(curve.name)}</title></polygon>"
            )
            below = above
        yield from self._legend(curves)

    def lines(self, curves: Sequence[ChartCurve]) -> Iterable[str]:
        """Yield lines of averaged values, the most important one last so that it is on top."""
        for number, curve in reversed(list(enumerate(curves))):
            points = " ".join(
                f"{self.x(at):.1f},{self.y(v):.1f}" for at, v in _thinned(self._at(curve.values))
            )
            yield (
                f'<polyline fill="none" stroke="{_colour(number)}" stroke-width="1.8" '
                f'stroke-linejoin="round" points="{points}"><title>{escape(curve.name)}</title>'
                "</polyline>"
            )
        yield from self._legend(curves)

    def _at(self, values: Sequence[float]) -> list[tuple[float, float]]:
        return list(zip(self.moments, values, strict=True))

    def _legend(self, curves: Sequence[ChartCurve]) -> Iterable[str]:
        x = self.left
        for number, curve in enumerate(curves):
            wide = 30 + 7.2 * len(curve.name)
            if x + wide > self.left + self.width + _GAP / 2:
                return
            y = self.top - 10
            yield (
                f'<rect x="{x:.0f}" y="{y - 9:.0f}" width="11" height="11" rx="2" '
                f'fill="{_colour(number)}"/>'
                f'<text x="{x + 16:.0f}" y="{y:.0f}">{escape(curve.name)}</text>'
            )
            x += wide


def _thinned(points: list[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    together = -(-len(points) // _MOST_POINTS)
    for first in range(0, len(points), together):
        some = points[first : first + together]
        yield sum(at for at, _ in some) / len(some), sum(value for _, value in some) / len(some)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


_EIGHTHS = " ▁▂▃▄▅▆▇█"
_HEIGHT = 6
_LABEL = 8
_TICK = 14
NARROWEST, WIDEST = 40, 110


def chart_of(drawings: Sequence[Drawing], width: int) -> str:
    """Return a text chart of waiters, `width` characters wide.

    For one policy the use of the limit that blocks most is below it. Several policies have a chart
    each, all on one scale.
    """
    width = max(NARROWEST, min(width, WIDEST)) - _LABEL - 2
    end_ms = max((one.moments[-1] for one in drawings), default=0.0)
    top = round_up(max((max(one.waiting_at_once) for one in drawings), default=0.0))
    lines: list[str] = []
    for one in drawings:
        of_it = f", {one.name}" if len(drawings) > 1 else ""
        lines += [
            f"Waiting{of_it}",
            *_area(one, one.waiting_at_once, top, f"{top:,.0f}", end_ms, width),
        ]
        if one.used and len(drawings) == 1:
            curve = one.used[0]
            lines += ["", f"In use of {curve.name}"]
            lines += _area(one, curve.values, max(1.0, *curve.values), "100 %", end_ms, width)
        lines.append(_axis(end_ms, width))
        lines.append("")
    return "\n".join(lines[:-1])


def _area(
    drawing: Drawing,
    values: Sequence[float],
    top: float,
    label: str,
    end_ms: float,
    width: int,
) -> list[str]:
    columns = _columns(drawing, values, end_ms, width)
    # Any value above 0 is visible.
    levels = [max(int(value > 0), round(min(1.0, value / top) * _HEIGHT * 8)) for value in columns]
    lines = []
    for row in range(_HEIGHT - 1, -1, -1):
        cells = "".join(_EIGHTHS[max(0, min(8, level - row * 8))] for level in levels)
        named = label if row == _HEIGHT - 1 else "0" if row == 0 else ""
        lines.append(f"{named:>{_LABEL}} ┤{cells}".rstrip())
    return lines


def _columns(drawing: Drawing, values: Sequence[float], end_ms: float, width: int) -> list[float]:
    """Return the maximum of each column; a column without a moment repeats the one before."""
    columns: list[float | None] = [None] * width
    for at_ms, value in zip(drawing.moments, values, strict=True):
        place = min(width - 1, int(at_ms / end_ms * width)) if end_ms else 0
        columns[place] = max(value, columns[place] or 0.0)
    # Sampling ends with the last call.
    ended = max((n for n, value in enumerate(columns) if value is not None), default=0)
    found: list[float] = []
    for number, most in enumerate(columns):
        before = found[-1] if found and number < ended else 0.0
        found.append(before if most is None else most)
    return found


def _axis(end_ms: float, width: int) -> str:
    line, words = ["─"] * width, [" "] * (width + _TICK)
    for at_ms in time_ticks_ms(end_ms, max(2, width // _TICK)):
        place = min(width - 1, round(at_ms / end_ms * (width - 1))) if end_ms else 0
        line[place] = "┬"
        label = moment_in_words(at_ms)
        begin = min(place, width - len(label))
        words[begin : begin + len(label)] = label
    indent = " " * _LABEL
    return f"{indent} └{''.join(line)}\n{indent}  {''.join(words).rstrip()}"


_PAGE_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;margin:2rem auto;
max-width:62rem;padding:0 1rem;color:#222;background:#fff}
svg{width:100%;height:auto}h1{font-size:1.4rem}h2{font-size:1.05rem;margin:2rem 0 .5rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .9rem .3rem 0;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
td.figure,th.figure{text-align:right}
@media (prefers-color-scheme:dark){body{color:#d5d7da;background:#16181c}
th,td{border-color:#33373d}}
"""


def page_of(title: str, sentence: str, svg: str, tables: Sequence[Table]) -> str:
    """Return an HTML page."""
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(title)}</title>",
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<style>{_PAGE_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p>{escape(sentence)}</p>{svg}",
    ]
    for table in tables:
        parts.append(f'<h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>')
        figures = [table.holds_figures(number) for number in range(len(table.columns))]
        parts += [_cell("th", *cell) for cell in zip(table.columns, figures, strict=True)]
        parts.append("</tr></thead><tbody>")
        for row in table.rows:
            cells = (_cell("td", *cell) for cell in zip(row, figures, strict=True))
            parts.append(f"<tr>{''.join(cells)}</tr>")
        parts.append("</tbody></table></div>")
    return "\n".join([*parts, "</body></html>", ""])


def _cell(tag: str, text: str, figure: bool) -> str:
    kind = ' class="figure"' if figure else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"
