"""What each limiter is put through. One function a scenario, which returns its figures.

Every wait has an end: a limiter that starves or hangs is measured as such.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from bench.limiter import tenants
from bench.limiter.arrivals import most_in_window, rate_used, refusals
from bench.limiter.orders import Orders
from bench.limiter.stage import Stage
from bench.limiter.trace import jain, quantile, shares_off
from bench.peers.catalogue import Entry

Figures = dict[str, Any]
WORKERS = 4
ROUNDS = 1500
WARM_S = 1.5
# The bound of the scenes with faults, and how long their calls are.
FAULT = Orders("", "", "", bound=5, tasks=10, call_ms=1000.0, vary=0.8)
GIVE_UP_S = 10.0
PAUSE_S = 5.0
WEIGHTS = {"a": 1, "b": 2, "c": 4, "d": 8}


@dataclass(frozen=True, slots=True)
class Setting:
    """How long is measured, and on which event loop."""

    seconds: float = 5.0
    uvloop: bool = True


def uncontended(entry: Entry, setting: Setting) -> Figures:
    """One task that acquires and releases, with nobody else."""
    orders = Orders("", "", "", 5, 1, 0.0, workers=1, uvloop=setting.uvloop, rounds=ROUNDS)
    with Stage(entry, orders) as stage:
        before = stage.cost()
        batches_s = stage.run_rounds(timeout_s=20.0)
        after = stage.cost()
    rounds = ROUNDS * len(batches_s)
    return {
        "us": min(batches_s) / ROUNDS * 1e6,
        "round_trips": (after.reads - before.reads) / rounds,
    }


def load(entry: Entry, setting: Setting, orders: Orders, warm_s: float = WARM_S) -> Figures:
    """More tasks than permits, in four processes, for a while."""
    orders = replace(orders, uvloop=setting.uvloop)
    with Stage(entry, orders) as stage:
        stage.start_workers()
        stage.await_calls(warm_s)
        before = stage.cost()
        time.sleep(setting.seconds)
        after = stage.cost()
        connections, alive, said = stage.connections(), stage.alive(), stage.said(0)
        trace = stage.trace()
    since, until = before.at_ns, after.at_ns
    starts = trace.admissions(since, until)
    count = len(starts)
    tasks = Counter((worker, task) for _, worker, task in starts)
    waits = trace.wake_ups_ms(orders.bound, since, until)
    took_s = (until - since) / 1e9
    figures: Figures = {
        "used": trace.used_s(since, until) / orders.bound / took_s,
        "peak": trace.peak(),
        "bound": orders.bound,
        "per_s": count / took_s,
        "connections": connections / WORKERS,
        "wake_p50_ms": quantile(waits, 0.5),
        "wake_p99_ms": quantile(waits, 0.99),
        "jain": jain([tasks[w, t] for w in range(orders.workers) for t in range(orders.tasks)]),
        "errors": trace.errors,
        "alive": alive,
        "others": before.others(after),
        "starts": starts,
    }
    if trace.errors or alive < orders.workers:
        figures["said"] = said
    if count:
        figures |= {
            "round_trips": (after.reads - before.reads) / count,
            "script_calls": (after.script_calls - before.script_calls) / count,
            "script_us": (after.script_cpu_us - before.script_cpu_us) / count,
            "valkey_us": (after.valkey_cpu_ns - before.valkey_cpu_ns) / count / 1000,
            "workers_us": (after.workers_cpu_ns - before.workers_cpu_ns) / count / 1000,
        }
    return figures


def _load(bound: int, call_ms: float) -> Callable[[Entry, Setting], Figures]:
    def scenario(entry: Entry, setting: Setting) -> Figures:
        figures = load(entry, setting, Orders("", "", "", bound, 2 * bound, call_ms))
        figures.pop("starts")
        return figures

    return scenario


def queued(waiters: int, warm_s: float) -> Callable[[Entry, Setting], Figures]:
    """Limit 50 and so many waiters."""

    def scenario(entry: Entry, setting: Setting) -> Figures:
        options: dict[str, Any] = {"queue_per_tenant": 2 * waiters} if entry.ours else {}
        tasks = (waiters + 50) // WORKERS
        orders = Orders("", "", "", 50, tasks, 20.0, options=options)
        figures = load(entry, setting, orders, warm_s)
        figures.pop("starts")
        return figures

    return scenario


def _units(units: str) -> Callable[[Entry, Setting], Figures]:
    """Limit 50 of calls, and limits that count other units beside it: `usual` ones, or `all`."""

    def scenario(entry: Entry, setting: Setting) -> Figures:
        orders = Orders("", "", "", 50, 100, 20.0, options={"units": units})
        figures = load(replace(entry, adapter="ours_limits"), setting, orders)
        figures.pop("starts")
        return figures

    return scenario


def weights(entry: Entry, setting: Setting) -> Figures:
    """Four tenants with weights 1:2:4:8, all of them always waiting."""
    orders = Orders("", "", "", 50, 100, 20.0, options={"weights": WEIGHTS})
    figures = load(entry, setting, orders)
    tenants = list(WEIGHTS)
    shares = Counter(tenants[task % len(tenants)] for _, _, task in figures.pop("starts"))
    figures["shares"] = dict(sorted(shares.items()))
    figures["off"] = shares_off(shares, WEIGHTS) if shares else None
    return figures


def crash(entry: Entry, setting: Setting, **options: Any) -> Figures:
    """Kill -9 of a worker that holds a part of the permits: when are all of them used again?"""
    orders = replace(FAULT, uvloop=setting.uvloop, options=options)
    with Stage(entry, orders) as stage:
        stage.start_workers()
        stage.await_calls(WARM_S)
        killed_ns = stage.kill(stage.part_holder())
        full_ns = _watch(stage, lambda: stage.trace().first_full_ns(orders.bound, killed_ns + 1))
        trace = stage.trace()
    return {
        "again_s": (full_ns - killed_ns) / 1e9 if full_ns else None,
        "peak": trace.peak(),
        "bound": orders.bound,
    }


def pause(entry: Entry, setting: Setting, **options: Any) -> Figures:
    """The worker with the most permits stands still for 5 s, longer than its lease, and goes on."""
    orders = replace(FAULT, uvloop=setting.uvloop, options=options)
    with Stage(entry, orders) as stage:
        stage.start_workers()
        stage.await_calls(WARM_S)
        paused = stage.busiest()
        stage.signal(paused, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        resumed_ns = stage.signal(paused, signal.SIGCONT)
        time.sleep(2.0)
        trace, now_ns = stage.trace(), time.monotonic_ns()
    return {
        "peak": trace.peak(),
        "bound": orders.bound,
        "over_after_ms": trace.over_s(orders.bound, resumed_ns, now_ns) * 1000,
    }


def restart(entry: Entry, setting: Setting, kill: bool = False, **options: Any) -> Figures:
    """Valkey is killed and comes back empty; with `kill`, one worker dies at the same time.

    Calls are short, since a new grant shows only when a worker gets more permits than it had.
    """
    orders = replace(FAULT, call_ms=200.0, uvloop=setting.uvloop, options=options)
    with Stage(entry, orders) as stage:
        stage.start_workers()
        stage.await_calls(WARM_S)
        if kill:
            stage.kill(stage.part_holder())
        down_ns = time.monotonic_ns()
        stage.valkey.kill()
        stage.valkey.start()
        up_ns = time.monotonic_ns()
        grant_ns = _watch(stage, lambda: stage.trace().first_growth_ns(down_ns, up_ns))
        time.sleep(3.0)  # whoever goes over does so now
        full_ns = _watch(stage, lambda: stage.trace().first_full_ns(orders.bound, up_ns))
        trace = stage.trace()
    return {
        "again_s": (grant_ns - up_ns) / 1e9 if grant_ns else None,
        "full_s": (full_ns - up_ns) / 1e9 if full_ns else None,
        "peak": trace.peak(),
        "bound": orders.bound,
    }


def rates(entry: Entry, setting: Setting) -> Figures:
    """20 arrivals in any 2 s under backlog: what part is used, and is any sliding window over it?

    Ours allows for arrivals that are up to 20 ms late, the peers for none.
    """
    options = {"slack_ms": 20} if entry.ours else {}
    orders = Orders("", "", "", 20, 10, 0.0, uvloop=setting.uvloop, window_ms=2000, options=options)
    return _rate(entry, orders, windows=5)


def rpm(entry: Entry, setting: Setting) -> Figures:
    """60 a minute, sent up to 400 ms after admission."""
    orders = Orders("", "", "", 60, 10, 0.0, uvloop=setting.uvloop, window_ms=60_000, jitter_ms=400)
    return _rate(entry, orders, windows=3)


def tpm(off: float) -> Callable[[Entry, Setting], Figures]:
    """100,000 input tokens in 10 s; calls take `off` times what is guessed at first, and the
    estimator of each worker has seen 50 of them."""

    def scenario(entry: Entry, setting: Setting) -> Figures:
        orders = Orders(
            *("", "", ""), 100_000, 20, 50.0,
            uvloop=setting.uvloop, window_ms=10_000, options={"off": off},
        )  # fmt: skip
        return _rate(replace(entry, adapter="ours_tokens"), orders, windows=5, weighed=True)

    return scenario


def _rate(entry: Entry, orders: Orders, windows: int, weighed: bool = False) -> Figures:
    with Stage(entry, orders) as stage:
        stage.start_workers()
        before = stage.cost()
        stage.await_calls((windows + 0.25) * orders.window_ms / 1000)
        after = stage.cost()
        trace = stage.trace()
    arrivals = [(at_ns, record if weighed else 1) for at_ns, _, record in trace.starts]
    window_ns = orders.window_ms * 1_000_000
    by_provider = refusals(arrivals, orders.bound, window_ns)
    figures: Figures = {
        "used": rate_used(arrivals, orders.bound, window_ns, windows),
        "most": most_in_window(arrivals, window_ns),
        "bound": orders.bound,
        "calls": len(arrivals),
        "refused": sum(by_provider.values()),
        "refusals": by_provider,
        "errors": trace.errors,
    }
    if arrivals:
        figures["round_trips"] = (after.reads - before.reads) / len(arrivals)
        figures["valkey_us"] = (after.valkey_cpu_ns - before.valkey_cpu_ns) / len(arrivals) / 1000
    return figures


def _watch(stage: Stage, seen: Callable[[], int | None]) -> int | None:
    deadline_s = time.monotonic() + GIVE_UP_S
    while (found := seen()) is None and time.monotonic() < deadline_s and stage.alive():
        time.sleep(0.1)
    return found


LOADS = {
    "load-5-20": _load(5, 20.0),
    "load-5-200": _load(5, 200.0),
    "load-50-20": _load(50, 20.0),
    "load-50-200": _load(50, 200.0),
}
# For every limiter of calls.
SHARED: dict[str, Callable[[Entry, Setting], Figures]] = {
    "uncontended": uncontended,
    **LOADS,
    "queued-10000": queued(10_000, 4.0),
    "crash": crash,
    "pause": pause,
    "restart": restart,
}
OURS_ONLY: dict[str, Callable[[Entry, Setting], Figures]] = {
    "weights": weights,
    "units-usual": _units("usual"),
    "units-all": _units("all"),
    "queued-100": queued(100, WARM_S),
    "queued-100000": queued(100_000, 15.0),
    "crash-reap": lambda entry, setting: crash(entry, setting, reap_closed_ms=200),
    "pause-hold": lambda entry, setting: pause(entry, setting, on_expiry="hold"),
    "tenants-10000": lambda entry, setting: tenants.measure(setting.seconds),
    "restart-kill": lambda entry, setting: restart(entry, setting, kill=True),
}
RATES: dict[str, Callable[[Entry, Setting], Figures]] = {"rates": rates}
# These take long and next to no processor time: they run beside the others.
BESIDE: dict[str, Callable[[Entry, Setting], Figures]] = {
    "rpm": rpm,
    "tpm-under": tpm(3.0),
    "tpm-over": tpm(1 / 3),
}
