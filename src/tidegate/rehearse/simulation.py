"""Simulation of a load under a policy: the executable model of the limiter in virtual time.

Nothing is measured or contacted. The product's own sessions and queues drive the same model that
the property tests check the scripts against. A trace can be played several times with each call
moved a little, because the order of simultaneous arrivals decides which of them wait.

Invariants: the same arrivals, policy and setting give the same result; a process sends what the
exchange loop would send, at the same moments.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from heapq import heappop, heappush
from itertools import count, cycle
from math import ceil
from random import Random
from typing import Literal

from tidegate.admission.demand import CallDemand, Demands, ExpectedInput
from tidegate.admission.estimator import Modality
from tidegate.call import Tier, Usage
from tidegate.errors import AdmissionError, DeadlineExceeded, DemandImpossible
from tidegate.limiter import (
    MAX_LEASE_MS,
    CallUse,
    Demand,
    HigherWaits,
    Observer,
    PoolPolicy,
    Snapshot,
    Tokens,
    newest_to_give_way,
)
from tidegate.limiter.simulation import (
    LINGER_HURRIED_S,
    LINGER_IDLE_S,
    LINGER_S,
    MAX_WAITERS,
    Clock,
    Flow,
    Holding,
    Lease,
    LocalQueue,
    PermitIssuer,
    PoolModel,
    Session,
    SyncReply,
    SyncRequest,
    snapshot_of,
)
from tidegate.policy.deployment import Preempt
from tidegate.prices.budgets import Budget
from tidegate.rehearse.budgets import (
    BudgetRefusal,
    Cost,
    RehearsedBudgets,
    RehearsedTiers,
    TierTerms,
    cost_in_trace,
)
from tidegate.rehearse.load import Arrival
from tidegate.rehearse.report import (
    Findings,
    Group,
    GroupSpread,
    LoadCall,
    LoadTally,
    PlayRange,
    findings_of,
)

_PULSE_MS = MAX_LEASE_MS / 3
_TICK_MS = 50.0  # granularity at which a process schedules its reads of a pool for preemption
# A preempted call returns to a queue in PostgreSQL, so it never reuses the permit that it released.
_AGAIN_MS = 100.0
_NOTHING = CallUse(Tokens(), 0, 0, 0)


class _WaitFuture(asyncio.Future[Holding]):
    """The future of a wait; it reports its outcome immediately, since no task awaits it."""

    def __init__(self, process: Process, call: LoadCall) -> None:
        super().__init__(loop=process.stage.loop)
        self._process = process
        self._call = call

    def set_result(self, result: Holding, /) -> None:
        super().set_result(result)
        self._process.admitted(self._call, result)

    def set_exception(self, exception: type[BaseException] | BaseException, /) -> None:
        super().set_exception(exception)
        self.exception()
        assert isinstance(exception, AdmissionError)
        self._process.refused(self._call, exception)


@dataclass(slots=True, eq=False)
class OpenCall:
    """A running call until its timer ends it, with a permit if a limit applies to it."""

    call: LoadCall
    holding: Holding | None
    ends: VirtualTimer

    @property
    def limits(self) -> tuple[str, ...]:
        return () if self.holding is None else self.holding.flow.limits

    def may_give_way(self, limit: str, band: int) -> bool:
        return self.holding is not None and band < self.holding.flow.band and limit in self.limits


class RehearsedWatch:
    """The calls of a process that may give way, oldest first.

    While there are any, it reads the pool as often as the gateway does.
    """

    def __init__(self, process: Process, rule: Preempt) -> None:
        self._process = process
        self._rule = rule
        self._calls: dict[OpenCall, None] = {}
        self._open: dict[LoadCall, OpenCall] = {}
        self._waits = HigherWaits(rule.after_ms)
        self._every_ms = _TICK_MS * max(1, ceil(self._waits.every_ms / _TICK_MS))
        self._due_ms = 0.0
        self._reads = False

    def enter(self, one: OpenCall) -> None:
        """Add a call that has begun, unless it has given way as often as allowed."""
        if one.call.gave_way >= self._rule.times:
            return
        self._calls[one] = None
        self._open[one.call] = one
        if not self._reads:
            self._reads = True
            stage = self._process.stage
            stage.after(max(0.0, self._due_ms - stage.now_ms), self._read)

    def leave(self, call: LoadCall) -> None:
        """Remove a call that has ended, if present."""
        if (one := self._open.pop(call, None)) is not None:
            del self._calls[one]

    def _read(self) -> None:
        if not self._calls:
            self._reads = False
            return
        stage, given = self._process.stage, 0
        self._due_ms = stage.now_ms + self._every_ms
        stage.after(self._every_ms, self._read)
        snapshot = stage.snapshot()
        for queue in self._waits.overdue(snapshot, stage.now_ms):
            one = newest_to_give_way(self._calls, snapshot, queue, stage.policy)
            if one is None or given >= self._waits.MOST_PER_READ:
                continue
            if stage.claim(f"{queue.sid}|{queue.first_ticket}", self._waits.claim_ms):
                self.leave(one.call)
                self._process.give_way(one)
                given += 1


class Process:
    """A simulated gateway process: its local queue, its session and its open calls."""

    def __init__(self, stage: Playback, name: str) -> None:
        self.stage = stage
        self.ready = False
        self._demands = Demands(kinds_optional=stage.setting.kinds_optional)
        self._asking: LoadCall | None = None
        self._busy = False
        self._waking = False
        self._linger: VirtualTimer | None = None
        self._linger_s = LINGER_S
        self._alarms: dict[str, VirtualTimer] = {}
        self.queue = LocalQueue(self._new_future)
        self.session = Session(
            stage.policy,
            self.queue,
            Observer(),
            Lease(stage.policy.lease_ms, lambda: stage.now_ms),
            name=name,
            wake=self._kick,
            alarm=self._alarm,
        )
        self.session.sid = name  # sids break ties: keep them equal in all runs
        self._issuer = PermitIssuer(self.queue, self.session, MAX_WAITERS, Clock(), self._kick)
        self._runs: dict[LoadCall, OpenCall] = {}
        self._waiting_jobs: set[LoadCall] = set()
        self._revisits: dict[LoadCall, VirtualTimer] = {}
        rule = stage.setting.preempt
        self._watch = None if rule is None else RehearsedWatch(self, rule)
        stage.after(_PULSE_MS, self._pulse)

    def ask(self, arrival: Arrival) -> None:
        """Admit or queue an arriving call. The cost of a job is known once its tier is chosen."""
        decided: BudgetRefusal | str = arrival.model
        if not arrival.tiers:
            decided = self.stage.decide(arrival, spends=False)
        made = arrival
        if not isinstance(decided, BudgetRefusal):
            made = self.stage.budgets.as_made(arrival, decided)
        demand = self._demand_of(made)
        call = LoadCall(arrival, made, self.stage.now_ms, demand.limits)
        if arrival.deadline_ms is not None:
            call.due_ms = self.stage.now_ms + arrival.deadline_ms
        self.stage.tally.asked(call)
        if isinstance(decided, BudgetRefusal):
            self.stage.refuse(call, decided)
            return
        call.demand = demand
        self._place(call, demand)

    def _place(self, call: LoadCall, demand: CallDemand) -> None:
        """Queue a call; a job first chooses its tier."""
        arrival, stage = call.initial, self.stage
        if not arrival.tiers:
            self._wait(call, demand)
            return
        limits = map(stage.policy.binding, demand.limits)
        call.tier, revisit_ms = stage.tiers.choose(arrival, limits, call.due_ms)
        if call.tier is Tier.BATCH:
            self._put_in_batch(call)
            return
        if call.tier is Tier.FLEX:
            if wait_ms := stage.tiers.put_off_ms(arrival.model):
                stage.after(wait_ms, lambda: self._place(call, demand))
                return
            if revisit_ms is not None:
                in_ms = max(0.0, revisit_ms - stage.now_ms)
                leaves = stage.after(in_ms, lambda: self._leave_flex(call, demand))
                self._revisits[call] = leaves
        self._waiting_jobs.add(call)
        stage.tiers.wait(arrival.kind, 1)
        self._wait(call, demand)

    def _put_in_batch(self, call: LoadCall) -> None:
        """Move a job to a provider's batch, where none of the configured limits applies."""
        stage, kind = self.stage, call.initial.kind
        if not self._spend(call):
            return
        call.limits = ()
        stage.tally.began(call, stage.now_ms)
        stage.tiers.put(kind, call.due_ms)

        def ended() -> None:
            stage.tiers.take_out(kind, call.due_ms)
            stage.tally.ended(call, stage.now_ms)
            stage.over(call)

        stage.after(call.arrival.duration_ms, ended)

    def _leave_flex(self, call: LoadCall, demand: CallDemand) -> None:
        """Let a job whose deadline approaches, and that flex has not answered, choose again."""
        if (run := self._runs.get(call)) is not None:
            self._lose(run, "given up")
        elif call.waiter is not None:
            self.queue.abandon(call.waiter.ticket, self.stage.now_ms)
            self.stage.tally.left(call, self.stage.now_ms)
            self._kick()
        self._no_longer_waits(call)
        self.stage.after(_AGAIN_MS, lambda: self._place(call, demand))

    def _no_longer_waits(self, call: LoadCall) -> None:
        if call in self._waiting_jobs:
            self._waiting_jobs.remove(call)
            self.stage.tiers.wait(call.initial.kind, -1)

    def _cancel_revisit(self, call: LoadCall) -> None:
        """Cancel the timer by which a job leaves its tier: it has ended or chooses again."""
        if (leaves := self._revisits.pop(call, None)) is not None:
            leaves.cancel()

    def _wait(self, call: LoadCall, demand: CallDemand) -> None:
        """Queue a call for its permit."""
        if not demand.limits:
            self._begin(call, None, demand)
            return
        limiter_demand = Demand(demand.limits, demand.tenant, demand.priority)
        to_admit = demand.to_admit(None, MAX_LEASE_MS)
        try:
            flow = self._issuer.flow_of(limiter_demand)
            call.amounts = flow.amounts(to_admit)
        except DemandImpossible as error:
            self.refused(call, error)
            return
        self._asking = call
        waiter = self.queue.ask(
            flow,
            amounts=call.amounts,
            use=flow.use_of(to_admit),
            hard_ms=MAX_LEASE_MS,
            now_ms=self.stage.now_ms,
            deadline_ms=float("inf") if call.due_ms is None else call.due_ms,
            due=call.due_ms is not None,
            by_estimate=not call.initial.tiers,
        )
        self._asking = None
        if not waiter.future.done():
            call.waiter = waiter
            if call.due_ms is not None:
                left_ms = max(0.0, call.due_ms - self.stage.now_ms)
                self.stage.after(left_ms, lambda: self._expire(call))
        self._kick()

    def admitted(self, call: LoadCall, holding: Holding) -> None:
        """Begin an admitted call."""
        assert call.demand is not None
        self._begin(call, holding, call.demand)

    def refused(self, call: LoadCall, error: AdmissionError) -> None:
        """End a call that was refused."""
        self._no_longer_waits(call)
        self._cancel_revisit(call)
        at = None if call.waiter is None else self._held_up_by(call.waiter.flow)
        self.stage.tally.refused(call, self.stage.now_ms, error.code, at or error.limit)
        self.stage.over(call)

    def _demand_of(self, arrival: Arrival) -> CallDemand:
        demand = self._demands.of_native(
            arrival.model,
            arrival.kind,
            {Modality.LATIN: max(1.0, float(arrival.input_tokens))},
            self.session.policy,
            tenant=arrival.tenant,
            priority=arrival.priority,
            tags=(arrival.key, arrival.subject, arrival.conversation),
            images=arrival.images,
            max_output_tokens=arrival.max_output_tokens,
        )
        use = arrival.use
        if use.tokens is not None and use.tokens.cached:
            # The trace has no predictions of cached input, so assume that they were right.
            cached = use.tokens.cached
            demand.expected = ExpectedInput(use.tokens.input - cached, cached)
        demand.cost_micros = use.cost_micros
        return demand

    def _begin(self, call: LoadCall, holding: Holding | None, demand: CallDemand) -> None:
        stage = self.stage
        self._no_longer_waits(call)
        if call.tier is Tier.FLEX and stage.tiers.lacks_capacity(call.initial.model):
            self._find_flex_busy(call, holding, demand)
            return
        if not self._spend(call):
            self._cancel_revisit(call)
            if holding is not None:
                self._cut(holding, _NOTHING)
            return
        stage.tally.began(call, stage.now_ms)
        took_ms = call.arrival.duration_ms
        if holding is not None:
            took_ms += stage.setting.hold_ms
        ends = stage.after(took_ms, lambda: self._end(call, holding, demand))
        run = self._runs[call] = OpenCall(call, holding, ends)
        if self._watch is not None and holding is not None and call.initial.gives_way:
            self._watch.enter(run)

    def _spend(self, call: LoadCall) -> bool:
        """Return whether the budgets admit a call; a call that begins again keeps its
        reservation.
        """
        budgets, tiers = self.stage.budgets, self.stage.tiers
        if call.made is None:
            arrival = tiers.as_made(call.initial, call.tier)
            decided = self.stage.decide(arrival, spends=True)
            if isinstance(decided, BudgetRefusal):
                self.stage.refuse(call, decided)
                return False
            # Its permits stay those of the model that it requested on arrival.
            call.made = budgets.as_made(call.initial, decided)
        call.arrival = tiers.as_made(call.made, call.tier)
        return True

    def _find_flex_busy(self, call: LoadCall, holding: Holding | None, demand: CallDemand) -> None:
        """Let a job choose again after a pause: flex refused it for lack of capacity."""
        stage = self.stage
        self._cancel_revisit(call)
        stage.tally.began(call, stage.now_ms)
        stage.tally.lost(call, stage.now_ms, _NOTHING, "busy")
        if holding is not None:
            self._cut(holding, _NOTHING)
        wait_ms = stage.tiers.put_off_ms(call.initial.model)
        stage.after(wait_ms, lambda: self._place(call, demand))

    def give_way(self, run: OpenCall) -> None:
        """Cancel a call and queue it again."""
        call, demand = run.call, run.call.demand
        assert demand is not None
        self._cancel_revisit(call)
        self._lose(run, "gave way")
        self.stage.after(_AGAIN_MS, lambda: self._place(call, demand))

    def _lose(self, run: OpenCall, why: Literal["gave way", "given up"]) -> None:
        """Cancel a call; the input that was sent counts as used."""
        call, tokens = run.call, run.call.arrival.use.tokens
        assert tokens is not None
        self._close(call)
        run.ends.cancel()
        cut = CallUse(replace(tokens, output=0), None, None, 0)
        self.stage.tally.lost(call, self.stage.now_ms, cut, why)
        if run.holding is not None:
            self._cut(run.holding, cut)

    def _close(self, call: LoadCall) -> None:
        del self._runs[call]
        if self._watch is not None:
            self._watch.leave(call)

    def _cut(self, holding: Holding, used: CallUse) -> None:
        """Release the permit of a call that has no answer."""
        self.queue.release(
            holding.ticket,
            outcome="ignored",
            actual=holding.flow.actual(used),
            now_ms=self.stage.now_ms,
        )
        self._kick()

    def _end(self, call: LoadCall, holding: Holding | None, demand: CallDemand) -> None:
        arrival, tiers = call.arrival, self.stage.tiers
        self._close(call)
        self._cancel_revisit(call)
        self.stage.tally.ended(call, self.stage.now_ms)
        if holding is not None:
            flow = holding.flow
            self.queue.release(
                holding.ticket,
                outcome="success",
                actual=flow.actual(arrival.use),
                now_ms=self.stage.now_ms,
                use=flow.cost_of(arrival.use),
            )
            self._kick()
        usage = Usage(arrival.input_tokens, arrival.output_tokens)
        self._demands.learn(demand, usage, whole=True)
        if call.tier is not None and call.began_ms is not None and call.ended_ms is not None:
            tiers.ended(arrival, call.tier, call.ended_ms - call.began_ms)
        self.stage.over(call)

    def _expire(self, call: LoadCall) -> None:
        waiter = call.waiter
        if waiter is None or waiter.future.done():
            return
        limit = waiter.flow.limits[0]
        error = DeadlineExceeded("no permit in time", limit=limit, retry_after_ms=1000)
        self.queue.refuse(waiter, error, self.stage.now_ms)
        self._kick()

    def _held_up_by(self, flow: Flow) -> str | None:
        return self.stage.held_up_by(self.session.sid, flow.key)

    def _new_future(self) -> asyncio.Future[Holding]:
        assert self._asking is not None
        return _WaitFuture(self, self._asking)

    def _kick(self) -> None:
        if self._waking:
            return
        if self.session.is_request_urgent():
            self._wake_up()
            return
        delay_s = LINGER_IDLE_S if self.queue.idle else LINGER_S
        if self.queue.hurried:
            delay_s = LINGER_HURRIED_S
        if self._linger is not None:
            if self._linger_s <= delay_s:
                return
            self._linger.cancel()
        self._linger_s = delay_s
        self._linger = self.stage.after(delay_s * 1000, self._go)

    def _go(self) -> None:
        self._linger = None
        self._wake_up()

    def _wake_up(self) -> None:
        self._waking = True
        if not self._busy:
            self._busy = True
            self.stage.after(0.0, self._exchange)

    def _exchange(self) -> None:
        self._waking = False
        session = self.session
        if not session.is_request_due():
            self._busy = False
            return
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        batch, request = session.prepare(*self.stage.run)
        sent_ms = self.stage.now_ms

        def answered(reply: SyncReply) -> None:
            session.answered(batch, request, reply, sent_ms)
            self.ready |= session.accepted
            if self.queue.pending:
                self._kick()
            self._busy = False
            if self._waking:
                self._wake_up()

        tend = not session.is_ordinary(request)
        self.stage.exchange(request, tend=tend, answered=answered)

    def _alarm(self, name: str, in_ms: float) -> None:
        old = self._alarms.get(name)
        if old is not None:
            old.cancel()
        self._alarms[name] = self.stage.after(in_ms + 1, self.session.refresh)

    def _pulse(self) -> None:
        self.session.refresh()
        self.stage.after(_PULSE_MS, self._pulse)


