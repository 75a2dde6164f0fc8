"""The results as tables, for the terminal and for `docs/benchmarks.md`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.grid import Grid
from bench.limiter.bars import LOADS, Results, verdicts
from bench.peers.catalogue import (
    ENTRIES,
    EVALSHA,
    LOCAL,
    LOCAL_THREADS,
    OURS,
    PEERS,
    RATE_PEERS,
    Entry,
)
from bench.verdicts import table

Cell = Callable[[Results, Entry], str]


def grids(results: Results) -> list[Grid]:
    """All tables for which there are results."""
    measured = [entry for entry in ENTRIES if entry.name in results.by_limiter]
    found = [_grid("Side by side", GLANCE, [OURS, *PEERS, LOCAL, LOCAL_THREADS, EVALSHA], results)]
    if OURS.name in results.by_limiter:
        found.append(
            table("Our figures against their bars", verdicts(results), f"ours ({OURS.label})")
        )
    found += [
        _grid(_load_title(scenario), _load_columns(scenario), measured, results)
        for scenario in LOADS
    ]
    found.append(_grid("Rates: 20 per 2 s window", RATE, [OURS, *RATE_PEERS], results))
    found.append(
        _grid(
            "10,000 waiters, limit 50, 20 ms calls",
            _load_columns("queued-10000"),
            [OURS, *PEERS],
            results,
        )
    )
    return [grid for grid in found if grid.rows]


def _grid(title: str, columns: dict[str, Cell], entries: Sequence[Entry], results: Results) -> Grid:
    rows = []
    for entry in entries:
        cells = [_cell(cell, results, entry) for cell in columns.values()]
        if any(cell != "-" for cell in cells):
            rows.append([entry.label, *cells])
    return Grid(title, ("limiter", *columns), rows)


def _cell(cell: Cell, results: Results, entry: Entry) -> str:
    try:
        return cell(results, entry)
    except KeyError:
        return "-"


def _figure(scenario: str, figure: str, form: str = "{:.0f}") -> Cell:
    def cell(results: Results, entry: Entry) -> str:
        value = results.by_limiter[entry.name][scenario][figure]
        return "never" if value is None else form.format(value)

    return cell


def _used(scenario: str) -> Cell:
    def cell(results: Results, entry: Entry) -> str:
        if "failed" in results.by_limiter[entry.name][scenario]:
            return "failed"
        shown = _figure(scenario, "used", "{:.1%}")(results, entry)
        over = results.over(entry, scenario)
        return f"{shown}, over by {over:.0f}" if over else shown

    return cell


def _uncontended(results: Results, entry: Entry) -> str:
    us, trips = (results.of(entry, "uncontended", name) for name in ("us", "round_trips"))
    return f"{us:.0f} ({trips:.0f})"


def _own_cpu(scenario: str) -> Cell:
    def cell(results: Results, entry: Entry) -> str:
        if entry.floor:
            return f"({results.of(entry, scenario, 'workers_us'):.0f})"
        return f"{results.own_cpu_us(entry, scenario):.0f}"

    return cell


def _cpus(scenario: str) -> Cell:
    def cell(results: Results, entry: Entry) -> str:
        if entry.floor:
            raise KeyError(entry.name)
        valkey = _figure(scenario, "valkey_us")(results, entry)
        return f"{valkey} / {_own_cpu(scenario)(results, entry)}"

    return cell


def _wake_up(scenario: str) -> Cell:
    def cell(results: Results, entry: Entry) -> str:
        return " / ".join(
            _figure(scenario, f"wake_{part}_ms", "{:.2f}")(results, entry)
            for part in ("p50", "p99")
        )

    return cell


def _most(scenario: str) -> Cell:
    def cell(results: Results, entry: Entry) -> str:
        peak, bound = (results.of(entry, scenario, name) for name in ("peak", "bound"))
        return f"{peak:.0f} of {bound:.0f}"

    return cell


def _restart(results: Results, entry: Entry) -> str:
    again = _figure("restart", "again_s", "{:.1f} s")(results, entry)
    return f"{_most('restart')(results, entry)}, {again}"


def _note(scenario: str) -> Cell:
    def cell(results: Results, entry: Entry) -> str:
        figures: Any = results.by_limiter[entry.name][scenario]
        words = []
        if "failed" in figures:
            words.append(str(figures["failed"]))
        elif not figures["per_s"]:
            words.append("let nobody in")
        if figures.get("errors"):
            words.append(f"{figures['errors']} errors: {figures.get('said', '')}")
        return "; ".join(words).replace("|", "/")[:120]

    return cell


GLANCE: dict[str, Cell] = {
    "uncontended us (round trips)": _uncontended,
    "used 5 / 20 ms": _used("load-5-20"),
    "used 5 / 200 ms": _used("load-5-200"),
    "used 50 / 20 ms": _used("load-50-20"),
    "used 50 / 200 ms": _used("load-50-200"),
    "used, 10,000 waiting": _used("queued-10000"),
    "round trips an admission": _figure("load-50-20", "round_trips", "{:.2f}"),
    "Valkey / process CPU us": _cpus("load-50-20"),
    "connections a process": _figure("load-50-20", "connections"),
    "wake-up p50 / p99 ms at 5": _wake_up("load-5-20"),
    "Jain at 5": _figure("load-5-20", "jain", "{:.2f}"),
    "used again after kill -9": _figure("crash", "again_s", "{:.1f} s"),
    "most, 5 s pause": _most("pause"),
    "most and grants again, empty restart": _restart,
}
RATE: dict[str, Cell] = {
    "used": _figure("rates", "used", "{:.1%}"),
    "most in any 2 s": _figure("rates", "most"),
    "round trips an admission": _figure("rates", "round_trips", "{:.2f}"),
    "Valkey CPU us an admission": _figure("rates", "valkey_us"),
}


def _load_columns(scenario: str) -> dict[str, Cell]:
    return {
        "used": _figure(scenario, "used", "{:.1%}"),
        "admissions a s": _figure(scenario, "per_s"),
        "most": _most(scenario),
        "round trips": _figure(scenario, "round_trips", "{:.2f}"),
        "script calls": _figure(scenario, "script_calls", "{:.2f}"),
        "Valkey CPU us": _figure(scenario, "valkey_us", "{:.1f}"),
        "of it scripts us": _figure(scenario, "script_us", "{:.1f}"),
        "process CPU us": _own_cpu(scenario),
        "connections": _figure(scenario, "connections", "{:.1f}"),
        "wake-up p50 / p99 ms": _wake_up(scenario),
        "Jain": _figure(scenario, "jain", "{:.3f}"),
        "": _note(scenario),
    }


def _load_title(scenario: str) -> str:
    _, bound, call_ms = scenario.split("-")
    return f"Limit {bound}, {int(bound) * 8} waiters, {call_ms} ms calls"
