"""Where tasks ask for permits and give them back: between the limiter's users and its ledger.

Does no I/O. Invariant: whoever asked gets a permit or an error, once; what was let in is given back
without an await.
"""

from __future__ import annotations

import asyncio

from tidegate.errors import (
    AdmissionError,
    DemandImpossible,
    LimiterUnavailable,
    QueueFull,
    ShuttingDown,
)
from tidegate.limiter.clock import Clock, Timer
from tidegate.limiter.demand import Demand
from tidegate.limiter.entries import Holding, Waiter
from tidegate.limiter.flow import Flow, Tokens, unknown_limit
from tidegate.limiter.ledger import Ledger
from tidegate.limiter.limits import DEFAULT_PRIORITY, PoolPolicy, check_tenant
from tidegate.limiter.observer import Observer
from tidegate.limiter.outlook import too_late
from tidegate.limiter.session import Session

_ANY_TIME = float("inf")
# When a caller that a stopping process refused may ask another one.
_RETRY_MS = 1000


class Desk:
    """See the module. `closing` turns everybody away; `idle` is set when nothing is held then."""

    def __init__(
        self,
        ledger: Ledger,
        session: Session,
        observer: Observer,
        max_waiters: int,
        clock: Clock,
        pool: str = "",
    ) -> None:
        self.closing = False
        self._turning_away = False
        self.idle = asyncio.Event()
        self._ledger = ledger
        self._session = session
        self._observer = observer
        self._max_waiters = max_waiters
        self._clock = clock
        self._pool = pool
        self._now_ms = clock.now_ms
        self._wait_ewma_ms: dict[str, float] = {}
        self._bands_of: PoolPolicy | None = None
        self._bands: dict[str, int] = {}
        self._usual_band = 1

    def is_late(self, holding: Holding) -> bool:
        """True for a call that would arrive too late after its admission for its rates."""
        slack_ms = holding.flow.slack_ms
        return slack_ms != _ANY_TIME and self._now_ms() - holding.admitted_ms > slack_ms

    def check_lapse(self) -> None:
        """Act on a lease that has lapsed."""
        self._session.check_lapse()

    def flow_of(self, demand: Demand) -> Flow:
        policy = self._session.policy
        if policy is not self._bands_of:
            self._bands_of = policy
            self._bands = {band.name: number for number, band in enumerate(policy.bands, 1)}
            usual = DEFAULT_PRIORITY if DEFAULT_PRIORITY in self._bands else policy.bands[0].name
            self._usual_band = self._bands[usual]
        band = self._usual_band
        if demand.priority is not None and demand.priority not in self._bands:
            policy.band(demand.priority)
        if demand.priority is not None:
            band = self._bands[demand.priority]
        limits = demand.limits
        if len(limits) != 1:
            if not limits:
                raise ValueError("acquire needs a limit")
            limits = tuple(sorted(set(limits)))
        flow = self._ledger.flow(band, demand.tenant, limits)
        if flow.revision != policy.revision:
            check_tenant(demand.tenant)
            flow.refresh(policy, self._pool)
        if flow.unnamed is not None and not demand.implicit:
            name = flow.unnamed
            raise DemandImpossible(unknown_limit(name, policy, self._pool), limit=name)
        return flow

    def ask(self, demand: Demand) -> tuple[Waiter, Timer | None]:
        if self.closing or self._turning_away:
            raise self._stopping()
        if self._session.fatal is not None:
            raise self._session.fatal
        try:
            flow = self.flow_of(demand)
        except DemandImpossible as error:
            raise self._refused(error) from None
        if len(self._ledger.waiting) >= self._max_waiters:
            limit, retry_ms = flow.held_up_by or flow.limits[0], self._retry_after_ms(flow)
            full = QueueFull("too many waiters already", limit=limit, retry_after_ms=retry_ms)
            raise self._refused(full)
        at = self._now_ms()
        deadline_ms = demand.deadline_ms
        waiter = self._ledger.ask(
            flow,
            amounts=flow.amounts(demand.tokens, demand.images),
            hard_ms=max(1, demand.hard_ms),
            now_ms=at,
            deadline_ms=float("inf") if deadline_ms is None else at + deadline_ms,
            once=demand.once,
        )
        timer = None
        if not waiter.future.done():
            if deadline_ms is not None:
                delay_s = max(0, deadline_ms) / 1000
                timer = self._clock.call_later(delay_s, self._expire, waiter)
            if self._session.away:
                self._session.admit_locally()
        self._session.kick()
        return waiter, timer

    def turn_away(self) -> None:
        """Refuse the calls that wait, and those that ask from now on."""
        self._turning_away = True
        for waiter in list(self._ledger.waiting.values()):
            self._ledger.refuse(waiter, self._stopping(), self._now_ms())
        self._session.kick()

    def _stopping(self) -> ShuttingDown:
        why = "the limiter is closing" if self.closing else "this process is stopping; ask again"
        return ShuttingDown(why, retry_after_ms=_RETRY_MS)

    def _expire(self, waiter: Waiter) -> None:
        """The deadline came."""
        if waiter.future.done():
            return
        flow = waiter.flow
        limit, retry_ms = flow.held_up_by or flow.limits[0], self._retry_after_ms(flow)
        error: AdmissionError
        policy = self._session.policy
        local = policy.when_away == "local" and self._session.has_share(flow.limits)
        if self._session.away and not local:
            error = LimiterUnavailable("Valkey is away", limit=limit, retry_after_ms=retry_ms)
        else:
            room_ms = flow.room_at_ms - self._now_ms()
            amount = flow.spends(waiter.amounts).get(limit, 1)
            error = too_late(limit, policy.limit(limit), retry_ms, room_ms, flow.used, amount)
        self._ledger.refuse(waiter, self._refused(error), self._now_ms())
        self._session.kick()

    def _refused(self, error: AdmissionError) -> AdmissionError:
        self._observer.refused(error.limit, error.code)
        return error

    def _retry_after_ms(self, flow: Flow) -> int:
        """Until there is room under the limit that it waits for; where nobody knows when, about as
        long as waiters of that limit wait these days. At least a second, and not before the end of
        a pause."""
        at = self._now_ms()
        wait_ms = round(flow.room_at_ms - at)
        if wait_ms <= 0:
            wait_ms = int(self._wait_ewma_ms.get(flow.held_up_by or flow.limits[0], 0.0))
        return max(1000, wait_ms, self._session.remembered.paused_ms(flow.limits, at))

    def abandon(self, waiter: Waiter) -> None:
        self._ledger.abandon(waiter.ticket, self._now_ms())
        self._session.kick()
        self.check_idle()

    def admitted(self, holding: Holding) -> None:
        named = self._session.policy.limits
        for name in holding.flow.limits:
            if name in named:  # the others are named by clients
                old = self._wait_ewma_ms.get(name, holding.waited_ms)
                self._wait_ewma_ms[name] = old + (holding.waited_ms - old) / 16
        self._observer.admitted(holding.flow.limits[0], holding.waited_ms)

    def release(
        self,
        holding: Holding,
        outcome: str,
        tokens: Tokens | None,
        images: int | None,
        usage_later: bool,
    ) -> None:
        self._ledger.release(
            holding.ticket,
            outcome=outcome,
            actual=holding.flow.actual(tokens, images),
            now_ms=self._now_ms(),
            usage_later=usage_later,
        )
        if self._session.away:
            self._session.admit_locally()
        self._session.kick()
        self.check_idle()

    def report(self, holding: Holding, tokens: Tokens | None, images: int | None) -> None:
        """The usage of a call whose permit was given back before."""
        self._ledger.settle_later(holding.ticket, holding.flow.actual(tokens, images))
        self._session.kick()

    def check_idle(self) -> None:
        if self.closing and not self._ledger.held:
            self.idle.set()
