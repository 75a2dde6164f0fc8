"""Where a day does not end while a test runs, and clocks that are wrong."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from types import ModuleType
from zoneinfo import ZoneInfo

import pytest

from tidegate.http import jobs as http_jobs
from tidegate.jobs import batches, calls, provider_batches, tiers, worker
from tidegate.store import jobs, notifications

OF_WORKERS = (batches, calls, provider_batches, tiers, worker, notifications)
OF_ALL = (*OF_WORKERS, http_jobs, jobs)


def zone_at(now: datetime) -> str:
    """A zone in which the next midnight is at least two hours away."""
    usual = "America/Los_Angeles"
    return usual if now.astimezone(ZoneInfo(usual)).hour < 22 else "Asia/Tokyo"


# What a day's quota that is used up refuses, it admits after midnight: each test of one names this.
ZONE = zone_at(datetime.now(UTC))


def set_clock(
    patch: pytest.MonkeyPatch, ahead: timedelta, of: tuple[ModuleType, ...] = OF_WORKERS
) -> None:
    """The wall clock of these parts of a process is ahead of PostgreSQL's."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + ahead  # of the usual class, which can be written as JSON

    for module in of:
        patch.setattr(module, "datetime", Wrong, raising=False)
