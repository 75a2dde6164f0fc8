"""Permit: the right to make one upstream call, tied to a task, or detached in a task of its own.

Invariants: a permit is returned once, without an await, so that no cancellation can come between;
if the session is lost, the task is cancelled and LeaseLost leaves the `async with`, told apart
from other cancellations by `Task.uncancel`; a detached permit stops its use before it is
returned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from tidegate.errors import (
    DeadlineExceeded,
    LeaseLost,
    LimiterUnavailable,
    ShuttingDown,
    TidegateError,
    UpstreamTimeout,
)
from tidegate.limiter.queue import Demand, Holding, Tokens, Waiter, tokens_of
from tidegate.limiter.session import Timer

if TYPE_CHECKING:
    from tidegate.limiter.limiter import Desk

Outcome = Literal["success", "ignored", "dropped"]


async def _over() -> None:
    raise RuntimeError("the permit was given back")


class Permit:
    """One call's permit. `fence` orders permits: (epoch, sequence), higher is younger.

    lost: set when the session behind the permit is gone; the body is being cancelled then.
    waited_ms: from asking to being let in.
    A permit taken from the local share while Valkey is away has no sequence: 0.
    """

    __slots__ = (
        "_ask_again", "_desk", "_holding", "_lost", "images", "outcome", "tokens", "usage_later",
    )  # fmt: skip

    def __init__(
        self, holding: Holding, desk: Desk, ask_again: Callable[[], Awaitable[None]]
    ) -> None:
        self._holding = holding
        self._desk = desk
        self._ask_again = ask_again
        self._lost: asyncio.Event | None = None
        self.outcome: str = "success"
        self.tokens: Tokens | None = None
        self.images: int | None = None
        self.usage_later = False

    @property
    def lost(self) -> asyncio.Event:
        if self._lost is None:
            self._lost = asyncio.Event()
        return self._lost

    @property
    def is_lost(self) -> bool:
        """Whether `lost` is set, without making one: hardly any permit needs it."""
        return self._lost is not None and self._lost.is_set()

    @property
    def limits(self) -> tuple[str, ...]:
        """The limits that it counts under."""
        return self._holding.flow.limits

    @property
    def tenant(self) -> str:
        return self._holding.flow.tenant

    @property
    def fence(self) -> tuple[int, int]:
        return (self._holding.epoch, self._holding.seq)

    @property
    def waited_ms(self) -> float:
        return self._holding.waited_ms

    def lose(self) -> None:
        """The session behind it is gone."""
        self.lost.set()

    async def confirm(self) -> None:
        """Await this right before what the permit is for.

        A process that stood still since it was let in learns here that its lease is over, instead
        of making one more call first: the body is cancelled, and LeaseLost leaves the `async with`.
        Under a rate, one that was let in longer ago than the rate's slack gives that back and asks
        again, so that its call is not counted in a window that it does not belong to; this raises
        what `acquire` raises. Otherwise it costs no round trip.
        """
        self._desk.check_lapse()
        if self.is_lost:
            await asyncio.sleep(0)  # the cancellation arrives here
        while self._desk.is_late(self._holding):
            await self._ask_again()

    def settle(
        self,
        outcome: Outcome | str = "success",
        tokens: int | Tokens | None = None,
        images: int | None = None,
    ) -> None:
        """Remember how the call ended and what it used; the release carries it.

        outcome: `success`, `ignored` (it says nothing of the provider) or `dropped` (throttled or
        failed). tokens, images: actual usage; None if unknown, then the reservation stands.
        """
        self.outcome = str(outcome)
        self.tokens = None if tokens is None else tokens_of(tokens)
        self.images = images

    def usage_follows(self) -> None:
        """The usage will be told by `report_usage` after the permit was given back."""
        self.usage_later = True

    def report_usage(self, tokens: int | Tokens | None = None, images: int | None = None) -> None:
        """Tell the usage of a call whose permit was given back after `usage_follows`."""
        self.tokens = None if tokens is None else tokens_of(tokens)
        self.images = images
        self._desk.report(self._holding, self.tokens, self.images)

    def __repr__(self) -> str:
        names = " ".join(self.limits)
        return f"<Permit {names} fence={self.fence} lost={self.is_lost}>"


class Acquisition:
    """What `Limiter.acquire` returns: enter it to wait for the permit, leave it to release."""

    __slots__ = ("_cancelling", "_demand", "_desk", "_permit", "_task", "_waiter")

    def __init__(self, desk: Desk, demand: Demand) -> None:
        self._desk = desk
        self._demand = demand
        self._permit: Permit | None = None
        self._waiter: Waiter | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0

    @property
    def ticket(self) -> int | None:
        """The number of its ticket, while it waits: for `Limiter.place` and `Limiter.why`."""
        return None if self._waiter is None else self._waiter.ticket

    async def __aenter__(self) -> Permit:
        if self._permit is not None:
            raise RuntimeError("an acquisition can be entered once")
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("acquire needs a task")
        waiter, timer = self._desk.ask(self._demand)
        if timer is None and waiter.future.done():
            holding = waiter.future.result()
        else:
            holding = await self._wait(waiter, timer)
        permit = Permit(holding, self._desk, self._ask_again)
        self._task, self._cancelling, self._permit = task, task.cancelling(), permit
        self._hand_over(holding)
        if self._desk.is_late(holding):
            await self._until_in_time()
        return permit

    def leave(self, error: Exception) -> None:
        """Leave the queue: entering raises `error`. Nothing where it does not wait."""
        waiter = self._waiter
        if waiter is not None and not waiter.future.done():
            waiter.future.set_exception(error)

    async def _wait(self, waiter: Waiter, timer: Timer | None) -> Holding:
        self._waiter = waiter
        try:
            return await waiter.future
        except BaseException:
            self._desk.abandon(waiter)
            raise
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _hand_over(self, holding: Holding) -> None:
        holding.on_fence = self._fence
        if holding.fenced:  # between the grant and our waking up
            self._fence()
        self._desk.admitted(holding)

    async def _until_in_time(self) -> None:
        """Who was let in too long ago, in a process that stood still, asks again."""
        try:
            while self._permit is not None and self._desk.is_late(self._permit._holding):
                await self._ask_again()
        except BaseException:
            permit, self._permit = self._permit, None
            if permit is not None:
                self._desk.release(permit._holding, "ignored", Tokens(), 0, usage_later=False)
            raise

    async def _ask_again(self) -> None:
        """Give the permit back unused, and wait for another one."""
        assert self._permit is not None
        old = self._permit._holding
        self._desk.release(old, "ignored", Tokens(), 0, usage_later=False)
        waited_ms = old.waited_ms
        demand = self._demand
        if demand.deadline_ms is not None:
            left_ms = max(0, demand.deadline_ms - round(waited_ms))
            demand = replace(demand, deadline_ms=left_ms)
        holding = await self._wait(*self._desk.ask(demand))
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
        asked = permit.is_lost
        holding.on_fence = permit.lose
        # A body that ends in the moment its process wakes up from a pause has lost its lease too.
        self._desk.check_lapse()
        self._desk.release(
            holding, permit.outcome, permit.tokens, permit.images, permit.usage_later
        )
        # They hold one another: without this the garbage collector would have to find them.
        holding.on_fence = None
        permit._ask_again = _over
        if not permit.is_lost:
            return
        ours = not asked or task.uncancel() <= self._cancelling
        if kind is None or (ours and asked and issubclass(kind, asyncio.CancelledError)):
            message = f"the session that held a permit of {' '.join(permit.limits)} is gone"
            raise LeaseLost(message) from error


class TryAcquisition:
    """What `Limiter.try_acquire` returns: entering gives the permit, or None without waiting for
    more than the server's answer."""

    __slots__ = ("_acquisition", "_entered")

    def __init__(self, acquisition: Acquisition) -> None:
        self._acquisition = acquisition
        self._entered = False

    async def __aenter__(self) -> Permit | None:
        try:
            permit = await self._acquisition.__aenter__()
        except (DeadlineExceeded, LimiterUnavailable):
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


