"""One process of a rehearsal: the product's own session and ledger; network and clock are ours.

Invariant: what a process says, and when, is what `limiter.courier` would: one request at a time,
the next batch collecting meanwhile, and what nobody waits for lingering for company.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tidegate.call import Usage
from tidegate.demand import Demand, Demands
from tidegate.demand.pieces import Modality
from tidegate.errors import AdmissionError, DeadlineExceeded, DemandImpossible
from tidegate.limiter import Observer, Tokens
from tidegate.limiter.clock import Clock
from tidegate.limiter.courier import LINGER_IDLE_S, LINGER_S
from tidegate.limiter.demand import Demand as LimiterDemand
from tidegate.limiter.desk import Desk
from tidegate.limiter.entries import Holding
from tidegate.limiter.flow import Flow
from tidegate.limiter.lease import Lease
from tidegate.limiter.ledger import Ledger
from tidegate.limiter.limiter import MAX_WAITERS
from tidegate.limiter.limits import MAX_LEASE_MS
from tidegate.limiter.session import Session
from tidegate.limiter.wire import SyncReply
from tidegate.rehearse.tally import Call

if TYPE_CHECKING:
    from tidegate.rehearse.stage import Stage, Timer
    from tidegate.rehearse.trace import Arrival

_PULSE_MS = MAX_LEASE_MS / 3


class _Told(asyncio.Future[Holding]):
    """The outcome of a wait, told at once: nobody awaits it."""

    def __init__(self, process: Process, call: Call) -> None:
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


class Process:
    """See the module."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.stage = stage
        self.ready = False
        self._demands = Demands(kinds_optional=stage.setting.kinds_optional)
        self._asking: Call | None = None
        self._busy = False
        self._waking = False
        self._linger: Timer | None = None
        self._alarms: dict[str, Timer] = {}
        self.ledger = Ledger(self._new_future)
        self.session = Session(
            stage.policy,
            self.ledger,
            Observer(),
            Lease(stage.policy.lease_ms, lambda: stage.now_ms),
            name=name,
            wake=self._kick,
            alarm=self._alarm,
            settled=self._settled,
        )
        self.session.sid = name  # by which ties are broken: the same in every run
        self._desk = Desk(self.ledger, self.session, Observer(), MAX_WAITERS, Clock())
        stage.after(_PULSE_MS, self._pulse)

    # -- calls

    def ask(self, arrival: Arrival) -> None:
        """A call arrives."""
        demand = self._demand_of(arrival)
        call = Call(arrival, self.stage.now_ms, demand.limits)
        self.stage.tally.asked(call)
        if not demand.limits:  # nothing binds it
            self._begin(call, None, demand)
            return
        wanted = LimiterDemand(demand.limits, demand.tenant, demand.priority)
        try:
            flow = self._desk.flow_of(wanted)
        except DemandImpossible as error:
            self.refused(call, error)
            return
        self._asking, call.demand = call, demand
        waiter = self.ledger.ask(
            flow,
            amounts=flow.amounts(demand.tokens, demand.images),
            hard_ms=MAX_LEASE_MS,
            now_ms=self.stage.now_ms,
            deadline_ms=self.stage.now_ms + arrival.deadline_ms
            if arrival.deadline_ms is not None
            else float("inf"),
        )
        self._asking = None
        if not waiter.future.done():
            call.waiter = waiter
            if arrival.deadline_ms is not None:
                self.stage.after(arrival.deadline_ms, lambda: self._expire(call))
        self.session.kick()

    def admitted(self, call: Call, holding: Holding) -> None:
        """The ledger let a call in."""
        assert call.demand is not None
        self._begin(call, holding, call.demand)

    def refused(self, call: Call, error: AdmissionError) -> None:
        """It ends before it began."""
        at = None if call.waiter is None else self._held_up_by(call.waiter.flow)
        self.stage.tally.refused(call, self.stage.now_ms, error.code, at or error.limit)
        self.stage.over(call)

    def _demand_of(self, arrival: Arrival) -> Demand:
        return self._demands.of_native(
            arrival.model,
            arrival.kind,
            {Modality.LATIN: max(1.0, float(arrival.input_tokens))},
            self.session.policy,
            tenant=arrival.tenant,
            priority=arrival.priority,
            images=arrival.images,
        )

    def _begin(self, call: Call, holding: Holding | None, demand: Demand) -> None:
        self.stage.tally.began(call, self.stage.now_ms)
        took_ms = call.arrival.duration_ms
        if holding is not None:
            took_ms += self.stage.setting.hold_ms
        self.stage.after(took_ms, lambda: self._end(call, holding, demand))

    def _end(self, call: Call, holding: Holding | None, demand: Demand) -> None:
        arrival = call.arrival
        self.stage.tally.ended(call, self.stage.now_ms)
        if holding is not None:
            flow = holding.flow
            used = Tokens(arrival.input_tokens, arrival.output_tokens)
            self.ledger.release(
                holding.ticket,
                outcome="success",
                actual=flow.actual(used, arrival.images),
                now_ms=self.stage.now_ms,
            )
            self.session.kick()
        usage = Usage(arrival.input_tokens, arrival.output_tokens)
        self._demands.learn(demand, usage, whole=True)
        self.stage.over(call)

    def _expire(self, call: Call) -> None:
        waiter = call.waiter
        if waiter is None or waiter.future.done():
            return
        limit = waiter.flow.limits[0]
        error = DeadlineExceeded("no permit in time", limit=limit, retry_after_ms=1000)
        self.ledger.refuse(waiter, error, self.stage.now_ms)
        self.session.kick()

    def _held_up_by(self, flow: Flow) -> str | None:
        return self.stage.held_up_by(self.session.sid, flow.key)

    def _new_future(self) -> asyncio.Future[Holding]:
        assert self._asking is not None
        return _Told(self, self._asking)

    # -- what it says to the pool

    def _kick(self) -> None:
        if self._waking:
            return
        if self.session.something_urgent():
            self._wake_up()
        elif self._linger is None:
            delay_s = LINGER_IDLE_S if self.ledger.idle else LINGER_S
            self._linger = self.stage.after(delay_s * 1000, self._go)

    def _go(self) -> None:
        self._linger = None
        self._wake_up()

    def _wake_up(self) -> None:
        self._waking = True
        if not self._busy:
            self._busy = True
            self.stage.after(0.0, self._speak)

    def _speak(self) -> None:
        self._waking = False
        session = self.session
        if not session.something_to_say():
            self._busy = False
            return
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        batch, request = session.prepare(*self.stage.run)
        sent_ms = self.stage.now_ms

        def answered(reply: SyncReply) -> None:
            session.answered(batch, request, reply, sent_ms)
            if len(self.ledger.outbox):
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

    def _settled(self) -> None:
        self.ready = True
