"""The results as tables, for the terminal and for `docs/benchmarks.md`. Pure."""

from __future__ import annotations

from collections.abc import Callable

from bench.gateway.bars import DIRECT, Results, verdicts
from bench.gateway.entries import BARE, ENTRIES, OURS, Entry
from bench.grid import Grid
from bench.verdicts import table

Cell = Callable[[Results, Entry], str]
_NOTE_CHARS = 160


def grids(results: Results) -> list[Grid]:
    """All tables for which there are results."""
    tables = (
        ("Side by side", GLANCE),
        ("In detail", DETAIL),
        ("At half of each one's capacity, 50 ms upstream", HALF),
        ("Bodies of 20 MB beside small ones", BIG),
        ("In the format of GoModel's run", GOMODEL),
        ("In the format of ai-gateway-bench", AGENTS),
        ("Memory and open streams", MEMORY),
    )
    found = [_grid(title, columns, results) for title, columns in tables]
    found[1:1] = [_bars(results)]
    found += [_jobs(results), _batch(results), _idle(results), _missing(results)]
    return [grid for grid in found if grid.rows]


def _missing(results: Results) -> Grid:
    """Why figures are missing, where a scenario failed."""
    rows = []
    for entry in ENTRIES:
        whys: dict[str, list[str]] = {}
        for scenario, figures in results.by_gateway.get(entry.name, {}).items():
            if "failed" in figures:
                why = str(figures["failed"]).replace("|", "/")[:_NOTE_CHARS]
                whys.setdefault(why, []).append(scenario)
        rows += [[entry.name, ", ".join(which), why] for why, which in whys.items()]
    return Grid("What is missing, and why", ("gateway", "scenarios", "why"), rows)


def _grid(title: str, columns: dict[str, Cell], results: Results) -> Grid:
    rows = []
    for entry in ENTRIES:
        cells = [_cell(cell, results, entry) for cell in columns.values()]
        if any(cell not in ("-", entry.does) for cell in cells):
            rows.append([entry.name, *cells])
    return Grid(title, ("gateway", *columns), rows)


def _bars(results: Results) -> Grid:
    measured = OURS.name in results.by_gateway
    return table("Our relay against its bars", verdicts(results) if measured else ())


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
                f"{figures['wal_bytes'] / 1000:.1f}",
                f"{figures['valkey_reads']:.2f}",
            ]
        )
    headers = (
        *("jobs", "API / worker processes", "succeeded a s", "submits a s", "submit p99 ms"),
        *("API CPU us a job", "worker", "PostgreSQL", "Valkey", "most calls in flight"),
        *("kB of WAL a job", "round trips to Valkey a job"),
    )
    return Grid("The job path", headers, rows)


def _batch(results: Results) -> Grid:
    figures = results.by_gateway.get(OURS.name, {}).get("batch", {})
    rows = []
    if "per_s" in figures:
        roles = ("serve", "worker", "postgres", "valkey")
        rows.append(
            [
                f"{figures['lines']:,}",
                f"{figures['apis']} / {figures['workers']}",
                f"{figures['per_s']:.0f}",
                f"{figures['native_p50_ms']:.1f} / {figures['native_p99_ms']:.1f}",
                *(f"{figures[f'{role}_us']:.0f}" for role in roles),
                f"{figures['wal_bytes'] / 1000:.1f}",
            ]
        )
    headers = (
        *("lines", "API / worker processes", "lines a s", "p50 / p99 ms of calls meanwhile"),
        *("API CPU us a line", "worker", "PostgreSQL", "Valkey", "kB of WAL a line"),
    )
    return Grid("A batch, and native calls at 50 a second meanwhile", headers, rows)


def _idle(results: Results) -> Grid:
    figures = results.by_gateway.get(OURS.name, {}).get("idle", {})
    rows = []
    if "share" in figures:
        megabytes = (figures[f"{name}_bytes"] / 1e6 for name in ("api", "worker", "all"))
        a_minute = (figures[f"{name}_a_minute"] for name in ("wakes", "statements", "commands"))
        rows.append(
            [
                " / ".join(f"{one:.0f}" for one in megabytes),
                f"{figures['share']:.2%}",
                *(f"{one:.0f}" for one in a_minute),
                f"{figures['start_s']:.2f}",
            ]
        )
    headers = (
        *("MB (PSS), API process / worker / all", "CPU of both, of a core"),
        *("wake-ups a minute", "statements", "commands of Valkey", "s until `serve` is ready"),
    )
    return Grid("An idle deployment, and a start beside it", headers, rows)


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


