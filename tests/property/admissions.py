"""What was let in, as the provider would count it: nobody over a limit, no window over its rate,
no fence twice.

Told of every request and every grant. Invariants are checked at the moment of admission: what
happens later, such as a limit that is lowered, never takes an admission back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction

from tidegate.limiter import Concurrency, Rate
from tidegate.limiter.simulation import (
    Holding,
    PauseGate,
    PoolModel,
    SyncReply,
    SyncRequest,
    read_actual,
    read_flow,
    read_member,
)

Grant = tuple[int, int]


@dataclass(slots=True)
class Admission:
    """One call let in: what counts of it under each rate, and for how long: the shortest window of
    the rate since then, since what left that is forgotten."""

    at: int
    amounts: dict[str, int]
    windows: dict[str, int]


@dataclass(slots=True)
class Refusal:
    """A ticket that could not be let in before its deadline, as the pool said."""

    amount: int
    until: int
    epoch: int
    revision: int


@dataclass(slots=True)
class Admissions:
    """See the module. `since` nothing before which is held against the pool."""

    model: PoolModel
    last_fence: tuple[int, int] = (0, 0)
    set_back: bool = False
    _asked: dict[tuple[str, int], tuple[str, str]] = field(default_factory=dict)
    _admitted: dict[tuple[str, int], Admission] = field(default_factory=dict)
    _tried: dict[str, tuple[PauseGate, int, tuple[str, int] | None]] = field(default_factory=dict)
    _refused: dict[str, list[Refusal]] = field(default_factory=dict)
    refusals: int = 0
    _revision: int = 0
    _buckets: set[str] = field(default_factory=set)
    _refills: dict[str, list[tuple[int, Fraction]]] = field(default_factory=dict)
    _holders: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)

    def clock_was_set_back(self) -> None:
        """A server that loses its data and whose clock is set back can't know what it gave."""
        self.set_back = True
        self._admitted.clear()
        self._refused.clear()

    def all_was_lost(self) -> None:
        """The server starts anew from what the processes have seen of its rates."""
        self._admitted.clear()

    def ended(self, limit: str) -> None:
        """A pause was ended: what it was held against is no longer so."""
        self._refused.pop(limit, None)

    def hear(self, request: SyncRequest) -> None:
        """What a process says: its tickets, and what its calls really used."""
        for number, member in request.enqueues:
            ticket = read_member(member).ticket
            self._asked[request.sid, ticket] = request.flows[number - 1], member
        for ticket, _, _, _, actual in request.releases:
            self._settle(request.sid, ticket, actual)
        for ticket, actual in request.settles:
            self._settle(request.sid, ticket, actual)
        for ticket, _, _ in request.cancels:
            admission = self._admitted.get((request.sid, ticket))
            if admission is not None:
                # A grant that crossed it is given back, which nobody could know before.
                for name in admission.amounts:
                    self._refused.pop(name, None)
                admission.amounts.clear()

    def _settle(self, sid: str, ticket: int, actual: str) -> None:
        """A reservation that was too great may have been used by others."""
        admission = self._admitted.get((sid, ticket))
        if admission is None:
            return
        flow = read_flow(self._asked[sid, ticket][0])
        for name, used in zip(flow.lane, read_actual(actual), strict=False):
            if used is not None and name in admission.amounts:
                admission.amounts[name] = min(admission.amounts[name], used)

    def note_refusals(self, request: SyncRequest, reply: SyncReply) -> None:
        """Who was refused early though nobody was before him: nobody else may be let in there, for
        as much, until then."""
        places = {read_member(member).ticket: i for i, (_, member) in enumerate(request.enqueues)}
        for ticket, name, room_ms, used, ahead, is_estimate in reply.barred:
            left_ms = abs(request.lefts[places[ticket]])
            assert room_ms >= left_ms, "refused though there is room before its deadline"
            self.refusals += 1
            if ahead or is_estimate:
                continue
            flow_key, member = self._asked[request.sid, ticket]
            amount = read_member(member).amount(read_flow(flow_key).lane.index(name))
            paused = 1 if self.model.pool.limit(name).is_rate else 0  # holds each that takes some
            one = Refusal(
                paused if used < 0 else amount,
                self.model.pool.now + left_ms,
                self.model.pool.epoch,
                self.model.pool.revision,
            )
            self._refused.setdefault(name, []).append(one)

    def _check_refusals(self, name: str, now: int, amount: int) -> None:
        said = self.model.pool.epoch, self.model.pool.revision
        left = [x for x in self._refused.get(name, ()) if x.until > now]
        self._refused[name] = left = [x for x in left if (x.epoch, x.revision) == said]
        for one in left:
            assert amount < one.amount, f"another was refused under {name}, and could have gone"

    def check(self, granted: list[tuple[str, int, Grant]], reply: SyncReply | None) -> None:
        """Admissions of this moment, over all sessions; after every call of a script."""
        if self._revision != self.model.pool.revision:
            self._revision = self.model.pool.revision
            self._note_windows()
        if not granted:
            return
        now = self.model.pool.now
        assert not self.model.pool.quiet(), "let in during the quiet time"
        assert reply is None or reply.recovering_ms == 0
        fences = sorted((epoch, seq) for _, epoch, (_, seq) in granted)
        assert len(set(fences)) == len(fences)
        assert fences[0] > self.last_fence or self.set_back, "a fence that is not younger"
        self.last_fence = fences[-1]
        names: Counter[str] = Counter()
        taken: Counter[str] = Counter()
        for sid, epoch, (ticket, seq) in granted:
            assert seq % 1000 == 0
            self._holders[epoch, seq] = sid, ticket
            flow_key, member = self._asked[sid, ticket]
            flow = read_flow(flow_key)
            amounts = map(read_member(member).amount, range(len(flow.lane)))
            limits = {name: self.model.pool.limit(name).limit for name in flow.lane}
            self._admitted[sid, ticket] = Admission(
                now,
                dict(zip(flow.lane, amounts, strict=True)),
                {name: x.window_ms for name, x in limits.items() if isinstance(x, Rate)},
            )
            taken.update(self._admitted[sid, ticket].amounts)
            for name, amount in self._admitted[sid, ticket].amounts.items():
                self._check_refusals(name, now, amount)
                if amount or isinstance(limits[name], Concurrency):
                    names[name] += 1  # others take nothing of a rate and need not regard it
        for name, admitted in names.items():
            self._check_limit(name, now, admitted, taken[name])

    def _note_windows(self) -> None:
        """After a change of the policy. A limit that becomes a bucket is as full as its last window
        (docs/decisions/0017): what had left that by then was not taken from the bucket."""
        limits = {name: state.limit for name, state in self.model.pool.limits.items()}
        rates = {name: limit for name, limit in limits.items() if isinstance(limit, Rate)}
        buckets = {name for name, rate in rates.items() if rate.shape == "bucket"}
        new, self._buckets = buckets - self._buckets, buckets
        for name in buckets:
            began = self.model.pool.now, Fraction(rates[name].bound, rates[name].window_ms)
            self._refills[name] = [began] if name in new else [*self._refills[name], began]
        for admission in self._admitted.values():
            for name in rates.keys() & admission.windows.keys():
                window_ms = admission.windows[name]
                if name in new and admission.at + window_ms <= self.model.pool.now:
                    del admission.windows[name]
                else:
                    admission.windows[name] = min(window_ms, rates[name].window_ms)

    def _check_limit(self, name: str, now: int, admitted: int, taken: int) -> None:
        state = self.model.pool.limit(name)
        limit = state.limit
        if limit.shadow:
            return
        pause = state.pause
        if pause is not None and pause.gate is not None:
            self._check_try(name, pause.gate, admitted)
        else:
            assert pause is None or now >= pause.until, f"let in while {name} is paused"
        if isinstance(limit, Concurrency):
            assert state.used <= limit.bound, f"let in over {name}"
        elif isinstance(limit, Rate) and limit.shape == "bucket":
            self._check_bucket(name, limit, now)
        elif isinstance(limit, Rate):
            # A ticket says tokens where its limit counted those in flight when it was asked for.
            most = 1 if limit.exact else limit.bound
            spent = sum(
                min(most, admission.amounts.get(name, 0))
                for admission in self._admitted.values()
                if now - min(limit.window_ms, admission.windows.get(name, 0)) < admission.at
            )
            assert spent <= limit.bound, f"{spent} of {name} in a window"

    def _check_bucket(self, name: str, limit: Rate, now: int) -> None:
        """Since no earlier time has more been let in than the bound and what has refilled: what a
        bucket lacks is kept as its bound changes. What a
        limit in flight let in before it became a bucket was not taken from it."""
        since = sorted(
            (now - one.at, min(limit.bound, one.amounts.get(name, 0)))
            for one in self._admitted.values()
            if name in one.windows
        )
        taken = 0
        for age_ms, amount in since:
            taken += amount
            most = limit.bound + self._refilled(name, now - age_ms, now)
            assert taken <= most, f"{taken} of {name} in {age_ms} ms"

    def _refilled(self, name: str, since: int, until: int) -> Fraction:
        """Return how much a bucket got back, at the bounds of that time. What it lacked as it
        became one has refilled as fast as what it gave first."""
        refilled = Fraction(0)
        for number, (began, each_ms) in reversed(list(enumerate(self._refills[name]))):
            start = max(began, since) if number else since
            refilled += each_ms * max(0, until - start)
            until = min(until, start)
        return refilled

    def _check_try(self, name: str, gate: PauseGate, admitted: int) -> None:
        """A gate lets one call at a time try, until that has ended or is known to have failed."""
        assert admitted == 1, f"{admitted} tries at once of {name}"
        before, self._tried[name] = self._tried.get(name), (gate, gate.rounds, gate.taker)
        same = before is not None and before[0] is gate and before[1] == gate.rounds
        if same and before and before[2] and before[2] != gate.taker:  # which was granted again
            sid, ticket = before[2]
            held = self.model.pool.sessions[sid].held if sid in self.model.pool.sessions else {}
            assert ticket not in held, f"another try of {name} is under way"

    def check_fences(self, sid: str, held: Iterable[Holding]) -> None:
        """No two permits of the pool have the same fence, passed on or not.

        Those of a local share have the sequence 0.
        """
        for holding in held:
            fence = holding.epoch, holding.seq
            if holding.seq:
                assert self._holders.setdefault(fence, (sid, holding.ticket)) == (
                    sid,
                    holding.ticket,
                )
