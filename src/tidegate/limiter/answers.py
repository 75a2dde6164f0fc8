"""What an answer of the server means for those who wait. Pure."""

from __future__ import annotations

from tidegate.errors import AdmissionError, DeadlineExceeded, DemandImpossible, QueueFull
from tidegate.limiter.entries import Batch, Waiter
from tidegate.limiter.flow import Flow
from tidegate.limiter.ledger import Ledger
from tidegate.limiter.limits import PoolPolicy
from tidegate.limiter.observer import Observer
from tidegate.limiter.outlook import Barred, Outlook, too_early
from tidegate.limiter.wire import SyncReply, SyncRequest


class Answers:
    """Grants and refusals, told to the ledger and to the observer."""

    def __init__(self, ledger: Ledger, observer: Observer) -> None:
        self._ledger = ledger
        self._observer = observer

    def take(
        self,
        batch: Batch,
        request: SyncRequest,
        reply: SyncReply,
        policy: PoolPolicy,
        sent_ms: float,
        at_ms: float,
    ) -> None:
        """What the server decided about a batch that was sent at `sent_ms`."""
        for ticket, seq in reply.grants:
            self._ledger.grant(ticket, reply.epoch, seq, at_ms, sent_ms)
        for ticket in reply.refused:
            self._refuse_full(ticket, policy, at_ms)
        for barred in reply.barred:
            self._refuse_barred(barred, policy, at_ms)
        for outlook in reply.outlook:
            flow = self._flow_named(request.flows[outlook.flow - 1])
            self._foresee(flow, outlook, policy, sent_ms, at_ms)
        for waiter in batch.enqueues:
            if waiter.once and waiter.ticket in self._ledger.waiting:
                limit = waiter.flow.held_up_by or waiter.flow.limits[0]
                error = DeadlineExceeded("no permit at once", limit=limit, retry_after_ms=1000)
                self._refuse(waiter, error, at_ms)

    def refuse_impossible(self, policy: PoolPolicy, at_ms: float) -> None:
        """The policy changed: some may wait for what no waiting will bring."""
        for waiter in list(self._ledger.waiting.values()):
            try:
                waiter.flow.refresh(policy)
            except DemandImpossible as error:
                self._refuse(waiter, error, at_ms)

    def _flow_named(self, key: str) -> Flow:
        band, tenant, lane = key.split("|", 2)
        return self._ledger.flow(int(band), tenant, tuple(lane.split(" ")))

    def _refuse_barred(self, barred: Barred, policy: PoolPolicy, at_ms: float) -> None:
        waiter = self._ledger.waiting.get(barred.ticket)
        if waiter is not None:
            waiter.sent = False  # it is in no queue
            self._refuse_early(waiter, barred.limit, policy, barred.room_ms, barred.used, at_ms)

    def _foresee(
        self, flow: Flow, outlook: Outlook, policy: PoolPolicy, sent_ms: float, at_ms: float
    ) -> None:
        """What a flow waits for. Nobody waits longer for what is certain to come too late."""
        if not flow.waiting:
            return
        name, room_ms, used = outlook.limit, outlook.room_ms, outlook.used
        flow.held_up_by, flow.used = name, used
        flow.room_at_ms = at_ms + room_ms if room_ms else 0.0
        if room_ms and outlook.firm:
            for waiter in list(flow.waiting.values()):
                if waiter.deadline_ms <= sent_ms + room_ms:
                    self._refuse_early(waiter, name, policy, room_ms, used, at_ms)

    def _refuse_early(
        self,
        waiter: Waiter,
        name: str,
        policy: PoolPolicy,
        room_ms: int,
        used: int,
        at_ms: float,
    ) -> None:
        amount = waiter.flow.spends(waiter.amounts).get(name, 1)
        self._refuse(waiter, too_early(name, policy.limit(name), room_ms, used, amount), at_ms)

    def _refuse_full(self, ticket: int, policy: PoolPolicy, at_ms: float) -> None:
        waiter = self._ledger.waiting.get(ticket)
        if waiter is None:
            return
        waiter.sent = False  # it is in no queue
        error = QueueFull(
            f"{waiter.flow.tenant} has {policy.queue_per_tenant} waiters already",
            limit=waiter.flow.held_up_by or waiter.flow.limits[0],
            retry_after_ms=1000,
        )
        self._refuse(waiter, error, at_ms)

    def _refuse(self, waiter: Waiter, error: AdmissionError, at_ms: float) -> None:
        self._observer.refused(error.limit, error.code)
        self._ledger.refuse(waiter, error, at_ms)
