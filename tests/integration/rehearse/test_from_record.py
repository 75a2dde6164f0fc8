"""A trace is taken from the record: all that was let in, of whom, and for how long it was open.

That waits and shares come out as foretold needs a machine with nothing else to do, and more calls
than these: `make chaos` plays them (`chaos/test_rehearsal.py`).
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from uuid import UUID

import pytest

from tests import rehearsal
from tests.commands import ran
from tests.fleet import Fleet


def submitted_on(request_id: UUID) -> date:
    """By the time in the id, a UUID of version 7."""
    return datetime.fromtimestamp(int(request_id.hex[:12], 16) / 1000, UTC).date()


@pytest.mark.timeout(90)
async def test_the_record_gives_the_calls_that_were_let_in(tmp_path: Path) -> None:
    arrivals = rehearsal.trace_of(3)
    settings = rehearsal.settings_in(tmp_path / "policy")
    async with Fleet(tmp_path / "fleet", apis=1, workers=0, settings=settings) as fleet:
        seen = await rehearsal.play(fleet, arrivals)
        recorded = await ran(
            *("rehearse", "--from-record", "10m", "--json", "--processes", "1"),
            cwd=tmp_path,
            env=fleet.environment(),
        )
        day = submitted_on(next(iter(seen.ids)))
        of_day = await ran(
            *("rehearse", "--from-record", f"{day}", "--json", "--processes", "1"),
            cwd=tmp_path,
            env=fleet.environment(),
        )
        empty = await ran(
            *("rehearse", "--from-record", "2024-02-29"), cwd=tmp_path, env=fleet.environment()
        )
    assert 0 < of_day.json["calls"] <= recorded.json["calls"]  # some may be of the next day
    assert (empty.code, "2024-02-29" in empty.complained) == (2, True)
    assert recorded.code == 0, recorded.complained
    assert recorded.json["calls"] == len(seen.ids) > 0
    told = {one["name"]: one["calls"] for one in recorded.json["tenants"]}
    assert told == {tenant: len(waits_ms) for tenant, waits_ms in seen.waits_ms.items()}
    # Each was open at the provider for at least as long as the trace has it.
    for number, took_ms in seen.took_ms.items():
        assert took_ms >= round(arrivals[number].duration_ms) - 1
    [used] = [one["used"] for one in recorded.json["limits"] if one["limit"] == rehearsal.LIMIT]
    assert 0 < used <= 1
