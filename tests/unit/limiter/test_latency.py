"""Concurrency found from times to first tokens, at the emulated GPU server in virtual time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest

from tidegate.emulator.gpu import GpuSpec, Schedule, Work
from tidegate.limiter import Adaptive, Concurrency
from tidegate.limiter.simulation import LimitState, Paces

UNTIL_S, WARM_S = 150.0, 50.0
QUIET_EVERY_S = 5.0
# The model that the emulator's usual pace is of.
SMALL = GpuSpec()
LARGE = GpuSpec(slots=16, read_us=50, attend_ns=2, step_ms=10, slot_ms=0.3, cache_tokens=32_768)
FULL_CACHE = GpuSpec(
    slots=64, kv_tokens=60_000, read_us=20, attend_ns=0.5, step_ms=12, slot_ms=0.15, cache_tokens=0
)


def adaptive() -> LimitState:
    return LimitState("model:m", Concurrency(128, adaptive=Adaptive(1, "latency")))


def fixed(calls: int) -> LimitState:
    return LimitState("model:m", Concurrency(calls))


@dataclass(slots=True)
class Overload:
    """Clients that each have one call at a time, three for each slot, and a quiet one that calls
    now and then and is admitted next. `finished` are the replies after the beginning."""

    limit: LimitState
    spec: GpuSpec
    clients: int
    longest: int
    cached: float = 0.0
    random: Random = field(default_factory=lambda: Random(1))
    finished: int = 0
    levels: list[int] = field(default_factory=list)
    quiet_s: list[float] = field(default_factory=list)
    call_s: list[float] = field(default_factory=list)

    def run(self) -> Overload:
        server, now, step, step_ends = Schedule(self.spec), 0.0, None, 0.0
        waiting = deque[tuple[float, bool]]((0.0, False) for _ in range(self.clients))
        running: dict[int, tuple[float, float, bool, Work]] = {}
        next_quiet, numbers = QUIET_EVERY_S / 2, count(1)
        while now < UNTIL_S:
            while waiting and self.limit.used < self.limit.adapted() // 1000:
                asked, is_quiet = waiting.popleft()
                number = next(numbers)
                running[number] = asked, now, is_quiet, self._work(number, now)
                self.limit.under["s", number] = 1
                server.add(running[number][3])
            if step is None:
                step = server.next_step()
                step_ends = now + step.duration_s if step else UNTIL_S
            now = min(next_quiet, step_ends)
            if now == next_quiet:
                waiting.appendleft((now, True))
                next_quiet += QUIET_EVERY_S
            elif step is not None:
                server.finish(step, now)
                step = None
                for number in [number for number, call in running.items() if call[3].done]:
                    is_quiet = self._end(number, *running.pop(number), now)
                    if not is_quiet:
                        waiting.append((now, False))
        return self

    def _work(self, number: int, now: float) -> Work:
        tokens = round(50 * (self.longest / 50) ** self.random.random())
        reply = self.random.randint(20, 200)
        shared = self.random.random() < self.cached
        prompt = "s" * 4 * tokens if shared else f"{number:08}" * (tokens // 2 + 1)
        return Work(prompt, tokens, reply, True, now, lambda: False, lambda: None)

    def _end(
        self, number: int, asked: float, began: float, is_quiet: bool, work: Work, now: float
    ) -> bool:
        assert work.first_token_s is not None
        took_ms = round((now - began) * 1000) + 1
        first_ms = round((work.first_token_s - began) * 1000) + 1
        if self.limit.minimum:
            read = work.input_tokens - work.cached_tokens
            self.limit.adapt_by_latency(took_ms, first_ms, read, Paces())
        del self.limit.under["s", number]
        if now > WARM_S:
            self.finished += not is_quiet
            self.levels.append(self.limit.adapted() // 1000)
            self.call_s.append(now - began)
            if is_quiet:
                self.quiet_s.append(work.first_token_s - asked)
        return is_quiet


@pytest.mark.parametrize(
    ("spec", "longest", "cached", "best"),
    [(SMALL, 1_500, 0.0, 4), (LARGE, 4_000, 0.6, 16), (FULL_CACHE, 6_000, 0.0, 48)],
    ids=["slots", "cached prompts", "memory"],
)
def test_a_silent_server_is_full_and_its_queue_short(
    spec: GpuSpec, longest: int, cached: float, best: int
) -> None:
    of_best = Overload(fixed(best), spec, 3 * best, longest, cached).run()
    alone = Overload(fixed(best), spec, 0, longest, cached).run()
    found = Overload(adaptive(), spec, 3 * best, longest, cached).run()
    assert found.finished >= 0.95 * of_best.finished
    alone_s, longest_call_s = max(alone.quiet_s), max(of_best.call_s)
    assert sorted(found.quiet_s)[-1] <= 1.5 * alone_s + longest_call_s
    assert max(found.levels) <= 2 * best


def test_it_follows_a_server_that_has_fewer_slots_from_now_on() -> None:
    limit = adaptive()
    Overload(limit, LARGE, 48, 1_000).run()
    assert limit.adapted() >= 14_000
    limit.under.clear()
    Overload(limit, SMALL, 48, 300).run()
    assert 3_000 <= limit.adapted() <= 8_000


def test_calls_without_a_time_raise_it_by_successes_alone() -> None:
    limit = adaptive()
    limit.under = {("s", number): 1 for number in range(4)}
    for _ in range(25):
        limit.adapt(0, 0)
    assert limit.adapted() == 5_000
