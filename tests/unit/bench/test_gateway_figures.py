"""The arithmetic of the gateways' benchmark: a wrong figure would be believed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bench.gateway.bars import BARS, DIRECT, Results, medians, verdicts
from bench.gateway.entries import (
    BARE,
    ENTRIES,
    FERRO,
    LITELLM_LIMITED,
    LITELLM_PROXY,
    OURS,
    OURS_FOUR,
    OURS_TWO,
    PORTKEY_GATEWAY,
)
from bench.gateway.processes import await_rest, cpu_ns, family, proportional_bytes, resident_bytes
from bench.gateway.tables import direct_line, grids
from bench.grid import Grid, write

Found = dict[str, dict[str, dict[str, Any]]]
JOBS = {
    "jobs": 5000,
    "apis": 1,
    "workers": 2,
    "by_rules": 5000,
    "per_s": 3000.0,
    "submits_per_s": 2000.0,
    "submit_p99_ms": 40.0,
    "most_in_flight": 9,
    "wal_bytes": 5_000.0,
    "valkey_reads": 0.2,
    **{f"{role}_us": 100.0 for role in ("serve", "worker", "postgres", "valkey")},
}

BATCH = {
    "lines": 50_000,
    "apis": 1,
    "workers": 2,
    "per_s": 2000.0,
    "native_p50_ms": 4.0,
    "native_p99_ms": 20.0,
    "wal_bytes": 5_300.0,
    **{f"{role}_us": 100.0 for role in ("serve", "worker", "postgres", "valkey")},
}
IDLE = {
    "share": 0.005,
    "start_s": 1.0,
    **{f"{name}_bytes": 2.5e8 for name in ("api", "worker", "all")},
    **{f"{name}_a_minute": 400.0 for name in ("wakes", "statements", "commands")},
}


def found() -> Found:
    """Figures with which every bar is just met."""
    return {
        DIRECT: {"closed": {"per_s": 100_000.0}, "paced": {"p50_ms": 50.0, "p99_ms": 51.0}},
        BARE.name: {
            "closed": {"gateway_us": 100.0, "p99_ms": 10.0},
            "streams": {"gateway_us": 1000.0},
        },
        FERRO.name: {"closed": {"gateway_us": 250.0}, "paced": {"gateway_us": 500.0}},
        OURS.name: {
            "closed": {
                "gateway_us": 200.0,
                "valkey_us": 30.0,
                "postgres_us": 20.0,
                "per_s": 9.0,
                "p99_ms": 13.0,
            },
            "paced": {"p50_ms": 53.0, "p99_ms": 66.0, "gateway_us": 450.0},
            "half": {"added_p50_ms": 1.0, "added_p99_ms": 5.0},
            "streams": {"gateway_us": 1150.0},
            "held": {"idle_bytes": 9e7, "used_bytes": 1e8},
            "memory": {"early_bytes": 1e8, "late_bytes": 1.03e8, "requests": 200_000},
            "opened": {"most_open": 2000, "whole": 2000},
            "jobs": dict(JOBS),
            "batch": dict(BATCH),
            "idle": dict(IDLE),
        },
        OURS_TWO.name: {
            "closed": {"gateway_us": 220.0, "valkey_us": 30.0},
            "half": {"added_p50_ms": 1.0, "added_p99_ms": 5.0},
        },
        OURS_FOUR.name: {"closed": {"gateway_us": 220.0, "valkey_us": 29.0}},
        PORTKEY_GATEWAY.name: {"closed": {"gateway_us": 800.0}},
        LITELLM_PROXY.name: {"closed": {"gateway_us": 8000.0}},
        LITELLM_LIMITED.name: {"closed": {"gateway_us": 8000.0}},
    }


def words(of: Found) -> list[str]:
    return [one.verdict for one in verdicts(Results(of))]


def test_figures_at_their_bars_are_ok() -> None:
    assert words(found()) == ["ok"] * len(BARS)


def test_figures_beyond_their_bars_are_missed() -> None:
    worse = found()
    ours = worse[OURS.name]
    ours["closed"] |= {"gateway_us": 226.0, "p99_ms": 13.1}
    ours["paced"]["gateway_us"] = 451.0
    ours["half"]["added_p99_ms"] = 5.1
    worse[OURS_TWO.name]["half"]["added_p50_ms"] = 1.1
    ours["streams"]["gateway_us"] = 1151.0
    ours["held"]["idle_bytes"] = 9.1e7
    ours["memory"]["late_bytes"] = 1.04e8
    ours["opened"]["whole"] = 1999
    ours["jobs"]["per_s"] = 2999.0
    ours["batch"]["native_p99_ms"] = 20.1
    ours["idle"] |= {"share": 0.0051, "start_s": 1.01, "all_bytes": 2.51e8}
    worse[OURS_FOUR.name]["closed"]["gateway_us"] = 250.0
    assert words(worse) == ["missed"] * len(BARS)


def word_of(figure: str, of: Found) -> str:
    (verdict,) = [one.verdict for one in verdicts(Results(of)) if one.figure.startswith(figure)]
    return verdict


def test_jobs_that_a_model_had_to_judge_do_not_count() -> None:
    judged = found()
    judged[OURS.name]["jobs"]["by_rules"] = 4999
    assert word_of("jobs", judged) == "missed"


def test_a_bar_of_two_figures_is_missed_by_either() -> None:
    for scenario, name, value in (
        ("batch", "per_s", 1999.0),
        ("batch", "native_p99_ms", 20.1),
        ("idle", "share", 0.0051),
        ("idle", "all_bytes", 2.51e8),
    ):
        worse = found()
        worse[OURS.name][scenario][name] = value
        assert words(worse).count("missed") == 1, name


def test_more_processes_may_cost_a_tenth_more_and_valkey_nothing() -> None:
    for entry, name, value in (
        (OURS_TWO, "gateway_us", 221.0),
        (OURS_FOUR, "gateway_us", 221.0),
        (OURS_FOUR, "valkey_us", 31.0),
    ):
        worse = found()
        worse[entry.name]["closed"][name] = value
        assert word_of("CPU a call", worse) == "missed", name


def test_a_batch_of_a_few_lines_tells_nothing() -> None:
    few = found()
    few[OURS.name]["batch"]["lines"] = 2_000
    assert word_of("batch", few) == "not measured"


def test_what_was_not_measured_or_failed_is_never_ok() -> None:
    assert words({}) == ["not measured"] * len(BARS)
    failed = {name: {"closed": {"failed": "NotServing"}} for name in found()}
    assert words(failed) == ["not measured"] * len(BARS)


def test_memory_over_a_few_requests_tells_nothing() -> None:
    few = found()
    few[OURS.name]["memory"]["requests"] = 20_000
    assert words(few).count("not measured") == 1


def rows_of(title: str, of: Found) -> list[dict[str, str]]:
    (grid,) = [one for one in grids(Results(of)) if one.title == title]
    return [dict(zip(grid.headers, row, strict=True)) for row in grid.rows]


def test_a_row_compares_with_the_bare_relay_and_names_what_is_missing() -> None:
    given = found()
    given[LITELLM_PROXY.name]["half"] = {"failed": "NotServing: it | ended"}
    rows = {row["gateway"]: row for row in rows_of("In detail", given)}
    assert list(rows) == [entry.name for entry in ENTRIES if "closed" in given.get(entry.name, {})]
    ours = rows[OURS.name]
    assert (ours["x bare"], ours["Valkey / PostgreSQL CPU us"]) == ("2.00", "30 / 20")
    assert ours["added p50 / p99 ms at 1,240 a s"] == "3.0 / 15.0"
    assert rows[PORTKEY_GATEWAY.name]["added p50 / p99 ms at 1,240 a s"] == "-"
    assert rows_of("What is missing, and why", given) == [
        {"gateway": LITELLM_PROXY.name, "scenarios": "half", "why": "NotServing: it / ended"}
    ]
    (glance,) = [row for row in rows_of("Side by side", given) if row["gateway"] == OURS.name]
    assert glance["limits, record"] == "limits and record"
    (jobs,) = rows_of("The job path", given)
    assert (jobs["succeeded a s"], jobs["kB of WAL a job"]) == ("3000", "5.0")
    (batch,) = rows_of("A batch, and native calls at 50 a second meanwhile", given)
    assert (batch["lines a s"], batch["kB of WAL a line"]) == ("2000", "5.3")
    (idle,) = rows_of("An idle deployment, and a start beside it", given)
    assert (idle["CPU of both, of a core"], idle["statements"]) == ("0.50%", "400")


def test_what_is_between_nothing_is_told_when_it_was_measured() -> None:
    line = direct_line(Results(found()))
    assert line is not None
    assert "100,000 requests a second" in line
    assert direct_line(Results({})) is None


def test_runs_that_failed_count_only_where_all_did() -> None:
    failed: dict[str, Any] = {"failed": "NotServing"}
    tries: list[dict[str, Any]] = [
        failed,
        {"per_s": 1.0, "said": "a"},
        {"per_s": 5.0, "said": "b"},
        {"per_s": 2.0},
    ]
    assert medians(tries) == {"per_s": 2.0, "said": "a"}
    assert medians([failed, failed]) == failed


def test_tables_replace_what_is_between_their_own_markers(tmp_path: Path) -> None:
    file = tmp_path / "figures.md"
    text = "a\n<!-- {0}: written by the benchmark -->\nold\n<!-- {0}: end -->\nb\n"
    file.write_text(text.format("gateway") + text.format("limiter"))
    write("gateway", [Grid("New", ("x", "y"), [("1", "2")])], ["a line"], file)
    assert file.read_text() == (
        "a\n<!-- gateway: written by the benchmark -->\n\n- a line\n\n### New\n\n| x | y |\n"
        "| --- | --- |\n| 1 | 2 |\n\n<!-- gateway: end -->\nb\n" + text.format("limiter")
    )


def test_what_a_load_left_to_do_is_waited_for() -> None:
    """A record that is written behind makes a pause, then a batch; both looks after it are calm."""
    left_ms = iter([0, 60, 61, 100, 101, 102])
    looks: list[float] = []
    await_rest(lambda: next(left_ms) * 1_000_000, looks.append)
    assert (len(looks), next(left_ms, None)) == (5, None)


def test_a_process_is_told_what_it_has_used_and_holds() -> None:
    own = os.getpid()
    assert own in family(os.getppid())
    before_ns = cpu_ns([own])
    assert 0 < before_ns <= cpu_ns([own])
    assert resident_bytes([own]) > 1_000_000
    assert 1_000_000 < proportional_bytes([own]) <= resident_bytes([own]) * 1.01