class DetachedPermit:
    """One permit. `take` waits for it, `release` or `finish` gives it back.

    acquire: makes the acquisition; called on the loop, by `take`.
    stop: awaited when the permit is lost, overdue or dropped, before it is given back. It has to
        end what the permit is for.
    hard_ms: how long after its grant the permit is overdue; None is never.
    failure: why the hold ended by itself, once it did.
    """

    __slots__ = (
        "_acquire",
        "_admitted",
        "_dropped",
        "_hard_ms",
        "_loop",
        "_owner",
        "_released",
        "_stop",
        "failure",
        "permit",
    )

    def __init__(
        self,
        acquire: Callable[[], AbstractAsyncContextManager[Permit | None]],
        stop: Callable[[], Awaitable[None]],
        *,
        hard_ms: int | None = None,
    ) -> None:
        self._acquire = acquire
        self._stop = stop
        self._hard_ms = hard_ms
        self._released = asyncio.Event()
        self._dropped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owner: asyncio.Task[None] | None = None
        self._admitted: asyncio.Future[Permit | None] | None = None
        self.permit: Permit | None = None
        self.failure: TidegateError | None = None

    def __repr__(self) -> str:
        return f"<DetachedPermit {self.permit!r} released={self._released.is_set()}>"

    async def take(self) -> Permit | None:
        """Wait for the permit; None is the answer of an attempt that may not wait.

        Raises what the acquisition raises. Cancellation gives the ticket or the permit back.
        """
        if self._owner is not None:
            raise RuntimeError("a hold can be taken once")
        self._loop = asyncio.get_running_loop()
        self._admitted = self._loop.create_future()
        self._owner = self._loop.create_task(self._own(self._admitted), name="tidegate-hold")
        self._owner.add_done_callback(self._ended)
        try:
            return await self._admitted
        except asyncio.CancelledError:
            self.abandon()
            raise

    async def _own(self, admitted: asyncio.Future[Permit | None]) -> None:
        async with self._acquire() as permit:
            self.permit = permit
            if admitted.done():  # cancelled in the moment of the grant
                return
            admitted.set_result(permit)
            if permit is not None:
                await self._until_released(permit)

    async def _until_released(self, permit: Permit) -> None:
        try:
            async with asyncio.timeout(None if self._hard_ms is None else self._hard_ms / 1000):
                await self._released.wait()
        except TimeoutError:
            message = f"the call was still open {self._hard_ms} ms after it was let in"
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
        """What stopped the use has failed itself, and nobody waits for it."""
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
        """Give the permit back, soon. Repeating it does nothing."""
        self._released.set()

    def abandon(self) -> None:
        """Give back the ticket or the permit: whoever waited is gone."""
        self._released.set()
        if self._owner is not None and self.permit is None:
            self._owner.cancel()

    @property
    def released(self) -> bool:
        """Whether whoever had the permit has let go."""
        return self._released.is_set()

    def drop(self) -> bool:
        """Stop the use, then give the permit back: nobody has it any more. From any thread.

        False if it has been given back already.
        """
        if self._released.is_set() or self._owner is None or self._owner.done():
            return False
        assert self._loop is not None
        if self._loop.is_closed():
            return False
        self._dropped = True
        self._loop.call_soon_threadsafe(self._released.set)
        return True

    async def let_go(self) -> None:
        """Return once the permit may be given back."""
        await self._released.wait()

    async def ended(self) -> None:
        """Return once the permit is given back. Cancellation only ends the waiting."""
        assert self._owner is not None
        await asyncio.wait({self._owner})

    async def finish(self) -> None:
        """Give the permit back. Raises LeaseLost when it was lost before."""
        self.release()
        await self.ended()
        if self.failure is not None:
            raise self.failure
