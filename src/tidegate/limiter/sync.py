"""SyncLimiter: the limiter for threads, on an event loop in a thread of its own.

Invariants: a permit counts until its thread leaves the `with`, even if it was lost, because a
thread cannot be cancelled; nothing is submitted to a closed loop; a forked process never uses its
parent's connections.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, NoReturn, ParamSpec, Self, TypeVar, Unpack, cast

from tidegate.errors import LeaseLost, ShuttingDown, TidegateError
from tidegate.limiter.limiter import (
    RAMP_MS,
    AcquireOptions,
    AttemptOptions,
    Limiter,
    LimiterOptions,
    check_names,
)
from tidegate.limiter.permit import DetachedPermit, Outcome, Permit, misused
from tidegate.limiter.policy import FOR_EVER_MS, Demand, Tokens, whole_ms
from tidegate.limiter.views import LocalState, Snapshot

Acquire = Callable[[], AbstractAsyncContextManager[Permit | None]]
PermitT = TypeVar("PermitT", bound="SyncPermit | None")


class SyncPermit:
    """A thread's permit. `fence`, `limits` and `waited_ms` are those of `Permit`.

    lost: set once the session behind the permit is gone; the result of further work may not count.
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
        *,
        audio_seconds: int | None = None,
        cost_micros: int | None = None,
        first_ms: float | None = None,
    ) -> None:
        """Record how the call ended and what it used, as `Permit.settle`."""
        self._permit.settle(
            outcome,
            tokens,
            images,
            audio_seconds=audio_seconds,
            cost_micros=cost_micros,
            first_ms=first_ms,
        )


class ThreadPermit:
    """A permit for use by a thread: `enter` waits for it, `leave` returns it.

    close: called in a thread of the limiter if the permit is lost, overdue (`hard_ms` after its
        grant) or dropped. It must end the use if no thread is in it, and then call `release`.
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
        self._hold: DetachedPermit | None = None
        self._entered = threading.Lock()  # never released
        self.lost = threading.Event()

    @property
    def failure(self) -> TidegateError | None:
        """Why the permit is no longer valid; None while it is."""
        return None if self._hold is None else self._hold.failure

    def enter(self) -> SyncPermit | None:
        """Wait for the permit. An exception that interrupts the wait returns the ticket."""
        if not self._entered.acquire(blocking=False):
            raise RuntimeError("an acquisition can be entered once: call acquire for each block")
        hold = self._hold = DetachedPermit(self._acquire, self._stop, hard_ms=self._hard_ms)
        try:
            permit = self._limiter.ask(hold.take)
        except BaseException:  # on an interrupt too, return the ticket
            self._limiter.tell(hold.abandon)
            raise
        return None if permit is None else SyncPermit(permit, self.lost, self._confirm)

    def leave(self) -> None:
        """Return the permit. Raises LeaseLost if it was lost before.

        A suspended generator leaves where Python collects it: on the limiter's thread it does not
        wait, and at the end of the program the lease returns the permit.
        """
        if self._hold is None or not self._limiter.is_own_process() or sys.is_finalizing():
            return
        if self._limiter.is_own_thread():
            self.release()
            return
        try:
            self._limiter.ask(self._hold.finish)
        except ShuttingDown:
            raise LeaseLost("the limiter was closed while the permit was held") from None

    def release(self) -> None:
        """Return the permit soon."""
        if self._hold is not None:
            self._limiter.tell(self._hold.release)

    def drop(self) -> bool:
        """Close a permit without a user; callable by the garbage collector.

        Returns False if it has been returned already.
        """
        return self._hold is not None and self._limiter.is_own_process() and self._hold.drop()

    def _confirm(self) -> None:
        assert self._hold is not None
        self._limiter.ask(self._hold.confirm)

    async def _stop(self) -> None:
        """On the limiter's loop: set `lost`, close, and wait until the thread has released it."""
        assert self._hold is not None
        self.lost.set()
        if self._close is not None:
            await asyncio.to_thread(self._close)
        await self._hold.let_go()


