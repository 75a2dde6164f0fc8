"""Outages of upstreams as jobs and batch lines of this process see them. Pure.

    WORKING -- `FAULTS` consecutive faults, or one that is conclusive --> OUT
    OUT -- its time is over and one call takes the turn --> PROBED
    PROBED -- an answer --> WORKING, else OUT

A fault of the upstream is no fault of a job: the job returns to the queue, and nothing that needs
the upstream is called until one probe, the next real call, is answered. A 429 concerns one model;
a refused key concerns the upstream; any other fault may concern either, so the model is held for
`HEAD_START_S` longer and the next probe is of another model if one waits.

Invariants: an upstream that is out gets at most one call per `FIRST_S`, and is probed at the
latest `LONGEST_S + HEAD_START_S` after the last probe (`DEAD_KEY_S` for a refused key); a held
job takes no slot in a window; at most `_MOST_KNOWN` held jobs are kept here, the others return by
their time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import uniform
from uuid import UUID

from tidegate.errors import (
    UpstreamError,
    UpstreamOut,
    UpstreamThrottled,
    UpstreamUnauthorized,
    UpstreamUnavailable,
)
from tidegate.record import Failure
from tidegate.spine.routing import Gate
from tidegate.store.records import ClaimedJob
from tidegate.store.store import Store

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
    """One per process. upstreams: all that its jobs could use, as they are at any time."""

    def __init__(
        self,
        upstreams: Collection[str],
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._upstreams = upstreams
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

    def ended(self, turn: Turn, upstream: str | None, error: BaseException | None) -> None:
        """As `Outages.ended`. A gate that was closed when the call failed may have been opened
        before it is looked at here."""
        self.outages.ended(turn, upstream, error)
        if upstream is not None and isinstance(error, UpstreamError) and error.in_outage:
            self._closed.add(upstream)

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


_FIRST_BACK, _MOST_BACK, _MOST_KNOWN = 12, 1_000, 20_000
_COUNT_EVERY_S = 15.0
_APART_MS, _MOST_APART_MS = 250, 600_000  # far, as they are brought back sooner


@dataclass(slots=True)
class _Group:
    """What waits for the same: the claim by which each was put off, and until when."""

    ids: dict[UUID, tuple[int, float]] = field(default_factory=dict)
    at_once: int = _FIRST_BACK


class PutOff:
    """One per worker. targets_of: what may be called for a job, upstreams each with its model."""

    def __init__(
        self,
        store: Store,
        held: Held,
        targets_of: Callable[[ClaimedJob], Sequence[Key]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.held = held
        self._store = store
        self._targets_of = targets_of
        self._clock = clock
        self._groups: dict[tuple[Key, ...], _Group] = {}
        self._known = 0
        self._counted_at = clock()

    def __repr__(self) -> str:
        return f"<PutOff {self._known} for {len(self._groups)} targets>"

    def waits_ms(self, jobs: Iterable[ClaimedJob]) -> dict[UUID, int]:
        """As `Held.waits_ms`, of these jobs."""
        each = ((job.request_id, self._targets_of(job)) for job in jobs)
        apart = {"apart_ms": _APART_MS, "most_apart_ms": _MOST_APART_MS}
        return self.held.waits_ms(each, self._known, **apart)

    def wait_ms(self, job: ClaimedJob) -> int:
        """For how long it stays in the queue, since its call failed by the upstream."""
        return self.held.wait_ms(self._targets_of(job))

    async def release(
        self,
        jobs: Sequence[ClaimedJob],
        waits_ms: Mapping[UUID, int] | None = None,
        failure: Failure | None = None,
    ) -> None:
        """As `JobQueue.release`; those in `waits_ms` are put off."""
        await self._store.queue.release(jobs, waits_ms, failure)
        for job in jobs:
            if (wait_ms := (waits_ms or {}).get(job.request_id)) is not None:
                self.note(job, wait_ms)

    def note(self, job: ClaimedJob, wait_ms: int) -> None:
        """It went back to the queue for so long."""
        group = self._groups.setdefault(tuple(self._targets_of(job)), _Group())
        is_new = job.request_id not in group.ids
        if self._known < _MOST_KNOWN or not is_new:
            self._known += is_new
            # Its claim was released, by which the number of that grew.
            group.ids[job.request_id] = job.claim + 1, self._clock() + wait_ms / 1000

    async def bring_back(self) -> None:
        """Let those be claimed that nothing holds any more. To be called every second; raises
        StoreUnavailable, after which they come back in their time."""
        await self._store.queue.bring_back(self._back())

    async def bring_all_back(self) -> None:
        """Leave what is known here to other processes; raises StoreUnavailable."""
        groups, self._groups, self._known = self._groups, {}, 0
        claims = {one: what[0] for group in groups.values() for one, what in group.ids.items()}
        while claims:
            some = [claims.popitem() for _ in range(min(_MOST_BACK, len(claims)))]
            await self._store.queue.bring_back(dict(some))

    def _back(self) -> dict[UUID, int]:
        found: dict[UUID, int] = {}
        now = self._clock()
        if now - self._counted_at > _COUNT_EVERY_S:
            self._counted_at = now
            self._forget_past(now)
        for targets, group in list(self._groups.items()):
            if self.held.ms(targets):
                group.at_once = _FIRST_BACK
                continue
            for request_id in list(group.ids)[: group.at_once]:
                claim, until = group.ids.pop(request_id)
                self._known -= 1
                if until > now:
                    found[request_id] = claim
            group.at_once = min(_MOST_BACK, 2 * group.at_once)
            if not group.ids:
                del self._groups[targets]
        return found

    def _forget_past(self, now: float) -> None:
        """Those that have come back by themselves."""
        for targets, group in list(self._groups.items()):
            group.ids = {one: what for one, what in group.ids.items() if what[1] > now}
            if not group.ids:
                del self._groups[targets]
        self._known = sum(len(group.ids) for group in self._groups.values())
