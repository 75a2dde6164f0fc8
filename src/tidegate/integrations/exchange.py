"""One request to an upstream and its answer, under a permit.

Invariants: nothing is sent without a permit; the permit is given back once, when the answer's body
has been read to its end, closed, dropped, or was never there; when the permit is lost or overdue,
whoever sends or reads is interrupted and the answer closed before the permit is given back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from tidegate.errors import LimiterUnavailable
from tidegate.integrations.answer import outcome_of_error, outcome_of_status
from tidegate.limiter.hold import Hold

if TYPE_CHECKING:
    from tidegate.errors import TidegateError
    from tidegate.limiter import Demand, Limiter, Tokens
    from tidegate.limiter.permit import Outcome

logger = logging.getLogger("tidegate.integrations")


class Exchange:
    """`begin`, send inside `using`, say `answered`, read inside `using`, and `finish` it always."""

    __slots__ = (
        "_close",
        "_demand",
        "_hold",
        "_limiter",
        "_outcome",
        "_overload",
        "_scopes",
        "_unused",
        "_users",
        "penalised",
    )

    def __init__(
        self,
        limiter: Limiter,
        demand: Demand,
        penalised: str | None,
        overload: tuple[type[Exception], ...],
    ) -> None:
        """penalised: the limit that `pause` pauses.
        overload: the client's errors that speak of an upstream with too much to do.
        """
        self._limiter = limiter
        self._demand = demand
        self._overload = overload
        self._hold = Hold(lambda: limiter.acquire_for(demand), self._stop, hard_ms=demand.hard_ms)
        self.penalised = penalised
        self._scopes: set[asyncio.Timeout] = set()
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()
        self._close: Callable[[], Awaitable[None]] | None = None
        self._outcome: Outcome = "ignored"

    def __repr__(self) -> str:
        return f"<Exchange {self._demand.limits} {self._hold!r}>"

    async def begin(self) -> None:
        """Wait for the permit, right before sending. Raises what `Limiter.acquire` raises, or
        LeaseLost; nothing may be sent then. Cancellation gives the ticket or the permit back."""
        await self._hold.take()
        try:
            await self._hold.confirm()
        except BaseException:
            self._release("ignored", None)
            raise

    @asynccontextmanager
    async def using(self) -> AsyncIterator[None]:
        """Send or read inside, in any task. When the permit is lost or overdue, what is inside is
        cancelled, and LeaseLost or UpstreamTimeout leaves."""
        self._check()
        scope = asyncio.timeout(None)
        with self._user():
            try:
                async with scope:
                    self._scopes.add(scope)
                    try:
                        yield
                    finally:
                        self._scopes.discard(scope)
            except TimeoutError:
                if scope.expired():
                    self._check()
                raise

    @contextmanager
    def _user(self) -> Iterator[None]:
        """`_stop` waits until all have left."""
        self._users += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    @property
    def failure(self) -> TidegateError | None:
        """Why the permit is no longer good; None while it is."""
        return self._hold.failure

    def _check(self) -> None:
        if self._hold.failure is not None:
            raise self._hold.failure

    def answered(self, status: int, close: Callable[[], Awaitable[None]]) -> None:
        """The answer has begun; `close` ends it, and may be called more than once."""
        self._outcome = outcome_of_status(status)
        self._close = close

    async def _stop(self) -> None:
        """Lost, overdue or dropped: interrupt whoever uses the connection, then close the answer.

        Runs in the task that holds the permit.
        """
        now = asyncio.get_running_loop().time()
        for scope in self._scopes:
            scope.reschedule(now)
        # Whoever has been interrupted may be closing the answer already.
        while self._users:
            await self._unused.wait()
        if self._close is not None:
            await self._close()

    async def complete(self, tokens: int | Tokens | None) -> None:
        """The whole answer was read; `tokens` is what it used, None where that is unknown.

        Raises LeaseLost when the permit was lost meanwhile.
        """
        await self._end(self._outcome, tokens)
        self._check()

    async def fail(self, error: BaseException) -> None:
        """Sending or reading ended with `error`."""
        await self._end(outcome_of_error(error, self._overload), None)

    async def abandon(self) -> None:
        """Nobody reads the answer any further. Does nothing after `complete` or `fail`."""
        await self._end(self._outcome_of(whole=False), None)

    def closed(self, *, whole: bool) -> None:
        """The answer has been closed by others: give the permit back. The first call counts.

        whole: whether it was read to its end.
        """
        self._release(self._outcome_of(whole=whole), None)

    def _outcome_of(self, *, whole: bool) -> Outcome:
        return self._outcome if whole or self._outcome != "success" else "ignored"

    async def _end(self, outcome: Outcome, tokens: int | Tokens | None) -> None:
        close, self._close = self._close, None
        try:
            if close is not None:
                with self._user():
                    await close()
        finally:
            self._release(outcome, tokens)
        await self._hold.ended()

    def _release(self, outcome: Outcome, tokens: int | Tokens | None) -> None:
        if not self._hold.released:
            if self._hold.permit is not None:
                self._hold.permit.settle(outcome, tokens=tokens)
            self._hold.release()

    def drop(self) -> bool:
        """The answer was collected as garbage: close it and give the permit back, soon.

        True if it was still open. May be called in any thread.
        """
        return self._hold.drop()

    async def pause(self, for_ms: int) -> None:
        """The upstream said 429, and for how long: pause a limit in all processes."""
        if self.penalised is None:
            return
        try:
            await self._limiter.penalise(self.penalised, for_ms=for_ms, reason="429", by="upstream")
        except LimiterUnavailable as away:
            # Nothing of the answer is lost by it: the next 429 tries again.
            logger.warning("a 429 could not pause %s: %s", self.penalised, away)
