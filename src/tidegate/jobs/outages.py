"""The outages of upstreams, as the calls of this process's jobs and batch lines find them. Pure.

WORKING -- `FAULTS` faults of the upstream in a row, or one that says enough --> OUT
OUT -- its time is over, and one call takes the turn --> PROBED -- an answer --> WORKING, else OUT

A fault of the upstream is no fault of a job: the job returns to the queue, and nothing that needs
the upstream is called before one probe, the next real call, has been answered. A 429 is about one
model of an upstream, or about nothing where an adaptive limit was lowered for it; a refused key is
about all of it. Every other such fault may be about either: the model is held for `HEAD_START_S`
longer, so that the next probe is of another one if any job waits for another, and stays out when
that one is answered.

Invariants: an upstream that is out gets at most one call each `FIRST_S`; it is probed again at
latest `LONGEST_S + HEAD_START_S` after the last probe ended (`DEAD_KEY_S` where it refuses our
key), and a job returns from the queue at most `LONGEST_SPREAD_S` later; one answer ends an outage
of the model that gave it, and of the upstream.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tidegate.errors import (
    UpstreamError,
    UpstreamOut,
    UpstreamThrottled,
    UpstreamUnauthorized,
    UpstreamUnavailable,
)

FAULTS = 3
FIRST_S = 1.0
LONGEST_S = 8.0
HEAD_START_S = 2.0
DEAD_KEY_S = 60.0
LONGEST_SPREAD_S = 20.0
_FIRST_SPREAD_S = 1.0
_PROBE_S = 30.0  # a probe that takes longer has another one beside it
_CANDIDATE_S = 5.0
_UNDER_WAY_MS = 1_000.0
_GRACE_MS = (
    250  # the gate of all processes has chosen this call as its try, and counts its own time
)
_MOST = 1_000  # models are named by callers

Key = tuple[str, str]  # upstream and model; "" for all models of it


@dataclass(eq=False, slots=True)
class Turn:
    """One call to one of several targets. `probes`: the outages that it looks for the end of."""

    targets: Sequence[Key]
    probes: list[Key] = field(default_factory=list)


@dataclass(slots=True)
class _Outage:
    """Of one upstream or one model of it. `faults` are those in a row."""

    since: float
    faults: int = 0
    rounds: int = 0
    until: float = 0.0
    probe: Turn | None = None
    probe_until: float = 0.0

    def held_ms(self, now: float) -> float:
        """Until a call may be made; 0: now."""
        if not self.rounds:
            return 0.0
        if now < self.until:
            return (self.until - now) * 1000
        return _UNDER_WAY_MS if self.probe is not None and now < self.probe_until else 0.0


class Outages:
    """One per process. upstreams: all that its jobs could use."""

    def __init__(
        self,
        upstreams: Iterable[str],
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._upstreams = frozenset(upstreams)
        self._clock = clock
        self._random = rng or random.Random()
        self._outages: dict[Key, _Outage] = {}
        self._candidate_until = 0.0

    def __repr__(self) -> str:
        return f"<Outages {sorted(self._outages)}>"

    @property
    def is_any(self) -> bool:
        """Whether anything is to be looked at. False as long as all upstreams work."""
        return bool(self._outages)

    def held_ms(self, targets: Iterable[Key]) -> float:
        """Until a call to one of `targets` may be made; 0: now, or there are no targets."""
        now = self._clock()
        return min((self._held_ms(key, now) for key in targets), default=0.0)

    def _held_ms(self, key: Key, now: float) -> float:
        of_it = (self._outages.get(one) for one in (key, (key[0], "")))
        return max((one.held_ms(now) for one in of_it if one is not None), default=0.0)

    def enter(self, targets: Sequence[Key]) -> Turn:
        """Take the turn to call one of `targets`; ended by `ended` or `left`. Raises
        UpstreamUnavailable."""
        now = self._clock()
        turn = Turn(targets)
        held_ms = self.held_ms(targets)
        if held_ms > _GRACE_MS:
            said = "the upstream is out, and was not called"
            raise UpstreamUnavailable(said, retry_after_ms=round(held_ms), asked=False)
        for target in targets:
            for key in (target, (target[0], "")):
                outage = self._outages.get(key)
                if outage is not None and outage.rounds and outage.held_ms(now) <= _GRACE_MS:
                    outage.probe, outage.probe_until = turn, now + _PROBE_S
                    turn.probes.append(key)
        self._candidate_until = 0.0
        return turn

    def ended(self, turn: Turn, upstream: str | None, error: BaseException | None) -> None:
        """A turn is over. upstream: the last one that was called, None where none was."""
        called = next((key for key in turn.targets if key[0] == upstream), None)
        if isinstance(error, UpstreamUnavailable) and not error.asked:
            called = None
        if isinstance(error, UpstreamError) and error.of_upstream:
            self._failed(turn, called, error)
        elif called is not None and _is_answer(error):
            for key in (called, (called[0], "")):
                outage = self._outages.get(key)
                # What was called before an outage began says nothing of its end.
                if outage is not None and (not outage.rounds or key in turn.probes):
                    del self._outages[key]
        self.left(turn)

    def left(self, turn: Turn | None) -> None:
        """A turn is over, and says nothing of its upstream."""
        for key in turn.probes if turn is not None else ():
            outage = self._outages.get(key)
            if outage is not None and outage.probe is turn:
                outage.probe = None
                outage.until = self._clock() + FIRST_S

    def _failed(self, turn: Turn, called: Key | None, error: UpstreamError) -> None:
        """A fault of the upstream. called: None where all of the turn's targets are known to be
        out."""
        for key in turn.probes:
            if (outage := self._outages.get(key)) is not None and outage.probe is turn:
                outage.probe = None
        told_s = (error.retry_after_ms or 0) / 1000
        if called is None:
            # What `enter` refused is known here already, and may be out for one model alone.
            for name, _ in turn.targets if isinstance(error, UpstreamOut) else ():
                self._hold((name, ""), told_s, is_told=True)
        elif isinstance(error, UpstreamThrottled):
            if not error.lowered_limit:
                self._hold(called, told_s, enough=True)
        elif isinstance(error, UpstreamUnauthorized) and error.of_key:
            self._hold((called[0], ""), DEAD_KEY_S, enough=True)
        else:
            self._hold((called[0], ""), told_s, enough=error.in_outage)
            self._hold(called, told_s, enough=error.in_outage, more_s=HEAD_START_S)

    def _hold(
        self,
        key: Key,
        told_s: float,
        *,
        enough: bool = False,
        is_told: bool = False,
        more_s: float = 0.0,
    ) -> None:
        now = self._clock()
        if key not in self._outages and len(self._outages) >= _MOST:
            self._outages.pop(next(iter(self._outages)))
        outage = self._outages.setdefault(key, _Outage(now))
        outage.faults += 1
        if outage.held_ms(now):
            return  # by a call that was under way when it began, or one that was held up by it
        pause_s = min(LONGEST_S, FIRST_S * 2**outage.rounds)
        told_s = min(told_s, DEAD_KEY_S)  # an operator or the provider may end it sooner
        if is_told:  # by what keeps count of the outage itself
            pause_s = max(told_s, FIRST_S / 4)
        elif not enough and not outage.rounds and outage.faults < FAULTS:
            return
        outage.rounds = min(outage.rounds + 1, 10)
        outage.until = now + max(pause_s, told_s) + more_s

    def due(self, upstream: str) -> None:
        """It may be asked now, whatever is known here; whether it works a probe will say."""
        if (outage := self._outages.get((upstream, ""))) is not None:
            outage.until = min(outage.until, self._clock())

    def wait_ms(self, targets: Sequence[Key]) -> int:
        """For how long a job stays in the queue that was not called, or whose call failed by the
        upstream: until the next probe and a little, so that not all return in the same moment."""
        now = self._clock()
        spread_s = _FIRST_SPREAD_S
        for target in targets:
            for key in (target, (target[0], "")):
                if (outage := self._outages.get(key)) is not None:
                    spread_s = max(spread_s, (now - outage.since) / 4)
        spread_s = min(spread_s, LONGEST_SPREAD_S)
        return round(self.held_ms(targets) + self._random.uniform(0.2, 1) * spread_s * 1000)

    def may_claim(self, most: int) -> int:
        """How many jobs to claim: `most` while an upstream works, else the one that becomes the
        next probe, and none before that is due. Ended by `enter` or `unclaimed`."""
        if not self._outages or not self._upstreams:
            return most
        now = self._clock()
        of_all = [self._outages.get((name, "")) for name in self._upstreams]
        if any(one is None or not one.rounds for one in of_all):
            return most
        is_due = any(one is not None and one.held_ms(now) == 0 for one in of_all)
        if not is_due or now < self._candidate_until:
            return 0
        self._candidate_until = now + _CANDIDATE_S
        return 1

    def unclaimed(self) -> None:
        """The claim that `may_claim` allowed has brought no job to probe with."""
        self._candidate_until = 0.0


def _is_answer(error: BaseException | None) -> bool:
    return error is None or (isinstance(error, UpstreamError) and error.is_answer)