# The rehearsal begins at midnight in Los Angeles, when most day quotas reset.
START_MS = 1_735_718_400_000
_STARTS_AT = datetime.fromtimestamp(START_MS / 1000, UTC)
# The server has been up so long that no earlier session can still hold a permit.
_UPTIME_MS = 10 * MAX_LEASE_MS
_RUN = "rehearsal"
_SETTLES_MS = 1000
_SAMPLES = 480
_MOST_SAMPLES = 4 * _SAMPLES


@dataclass(frozen=True, slots=True)
class Setting:
    """The deployment of a rehearsal: everything that is neither load nor policy.

    processes: calls are distributed among them in turn. round_trip_ms: of one script call.
    hold_ms: how much longer a permit is held than its call is open.
    kinds_optional: the policy need not limit each kind, as in pools of other upstreams.
    starts_at: when the load begins, which decides when budgets reset. cost: the cost of its calls.
    preempt: when calls give way; None: never. tiers: terms of the tiers that jobs may choose.
    """

    processes: int = 2
    round_trip_ms: float = 0.6
    hold_ms: float = 1.0
    kinds_optional: bool = False
    starts_at: datetime = _STARTS_AT
    cost: Cost = cost_in_trace
    preempt: Preempt | None = None
    tiers: TierTerms = field(default_factory=TierTerms)


