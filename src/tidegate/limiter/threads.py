"""The limiter for threads: a `Limiter` on an event loop in a thread of its own.

Invariants: a permit is counted until the thread that has it has left its `with`, also when it was
lost meanwhile, since a thread cannot be cancelled; nothing is submitted to a loop that has ended;
a process made by `fork` never uses the connections of its parent.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import os
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, Unpack

from tidegate.errors import ShuttingDown
from tidegate.limiter.decorate import AcquireOptions, AttemptOptions
from tidegate.limiter.demand import Demand
from tidegate.limiter.limiter import Limiter
from tidegate.limiter.limits import PoolPolicy
from tidegate.limiter.observer import Observer
from tidegate.limiter.operations import FOR_EVER_MS, RAMP_MS
from tidegate.limiter.precedence import OnConflict
from tidegate.limiter.snapshot import LocalState, Snapshot
from tidegate.limiter.sync_permit import Held, SyncAcquisition, SyncAttempt

P = ParamSpec("P")
R = TypeVar("R")


class SyncLimiter:
    """Permits of one pool for the threads of this process. Enter it, or call `start` and `close`.

    Any number of threads may use it at once. Make one in each process: after a `fork` the child
    has neither the thread nor the connections, and every use of it there raises RuntimeError.
    """

    def __init__(
        self,
        url: str,
        *,
        pool: str,
        policy: PoolPolicy,
        instance_id: str | None = None,
        observer: Observer | None = None,
        on_conflict: OnConflict = "raise",
    ) -> None:
        """As `Limiter`. The methods of `observer` are called on the limiter's own thread."""
        limiter = functools.partial(Limiter, url, pool=pool, policy=policy)
        self._limiter = limiter(instance_id=instance_id, observer=observer, on_conflict=on_conflict)
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="tidegate-limiter", daemon=True)
        # Reentrant: a finalizer may submit in the middle of a submission.
        self._gate = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._grace_ms = 0
        self._closing = False
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._ended = threading.Event()

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        pool: str,
        policy: PoolPolicy,
        instance_id: str | None = None,
        observer: Observer | None = None,
        on_conflict: OnConflict = "raise",
    ) -> Self:
        """A limiter of `pool` at `url`, as `Limiter.from_url`."""
        limiter = functools.partial(cls, url, pool=pool, policy=policy)
        return limiter(instance_id=instance_id, observer=observer, on_conflict=on_conflict)

    def __repr__(self) -> str:
        return f"<SyncLimiter {self._limiter!r}>"

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

    def start(self) -> None:
        """Start the thread and enter the pool. Raises ConfigError as `Limiter.start`."""
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self.close()
            raise

    def close(self, grace_ms: int = 0) -> None:
        """End the session and join the thread; as `Limiter.aclose`.

        Threads that wait get ShuttingDown. Those with a permit may leave within `grace_ms`; then
        `permit.lost` is set, they have a second more, and leaving raises LeaseLost. In a forked
        process this does nothing: the session is its parent's.
        """
        if not self.ours():
            return
        with self._gate:
            self._closing, self._grace_ms = True, grace_ms
            if self._stop is not None:
                self.tell(self._stop.set)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            # A start that failed is told to whoever waits for it; later faults are the thread's.
            if self._started.done():
                raise
            self._started.set_exception(error)
        finally:
            self._ended.set()

    async def _serve(self) -> None:
        stop = asyncio.Event()
        with self._gate:
            self._loop, self._stop = asyncio.get_running_loop(), stop
            if self._closing:  # before it was open
                stop.set()
        try:
            await self._limiter.start()
            self._started.set_result(None)
            await stop.wait()
            await self._limiter.aclose(self._grace_ms)
        finally:
            with self._gate:
                self._ended.set()
            # What was submitted before becomes tasks now, which `asyncio.run` ends.
            await asyncio.sleep(0)

    def ours(self) -> bool:
        """False in a process that was forked from the one that made this."""
        return os.getpid() == self._pid

    def submit(self, make: Callable[[], Coroutine[Any, Any, R]]) -> concurrent.futures.Future[R]:
        """Run a coroutine on the limiter's loop. Raises ShuttingDown when that has ended."""
        if not self.ours():
            raise RuntimeError("this SyncLimiter belongs to the process that was forked: make one")
        with self._gate:
            if self._loop is None or self._ended.is_set():
                raise ShuttingDown("the limiter has not been started, or is closed")
            return asyncio.run_coroutine_threadsafe(make(), self._loop)

    def tell(self, call: Callable[[], object]) -> None:
        """Call on the limiter's loop; one that has ended needs no news."""
        if not self.ours():
            return
        with self._gate:
            if self._loop is not None and not self._ended.is_set():
                self._loop.call_soon_threadsafe(call)

    # -- permits

    def acquire(self, *limits: str, **options: Unpack[AcquireOptions]) -> SyncAcquisition:
        """`with limiter.acquire("kind:text_only", deadline_ms=30_000) as permit:`

        As `Limiter.acquire`, and raises the same. An exception in the waiting thread, such as
        KeyboardInterrupt, gives the ticket back. A thread cannot be cancelled: when the session is
        lost, `permit.lost` is set, and leaving raises LeaseLost.
        """
        return SyncAcquisition(self, lambda: self._limiter.acquire(*limits, **options))

    def try_acquire(self, *limits: str, **options: Unpack[AttemptOptions]) -> SyncAttempt:
        """`with limiter.try_acquire("kind:text_only") as permit:`; None if none is free at once."""
        return SyncAttempt(self, lambda: self._limiter.try_acquire(*limits, **options))

    def limited(
        self, *limits: str, **options: Unpack[AcquireOptions]
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorate a plain function: each call of it waits for a permit and runs while it has it.

        Raises TypeError for a coroutine function or a generator: they would outlive the permit.
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
                with self.acquire(*limits, **options) as permit:
                    permit.confirm()
                    return function(*args, **kwargs)

            return call

        return decorate

    def hold(self, demand: Demand, close: Callable[[], object]) -> Held:
        """A permit for a use whose end another object sees; see `Held`.

        It is overdue when the `hard_ms` of the demand are over.
        """
        return Held(
            self, lambda: self._limiter.acquire_for(demand), hard_ms=demand.hard_ms, close=close
        )

    # -- what can be seen and changed

    def run(self, ask: Callable[[Limiter], Coroutine[Any, Any, R]]) -> R:
        """Anything else that a `Limiter` can do: `limiter.run(lambda inner: inner.history())`.

        Do not acquire by it: a permit belongs to the task that asked for it.
        """
        return self.submit(lambda: ask(self._limiter)).result()

    def local_state(self) -> LocalState:
        """This process's part, without asking Valkey."""

        async def look() -> LocalState:
            return self._limiter.local_state()

        return self.submit(look).result()

    def snapshot(self) -> Snapshot:
        """The pool as Valkey sees it. Raises LimiterUnavailable when it does not answer."""
        return self.run(lambda limiter: limiter.snapshot())

    def penalise(
        self,
        limit: str,
        *,
        for_ms: int = FOR_EVER_MS,
        reason: str = "",
        by: str = "",
        ramp_ms: int = RAMP_MS,
    ) -> bool:
        """Pause a limit in all processes, as `Limiter.penalise`."""
        options: dict[str, Any] = {"reason": reason, "by": by, "ramp_ms": ramp_ms}
        return self.run(lambda limiter: limiter.penalise(limit, for_ms=for_ms, **options))

    def resume(self, limit: str, *, by: str = "") -> bool:
        """End a pause, as `Limiter.resume`."""
        return self.run(lambda limiter: limiter.resume(limit, by=by))