class SyncAcquisition(Generic[PermitT]):
    """The result of `SyncLimiter.acquire` and `try_acquire`: enter it to wait for the permit.

    Leaving releases the permit. Entering a try never waits, and may return None.
    """

    __slots__ = ("_held", "_permit")

    def __init__(self, limiter: SyncLimiter, acquire: Acquire) -> None:
        self._held = ThreadPermit(limiter, acquire)
        self._permit: SyncPermit | None = None

    def __enter__(self) -> PermitT:
        permit = self._held.enter()
        if permit is not None:
            try:
                permit.confirm()
            except BaseException:  # on an interrupt too, the permit would stay held
                self._held.release()
                raise
        self._permit = permit
        return cast(PermitT, permit)

    async def __aenter__(self) -> NoReturn:
        misused("`with` on a SyncLimiter, in a thread; in coroutines a Limiter")

    async def __aexit__(self, *_: object) -> None:
        """Never reached: without it Python would not call `__aenter__`."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._permit is None:
            return
        try:
            self._held.leave()
        except LeaseLost:
            if kind is None:
                raise


P = ParamSpec("P")
R = TypeVar("R")


class SyncLimiter:
    """Permits of one pool for the threads of this process. Enter it, or call `start` and `close`.

    Any number of threads may use it concurrently. Create one in each process: after a `fork` the
    child has neither the thread nor the connections, and every use of it there raises RuntimeError.
    """

    def __init__(self, url: str, **options: Unpack[LimiterOptions]) -> None:
        """As `Limiter`. The methods of `observer` are called on the limiter's own thread."""
        self._limiter = Limiter(url, **options)
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="tidegate-limiter", daemon=True)
        # Reentrant, since a finalizer may submit during a submission.
        self._gate = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._grace_ms = 0
        self._closing = False
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._ended = threading.Event()

    @classmethod
    def from_url(cls, url: str, **options: Unpack[LimiterOptions]) -> Self:
        """Return a limiter of `pool` at `url`, as `Limiter.from_url`."""
        return cls(url, **options)

    def __repr__(self) -> str:
        return f"<SyncLimiter {self._limiter!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SyncLimiter can't be copied or pickled: make one in each process")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> NoReturn:
        misused("`with` on a SyncLimiter; in coroutines a Limiter")

    async def __aexit__(self, *_: object) -> None:
        """Never reached: without it Python would not call `__aenter__`."""

    def start(self) -> None:
        """Start the thread and join the pool.

        Raises ConfigError as `Limiter.start`; RuntimeError if it was started or closed before.
        """
        self._check_process()
        if self._closing or self._thread.ident is not None:
            raise RuntimeError("a SyncLimiter is opened once: make another one")
        self._thread.start()
        try:
            self._started.result()
        except BaseException:  # on an interrupt too, end the thread
            self.close()
            raise

    def close(self, grace_ms: int = 0) -> None:
        """End the session and join the thread, as `Limiter.aclose`.

        Waiting threads get ShuttingDown. Threads with a permit may leave within `grace_ms`; then
        `permit.lost` is set, they have one more second, and leaving raises LeaseLost. On the
        limiter's own thread this returns before the end. In a forked process, whose session is its
        parent's, and while the interpreter exits, it does nothing.
        """
        grace_ms = whole_ms("grace_ms", grace_ms)
        if not self.is_own_process() or sys.is_finalizing():
            return
        with self._gate:
            self._closing, self._grace_ms = True, grace_ms
            if self._stop is not None:
                self.tell(self._stop.set)
        if self._thread.is_alive() and not self.is_own_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            # A failed start is raised to its caller; later errors are raised in this thread.
            if self._started.done():
                raise
            self._started.set_exception(error)
        finally:
            self._ended.set()

    async def _serve(self) -> None:
        stop = asyncio.Event()
        with self._gate:
            self._loop, self._stop = asyncio.get_running_loop(), stop
            if self._closing:  # closed before the loop was open
                stop.set()
        try:
            await self._limiter.start()
            self._started.set_result(None)
            await stop.wait()
            await self._limiter.aclose(self._grace_ms)
        finally:
            with self._gate:
                self._ended.set()
            # Earlier submissions become tasks now, which `asyncio.run` ends.
            await asyncio.sleep(0)

    def is_own_process(self) -> bool:
        """Return False in a process that was forked from the one that created this."""
        return os.getpid() == self._pid

    def is_own_thread(self) -> bool:
        """Return True on the thread of this limiter, which must not wait for itself."""
        return threading.get_ident() == self._thread.ident

    def _check_process(self) -> None:
        if not self.is_own_process():
            raise RuntimeError("this SyncLimiter belongs to the process that was forked: make one")

    def submit(self, make: Callable[[], Coroutine[Any, Any, R]]) -> concurrent.futures.Future[R]:
        """Run a coroutine on the limiter's loop. Raises ShuttingDown if the loop has ended."""
        self._check_process()
        with self._gate:
            if self._loop is None or self._ended.is_set():
                raise ShuttingDown("the limiter has not been started, or is closed")
            return asyncio.run_coroutine_threadsafe(make(), self._loop)

    def ask(self, make: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """Run a coroutine on the limiter's loop and return its result.

        Raises ShuttingDown if the loop has ended, or ends in the meantime; RuntimeError on the
        limiter's own thread, such as in an observer.
        """
        if sys.is_finalizing():
            raise ShuttingDown("the interpreter exits")
        if self.is_own_thread():
            raise RuntimeError("a SyncLimiter cannot be waited for on its own thread")
        future = self.submit(make)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ShuttingDown("the limiter is closing") from None

    def tell(self, call: Callable[[], object]) -> None:
        """Call on the limiter's loop; does nothing if the loop has ended."""
        if not self.is_own_process():
            return
        with self._gate:
            if self._loop is not None and not self._ended.is_set():
                self._loop.call_soon_threadsafe(call)

    # -- permits

    def acquire(
        self, *limits: str, **options: Unpack[AcquireOptions]
    ) -> SyncAcquisition[SyncPermit]:
        """`with limiter.acquire("openai", timeout=30) as permit:`

        As `Limiter.acquire`, and raises the same. An exception in the waiting thread, such as
        KeyboardInterrupt, returns the ticket. A thread cannot be cancelled: when the session is
        lost, `permit.lost` is set, and leaving raises LeaseLost.
        """
        return SyncAcquisition(self, lambda: self._limiter.acquire(*limits, **options))

    def try_acquire(
        self, *limits: str, **options: Unpack[AttemptOptions]
    ) -> SyncAcquisition[SyncPermit | None]:
        """`with limiter.try_acquire("kind:text_only") as permit:`; None if none is free now."""
        return SyncAcquisition(self, lambda: self._limiter.try_acquire(*limits, **options))

    def limited(
        self, *limits: str, **options: Unpack[AcquireOptions]
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorate a plain function: each call waits for a permit and runs while it holds one.

        Raises TypeError for a coroutine function or a generator, which would outlive the permit.
        """

        def decorate(function: Callable[P, R]) -> Callable[P, R]:
            lazy = (
                inspect.iscoroutinefunction(function)
                or inspect.isgeneratorfunction(function)
                or inspect.isasyncgenfunction(function)
            )
            if lazy:
                raise TypeError(f"{function!r} is no plain function")

            @functools.wraps(function)
            def call(*args: P.args, **kwargs: P.kwargs) -> R:
                with self.acquire(*limits, **options):
                    return function(*args, **kwargs)

            return call

        check_names(limits)
        return decorate

    def hold(self, demand: Demand, close: Callable[[], object]) -> ThreadPermit:
        """Return a permit for a use whose end another object sees; see `ThreadPermit`.

        It is overdue after the `hard_ms` of the demand.
        """
        return ThreadPermit(
            self, lambda: self._limiter.acquire_for(demand), hard_ms=demand.hard_ms, close=close
        )

    # -- state and changes

    def run(self, operation: Callable[[Limiter], Coroutine[Any, Any, R]]) -> R:
        """Run any other method of a `Limiter`: `limiter.run(lambda inner: inner.history())`.

        Do not use it to acquire: a permit belongs to the task that requested it.
        """
        return self.ask(lambda: operation(self._limiter))

    def local_state(self) -> LocalState:
        """Return this process's state, without asking Valkey."""

        async def look() -> LocalState:
            return self._limiter.local_state()

        return self.ask(look)

    def snapshot(self) -> Snapshot:
        """Return the pool as Valkey has it. Raises LimiterUnavailable if it does not answer."""
        return self.run(lambda limiter: limiter.snapshot())

    def penalise(
        self,
        limit: str,
        *,
        for_ms: float = FOR_EVER_MS,
        reason: str = "",
        by: str = "",
        ramp_ms: int = RAMP_MS,
    ) -> bool:
        """Pause a limit in all processes, as `Limiter.penalise`."""
        return self.run(
            lambda limiter: limiter.penalise(
                limit, for_ms=for_ms, reason=reason, by=by, ramp_ms=ramp_ms
            )
        )

    def resume(self, limit: str, *, by: str = "") -> bool:
        """End a pause, as `Limiter.resume`."""
        return self.run(lambda limiter: limiter.resume(limit, by=by))
