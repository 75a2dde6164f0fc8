"""Agents' conversations over several accounts in virtual time: what stays cached, and at what wait.

    python -m bench.simulated_stays [--seeds 20] [--first 0] [--worth-us 200] [--only 6x1]

The choices are the product's own (`spine/affinity.py`), made by two processes in the order of
`spine/run.py`. An account is a number of places, a queue in order of arrival and a prompt cache;
what is not cached takes time to read. `bench.stickiness` measures the same with real processes,
whose accounts have as many places as there are agents; here there are also fewer.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import NamedTuple

from bench import grid
from tidegate.call import Usage, UsageDetails
from tidegate.policy.deployment import Upstream
from tidegate.spine.affinity import Affinity, Home
from tidegate.spine.routing import Target

ACCOUNTS, PROCESSES, TURNS = 3, 2, 60
SYSTEM_TOKENS, ASKED_TOKENS, ANSWERED_TOKENS = 4_000, 300, 150
CALL_MS, SPREAD, READ_US_PER_TOKEN = 3_000.0, 0.5, 200
WHOSE = ("tenant", "model")
LEAST_CACHED, MOST_WAIT = 0.95, 1.2
# A wait of this much in a whole conversation is none.
UNNOTICED_MS = 250.0


class Case(NamedTuple):
    """Agents, the places of each account, how long an agent works between two calls, how long a
    call takes and how long each token that is not cached."""

    agents: int
    places: int
    pause_ms: float = 0.0
    call_ms: float = CALL_MS
    read_us: float = READ_US_PER_TOKEN

    @property
    def name(self) -> str:
        pause = f", {self.pause_ms / 1000:.0f} s between" if self.pause_ms else ""
        length = "" if self.call_ms == CALL_MS else f", {self.call_ms:.0f} ms a call"
        return f"{self.agents}x{self.places}{pause}{length}"


CASES = (
    Case(6, 2),
    Case(6, 2, 2_000),
    Case(6, 1),
    Case(6, 1, 2_000),
    Case(9, 2),
    Case(12, 2),
    # As `bench.stickiness`: short beside what a cache is worth, and as long without it.
    Case(6, 2, call_ms=50, read_us=0),
    Case(6, 1, call_ms=50, read_us=0),
    Case(9, 2, call_ms=50, read_us=0),
    Case(12, 2, call_ms=50, read_us=0),
)


@dataclass(frozen=True, slots=True)
class Stays:
    """Of one run. cached: the share of all input tokens that caches had. waits_ms: of each
    conversation in all."""

    cached: float
    waits_ms: Sequence[float]


Run = tuple[Stays, Stays, Stays]  # at one account, at several, and there without stickiness


class Wait(NamedTuple):
    """A wish to wait in an account's queue, for so long at most."""

    account: Account
    within_ms: float = math.inf


Steps = Generator[Wait | float, bool, None]


@dataclass(eq=False, slots=True)
class Waiter:
    go_on: Callable[[bool], None]
    is_over: bool = False


class Account:
    def __init__(self, name: str, places: int) -> None:
        self.target = Target(Upstream(name, {"openai": "http://here"}, "key"), "m")
        self.cached: dict[int, int] = {}
        self.queue: deque[Waiter] = deque()
        self.free = places

    def take(self) -> bool:
        has_room = self.free > 0
        self.free -= has_room
        return has_room

    def leave(self) -> None:
        while self.queue:
            first = self.queue.popleft()
            if not first.is_over:
                first.is_over = True
                first.go_on(True)
                return
        self.free += 1


