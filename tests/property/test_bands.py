"""Bands at a rate, in virtual time on the model alone: who waits for whom, and what each gets.

What holds here holds for the Lua, which the other property test steps beside the model.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

import pytest

from tests.property.crowd import Call, Crowd, Process
from tidegate.limiter import MAX_LEASE_MS, PoolPolicy, Rate

pytestmark = pytest.mark.slow

WINDOW_MS = 10_000
BOUND = 10_000
LIMIT = "tpm:x"
HIGH, NORMAL, LOW = 1, 2, 3
SHARE = {NORMAL: 0.1, LOW: 0.05}


class Load(Crowd):
    """Callers that ask again when their call has ended, and the waits of each band."""

    def __init__(self, bound: int = BOUND) -> None:
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = count()
        self._asked: dict[int, int] = {}
        self.waits: defaultdict[int, list[int]] = defaultdict(list)
        self.used: Counter[int] = Counter()
        self._pauses: dict[int, int] = {}
        limits = {LIMIT: Rate(bound, WINDOW_MS, "tokens", slack_ms=0)}
        super().__init__(PoolPolicy(limits, lease_ms=MAX_LEASE_MS))
        self.began_ms = self.now_ms
        self._after(0, self._compare)

    def callers(
        self, number: int, band: int, tokens: int, *, took_ms: int = 100, pause_ms: int = 0
    ) -> None:
        for each in range(number):
            self._after(each * 37, lambda: self._call(band, tokens, took_ms, pause_ms))

    def run_for(self, ms: int) -> None:
        until = self.now_ms + ms
        while True:
            timers = self.model.pump.timed.values()
            at = min(self._due[0][0], *timers) if timers else self._due[0][0]
            if at > until:
                return
            self.now_ms = max(self.now_ms, at)
            if self._due[0][0] <= self.now_ms:
                heappop(self._due)[2]()
            else:
                self.compare(self.processes[0])

    def forget(self) -> None:
        """Count from now on."""
        self.began_ms = self.now_ms
        self.waits.clear()
        self.used.clear()

    def share(self, band: int) -> float:
        """The part of what the limit could give since the start."""
        return self.used[band] * WINDOW_MS / BOUND / (self.now_ms - self.began_ms)

    def _compare(self) -> None:
        self.compare(self.processes[0])
        self._after(MAX_LEASE_MS // 3, self._compare)

    def _after(self, in_ms: int, do: Callable[[], None]) -> None:
        heappush(self._due, (self.now_ms + in_ms, next(self._numbers), do))

    def _new_ticket(self) -> int:
        """The one that the next call gets."""
        ticket = next(self._tickets)
        self._tickets = count(ticket)
        return ticket

    def _call(self, band: int, tokens: int, took_ms: int, pause_ms: int) -> None:
        ticket = self._new_ticket()
        self._asked[ticket], self._pauses[ticket] = self.now_ms, pause_ms
        self.ask(self.processes[0], "t", LIMIT, band=band, took_ms=took_ms, amounts=str(tokens))

    def _let_in(self, process: Process, ticket: int) -> None:
        call = process.waiting[ticket]
        super()._let_in(process, ticket)
        band, tokens = int(call.flow.split("|")[0]), int(call.member.rpartition("|")[2])
        self.waits[band].append(self.now_ms - self._asked.pop(ticket, self.now_ms))
        self.used[band] += tokens
        self._after(call.took_ms, lambda: self._end(process, call, band, tokens))

    def _end(self, process: Process, call: Call, band: int, tokens: int) -> None:
        self._say(process, flows=[call.flow], releases=[(call.ticket, 1, 0, call.took_ms, "")])
        pause_ms = self._pauses.pop(call.ticket, 0)
        self._after(pause_ms, lambda: self._call(band, tokens, call.took_ms, pause_ms))


def _after_the_start(load: Load, windows: int) -> Load:
    """What a low band took before a higher one began stays in the window for as long."""
    load.run_for(2 * WINDOW_MS)
    load.forget()
    load.run_for(windows * WINDOW_MS)
    return load


def _wait(load: Load, part: float) -> int:
    waits = sorted(load.waits[HIGH])
    return waits[int(len(waits) * part)]


@pytest.mark.parametrize("tokens", [100, 2000, 4000])
def test_a_low_band_takes_of_a_rate_what_higher_ones_leave(tokens: int) -> None:
    alone, beside = Load(), Load()
    for load in alone, beside:
        load.callers(4, HIGH, 25, pause_ms=150)  # 40 % of the limit
    beside.callers(6, LOW, tokens, took_ms=3000)
    for load in alone, beside:
        _after_the_start(load, 20)
    assert _wait(alone, 0.99) == 0
    assert _wait(beside, 0.99) <= WINDOW_MS / 60  # as long as tokens are counted together
    assert beside.share(HIGH) >= 0.97 * alone.share(HIGH)
    assert beside.share(LOW) >= 0.2


@pytest.mark.parametrize("band", [NORMAL, LOW])
@pytest.mark.parametrize("tokens", [100, 2000, 4000])
def test_a_band_gets_its_least_share_of_a_rate_and_the_highest_the_rest(
    tokens: int, band: int
) -> None:
    load = Load()
    load.callers(6, HIGH, 50)  # three times as much as there is
    load.callers(3000 // tokens + 2, band, tokens)
    _after_the_start(load, 25)
    late = tokens * 2 / (25 * BOUND)
    assert SHARE[band] * 0.98 - late <= load.share(band) <= SHARE[band] + late
    assert load.share(HIGH) >= 0.95 - SHARE[band] - tokens / BOUND / 2


def test_a_call_as_great_as_the_limit_gets_its_turn_in_a_low_band() -> None:
    load = Load()
    load.callers(4, HIGH, 25, pause_ms=150)
    load.callers(1, LOW, BOUND)
    load.run_for(70 * WINDOW_MS)
    assert load.used[LOW] >= 3 * BOUND
    assert _wait(load, 0.99) <= WINDOW_MS / 60


def test_great_calls_of_a_high_band_are_not_passed_by_small_ones_for_ever() -> None:
    load = Load()
    load.callers(2, HIGH, BOUND)
    load.callers(3, LOW, 100)
    _after_the_start(load, 20)
    assert load.share(HIGH) >= 0.6
    assert load.share(LOW) <= 0.07


def test_room_kept_for_a_call_that_is_given_up_is_free() -> None:
    load = Load()
    load.callers(6, HIGH, 50)
    load.run_for(2 * WINDOW_MS)
    [call] = load.ask(load.processes[0], "t", LIMIT, band=LOW, amounts=str(BOUND // 2))
    load.run_for(9 * WINDOW_MS)
    load.cancel(load.processes[0], call)
    load.forget()
    load.run_for(20 * WINDOW_MS)
    assert load.share(HIGH) >= 0.95
