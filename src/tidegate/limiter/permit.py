"""Permit: the right to make one upstream call, tied to a task, or detached in a task of its own.

Invariants: a permit is returned once, without an await, so that no cancellation can come between;
if the session is lost, the task is cancelled and LeaseLost leaves the `async with`, which
`Task.uncancel` distinguishes from other cancellations; the use of a detached permit is stopped
before the permit is returned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Set
from contextlib import AbstractAsyncContextManager
from copy import copy
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from types import TracebackType
from typing import Any, Literal, NoReturn

from tidegate.errors import (
    AdmissionError,
    DeadlineExceeded,
    DemandImpossible,
    LeaseLost,
    LimiterUnavailable,
    QueueFull,
    ShuttingDown,
    TidegateError,
    UpstreamTimeout,
)
from tidegate.limiter.flow import Flow, Holding, Waiter
from tidegate.limiter.messages import OUTCOMES, too_late
from tidegate.limiter.policy import (
    DEFAULT_PRIORITY,
    FOR_EVER_MS,
    NOTHING,
    CallUse,
    Concurrency,
    Demand,
    PoolPolicy,
    Tokens,
    call_use,
    concerns,
    unknown_limit,
    whole_ms,
)
from tidegate.limiter.queue import LocalQueue
from tidegate.limiter.session import Clock, Session, Timer

Outcome = Literal["success", "ignored", "dropped"]


_NOT_KNOWN = CallUse()
# When a caller that a stopping process rejected may try another process.
_RETRY_MS = 1000
_NAMED = 'acquire("openai", tenant="acme")'


def _is_time(amount: float) -> bool:
    return type(amount) is int and amount <= FOR_EVER_MS


def _each_once(limits: Iterable[str]) -> tuple[str, ...]:
    """Return the limits without duplicates, sorted. Raises TypeError unless they are names."""
    if isinstance(limits, str):
        raise TypeError(f"the limits of a Demand are a tuple: ({limits!r},)")
    try:
        return tuple(sorted(set(limits)))
    except TypeError:
        raise TypeError(f"a limit is a name, as in {_NAMED}") from None


@dataclass(slots=True, eq=False, repr=False)
class PermitIssuer:
    """Turns demands into waiters of the local queue, and waits into permits or errors.

    closing: every demand is rejected, and `idle` is set once nothing is held. closed: the session
    has ended. loop: the only loop that demands may come from; None before the start. check_lapse:
    reacts to a lapsed lease."""

    _queue: LocalQueue
    _session: Session
    _max_waiters: int
    _clock: Clock
    _wake: Callable[[], None]
    _pool: str = ""
    loop: asyncio.AbstractEventLoop | None = None
    closing: bool = False
    closed: bool = False
    _turning_away: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    wait_ewma_ms: dict[str, float] = field(default_factory=dict)
    _bands_of: PoolPolicy | None = None
    _bands: dict[str | None, int] = field(default_factory=dict)
    check_lapse: Callable[[], bool] = field(init=False)

    def __post_init__(self) -> None:
        self.check_lapse = self._session.check_lapse

    def is_late(self, holding: Holding) -> bool:
        """Return True if a call would arrive too late after its admission for its rates."""
        slack_ms = holding.flow.slack_ms
        return slack_ms != inf and self._clock.now_ms() - holding.admitted_ms > slack_ms

    def flow_of(self, demand: Demand) -> Flow:
        """Return the flow of a demand. Raises DemandImpossible, and ConfigError for an invalid
        priority or tenant."""
        policy = self._session.policy
        if policy is not self._bands_of:
            self._bands_of = policy
            self._bands = {band.name: number for number, band in enumerate(policy.bands, 1)}
            self._bands[None] = self._bands.get(DEFAULT_PRIORITY, 1)
        band = self._bands.get(demand.priority)
        if band is None:
            band = policy.band(str(demand.priority)) + 1
        limits = demand.limits
        if len(limits) != 1:
            if not limits:
                raise ValueError("acquire needs a limit")
            limits = _each_once(limits)
        try:
            flow = self._queue.flows.get((band, demand.tenant, limits))
            if flow is None:
                flow = self._queue.flow(band, demand.tenant, limits)
        except TypeError:
            raise TypeError(f"a limit or a tenant is a name, as in {_NAMED}") from None
        if flow.revision != policy.revision:
            flow.refresh(policy, self._pool)
        if flow.unnamed is not None and not demand.implicit:
            name = flow.unnamed
            raise DemandImpossible(unknown_limit(name, policy, self._pool), limit=name)
        return flow

    def ask(self, demand: Demand) -> tuple[Waiter, Timer | None]:
        """Return a waiter in the local queue, and the timer of its deadline."""
        if self.closing or self._turning_away:
            raise self._stopping()
        if self._session.fatal is not None:
            # A copy: the traceback of one object would grow with each call and keep its frames.
            raise copy(self._session.fatal)
        if asyncio.get_running_loop() is not self.loop:
            raise self._elsewhere()
        try:
            flow = self.flow_of(demand)
        except DemandImpossible as error:
            raise self._refused(error) from None
        if len(self._queue.waiting) >= self._max_waiters:
            limit, retry_ms = flow.held_up_by or flow.limits[0], self._retry_after_ms(flow, "")
            full = QueueFull("the queue is full", limit=limit, retry_after_ms=retry_ms)
            raise self._refused(full)
        deadline_ms, hard_ms = demand.deadline_ms, demand.hard_ms
        if deadline_ms is not None and not _is_time(deadline_ms):
            deadline_ms = whole_ms("deadline_ms", deadline_ms)
        if not _is_time(hard_ms):
            hard_ms = whole_ms("hard_ms", hard_ms)
        at = self._clock.now_ms()
        waiter = self._queue.ask(
            flow,
            amounts=self._amounts(flow, demand) if flow.sized else "",
            use=flow.use_of(demand) if flow.fair_by != "seconds" else 0,
            hard_ms=max(1, hard_ms),
            now_ms=at,
            deadline_ms=inf if deadline_ms is None else at + deadline_ms,
            once=demand.once,
            by_estimate=demand.by_estimate,
            due=deadline_ms is not None and not (demand.once or demand.has_usual_deadline),
        )
        timer = None
        if not waiter.future.done():
            if deadline_ms is not None:
                delay_s = max(0, deadline_ms) / 1000
                timer = self._clock.call_later(delay_s, self._expire, waiter)
            if self._session.state == "away":
                self._session.admit_locally()
        self._wake()
        return waiter, timer

    def _amounts(self, flow: Flow, demand: Demand) -> str:
        try:
            return flow.amounts(demand)
        except DemandImpossible as error:
            raise self._refused(error) from None

    def turn_away(self) -> None:
        """Reject waiting and future calls."""
        self._turning_away = True
        for waiter in list(self._queue.waiting.values()):
            self._queue.refuse(waiter, self._stopping(), self._clock.now_ms())
        self._wake()

    def check_open(self) -> None:
        """Raise LimiterUnavailable after the end, ShuttingDown before the start, and
        RuntimeError on another loop."""
        if self.closed:
            raise LimiterUnavailable("the limiter is closed", limit="", retry_after_ms=_RETRY_MS)
        if asyncio.get_running_loop() is not self.loop:
            raise self._elsewhere()

    def _elsewhere(self) -> Exception:
        """Return the error for a demand that would wait for ever: nothing admits on this loop."""
        if self.loop is None:
            return ShuttingDown("the limiter has not been started")
        return RuntimeError(
            "this Limiter was started on another event loop: make one for each loop and process, "
            "or a SyncLimiter for threads"
        )

    def _stopping(self) -> ShuttingDown:
        why = "the limiter is closing" if self.closing else "this process is stopping; retry"
        return ShuttingDown(why, retry_after_ms=_RETRY_MS)

    def _expire(self, waiter: Waiter) -> None:
        """Refuse a waiter at its deadline."""
        if waiter.future.done():
            return
        flow = waiter.flow
        retry_ms = self._retry_after_ms(flow, waiter.amounts)
        limit = flow.held_up_by or flow.limits[0]
        error: AdmissionError
        session = self._session
        local = session.policy.when_away == "local" and session.has_share(flow.limits)
        if session.state == "away" and not local:
            why = session.last_error or None
            error = LimiterUnavailable(
                "Valkey is unavailable", limit=limit, retry_after_ms=retry_ms, reason=why
            )
        else:
            room_ms = flow.room_at_ms - self._clock.now_ms()
            amount = flow.amount_under(limit, waiter.amounts)
            rule = session.policy.limit(limit)
            is_estimate = not flow.is_room_certain or flow.first_due() is not waiter
            error = too_late(limit, rule, retry_ms, room_ms, flow.used, amount, is_estimate)
        self._queue.refuse(waiter, self._refused(error), self._clock.now_ms())
        self._wake()

    def _refused(self, error: AdmissionError) -> AdmissionError:
        self._session.observer.refused(error.limit, error.code)
        return error

    def _retry_after_ms(self, flow: Flow, amounts: str) -> int:
        """Return the time until there is room under the blocking limit, or if that is unknown,
        about the recent wait for that limit. At least a second, and not before a pause ends."""
        at = self._clock.now_ms()
        wait_ms = round(flow.room_at_ms - at)
        if wait_ms <= 0:
            wait_ms = int(self.wait_ewma_ms.get(flow.held_up_by or flow.limits[0], 0.0))
        limits = [name for name, rule, amount in flow.taken(amounts) if concerns(rule, amount)]
        return max(1000, wait_ms, self._session.remembered.paused_ms(limits, at))

    def abandon(self, waiter: Waiter) -> None:
        """Remove a waiter whose task was cancelled."""
        self._queue.abandon(waiter.ticket, self._clock.now_ms())
        self._wake()
        self.check_idle()

    def admitted(self, holding: Holding) -> None:
        """Update the average waits by limit."""
        named = self._session.policy.limits
        for name in holding.flow.limits:
            if name in named:  # clients choose the names of all others
                old = self.wait_ewma_ms.get(name, holding.waited_ms)
                self.wait_ewma_ms[name] = old + (holding.waited_ms - old) / 16
        self._session.observer.admitted(holding.flow.limits[0], holding.waited_ms)

    def release(
        self,
        holding: Holding,
        outcome: str,
        used: CallUse,
        usage_later: bool,
    ) -> None:
        """Return a permit, or pass it on in this process."""
        flow = holding.flow
        self._queue.release(
            holding.ticket,
            outcome=outcome,
            actual=flow.actual(used) if flow.rates else "",
            now_ms=self._clock.now_ms(),
            usage_later=usage_later,
            use=None if usage_later else flow.cost_of(used),
            first=flow.first_of(used) if flow.by_latency else None,
        )
        if self._session.state == "away":
            self._session.admit_locally()
        self._wake()
        self.check_idle()

    def report(self, holding: Holding, used: CallUse) -> None:
        """Report the usage of a call whose permit was released before."""
        self._queue.settle_later(holding.ticket, holding.flow.actual(used))
        self._wake()

    def check_idle(self) -> None:
        """Set `idle` if the limiter is closing and nothing is held."""
        if self.closing and not self._queue.held:
            self.idle.set()


async def _over() -> None:
    raise RuntimeError("the permit was released")


_INT: Set[type] = frozenset((int,))
_COUNTS = frozenset((int, type(None)))


def _use_of(
    tokens: int | Tokens | None,
    images: int | None,
    audio_seconds: int | None,
    cost_micros: int | None,
    first_ms: float | None = None,
) -> CallUse:
    """Return the usage as `call_use` does, without its checks where the types need none."""
    counted = Tokens(tokens) if type(tokens) is int else tokens
    if counted is None or type(counted) is Tokens:
        of, parts = counted, _INT
        if of is not None:
            parts = {type(of.input), type(of.output), type(of.cached), type(of.cache_write)}
        others = {type(images), type(audio_seconds), type(cost_micros)}
        if parts == _INT and others <= _COUNTS and (first_ms is None or isfinite(first_ms)):
            return CallUse(counted, images, audio_seconds, cost_micros, first_ms)
    return call_use(tokens, images, audio_seconds, cost_micros, first_ms)


@dataclass(slots=True, eq=False, repr=False)
class Permit:
    """One call's permit. `fence` orders permits: (epoch, sequence), higher is younger.

    lost: set once the session behind the permit is gone, while the body is being cancelled.
    waited_ms: from the demand to the admission.
    A permit taken from the local share while Valkey is unavailable has sequence 0."""

    _holding: Holding
    _issuer: PermitIssuer
    _acquire_again: Callable[[], Awaitable[None]]
    _lost: asyncio.Event | None = None
    outcome: str = "success"
    used: CallUse = _NOT_KNOWN
    usage_later: bool = False

    @property
    def lost(self) -> asyncio.Event:
        if self._lost is None:
            self._lost = asyncio.Event()
        return self._lost

    @property
    def is_lost(self) -> bool:
        """Whether `lost` is set. Creates no Event, which few permits need."""
        return self._lost is not None and self._lost.is_set()

    @property
    def limits(self) -> tuple[str, ...]:
        """The limits that it counts under."""
        return self._holding.flow.limits

    @property
    def in_flight(self) -> Mapping[str, int]:
        """What it takes of each of its concurrency limits."""
        taken = self._holding.flow.taken(self._holding.amounts)
        return {name: amount for name, limit, amount in taken if isinstance(limit, Concurrency)}

    @property
    def adapts_by_latency(self) -> bool:
        """Whether any of its limits adapts by the time to the first token."""
        return self._holding.flow.by_latency

    @property
    def tenant(self) -> str:
        return self._holding.flow.tenant

    @property
    def band(self) -> int:
        """The number of its band, from 1, the highest."""
        return self._holding.flow.band

    @property
    def fence(self) -> tuple[int, int]:
        return (self._holding.epoch, self._holding.seq)

    @property
    def waited_ms(self) -> float:
        return self._holding.waited_ms

    def lose(self) -> None:
        """Note that the session behind the permit is gone."""
        self.lost.set()

    async def confirm(self) -> None:
        """Await this right before what the permit is for.

        In a process that was suspended since the admission and whose lease is over, this prevents
        one more call: the body is cancelled, and LeaseLost leaves the `async with`. Under a rate, a
        permit admitted longer ago than the rate's slack is returned and requested again, so that
        its call does not count in a window to which it does not belong; this raises what `acquire`
        raises. Otherwise it costs no round trip."""
        self._issuer.check_lapse()
        if self.is_lost:
            await asyncio.sleep(0)  # the cancellation arrives here
        while self._issuer.is_late(self._holding):
            await self._acquire_again()

    def settle(
        self,
        outcome: Outcome | str = "success",
        tokens: int | Tokens | None = None,
        images: int | None = None,
        *,
        audio_seconds: int | None = None,
        cost_micros: int | None = None,
        first_ms: float | None = None,
    ) -> None:
        """Record how the call ended and what it used; the release sends it.

        outcome: `success`, `ignored` (says nothing about the provider) or `dropped` (throttled or
        failed). first_ms: from the call's start to the first token of its answer, for limits that
        adapt by it. The others are actual usage; None if unknown, which keeps the reservation.
        Raises ValueError for another outcome and TypeError for usage that is not whole; the earlier
        settlement is then kept."""
        if outcome not in OUTCOMES:
            raise ValueError(f"an outcome is one of {', '.join(OUTCOMES)}, not {outcome!r}")
        self.used = _use_of(tokens, images, audio_seconds, cost_micros, first_ms)
        self.outcome = str(outcome)

    def settle_unused(self) -> None:
        """Record that no call was made."""
        self.outcome, self.used = "ignored", NOTHING

    def usage_follows(self) -> None:
        """Announce that `report_usage` follows after the release."""
        self.usage_later = True

    def hand_over(self) -> None:
        """Return the permit before its call has ended, because `Limiter.hold` counts the call
        from now on. Its reservations of rates remain. No waiter of this process gets it."""
        self._holding.fenced = True
        self._issuer.release(self._holding, "ignored", _NOT_KNOWN, usage_later=False)

    def report_usage(
        self,
        tokens: int | Tokens | None = None,
        images: int | None = None,
        *,
        audio_seconds: int | None = None,
        cost_micros: int | None = None,
    ) -> None:
        """Send the usage of a call whose permit was released after `usage_follows`."""
        self.used = _use_of(tokens, images, audio_seconds, cost_micros)
        self._issuer.report(self._holding, self.used)

    def __repr__(self) -> str:
        names = " ".join(self.limits)
        return f"<Permit {names} fence={self.fence} lost={self.is_lost}>"


def misused(instead: str) -> NoReturn:
    """Raise TypeError: a permit needs a block, at whose end it is released."""
    raise TypeError(f"use {instead}")


_INSTEAD = "`async with limiter.acquire(...) as permit:`"
_TRY_INSTEAD = "`async with limiter.try_acquire(...) as permit:`"


@dataclass(slots=True, eq=False, repr=False)
class Acquisition:
    """The result of `Limiter.acquire`: enter it to wait for the permit, leave it to release.

    _confirms: whether entering confirms the permit, for a call that follows immediately."""

    _issuer: PermitIssuer
    _demand: Demand
    _confirms: bool = False
    _permit: Permit | None = None
    _waiter: Waiter | None = None
    _task: asyncio.Task[object] | None = None
    _cancelling: int = 0

    @property
    def ticket(self) -> int | None:
        """The number of its ticket while it waits, for `Limiter.place` and `Limiter.why`."""
        return None if self._waiter is None else self._waiter.ticket

    async def __aenter__(self) -> Permit:
        if self._permit is not None or self._waiter is not None:
            raise RuntimeError("an acquisition can be entered once: call acquire for each block")
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("acquire needs a task")
        waiter, timer = self._issuer.ask(self._demand)
        if timer is None and waiter.future.done():
            holding = waiter.future.result()
        else:
            holding = await self._wait(waiter, timer)
        permit = Permit(holding, self._issuer, self._acquire_again)
        self._task, self._cancelling, self._permit = task, task.cancelling(), permit
        self._hand_over(holding)
        if self._confirms:
            self._issuer.check_lapse()
        if self._issuer.is_late(holding):
            await self._until_in_time()
        if self._confirms and permit.is_lost:
            await self._end_lost()
        return permit

    async def _end_lost(self) -> None:
        """Take the cancellation of a permit that was lost before its block began."""
        try:
            await asyncio.sleep(0)
        except BaseException as error:  # otherwise the permit would stay held
            await self.__aexit__(type(error), error, error.__traceback__)
            raise

    def __await__(self) -> Generator[Any, None, NoReturn]:
        misused(_INSTEAD)

    def __enter__(self) -> NoReturn:
        misused(f"{_INSTEAD}, or a SyncLimiter in threads")

    def __exit__(self, *_: object) -> None:
        """Never reached: without it Python would not call `__enter__`."""

    def leave(self, error: Exception) -> None:
        """Leave the queue with `error`, which entering raises. No effect if it does not wait."""
        waiter = self._waiter
        if waiter is not None and not waiter.future.done():
            waiter.future.set_exception(error)

    async def _wait(self, waiter: Waiter, timer: Timer | None) -> Holding:
        self._waiter = waiter
        try:
            return await waiter.future
        except BaseException:  # on cancellation too, remove the ticket or return its permit
            self._issuer.abandon(waiter)
            raise
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _hand_over(self, holding: Holding) -> None:
        holding.on_fence = self._fence
        if holding.fenced:  # between the grant and the wake-up of the task
            self._fence()
        self._issuer.admitted(holding)

    async def _until_in_time(self) -> None:
        """Request the permit again after a suspension since its admission."""
        try:
            while self._permit is not None and self._issuer.is_late(self._permit._holding):
                await self._acquire_again()
        except BaseException:  # on cancellation too, the permit would stay held
            permit, self._permit = self._permit, None
            if permit is not None:
                self._issuer.release(permit._holding, "ignored", NOTHING, usage_later=False)
            raise

    async def _acquire_again(self) -> None:
        """Return the permit unused, and wait for another one."""
        assert self._permit is not None
        old = self._permit._holding
        self._issuer.release(old, "ignored", NOTHING, usage_later=False)
        waited_ms = old.waited_ms
        demand = self._demand
        if demand.deadline_ms is not None:
            left_ms = max(0, demand.deadline_ms - round(waited_ms))
            demand = replace(demand, deadline_ms=left_ms)
        holding = await self._wait(*self._issuer.ask(demand))
        holding.waited_ms += waited_ms
        self._permit._holding = holding
        self._hand_over(holding)

    def _fence(self) -> None:
        assert self._permit is not None
        assert self._task is not None
        self._permit.lose()
        self._task.cancel("the limiter's session was lost")

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        permit, task = self._permit, self._task
        assert permit is not None
        assert task is not None
        holding = permit._holding
        was_lost = permit.is_lost
        holding.on_fence = permit.lose
        # A body that ends just as its process resumes from a suspension has lost its lease too.
        self._issuer.check_lapse()
        self._issuer.release(holding, permit.outcome, permit.used, permit.usage_later)
        # Break the reference cycle, so that no garbage collection is needed.
        holding.on_fence = None
        permit._acquire_again = _over
        if not permit.is_lost:
            return
        is_own = not was_lost or task.uncancel() <= self._cancelling
        if kind is None or (is_own and was_lost and issubclass(kind, asyncio.CancelledError)):
            message = f"the session that held a permit of {' '.join(permit.limits)} is gone"
            raise LeaseLost(message) from error


@dataclass(slots=True, eq=False, repr=False)
class TryAcquisition:
    """The result of `Limiter.try_acquire`: entering returns the permit, or None, and waits only for
    the server's answer."""

    _acquisition: Acquisition
    _entered: bool = False

    def __await__(self) -> Generator[Any, None, NoReturn]:
        misused(_TRY_INSTEAD)

    def __enter__(self) -> NoReturn:
        misused(f"{_TRY_INSTEAD}, or a SyncLimiter in threads")

    def __exit__(self, *_: object) -> None:
        """Never reached: without it Python would not call `__enter__`."""

    async def __aenter__(self) -> Permit | None:
        try:
            permit = await self._acquisition.__aenter__()
        except (DeadlineExceeded, LimiterUnavailable, QueueFull):
            return None
        self._entered = True
        return permit

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._entered:
            await self._acquisition.__aexit__(kind, error, traceback)