@dataclass
class World:
    """A run: its agents' steps in the order of their times."""

    case: Case
    turns: int
    random: Random
    accounts: list[Account]
    is_sticky: bool
    worth_us: float | None = None
    now_ms: float = 0.0
    input_tokens: int = 0
    cached_tokens: int = 0
    waits_ms: list[float] = field(default_factory=list)
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        draw = self.random.random
        self.processes = [
            Affinity(self.worth_us, lambda: self.now_ms, draw) for _ in range(PROCESSES)
        ]
        for process in self.processes:
            process.on_move = self._tell
        self.named = {one.target.upstream.name: one for one in self.accounts}

    def of(self, target: Target) -> Account:
        return self.named[target.upstream.name]

    def _tell(self, key: bytes, upstream: str, tokens: int) -> None:
        for process in self.processes:
            process.moved(key, upstream, tokens)

    def at(self, at_ms: float, act: Callable[[], None]) -> None:
        heappush(self._due, (at_ms, next(self._numbers), act))

    def run(self) -> Stays:
        self.waits_ms = [0.0] * self.case.agents
        names = [self.random.randbytes(8) for _ in range(self.case.agents)]
        for agent, name in enumerate(names):
            self.step(self.converse(agent, name))
        while self._due:
            self.now_ms, _, act = heappop(self._due)
            act()
        return Stays(self.cached_tokens / self.input_tokens, self.waits_ms)

    def step(self, steps: Steps, value: bool | None = None) -> None:
        """Continue an agent up to its next wait."""
        try:
            wish = next(steps) if value is None else steps.send(value)
        except StopIteration:
            return
        if not isinstance(wish, Wait):
            self.at(self.now_ms + wish, lambda: self.step(steps, True))
            return

        def go_on(granted: bool) -> None:
            self.at(self.now_ms, lambda: self.step(steps, granted))

        if wish.account.take():
            go_on(True)
            return
        waiter = Waiter(go_on)
        wish.account.queue.append(waiter)
        if wish.within_ms < math.inf:
            self.at(self.now_ms + wish.within_ms, lambda: _leave(waiter))

    def converse(self, agent: int, name: bytes) -> Steps:
        """The turns of one agent."""
        prompt = SYSTEM_TOKENS
        for _ in range(self.turns):
            prompt += ASKED_TOKENS
            process = self.random.choice(self.processes)
            began_ms, targets = self.now_ms, [one.target for one in self.accounts]
            self.random.shuffle(targets)
            home = process.home(name, targets, WHOSE) if self.is_sticky else None
            account = yield from self.admitted(process, home, targets)
            self.waits_ms[agent] += self.now_ms - began_ms
            read = account.cached.get(agent, 0)
            self.input_tokens += prompt
            self.cached_tokens += read
            usual_ms = self.random.lognormvariate(
                math.log(self.case.call_ms) - SPREAD**2 / 2, SPREAD
            )
            took_ms = usual_ms + (prompt - read) * self.case.read_us / 1000
            yield took_ms
            account.cached[agent] = prompt
            account.leave()
            if home is not None:
                written = UsageDetails(cache_write_tokens=prompt - read)
                usage = Usage(input_tokens=prompt, cached_tokens=read, details=written)
                process.note(home, account.target, usage, first_ms=took_ms)
            prompt += ANSWERED_TOKENS
            if self.case.pause_ms:
                yield self.random.expovariate(1 / self.case.pause_ms)

    def admitted(
        self, process: Affinity, home: Home | None, targets: list[Target]
    ) -> Generator[Wait | float, bool, Account]:
        """The account that takes a call, as `_Run._by_one_of` finds it."""
        if home is None:
            free = next((one for one in map(self.of, targets) if one.take()), None)
            if free is None:
                free = self.of(targets[0])
                yield Wait(free)
            return free
        if home.is_known:
            targets = [targets[place] for place in home.places(targets)]
        for place in home.places(targets):
            account, began_ms = self.of(targets[place]), self.now_ms
            if account.take():
                process.waited(home, account.target, 0.0)
                return account
            if home.wait_ms and account.target == home.target:
                within_ms, home.wait_ms = home.wait_ms, 0.0
                is_in = yield Wait(account, within_ms)
                process.waited(home, account.target, self.now_ms - began_ms)
                if is_in:
                    return account
        account, began_ms = self.of(targets[0]), self.now_ms
        yield Wait(account)
        process.waited(home, account.target, self.now_ms - began_ms)
        return account


def _leave(waiter: Waiter) -> None:
    if not waiter.is_over:
        waiter.is_over = True
        waiter.go_on(False)


def simulated(case: Case, seed: int, turns: int = TURNS, worth_us: float | None = None) -> Run:
    """At one account with all places, at several, and at several without stickiness. worth_us: of
    a cached token; None as measured."""

    def over(accounts: int, places: int, *, is_sticky: bool) -> Stays:
        each = [Account(f"account{number}", places) for number in range(accounts)]
        return World(case, turns, Random(seed), each, is_sticky, worth_us).run()

    return (
        over(1, case.places * ACCOUNTS, is_sticky=False),
        over(ACCOUNTS, case.places, is_sticky=True),
        over(ACCOUNTS, case.places, is_sticky=False),
    )


def missed(one: Stays, sticky: Stays, without: Stays) -> Iterator[str]:
    if sticky.cached < LEAST_CACHED * one.cached:
        yield f"{sticky.cached / one.cached:.1%} of one account's cached tokens"
    longest, usual = max(sticky.waits_ms), max(without.waits_ms)
    if longest > max(MOST_WAIT * usual, UNNOTICED_MS):
        yield f"a conversation waited {longest:.0f} ms, without stickiness {usual:.0f} ms"


def _row(case: Case, runs: Sequence[Run], bad: int) -> list[str]:
    def of(which: int) -> tuple[str, str, str]:
        least = min(run[which].cached / run[0].cached for run in runs)
        waits_s = [wait_ms / 1000 for run in runs for wait_ms in run[which].waits_ms]
        return f"{least:.1%}", f"{sum(waits_s) / len(waits_s):.1f}", f"{max(waits_s):.1f}"

    sticky, without = of(1), of(2)
    both = (text for pair in zip(sticky, without, strict=True) for text in pair)
    return [case.name, *both, str(bad)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.simulated_stays", description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--worth-us", type=float, help="of a cached token; measured without it")
    parser.add_argument("--only", help="the agents and places of one case, as 6x1")
    options = parser.parse_args()
    rows, lines = [], list[str]()
    for case in CASES:
        if options.only and case.name.partition(",")[0] != options.only:
            continue
        seeds = range(options.first, options.first + options.seeds)
        runs = [simulated(case, seed, options.turns, options.worth_us) for seed in seeds]
        found = [[*missed(*run)] for run in runs]
        lines += (
            f"{case.name}, seed {seed}: {line}"
            for seed, bad in zip(seeds, found, strict=True)
            for line in bad
        )
        rows.append(_row(case, runs, sum(map(bool, found))))
    headers = (
        "agents x places of an account",
        "least of one account's cached tokens",
        "without stickiness",
        "mean wait, s",
        "without",
        "longest, s",
        "without",
        "missed",
    )
    grid.show([grid.Grid(f"Conversations in virtual time, {options.seeds} seeds", headers, rows)])
    for line in lines:
        print(f"missed: {line}")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