class VirtualTimer:
    """A callback due at a virtual time; a cancelled one does nothing."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Playback:
    """One play of a trace: the virtual clock, the model of the pool and its processes.

    Times are ms from the start.
    """

    def __init__(
        self, policy: PoolPolicy, setting: Setting, budgets: Sequence[Budget] = ()
    ) -> None:
        self.budgets = RehearsedBudgets(budgets, setting.starts_at, setting.cost)
        self.tiers = RehearsedTiers(setting.tiers, lambda: self.now_ms)
        self.policy = replace(policy, lease_ms=MAX_LEASE_MS)
        self.setting = setting
        self.now_ms = 0.0
        self.tally = LoadTally(self.policy)
        self.model = PoolModel()
        # Futures need a loop, but nothing runs on it.
        self.loop = asyncio.new_event_loop()
        self._due: list[tuple[float, int, VirtualTimer]] = []
        self._numbers = count()
        self._processes: dict[str, Process] = {}
        self._alive = 0
        self._claims: dict[str, float] = {}

    def after(self, in_ms: float, call: Callable[[], None]) -> VirtualTimer:
        """Schedule a callback; those due at the same time run in order of registration."""
        timer = VirtualTimer(call)
        heappush(self._due, (self.now_ms + in_ms, next(self._numbers), timer))
        return timer

    def play(self, arrivals: Sequence[Arrival]) -> LoadTally:
        """Play a trace to the end of its last call."""
        with closing(self.loop):
            self._enter()
            self._alive = len(arrivals)
            self.tally.begin(arrivals[-1].time_ms if arrivals else 0.0)
            self._arrive(arrivals)
            self._sample()
            while self._alive:
                self._step()
        self.tally.end(self.now_ms)
        self.tally.budgets = [*self.budgets.uses.values()]
        return self.tally

    def decide(self, arrival: Arrival, *, spends: bool) -> BudgetRefusal | str:
        """Return the model with which the budgets admit a call now, or their refusal."""
        at_ms = self.now_ms - self.tally.since_ms
        return self.budgets.decide(arrival, at_ms, spends=spends)

    def refuse(self, call: LoadCall, refusal: BudgetRefusal) -> None:
        """End a call that a budget refuses."""
        self.tally.refused(call, self.now_ms, refusal.code, refusal.budget)
        self.over(call)

    def over(self, call: LoadCall) -> None:
        """Note that a call has ended or was refused."""
        self._alive -= 1

    def snapshot(self) -> Snapshot:
        """Return a snapshot of the pool with the queues that calls may give way to."""
        wall_ms = START_MS + int(self.now_ms)
        return snapshot_of(self.model, wall_ms, len(self.policy.bands) - 1)

    def claim(self, name: str, lasts_ms: float) -> bool:
        """Return whether no process has claimed this name within the last `lasts_ms`."""
        is_first = self._claims.get(name, 0.0) <= self.now_ms
        if is_first:
            self._claims = {one: at for one, at in self._claims.items() if at > self.now_ms}
            self._claims[name] = self.now_ms + lasts_ms
        return is_first

    def exchange(
        self, request: SyncRequest, *, tend: bool, answered: Callable[[SyncReply], None]
    ) -> None:
        """Deliver a request to the pool and its reply to the process."""
        half_ms = self.setting.round_trip_ms / 2

        def arrived() -> None:
            wall_ms = START_MS + int(self.now_ms)
            reply = (self.model.tend if tend else self.model.sync)(request, wall_ms)
            for sid, push in self.model.pool.pushed:
                receive = self._processes[sid].session.take_push
                self.after(half_ms, lambda receive=receive, push=push: receive(push))  # type: ignore[misc]
            self.model.pool.pushed.clear()
            self.after(half_ms, lambda: answered(reply))

        self.after(half_ms, arrived)

    @property
    def run(self) -> tuple[str, int]:
        """The run id and uptime that the simulated server reports."""
        return _RUN, _UPTIME_MS + int(self.now_ms)

    def held_up_by(self, sid: str, flow: str) -> str | None:
        """Return the limit that blocks a process's waiters of a flow."""
        session = self.model.pool.sessions.get(sid)
        queue = session.queues.get(flow) if session else None
        return queue.at if queue else None

    def _enter(self) -> None:
        """Let all processes join the pool and learn of each other."""
        for number in range(self.setting.processes):
            process = Process(self, f"process-{number + 1}")
            self._processes[process.session.sid] = process
            self.model.pool.subscribed.add(process.session.sid)
            process.session.refresh()
        while not all(process.ready for process in self._processes.values()):
            self._step()
        self._settle()

    def _settle(self) -> None:
        """Run until the sessions have exchanged all messages, then start the clock."""
        while self._due and self._due[0][0] < self.now_ms + _SETTLES_MS:
            self._step()
        self.tally.since_ms = self.now_ms

    def _step(self) -> None:
        at_ms, _, timer = heappop(self._due)
        if timer.call is not None:
            self.now_ms = at_ms
            timer.call()

    def _arrive(self, arrivals: Sequence[Arrival]) -> None:
        """Schedule one arrival after another, so that the heap contains only one."""
        processes = cycle(self._processes.values())
        coming, began_ms = iter(arrivals), self.now_ms

        def next_one() -> None:
            arrival = next(coming, None)
            if arrival is None:
                return

            def ask() -> None:
                next(processes).ask(arrival)
                next_one()

            self.after(max(0.0, began_ms + arrival.time_ms - self.now_ms), ask)

        next_one()

    def _sample(self) -> None:
        every_ms = max(1.0, self.tally.span_ms / _SAMPLES)

        def take_sample() -> None:
            self.tally.take_sample(self.now_ms, self.model, START_MS + int(self.now_ms))
            # After the load only the last calls end, which may take days under a quota.
            if len(self.tally.samples) < _MOST_SAMPLES:
                self.after(every_ms, take_sample)

        take_sample()


