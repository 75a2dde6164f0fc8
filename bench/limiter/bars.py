"""Bars of our figures, next to the peers' of the same run. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.peers.catalogue import EVALSHA, LOCAL, LOCAL_THREADS, OURS, PEERS, Entry
from bench.verdicts import Bar, Judge, Verdict, judged

Figures = Mapping[str, Any]
LEASE_S = 3.0
LOADS = ("load-5-20", "load-5-200", "load-50-20", "load-50-200")


@dataclass(frozen=True, slots=True)
class Results:
    """What each limiter gave in each scenario. A figure that is missing raises KeyError."""

    by_limiter: Mapping[str, Mapping[str, Figures]]

    def of(self, entry: Entry, scenario: str, figure: str) -> float:
        value = self.by_limiter[entry.name][scenario][figure]
        if value is None:
            raise KeyError(figure)
        return float(value)

    def ours(self, scenario: str, figure: str) -> float:
        return self.of(OURS, scenario, figure)

    def own_cpu_us(self, entry: Entry, scenario: str) -> float:
        """Processor time of the workers per admission, less what the same loop costs without any
        limiter, at the same load or at limit 50 with 20 ms calls."""
        floor = LOCAL_THREADS if entry.threads else LOCAL
        same = scenario if scenario in self.by_limiter[floor.name] else "load-50-20"
        return self.of(entry, scenario, "workers_us") - self.of(floor, same, "workers_us")

    def over(self, entry: Entry, scenario: str) -> float:
        return max(0.0, self.of(entry, scenario, "peak") - self.of(entry, scenario, "bound"))

    def peers(self, figure: Callable[[Entry], float]) -> dict[str, float]:
        """That figure of each peer that has it."""
        found = {}
        for entry in PEERS:
            try:
                found[entry.name] = figure(entry)
            except KeyError:
                continue
        return found


def verdicts(results: Results) -> list[Verdict]:
    return judged(BARS, results)


def _used(scenario: str, least: float) -> Judge[Results]:
    def judge(results: Results) -> tuple[str, bool]:
        used = results.ours(scenario, "used")
        return f"{used:.1%}", used >= least

    return judge


def _used_against_peers(results: Results) -> tuple[str, bool]:
    used = results.ours("load-50-20", "used")
    never_over = results.peers(
        lambda entry: (
            results.of(entry, "load-50-20", "used") * (results.over(entry, "load-50-20") == 0)
        )
    )
    if not never_over:
        raise KeyError("no peer was measured")
    best = max(never_over.values())
    return f"{used:.1%}; best peer {best:.1%}", used >= best


def _over_by_faults(results: Results) -> tuple[str, bool]:
    over = {
        scenario: results.over(OURS, scenario)
        for scenario in (*LOADS, "crash", "crash-reap", "restart", "restart-kill", "pause-hold")
    }
    after_ms = results.ours("pause", "over_after_ms")
    shown = "0" if not any(over.values()) else str({name: n for name, n in over.items() if n})
    paused = f"with reuse {results.over(OURS, 'pause'):.0f} while stopped, {after_ms:.0f} ms after"
    return f"{shown}; {paused}", not any(over.values()) and after_ms <= 100


def _at_most(scenario: str, figure: str, most: float, unit: str = "") -> Callable[..., Any]:
    def judge(results: Results) -> tuple[str, bool]:
        value = results.ours(scenario, figure)
        return f"{value:.2f}{unit}", value <= most

    return judge


def _script_calls(results: Results) -> tuple[str, bool]:
    calls = [results.ours(scenario, "script_calls") for scenario in ("load-5-20", "load-50-20")]
    return " / ".join(f"{value:.2f}" for value in calls), max(calls) <= 1.0


def _valkey_cpu(results: Results) -> tuple[str, bool]:
    ours = results.ours("load-50-20", "valkey_us")
    peers = results.peers(lambda entry: results.of(entry, "load-50-20", "valkey_us"))
    least = min(peers.values(), default=float("inf"))
    shown = f"; least of the peers {least:.0f} us" if peers else ""
    return f"{ours:.1f} us{shown}", ours <= 30 and ours < least


def _process_cpu(results: Results) -> tuple[str, bool]:
    cpu_us = results.own_cpu_us(OURS, "load-50-20")
    connections = results.ours("load-50-20", "connections")
    return f"{cpu_us:.1f} us, {connections:.2g} connections", cpu_us <= 60 and connections <= 3


def _wake_up(results: Results) -> tuple[str, bool]:
    p50, p99 = (results.ours("load-5-20", f"wake_{part}_ms") for part in ("p50", "p99"))
    return f"{p50:.2f} / {p99:.2f} ms", p50 <= 1.5 and p99 <= 10


def _shares(results: Results) -> tuple[str, bool]:
    off = results.ours("weights", "off")
    return f"{off:.1%}", off <= 0.05


def _uncontended(results: Results) -> tuple[str, bool]:
    ratio = results.ours("uncontended", "us") / results.of(EVALSHA, "uncontended", "us")
    return f"{ratio:.2f} x", ratio <= 2.0


def _long_queue(results: Results) -> tuple[str, bool]:
    def cost_us(scenario: str) -> float:
        return results.ours(scenario, "valkey_us") + results.ours(scenario, "workers_us")

    ratio = cost_us("queued-100000") / cost_us("queued-100")
    valkey = results.ours("queued-100000", "valkey_us") / results.ours("queued-100", "valkey_us")
    return f"{ratio:.2f} x (Valkey alone {valkey:.2f} x)", ratio <= 1.5


def _units(results: Results) -> tuple[str, bool]:
    usual, every = (
        results.ours(scenario, "valkey_us") + results.ours(scenario, "workers_us")
        for scenario in ("units-usual", "units-all")
    )
    return f"{every / usual:.2f} x of {usual:.0f} us", every / usual <= 1.5


def _tenants(results: Results) -> tuple[str, bool]:
    tend_ms, loop_ms = (
        results.ours("tenants-10000", figure) for figure in ("tend_p99_ms", "local_state_max_ms")
    )
    return f"{tend_ms:.1f} ms, {loop_ms:.2f} ms", tend_ms <= 5 and loop_ms <= 5


def _restart(results: Results) -> tuple[str, bool]:
    complete = results.ours("restart", "again_s")
    incomplete = results.ours("restart-kill", "again_s")
    shown = f"{complete:.2f} s; {incomplete:.2f} s when a worker died with it"
    return shown, complete <= 1.0 and incomplete <= LEASE_S + 0.3


def _rate(results: Results) -> tuple[str, bool]:
    used, most = results.ours("rates", "used"), results.ours("rates", "most")
    return f"{used:.1%}, at most {most:.0f} of 20", used >= 0.98 and most <= 20


def _rpm(results: Results) -> tuple[str, bool]:
    used, refused = results.ours("rpm", "used"), results.ours("rpm", "refused")
    return f"{used:.1%}, {refused:.0f} times 429", used >= 0.98 and refused == 0


def _tpm(results: Results) -> tuple[str, bool]:
    refused = [results.ours(scenario, "refused") for scenario in ("tpm-under", "tpm-over")]
    used = [results.ours(scenario, "used") for scenario in ("tpm-under", "tpm-over")]
    shown = " and ".join(f"{value:.0f}" for value in refused)
    return f"{shown} times 429, {used[0]:.1%} and {used[1]:.1%} used", not any(refused)


BARS = (
    Bar("permit-seconds used, limit 5, 200 ms calls", ">= 99 %", _used("load-5-200", 0.99)),
    Bar("permit-seconds used, limit 50, 200 ms calls", ">= 99 %", _used("load-50-200", 0.99)),
    Bar("permit-seconds used, limit 5, 20 ms calls", ">= 95 %", _used("load-5-20", 0.95)),
    Bar(
        "permit-seconds used, limit 50, 20 ms calls",
        "no less than the best peer that is never over",
        _used_against_peers,
    ),
    Bar("the same, aimed at", ">= 95 %", _used("load-50-20", 0.95)),
    Bar("over the limit, any single fault", "0; with reuse only while stopped", _over_by_faults),
    Bar("script calls per admission under load, limit 5 / 50", "<= 1.0", _script_calls),
    Bar(
        "Valkey CPU per admission, limit 50, one tenant",
        "<= 30 us, less than any peer",
        _valkey_cpu,
    ),
    Bar(
        "Valkey CPU per admission, limit 50, weighted",
        "<= 60 us",
        _at_most("weights", "valkey_us", 60, " us"),
    ),
    Bar("process CPU per admission, limit 50", "<= 60 us, <= 3 connections", _process_cpu),
    Bar("wake-up p50 / p99, limit 5", "<= 1.5 / 10 ms", _wake_up),
    Bar("weighted shares 1:2:4:8, off ideal", "<= 5 %", _shares),
    Bar("uncontended acquire+release", "<= 2.0 x the bare EVALSHA", _uncontended),
    Bar("100,000 waiters: cost per admission against 100", "<= 1.5 x", _long_queue),
    Bar("limits of every unit: CPU per admission against the usual ones", "<= 1.5 x", _units),
    Bar(
        "10,000 tenants with limits of their own, 1,000 waiting: a tend at the server (p99), "
        "local_state on the loop",
        "<= 5 ms each",
        _tenants,
    ),
    Bar("20 per 2 s window under backlog", ">= 98 % used, never over", _rate),
    Bar(
        "RPM 60 with send jitter; fixed window, sliding window, bucket",
        ">= 98 % used, 0 times 429",
        _rpm,
    ),
    Bar(
        "TPM, estimates off by 3x down and up, after 50 calls of calibration",
        "0 times 429",
        _tpm,
    ),
    Bar("recovery after kill -9", "<= lease + 0.3 s", _at_most("crash", "again_s", 3.3, " s")),
    Bar(
        "recovery after kill -9, reaping on a closed connection",
        "<= 0.5 s",
        _at_most("crash-reap", "again_s", 0.5, " s"),
    ),
    Bar(
        "grants again after an empty restart",
        "<= 1 s with the roster complete, else one lease",
        _restart,
    ),
)
