"""A permit in the hands of a task of its own, for uses that begin and end in different tasks.

A permit is tied to the task that asked for it. A streamed answer is read by whoever has it, and a
thread has no task at all: for them a small task holds the permit until it is told to let go.

Invariants: the permit is given back once, however the use ends; when it is lost or overdue, what it
was for is stopped before it is given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

from tidegate.errors import LeaseLost, ShuttingDown, TidegateError, UpstreamTimeout
from tidegate.limiter.permit import Permit


class Hold:
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
        return f"<Hold {self.permit!r} released={self._released.is_set()}>"

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
