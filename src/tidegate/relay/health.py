"""Whether an upstream can be asked now, and how much of the traffic may be tried again. Pure.

CLOSED (asked) -- `FAULTS` real faults in a row --> OPEN (left out, for longer each time)
OPEN -- its time is over --> HALF-OPEN (one request may try) -- success --> CLOSED, else OPEN

A throttling is no fault: it says that the upstream works. Invariant: an upstream that is out is
asked again after at most `LONGEST_S` (`DEAD_KEY_S` where it refused our key), and a success closes
it at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

FAULTS = 5
FIRST_S = 1.0
# Short, as one request is all that it costs to see that an upstream is back; a key that was refused
# is mended by a person.
LONGEST_S = 8.0
DEAD_KEY_S = 60.0
# Of the traffic may be tried again, and so many at once after a quiet time.
RETRY_SHARE = 0.2
RETRIES_AT_ONCE = 10.0

Clock = Callable[[], float]
State = Literal["ok", "out", "trying"]


@dataclass(slots=True)
class Health:
    """Of one upstream, in this process. `why` is the last fault, for people."""

    clock: Clock = time.monotonic
    faults: int = 0
    open_until: float = 0.0
    probing_until: float = 0.0
    why: str = ""
    key_dead: bool = False
    _rounds: int = field(default=0)

    @property
    def state(self) -> State:
        if not self._rounds:
            return "ok"
        return "out" if self.clock() < self.open_until else "trying"

    def admits(self) -> bool:
        """Whether a request may be sent; in the half-open state, one at a time."""
        if not self._rounds:
            return True
        now = self.clock()
        if now < self.open_until or now < self.probing_until:
            return False
        self.probing_until = now + FIRST_S
        return True

    def back_in_ms(self) -> int:
        """Until it may be asked again, at least 1."""
        return max(1, round((max(self.open_until, self.probing_until) - self.clock()) * 1000))

    def succeeded(self) -> bool:
        """It answered as it should; True if it was out before."""
        was_out = self._rounds > 0
        self.faults = self._rounds = 0
        self.open_until = self.probing_until = 0.0
        self.key_dead, self.why = False, ""
        return was_out

    def failed(self, why: str, *, key_dead: bool = False) -> bool:
        """A real fault; True if it is out from now on, and was not before. A refused key is out
        at the first word: every further call would be refused too."""
        self.faults += 1
        self.why = why
        if self.faults < FAULTS and not key_dead and not self._rounds:
            return False
        first = self._rounds == 0 or (key_dead and not self.key_dead)
        self.key_dead = self.key_dead or key_dead
        pause_s = DEAD_KEY_S if key_dead else min(LONGEST_S, FIRST_S * 2**self._rounds)
        self.open_until = self.clock() + pause_s
        self.probing_until = 0.0
        self._rounds = min(self._rounds + 1, 10)
        return first


@dataclass(slots=True)
class RetryBudget:
    """A bucket that each request fills by a share of a retry."""

    saved: float = RETRIES_AT_ONCE

    def earn(self) -> None:
        self.saved = min(RETRIES_AT_ONCE, self.saved + RETRY_SHARE)

    def spend(self) -> bool:
        """Whether one more may be tried again."""
        if self.saved < 1:
            return False
        self.saved -= 1
        return True
