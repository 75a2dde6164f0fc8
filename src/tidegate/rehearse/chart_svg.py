"""A rehearsal as a picture: one SVG without scripts, for light and dark. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from tidegate.rehearse.curves import Curve, Drawing, moment_in_words, round_up, time_ticks_ms

_WIDTH, _PANEL_HEIGHT = 960, 220
_LEFT, _RIGHT, _TOP, _GAP, _LEGEND = 64, 24, 78, 72, 24
# A line with more points than this is a thicket.
_MOST_POINTS = 120
# Told apart by people who do not see all colours (Okabe and Ito).
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
    """Who waits, and how much of the limits is used: for one policy above one another, for several
    side by side, a row for each; all on the same scales."""
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


class _Frame:
    """One panel: where it stands, and its scales."""

    def __init__(
        self,
        left: float,
        top: float,
        width: float,
        end_ms: float,
        moments: Sequence[float],
        most: float,
    ) -> None:
        self.left = left
        self.top = top
        self.width = width
        self.bottom = top + _PANEL_HEIGHT
        self._end_ms = end_ms
        self._moments = moments
        self._most = most

    def x(self, at_ms: float) -> float:
        return self.left + at_ms / self._end_ms * self.width

    def y(self, value: float) -> float:
        # What is over a limit would leave the panel.
        return self.bottom - min(1.08, value / self._most) * (_PANEL_HEIGHT - 8)

    def panel(self, name: str, form: str) -> Iterable[str]:
        """Its name, grid and axes."""
        y = self.top - 26
        yield f'<text class="name" x="{self.left:.0f}" y="{y:.0f}">{escape(name)}</text>'
        for part in (0, 0.25, 0.5, 0.75, 1.0):
            y = self.y(self._most * part)
            style = "grid" if part else "axis"
            right = self.left + self.width
            yield (
                f'<line class="{style}" x1="{self.left:.0f}" x2="{right:.0f}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            if part in (0, 0.5, 1.0):
                label = form.format(self._most * part)
                yield (
                    f'<text class="quiet" text-anchor="end" x="{self.left - 8:.0f}" '
                    f'y="{y + 4:.1f}">{label}</text>'
                )
        for at_ms in time_ticks_ms(self._end_ms, max(2, int(self.width / 110))):
            x = self.x(at_ms)
            yield (
                f'<text class="quiet" text-anchor="middle" x="{x:.1f}" '
                f'y="{self.bottom + 18:.0f}">{moment_in_words(at_ms)}</text>'
            )

    def stacked(self, curves: Sequence[Curve]) -> Iterable[str]:
        """One area on the other."""
        below = [0.0] * len(self._moments)
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

    def lines(self, curves: Sequence[Curve]) -> Iterable[str]:
        """The one that matters most is drawn last, over the others; means of neighbours."""
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
        return list(zip(self._moments, values, strict=True))

    def _legend(self, curves: Sequence[Curve]) -> Iterable[str]:
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
