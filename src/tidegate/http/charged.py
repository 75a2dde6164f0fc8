"""A request's record with what it cost, which stands in another table."""

from __future__ import annotations

from dataclasses import replace

from tidegate.errors import StoreUnavailable
from tidegate.http.services import Services
from tidegate.http.views import StatusView, status_view
from tidegate.store.records import RequestRecord
from tidegate.telemetry import Log, get_logger

log = get_logger()


async def charged_view(services: Services, record: RequestRecord, prefix: str) -> StatusView:
    """The record as its owner sees it; one that has not ended has cost nothing so far."""
    cost_micros = None
    if record.status.is_end and record.finished_at is not None:
        try:
            cost_micros, details = await services.store.recorded.charged(
                record.request_id, record.tenant_id, record.finished_at
            )
            record = replace(record, usage=replace(record.usage, details=details))
        except StoreUnavailable as away:  # an answer without its cost is better than none
            log.debug(Log.STORE_AWAY, detail=away.message)
    return status_view(record, prefix, cost_micros)
