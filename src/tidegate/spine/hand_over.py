"""Background calls on their way from the process that makes them to the workers.

Invariant: from before its request is sent until its provider reports its end, a call is counted in
the limiter, whatever process dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from tidegate.admission.demand import CallDemand
from tidegate.errors import LimiterUnavailable, StoreUnavailable
from tidegate.limiter import Limiter, Permit
from tidegate.record import CallRecord
from tidegate.spine.out import ended, undisturbed
from tidegate.spine.routing import Target
from tidegate.spine.run import CallFailed, Spine, UpstreamAccount
from tidegate.store.provider.background import BackgroundCalls
from tidegate.store.provider.resources import NewResource
from tidegate.store.spill import CallJournal

# How long a call stays counted after its longest time, so that a worker can cancel it.
GRACE_MS = 300_000
FIRST_LOOK_MS = 1_000
_START_TRIES = 20
_RETRY_S = 0.5


class BackgroundHandOver:
    """Hands a background call over from the process that makes it to the workers.

        permit ──► on record, counted under a name ──► request ──► id on record ──► permit returned
                                                          │
                                                          └── refused: neither counted nor on record

    From before its request is sent until the provider reports its end, a call is counted in the
    limiter under a name of its own that no process holds: if a process dies, the call stays
    counted, for its longest time at most. During its request it counts twice, and never less than
    once. A client that disconnects does not end the hand-over. A second cancellation, such as at
    shutdown, closes the request, and the call stays counted if it was sent.
    """

    def __init__(
        self,
        calls: BackgroundCalls,
        record: CallRecord,
        journal: CallJournal,
        kind: str,
        longest_ms: int,
    ) -> None:
        """longest_ms: how long the work may continue, if longer than any other call."""
        self._calls = calls
        self._record = record
        self._journal = journal
        self._kind = kind
        self._longest_ms = longest_ms
        self._permit: Permit | None = None
        self._held: tuple[Limiter, str] | None = None
        self._decided = asyncio.Event()

    async def admitted(self, permit: Permit | None) -> None:
        """Take the permit of the next attempt."""
        self._permit = permit

    async def make(
        self,
        target: Target,
        account: UpstreamAccount,
        demand: CallDemand,
        call: Callable[[], Awaitable[None]],
    ) -> None:
        """Make the call, and complete its hand-over even if the client leaves. Raises what the call
        raises, StoreUnavailable and LimiterUnavailable."""
        self._decided.clear()
        try:
            await self._begin(account, demand)
        except BaseException:  # cancellation too: nothing was sent
            await self.not_accepted()
            raise
        making = asyncio.ensure_future(call())
        try:
            await asyncio.shield(making)
        except asyncio.CancelledError:
            deciding = asyncio.ensure_future(self._decided.wait())
            try:
                await asyncio.wait({making, deciding}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                deciding.cancel()
                await ended(making)
            raise
        finally:
            if self._is_not_taken(making):
                await self.not_accepted()

    def _is_not_taken(self, making: asyncio.Future[None]) -> bool:
        """Whether the provider refused the call or never received it. A call without an answer may
        continue there, so it stays counted."""
        if self._decided.is_set() or not making.done():
            return False
        error = None if making.cancelled() else making.exception()
        refused = isinstance(error, CallFailed) and error.status > 0
        return refused or not self._record.sent

    async def _begin(self, account: UpstreamAccount, demand: CallDemand) -> None:
        record, within_ms = self._record, max(account.hard_ms, self._longest_ms)
        name = f"background-{record.id}-{record.attempts}"
        self._held = (account.limiter, name) if demand.limits else None
        limits = dict.fromkeys(demand.limits, 1)
        if self._permit is not None:
            limits |= self._permit.in_flight
        await self._calls.begin(record, self._kind, limits, name, within_ms)
        if limits:
            await account.limiter.hold(name, limits, within_ms + GRACE_MS)

    async def taken(self, made: Sequence[NewResource]) -> None:
        """Complete the hand-over of a call that the provider accepted. Raises StoreUnavailable if
        that cannot be written within some seconds; the call then stays counted for its longest
        time. A cancellation takes effect afterwards."""
        await undisturbed(self._hand_over(made))

    async def _hand_over(self, made: Sequence[NewResource]) -> None:
        for left in reversed(range(_START_TRIES)):
            try:
                await self._calls.start(self._record, made, FIRST_LOOK_MS)
                break
            except StoreUnavailable:
                if not left:
                    raise
            await asyncio.sleep(_RETRY_S)
        self._record.handed_over = True
        self._journal.leave(self._record)
        if self._permit is not None:
            self._permit.hand_over()
        self._decided.set()

    async def not_accepted(self) -> None:
        """Withdraw a call that the provider did not accept; what cannot be withdrawn now ends with
        its longest time. A cancellation takes effect afterwards."""
        await undisturbed(self._withdraw())

    async def _withdraw(self) -> None:
        with suppress(StoreUnavailable):
            await self._calls.drop(self._record.id)
        if self._held is not None:
            limiter, name = self._held
            with suppress(LimiterUnavailable):
                await limiter.revoke(name)
        self._decided.set()


async def count_again(calls: BackgroundCalls, spine: Spine) -> None:
    """Count all background work again, in case Valkey lost its data while no process ran. Work that
    ended meanwhile is not counted. Raises StoreUnavailable and LimiterUnavailable."""
    counted = dict[str, Limiter]()
    for one in await calls.counted():
        upstream = spine.targets.upstreams.get(one.upstream)
        if upstream is not None and one.limits:
            limiter = counted[one.permit] = spine.account(Target(upstream, "")).limiter
            await limiter.hold(one.permit, one.limits, one.left_ms + GRACE_MS)
    if counted:
        going_on = {one.permit for one in await calls.counted()}
        for permit in counted.keys() - going_on:
            await counted[permit].revoke(permit)
