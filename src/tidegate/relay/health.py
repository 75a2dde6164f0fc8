"""Whether an upstream can be asked now, and how much of the traffic may be tried again. Pure.

CLOSED (asked) -- `FAULTS` real faults in a row --> OPEN (left out, for longer each time)
OPEN -- its time is over --> HALF-OPEN (one request may try) -- success --> CLOSED, else OPEN

A throttling is no fault: it says that the upstream works. Most faults can be the doing of the
request, or of whoever makes such requests: they count once for each request, and of one tenant's
no more than `MOST_OF_ONE`, until `FAULTS_OF_ONE` different ones have failed.

Invariants: an upstream that is out is asked again after at most `LONGEST_S` (`DEAD_KEY_S` where it
refused our key), and a success closes it at once; one request, however often it is made, neither
puts it out nor keeps it out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tidegate.errors import UpstreamError

FAULTS = 5
MOST_OF_ONE = FAULTS - 1
FAULTS_OF_ONE = 20
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


@dataclass(frozen=True, slots=True)
class Suspect:
    """A request that may have brought its fault upon itself. tenant: None where clients show no
    keys, and cannot be told apart. request: the same for the same request."""

    tenant: str | None
    request: int


def can_be_provoked(error: UpstreamError) -> bool:
    """Whether a request could be the cause of this fault."""
    return not error.of_upstream


@dataclass(slots=True)
class Health:
    """Of one upstream, in this process. `faults` are those in a row, `why` the last of them, for
    who runs this; `in_short` is the same without the provider's words, for everybody."""

    clock: Clock = time.monotonic
    faults: int = 0
    open_until: float = 0.0
    probing_until: float = 0.0
    why: str = ""
    in_short: str = ""
    key_dead: bool = False
    _rounds: int = field(default=0)
    _plain: int = field(default=0)  # faults that nobody can have provoked
    _suspects: set[Suspect] = field(default_factory=set)

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
        if not self.faults:
            return False
        was_out = self._rounds > 0
        self.faults = self._plain = self._rounds = 0
        self._suspects.clear()
        self.open_until = self.probing_until = 0.0
        self.key_dead, self.why, self.in_short = False, "", ""
        return was_out

    def failed(
        self,
        why: str,
        *,
        in_short: str = "",
        key_dead: bool = False,
        suspect: Suspect | None = None,
    ) -> bool:
        """A real fault, or what may be the doing of `suspect`; True if it is out from now on, and
        was not before. A refused key is out at the first word, unless a suspect is named: every
        further call would be refused too."""
        self.faults += 1
        self.why, self.in_short = why, in_short
        is_new = self._noted(suspect)
        at_once = key_dead and suspect is None
        if not at_once and not (is_new if self._rounds else self._is_enough()):
            self.probing_until = 0.0  # the next may try at once
            return False
        first = self._rounds == 0 or (key_dead and not self.key_dead)
        self.key_dead = self.key_dead or key_dead
        pause_s = DEAD_KEY_S if key_dead else min(LONGEST_S, FIRST_S * 2**self._rounds)
        self.open_until = self.clock() + pause_s
        self.probing_until = 0.0
        self._rounds = min(self._rounds + 1, 10)
        return first

    def _noted(self, suspect: Suspect | None) -> bool:
        """Whether it is another one than those before in this row."""
        if suspect is None:
            self._plain += 1
            return True
        if suspect in self._suspects:
            return False
        if len(self._suspects) >= FAULTS_OF_ONE:
            self._suspects.clear()
        self._suspects.add(suspect)
        return True

    def _is_enough(self) -> bool:
        if len(self._suspects) >= FAULTS_OF_ONE:
            return True
        of_each = Counter(one.tenant for one in self._suspects)
        counted = sum(
            count if tenant is None else min(count, MOST_OF_ONE)
            for tenant, count in of_each.items()
        )
        return self._plain + counted >= FAULTS


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