# How far a network and a busy machine move a call between two runs.
LATER_MS = 5.0
LONGER = 0.01


def rehearse(
    name: str,
    arrivals: Sequence[Arrival],
    policy: PoolPolicy,
    setting: Setting,
    *,
    budgets: Sequence[Budget] = (),
    plays: int = 1,
    seed: int = 1,
) -> Findings:
    """Return the findings of a trace under a policy; with several `plays` also their spread.

    The first play uses the trace as it is. Each other play moves its calls at random, by `seed`: up
    to LATER_MS later, and up to the fraction LONGER longer or shorter.
    """
    first = findings_of(name, Playback(policy, setting, budgets).play(arrivals))
    if plays == 1:
        return first
    chance = Random(seed)
    found = [first]
    for _ in range(plays - 1):
        moved = _moved(arrivals, chance)
        found.append(findings_of(name, Playback(policy, setting, budgets).play(moved)))
    return replace(first, plays=plays, spreads=_spreads(found))


def compare(
    arrivals: Sequence[Arrival],
    policies: Mapping[str, PoolPolicy],
    setting: Setting,
    *,
    budgets: Mapping[str, Sequence[Budget]] | None = None,
    preempts: Mapping[str, Preempt | None] | None = None,
    plays: int = 1,
    seed: int = 1,
) -> list[Findings]:
    """Return the findings of the same trace under each policy.

    Each policy is played with the budgets and the preemption rule of its name; other arguments as
    of `rehearse`.
    """
    bound, rules = budgets or {}, preempts or {}
    return [
        rehearse(
            name,
            arrivals,
            policy,
            replace(setting, preempt=rules.get(name, setting.preempt)),
            budgets=bound.get(name, ()),
            plays=plays,
            seed=seed,
        )
        for name, policy in policies.items()
    ]


