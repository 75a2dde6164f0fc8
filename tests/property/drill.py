"""Random calls under random limits, on the executable model in virtual time.

After each step no timer may be late. A call that is refused because it is certainly late waits
nevertheless, and must not be admitted before its deadline, whatever the others do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from tests.property.crowd import RUN, Call, Crowd, Process
from tests.property.timers import late_timers
from tidegate.limiter import (
    MAX_LEASE_MS,
    Band,
    Concurrency,
    Limit,
    PoolPolicy,
    Quota,
    Ramp,
    Rate,
)
from tidegate.limiter.simulation import DAY_MS, Barred, SyncReply, read_member

START_MS = 1_000_000
PULSE_MS = MAX_LEASE_MS // 4
USAGE_LATER = 10
MOST_WAITING = 30
NAMES = ("a", "b", "c")
LANES = (("a",), ("a",), ("b",), ("c",), ("c", "a"), ("a", "b"), ("c", "a", "b"))
BANDS = (
    (Band("high"), Band("normal", min_share=0.2), Band("low", min_share=0.1)),
    (Band("high", headroom=0.4), Band("normal", min_share=0.3), Band("low")),
    (Band("only"),),
)
ORDINARY = ["ask"] * 6 + ["end"] * 4 + ["settle", "pass", "pass", "wake", "cancel"]
RARE = ["pause", "close", "open", "resume", "charge", "change", "look"]


@dataclass(frozen=True, slots=True)
class Promise:
    """A call that certainly has no room before `until`, unless calls `ahead` of it leave."""

    limit: str
    until: int
    ahead: int
    flow: str


def random_rate(random: Random) -> Rate:
    """Return a rate of any shape."""
    of_requests = random.random() < 0.3
    window_ms = random.choice([1000, 7777, 10_000, 60_000, 60_000])
    bound = random.choice([3, 20, 60, 60, 20_000] if of_requests else [100, 997, 1000, 1000])
    ramp = Ramp(random.choice([1, 10, 100, 1000]), random.choice([1, bound // 10 + 1, bound // 2]))
    return Rate(
        bound,
        window_ms,
        "requests" if of_requests else "tokens",
        slack_ms=random.choice([0, 0, None, window_ms // 3]),
        shadow=random.random() < 0.1,
        pace_ms=random.choice([None, None, None, 1, window_ms // 10, window_ms]),
        ramp=ramp if random.random() < 0.3 else None,
        shape=random.choice(["window", "window", "bucket"]),
    )


def random_policy(random: Random) -> PoolPolicy:
    quota: Limit = Quota(random.choice([5, 1000]), random.choice(["requests", "tokens"]))
    in_flight: Limit = Concurrency(1000, unit="tokens_in_flight")
    limits: dict[str, int | Limit] = {
        "a": random_rate(random),
        "b": quota if random.random() < 0.3 else random_rate(random),
        "c": random.choice([Concurrency(2), Concurrency(5), in_flight]),
    }
    weights = random.choice([{}, {"u": 3}])
    bands = random.choice(BANDS)
    return PoolPolicy(limits, lease_ms=MAX_LEASE_MS, bands=bands, weights=weights)


def random_amount(random: Random, limit: Limit) -> int:
    """Return what a call takes of a limit, sometimes more than that can ever give."""
    bound = limit.bound
    if isinstance(limit, Concurrency):
        return random.choice([1, 100, 300, 600, bound]) if limit.by_tokens else 1
    if limit.unit == "requests":
        return 1
    parts = [bound // part or 1 for part in (50, 20, 10, 3, 2)]
    return random.choice([0, 1, *parts, bound, bound * 13 // 10])


class Drill(Crowd):
    """See the module. `certain` counts refusals that were certain, `promises` those still open."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.promises: dict[int, Promise] = {}
        self.certain = 0
        self.steps: list[str] = []
        self._barred: list[Barred] = []
        self._lefts: dict[int, int] = {}
        self._owed: list[tuple[Process, Call]] = []
        self._pulsed = START_MS
        policy = random_policy(self.random)
        super().__init__(policy, 3)
        self._flows = [
            (self.random.randint(1, len(policy.bands)), self.random.choice("ttu"), lane)
            for lane in self.random.choices(LANES, k=self.random.randint(1, 4))
        ]
        self._deeds = ORDINARY if self.random.random() < 0.5 else ORDINARY + RARE
        self._watch_refusals()

    def _watch_refusals(self) -> None:
        """Note what the pool refuses for certain, and let it wait."""
        outlooks = self.model.outlooks
        bar = outlooks.refuse_late

        def note(*arguments: Any) -> bool:
            if bar(*arguments):
                self._barred.append(outlooks.barred.pop())
            return False

        outlooks.refuse_late = note  # type: ignore[method-assign,assignment]

    @property
    def in_force(self) -> PoolPolicy:
        return self.model.pool.policy or self.policy

    def play(self, steps: int) -> Drill:
        for _ in range(steps):
            deed = self.random.choice(self._deeds)
            self.steps.append(f"{self.now_ms} {deed}")
            do: Callable[[], None] = getattr(self, f"_{deed}")
            do()
            self._settle_down()
            self._check()
        return self

    def _check(self) -> None:
        late = late_timers(self.model)
        assert not late, "\n".join([*self.steps[-30:], *late])

    # -- messages

    def _say(self, process: Process, **fields: Any) -> SyncReply:
        names = {name for key in fields.get("flows", ()) for name in key.split("|")[2].split(" ")}
        rules = {name: self.in_force.limit(name) for name in names}
        tomorrow = (self.now_ms // DAY_MS + 1) * DAY_MS
        quotas = [name for name, rule in rules.items() if isinstance(rule, Quota)]
        firm = [name for name, rule in rules.items() if _is_firm(rule)]
        if self.random.random() < 0.9:
            fields["resets"] = dict.fromkeys(quotas, tomorrow)
        reply = super()._say(process, firm=sorted(firm), **fields)
        self._note_refusals(process)
        for outlook in reply.outlook:
            flow = fields["flows"][outlook.flow - 1]
            until = self.now_ms + outlook.room_ms
            for call in process.waiting.values() if outlook.firm else ():
                if call.flow == flow and _takes(call, outlook.limit):
                    self._promise(call.ticket, Promise(outlook.limit, until, 0, flow))
        return reply

    def _note_refusals(self, process: Process) -> None:
        for barred in self._barred:
            if not barred.is_estimate:
                self.certain += 1
                call, until = process.waiting[barred.ticket], self.now_ms
                until += min(barred.room_ms, self._lefts[barred.ticket])
                self._promise(barred.ticket, Promise(barred.limit, until, barred.ahead, call.flow))
        self._barred.clear()

    def _promise(self, ticket: int, promise: Promise) -> None:
        before = self.promises.get(ticket)
        if before is None or before.until < promise.until:
            self.promises[ticket] = promise

    def _let_in(self, process: Process, ticket: int) -> None:
        super()._let_in(process, ticket)
        promise = self.promises.pop(ticket, None)
        assert promise is None or self.now_ms >= promise.until, (
            "\n".join(self.steps[-30:]) + f"\nadmitted at {self.now_ms}, in spite of {promise}"
        )

    def _settle_down(self) -> None:
        """Everybody hears and acknowledges what was pushed, and the pool does all that is due."""
        by_sid = {process.sid: process for process in self.processes}
        while self.model.pump.more or self._behind() or self.model.pool.pushed:
            for sid, push in self.model.pool.pushed:
                by_sid[sid].ack = push.sent
                for ticket, _ in push.grants:
                    self._let_in(by_sid[sid], ticket)
            self.model.pool.pushed.clear()
            for process in self._behind() or self.processes[:1]:
                self.compare(process)

    def _behind(self) -> list[Process]:
        """Return the processes that have not acknowledged all that they were sent."""
        sessions = self.model.pool.sessions
        return [one for one in self.processes if one.ack > sessions[one.sid].acked]

    # -- what users and operators do

    def _ask(self) -> None:
        if sum(len(process.waiting) for process in self.processes) >= MOST_WAITING:
            return
        random, process = self.random, self.random.choice(self.processes[:2])
        band, tenant, lane = random.choice(self._flows)
        amounts = [random_amount(random, self._rule(name)) for name in lane]
        left_ms = random.choice([0, 500, 3000, 3000, 20_000, 90_000, -3000, -30_000])
        times, took_ms = random.choice([1, 1, 2, 5]), random.choice([500, 5000, 20_000])
        text = ",".join(map(str, amounts))
        calls = [
            self._new(process, tenant, lane, band, took_ms, text, 1000, 0) for _ in range(times)
        ]
        self._lefts |= {call.ticket: abs(left_ms) for call in calls}
        self.steps[-1] += f" {calls[0]} x{times} within {left_ms}"
        self._say(
            process,
            flows=[calls[0].flow],
            enqueues=[(1, call.member) for call in calls],
            lefts=[left_ms] * times,
        )

    def _rule(self, name: str) -> Limit:
        limit = self.in_force.limit(name)
        assert limit is not None
        return limit

    def _actual(self, call: Call) -> str:
        """Return what a call used: of tokens also more or less than it took."""
        amounts = map(int, call.member.rpartition("|")[2].split(","))
        used = []
        for name, amount in zip(call.flow.split("|")[2].split(" "), amounts, strict=True):
            rule = self._rule(name)
            other = [amount, amount, 0, amount // 2, amount * 2]
            varies = not isinstance(rule, Concurrency) and rule.unit != "requests"
            used.append(self.random.choice(other) if varies else amount)
        return ",".join(map(str, used))

    def _end(self) -> None:
        if not self.running:
            return
        process, call = self.random.choice(self.running)
        self.running.remove((process, call))
        later = self.random.random() < 0.15
        actual = "" if later or self.random.random() < 0.3 else self._actual(call)
        if later:
            self._owed.append((process, call))
        self.steps[-1] += f" {call} used {actual} later {later}"
        outcome = USAGE_LATER if later else 0
        release = (call.ticket, 1, outcome, call.took_ms, actual)
        self._say(process, flows=[call.flow], releases=[release])

    def _settle(self) -> None:
        if self._owed:
            process, call = self._owed.pop(self.random.randrange(len(self._owed)))
            self._say(process, settles=[(call.ticket, self._actual(call))])

    def _cancel(self) -> None:
        calls = [(one, call) for one in self.processes for call in one.waiting.values()]
        if calls:
            process, call = self.random.choice(calls)
            self.steps[-1] += f" {call}"
            self.promises.pop(call.ticket, None)
            self._forget(lambda promise: promise.ahead > 0 and promise.flow == call.flow)
            self.cancel(process, call)

    def _forget(self, broken: Callable[[Promise], bool]) -> None:
        self.promises = {t: one for t, one in self.promises.items() if not broken(one)}

    def _look(self) -> None:
        process = self.random.choice(self.processes[:2])
        flows = list(dict.fromkeys(call.flow for call in process.waiting.values()))[:2]
        self._say(process, flows=flows, looks=list(range(1, len(flows) + 1)), full=True)

    def _pause(self) -> None:
        name, for_ms = self.random.choice(NAMES), self.random.choice([500, 5000, 30_000])
        ramp_ms = self.random.choice([1, 5000, 30_000])
        self.steps[-1] += f" {name} {for_ms} {ramp_ms}"
        self.model.pause(name, for_ms, ramp_ms, "", run=RUN, wall=self.now_ms)

    def _close(self) -> None:
        name, tried = self.random.choice(NAMES), self.random.random() < 0.5
        self.model.close(name, 1000, 8000, "", tried=tried, run=RUN, wall=self.now_ms)

    def _open(self) -> None:
        name = self.random.choice(NAMES)
        self._forget(lambda promise: promise.limit == name)
        self.model.open(name, self.random.choice([1, 10_000]), run=RUN, wall=self.now_ms)

    def _resume(self) -> None:
        name = self.random.choice(NAMES)
        self._forget(lambda promise: promise.limit == name)
        self.model.resume(name, run=RUN, wall=self.now_ms)

    def _charge(self) -> None:
        name, amount = self.random.choice(["a", "b"]), self.random.choice([1, 10, 300])
        evenly = self.random.random() < 0.5
        self.model.charge(name, amount, evenly=evenly, bound=None, run=RUN, wall=self.now_ms)

    def _change(self) -> None:
        policy, name = self.in_force, self.random.choice(["a", "b"])
        before, parts = self._rule(name), self.random.choice([1, 2, 4, 6])
        other = self.random.choice(
            [
                random_rate(self.random),
                replace(before, bound=max(1, before.bound * parts // 3)),
                replace(before, shadow=not before.shadow),
            ]
        )
        self.steps[-1] += f" {name} {other}"
        self.promises.clear()
        limits = {**policy.limits, name: other}
        self.change(replace(policy, limits=limits, revision=policy.revision + 1))

    # -- time

    def _wake(self) -> None:
        timers = self.model.pump.timed.values()
        if timers and min(timers) < self.now_ms + 200_000:
            self._pass_until(min(timers))

    def _pass(self) -> None:
        self._pass_until(self.now_ms + self.random.choice([1, 10, 100, 1000, 5000, 20_000, 70_000]))

    def _pass_until(self, at: int) -> None:
        """Time passes, and processes speak when a timer is due or to keep their sessions."""
        while True:
            timer = min(self.model.pump.timed.values(), default=at + 1)
            moment = min(timer, self._pulsed + PULSE_MS)
            if moment > at:
                break
            self.now_ms = max(self.now_ms, moment)
            if moment < timer:
                self._pulsed = moment
            for process in self.processes[: 1 if moment == timer else None]:
                self.compare(process)
            self._settle_down()
            self._check()
        self.now_ms = max(self.now_ms, at)


def _takes(call: Call, limit: str) -> bool:
    """Return whether a call takes anything of a limit of its lane."""
    position = call.flow.split("|")[2].split(" ").index(limit)
    return read_member(call.member).amount(position) > 0


def _is_firm(limit: Limit | None) -> bool:
    """Return whether a process says of a limit that nothing is returned."""
    if limit is None or isinstance(limit, Concurrency) or limit.unit != "requests":
        return False
    return not (isinstance(limit, Rate) and limit.exact)
