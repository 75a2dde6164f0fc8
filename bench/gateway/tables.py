"""The results as tables, for the terminal and for `docs/benchmarks.md`. Pure."""

from __future__ import annotations

from collections.abc import Callable

from bench.gateway.bars import DIRECT, Results, verdicts
from bench.gateway.entries import BARE, ENTRIES, OURS, Entry
from bench.grid import Grid

Cell = Callable[[Results, Entry], str]
_NOTE_CHARS = 140


def grids(results: Results) -> list[Grid]:
    """All tables for which there are results."""
    found = [
        _grid("Side by side", GLANCE, results),
        _bars(results),
        _grid("At half of each one's capacity, 50 ms upstream", HALF, results),
        _grid("Memory and open streams", MEMORY, results),
        _jobs(results),
    ]
    return [grid for grid in found if grid.rows]


def _grid(title: str, columns: dict[str, Cell], results: Results) -> Grid:
    rows = []
    for entry in ENTRIES:
        cells = [_cell(cell, results, entry) for cell in columns.values()]
        if any(cell != "-" for cell in cells):
            rows.append([entry.name, *cells])
    return Grid(title, ("gateway", *columns), rows)


def _bars(results: Results) -> Grid:
    rows = []
    if OURS.name in results.by_gateway:
        rows = [(one.figure, one.bar, one.ours, one.verdict) for one in verdicts(results)]
    return Grid("Our figures against their bars", ("figure", "bar", "ours", "verdict"), rows)


def _jobs(results: Results) -> Grid:
    figures = results.by_gateway.get(OURS.name, {}).get("jobs", {})
    rows = []
    if "per_s" in figures:
        roles = ("serve", "worker", "postgres", "valkey")
        rows.append(
            [
                f"{figures['jobs']:,}",
                f"{figures['apis']} / {figures['workers']}",
                f"{figures['per_s']:.0f}",
                f"{figures['submits_per_s']:.0f}",
                f"{figures['submit_p99_ms']:.0f}",
                *(f"{figures[f'{role}_us']:.0f}" for role in roles),
                f"{figures['most_in_flight']}",
            ]
        )
    headers = (
        *("jobs", "API / worker processes", "succeeded a s", "submits a s", "submit p99 ms"),
        *("API CPU us a job", "worker", "PostgreSQL", "Valkey", "most calls in flight"),
    )
    return Grid("The job path", headers, rows)


def _cell(cell: Cell, results: Results, entry: Entry) -> str:
    try:
        return cell(results, entry)
    except KeyError:
        return "-"


def _figure(scenario: str, figure: str, form: str = "{:.0f}", unit: float = 1.0) -> Cell:
    return lambda results, entry: form.format(results.of(entry, scenario, figure) / unit)


def _pair(scenario: str, first: str, second: str, form: str = "{:.1f}", unit: float = 1.0) -> Cell:
    def cell(results: Results, entry: Entry) -> str:
        return " / ".join(
            _figure(scenario, figure, form, unit)(results, entry) for figure in (first, second)
        )

    return cell


def _about(results: Results, entry: Entry) -> str:
    if entry.name not in results.by_gateway:
        raise KeyError(entry.name)
    return str(results.by_gateway[entry.name].get("about", {}).get("said", "")) or "-"


def _against_bare(scenario: str) -> Cell:
    def cell(results: Results, entry: Entry) -> str:
        own, bare = (results.of(one, scenario, "gateway_us") for one in (entry, BARE))
        return f"{own / bare:.2f}"

    return cell


def _servers(scenario: str) -> Cell:
    """Of the servers that it keeps its state in: Valkey, then PostgreSQL."""

    def cell(results: Results, entry: Entry) -> str:
        figures = results.by_gateway[entry.name][scenario]
        used = [figures[f"{name}_us"] for name in ("valkey", "postgres") if f"{name}_us" in figures]
        return " / ".join(f"{one:.0f}" for one in used) or "-"

    return cell


def _added(results: Results, entry: Entry) -> str:
    return " / ".join(f"{results.added_ms(entry, part):.1f}" for part in ("p50", "p99"))


def _note(results: Results, entry: Entry) -> str:
    """Why figures are missing."""
    said = {
        str(figures["failed"])
        for figures in results.by_gateway[entry.name].values()
        if "failed" in figures
    }
    if not said:
        raise KeyError(entry.name)
    return "; ".join(sorted(said)).replace("|", "/")[:_NOTE_CHARS]


def direct_line(results: Results) -> str | None:
    """What the load generator and the upstream do with nothing between them."""
    try:
        per_s = results.of(DIRECT, "closed", "per_s")
        p50, p99 = (results.of(DIRECT, "delayed", f"{part}_ms") for part in ("p50", "p99"))
    except KeyError:
        return None
    return (
        f"with nothing between: {per_s:,.0f} requests a second, and p50 / p99 of "
        f"{p50:.1f} / {p99:.1f} ms at a 50 ms upstream"
    )


GLANCE: dict[str, Cell] = {
    "what": _about,
    "CPU us a request": _figure("closed", "gateway_us"),
    "x bare": _against_bare("closed"),
    "Valkey / PostgreSQL CPU us": _servers("closed"),
    "requests a s": _figure("closed", "per_s"),
    "added p50 / p99 ms, 50 ms upstream": _added,
    "CPU us a stream of 50": _figure("streams", "gateway_us"),
    "x bare ": _against_bare("streams"),
    "reads a stream": _figure("streams", "reads_each"),
    "": _note,
}
HALF: dict[str, Cell] = {
    "requests a s": _figure("half", "rate"),
    "added p50 / p99 ms": _pair("half", "added_p50_ms", "added_p99_ms"),
    "CPU us a request": _figure("half", "gateway_us"),
    "Valkey / PostgreSQL CPU us": _servers("half"),
}
MEMORY: dict[str, Cell] = {
    "MB before, and with streams open": _pair(
        "opened", "before_bytes", "most_bytes", "{:.0f}", 1e6
    ),
    "streams open concurrently": _figure("opened", "most_open"),
    "came whole, of 2,000": _figure("opened", "whole"),
    "first event p99 ms": _figure("opened", "first_p99_ms"),
    "MB after 20,000 / 200,000 requests": _pair(
        "memory", "early_bytes", "late_bytes", "{:.0f}", 1e6
    ),
}
