"""A rehearsal's figures beside those of the real run, over four minutes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import rehearsal
from tests.fleet import Fleet
from tidegate.rehearse.simulation import Setting, rehearse

SECONDS = float(os.environ.get("TIDEGATE_REHEARSAL_S", "240"))
PLAYS = 20


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("apis", "seed"), [(1, 2), (3, 3), (1, 4)])
async def test_what_is_foretold_happens_within_a_tenth(
    tmp_path: Path, apis: int, seed: int
) -> None:
    arrivals = rehearsal.trace_of(SECONDS, seed)
    settings = rehearsal.settings_in(tmp_path / "policy")
    async with Fleet(tmp_path / "fleet", apis=apis, workers=0, settings=settings) as fleet:
        seen = await rehearsal.play(fleet, arrivals)
    played = rehearsal.as_it_was(arrivals, seen)
    setting = Setting(processes=apis, round_trip_ms=seen.round_trip_ms)
    found = rehearse("", played, rehearsal.policy(), setting, plays=PLAYS)
    rows = rehearsal.compared(found, seen)
    head = f"{len(arrivals)} calls, {apis} gateway processes, {seen.round_trip_ms:.2f} ms to Valkey"
    print(f"\n{head}\n{rehearsal.shown(rows)}")
    assert all(row.agrees for row in rows)
