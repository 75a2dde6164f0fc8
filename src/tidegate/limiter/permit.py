"""The right to make one upstream call, tied to the task that asked for it.

Invariants: released once, without an await, so that no cancellation can come between; when the
session behind it is lost the task is cancelled and `LeaseLost` leaves the `async with`, told apart
from a cancellation by anybody else as `asyncio.timeout` does it, by `Task.uncancel`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from tidegate.errors import DeadlineExceeded, LeaseLost, LimiterUnavailable
from tidegate.limiter.clock import Timer
from tidegate.limiter.demand import Demand
from tidegate.limiter.entries import Holding, Waiter
from tidegate.limiter.flow import Tokens, tokens_of

if TYPE_CHECKING:
    from tidegate.limiter.desk import Desk

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


class Attempt:
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
