"""What an answer of the server means for those who wait. Pure."""

from __future__ import annotations

from tidegate.errors import AdmissionError, DeadlineExceeded, DemandImpossible, QueueFull
from tidegate.limiter.entries import Batch, Waiter
from tidegate.limiter.ledger import Ledger
from tidegate.limiter.limits import PoolPolicy
from tidegate.limiter.observer import Observer
from tidegate.limiter.wire import SyncReply


class Answers:
    """Grants and refusals, told to the ledger and to the observer."""

    def __init__(self, ledger: Ledger, observer: Observer) -> None:
        self._ledger = ledger
        self._observer = observer

    def take(
        self, batch: Batch, reply: SyncReply, policy: PoolPolicy, sent_ms: float, at_ms: float
    ) -> None:
        """What the server decided about a batch that was sent at `sent_ms`."""
        for ticket, seq in reply.grants:
            self._ledger.grant(ticket, reply.epoch, seq, at_ms, sent_ms)
        for ticket in reply.refused:
            self._refuse_full(ticket, policy, at_ms)
        for waiter in batch.enqueues:
            if waiter.once and waiter.ticket in self._ledger.waiting:
                limit = waiter.flow.limits[0]
                error = DeadlineExceeded("no permit at once", limit=limit, retry_after_ms=1000)
                self._refuse(waiter, error, at_ms)

    def refuse_impossible(self, policy: PoolPolicy, at_ms: float) -> None:
        """The policy changed: some may wait for what no waiting will bring."""
        for waiter in list(self._ledger.waiting.values()):
            try:
                waiter.flow.refresh(policy)
            except DemandImpossible as error:
                self._refuse(waiter, error, at_ms)

    def _refuse_full(self, ticket: int, policy: PoolPolicy, at_ms: float) -> None:
        waiter = self._ledger.waiting.get(ticket)
        if waiter is None:
            return
        waiter.sent = False  # it is in no queue
        error = QueueFull(
            f"{waiter.flow.tenant} has {policy.queue_per_tenant} waiters already",
            limit=waiter.flow.limits[0],
            retry_after_ms=1000,
        )
        self._refuse(waiter, error, at_ms)

    def _refuse(self, waiter: Waiter, error: AdmissionError, at_ms: float) -> None:
        self._observer.refused(error.limit, error.code)
        self._ledger.refuse(waiter, error, at_ms)
