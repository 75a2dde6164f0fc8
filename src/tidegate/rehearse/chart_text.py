"""A rehearsal drawn with letters: who waits, and how much is used, over time. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.rehearse.curves import Drawing, moment_in_words, round_up, time_ticks_ms

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_HEIGHT = 6
_LABEL = 8
_TICK = 14
NARROWEST, WIDEST = 40, 110


def chart_of(drawings: Sequence[Drawing], width: int) -> str:
    """How many wait; for one policy below it the use of the limit that holds up most, for several
    each with a chart of its own, all on one scale. `width` is in letters."""
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
    shown = _columns(drawing, values, end_ms, width)
    # What is there at all is seen.
    levels = [max(int(value > 0), round(min(1.0, value / top) * _HEIGHT * 8)) for value in shown]
    lines = []
    for row in range(_HEIGHT - 1, -1, -1):
        cells = "".join(_EIGHTHS[max(0, min(8, level - row * 8))] for level in levels)
        named = label if row == _HEIGHT - 1 else "0" if row == 0 else ""
        lines.append(f"{named:>{_LABEL}} ┤{cells}".rstrip())
    return lines


def _columns(drawing: Drawing, values: Sequence[float], end_ms: float, width: int) -> list[float]:
    """The greatest value of each column; one without a moment of its own continues the last."""
    columns: list[float | None] = [None] * width
    for at_ms, value in zip(drawing.moments, values, strict=True):
        place = min(width - 1, int(at_ms / end_ms * width)) if end_ms else 0
        columns[place] = max(value, columns[place] or 0.0)
    # Sampling ends with the last call.
    ended = max((n for n, value in enumerate(columns) if value is not None), default=0)
    found: list[float] = []
    for number, seen in enumerate(columns):
        before = found[-1] if found and number < ended else 0.0
        found.append(before if seen is None else seen)
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
