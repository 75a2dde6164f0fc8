"""One request of a thread to an upstream and its answer, under a permit.

Invariants: as `exchange.py`, but a thread cannot be interrupted: a permit that is lost or overdue
is noticed when the next bytes have come, or at once where nobody is sending or reading.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tidegate.errors import LimiterUnavailable
from tidegate.integrations.answer import outcome_of_error, outcome_of_status
from tidegate.limiter.sync_permit import SyncPermit

if TYPE_CHECKING:
    from tidegate.limiter import Demand, Tokens
    from tidegate.limiter.permit import Outcome
    from tidegate.limiter.threads import SyncLimiter

logger = logging.getLogger("tidegate.integrations")


class SyncExchange:
    """`begin`, send inside `using`, say `answered`, read inside `using`, and end it always."""

    __slots__ = (
        "_close",
        "_demand",
        "_held",
        "_in_use",
        "_limiter",
        "_open",
        "_outcome",
        "_overload",
        "_permit",
        "penalised",
    )

    def __init__(
        self,
        limiter: SyncLimiter,
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
        self.penalised = penalised
        self._held = limiter.hold(demand, self._close_unused)
        self._permit: SyncPermit | None = None
        # Taken by whoever sends, reads or closes; a thread of the limiter's only tries.
        self._in_use = threading.RLock()
        self._open = True
        self._close: Callable[[], None] | None = None
        self._outcome: Outcome = "ignored"

    def __repr__(self) -> str:
        return f"<SyncExchange {self._demand.limits} open={self._open}>"

    def begin(self) -> None:
        """Wait for the permit, right before sending. Raises what `SyncLimiter.acquire` raises, or
        LeaseLost; nothing may be sent then. An interrupt gives the ticket or the permit back."""
        self._permit = self._held.enter()
        assert self._permit is not None
        try:
            self._permit.confirm()
        except BaseException:
            self._shut("ignored", None)
            raise

    @contextmanager
    def using(self) -> Iterator[None]:
        """Send or read inside. Raises LeaseLost or UpstreamTimeout before and after, when the
        permit was lost or is overdue."""
        with self._in_use:
            self._check()
            yield
            self._check()

    def _check(self) -> None:
        if self._held.failure is not None:
            raise self._held.failure

    def answered(self, status: int, close: Callable[[], None]) -> None:
        """The answer has begun; `close` ends it."""
        self._outcome = outcome_of_status(status)
        self._close = close

    def _close_unused(self) -> None:
        """Lost, overdue or dropped: close the answer, unless it is in use. In another thread."""
        if self._in_use.acquire(blocking=False):
            try:
                self._shut("ignored", None)
            finally:
                self._in_use.release()

    def complete(self, tokens: int | Tokens | None) -> None:
        """The whole answer was read. Raises LeaseLost when the permit was lost meanwhile."""
        self._shut(self._outcome, tokens)
        self._held.leave()

    def fail(self, error: BaseException) -> None:
        """Sending or reading ended with `error`."""
        self._shut(outcome_of_error(error, self._overload), None)

    def abandon(self) -> None:
        """Nobody reads the answer any further. Does nothing after `complete` or `fail`."""
        self._shut("ignored" if self._outcome == "success" else self._outcome, None)

    def drop(self) -> bool:
        """The answer was collected as garbage: close it and give the permit back, soon.

        True if it was still open. May be called in any thread.
        """
        return self._open and self._held.drop()

    def pause(self, for_ms: int) -> None:
        """The upstream said 429, and for how long: pause a limit in all processes."""
        if self.penalised is None:
            return
        try:
            self._limiter.penalise(self.penalised, for_ms=for_ms, reason="429", by="upstream")
        except LimiterUnavailable as away:
            # Nothing of the answer is lost by it: the next 429 tries again.
            logger.warning("a 429 could not pause %s: %s", self.penalised, away)

    def _shut(self, outcome: Outcome, tokens: int | Tokens | None) -> None:
        with self._in_use:
            if not self._open:
                return
            self._open = False
            try:
                if self._close is not None:
                    self._close()
            finally:
                if self._permit is not None:
                    self._permit.settle(outcome, tokens=tokens)
                self._held.release()