def _moved(arrivals: Sequence[Arrival], chance: Random) -> list[Arrival]:
    moved = [
        replace(
            arrival,
            time_ms=arrival.time_ms + chance.uniform(0, LATER_MS),
            duration_ms=arrival.duration_ms * chance.uniform(1 - LONGER, 1 + LONGER),
        )
        for arrival in arrivals
    ]
    return sorted(moved, key=lambda arrival: arrival.time_ms)


def _spreads(found: Sequence[Findings]) -> list[GroupSpread]:
    wholes = [Group("", one.calls, one.admitted, 0, one.refused, one.waits) for one in found]
    each = [{group.name: group for group in one.tenants} for one in found]
    return [_spread(wholes), *(_spread([one[name] for one in each]) for name in each[0])]


def _spread(groups: Sequence[Group]) -> GroupSpread:
    def over(figure: Callable[[Group], float | None]) -> PlayRange | None:
        values = [value for group in groups if (value := figure(group)) is not None]
        if len(values) < len(groups):
            return None
        return PlayRange(sum(values) / len(values), min(values), max(values))

    refused = over(lambda group: sum(group.refused.values()))
    assert refused is not None
    return GroupSpread(
        groups[0].name,
        over(lambda group: group.waits.mean_ms),
        over(lambda group: group.waits.p95_ms),
        refused,
    )
