"""The right to make one upstream call, tied to the task that asked for it.

Invariants: released once, without an await, so that no cancellation can come between; when the
session behind it is lost the task is cancelled and `LeaseLost` leaves the `async with`, told apart
from a cancellation by anybody else as `asyncio.timeout` does it, by `Task.uncancel`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from tidegate.errors import LeaseLost
from tidegate.limiter.ledger import Holding

if TYPE_CHECKING:
    from tidegate.limiter.limiter import Limiter


class Permit:
    """One call's permit. `fence` orders permits: (epoch, sequence), higher is younger.

    lost: set when the session behind the permit is gone; the body is being cancelled then.
    waited_ms: from asking to being let in.
    A permit that was passed on inside the process while Valkey was away, or taken from the local
    share, has no sequence of its own: its fence may equal that of the permit before it.
    """

    __slots__ = ("_check_lapse", "_holding", "lost", "outcome", "tokens")

    def __init__(self, holding: Holding, check_lapse: Callable[[], object]) -> None:
        self._holding = holding
        self._check_lapse = check_lapse
        self.lost = asyncio.Event()
        self.outcome = "success"
        self.tokens: int | None = None

    @property
    def limit(self) -> str:
        return self._holding.limit

    @property
    def fence(self) -> tuple[int, int]:
        return (self._holding.epoch, self._holding.seq)

    @property
    def waited_ms(self) -> float:
        return self._holding.waited_ms

    async def confirm(self) -> None:
        """Await this right before what the permit is for.

        A process that stood still since it was let in learns here that its lease is over, instead
        of making one more call first: the body is cancelled, and LeaseLost leaves the `async with`.
        Costs no round trip.
        """
        self._check_lapse()
        if self.lost.is_set():
            await asyncio.sleep(0)  # the cancellation arrives here

    def settle(self, outcome: str = "success", tokens: int | None = None) -> None:
        """Remember how the call ended and what it used; the release carries it.

        outcome: `success`, `ignored` or `dropped`. tokens: actual usage, None if unknown.
        """
        self.outcome = outcome
        self.tokens = tokens

    def __repr__(self) -> str:
        return f"<Permit {self.limit} fence={self.fence} lost={self.lost.is_set()}>"


class Acquisition:
    """What `Limiter.acquire` returns: enter it to wait for the permit, leave it to release."""

    __slots__ = (
        "_cancelling",
        "_deadline_ms",
        "_hard_ms",
        "_limit",
        "_limiter",
        "_permit",
        "_task",
    )

    def __init__(
        self, limiter: Limiter, limit: str, *, deadline_ms: int | None, hard_ms: int | None
    ) -> None:
        self._limiter = limiter
        self._limit = limit
        self._deadline_ms = deadline_ms
        self._hard_ms = hard_ms
        self._permit: Permit | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0

    async def __aenter__(self) -> Permit:
        if self._permit is not None:
            raise RuntimeError("an acquisition can be entered once")
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("acquire needs a task")
        waiter = self._limiter._ask(self._limit, self._deadline_ms, self._hard_ms)
        try:
            holding = await waiter.future
        except BaseException:
            self._limiter._abandon(waiter)
            raise
        permit = Permit(holding, self._limiter._session.check_lapse)
        self._task, self._cancelling, self._permit = task, task.cancelling(), permit
        holding.on_fence = self._fence
        if holding.fenced:  # between the grant and our waking up
            self._fence()
        self._limiter._admitted(holding)
        return permit

    def _fence(self) -> None:
        assert self._permit is not None
        assert self._task is not None
        self._permit.lost.set()
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
        asked = permit.lost.is_set()
        holding.on_fence = permit.lost.set
        # A body that ends in the moment its process wakes up from a pause has lost its lease too.
        self._limiter._session.check_lapse()
        self._limiter._release(permit)
        if not permit.lost.is_set():
            return
        ours = not asked or task.uncancel() <= self._cancelling
        if kind is None or (ours and asked and issubclass(kind, asyncio.CancelledError)):
            message = f"the session that held a permit of {permit.limit} is gone"
            raise LeaseLost(message) from error
