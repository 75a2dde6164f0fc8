"""A rehearsal in figures and words: tables for one policy, and for several side by side. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tidegate.policy.words import span_in_words
from tidegate.rehearse.findings import Findings, Group, LimitUse, Spread

_FIGURE = re.compile(r"-|[\d.,]+( ?(ms|s|min|h|%|days?))?( \d+ (s|min))?")


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    right_from: int | None = None

    def holds_figures(self, number: int) -> bool:
        """Whether a column is best set to the right; `right_from` says so of all from there on."""
        if self.right_from is not None:
            return number >= self.right_from
        cells = [row[number] for row in self.rows]
        return any(cells) and all(not cell or _FIGURE.fullmatch(cell) for cell in cells)


def tables_of(found: Sequence[Findings]) -> list[Table]:
    """All that is to be said of one policy, or what of several differs."""
    if len(found) == 1:
        [one] = found
        return [
            _limits(one),
            _groups("Tenants", "tenant", one.tenants, shares=one.shares_of),
            _groups("Kinds", "kind", one.kinds),
            *([_spreads(one)] if one.spreads else []),
        ]
    return [_side_by_side(found)]


def sentence_of(found: Findings) -> str:
    """What happened, for people."""
    said = [title_of(found)]
    if found.refused:
        refused = sum(found.refused.values())
        why = ", ".join(f"{many:,} {reason}" for reason, many in found.refused.items())
        said.append(f"{refused:,} refused ({why})")
    if found.queued:
        said.append(f"{found.queued:,} found no room and waited: 429s that nobody got")
    else:
        said.append("none had to wait")
    binding = found.binding
    if len(binding) > 1:
        said.append(f"{', '.join(binding[:-1])} and {binding[-1]} bind")
    else:
        said.append(f"{binding[0]} binds" if binding else "no limit binds")
    late_ms = found.end_ms - found.span_ms
    if late_ms > 0.2 * found.span_ms and found.queued:
        said.append(f"what waited was done {span_in_words(late_ms)} after the last arrival")
    return "; ".join(said) + "."


def title_of(found: Findings) -> str:
    """Of what load."""
    return f"{found.calls:,} calls in {span_in_words(found.span_ms)}"


def milliseconds(value: float | None) -> str:
    """`0`, `12 ms`, `3.4 s`, `2 min 5 s`."""
    if value is None:
        return "-"
    if 1000 <= value < 60_000:
        return f"{value / 1000:.1f} s"
    return "0" if value < 2 else span_in_words(value)


def _limits(found: Findings) -> Table:
    columns = ("limit", "", "used", "peak", "held up", "refused", "")
    ordered = sorted(found.limits, key=lambda one: -one.held_up)
    return Table("Limits", columns, [_limit_row(one) for one in ordered])


def _limit_row(one: LimitUse) -> tuple[str, ...]:
    return (
        one.limit,
        one.words,
        f"{one.used:.0%}",
        f"{one.peak:,}",
        f"{one.held_up:.0%}" if one.held_up else "",
        f"{one.refused:,}" if one.refused else "",
        "binds" if one.binds else "",
    )


def _groups(title: str, column: str, groups: Sequence[Group], shares: str | None = None) -> Table:
    columns: tuple[str, ...] = (
        column,
        "calls",
        "waited",
        "refused",
        "p50",
        "p95",
        "p99",
        "longest",
    )
    rows: list[tuple[str, ...]] = [_group_row(one) for one in groups]
    if shares:
        columns += (f"share of {shares}", "by weight")
        rows = [
            (*row, _part(one.share), _part(one.ideal))
            for row, one in zip(rows, groups, strict=True)
        ]
    return Table(title, columns, rows)


def _group_row(one: Group) -> tuple[str, ...]:
    waits = one.waits
    return (
        one.name,
        f"{one.calls:,}",
        f"{one.queued:,}",
        f"{sum(one.refused.values()):,}",
        *map(milliseconds, (waits.p50_ms, waits.p95_ms, waits.p99_ms, waits.longest_ms)),
    )


def _spreads(found: Findings) -> Table:
    columns = ("tenant", "mean wait", "from", "to", "p95", "from", "to", "refused", "from", "to")
    rows: list[tuple[str, ...]] = [
        (
            spread.name or "(all)",
            *_spread(spread.mean_ms, milliseconds),
            *_spread(spread.p95_ms, milliseconds),
            *_spread(spread.refused, "{:,.0f}".format),
        )
        for spread in found.spreads
    ]
    return Table(f"Over {found.plays} plays, each call moved a little", columns, rows)


def _spread(one: Spread | None, told: Callable[[float], str]) -> tuple[str, str, str]:
    return ("-",) * 3 if one is None else (told(one.mean), told(one.lowest), told(one.highest))


def _side_by_side(found: Sequence[Findings]) -> Table:
    rows = [
        ("refused", *(f"{sum(one.refused.values()):,}" for one in found)),
        ("waited", *(f"{one.queued:,}" for one in found)),
        *(
            (f"wait {name}", *(milliseconds(getattr(one.waits, field)) for one in found))
            for name, field in (("p50", "p50_ms"), ("p95", "p95_ms"), ("p99", "p99_ms"))
        ),
    ]
    for what, of in (("tenant", "tenants"), ("kind", "kinds")):
        groups: list[list[Group]] = [getattr(one, of) for one in found]
        if len(groups[0]) < 2:
            continue
        for number, group in enumerate(groups[0]):
            cells = (milliseconds(some[number].waits.p95_ms) for some in groups)
            rows.append((f"wait p95, {what} {group.name}", *cells))
            if what == "tenant" and found[0].spreads:
                ranges = (_range(some.spreads[number + 1].p95_ms) for some in found)
                rows.append((f"  over {found[0].plays} plays", *ranges))
            if any(some[number].refused for some in groups):
                refused = (f"{sum(some[number].refused.values()):,}" for some in groups)
                rows.append((f"refused, {what} {group.name}", *refused))
    names = list(dict.fromkeys(limit.limit for one in found for limit in one.limits))
    for name in names:
        uses = [{limit.limit: limit for limit in one.limits}.get(name) for one in found]
        if any(use and use.used for use in uses):
            rows.append((f"used of {name}", *(_part(use.used if use else None) for use in uses)))
    rows.append(("binds", *("\n".join(one.binding) or "nothing" for one in found)))
    return Table(title_of(found[0]), ("", *(one.name for one in found)), rows, right_from=1)


def _range(one: Spread | None) -> str:
    return "-" if one is None else f"{milliseconds(one.lowest)} to {milliseconds(one.highest)}"


def _part(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
