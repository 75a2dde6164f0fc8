"""Judgements of the chaos runs on a log of calls: rates, order and waste, beside the product's.

The log is one of `tidegate.checker.Event`, by the truth of the runs (`chaos.limiter.truth`) or by
the emulator (`from_emulator`). Pure.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tidegate.checker import NS, Event


def limits_of(events: Iterable[Event]) -> set[str]:
    return {limit for event in events for limit in event.limits}


class Arrivals(NamedTuple):
    """The most that began within one sliding window, counted apart, and when that window ended."""

    calls: int = 0
    tokens: int = 0
    calls_ns: int = 0
    tokens_ns: int = 0


def window_maximum(events: Iterable[Event], limit: str, window_ns: int) -> Arrivals:
    """The most calls, and the most tokens, of `limit` that began within any `window_ns`.

    Two calls exactly a window apart are not in the same window.
    """
    inside: deque[Event] = deque()
    tokens, most = 0, Arrivals()
    for event in events:
        if event.what != "begin" or limit not in event.limits:
            continue
        inside.append(event)
        tokens += event.tokens
        while inside[0].at_ns <= event.at_ns - window_ns:
            tokens -= inside.popleft().tokens
        if len(inside) > most.calls:
            most = most._replace(calls=len(inside), calls_ns=event.at_ns)
        if tokens > most.tokens:
            most = most._replace(tokens=tokens, tokens_ns=event.at_ns)
    return most


def flows_again_ns(
    events: Iterable[Event], limit: str, since_ns: int, known_ns: int, *, window_ns: int, least: int
) -> int | None:
    """How long after `since_ns` a window began in which at least `least` calls of a rate began;
    None if none had by `known_ns`."""
    begins = [e.at_ns for e in events if e.what == "begin" and limit in e.limits]
    first = bisect_left(begins, since_ns)
    for index in range(first, len(begins)):
        start = begins[index]
        if start + window_ns > known_ns:
            return None
        if bisect_left(begins, start + window_ns) - index >= least:
            return start - since_ns
    return None


class Overtaking(NamedTuple):
    """The call that went before the most others that had asked earlier and still waited."""

    places: int
    event: Event | None


def overtaking(events: Iterable[Event], *, within_process: bool) -> Overtaking:
    """The greatest inversion of first come, first served among waiters of one tenant that need
    the same limits with the same priority: in each process alone, or over all of them.

    Who gave up before is not overtaken. 0 is perfect order.
    """
    queues: dict[tuple[object, ...], list[int]] = defaultdict(list)
    stamps: dict[tuple[str, int], int] = {}
    worst = Overtaking(0, None)
    for number, event in enumerate(events):
        lane = (
            event.tenant,
            event.limits,
            event.priority,
            event.worker if within_process else "",
        )
        key = (event.worker, event.call)
        if event.what == "ask":
            stamps[key] = number
            queues[lane].append(number)
            continue
        stamp = stamps.pop(key, None)
        if stamp is None or event.what == "end":
            continue
        queue = queues[lane]
        place = bisect_left(queue, stamp)
        del queue[place]
        if event.what == "begin" and place > worst.places:
            worst = Overtaking(place, event)
    return worst


@dataclass(frozen=True, slots=True)
class Waste:
    """Permits that a waiter could have had and nobody used, while he waited.

    permit_s: how much, in permit-seconds. possible_s: all permit-seconds of the time in which
    somebody waited. longest_s: the longest single time in which at least one was free.
    """

    permit_s: float
    possible_s: float
    longest_s: float

    @property
    def used(self) -> float:
        """The part of what was possible that was used; 1 if nobody ever waited."""
        return 1 - self.permit_s / self.possible_s if self.possible_s else 1.0


def waste(events: Iterable[Event], bounds: Mapping[str, int]) -> Waste:
    """Gaps in the use of the limits in `bounds`.

    A waiter that needs several could have had what is free of the scarcest; of several sorts of
    waiters that count which could have had most.
    """
    waiting: Counter[tuple[str, ...]] = Counter()
    running: Counter[str] = Counter()
    asked: set[tuple[str, int]] = set()
    wasted = possible = longest = gap = last_ns = 0
    for event in events:
        step_ns, last_ns = event.at_ns - last_ns, event.at_ns
        room = [
            (min(bounds[limit] - running[limit] for limit in needed), needed)
            for needed, count in waiting.items()
            if count > 0
        ]
        if room:
            free, needed = max(room)
            wasted += max(0, free) * step_ns
            possible += min(bounds[limit] for limit in needed) * step_ns
            gap = gap + step_ns if free > 0 else 0
            longest = max(longest, gap)
        else:
            gap = 0
        needed = tuple(limit for limit in event.limits if limit in bounds)
        if not needed:
            continue
        key = (event.worker, event.call)
        if event.what == "ask":
            asked.add(key)
            waiting[needed] += 1
        elif event.what != "end" and key in asked:
            asked.remove(key)
            waiting[needed] -= 1
        if event.what in ("begin", "end"):
            running.update(dict.fromkeys(needed, 1 if event.what == "begin" else -1))
    return Waste(wasted / NS, possible / NS, longest / NS)


class ServedCall(Protocol):
    """What is needed of a call in the emulator's log; see `LoggedCall` there."""

    @property
    def id(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def started_ns(self) -> int: ...
    @property
    def ended_ns(self) -> int | None: ...
    @property
    def outcome(self) -> str | None: ...


def from_emulator(calls: Iterable[ServedCall]) -> list[Event]:
    """The emulator's log as events. It sees no waiters, and calls that it refused never began."""
    events: list[Event] = []
    for call in calls:
        if call.outcome == "refused":
            continue
        limits = (f"kind:{call.kind}", f"model:{call.model}", "pool:total")
        begin = Event(call.started_ns, "begin", "emulator", call.id, limits=limits)
        events.append(begin)
        if call.ended_ns is not None:
            events.append(begin._replace(at_ns=call.ended_ns, what="end"))
    return sorted(events, key=lambda event: event.at_ns)
