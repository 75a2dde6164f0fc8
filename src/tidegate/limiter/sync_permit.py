"""One permit of a `SyncLimiter`, in the hands of a thread.

Invariant: it is counted until the thread has left, also when it was lost meanwhile: a thread cannot
be cancelled, only told.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING

from tidegate.errors import LeaseLost, ShuttingDown, TidegateError
from tidegate.limiter.hold import Hold
from tidegate.limiter.permit import Outcome, Permit

if TYPE_CHECKING:
    from tidegate.limiter import Tokens
    from tidegate.limiter.threads import SyncLimiter

Acquire = Callable[[], AbstractAsyncContextManager[Permit | None]]


class SyncPermit:
    """A thread's permit. `fence`, `limits` and `waited_ms` are those of `Permit`.

    lost: set when the session behind the permit is gone: end what you do, its result may not count.
    """

    __slots__ = ("_confirm", "_permit", "lost")

    def __init__(
        self, permit: Permit, lost: threading.Event, confirm: Callable[[], object]
    ) -> None:
        self._permit = permit
        self._confirm = confirm
        self.lost = lost

    def __repr__(self) -> str:
        return f"<SyncPermit {self._permit!r}>"

    @property
    def limits(self) -> tuple[str, ...]:
        return self._permit.limits

    @property
    def fence(self) -> tuple[int, int]:
        return self._permit.fence

    @property
    def waited_ms(self) -> float:
        return self._permit.waited_ms

    def confirm(self) -> None:
        """Call this right before what the permit is for. Raises LeaseLost if the lease is over."""
        self._confirm()

    def settle(
        self,
        outcome: Outcome | str = "success",
        tokens: int | Tokens | None = None,
        images: int | None = None,
    ) -> None:
        """Remember how the call ended and what it used, as `Permit.settle`."""
        self._permit.settle(outcome, tokens=tokens, images=images)


class Held:
    """A permit on its way through a thread: `enter` waits for it, `leave` gives it back.

    close: called in a thread of ours when the permit is lost, or overdue (`hard_ms` after its
        grant), or dropped: end the use if nobody is in it, and call `release` then.
    """

    def __init__(
        self,
        limiter: SyncLimiter,
        acquire: Acquire,
        *,
        hard_ms: int | None = None,
        close: Callable[[], object] | None = None,
    ) -> None:
        self._limiter = limiter
        self._acquire = acquire
        self._hard_ms = hard_ms
        self._close = close
        self._hold: Hold | None = None
        self.lost = threading.Event()

    @property
    def failure(self) -> TidegateError | None:
        """Why the permit is no longer good; None while it is."""
        return None if self._hold is None else self._hold.failure

    def enter(self) -> SyncPermit | None:
        """Wait for the permit. An exception that interrupts the waiting gives the ticket back."""
        if self._hold is not None:
            raise RuntimeError("an acquisition can be entered once")
        hold = self._hold = Hold(self._acquire, self._stop, hard_ms=self._hard_ms)
        taking = self._limiter.submit(hold.take)
        try:
            permit = taking.result()
        except concurrent.futures.CancelledError:
            raise ShuttingDown("the limiter is closing") from None
        except BaseException:
            self._limiter.tell(hold.abandon)
            raise
        return None if permit is None else SyncPermit(permit, self.lost, self._confirm)

    def leave(self) -> None:
        """Give the permit back. Raises LeaseLost when it was lost before."""
        if self._hold is None or not self._limiter.ours():
            return
        try:
            self._limiter.submit(self._hold.finish).result()
        except (ShuttingDown, concurrent.futures.CancelledError):
            raise LeaseLost("the limiter was closed while the permit was held") from None

    def release(self) -> None:
        """Give the permit back, soon."""
        if self._hold is not None:
            self._limiter.tell(self._hold.release)

    def drop(self) -> bool:
        """Nobody has the permit any more: have it closed. May be called by the garbage collector.

        False if it has been given back already.
        """
        return self._hold is not None and self._limiter.ours() and self._hold.drop()

    def _confirm(self) -> None:
        assert self._hold is not None
        self._limiter.submit(self._hold.confirm).result()

    async def _stop(self) -> None:
        """On the limiter's loop: tell the thread, and wait until it has let go."""
        assert self._hold is not None
        self.lost.set()
        if self._close is not None:
            await asyncio.to_thread(self._close)
        await self._hold.let_go()


class SyncAcquisition:
    """What `SyncLimiter.acquire` returns: enter it to wait for the permit, leave it to release."""

    __slots__ = ("_held",)

    def __init__(self, limiter: SyncLimiter, acquire: Acquire) -> None:
        self._held = Held(limiter, acquire)

    def __enter__(self) -> SyncPermit:
        permit = self._held.enter()
        assert permit is not None
        return permit

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._held.leave()
        except LeaseLost:
            if kind is None:
                raise


class SyncAttempt:
    """What `SyncLimiter.try_acquire` returns: entering never waits, and may give None."""

    __slots__ = ("_had", "_held")

    def __init__(self, limiter: SyncLimiter, acquire: Acquire) -> None:
        self._held = Held(limiter, acquire)
        self._had = False

    def __enter__(self) -> SyncPermit | None:
        permit = self._held.enter()
        self._had = permit is not None
        return permit

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._had:
            return
        try:
            self._held.leave()
        except LeaseLost:
            if kind is None:
                raise