def direct_line(results: Results) -> str | None:
    """The figures of the load generator and the upstream without a gateway between them."""
    try:
        per_s = results.of(DIRECT, "closed", "per_s")
        p50, p99 = (results.of(DIRECT, "paced", f"{part}_ms") for part in ("p50", "p99"))
    except KeyError:
        return None
    return (
        f"without a gateway: {per_s:,.0f} requests a second, and p50 / p99 of "
        f"{p50:.1f} / {p99:.1f} ms at 1,240 a second and a 50 ms upstream"
    )


GLANCE: dict[str, Cell] = {
    "limits, record": lambda _results, entry: entry.does,
    "CPU us a request, 64 connections": _figure("closed", "gateway_us"),
    "at 1,240 a second": _figure("paced", "gateway_us"),
    "p99 ms, 64 connections": _figure("closed", "p99_ms", "{:.1f}"),
    "added p50 / p99 ms at half of its capacity": _pair("half", "added_p50_ms", "added_p99_ms"),
    "CPU us a stream of 50": _figure("streams", "gateway_us"),
    "MB (PSS), idle / after the loads": _pair("held", "idle_bytes", "used_bytes", "{:.0f}", 1e6),
}
DETAIL: dict[str, Cell] = {
    "what": _about,
    "requests a s, 64 connections": _figure("closed", "per_s"),
    "p50 / p99 ms": _pair("closed", "p50_ms", "p99_ms"),
    "x bare": _against_bare("closed"),
    "Valkey / PostgreSQL CPU us": _servers("closed"),
    "the same at 1,240 a s": _servers("paced"),
    "added p50 / p99 ms at 1,240 a s": _added,
    "stream, x bare": _against_bare("streams"),
    "reads a stream": _figure("streams", "reads_each"),
}
HALF: dict[str, Cell] = {
    "requests a s": _figure("half", "rate"),
    "added p50 / p99 ms": _pair("half", "added_p50_ms", "added_p99_ms"),
    "CPU us a request": _figure("half", "gateway_us"),
    "Valkey / PostgreSQL CPU us": _servers("half"),
}
BIG: dict[str, Cell] = {
    "20 MB bodies a s": _figure("big", "big_per_s", "{:.1f}"),
    "small ones alone, p50 / p99 ms": _pair("big", "alone_p50_ms", "alone_p99_ms"),
    "beside them": _pair("big", "beside_p50_ms", "beside_p99_ms"),
    "small ones served": _figure("big", "beside_served", "{:.0%}"),
}
GOMODEL: dict[str, Cell] = {
    "p50 / p99 ms": _pair("gomodel", "p50_ms", "p99_ms", "{:.2f}"),
    "streamed": _pair("gomodel", "stream_p50_ms", "stream_p99_ms", "{:.2f}"),
    "first event p50 ms": _figure("gomodel", "first_p50_ms", "{:.2f}"),
    "peak requests a s": _figure("gomodel", "peak_per_s"),
    "peak MB (RSS)": _figure("gomodel", "peak_bytes", "{:.0f}", 1e6),
    "first 200 after s": _figure("gomodel", "ready_s", "{:.2f}"),
}
AGENTS: dict[str, Cell] = {
    "large_context: added ms, 1k": _figure("large_context", "added_1k_ms", "{:.2f}"),
    "10k": _figure("large_context", "added_10k_ms", "{:.2f}"),
    "100k": _figure("large_context", "added_100k_ms", "{:.2f}"),
    "concurrent_agents: p99 ms between reads, 16 / 64": _pair(
        "concurrent_agents", "gap_p99_ms_16", "gap_p99_ms_64"
    ),
    "events received, 64": _figure("concurrent_agents", "events_64", "{:.0%}"),
    "reads of 51, 64": _figure("concurrent_agents", "reads_64"),
    "head_of_line: first event p99 ms, alone / beside": _pair(
        "head_of_line", "alone_first_p99_ms", "beside_first_p99_ms"
    ),
    "failover: p50 ms, well / failing": _pair("failover", "well_p50_ms", "p50_ms"),
    "p99": _figure("failover", "p99_ms", "{:.1f}"),
    "served": _figure("failover", "served", "{:.1%}"),
    "tries at the failing one a request": _figure("failover", "asked", "{:.2f}"),
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
