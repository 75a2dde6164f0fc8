"""Outages of upstreams as jobs and batch lines of this process see them. Pure.

    WORKING -- `FAULTS` consecutive faults, or one that is conclusive --> OUT
    OUT -- its time has passed and one call takes the turn --> PROBED
    PROBED -- an answer --> WORKING, else OUT

A fault of the upstream is no fault of a job: the job returns to the queue, and nothing that needs
the upstream is called until one probe, the next real call, is answered. A 429 concerns one model; a
refused key concerns the upstream; any other fault may concern either, so the model is held for
`HEAD_START_S` longer and the next probe is of another model if one waits.

Invariants: an upstream that is out gets at most one call per `FIRST_S`, and is probed at the latest
`LONGEST_S + HEAD_START_S` after the last probe (`DEAD_KEY_S` for a refused key, and at most
`LONGEST_OF_FAULT_MS` for a fault that states a time); a held job takes no slot in a window; at most
`_MOST_KNOWN` held jobs are remembered, the others return when their time has passed.
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
_PROBE_S = 30.0  # a probe without an answer after this time no longer blocks the next
_CANDIDATE_S = 5.0
_UNDER_WAY_MS = 1_000.0
_GRACE_MS = 250  # the gate has chosen this call as its probe, and keeps its own time
_MOST = 1_000  # callers name the models

Key = tuple[str, str]  # upstream and model; "" for all its models


@dataclass(eq=False, slots=True)
class Turn:
    """One call to one of several targets. `probes`: the outages that the call probes."""

    targets: Sequence[Key]
    probes: list[Key] = field(default_factory=list)


@dataclass(slots=True)
class _Outage:
    """The outage of an upstream or one of its models. `faults`: consecutive ones."""

    since: float
    faults: int = 0
    rounds: int = 0
    until: float = 0.0
    probe: Turn | None = None
    probe_until: float = 0.0

    def held_ms(self, now: float) -> float:
        """Return the ms until a call may be made, 0 for now."""
        if not self.rounds:
            return 0.0
        if now < self.until:
            return (self.until - now) * 1000
        return _UNDER_WAY_MS if self.probe is not None and now < self.probe_until else 0.0


class Outages:
    """Outages that one process knows. upstreams: all that its jobs could use at the time."""

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
        """Whether there is any outage or fault."""
        return bool(self._outages)

    def held_ms(self, targets: Iterable[Key]) -> float:
        """Return the ms until a call to one of `targets` may be made; 0 for now, or for no
        targets."""
        now = self._clock()
        return min((self._held_ms(key, now) for key in targets), default=0.0)

    def _held_ms(self, key: Key, now: float) -> float:
        of_it = (self._outages.get(one) for one in (key, (key[0], "")))
        return max((one.held_ms(now) for one in of_it if one is not None), default=0.0)

    def enter(self, targets: Sequence[Key]) -> Turn:
        """Take the turn to call one of `targets`; `ended` or `left` returns it. Raises
        UpstreamUnavailable."""
        now = self._clock()
        turn = Turn(targets)
        held_ms = self.held_ms(targets)
        if held_ms > _GRACE_MS:
            message = "the upstream is out, and was not called"
            raise UpstreamUnavailable(message, retry_after_ms=round(held_ms), asked=False)
        for target in targets:
            for key in (target, (target[0], "")):
                outage = self._outages.get(key)
                if outage is not None and outage.rounds and outage.held_ms(now) <= _GRACE_MS:
                    outage.probe, outage.probe_until = turn, now + _PROBE_S
                    turn.probes.append(key)
        self._candidate_until = 0.0
        return turn

    def ended(self, turn: Turn, upstream: str | None, error: BaseException | None) -> None:
        """Return a turn with its result. upstream: the last one that was called, None for none."""
        called = next((key for key in turn.targets if key[0] == upstream), None)
        if isinstance(error, UpstreamUnavailable) and not error.asked:
            called = None
        if isinstance(error, UpstreamError) and error.of_upstream:
            self._failed(turn, called, error)
        elif called is not None and _is_answer(error):
            for key in (called, (called[0], "")):
                outage = self._outages.get(key)
                # A call from before the outage says nothing about its end.
                if outage is not None and (not outage.rounds or key in turn.probes):
                    del self._outages[key]
        self.left(turn)

    def left(self, turn: Turn | None) -> None:
        """Return a turn that says nothing about its upstream."""
        for key in turn.probes if turn is not None else ():
            outage = self._outages.get(key)
            if outage is not None and outage.probe is turn:
                outage.probe = None
                outage.until = self._clock() + FIRST_S

    def _failed(self, turn: Turn, called: Key | None, error: UpstreamError) -> None:
        """Count a fault of the upstream. called: None if all of the turn's targets are known to be
        out."""
        for key in turn.probes:
            if (outage := self._outages.get(key)) is not None and outage.probe is turn:
                outage.probe = None
        after_s = error.pause_ms / 1000
        if called is None:
            measured_s = (error.retry_after_ms or 0) / 1000
            # Targets that `enter` refused are known already, and may be out for one model only.
            for name, _ in turn.targets if isinstance(error, UpstreamOut) else ():
                self._hold((name, ""), measured_s, is_measured=True)
        elif isinstance(error, UpstreamThrottled):
            if not error.lowered_limit:
                self._hold(called, after_s, enough=True)
        elif isinstance(error, UpstreamUnauthorized) and error.of_key:
            self._hold((called[0], ""), DEAD_KEY_S, enough=True)
        else:
            self._hold((called[0], ""), after_s, enough=error.in_outage)
            self._hold(called, after_s, enough=error.in_outage, more_s=HEAD_START_S)

    def _hold(
        self,
        key: Key,
        after_s: float,
        *,
        enough: bool = False,
        is_measured: bool = False,
        more_s: float = 0.0,
    ) -> None:
        now = self._clock()
        if key not in self._outages and len(self._outages) >= _MOST:
            self._outages.pop(next(iter(self._outages)))
        outage = self._outages.setdefault(key, _Outage(now))
        outage.faults += 1
        if outage.held_ms(now):
            return  # an earlier call, or one that the outage delayed
        pause_s = min(LONGEST_S, FIRST_S * 2**outage.rounds)
        after_s = min(after_s, DEAD_KEY_S)  # an operator or the provider may end it sooner
        if is_measured:  # by the gate, which measures the outage
            pause_s = max(after_s, FIRST_S / 4)
        elif not enough and not outage.rounds and outage.faults < FAULTS:
            return
        outage.rounds = min(outage.rounds + 1, 10)
        outage.until = now + max(pause_s, after_s) + more_s

    def due(self, upstream: str) -> None:
        """Allow a probe of an upstream now, whatever this process knows of it."""
        if (outage := self._outages.get((upstream, ""))) is not None:
            outage.until = min(outage.until, self._clock())

    def wait_ms(self, targets: Sequence[Key]) -> int:
        """Return the wait of a job that was not called, or whose call the upstream failed: until
        the next probe, plus a random time, so that jobs do not all return together."""
        now = self._clock()
        spread_s = _FIRST_SPREAD_S
        for target in targets:
            for key in (target, (target[0], "")):
                if (outage := self._outages.get(key)) is not None:
                    spread_s = max(spread_s, (now - outage.since) / 4)
        spread_s = min(spread_s, LONGEST_SPREAD_S)
        return round(self.held_ms(targets) + self._random.uniform(0.2, 1) * spread_s * 1000)

    def may_claim(self, most: int) -> int:
        """Return how many jobs to claim: `most` while an upstream works, else the one for the next
        probe once it is due. `enter` or `unclaimed` ends such a claim."""
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
        """Report that a claim for a probe brought no job."""
        self._candidate_until = 0.0


def _is_answer(error: BaseException | None) -> bool:
    return error is None or (isinstance(error, UpstreamError) and error.is_answer)


_SHORT_MS = 400  # too short to return a job to the queue for
_LONGEST_WAIT_MS = 60_000
APART_MS, MOST_APART_MS = 25, 20_000
_DEEPEST_CLAIM = 1_000
_PUT_OFF_A_S, _PUT_OFF_AT_ONCE = 1_000.0, 2_000.0


class Held:
    """Outages and closed gates together. One per process. gates: by name, of all upstreams in
    use."""

    def __init__(self, outages: Outages, gates: Mapping[str, Gate]) -> None:
        self.outages = outages
        self._gates = gates
        self._closed: set[str] = set()

    def __repr__(self) -> str:
        return f"<Held {self.outages!r}>"

    def ended(self, turn: Turn, upstream: str | None, error: BaseException | None) -> None:
        """Return a turn as `Outages.ended` does, and remember that the gate was closed: it may have
        been opened before it is read here."""
        self.outages.ended(turn, upstream, error)
        if upstream is not None and isinstance(error, UpstreamError) and error.in_outage:
            self._closed.add(upstream)

    @property
    def _is_any(self) -> bool:
        """Whether anything is held; cheap while all upstreams work."""
        gates = self._gates.values()
        return self.outages.is_any or any(one.closed() or one.limiter.has_pauses for one in gates)

    def ms(self, targets: Sequence[Key]) -> float:
        """Return the ms until a call to one of `targets` may be made; 0 for now or soon, or no
        targets."""
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
        """Return the ms until the gate's next probe, 0 while it is open. A gate that was opened, by
        a person or another process's answer, ends the outage's wait in this process."""
        if (found := gate.closed()) is not None:
            self._closed.add(gate.upstream)
            return found[0]
        if gate.upstream in self._closed:
            self._closed.discard(gate.upstream)
            self.outages.due(gate.upstream)
        return 0

    def may_claim(self, most: int) -> int:
        """Return how many to claim: as `Outages.may_claim`, and 0 while all upstreams are out."""
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
        """Return those that are held, and when each is to be claimed again. before: how many were
        put off just before."""
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
        """Return the wait in the queue after the upstream failed a call to these targets."""
        return self._wait_ms(targets, 0)

    def _wait_ms(self, targets: Sequence[Key], spread_ms: int) -> int:
        held_ms = min(_LONGEST_WAIT_MS, self.ms(targets))
        return round(max(self.outages.wait_ms(targets), held_ms + uniform(0, spread_ms)))


class ClaimDepth:
    """The depth of claims from one queue. Each claim that brings only held jobs makes the next one
    deeper, at a rate that PostgreSQL can bear, as each job that is put off is written twice."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        a_s: float = _PUT_OFF_A_S,
        at_once: float = _PUT_OFF_AT_ONCE,
    ) -> None:
        """a_s: jobs put off per second, after `at_once` in the beginning."""
        self._clock = clock
        self._a_s, self._at_once = a_s, at_once
        self._in_vain = 0
        self._left = at_once
        self._since = clock()
        self.put_off = 0  # consecutively

    def __repr__(self) -> str:
        return f"<ClaimDepth in_vain={self._in_vain} put_off={self.put_off}>"

    def at(self, most: int) -> int:
        """Return how many to claim if `most` could be called."""
        return claim_depth(most, self._in_vain)

    def found(self, *, held: int, free: int) -> float:
        """Record what the last claim brought; return for how many seconds to rest."""
        self._in_vain = self._in_vain + 1 if held and not free else self._in_vain // 2
        self.put_off = self.put_off + held if held else 0
        now = self._clock()
        earned = (now - self._since) * self._a_s
        self._left, self._since = min(self._at_once, self._left + earned) - held, now
        return max(0.0, -self._left / self._a_s)


