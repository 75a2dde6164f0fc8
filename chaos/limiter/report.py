"""What was seen of a fault, what of it breaks a promise, and the table of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from chaos.history import overtaking, window_maximum
from chaos.limiter.faults import Bar, Fault
from chaos.limiter.scene import RATE, Size, concurrency_of
from chaos.limiter.worker import LIMIT, Orders
from tidegate.checker import NS, Curve, Event, Interruption, in_flight, shares

# How long a worker that stood still may take to end its calls: it has to be given the processor.
WAKE_S = 0.5


@dataclass(frozen=True, slots=True)
class Round:
    """One time that the fault was done; seconds from its end. None: it did not come."""

    recovery_s: float | None
    grants_s: float | None


@dataclass
class Outcome:
    """All rounds of one fault. `problems` is what breaks a promise, in words."""

    name: str
    what: str
    promise: str
    limit: int
    rounds: list[Round] = field(default_factory=list)
    calls: int = 0
    peak: int = 0
    over_s: float = 0.0
    used: float = 0.0
    overtaken: int = 0
    overtaken_across: int = 0
    left_out: str = ""
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def judge(
    fault: Fault,
    outcome: Outcome,
    events: Sequence[Event],
    frozen: Sequence[Interruption],
    size: Size,
    orders: Orders,
) -> None:
    """Fill in what was seen, and say what of it was not promised."""
    curve = in_flight(events, LIMIT)
    outcome.calls = sum(event.what == "begin" for event in events)
    outcome.peak, outcome.over_s = curve.peak(), curve.above_s(outcome.limit)
    outcome.used = _used(in_flight(events, LIMIT, without=frozen), outcome.limit)
    outcome.overtaken = overtaking(events, within_process=True).places
    outcome.overtaken_across = overtaking(events, within_process=False).places
    excused = [Interruption(s.worker, s.from_ns, s.to_ns + int(WAKE_S * NS)) for s in frozen]
    for limit, bound in concurrency_of(orders):
        counted = in_flight(events, limit, without=excused if fault.promise != "0 over" else ())
        peak, at_ns = counted.peak_at_once()
        if peak > bound:
            when = since_start(at_ns, events)
            over_s = f"{counted.above_s(bound):.3f} s in all"
            outcome.problems.append(f"{limit}: {peak} of {bound} at once {when}, {over_s}")
    _judge_rates(outcome, events, orders)
    _judge_order(fault, outcome, events, orders)
    _judge_times(fault, outcome, size)


def since_start(at_ns: int, events: Sequence[Event]) -> str:
    return f"{(at_ns - events[0].at_ns) / NS:.2f} s after the start"


def _judge_rates(outcome: Outcome, events: Sequence[Event], orders: Orders) -> None:
    for limit, spec in orders.limits.items():
        if isinstance(spec, int):
            continue
        _, bound, window_ms, unit = spec
        most = window_maximum(events, limit, window_ms * 1_000_000)
        if limit == RATE:
            outcome.used = _flow(events, bound, window_ms)
        seen, at_ns = most.calls, most.calls_ns
        if unit == "tokens":
            seen, at_ns = most.tokens, most.tokens_ns
        outcome.notes.append(f"{limit} {seen}/{bound}")
        if seen > bound:
            when = f"up to {since_start(at_ns, events)}"
            outcome.problems.append(f"{limit}: {seen} of {bound} {unit} in {window_ms} ms {when}")


def _flow(events: Sequence[Event], bound: int, window_ms: int) -> float:
    """The part of `RATE` that was used from its first call to its last."""
    begins = [e.at_ns for e in events if e.what == "begin" and RATE in e.limits]
    if not begins:
        return 0.0
    windows = (begins[-1] - begins[0]) / (window_ms * 1_000_000)
    return len(begins) / (bound * (windows + 1))


def _judge_order(fault: Fault, outcome: Outcome, events: Sequence[Event], orders: Orders) -> None:
    if fault.most_overtaken is not None and outcome.overtaken > fault.most_overtaken:
        outcome.problems.append(f"{outcome.overtaken} that had asked before were overtaken")
    if fault.fair is not None:
        seen = shares(events, orders.policy["weights"])
        outcome.notes.append(f"shares {seen.off:.1%} off in {seen.together_s:.0f} s")
        if seen.off > fault.fair:
            outcome.problems.append(f"the shares are {seen.off:.1%} off: {dict(seen.shares)}")


def _used(curve: Curve, limit: int) -> float:
    """The part of the permits that was used from the first to the last moment of full use."""
    full = [at for at, level in zip(curve.times, curve.levels, strict=True) if level >= limit]
    return curve.mean(full[0], full[-1]) / limit if len(full) > 1 else 0.0


def _judge_times(fault: Fault, outcome: Outcome, size: Size) -> None:
    def late(took_s: float | None, bar: Bar | None) -> bool:
        if bar is None:
            return False
        bar_s = bar.leases * size.lease_ms / 1000 + bar.seconds + size.slack_s
        return took_s is None or took_s > bar_s

    for number, seen in enumerate(outcome.rounds, start=1):
        if seen.recovery_s is None:
            outcome.problems.append(f"round {number}: the permits are not used again")
        elif late(seen.recovery_s, fault.recovery):
            outcome.problems.append(f"round {number}: recovered after {seen.recovery_s:.2f} s")
        if late(seen.grants_s, fault.grants):
            outcome.problems.append(f"round {number}: granted again after {seen.grants_s} s")


_HEAD = (
    "fault",
    "rounds",
    "calls",
    "peak/limit",
    "over s",
    "used",
    "recovery s",
    "grants s",
    "order",
    "",
)


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for each fault, then what broke a promise."""
    rows = [_HEAD, *(_row(outcome) for outcome in outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    for outcome in outcomes:
        lines += [f"BROKEN {outcome.name}: {problem}" for problem in outcome.problems]
    return "\n".join(lines)


def _row(outcome: Outcome) -> tuple[str, ...]:
    if outcome.left_out:
        return (outcome.what, "0", *["-"] * 7, f"left out: {outcome.left_out}")
    return (
        outcome.what,
        str(len(outcome.rounds)),
        str(outcome.calls),
        f"{outcome.peak}/{outcome.limit}",
        f"{outcome.over_s:.2f}",
        f"{outcome.used:.1%}",
        _spread([seen.recovery_s for seen in outcome.rounds]),
        _spread([seen.grants_s for seen in outcome.rounds]),
        f"{outcome.overtaken}/{outcome.overtaken_across}",
        ", ".join(["BROKEN" if outcome.problems else f"kept ({outcome.promise})", *outcome.notes]),
    )


def _spread(values: Sequence[float | None]) -> str:
    """Median and greatest, where there is anything."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{median(known):.2f}/{max(known):.2f}" if len(known) > 1 else f"{known[0]:.2f}"