@dataclass(slots=True, eq=False, repr=False)
class DetachedPermit:
    """One permit in a task of its own: `take` waits for it, `release` or `finish` returns it.

    _acquire: creates the acquisition; called on the loop, by `take`.
    _stop: awaited before the return of a permit that is lost, overdue or dropped. It must end
        what the permit is used for.
    hard_ms: how long after its grant the permit is overdue; None is never.
    failure: the reason, if the permit ended by itself."""

    _acquire: Callable[[], AbstractAsyncContextManager[Permit | None]]
    _stop: Callable[[], Awaitable[None]]
    hard_ms: int | None = None
    permit: Permit | None = None
    failure: TidegateError | None = None
    _released: asyncio.Event = field(default_factory=asyncio.Event)
    _dropped: bool = False
    _loop: asyncio.AbstractEventLoop | None = None
    _owner: asyncio.Task[None] | None = None
    _admitted: asyncio.Future[Permit | None] | None = None

    def __repr__(self) -> str:
        return f"<DetachedPermit {self.permit!r} released={self._released.is_set()}>"

    async def take(self) -> Permit | None:
        """Wait for the permit; return None if the acquisition may not wait.

        Raises what the acquisition raises. Cancellation returns the ticket or the permit."""
        if self._owner is not None:
            raise RuntimeError("a detached permit can be taken once")
        self._loop = asyncio.get_running_loop()
        self._admitted = self._loop.create_future()
        self._owner = self._loop.create_task(self._own(self._admitted), name="tidegate-permit")
        self._owner.add_done_callback(self._ended)
        try:
            return await self._admitted
        except asyncio.CancelledError:
            self.abandon()
            raise

    async def _own(self, admitted: asyncio.Future[Permit | None]) -> None:
        async with self._acquire() as permit:
            self.permit = permit
            if admitted.done():  # cancelled at the moment of the grant
                return
            admitted.set_result(permit)
            if permit is not None:
                await self._until_released(permit)

    async def _until_released(self, permit: Permit) -> None:
        try:
            async with asyncio.timeout(None if self.hard_ms is None else self.hard_ms / 1000):
                await self._released.wait()
        except TimeoutError:
            message = f"the call was still open {self.hard_ms} ms after its admission"
            self.failure = UpstreamTimeout(message, phase="total")
            await self._stop()
        except asyncio.CancelledError:
            if permit.lost.is_set():
                self.failure = LeaseLost(f"the session that held {permit!r} is gone")
            else:
                self.failure = ShuttingDown("the event loop of the limiter is ending")
            await self._stop()
            raise
        if self._dropped:
            await self._stop()

    def _ended(self, owner: asyncio.Task[None]) -> None:
        error = None if owner.cancelled() else owner.exception()
        if isinstance(error, TidegateError):
            self.failure = error
        if self._admitted is None or self._admitted.done():
            if error is not None and not isinstance(error, TidegateError):
                self._complain(error)
        elif error is not None:
            self._admitted.set_exception(error)
        else:
            self._admitted.cancel()

    def _complain(self, error: BaseException) -> None:
        """Report a failure of `_stop` itself, for which no caller waits."""
        assert self._loop is not None
        context = {"message": "tidegate: a call could not be stopped", "exception": error}
        self._loop.call_exception_handler(context)

    async def confirm(self) -> None:
        """Await this right before what the permit is for. Raises LeaseLost if the lease is over."""
        assert self.permit is not None
        await self.permit.confirm()
        if self.permit.lost.is_set():
            raise LeaseLost(f"the session that held {self.permit!r} is gone")

    def release(self) -> None:
        """Return the permit soon. Repeated calls have no effect."""
        self._released.set()

    def abandon(self) -> None:
        """Return the ticket or the permit: the waiting caller is gone."""
        self._released.set()
        if self._owner is not None and self.permit is None:
            self._owner.cancel()

    @property
    def released(self) -> bool:
        """Whether the user of the permit has released it."""
        return self._released.is_set()

    def drop(self) -> bool:
        """Stop the use, then return the permit, which has no user any more. Callable from any
        thread.

        Returns False if it has been released already."""
        if self._released.is_set() or self._owner is None or self._owner.done():
            return False
        assert self._loop is not None
        if self._loop.is_closed():
            return False
        self._dropped = True
        self._loop.call_soon_threadsafe(self._released.set)
        return True

    async def let_go(self) -> None:
        """Return once the permit may be released."""
        await self._released.wait()

    async def ended(self) -> None:
        """Return once the permit is back in the pool. Cancellation only ends the wait."""
        assert self._owner is not None
        await asyncio.wait({self._owner})

    async def finish(self) -> None:
        """Return the permit. Raises LeaseLost if it was lost before."""
        self.release()
        await self.ended()
        if self.failure is not None:
            raise self.failure
