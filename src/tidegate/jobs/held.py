"""What nothing can be called for just now, and when it is looked at again.

Two know of it: the gates and pauses of the limiter, for all processes together, and this process's
`Outages`. A job or a line is held while either of them says so of all that it could call.

Invariants: what is held takes no place in a window: it goes back to the queue, each a little later
than the one before it, so that what can be called does not wait behind it; it is looked at again
at latest `_LONGEST_WAIT_MS` and `MOST_APART_MS` later, or what the caller sets for the latter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import uniform
from uuid import UUID

from tidegate.jobs.outages import Key, Outages
from tidegate.spine.routing import Gate

_SHORT_MS = 400  # not worth a way through the queue
_LONGEST_WAIT_MS = 60_000
APART_MS, MOST_APART_MS = 25, 20_000
_WIDEST_LOOK = 1_000
_PUT_OFF_A_S, _PUT_OFF_AT_ONCE = 1_000.0, 2_000.0


class Held:
    """One per process. gates: of the upstreams that its jobs and lines could use, by name."""

    def __init__(self, outages: Outages, gates: Mapping[str, Gate]) -> None:
        self.outages = outages
        self._gates = gates
        self._closed: set[str] = set()

    def __repr__(self) -> str:
        return f"<Held {self.outages!r}>"

    @property
    def _is_any(self) -> bool:
        """False as long as all works, and there is nothing to ask for."""
        gates = self._gates.values()
        return self.outages.is_any or any(one.closed() or one.limiter.has_pauses for one in gates)

    def ms(self, targets: Sequence[Key]) -> float:
        """Until a call to one of `targets` may be made; 0: now or soon, or there are no targets."""
        return min((self._ms(key) for key in targets), default=0.0)

    def _ms(self, key: Key) -> float:
        gate = self._gates.get(key[0])
        ready_in_ms = 0.0
        if gate is not None:
            self._closed_ms(gate)
            ready_in_ms = gate.ready_in_ms(key[1])
        here_ms = self.outages.held_ms((key,)) if self.outages.is_any else 0.0
        return max(here_ms, ready_in_ms if ready_in_ms > _SHORT_MS else 0.0)

    def _closed_ms(self, gate: Gate) -> int:
        """Until its next try is due; 0 while it is open. A gate that was opened, by a person or by
        the answer that another process had, is news for the outages of this process."""
        if (found := gate.closed()) is not None:
            self._closed.add(gate.upstream)
            return found[0]
        if gate.upstream in self._closed:
            self._closed.discard(gate.upstream)
            self.outages.due(gate.upstream)
        return 0

    def may_claim(self, most: int) -> int:
        """How many to claim: as `Outages.may_claim`, and none while all upstreams are out."""
        gates = self._gates.values()
        closed_ms = [self._closed_ms(one) for one in gates]
        if closed_ms and min(closed_ms) > _SHORT_MS:
            return 0
        return self.outages.may_claim(most)

    def waits_ms(
        self,
        targets: Iterable[tuple[UUID, Sequence[Key]]],
        before: int = 0,
        *,
        apart_ms: int = APART_MS,
        most_apart_ms: int = MOST_APART_MS,
    ) -> dict[UUID, int]:
        """Those that are held, and when each is to be looked at again. before: how many were put
        off just before these."""
        if not self._is_any:
            return {}
        known: dict[tuple[Key, ...], float] = {}
        held: dict[UUID, tuple[Key, ...]] = {}
        for one, keys in targets:
            of_these = tuple(keys)
            if of_these not in known:
                known[of_these] = self.ms(of_these)
            if known[of_these]:
                held[one] = of_these
        spread_ms = min(most_apart_ms, apart_ms * (before + len(held)))
        return {one: self._wait_ms(keys, spread_ms) for one, keys in held.items()}

    def wait_ms(self, targets: Sequence[Key]) -> int:
        """For how long one stays in the queue whose call failed by the upstream."""
        return self._wait_ms(targets, 0)

    def _wait_ms(self, targets: Sequence[Key], spread_ms: int) -> int:
        held_ms = min(_LONGEST_WAIT_MS, self.ms(targets))
        return round(max(self.outages.wait_ms(targets), held_ms + uniform(0, spread_ms)))


class Look:
    """How one queue is looked through for what can be called: further each time that only what is
    held was found, and not faster than PostgreSQL bears, as each that is put off is written twice.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        a_s: float = _PUT_OFF_A_S,
        at_once: float = _PUT_OFF_AT_ONCE,
    ) -> None:
        """It puts off `a_s` in a second, after `at_once` at first."""
        self._clock = clock
        self._a_s, self._at_once = a_s, at_once
        self._in_vain = 0
        self._left = at_once
        self._since = clock()
        self.put_off = 0  # in a row

    def __repr__(self) -> str:
        return f"<Look in_vain={self._in_vain} put_off={self.put_off}>"

    def at(self, most: int) -> int:
        """How many to look at where `most` could be called."""
        return look_at(most, self._in_vain)

    def found(self, *, held: int, free: int) -> float:
        """Note what the last look has found; returns for how many seconds to rest."""
        self._in_vain = self._in_vain + 1 if held and not free else self._in_vain // 2
        self.put_off = self.put_off + held if held else 0
        now = self._clock()
        earned = (now - self._since) * self._a_s
        self._left, self._since = min(self._at_once, self._left + earned) - held, now
        return max(0.0, -self._left / self._a_s)


def look_at(most: int, in_vain: int) -> int:
    """How many to look at where `most` could be called, after so many looks found only what is
    held: or all that can be called would wait behind what a single paused model holds."""
    return max(most, min(_WIDEST_LOOK, most << min(in_vain, 10)))
