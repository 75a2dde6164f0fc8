"""Bars of our relay and our job path, next to the peers' figures of the same run. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.gateway.entries import (
    BARE,
    FERRO,
    LITELLM_LIMITED,
    LITELLM_PROXY,
    OURS,
    OURS_FOUR,
    OURS_TWO,
    PORTKEY_GATEWAY,
    Entry,
)
from bench.verdicts import Bar, Judge, Verdict, judged

Figures = Mapping[str, Any]
DIRECT = "direct"


def medians(tries: Sequence[Figures]) -> dict[str, Any]:
    """Of each figure over several runs; those of runs that failed only where all did."""
    good = [one for one in tries if "failed" not in one] or list(tries)
    return {
        key: median(one[key] for one in good if key in one)
        if isinstance(value, int | float)
        else value
        for key, value in good[0].items()
    }


# What a process may grow by between the first tenth of many requests and their end: an allocator's
# pages and a cache that fills, far below what one leaked object a request would be.
FLAT = 1.03
MANY = 200_000
BATCH_LINES = 50_000


@dataclass(frozen=True, slots=True)
class Results:
    """What each gateway gave in each scenario. A figure that is missing raises KeyError."""

    by_gateway: Mapping[str, Mapping[str, Figures]]

    def of(self, entry: Entry | str, scenario: str, figure: str) -> float:
        name = entry if isinstance(entry, str) else entry.name
        return float(self.by_gateway[name][scenario][figure])

    def added_ms(self, entry: Entry, part: str) -> float:
        """At 1,240 a second and 50 ms upstream, over what the same load takes without it."""
        figure = f"{part}_ms"
        return self.of(entry, "paced", figure) - self.of(DIRECT, "paced", figure)

    def times(self, scenario: str, peer: Entry, figure: str = "gateway_us") -> float:
        """Our processor time for one, or another figure, in that of another."""
        return self.of(OURS, scenario, figure) / self.of(peer, scenario, figure)


def verdicts(results: Results) -> list[Verdict]:
    return judged(BARS, results)


def _at_most(scenario: str, peer: Entry, most: float, figure: str = "gateway_us") -> Judge[Results]:
    def judge(results: Results) -> tuple[str, bool]:
        times = results.times(scenario, peer, figure)
        return f"{times:.2f} x", times <= most

    return judge


def _part_of(peer: Entry, parts: float) -> Judge[Results]:
    def judge(results: Results) -> tuple[str, bool]:
        found = 1 / results.times("closed", peer)
        return f"1/{found:.1f}", found >= parts

    return judge


def _added(entry: Entry) -> Judge[Results]:
    def judge(results: Results) -> tuple[str, bool]:
        p50, p99 = (results.of(entry, "half", f"added_{part}_ms") for part in ("p50", "p99"))
        return f"{p50:.1f} / {p99:.1f} ms", p50 <= 1 and p99 <= 5

    return judge


def _idle(results: Results) -> tuple[str, bool]:
    idle_bytes = results.of(OURS, "held", "idle_bytes")
    return f"{idle_bytes / 1e6:.0f} MB", idle_bytes <= 90e6


def _up(results: Results) -> tuple[str, bool]:
    all_bytes = results.of(OURS, "idle", "all_bytes")
    return f"{all_bytes / 1e6:.0f} MB", all_bytes <= 250e6


def _idle_share(results: Results) -> tuple[str, bool]:
    share = results.of(OURS, "idle", "share")
    return f"{share:.2%}", share <= 0.005


def _start(results: Results) -> tuple[str, bool]:
    start_s = results.of(OURS, "idle", "start_s")
    return f"{start_s:.2f} s", start_s <= 1


def _batch(results: Results) -> tuple[str, bool]:
    per_s, p99_ms = (results.of(OURS, "batch", name) for name in ("per_s", "native_p99_ms"))
    if results.of(OURS, "batch", "lines") < BATCH_LINES:
        raise KeyError("too few lines to tell")
    return f"{per_s:.0f} a second, {p99_ms:.0f} ms", per_s >= 2000 and p99_ms <= 20


def _scale_out(results: Results) -> tuple[str, bool]:
    """At 64 connections: CPU of the API processes, and of Valkey."""
    entries = (OURS, OURS_TWO, OURS_FOUR)
    one, two, four = (results.of(entry, "closed", "gateway_us") for entry in entries)
    valkey = [results.of(entry, "closed", "valkey_us") for entry in entries]
    falls = max(valkey[1:]) <= valkey[0]
    shown = f"{two / one:.2f} and {four / one:.2f} x; " + ", ".join(f"{us:.0f}" for us in valkey)
    return f"{shown} us of Valkey", max(two, four) <= 1.1 * one and falls


def _flat(results: Results) -> tuple[str, bool]:
    early, late = (results.of(OURS, "memory", f"{when}_bytes") for when in ("early", "late"))
    if results.of(OURS, "memory", "requests") < MANY:
        raise KeyError("too few requests to tell")
    return f"{early / 1e6:.0f} MB, then {late / 1e6:.0f} MB", late <= FLAT * early


def _open(results: Results) -> tuple[str, bool]:
    held, whole = (results.of(OURS, "opened", figure) for figure in ("most_open", "whole"))
    return f"{held:.0f} concurrent, {whole:.0f} complete", held >= 2000 and whole >= 2000


def _jobs(results: Results) -> tuple[str, bool]:
    per_s = results.of(OURS, "jobs", "per_s")
    ruled = results.of(OURS, "jobs", "by_rules") == results.of(OURS, "jobs", "jobs")
    return f"{per_s:.0f} a second", per_s >= 3000 and ruled


BARS = (
    Bar(
        "CPU a request, 64 connections, against ferrogw",
        "<= 0.90 x",
        _at_most("closed", FERRO, 0.9),
    ),
    Bar("the same at 1,240 a second", "<= 0.90 x", _at_most("paced", FERRO, 0.9)),
    Bar(
        "p99 at 64 connections, against the bare relay on our own connections",
        "<= 1.3 x",
        _at_most("closed", BARE, 1.3, "p99_ms"),
    ),
    Bar("added p50 / p99 at half of capacity, one process", "<= 1 / 5 ms", _added(OURS)),
    Bar("the same, two processes", "<= 1 / 5 ms", _added(OURS_TWO)),
    Bar(
        "CPU a stream of 50 events, against the bare relay on our own connections",
        "<= 1.15 x",
        _at_most("streams", BARE, 1.15),
    ),
    Bar("memory (PSS) of an API process, idle", "<= 90 MB", _idle),
    Bar("memory of `tidegate up`, one API process and one worker, idle", "<= 250 MB", _up),
    Bar("CPU of one API process and one worker, idle", "<= 0.5 % of a core", _idle_share),
    Bar("start of `tidegate serve` to ready, stores up", "<= 1 s", _start),
    Bar(
        "CPU a call with 2 and 4 API processes, against one; Valkey's CPU a call with 1, 2, 4",
        "<= 1.1 x; falls",
        _scale_out,
    ),
    Bar(
        "CPU a request, against LiteLLM with limits, as ours has",
        "<= 1/40",
        _part_of(LITELLM_LIMITED, 40),
    ),
    Bar("the same, against LiteLLM without any", "<= 1/40", _part_of(LITELLM_PROXY, 40)),
    Bar("CPU a request, against Portkey", "<= 1/4", _part_of(PORTKEY_GATEWAY, 4)),
    Bar("memory over 200,000 requests", "flat: at most 3 % more after the first tenth", _flat),
    Bar("streams open concurrently in one process", ">= 2,000", _open),
    Bar("jobs from submit to succeeded, kind decided by rules", ">= 3,000 a second", _jobs),
    Bar(
        "batch of 50,000 lines, immediate upstream; p99 of native calls meanwhile",
        ">= 2,000 a second; <= 20 ms",
        _batch,
    ),
)