def claim_depth(most: int, in_vain: int) -> int:
    """Return how many to claim if `most` could be called, after `in_vain` claims of held jobs only:
    else all jobs that can be called would wait behind those of a single paused model."""
    return max(most, min(_DEEPEST_CLAIM, most << min(in_vain, 10)))


_FIRST_BACK, _MOST_BACK, _MOST_KNOWN = 12, 1_000, 20_000
_COUNT_EVERY_S = 15.0
_APART_MS, _MOST_APART_MS = 250, 600_000  # long, since `bring_back` returns them sooner


@dataclass(slots=True)
class _Group:
    """Jobs that wait for the same targets: the claim by which each was put off, and until when."""

    ids: dict[UUID, tuple[int, float]] = field(default_factory=dict)
    at_once: int = _FIRST_BACK


class PutOff:
    """Jobs that one worker has put off. targets_of: the upstreams and models of a job."""

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
        """Return what `Held.waits_ms` returns for these jobs."""
        each = ((job.request_id, self._targets_of(job)) for job in jobs)
        spread = {"apart_ms": _APART_MS, "most_apart_ms": _MOST_APART_MS}
        return self.held.waits_ms(each, self._known, **spread)

    def wait_ms(self, job: ClaimedJob) -> int:
        """Return the job's wait in the queue after the upstream failed its call."""
        return self.held.wait_ms(self._targets_of(job))

    async def release(
        self,
        jobs: Sequence[ClaimedJob],
        waits_ms: Mapping[UUID, int] | None = None,
        failure: Failure | None = None,
    ) -> None:
        """Return claims as `JobQueue.release` does; those in `waits_ms` are put off."""
        await self._store.queue.release(jobs, waits_ms, failure)
        for job in jobs:
            if (wait_ms := (waits_ms or {}).get(job.request_id)) is not None:
                self.note(job, wait_ms)

    def note(self, job: ClaimedJob, wait_ms: int) -> None:
        """Remember a job that was put off for so long."""
        group = self._groups.setdefault(tuple(self._targets_of(job)), _Group())
        is_new = job.request_id not in group.ids
        if self._known < _MOST_KNOWN or not is_new:
            self._known += is_new
            # Its release has incremented the claim.
            group.ids[job.request_id] = job.claim + 1, self._clock() + wait_ms / 1000

    async def bring_back(self) -> None:
        """Make jobs claimable that nothing holds any more. Called every second; raises
        StoreUnavailable, after which they return when their time has passed."""
        await self._store.queue.bring_back(self._back())

    async def bring_all_back(self) -> None:
        """Make all remembered jobs claimable for other processes; raises StoreUnavailable."""
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
        """Forget jobs that have returned by themselves."""
        for targets, group in list(self._groups.items()):
            group.ids = {one: what for one, what in group.ids.items() if what[1] > now}
            if not group.ids:
                del self._groups[targets]
        self._known = sum(len(group.ids) for group in self._groups.values())
