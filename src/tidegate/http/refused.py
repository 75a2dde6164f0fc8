"""Requests that were turned away before there was anything to record, for those who count calls."""

from __future__ import annotations

from datetime import UTC, datetime

from starlette.requests import Request
from starlette.types import Scope

from tidegate.call import ANYBODY, Caller
from tidegate.errors import TidegateError
from tidegate.http.access import CALLER_IN_SCOPE
from tidegate.http.problems import status_of
from tidegate.http.services import Services, services_of
from tidegate.observed import REFUSED, Observed, Source
from tidegate.relay.paths import Dialect


def note_refused(scope: Scope, source: Source, error: TidegateError) -> None:
    """Of a request to `/submit` or `/stream`."""
    caller: Caller = scope.get(CALLER_IN_SCOPE, ANYBODY)
    services_of(Request(scope)).store.observers.note(
        Observed(
            source=source,
            status=REFUSED,
            tenant_id=caller.tenant_id,
            finished_at=datetime.now(UTC),
            streamed=source == "stream",
            http_status=status_of(error),
            code=error.code,
        )
    )


def note_native(
    services: Services,
    caller: Caller,
    dialect: Dialect,
    operation: str,
    http_status: int,
    error: TidegateError,
) -> None:
    """Of a request to a native path. http_status: what the client was told."""
    services.store.observers.note(
        Observed(
            source="relay",
            status=REFUSED,
            tenant_id=caller.tenant_id,
            finished_at=datetime.now(UTC),
            dialect=dialect.value,
            operation=operation,
            http_status=http_status,
            code=error.code,
        )
    )
