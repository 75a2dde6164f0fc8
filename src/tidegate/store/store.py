"""Store: PostgreSQL as record and queue, and the blobs beside it; one collaborator for each noun.

Invariants: nothing waits longer than its deadline; every write may be repeated; what was reported
as durable is on a disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from tidegate.errors import StoreUnavailable
from tidegate.record import CallListeners
from tidegate.store.audit import AuditLog
from tidegate.store.batches import Batches, BatchLines, OpenBatches
from tidegate.store.blobs import Blobs
from tidegate.store.budgets import Budgets
from tidegate.store.database import HEAD, Connections, revision_of
from tidegate.store.idempotency import NativeKeys
from tidegate.store.jobs import Jobs, QueueCaps, StuckWork
from tidegate.store.notifications import Notifications
from tidegate.store.outbox import AlertOutbox, WebhookOutbox
from tidegate.store.provider.background import BackgroundCalls
from tidegate.store.provider.provider_batches import ProviderBatches
from tidegate.store.provider.reconciliations import Reconciliations
from tidegate.store.provider.resources import ProviderResources
from tidegate.store.provider.upstreams import UpstreamRevisions
from tidegate.store.queue import JobQueue
from tidegate.store.requests import ActiveRequests, Requests
from tidegate.store.retention import Retention, make_partitions
from tidegate.store.spill import CallJournal, Spill
from tidegate.store.statistics import History, QueueDepths, UsageTotals
from tidegate.store.tenants import Policies, Tenants

_SCHEMA_TIMEOUT_MS = 1_000  # less than the timeout of the probes in deploy/
_CLOSE_TIMEOUT_MS = 6_000


class Store:
    """All collaborators of a process's store: `start()` it, `aclose()` it at the end. `instance_id`
    must be new for every start of a process, since claims depend on it."""

    _background: asyncio.Future[tuple[None, None, None]] | None = None
    _schema_fitted = False
    has_seen_schema = False  # PostgreSQL has answered this process

    def __init__(
        self,
        url: str,
        *,
        instance_id: str,
        blobs: Blobs,
        spill_dir: Path,
        spill_max_bytes: int,
        audit_full: Literal["block", "drop"],
        claim_lease_ms: int,
        bodies_off: Collection[str] = (),
        listeners: CallListeners | None = None,
    ) -> None:
        self.instance_id, self.blobs = instance_id, blobs
        self.listeners = listeners or CallListeners()
        self.connections = connections = Connections(url)
        self.spill, self.journal = Spill(spill_dir, spill_max_bytes), CallJournal(spill_dir)
        self.budgets = Budgets(connections, instance_id=instance_id, folder=spill_dir.parent)
        self.usage, self.reconciliations = UsageTotals(connections), Reconciliations(connections)
        self.notifications = Notifications(connections)
        self.audit = AuditLog(
            connections,
            self.notifications,
            self.spill,
            self.journal,
            blobs,
            budgets=self.budgets,
            listeners=self.listeners,
            instance_id=instance_id,
            when_full=audit_full,
            bodies_off=bodies_off,
        )
        shared = (connections, self.notifications, self.listeners)
        self.jobs = Jobs(*shared, instance_id=instance_id)
        self.queue = JobQueue(*shared, self.audit, instance_id=instance_id, lease_ms=claim_lease_ms)
        self.provider_batches = ProviderBatches(
            connections, self.notifications, self.queue, self.budgets, instance_id, claim_lease_ms
        )
        self.background = BackgroundCalls(
            connections, self.audit, self.queue, self.budgets, instance_id, claim_lease_ms
        )
        self.upstreams = UpstreamRevisions(connections)
        self.provider_resources = ProviderResources(connections, self.audit.keep)
        self.batches = Batches(connections, self.notifications, self.audit, instance_id)
        self.open_batches = OpenBatches(connections, self.notifications)
        leases: dict[str, Any] = {"instance_id": instance_id, "lease_ms": claim_lease_ms}
        self.batch_lines = BatchLines(
            connections, self.audit, **leases, may_judge=lambda: self.queue.may_judge
        )
        self.native_keys = NativeKeys(connections, self.audit.keep, lease_ms=claim_lease_ms)
        self.requests = Requests(connections, blobs, self.notifications)
        self.running_calls = ActiveRequests(connections)
        self.queue_depths = QueueDepths(connections)
        self.queue_caps, self.history = QueueCaps(connections), History(connections, instance_id)
        self.stuck = StuckWork(connections, self.notifications, claim_lease_ms)
        self.policies, self.tenants = Policies(connections), Tenants(connections)
        self.outbox, self.alerts = WebhookOutbox(connections), AlertOutbox(connections)
        self.retention = Retention(connections, blobs, spill_dir)

    async def start(self) -> None:
        """Start connecting in the background: PostgreSQL may become available later."""
        self.connections.start()
        self.notifications.on_budgets.append(self.budgets.changed)
        self.budgets.is_pushed = self.notifications.is_sure
        self.budgets.wall = self.notifications.clock.now
        self.journal.open()
        self.audit.start()
        self._background = asyncio.gather(
            make_partitions(self.connections), self.budgets.run(), self.usage.run()
        )

    async def aclose(self) -> None:
        """Write what is pending, or leave it on disk, within about 10 s; then disconnect."""
        if self._background is not None:
            self._background.cancel()
            await asyncio.gather(self._background, return_exceptions=True)
        self.notifications.wake_all()
        await self.audit.aclose(_CLOSE_TIMEOUT_MS)
        await self.budgets.aclose()
        self.journal.close()
        await self.native_keys.aclose()
        await self.notifications.aclose()
        await self.connections.aclose()

    async def schema_fits(self) -> bool:
        """Whether the schema is at the revision that this code needs, or a later one.

        While PostgreSQL is unavailable, the last answer counts: an outage changes no schema.
        """
        try:
            revision = await self.connections.run(revision_of, timeout_ms=_SCHEMA_TIMEOUT_MS)
        except StoreUnavailable:
            return self._schema_fitted
        self.has_seen_schema = True
        self._schema_fitted = revision is not None and revision >= HEAD
        return self._schema_fitted
